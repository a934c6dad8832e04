"""`pomona sweep`: the bisection, and that the test set is looked at once, at the end."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.studies.compare import Job
from pomona.studies.sweep import lost_by, sweep
from pomona.zoo.data import load_mnist
from tests.runs import Done, command_line
from tests.studies.test_compare import RECIPES, Forked, forks
from tests.train.test_stages import accuracy_of, weights_of

# The bisection


@given(
    answer=st.floats(0.5, 2000),
    low=st.floats(1, 50),
    factor=st.floats(1.001, 1000),
    resolution=st.floats(1.02, 3),
)
def test_the_answer_lies_between_the_best_and_the_limit_which_are_within_the_resolution(
    answer: float, low: float, factor: float, resolution: float
) -> None:
    """Lossless up to the answer, too much lost from there on."""
    high = low * factor
    found = sweep(lambda c: float(c > answer), allowed=0.5, low=low, high=high, resolution=resolution)
    assert all((points <= 0.5) == (compression <= answer) for compression, points in found.tried.items())
    if answer < low:
        assert (found.best, found.limit, list(found.tried)) == (None, low, [low])
    elif answer >= high:
        assert (found.best, found.limit, list(found.tried)) == (high, None, [low, high])
    else:
        assert found.best is not None and found.limit is not None
        assert low <= found.best <= answer < found.limit <= high
        assert found.limit <= resolution * found.best
        # Each trial takes half of the way in the logarithm, but for the rounding to three digits.
        assert len(found.tried) <= 3 + math.log2(max(1, math.log(high / low) / math.log(resolution))) * 1.5


@given(st.dictionaries(st.integers(0, 10**6), st.floats(0, 2) | st.just(math.nan), max_size=20))
def test_whatever_the_losses_what_lost_too_much_is_never_the_best(losses: dict[int, float]) -> None:
    """Seeds blur the losses, so they need not rise; and a run that diverged lost no number."""

    def lost(compression: float) -> float:
        return losses.get(hash(compression) % 20, 1.0)

    found = sweep(lost, allowed=1.0, low=2, high=500)
    assert found.tried[2] == lost(2) or math.isnan(lost(2))
    if found.best is not None:
        assert found.tried[found.best] <= 1.0
    if found.limit is not None:
        assert not found.tried[found.limit] <= 1.0


def test_compressions_are_tried_in_three_digits_and_each_once() -> None:
    calls: list[float] = []

    def lost(compression: float) -> float:
        calls.append(compression)
        return compression / 100

    found = sweep(lost, allowed=1.2345, low=2, high=500, resolution=1.02)
    assert calls == list(found.tried) and calls[:4] == [2, 500, 31.6, 126]
    assert all(compression == float(f"{compression:.3g}") for compression in calls)
    assert found.best is not None and found.limit is not None and found.best <= 123.45 < found.limit


def test_exactly_what_is_allowed_is_within_it() -> None:
    assert sweep(lambda c: 0.5, allowed=0.5, low=2, high=500).best == 500


@pytest.mark.parametrize(
    ("low", "high", "resolution", "message"),
    [
        (0.5, 500, 1.1, r"low and high must be 1 <= low < high, got low 0\.5 and high 500"),
        (500, 2, 1.1, r"low and high must be 1 <= low < high, got low 500 and high 2"),
        (5, 5, 1.1, r"low and high must be 1 <= low < high, got low 5 and high 5"),
        (2, math.inf, 1.1, r"low and high must be 1 <= low < high, got low 2 and high inf"),
        (math.nan, 5, 1.1, r"low and high must be 1 <= low < high, got low nan and high 5"),
        (2, 500, 1.0, r"resolution must be >= 1\.02, got 1"),
        (2, 500, math.nan, r"resolution must be >= 1\.02, got nan"),
    ],
)
def test_bounds_that_bound_nothing_are_refused(low: float, high: float, resolution: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        sweep(lambda c: 0.0, allowed=0.5, low=low, high=high, resolution=resolution)


def test_the_loss_is_the_mean_over_seeds_against_the_dense_network_of_each(tmp_path: Path) -> None:
    jobs = []
    for seed, (base, final) in enumerate([(98.0, 97.0), (99.0, 99.5), (98.5, 97.5)]):
        jobs.append(Job("demo", (), tmp_path / str(seed), None))
        jobs[-1].folder.mkdir()
        accuracy = {"base": base, "before_cut": 0.0, "after_cut": 0.0, "final": final}
        result = {"accuracy": accuracy, "report": {"compression": 30.1}}
        (jobs[-1].folder / "result.json").write_text(json.dumps(result))
    assert lost_by(jobs, 30) == pytest.approx(0.5, abs=1e-12)
    with pytest.raises(ValueError, match=r"^0 reached only 30\.1x; let the method reach its sparsity earlier$"):
        lost_by(jobs, 31)


# The command


@pytest.fixture
def forked() -> Iterator[type[Forked]]:
    yield from forks()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "cut.toml"
    path.write_text(RECIPES["cut"])
    return path


def run_sweep(recipe: Path, digits: Path, out: Path, more: str) -> Done:
    words = ["sweep", str(recipe), "--seeds", "0", "--out", str(out), "--data-dir", str(digits), "--jobs", "1"]
    return command_line([*words, *more.split()])


def test_the_search_is_on_held_out_examples_and_the_test_set_is_used_once_at_the_end(
    recipe: Path, digits: Path, tmp_path: Path, forked: type[Forked]
) -> None:
    wrong = shutil.copytree(digits, tmp_path / "wrong")  # the labels of its test set are
    labels = bytearray((wrong / "t10k-labels-idx1-ubyte").read_bytes())
    labels[8:] = bytes((label + 1) % 10 for label in labels[8:])
    (wrong / "t10k-labels-idx1-ubyte").write_bytes(labels)
    more = "--loss 20 --low 10 --high 5000 --resolution 6 --validation 40"
    done = run_sweep(recipe, wrong, tmp_path / "out", more)
    assert (done.status, done.err) == (0, "")

    told = re.findall(r"(?m)^([\d.]+)x loses (-?[\d.]+) on 40 held out examples$", done.out)
    tried = {float(compression): float(points) for compression, points in told}
    good = [compression for compression, points in tried.items() if points <= 20]
    bad = [compression for compression, points in tried.items() if points > 20]
    assert list(tried)[:3] == [10, 5000, 224] and bad and max(good) < min(bad) <= 6 * max(good)
    data = load_mnist(wrong)
    for compression, points in tried.items():
        (folder,) = (tmp_path / "out" / "validation").glob(f"cut-{compression:g}x-*")
        result = json.loads((folder / "result.json").read_text())
        assert result["data"].endswith("of which the last 40 training examples serve as the test")
        final = accuracy_of(weights_of(folder), data.train_inputs[160:], data.train_labels[160:])
        assert result["accuracy"]["final"] == final
        assert f"{result['accuracy']['base'] - final:.2f}" == f"{points:.2f}"

    assert forked.started == [f"cut-{compression:g}x-seed0" for compression in (*tried, max(good))]
    (folder,) = (tmp_path / "out" / "test").glob("cut-*")
    assert folder.name == f"cut-{max(good):g}x-seed0"
    result = json.loads((folder / "result.json").read_text())
    final = accuracy_of(weights_of(folder), data.test_inputs, data.test_labels)
    assert result["accuracy"]["final"] == final < 20  # its labels are wrong, and so nothing before looked at it
    assert done.out.splitlines()[-1] == (
        f"highest compression within 20 points: {max(good):g}x ({min(bad):g}x loses more), found on held out examples; "
        f"trained on all, it loses {result['accuracy']['base'] - final:.2f} on the test set (1 seed)"
    )

    forked.started.clear()
    assert run_sweep(recipe, wrong, tmp_path / "out", more).out == "".join(
        line for line in done.out.splitlines(keepends=True) if " left: " not in line
    )
    assert forked.started == []
    message = run_sweep(recipe, wrong, tmp_path / "out", more.replace("40", "30")).err
    assert "cut-10x-seed0 belongs to another run: validation is 40 there and 30 here" in message


@pytest.mark.check
def test_held_out_examples_of_the_recipe_are_those_of_the_search_and_not_of_the_test(
    recipe: Path, digits: Path, tmp_path: Path, forked: type[Forked]
) -> None:
    recipe.write_text(recipe.read_text().replace("batch_size", "validation = 40\nbatch_size"))
    done = run_sweep(recipe, digits, tmp_path / "out", "--loss 100 --low 2 --high 3")
    assert done.status == 0 and "3x loses " in done.out and " on 40 held out examples\n" in done.out
    assert "highest compression within 100 points: 3x (the highest asked for)" in done.out
    (result,) = (tmp_path / "out" / "test").glob("cut-*/result.json")
    assert json.loads(result.read_text())["recipe"]["validation"] == 0


def test_if_the_least_compression_loses_too_much_the_test_set_is_not_looked_at(
    recipe: Path, digits: Path, tmp_path: Path, forked: type[Forked]
) -> None:
    done = run_sweep(recipe, digits, tmp_path / "out", "--loss -101 --low 2")
    assert done.status == 1
    assert "2x loses 0.00 on 33 held out examples\n" in done.out  # a sixth of 200
    assert done.out.splitlines()[-1] == "no compression: 2x, the least asked for, already loses more than -101"
    assert forked.started == ["cut-2x-seed0"] and [path.name for path in (tmp_path / "out").iterdir()] == ["validation"]


def test_a_run_that_fails_ends_the_search(recipe: Path, digits: Path, tmp_path: Path, forked: type[Forked]) -> None:
    recipe.write_text(recipe.read_text().replace('"magnitude"', '"grda"\nsteps = 10'))  # which refuses momentum
    done = run_sweep(recipe, digits, tmp_path / "out", "--loss 1")
    assert done.status == 2
    assert "pomona: error: cut-2x-seed0 failed, exit status 2: pomona: error: GRDA does not support" in done.err
    assert forked.started == ["cut-2x-seed0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--loss 1 --low 9 --high 3", "low and high must be 1 <= low < high, got low 9 and high 3"),
        ("--loss 1 --validation 150", "validation must be in [1, 100], half of the training examples, got 150"),
        ("--loss 1 --set seed=3", "--set seed=3: seed and compression differ from run to run; leave it out"),
    ],
)
def test_bad_options_are_refused(
    recipe: Path, digits: Path, tmp_path: Path, forked: type[Forked], more: str, message: str
) -> None:
    done = run_sweep(recipe, digits, tmp_path / "out", more)
    assert done.status == 2 and message in done.err


def test_a_recipe_without_a_dense_network_is_refused(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "grow.toml").write_text(RECIPES["grow"])
    done = run_sweep(tmp_path / "grow.toml", digits, tmp_path / "out", "--loss 1")
    assert done.status == 2 and not (tmp_path / "out").exists()
    assert "grow.toml has no [base] stage, so there is no dense network to lose accuracy against" in done.err
