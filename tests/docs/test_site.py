"""The site builds without a warning, loads nothing from other hosts, and has a place for every public name."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import pomona
from pomona.cli import parser
from tests.web.chromium import PROGRAM, opened, served

ROOT = Path(__file__).parents[2]
PHONE = 390  # CSS pixels

pytestmark = pytest.mark.check  # the site takes ten seconds to build


@dataclass
class Seen(HTMLParser):
    """What a built page shows and links to."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)  # to follow
    loaded: list[str] = field(default_factory=list)  # by the browser itself
    text: list[str] = field(default_factory=list)  # but for code and mathematics
    _inside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attributes}
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(given["href"])
        if tag in ("code", "script", "style", "math"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # advertises another tool
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Seen]:
    seen = {}
    for path in sorted(site.rglob("*.html")):
        if path.name != "404.html":  # whose links are absolute, because it is shown at any address
            page = seen[path.relative_to(site).as_posix()] = Seen()
            page.feed(path.read_text(encoding="utf-8"))
    return seen


def test_links_lead_to_pages_and_to_places_in_them(site: Path, pages: dict[str, Seen]) -> None:
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loaded:
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"https?:", path):
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            if not (site / target).is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[str, Seen]) -> None:
    assert [url for page in pages.values() for url in page.loaded if re.match(r"(https?:)?//", url)] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import[^;]*", styles) == []


def test_no_markup_is_left_to_see(pages: dict[str, Seen]) -> None:
    left = re.compile(r":\w+:`|\.\. \w+::|``|\$\$|\\\w+\{|^:::|^#+ |\]\(|\*\*\w|arithmatex", flags=re.MULTILINE)
    assert {name: found for name, page in pages.items() if (found := left.findall("".join(page.text)))} == {}


def test_every_file_of_docs_is_in_the_navigation(pages: dict[str, Seen]) -> None:
    files = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    home = {os.path.normpath(link.partition("#")[0]) for link in pages["how-to-choose.html"].links}
    assert files - home - {"how-to-choose.html"} == set()


def public_names() -> Iterator[tuple[str, set[str]]]:
    """Each name as users import it, and the names under which it may be documented."""
    modules = ["pomona", "pomona.runtime", "pomona.schedule", "pomona.score", "pomona.budget", "pomona.ops"]
    if importlib.util.find_spec("pomona.integrations"):
        package = importlib.import_module("pomona.integrations")
        modules += [f"pomona.integrations.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    for name in modules:
        module = importlib.import_module(name)
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == name]
        for key in getattr(module, "__all__", [key for key in own if not key.startswith("_")]):
            value = getattr(module, key)
            if not inspect.ismodule(value):
                at_top = {f"pomona.{key}"} if getattr(pomona, key, None) is value else set()
                yield f"{name}.{key}", {f"{name}.{key}", f"{getattr(value, '__module__', name)}.{key}"} | at_top


def test_every_public_name_has_a_place(pages: dict[str, Seen]) -> None:
    assert len(pomona.__all__) > 30
    places = set().union(*(page.ids for page in pages.values()))
    assert [name for name, possible in public_names() if not possible & places] == []


def test_every_command_and_option_is_documented(site: Path, pages: dict[str, Seen]) -> None:
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    page = (site / "cli.html").read_text(encoding="utf-8")
    for name, command in commands.choices.items():
        assert f"pomona-{name}" in pages["cli.html"].ids
        for action in command._actions:
            assert all(option in page for option in action.option_strings if option not in ("-h", "--help"))


def test_the_home_page_starts_like_the_readme(pages: dict[str, Seen]) -> None:
    opening = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    first = opening.partition("```python")[0].strip().splitlines()[2:]
    shown = " ".join("".join(pages["index.html"].text).split())
    assert " ".join(first).replace("**", "").split("`")[0] in shown
    counts = [len(re.findall(what, opening, flags=re.MULTILINE)) for what in (r"^```python", r"^\| --- ", r"^!\[")]
    assert counts == [1, 1, 1]  # ten lines, one table, one picture


IN_FRAMES = """
(async () => {
    const frames = %s.map((name) => {
        const frame = Object.assign(document.createElement("iframe"), { width: %d, height: 800, src: "/" + name });
        frame.style.border = "none";
        return [name, frame, new Promise((resolve) => (frame.onload = resolve))];
    });
    const wide = [];
    for (const [name, frame, loaded] of frames) {
        document.body.replaceChildren(frame);
        await loaded;
        const { scrollWidth, clientWidth } = frame.contentDocument.documentElement;
        if (scrollWidth > clientWidth) wide.push([name, scrollWidth]);
    }
    return wide;
})()
"""


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_pages_fit_a_phone(site: Path, pages: dict[str, Seen], tmp_path: Path) -> None:
    """Tables, code and formulas scroll within the page; none makes it wider than the screen."""
    with served(site) as port, opened(tmp_path / "profile") as page:
        page.call("Page.navigate", url=f"http://127.0.0.1:{port}/404.html")
        page.wait_for("document.readyState == 'complete'")
        assert page.evaluate(IN_FRAMES % (json.dumps(list(pages)), PHONE)) == []
        assert page.errors == []
