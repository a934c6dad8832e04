"""What torch.nn.utils.prune has pruned becomes plain, with exact zeros, and the optimizer keeps what it knows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import pomona
from pomona import from_torch_prune


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def batch() -> Tensor:
    return torch.randn(5, 1, 4, 4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(batch()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Third(prune.BasePruningMethod):
    """A method of somebody's own."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::3] = 0
        return mask


WAYS = {
    "l1": lambda m: prune.l1_unstructured(m[2], "weight", amount=0.5),
    "random": lambda m: prune.random_unstructured(m[0], "weight", amount=7),
    "structured": lambda m: prune.ln_structured(m[2], "weight", amount=0.25, n=2, dim=0),
    "channels": lambda m: prune.random_structured(m[0], "weight", amount=1, dim=1),
    "twice": lambda m: [prune.l1_unstructured(m[4], "weight", amount=0.5) for _ in range(2)],
    "global": lambda m: prune.global_unstructured(
        [(m[0], "weight"), (m[2], "weight"), (m[4], "bias")], pruning_method=prune.L1Unstructured, amount=0.6
    ),
    "own": lambda m: Third.apply(m[2], "weight"),
    "mask": lambda m: prune.custom_from_mask(m[4], "weight", torch.eye(8)[:2]),
    "identity": lambda m: prune.identity(m[4], "bias"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_model_computes_what_it_computed(way: str) -> None:
    model, x = network(), batch()
    plain_names = set(model.state_dict())
    WAYS[way](model)
    masks = {n.removesuffix("_mask"): mask.clone() for n, mask in model.named_buffers()}
    before = model(x)

    assert set(from_torch_prune(model)) == set(masks)
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == plain_names
    assert not prune.is_pruned(model)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) == 0, mask == 0)


def test_the_optimizer_keeps_its_parameters_and_their_momentum() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    weight, storage = model[2].weight, model[2].weight.data_ptr()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    step(model, optimizer)
    moments = optimizer.state[weight]["exp_avg"].clone()

    from_torch_prune(model)
    assert model[2].weight is weight and weight.data_ptr() == storage and weight.is_leaf
    assert torch.equal(optimizer.state[weight]["exp_avg"], moments)
    zeros = weight == 0
    pruner = pomona.hold(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(model[2].weight == 0, zeros) and zeros.sum() == 64
    assert not torch.equal(optimizer.state[weight]["exp_avg"], moments)  # it still trains this one
    pruner.verify()


def test_without_holding_one_step_would_revive_the_zeros() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    from_torch_prune(model)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    assert (model[2].weight == 0).sum() == 0


def test_zeros_are_positive_and_survive_nan() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[-1.0, float("nan"), float("inf"), -2.0]])
    prune.custom_from_mask(model, "weight", torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert from_torch_prune(model) == ["weight"]
    assert model.weight.tolist() == [[0.0, 0.0, 0.0, -2.0]]
    assert not torch.signbit(model.weight[0, :3]).any()


def test_a_pruned_bias_is_held_by_the_names_returned() -> None:
    model = nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prune.l1_unstructured(model, "bias", amount=3)
    prune.l1_unstructured(model, "weight", amount=0.5)
    names = from_torch_prune(model)
    assert sorted(names) == ["bias", "weight"]
    pomona.hold(model, optimizer, scope=pomona.Scope(include=names, also=names))
    for _ in range(3):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert (model.bias == 0).sum() == 3 and (model.weight == 0).sum() == 18


def test_recurrent_layers_keep_their_own_list_of_weights() -> None:
    model, x = nn.LSTM(3, 4), torch.randn(2, 1, 3)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.l1_unstructured(model, name, amount=0.5)
    before = model(x)[0]
    assert from_torch_prune(model) == ["weight_ih_l0", "weight_hh_l0"]
    assert torch.equal(model(x)[0], before)
    assert all(isinstance(w, nn.Parameter) for w in model._flat_weights)
    model(x)[0].sum().backward()
    assert model.weight_ih_l0.grad is not None


def test_parameters_stay_where_the_pruned_model_had_them() -> None:
    model = network()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    prune.l1_unstructured(model[2], "bias", amount=0.5)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    order = [name.removesuffix("_orig") for name, _ in model.named_parameters()]
    from_torch_prune(model)
    assert [name for name, _ in model.named_parameters()] == order
    assert order[:2] == ["0.bias", "0.weight"]  # what torch made of it


def test_copies_and_checkpoints_work_again() -> None:
    model = network()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    model(batch())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    from_torch_prune(model)
    assert torch.equal(copy.deepcopy(model)[2].weight, model[2].weight)
    fresh = network()
    fresh.load_state_dict(model.state_dict())


def test_half_precision_and_other_hooks_stay() -> None:
    model = nn.Linear(4, 4).bfloat16()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    prune.l1_unstructured(model, "weight", amount=0.5)
    from_torch_prune(model)
    model(torch.ones(1, 4, dtype=torch.bfloat16))
    assert model.weight.dtype is torch.bfloat16 and (model.weight == 0).sum() == 8 and calls == [1]


# Shared tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.embed(x))
        return y


def test_tied_weights_that_are_pruned_alike_stay_tied() -> None:
    model, x = Tied(), torch.arange(6)
    for module in (model.embed, model.head):
        prune.l1_unstructured(module, "weight", amount=0.5)
    before = model(x)
    assert from_torch_prune(model) == ["embed.weight", "head.weight"]
    assert model.embed.weight is model.head.weight
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("both", [False, True])
def test_tied_weights_that_are_not_pruned_alike_are_refused_untouched(both: bool) -> None:
    model, x = Tied(), torch.arange(6)
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    if both:
        prune.custom_from_mask(model.embed, "weight", 1 - model.head.weight_mask)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"(embed|head).weight and (embed|head).weight share one tensor, but .*pruned"):
        from_torch_prune(model)
    with pytest.raises(ValueError, match="share one tensor"):
        from_torch_prune(model.state_dict())
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_mask_of_ones_does_not_part_tied_weights() -> None:
    model = Tied()
    prune.identity(model.head, "weight")
    assert from_torch_prune(model) == ["head.weight"]
    assert model.embed.weight is model.head.weight


def test_a_module_that_stands_in_two_places_is_one() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert from_torch_prune(model) == ["0.weight"]
    assert (layer.weight == 0).sum() == 8


# State dicts


@pytest.mark.parametrize("way", WAYS)
def test_a_dead_state_dict_loads_into_a_plain_model(way: str) -> None:
    model, x = network(), batch()
    WAYS[way](model)
    state = model.state_dict()
    originals = {key: value.clone() for key, value in state.items()}
    names = from_torch_prune(state)
    fresh = network()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    for name in names:
        assert torch.equal(fresh.get_parameter(name) == 0, originals[f"{name}_mask"] == 0)
        assert torch.equal(model.state_dict()[f"{name}_orig"], originals[f"{name}_orig"])  # the source is as it was


def test_a_checkpoint_with_its_optimizer_goes_on() -> None:
    model = network()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # made after pruning: other order of parameters
    step(model, optimizer)
    saved, moments = model.state_dict(), optimizer.state_dict()

    fresh = network()
    for key in [key for key in saved if key.endswith("_mask")]:
        module, _, leaf = key.removesuffix("_mask").rpartition(".")
        prune.identity(fresh.get_submodule(module), leaf)
    fresh.load_state_dict(saved)
    again = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    again.load_state_dict(moments)
    from_torch_prune(fresh)
    assert torch.equal(again.state[fresh[2].weight]["exp_avg"], optimizer.state[model[2].weight_orig]["exp_avg"])


def test_other_entries_of_a_state_dict_stay() -> None:
    state = {
        "a.weight_orig": torch.ones(2),
        "a.weight_mask": torch.tensor([1.0, 0.0]),
        "b.weight_orig": torch.ones(2),  # of spectral_norm
        "b.weight_u": torch.ones(1),
        "attention_mask": torch.ones(3),
        "c.weight": torch.ones(2),  # somebody's own masked layer has all three
        "c.weight_orig": torch.ones(2),
        "c.weight_mask": torch.zeros(2),
        "step": 7,
    }
    others = state.keys() - {"a.weight_orig", "a.weight_mask"}
    assert from_torch_prune(state) == ["a.weight"]
    assert state.keys() == {*others, "a.weight"} and state["a.weight"].tolist() == [1.0, 0.0]


# Refusals


def test_what_is_not_pruned_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no parameter of Linear is pruned .* `pomona\.hold\(.*\)` keeps them"):
        from_torch_prune(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no pair such as 'layer\.weight_orig'"):
        from_torch_prune(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="Is it in one of 'model', 'optimizer'"):
        from_torch_prune({"model": {}, "optimizer": {}, "epoch": 3})
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module or a state dict, got str"):
        from_torch_prune("model.pt")  # type: ignore[arg-type]


def test_a_damaged_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"damaged: a.weight_orig has shape \(2,\), its mask \(3,\)"):
        from_torch_prune({"a.weight_orig": torch.ones(2), "a.weight_mask": torch.ones(3)})
