"""An embedding beside linear layers: its weights are ten times theirs from the start, and one ranking starves them."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pomona

NUM_WORDS, STEPS = 500, 500


class Words(nn.Module):
    """Tells of which of four kinds most words of a text are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(NUM_WORDS, 32), nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, words: Tensor) -> Tensor:
        answer: Tensor = self.fc2(self.fc1(self.embed(words).mean(1)).relu())
        return answer


def texts(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    kinds = torch.randint(4, (NUM_WORDS,), generator=torch.Generator().manual_seed(0))
    frequency = 1.0 / torch.arange(1.0, NUM_WORDS + 1)
    words = torch.multinomial(frequency, num * 9, replacement=True, generator=generator).view(num, 9)
    return words, F.one_hot(kinds[words], 4).sum(1).argmax(1)


def run(method: pomona.Method) -> tuple[float, dict[str, int], list[str]]:
    """Accuracy after the cut, what each layer keeps, and what was warned of."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruner = pomona.Pruner(model, optimizer, method, scope=pomona.Scope(also="embed"))
        for _ in range(STEPS):
            words, kinds = texts(64, generator)
            F.cross_entropy(model(words), kinds).backward()
            optimizer.step()
            optimizer.zero_grad()
        report = pruner.harden()
    words, kinds = texts(4000, generator)
    accuracy = 100 * float((model(words).argmax(1) == kinds).float().mean())
    return accuracy, {one.name: one.nonzero for one in report.layers}, [str(one.message) for one in told]


@cache
def magnitude(**how: Any) -> tuple[float, dict[str, int], list[str]]:
    return run(pomona.Magnitude(pomona.Cubic(0.0, 0.9, steps=300), every=20, **how))


def test_one_ranking_on_magnitudes_is_said_to_starve_the_layers_that_it_starves() -> None:
    accuracy, kept, told = magnitude()
    assert kept == {"embed.weight": 1828, "fc1.weight": 1, "fc2.weight": 1} and accuracy < 65
    during, at_end = told
    assert during.startswith("this cut starves layers: ") and "1 of 3 layers keeps" in during
    assert at_end.startswith(
        "harden() starves layers: 2 of 3 layers keep no more than the floor min_density=0.0001 of "
    )
    assert "fc1.weight 1 of 2,048, fc2.weight 1 of 256" in at_end and "take score='lamp', allocation='erk'" in at_end


@pytest.mark.parametrize(
    "how",
    [
        {"score": "lamp"},
        {"allocation": "erk"},
        *(pytest.param(how, marks=pytest.mark.check) for how in ({"allocation": "uniform"}, {"min_density": 0.05})),
    ],
    ids=str,
)
def test_what_the_warning_advises_keeps_the_network_whole(how: dict[str, Any]) -> None:
    accuracy, kept, told = magnitude(**how)
    assert told == [] and sum(kept.values()) == 1830
    assert accuracy > magnitude()[0] + 10 and min(kept["fc1.weight"], kept["fc2.weight"]) > 10


@pytest.mark.check
@pytest.mark.parametrize(
    "method",
    [
        pomona.Feather(pomona.Cubic(0.0, 0.9, steps=300), score="lamp"),
        pomona.ADMM(0.9, every=50, rho=0.05, score="lamp"),
    ],
    ids=["feather, lamp", "admm, lamp"],
)
def test_every_method_that_takes_a_fair_score_keeps_the_network_whole(method: pomona.Method) -> None:
    accuracy, kept, told = run(method)
    assert told == [] and sum(kept.values()) == 1830 and min(kept.values()) > 20
    assert isinstance(method, pomona.ADMM) or accuracy > magnitude()[0] + 15  # ADMM's cut needs training afterwards


@pytest.mark.check
def test_feather_says_so_where_its_way_ends_and_admm_at_the_cut() -> None:
    for method, when in [
        (pomona.Feather(pomona.Cubic(0.0, 0.9, steps=300)), "this cut starves layers: 2 of 3 layers keep no more"),
        (pomona.ADMM(0.9, every=50, rho=0.05), "harden() starves layers: 2 of 3 layers keep no more"),
    ]:
        (told,) = run(method)[2]
        assert told.startswith(when)
