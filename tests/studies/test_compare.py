"""`pomona compare`: what is run, in which order, that no stop or failure spoils it, and what the table says."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar

import pytest
import torch

import pomona.train.run
from pomona.cli import main
from pomona.methods import METHODS
from pomona.studies.compare import Job, base_key, check_equal_cost, collect, conclude, plan, spread, tabulate
from pomona.train.folder import base_of
from pomona.train.recipe import builtin_recipes, load_recipe
from pomona.train.stage import RecipeError
from pomona.zoo.data import DATA, load_mnist
from pomona.zoo.models import build_model
from tests.runs import DESCRIPTION, SERVER, Done, Tripwire, command_line, rows_of
from tests.zoo.test_cifar import write_binary

HEAD = """
title = "TITLE"
source = "nowhere"
model = "lenet-300-100"
data = "mnist"
batch_size = 20
"""
BASE = """
[base]
epochs = 1
lr = 0.05
momentum = 0.9
"""
PRUNE = """
[prune]
epochs = {epochs}
lr = 0.05
momentum = 0.9
"""
RECIPES = {  # 10 steps an epoch, 3 epochs each in all
    "cut": HEAD + BASE + PRUNE.format(epochs=2) + '[method]\nname = "magnitude"\ncompression = 10\n',
    "ramp": HEAD
    + BASE
    + PRUNE.format(epochs=1)
    + PRUNE.format(epochs=1).replace("prune", "retrain")
    + '[method]\nname = "magnitude"\ncompression = 10\nevery = 1\nramp = { shape = "cubic", steps = 8 }\n',
    "grow": HEAD + PRUNE.format(epochs=3) + '[method]\nname = "set"\ncompression = 10\nevery = 10\n',
}


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with the recipes."""
    return write_recipes(tmp_path / "recipes")


def write_recipes(folder: Path) -> Path:
    folder.mkdir()
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(text.replace("TITLE", name))
    return folder


# Runs are processes. Here they are forked from one that has imported torch already, which saves seconds each.


@dataclass(frozen=True)
class Trip:
    """Calls ``action`` with this process's id when the run in ``folder`` takes a batch, counted from 1."""

    folder: str
    batch: int
    action: Callable[[int], None]
    parent: int


class Forked:
    """``subprocess.Popen`` of the command line, as far as it is used."""

    trip: ClassVar[Trip | None] = None
    started: ClassVar[list[str]] = []  # folders, in order

    def __init__(self, command: list[str], stdout: IO[bytes], **_: object) -> None:
        assert command[:3] == [sys.executable, "-m", "pomona"]
        folder = Path(command[command.index("--out") + 1]).name
        trip = self.trip if self.trip and self.trip.folder == folder else None
        self.started.append(folder)
        SERVER.set_forkserver_preload(["pytest", "tests.runs"])
        self.process = SERVER.Process(target=run_forked, args=(command[3:], stdout.name, trip))
        self.process.start()

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def run_forked(arguments: list[str], log: str, trip: Trip | None) -> None:
    pomona.train.run._CHECKPOINT_SECONDS = 0.0
    if trip:
        DATA["mnist"] = tripped(trip)
    with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(main(arguments))


class Wire(Tripwire):
    """A Tripwire that calls something."""

    def __init__(self, images: Any, trip: Trip) -> None:
        super().__init__(images, trip.batch, ())
        self.trip = trip

    def __getitem__(self, index: Any) -> Any:
        batch = super().__getitem__(index)
        if self.left == 0:
            self.trip.action(self.trip.parent)
        return batch


def tripped(trip: Trip) -> Any:
    def load(data_dir: Any) -> Any:
        data = load_mnist(data_dir)
        images: Any = Wire(data.train_inputs, trip)
        return replace(data, train_inputs=images)

    return load


def interrupt_parent(parent: int) -> None:
    signal_and_wait(parent, signal.SIGINT)


def terminate_parent(parent: int) -> None:
    signal_and_wait(parent, signal.SIGTERM)


def signal_and_wait(parent: int, number: int) -> None:
    """Signal the comparison, and train on only when it has passed that on as SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.kill(parent, number)
    assert signal.sigtimedwait({signal.SIGTERM}, 60), "no signal came"
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.raise_signal(signal.SIGTERM)


def stop_myself(parent: int) -> None:
    signal.raise_signal(signal.SIGTERM)


def kill_myself(parent: int) -> None:
    signal.raise_signal(signal.SIGKILL)


def forks() -> Iterator[type[Forked]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomona.studies.compare.subprocess.Popen", Forked)
        yield Forked
    Forked.started.clear()
    Forked.trip = None


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Forked]]:
    """Runs are forked; and no picture is drawn, which takes longer than they do."""
    monkeypatch.setattr("pomona.studies.compare.draw_comparison", lambda *_, **__: None)
    yield from forks()


@dataclass(frozen=True)
class Compared(Done):
    out_folder: Path
    recipes: Path
    started: list[str]


@pytest.fixture(scope="module")
def compared(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """A comparison that nothing disturbed."""
    folder = tmp_path_factory.mktemp("compared")
    recipes = write_recipes(folder / "recipes")
    with contextmanager(forks)() as forked:
        done = compare(digits, folder / "out", recipes / "grow.toml", recipes / "cut.toml", compressions="5 200")
        return Compared(done.status, done.out, done.err, folder / "out", recipes, list(forked.started))


def compare(
    digits: Path, out: Path, *recipes: Path | str, compressions: str = "5", seeds: str = "0", more: str = ""
) -> Done:
    words = ["compare", *map(str, recipes), "--compressions", *compressions.split(), "--seeds", *seeds.split()]
    return command_line([*words, "--out", str(out), "--data-dir", str(digits), "--jobs", "1", *more.split()])


def refusal(done: Done) -> str:
    assert done.status == 2 and re.fullmatch(r"pomona: error: [^\n]+\n", done.err), done
    return done.err


def table_of(out: Path) -> list[list[str]]:
    """The cells of the table, less the seconds a run took."""
    lines = [line for line in (out / "compare.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")][:-1] for line in lines]


# The plan


def test_runs_are_planned_seed_by_seed_and_compression_by_compression(recipes: Path, tmp_path: Path) -> None:
    names = [str(recipes / "cut.toml"), str(recipes / "grow.toml")]
    jobs = plan(names, [5, 12.5], [0, 3], ["eval_every=2"], tmp_path / "out")
    assert [job.folder.relative_to(tmp_path / "out").name for job in jobs] == [
        f"{name}-{compression}x-seed{seed}"
        for seed in (0, 3)
        for compression in ("5", "12.5")
        for name in ("cut", "grow")
    ]
    assert jobs[2].recipe == names[0]
    assert jobs[2].overrides == ("eval_every=2", "method.compression=12.5", "seed=0")
    assert [job.base and job.base.name[-6:] for job in jobs] == ["-seed0", None] * 2 + ["-seed3", None] * 2
    assert len({job.base for job in jobs}) == 3 and jobs[0].base == jobs[2].base
    assert list(tmp_path.iterdir()) == [recipes]  # nothing is made yet


def test_recipes_share_a_dense_network_only_if_theirs_are_equal(recipes: Path) -> None:
    def key(name: str, *overrides: str) -> str:
        return base_key(load_recipe(recipes / f"{name}.toml", overrides))

    assert key("cut") == key("ramp") == key("cut", "prune.lr=1", "method.compression=99", 'scope.also=["*"]', "title=x")
    changes = "model=lenet-5 batch_size=10 seed=1 validation=9 precision=bfloat16 base.lr=1 base.optimizer=adam"
    others = [key("cut", change, *["base.momentum=0"] * ("adam" in change)) for change in changes.split()]
    assert len({key("cut"), *others}) == 1 + len(others)


def test_rounds_that_hold_out_examples_share_a_dense_network_only_with_what_holds_out_as_many(recipes: Path) -> None:
    rounds = ["method.name=admm", "progressive.compressions=[2]"]
    two_wide = [*rounds, "progressive.width=2", "progressive.validation=40"]
    plain = load_recipe(recipes / "cut.toml")
    held_out = load_recipe(recipes / "cut.toml", ["validation=40"])
    assert base_key(load_recipe(recipes / "cut.toml", rounds)) == base_key(plain)
    assert base_key(load_recipe(recipes / "cut.toml", two_wide)) == base_key(held_out) != base_key(plain)
    assert base_of(held_out)["validation"] == 40


def test_a_job_is_what_a_user_would_type(tmp_path: Path) -> None:
    job = Job("demo", ("seed=3", "title=a b"), tmp_path / "run", tmp_path / "dense")
    words = job.command("digits", 2)
    assert words[:4] == [sys.executable, "-m", "pomona", "train"]
    assert words[4:] == [
        *("demo", "--no-pictures", "--threads", "2", "--out", str(tmp_path / "run")),
        *("--set", "seed=3", "--set", "title=a b", "--base", str(tmp_path / "dense")),
        *("--data-dir", str(Path("digits").resolve())),
    ]
    assert {"--base", "--data-dir"}.isdisjoint(replace(job, base=None).command(None, 2))


def test_a_job_may_start_from_a_file_and_on_a_device(tmp_path: Path) -> None:
    job = Job("demo", (), tmp_path / "run", None, Path("dense.pt"))
    assert job.read_recipe().base is None
    words = job.command(None, 1, device="cuda:1", compiled=True)
    assert words[-5:] == ["--start", str(Path("dense.pt").resolve()), "--device", "cuda:1", "--compile"]


def test_what_starts_from_a_file_needs_no_dense_network_of_its_own(recipes: Path, tmp_path: Path) -> None:
    cut, grow = (str(recipes / f"{name}.toml") for name in ("cut", "grow"))
    jobs = plan([cut, grow], [5], [0], [], tmp_path / "out", start=Path("dense.pt"))
    assert [(job.base, job.start) for job in jobs] == [(None, Path("dense.pt"))] * 2
    with pytest.raises(RecipeError, match=r"the same epochs in all stages together, got 2 in cut-5x-seed0, 3 in grow"):
        check_equal_cost(jobs, tmp_path / "out")


def test_the_dense_network_and_narrow_ones_are_planned_beside_the_pruned(tmp_path: Path) -> None:
    jobs = plan(["league-set"], [10, 100], [4], [], tmp_path, dense="league-dense", narrow=True)
    assert [(job.folder.name, job.read_recipe().model, job.read_recipe().method["compression"]) for job in jobs] == [
        ("league-dense-1x-seed4", "resnet-20", 1),
        ("league-set-10x-seed4", "resnet-20", 10),
        ("league-dense-narrow-10x-seed4", "resnet-20-w5", 1),
        ("league-set-100x-seed4", "resnet-20", 100),
        ("league-dense-narrow-100x-seed4", "resnet-20-w2", 1),
    ]
    check_equal_cost(jobs, tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"narrow": True}, r"^--narrow runs the recipe of --dense on narrower networks"),
        ({"narrow": True, "dense": "compare-set"}, r"no narrower form of lenet-300-100, only of resnet-20, "),
        ({"narrow": True, "dense": "league-dense", "start": Path("x")}, r"and excludes --start$"),
    ],
)
def test_narrow_networks_that_cannot_be_had_are_refused(tmp_path: Path, more: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(["compare-set"], [10], [0], [], tmp_path, **more)


def test_recipes_of_the_league_cost_the_same(tmp_path: Path) -> None:
    for prefix, epochs, num in (("league-", 160, 11), ("stage-", 2, 12)):
        names = [name for name in builtin_recipes() if name.startswith(prefix)]
        assert len(names) == num
        assert {load_recipe(name).method["name"] for name in names} == set(METHODS)
        check_equal_cost(plan(names, [10], [0], [], tmp_path), tmp_path)
        assert {load_recipe(name).epochs for name in names} == {epochs}


def test_two_runs_in_one_folder_are_refused(recipes: Path, tmp_path: Path) -> None:
    other = write_recipes(tmp_path / "other") / "cut.toml"
    cut = str(recipes / "cut.toml")
    for names, compressions, seeds in (([cut, str(other)], [5], [0]), ([cut], [5, 5.0], [0]), ([cut], [5], [0, 0])):
        with pytest.raises(RecipeError, match=r"two runs would share the folder .*cut-5x-seed0; name each recipe"):
            plan(names, compressions, seeds, [], tmp_path / "out")


@pytest.mark.parametrize("override", ["seed=3", "method.compression=3", "method.sparsity = 0.5"])
def test_what_differs_from_run_to_run_cannot_be_set_for_all(recipes: Path, tmp_path: Path, override: str) -> None:
    """It would be displaced without a word."""
    with pytest.raises(RecipeError, match=rf"^--set {override}: seed and compression differ from run to run"):
        plan([str(recipes / "cut.toml")], [5], [0], [override], tmp_path / "out")


# Equal cost


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epochs = 4", "epochs in all stages together, got 3 in cut-5x-seed0, 5 in other-5x-seed0"),
        ('"lenet-300-100"', '"lenet-5"', 'model, got "lenet-300-100" in cut-5x-seed0, "lenet-5" in other-5x-seed0'),
        ("batch_size", "validation = 9\nbatch_size", "validation, got 0 in cut-5x-seed0, 9 in other-5x-seed0"),
        ("[prune]", "[scope]\nalso = ['*']\n[prune]", 'scope, got {} in cut-5x-seed0, {"also": ["*"]} in other-5x'),
    ],
)
def test_recipes_that_cannot_stand_side_by_side_are_refused_before_anything_is_run(
    recipes: Path, digits: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in RECIPES["cut"]
    (recipes / "other.toml").write_text(RECIPES["cut"].replace(old, new))
    done = compare(digits, tmp_path / "out", recipes / "cut.toml", recipes / "other.toml", recipes / "grow.toml")
    assert f"runs that are compared must have the same {message}" in refusal(done)
    assert not (tmp_path / "out").exists()


def test_the_order_of_keys_in_a_scope_makes_no_difference(recipes: Path, tmp_path: Path) -> None:
    for name, keys in (("a", ("also = []", "exclude = []")), ("b", ("exclude = []", "also = []"))):
        text = RECIPES["cut"].replace("[prune]", "\n".join(("[scope]", *keys, "[prune]")))
        (recipes / f"{name}.toml").write_text(text)
    jobs = plan([str(recipes / "a.toml"), str(recipes / "b.toml")], [5], [0], [], tmp_path)
    check_equal_cost(jobs, tmp_path)


def test_a_recipe_that_costs_more_is_not_added_to_a_table(compared: Compared, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text(RECIPES["grow"].replace("epochs = 3", "epochs = 4"))
    before = sorted(compared.out_folder.iterdir())
    message = refusal(compare(digits, compared.out_folder, tmp_path / "more.toml"))
    assert "the same epochs in all stages together, got 4 in more-5x-seed0, 3 in cut-200x-seed0" in message
    assert sorted(compared.out_folder.iterdir()) == before


# A comparison


def test_the_dense_network_comes_first_and_is_trained_once(compared: Compared) -> None:
    assert (compared.status, compared.err) == (0, "")
    assert compared.started == ["cut-5x-seed0", "grow-5x-seed0", "grow-200x-seed0", "cut-200x-seed0"]
    told = [line for line in compared.out.splitlines() if " left: " in line]
    assert [line.partition(",")[0] for line in told] == ["1/1", "1/3", "2/3", "3/3"]
    assert re.search(r"1/1, 0:00 left: cut-5x-seed0: \d+\.\d\d at 5\.00x$", told[0])
    (base,) = compared.out_folder.glob("base-*")
    assert [row["stage"] for row in rows_of(base)] == ["base"]
    for name in ("cut-5x-seed0", "cut-200x-seed0"):
        result = json.loads((compared.out_folder / name / "result.json").read_text())
        assert result["base"]["name"] == base.name
        assert "this run has finished" in (compared.out_folder / "logs" / "cut-200x-seed0.log").read_text()


def test_the_table_holds_the_results_best_first(compared: Compared) -> None:
    def final(name: str) -> float:
        accuracy: float = json.loads((compared.out_folder / name / "result.json").read_text())["accuracy"]["final"]
        return accuracy

    rows = {name: [final(f"{name}-{compression}x-seed0") for compression in (5, 200)] for name in ("cut", "grow")}
    best_first = sorted(rows, key=lambda name: sum(rows[name]), reverse=True)
    assert table_of(compared.out_folder) == [
        ["method", "5x", "200x"],
        ["---"] * 3,
        *([name, *(f"{accuracy:.2f} (1)" for accuracy in rows[name])] for name in best_first),
    ]
    text = (compared.out_folder / "compare.md").read_text()
    caption = f"lenet-300-100 on {DESCRIPTION}; 3 epochs in all; final accuracy, mean \u00b1 sd (seeds)"
    assert text.splitlines()[0] == caption
    assert text in compared.out and f"picture: {compared.out_folder / 'compare.png'}\n" in compared.out
    assert (compared.out_folder / "compare.png").read_bytes().startswith(b"\x89PNG\r\n")
    entries = json.loads((compared.out_folder / "compare.json").read_text())
    assert {(e["name"], e["asked"]): e["accuracy"] for e in entries} == {
        (name, compression): accuracy
        for name, accuracies in rows.items()
        for compression, accuracy in zip((5, 200), accuracies, strict=True)
    }


def test_given_again_it_runs_nothing_and_says_the_same(compared: Compared, digits: Path, forked: type[Forked]) -> None:
    before = (compared.out_folder / "compare.md").read_bytes()
    recipes = (compared.recipes / f"{name}.toml" for name in ("grow", "cut"))
    done = compare(digits, compared.out_folder, *recipes, compressions="5 200")
    assert done.status == 0 and forked.started == []
    assert done.out == compared.out[compared.out.index("lenet-300-100 on") :]
    assert (compared.out_folder / "compare.md").read_bytes() == before


@pytest.mark.check
def test_given_more_recipes_and_compressions_it_adds_to_the_table(
    compared: Compared, digits: Path, tmp_path: Path, forked: type[Forked]
) -> None:
    out = shutil.copytree(compared.out_folder, tmp_path / "out")
    done = compare(digits, out, compared.recipes / "ramp.toml", compressions="5 20")
    assert done.status == 0 and forked.started == ["ramp-5x-seed0", "ramp-20x-seed0"]
    rows = {row[0]: row[1:] for row in table_of(out)}
    assert rows["method"] == ["5x", "20x", "200x"]
    assert [[cell != "-" for cell in rows[name]] for name in ("cut", "grow", "ramp")] == [
        [True, False, True],
        [True, False, True],
        [True, True, False],
    ]
    assert [row["stage"] for row in rows_of(out / "ramp-5x-seed0")] == ["prune", "retrain"]
    assert len(list(out.glob("base-*"))) == 1


def test_the_folder_of_another_recipe_is_refused_before_anything_is_run(
    compared: Compared, recipes: Path, digits: Path, tmp_path: Path, forked: type[Forked]
) -> None:
    cut = recipes / "cut.toml"
    cut.write_text(cut.read_text().replace("lr = 0.05", "lr = 0.01"))
    before = sorted(compared.out_folder.iterdir())
    message = refusal(compare(digits, compared.out_folder, recipes / "ramp.toml", cut))
    another = f"{compared.out_folder / 'cut-5x-seed0'} belongs to another run: base.lr is 0.05 there and 0.01 here; "
    assert another in message
    assert forked.started == [] and sorted(compared.out_folder.iterdir()) == before


# Failures


@pytest.mark.check
def test_a_run_that_fails_is_reported_and_the_others_go_on(
    recipes: Path, digits: Path, tmp_path: Path, forked: type[Forked]
) -> None:
    bad = RECIPES["cut"].replace('"magnitude"', '"grda"\nsteps = 10')  # which refuses momentum
    (recipes / "bad.toml").write_text(bad)
    names = (recipes / "bad.toml", recipes / "cut.toml", recipes / "grow.toml")
    done = compare(digits, tmp_path / "out", *names)
    why = "exit status 2: pomona: error: GRDA does not support SGD(momentum=0.9)"
    assert done.status == 1 and f"1/1, 0:00 left: bad-5x-seed0: FAILED, {why}" in done.out
    assert done.out.splitlines()[-1].startswith(f"FAILED: bad-5x-seed0: {why}")
    assert {row[0] for row in table_of(tmp_path / "out")[2:]} == {"cut", "grow"}
    assert why.partition("error: ")[2] in (tmp_path / "out" / "logs" / "bad-5x-seed0.log").read_text()


@pytest.mark.check
def test_if_all_runs_fail_there_is_no_table(recipes: Path, digits: Path, tmp_path: Path, forked: type[Forked]) -> None:
    forked.trip = Trip("grow-5x-seed0", 1, kill_myself, os.getpid())
    done = compare(digits, tmp_path / "out", recipes / "grow.toml")
    assert "grow-5x-seed0: FAILED, exit status -9: prune: 3 epochs of 10 steps" in done.out
    assert f"no run in {tmp_path / 'out'} has finished; see {tmp_path / 'out' / 'logs'}" in refusal(done)


@pytest.mark.check
def test_a_killed_run_goes_on_where_it_was_when_the_command_is_given_again(
    compared: Compared, digits: Path, tmp_path: Path, forked: type[Forked]
) -> None:
    recipes = [compared.recipes / f"{name}.toml" for name in ("grow", "cut")]
    forked.trip = Trip("grow-5x-seed0", 25, kill_myself, os.getpid())
    done = compare(digits, tmp_path / "out", *recipes, compressions="5 200")
    assert done.status == 1 and done.out.splitlines()[-1].startswith("FAILED: grow-5x-seed0: exit status -9: ")
    forked.trip = None
    forked.started.clear()
    assert compare(digits, tmp_path / "out", *recipes, compressions="5 200").status == 0
    assert forked.started == ["grow-5x-seed0"]
    assert "resuming prune after step 20\n" in (tmp_path / "out" / "logs" / "grow-5x-seed0.log").read_text()
    assert table_of(tmp_path / "out") == table_of(compared.out_folder)


# Stops


@pytest.mark.check
@pytest.mark.parametrize(
    ("action", "folder", "batch", "resumed"),
    [
        (interrupt_parent, "cut-5x-seed0", 17, "prune after step 7"),  # while dense networks are trained
        (terminate_parent, "grow-200x-seed0", 13, "prune after step 13"),
        (stop_myself, "grow-5x-seed0", 25, "prune after step 25"),  # somebody stops one run
    ],
)
def test_a_stop_saves_what_is_under_way_and_the_same_command_goes_on_to_the_same_table(
    compared: Compared,
    digits: Path,
    tmp_path: Path,
    forked: type[Forked],
    action: Callable[[int], None],
    folder: str,
    batch: int,
    resumed: str,
) -> None:
    out, recipes = tmp_path / "out", [compared.recipes / f"{name}.toml" for name in ("grow", "cut")]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    forked.trip = Trip(folder, batch, action, os.getpid())
    stopped = compare(digits, out, *recipes, compressions="5 200")
    assert (stopped.status, stopped.err) == (130, "")
    assert stopped.out.splitlines()[-1] == f"stopped; run the same command again to resume. Finished runs are in {out}"
    assert forked.started[-1] == folder  # nothing is started after it
    assert not (out / folder / "result.json").exists() and not (out / "compare.md").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    finished = {path.parent.name for path in out.glob("*/result.json")}
    forked.trip = None
    forked.started.clear()
    assert compare(digits, out, *recipes, compressions="5 200").status == 0
    assert {*forked.started} == {*compared.started} - finished
    assert f"resuming {resumed}\n" in (out / "logs" / f"{folder}.log").read_text()
    assert table_of(out) == table_of(compared.out_folder)
    for name in compared.started:
        mine, theirs = (torch.load(f / name / "model.pt", weights_only=True) for f in (out, compared.out_folder))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.check
def test_a_stop_reaches_all_runs_under_way(recipes: Path, digits: Path, tmp_path: Path, forked: type[Forked]) -> None:
    (recipes / "long.toml").write_text(RECIPES["grow"].replace("epochs = 3", "epochs = 3_000"))
    (recipes / "also.toml").write_text((recipes / "long.toml").read_text())
    forked.trip = Trip("also-5x-seed0", 100, terminate_parent, os.getpid())
    before = multiprocessing.active_children()  # other tests'
    names = (recipes / "long.toml", recipes / "also.toml")
    done = compare(digits, tmp_path / "out", *names, more="--jobs 2")
    assert done.status == 130 and sorted(forked.started) == ["also-5x-seed0", "long-5x-seed0"]
    assert set(multiprocessing.active_children()) <= set(before)
    assert list((tmp_path / "out" / "also-5x-seed0").glob("checkpoint-00000100-*"))


@pytest.mark.check
def test_real_processes_do_the_same(compared: Compared, digits: Path, tmp_path: Path) -> None:
    """As installed: ``python -m pomona train`` for each run."""
    done = compare(digits, tmp_path / "out", compared.recipes / "grow.toml")
    assert (done.status, done.err) == (0, "")
    name = "grow-5x-seed0"
    mine, theirs = (
        torch.load(f / name / "model.pt", weights_only=True) for f in (tmp_path / "out", compared.out_folder)
    )
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert "prune 3/3" in (tmp_path / "out" / "logs" / f"{name}.log").read_text()


@pytest.mark.check
def test_control_c_in_a_shell_stops_a_comparison_and_the_same_command_goes_on(
    compared: Compared, digits: Path, tmp_path: Path
) -> None:
    words = ["--compressions", "5", "200", "--seeds", "0", "--data-dir", str(digits), "--out", str(tmp_path / "out")]
    names = [str(compared.recipes / f"{name}.toml") for name in ("grow", "cut")]
    command = [sys.executable, "-m", "pomona", "compare", *names, *words, "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("1/1, ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == "" and "run the same command again to resume" in out
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert table_of(tmp_path / "out") == table_of(compared.out_folder)


# The table, worked out by hand


def entry(name: str, asked: float, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    told = {"compression": asked, "seconds": 10.0, "model": "lenet-5", "data": "digits", "epochs": 40}
    return {"name": name, "asked": asked, "seed": seed, "accuracy": accuracy, **told, **more}


def test_a_cell_is_mean_and_sample_standard_deviation_over_seeds() -> None:
    assert spread([]) == "-"
    assert spread([98.123]) == "98.12 (1)"
    assert spread([98, 99]) == "98.50 \u00b1 0.71 (2)"  # 1 / sqrt(2)
    assert spread([96.9, 97.1, 97.3]) == "97.10 \u00b1 0.20 (3)"
    assert spread([1, 2], digits=0) == "2 \u00b1 1 (2)"


def test_the_table_has_a_row_for_each_recipe_and_a_column_for_each_compression() -> None:
    entries = [
        entry("gsm", 30, 0, 97),
        entry("gsm", 10, 0, 98, seconds=20.0),
        entry("gsm", 10, 1, 99, seconds=60.4),
        *(entry("admm", 30, seed, accuracy) for seed, accuracy in enumerate((96.9, 97.1, 97.3))),
        entry("admm", 10, 0, 99),
        entry("half", 10, 0, 99.9),  # nothing at 30x counts as nothing
    ]
    assert tabulate(entries).splitlines() == [
        "| method | 10x | 30x | seconds per run |",
        "| --- | --- | --- | --- |",
        "| admm | 99.00 (1) | 97.10 \u00b1 0.20 (3) | 10 |",
        "| gsm | 98.50 \u00b1 0.71 (2) | 97.00 (1) | 20 |",
        "| half | 99.90 (1) | - | 10 |",
    ]


def test_a_cell_tells_if_a_run_fell_short_of_the_compression_that_was_asked_for() -> None:
    entries = [entry("a", 10, 0, 90, compression=9.91), entry("a", 100, 0, 80, compression=31.4)]
    entries += [entry("a", 100, 1, 80, compression=100), entry("a", 1000, 0, 10, compression=None)]
    cells = tabulate(entries).splitlines()[-1].split(" | ")
    assert cells[1:-1] == ["90.00 (1)", "80.00 \u00b1 0.00 (2) at 31.4x", "10.00 (1)"]


def test_only_the_runs_of_a_comparison_are_collected(compared: Compared, tmp_path: Path) -> None:
    out = shutil.copytree(compared.out_folder, tmp_path / "out")
    shutil.copytree(out / "cut-5x-seed0", out / "mine")
    shutil.copytree(out / "cut-5x-seed0", out / "a-b-12.5x-seed17")
    (out / "grow-5x-seed0" / "result.json").unlink()
    found = [(e["name"], e["asked"], e["epochs"]) for e in collect(out)]
    assert found == [("a-b", 12.5, 3), ("cut", 200, 3), ("cut", 5, 3), ("grow", 200, 3)]
    with pytest.raises(ValueError, match=r"no run in .*nothing has finished; see .*nothing/logs"):
        conclude(tmp_path / "nothing")


# A league, on images


LEAGUE = """
title = "TITLE"
source = "nowhere"
model = "resnet-20"
data = "cifar10"
batch_size = 25

[prune]
epochs = 1
lr = 0.01

[method]
name = "magnitude"
compression = 10
"""


@pytest.mark.check
def test_a_league_has_the_dense_network_and_a_narrow_one_in_its_table(tmp_path: Path, forked: type[Forked]) -> None:
    for name in ("cut", "dense"):
        (tmp_path / f"{name}.toml").write_text(LEAGUE)
    (tmp_path / "images").mkdir()
    write_binary(tmp_path / "images")
    more = f"--dense {tmp_path / 'dense.toml'} --narrow"
    done = compare(tmp_path / "images", tmp_path / "out", tmp_path / "cut.toml", compressions="10", more=more)
    assert done.status == 0, done
    assert forked.started == ["dense-1x-seed0", "cut-10x-seed0", "dense-narrow-10x-seed0"]
    found = {entry["name"]: entry for entry in json.loads((tmp_path / "out" / "compare.json").read_text())}
    assert {name: (entry["model"], entry["asked"], entry["nonzero"]) for name, entry in found.items()} == {
        "cut": ("resnet-20", 10, 26_833),
        "dense": ("resnet-20", 1, 268_336),
        "dense-narrow": ("resnet-20-w5", 10, 26_435),
    }
    assert found["dense-narrow"]["compression"] == pytest.approx(268_336 / 26_435)
    rows = {row[0]: row[1:] for row in table_of(tmp_path / "out")}
    assert rows["method"] == ["1x", "10x"]
    assert rows["cut"] == ["-", f"{found['cut']['accuracy']:.2f} (1)"]
    assert rows["dense"] == [f"{found['dense']['accuracy']:.2f} (1)", "-"]
    assert rows["dense-narrow"] == ["-", f"{found['dense-narrow']['accuracy']:.2f} (1)"]

    path = tmp_path / "out" / "cut-10x-seed0" / "model.pt"
    weights = torch.load(path, weights_only=True)
    weights["linear.weight"].zero_()
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"model\.pt has 26,\d+ non-zero weights, but its run ended with 26,833"):
        collect(tmp_path / "out")

    start = tmp_path / "start.pt"
    torch.save(build_model("resnet-20", seed=1).state_dict(), start)
    again = compare(
        tmp_path / "images", tmp_path / "out", tmp_path / "cut.toml", compressions="10", more=f"--start {start}"
    )
    assert "it started from None there and starts from start.pt here" in refusal(again)
