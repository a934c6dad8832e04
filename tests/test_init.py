"""The package itself: its names, and that they are imported only when they are used."""

import subprocess
import sys
from types import ModuleType

import pytest

import pomona

WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_sorted_and_each_leads_to_what_it_says() -> None:
    constants = [n for n in pomona.__all__ if n.isupper()]
    classes = [n for n in pomona.__all__ if n[0].isupper() and n not in constants]
    functions = [n for n in pomona.__all__ if n.islower()]
    assert pomona.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    for name in pomona.__all__:
        assert isinstance(getattr(pomona, name), ModuleType) == (name in ("layout", "runtime"))
        assert name in dir(pomona)
    assert set(pomona.__all__) == {*pomona._PLACE_OF, "layout", "runtime"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pomona' has no attribute 'Prunner'"):
        pomona.Prunner  # noqa: B018


def test_importing_pomona_imports_no_torch() -> None:
    assert run(WITHOUT_TORCH + "import pomona; print(pomona.__version__)").strip() == pomona.__version__


@pytest.mark.check
def test_a_function_is_not_hidden_by_the_file_of_its_name() -> None:
    lines = ("from pomona.reporting import Report", "import pomona.pruner", "import pomona")
    code = """
for name in [name for name in sys.modules if name.startswith("pomona")]:
    del sys.modules[name]
{}
import pomona
print(type(pomona.report).__name__)
"""
    assert run("import sys" + "".join(map(code.format, lines))).split() == ["function"] * len(lines)


def test_modules_are_still_found_as_attributes() -> None:
    import pomona.scope

    assert pomona.scope.Scope is pomona.Scope
