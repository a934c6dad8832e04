"""The pictures and the page of a run, drawn from a made-up one with the numbers of LeNet-300-100."""

from __future__ import annotations

import math
import struct
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pomona.pages.pictures import draw_all, draw_history, draw_layers, draw_magnitudes, draw_training, times
from pomona.pages.run import write_page

LAYERS = {"fc1.weight": ([300, 784], 2_900), "fc2.weight": ([100, 300], 1_150), "fc3.weight": ([10, 100], 386)}


def make_rows(num_base: int = 20, num_prune: int = 40) -> list[dict[str, Any]]:
    """A run of GSM as it goes: accuracies dip and meet, passive weights shrink by exp(-exponent)."""
    rows: list[dict[str, Any]] = []
    for epoch in range(1, num_base + 1):
        accuracy = 98.2 - 6 * math.exp(-epoch / 3)
        rows.append(make_row("base", epoch, lr=0.1 * 0.1 ** (epoch > 12), test_accuracy=accuracy))
    exponent = 0.0
    for epoch in range(1, num_prune + 1):
        lr = 3e-2 * 0.1 ** ((epoch > 0.6 * num_prune) + (epoch > 0.8 * num_prune))
        exponent += 20 * lr / 3e-2 / num_prune
        rows.append(
            make_row(
                "prune",
                epoch,
                lr=lr,
                test_accuracy=98.28 - 1.5 * math.exp(-epoch / 8) + 0.05 * math.sin(epoch),
                accuracy_if_cut=98.25 - 86 * math.exp(-(((exponent) / 4) ** 2)) + 0.1 * math.sin(2 * epoch),
                active=4_436,
                decay_exponent=exponent,
                largest_cut=max(10 ** (-0.6 - 0.43 * exponent * 0.8), 1e-6),
                density_if_cut={name: kept / math.prod(shape) for name, (shape, kept) in LAYERS.items()},
                histogram=make_histogram(exponent),
            )
        )
    return rows


def make_row(stage: str, epoch: int, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage, "epoch": epoch, "step": 235 * epoch, "loss": 0.3 / epoch, "seconds": 2.5}
    return {**row, "train_accuracy": 99.0, "accuracy_if_cut": None, "active": None, **values}


def make_histogram(exponent: float) -> dict[str, Any]:
    edges = [-12 + i * 13 / 78 for i in range(79)]

    def below(x: float, centre: float, width: float) -> float:
        return (1 + math.erf((x - centre) / width / math.sqrt(2))) / 2

    def count(low: float, high: float) -> int:
        passive = below(high, -1.8 - 0.43 * exponent, 0.5) - below(low, -1.8 - 0.43 * exponent, 0.5)
        active = below(high, -0.6, 0.25) - below(low, -0.6, 0.25)
        return round(261_764 * passive + 4_436 * active)

    return {"edges": edges, "counts": [count(*pair) for pair in pairwise(edges)], "zeros": 0}


def make_result() -> dict[str, Any]:
    layers = [
        {
            "name": name,
            "shape": shape,
            "total": math.prod(shape),
            "nonzero": kept,
            "density": kept / math.prod(shape),
            "dead_channels": 38 if name.startswith("fc1") else 0,
            "channels": shape[0],
            "largest_cut": 2.4e-6,
            "reason": "its weights won their places in the global budget",
        }
        for name, (shape, kept) in LAYERS.items()
    ]
    return {
        "title": "LeNet-300-100 on MNIST, GSM at 60x",
        "source": "Ding et al., Global Sparse Momentum SGD (arXiv 1909.12778), table 2",
        "recipe": {
            "title": "LeNet-300-100 on MNIST, GSM at 60x",
            "model": {"name": "lenet300"},
            "prune": {"method": "gsm", "sparsity": 0.98334, "epochs": 40, "nesterov": True, "drops": [24, 32]},
        },
        "data": "MNIST, 60,000 training and 10,000 test pictures of digits",
        "seed": 7,
        "pomona": "0.1.0",
        "torch": "2.13.0",
        "threads": 1,
        "commit": "0123abc",
        "seconds": 754.2,
        "accuracy": {"base": 98.21, "before_cut": 98.28, "after_cut": 98.25},
        "expected": {"base_accuracy": 98.19, "accuracy": 98.18, "tolerance": 0.2},
        "diagnosis": {"exponent": 20.0, "shrinkage": 2.06e-9, "message": "Passive weights have vanished."},
        "report": {
            "total": 266_200,
            "nonzero": 4_436,
            "sparsity": 1 - 4_436 / 266_200,
            "density": 4_436 / 266_200,
            "compression": 266_200 / 4_436,
            "largest_cut": 2.4e-6,
            "dead_channels": 38,
            "of": "the 266,200 weights in scope (3 tensors)",
            "layers": layers,
            "outside": [{"name": "fc1.bias", "total": 300, "reason": "fewer than two dimensions"}],
        },
    }


class Page(HTMLParser):
    """What a browser would see: texts, tables, links to elsewhere; complains of tags that do not balance."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(self.html)
        self.close()
        assert not self.open

    @property
    def text(self) -> str:
        return " ".join(self.texts).replace("\u00a0", " ")

    def row(self, first: str) -> list[str]:
        (found,) = (cells for cells in self.rows if cells and cells[0] == first)
        return [cell.replace("\u00a0", " ") for cell in found]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def size_of(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:])
    return width, height


def make_page(folder: Path, rows: list[dict[str, Any]], result: dict[str, Any]) -> Page:
    return Page(write_page(rows, result, draw_all(rows, result, folder), folder / "report.html"))


def test_a_finished_run_has_four_pictures_of_sane_size(tmp_path: Path) -> None:
    paths = draw_all(make_rows(), make_result(), tmp_path / "run")
    assert [path.name for path in paths] == ["layers.png", "history.png", "training.png", "magnitudes.png"]
    for path in paths:
        width, height = size_of(path)
        assert 1000 <= width <= 1600 and 400 <= height <= 2000
        assert path.stat().st_size > 20_000  # a blank page of this size has some 5,000 bytes


@pytest.mark.check
def test_pictures_leave_no_global_state(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_all(make_rows(4, 4), make_result(), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert draw_all([], {}, tmp_path) == []
    assert draw_layers({"report": None}, tmp_path / "a.png") is None
    assert draw_training([make_row("base", 1)], tmp_path / "b.png") is None
    assert draw_magnitudes([make_row("prune", 1, histogram=None)], tmp_path / "c.png") is None
    assert draw_history([make_row("prune", 1, density_if_cut={"fc.weight": 0.5})], tmp_path / "d.png") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rows",
    [
        make_rows(3, 0),
        make_rows(0, 1),
        make_rows(0, 2),
        [make_row("prune", epoch, accuracy_if_cut=100.0 - 90 * (epoch == 1)) for epoch in (1, 2, 5)],
        [make_row("prune", epoch, lr=0.1 / epoch) for epoch in (1, 2)],
        [{"stage": "prune", "epoch": epoch, "active": 100 - epoch} for epoch in (1, 2)],
    ],
    ids=["base only", "one epoch", "two epochs", "perfect", "no accuracy", "active only"],
)
def test_training_draws_what_exists(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = draw_training(rows, tmp_path / "training.png")
    assert path is not None and size_of(path)[0] == 1400


@pytest.mark.parametrize(("epochs", "largest_cut"), [([1], None), ([3, 4], 0.0), ([1, 2, 10, 11], 1e-3)])
def test_magnitudes_allow_gaps_zeros_and_no_cut(tmp_path: Path, epochs: list[int], largest_cut: float | None) -> None:
    histogram = {**make_histogram(3.0), "zeros": 12_000}
    empty = make_row("prune", epochs[-1] + 1, histogram={"edges": [-1, 0], "counts": [0], "zeros": 9})
    rows = [make_row("prune", epoch, histogram=histogram, largest_cut=largest_cut) for epoch in epochs]
    assert draw_magnitudes([*rows, empty], tmp_path / "magnitudes.png") == tmp_path / "magnitudes.png"


@pytest.mark.check
def test_layers_allow_empty_dense_many_and_oddly_named_layers(tmp_path: Path) -> None:
    layers = [
        {"name": f"encoder.blocks.{i}.attention.projection.weight$", "total": 1000, "nonzero": min(i, 1000)}
        for i in (*range(60), 1000)
    ]
    path = draw_layers({"report": {"layers": layers}, "title": "$x"}, tmp_path / "layers.png")
    assert path is not None and size_of(path)[1] < 4000


@pytest.mark.check
@pytest.mark.parametrize("num_layers", [1, 8, 60])
@pytest.mark.parametrize("shares", [(0.5, 0.4), (1.0, 0.001), (0.0, 0.0)])
def test_the_history_allows_any_number_of_layers_and_empty_ones(
    num_layers: int, shares: tuple[float, float], tmp_path: Path
) -> None:
    rows = [
        make_row("prune", epoch, density_if_cut={f"blocks.{i}.weight$": share for i in range(num_layers)})
        for epoch, share in enumerate(shares, 1)
    ]
    path = draw_history(rows, tmp_path / "history.png")
    assert path is not None and size_of(path)[0] == 1400 and size_of(path)[1] < 2000


@pytest.mark.parametrize(
    ("total", "kept", "text"),
    [(266_200, 4_436, "60.0x"), (100, 100, "1.00x"), (10**6, 200, "5,000x"), (10, 0, "all cut")],
)
def test_compression_is_written_with_three_digits(total: int, kept: int, text: str) -> None:
    assert times(total, kept) == text


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = make_page(tmp_path, make_rows(), make_result())
    assert "http:" not in page.html and "https:" not in page.html and "<script" not in page.html
    assert not {"href", "srcset", "onload"} & {name for name, _ in page.attributes}
    sources = [value or "" for name, value in page.attributes if name == "src"]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_numbers_of_the_page_are_those_of_the_result(tmp_path: Path) -> None:
    page = make_page(tmp_path, make_rows(), make_result())
    headline = "266,200 \u2192 4,436 weights, 60.0\u00d7 smaller; 98.28 % before the cut, 98.25 % after"
    assert headline in page.text
    assert page.row("base model") == ["base model", "98.21 %", "+0.00", "98.19 %", "\u2713 within 0.2"]
    assert page.row("trained, before the cut")[1:4] == ["98.28 %", "+0.07", "\u2013"]
    assert page.row("after the cut")[1:] == ["98.25 %", "+0.04", "98.18 %", "\u2713 within 0.2"]
    losses = {"base": 0.0612, "before_cut": 0.0587, "after_cut": 0.05905}
    page = make_page(tmp_path, make_rows(), make_result() | {"loss": losses})
    assert [page.row(name)[-1] for name in ("base model", "trained, before the cut", "after the cut")] == [
        "0.0612",
        "0.0587",
        "0.05905",
    ]
    shape = "300\u00d7784"
    assert page.row("fc1.weight")[1:6] == [shape, "235,200", "2,900", "1.23 %", "81.1x"]
    assert page.row("fc1.weight")[6:] == ["38 of 300", "2.4e-06", make_result()["report"]["layers"][0]["reason"]]
    assert page.row("all") == ["all", "", "266,200", "4,436", "1.67 %", "60.0x", "38", "2.4e-06", ""]
    assert page.row("fc1.bias") == ["fc1.bias", "300", "fewer than two dimensions"]
    for text in ("98.33 %", "Passive weights have vanished.", "2.13.0", "0123abc", "12 min 34 s"):
        assert text in page.text
    assert '[prune]\nmethod = "gsm"\nsparsity = 0.98334\nepochs = 40\nnesterov = true\ndrops = [24, 32]' in page.text
    last = make_rows()[-1]
    assert ["prune", "40", "9,400", "0.0003"] == page.rows[-1][:4]
    assert page.rows[-1][6] == f"{last['test_accuracy']:.2f}\u00a0%"


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (98.38, "\u2713 within 0.2"),  # the bound itself, 98.38 - 98.18 > 0.2 in binary
        (97.98, "\u2713 within 0.2"),
        (97.9, "\u2717 0.28 below, tolerance 0.2"),
        (98.6, "\u2713 0.42 above"),
        (None, "\u2013"),
    ],
)
def test_the_verdict_tells_on_which_side_of_the_tolerance(tmp_path: Path, after: float | None, verdict: str) -> None:
    result = make_result()
    result["accuracy"]["after_cut"] = after
    page = Page(write_page([], result, [], tmp_path / "report.html"))
    assert page.row("after the cut")[-1] == verdict


def test_outside_may_be_names_with_reasons(tmp_path: Path) -> None:
    result = make_result()
    result["report"]["outside"] = {"fc1.bias": "fewer than two dimensions"}
    page = Page(write_page([], result, [], tmp_path / "report.html"))
    assert page.row("fc1.bias") == ["fc1.bias", "fewer than two dimensions"]


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<b>&\"'</b></style></pre>"
    result = make_result()
    for key in ("title", "source", "data", "commit"):
        result[key] = evil
    result["report"]["of"] = evil
    result["report"]["layers"][0].update(name="<b>", reason=evil)
    result["report"]["outside"][0].update(name=evil, reason=evil)
    result["diagnosis"]["message"] = evil
    result["recipe"] = {evil: {"key": evil}}
    page = make_page(tmp_path, [make_row(evil, 1)], result)
    assert "<b>" not in page.html
    assert page.row("<b>")[-1] == evil
    assert page.text.count(evil) >= 8


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    rows = make_rows(3, 2)
    page = make_page(tmp_path, rows, {"title": "Half a run", "accuracy": None, "report": None, "expected": None})
    last = f"last test accuracy {rows[-1]['test_accuracy']:.2f} %"
    assert f"This run has not finished; 5 epochs so far; {last}" in page.text
    assert [value for name, value in page.attributes if name == "alt"] == ["history", "training", "magnitudes"]


@pytest.mark.parametrize("key", make_result())
def test_any_key_may_be_missing_or_null(tmp_path: Path, key: str) -> None:
    full = make_result()
    missing = {name: value for name, value in full.items() if name != key}
    pages = [write_page([{}], result, [], tmp_path / "p.html").read_text() for result in (missing, {**full, key: None})]
    assert pages[0] == pages[1]
