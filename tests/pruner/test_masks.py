"""Masks out of one model and into another."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import pomona
from pomona import Pruner
from tests.problems import batches, bits, net, train

KEPT = 18  # of the 72 weights, at sparsity 0.75


def pruned() -> tuple[nn.Sequential, AdamW, Pruner]:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(model, optimizer, pomona.RigL(0.75, every=2))
    train(model, optimizer, batches(7))
    return model, optimizer, pruner


def test_masks_are_of_what_would_be_kept_and_then_of_what_is() -> None:
    model, optimizer, pruner = pruned()
    before = pruner.masks()
    assert list(before) == ["0.weight", "2.weight"] and sum(int(mask.sum()) for mask in before.values()) == KEPT
    pruner.harden()
    for name, mask in pruner.masks().items():
        assert torch.equal(mask, before[name])
        assert torch.equal(mask, model.get_parameter(name) != 0)
    state = bits(pruner.state_dict())
    for mask in (*before.values(), *pruner.masks().values()):
        mask.fill_(False)  # they are nobody else's
    assert bits(pruner.state_dict()) == state
    train(model, optimizer, batches(2))
    assert pruner.verify().nonzero == KEPT


def test_a_ticket_is_the_first_weights_under_the_masks() -> None:
    first = net().state_dict()
    _, _, pruner = pruned()
    pruner.harden()
    file = io.BytesIO()
    torch.save(pruner.masks(), file)
    file.seek(0)
    masks = torch.load(file, weights_only=True)

    ticket = net(1)
    ticket.load_state_dict(first)
    pomona.apply_masks(ticket, masks)
    for name, value in first.items():
        expected = torch.where(masks[name], value, 0.0) if name in masks else value
        assert bits(ticket.state_dict()[name]) == bits(expected)
    optimizer = SGD(ticket.parameters(), lr=0.1, momentum=0.9)
    held = pomona.hold(ticket, optimizer)
    train(ticket, optimizer, batches(5))
    assert held.verify().nonzero == KEPT


def test_wrappers_do_not_matter() -> None:
    _, _, pruner = pruned()
    pruner.harden()
    wrapped = torch.optim.swa_utils.AveragedModel(net(1))
    pomona.apply_masks(wrapped, pruner.masks())
    assert pomona.report(wrapped).nonzero == KEPT
    plain = net(1)
    pomona.apply_masks(plain, {f"_orig_mod.module.{name}": mask for name, mask in pruner.masks().items()})
    assert pomona.report(plain).nonzero == KEPT


@pytest.mark.parametrize(
    ("masks", "kind", "message"),
    [
        ({"2.wieght": torch.ones(3, 8, dtype=torch.bool)}, ValueError, "no parameter 2.wieght; closest: 2.weight"),
        (
            {"2.weight": torch.ones(8, 3, dtype=torch.bool)},
            ValueError,
            r"2.weight has shape \(3, 8\) in Sequential and",
        ),
        ({"2.weight": torch.ones(3, 8)}, TypeError, r"mask of 2.weight must be a boolean tensor.* got torch.float32"),
        ({"2.weight": None}, TypeError, "mask of 2.weight must be a boolean tensor.* got None"),
        ([torch.ones(3, 8)], TypeError, "masks must be a mapping of names to tensors"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_is_written(
    masks: Any, kind: type[Exception], message: str
) -> None:
    model = net()
    before = bits(model.state_dict())
    if isinstance(masks, dict):
        masks = {"0.weight": torch.zeros(8, 6, dtype=torch.bool), **masks}
    with pytest.raises(kind, match=message):
        pomona.apply_masks(model, masks)
    assert bits(model.state_dict()) == before


def test_tied_weights_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    def mask(place: int) -> Tensor:
        kept = torch.ones(5, 4, dtype=torch.bool)
        kept[0, place] = False
        return kept

    model = Tied()
    pomona.apply_masks(model, {"embed.weight": mask(0), "head.weight": mask(0)})
    assert (model.head.weight == 0).nonzero().tolist() == [[0, 0]]
    with pytest.raises(ValueError, match=r"embed.weight and head.weight are one tied parameter here, and their masks"):
        pomona.apply_masks(model, {"embed.weight": mask(0), "head.weight": mask(1)})
