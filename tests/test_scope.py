"""WHAT is pruned: each tensor once, nothing by accident, and no pattern ignored."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import pomona
from pomona.layout import Layout
from pomona.scope import Scope, ScopedParameters
from pomona.zoo.models import LeNet5, LeNet300100

scope_of: Any = Scope  # for what its tuples are made from: lists and single values


class Block(nn.Module):
    """One of everything: names a user would write patterns for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
        self.head = nn.Linear(2, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))


class Holder(nn.Module):
    """One bare parameter, ``p``."""

    def __init__(self, p: nn.Parameter) -> None:
        super().__init__()
        self.p = p


class Tied(nn.Module):
    """A language model's ends: one tensor, two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.mid = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def two_linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def inside(model: nn.Module, scope: Scope = Scope()) -> list[str]:  # noqa: B008, a frozen value
    return list(scope.select(model).inside)


def refuses(model: nn.Module, scope: Scope, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        scope.select(model)


# the default


def test_what_layers_multiply_with_is_pruned_in_the_order_of_the_model() -> None:
    model = Block()
    selection = Scope().select(model)
    assert list(selection.inside) == ["conv.weight", "layers.0.weight", "layers.1.weight", "head.weight"]
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in selection.inside.items())
    assert list(selection.inside) == [name for name, _ in model.named_parameters() if name in selection.inside]
    assert selection.layouts == dict.fromkeys(selection.inside, Layout(0, 1))


def test_the_rest_is_outside_with_the_reason() -> None:
    assert Scope().select(Block()).outside == {
        "token": "a vector",
        "conv.bias": "a vector",
        "bn.weight": "of a norm, BatchNorm2d",
        "bn.bias": "of a norm, BatchNorm2d",
        "layers.0.bias": "a vector",
        "head.bias": "a vector",
    }


def test_every_parameter_is_either_inside_or_outside() -> None:
    model = Block()
    selection = scope_of(exclude=["head"]).select(model)
    assert {*selection.inside, *selection.outside} == {name for name, _ in model.named_parameters()}
    assert not selection.inside.keys() & selection.outside.keys()


@pytest.mark.parametrize(("model", "count"), [(LeNet300100, 266_200), (LeNet5, 430_500)])
def test_kernel_counts_of_gsm(model: Callable[[], nn.Module], count: int) -> None:
    assert sum(parameter.numel() for parameter in Scope().select(model()).inside.values()) == count


def test_a_selection_needs_no_reasons() -> None:
    assert ScopedParameters({}).outside == {}


# also


@pytest.mark.parametrize(
    ("also", "names"),
    [
        ("*", ["0.weight", "0.bias", "1.p"]),
        ("*.bias", ["0.weight", "0.bias"]),
        ("1", ["0.weight", "1.p"]),
        ((), ["0.weight"]),
    ],
)
def test_also_takes_in_whatever_it_names(also: Any, names: list[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Holder(nn.Parameter(torch.tensor(1.0))))
    assert inside(model, Scope(also=also)) == names


def test_also_is_a_wish_beside_include_and_types_and_exclude_is_final() -> None:
    assert inside(Block(), Scope(include=("conv",), also=("head.bias",))) == ["conv.weight", "head.bias"]
    assert inside(Block(), Scope(types=(nn.Conv2d,), also=("token",))) == ["token", "conv.weight"]
    assert inside(Block(), Scope(include=("conv",), also=("head",), exclude=("head.weight",))) == [
        "conv.weight",
        "head.bias",
    ]


# types


def test_types_take_the_parameters_of_modules_of_these_classes() -> None:
    assert inside(Block(), Scope(types=(nn.Conv2d,))) == ["conv.weight"]
    assert inside(Block(), Scope(types=(nn.Conv2d, nn.Linear))) == [
        "conv.weight",
        "layers.0.weight",
        "layers.1.weight",
        "head.weight",
    ]
    assert (
        Scope(types=(nn.Conv2d,)).select(Block()).outside["head.weight"] == "belongs to Linear, which is not in types"
    )


def test_types_take_subclasses_too() -> None:
    class MyLinear(nn.Linear):
        pass

    assert inside(nn.Sequential(MyLinear(2, 2)), Scope(types=(nn.Linear,))) == ["0.weight"]


def test_a_type_that_matches_nothing_is_told_with_what_there_is() -> None:
    told = "Scope(types=[Conv2d]) matches no module of the model; its modules with parameters are: BatchNorm1d, Linear"
    refuses(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2)), Scope(types=(nn.Conv2d,)), told)


def test_one_type_of_several_that_matches_nothing_is_an_error_too() -> None:
    refuses(two_linears(), Scope(types=(nn.Linear, nn.Conv2d)), "Scope(types=[Conv2d]) matches no module")


@pytest.mark.parametrize("types", ["Linear", int, [nn.Linear, Tensor], [nn.ReLU()]])
def test_types_are_classes_of_modules(types: Any) -> None:
    with pytest.raises(TypeError, match=r"^Scope\(types=\.\.\.\) takes subclasses of nn\.Module, got "):
        Scope(types=types)


def test_excluded_types_win_over_all_else() -> None:
    assert inside(Block(), Scope(exclude_types=(nn.Linear,))) == ["conv.weight"]
    assert inside(Block(), Scope(also="*", exclude_types=[nn.Linear, nn.BatchNorm2d])) == [
        "token",
        "conv.weight",
        "conv.bias",
    ]
    outside = Scope(exclude_types=(nn.Linear,)).select(Block()).outside
    assert outside["head.weight"] == "of Linear, which is in exclude_types"
    refuses(Block(), Scope(exclude_types=(nn.GRU,)), "Scope(exclude_types=[GRU]) matches no module of the model")
    with pytest.raises(TypeError, match=r"^Scope\(exclude_types=\.\.\.\) takes subclasses of nn\.Module, got 'Linear'"):
        scope_of(exclude_types="Linear")


# patterns


@pytest.mark.parametrize(
    ("include", "names"),
    [
        (["*"], ["conv.weight", "layers.0.weight", "layers.1.weight", "head.weight"]),
        (["head.weight"], ["head.weight"]),
        (["head"], ["head.weight"]),  # a module stands for its parameters
        (["layers.*"], ["layers.0.weight", "layers.1.weight"]),
        (["layers.[1-9]"], ["layers.1.weight"]),
        (["layers.?.weight"], ["layers.0.weight", "layers.1.weight"]),
        (["*.weight"], ["conv.weight", "layers.0.weight", "layers.1.weight", "head.weight"]),
        (["head", "conv"], ["conv.weight", "head.weight"]),  # any of them, in the order of the model
    ],
)
def test_include_by_hand(include: list[str], names: list[str]) -> None:
    assert inside(Block(), Scope(include=tuple(include))) == names


def test_include_alone_does_not_bring_in_vectors() -> None:
    selection = Scope(include=("head",)).select(Block())
    assert selection.outside["head.bias"] == "a vector"
    assert selection.outside["conv.weight"] == "not in include"


def test_an_include_that_finds_nothing_to_multiply_with_says_how_to_prune_it_all_the_same() -> None:
    told = "Scope(include=['token']) finds nothing that a layer multiplies with: token is a vector. To prune it all"
    refuses(Block(), Scope(include=("head", "token")), told)
    assert inside(Block(), Scope(include=("head",), also=("token",))) == ["token", "head.weight"]


def test_exclude_by_hand() -> None:
    selection = Scope(exclude=("layers.*", "token")).select(Block())
    assert list(selection.inside) == ["conv.weight", "head.weight"]
    assert selection.outside["layers.1.weight"] == "excluded by 'layers.*'"
    assert selection.outside["token"] == "excluded by 'token'"


def test_exclude_wins_over_include() -> None:
    assert inside(Block(), Scope(include=("layers.*",), exclude=("layers.0",))) == ["layers.1.weight"]


def test_types_and_patterns_must_all_agree() -> None:
    scope = Scope(types=(nn.Linear,), include=("conv", "layers.*"), exclude=("layers.0",))
    assert inside(Block(), scope) == ["layers.1.weight"]


def test_one_pattern_or_type_needs_no_tuple() -> None:
    assert scope_of(include="head") == Scope(include=("head",))
    assert scope_of(exclude="head") == Scope(exclude=("head",))
    assert scope_of(types=nn.Linear) == Scope(types=(nn.Linear,))


def test_any_iterable_becomes_a_tuple_so_that_a_scope_is_a_value() -> None:
    assert scope_of(include=["a", "b"], types=[nn.Linear]) == Scope(include=("a", "b"), types=(nn.Linear,))
    assert hash(scope_of(include=["a", "b"])) == hash(Scope(include=("a", "b")))


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_closest(which: str) -> None:
    told = f"Scope({which}=['hed.weight']) matches no parameter of the model. Closest names: head.weight"
    refuses(Block(), scope_of(**{which: ("hed.weight",)}), told)


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_one_pattern_of_several_that_matches_nothing_is_an_error_too(which: str) -> None:
    refuses(Block(), scope_of(**{which: ("head", "tail")}), f"Scope({which}=['tail']) matches no parameter")


def test_the_closest_names_include_modules() -> None:
    refuses(
        Block(),
        Scope(include=("heads",)),
        "Scope(include=['heads']) matches no parameter of the model. Closest names: head,",
    )


def test_case_matters() -> None:
    refuses(Block(), Scope(include=("Head.weight",)), "Scope(include=['Head.weight']) matches no parameter")


def test_a_module_without_parameters_of_its_own_matches_nothing() -> None:
    refuses(Block(), Scope(exclude=("layers",)), "Scope(exclude=['layers']) matches no parameter")  # 'layers.*' does


def test_a_pattern_unlike_any_name_is_told_what_names_there_are() -> None:
    told = "Scope(include=['xyz']) matches no parameter of the model. Closest names: 0, 0.bias, 0.weight, 2, 2.bias"
    refuses(two_linears(), Scope(include=("xyz",)), told)


def test_a_pattern_for_a_model_without_parameters_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"no parameters?"):
        Scope(include=("head",)).select(nn.ReLU())
    with pytest.raises(ValueError, match=r"[^ ]$"):
        Scope(include=("head",)).select(nn.ReLU())


@pytest.mark.parametrize("which", ["include", "exclude"])
@pytest.mark.parametrize("pattern", [3, None, nn.Linear, re.compile("head")])
def test_patterns_are_strings(which: str, pattern: Any) -> None:
    with pytest.raises(TypeError, match=r"^Scope patterns are strings such as 'head\.\*', got "):
        scope_of(**{which: [pattern]})


# nothing to prune


def test_nothing_to_prune_says_why_not() -> None:
    told = (
        "nothing to prune: none of the 2 parameters of Linear is in Scope(types=(), include=(), exclude=('weight',), "
        "exclude_types=(), also=()). weight: excluded by 'weight'; bias: a vector"
    )
    refuses(nn.Linear(2, 2), Scope(exclude=("weight",)), told)


def test_a_model_without_parameters_has_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match=r"^nothing to prune: .* The model has no parameters\.$"):
        Scope().select(nn.ReLU())


def test_only_the_first_five_reasons_are_told() -> None:
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(5)])
    with pytest.raises(ValueError, match=r"2\.weight: of a norm, BatchNorm1d") as caught:
        Scope().select(model)
    assert "2.bias" not in str(caught.value)


def test_a_frozen_weight_is_not_pruned() -> None:
    model = two_linears()
    model[0].requires_grad_(False)
    selection = Scope().select(model)
    assert list(selection.inside) == ["2.weight"]
    assert selection.outside["0.weight"] == "frozen (requires_grad is False)"


def test_an_integer_parameter_is_frozen_by_nature() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Holder(nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), False)))
    selection = Scope().select(model, refuse=False)
    assert list(selection.inside) == ["0.weight"]
    assert selection.outside["1.p"] == "of Holder, which is no layer that Pomona knows"
    assert Scope(also=("1",)).select(model).outside["1.p"] == "frozen (requires_grad is False)"
    assert Scope(also=("1",)).select(model, with_frozen=True).outside["1.p"] == "frozen (requires_grad is False)"


def test_frozen_weights_are_inside_where_that_is_asked() -> None:
    model = two_linears().requires_grad_(False)
    assert list(Scope().select(model, with_frozen=True).inside) == ["0.weight", "2.weight"]


# tied parameters and shared modules


def test_a_tied_parameter_is_pruned_once_under_its_first_name() -> None:
    model = two_linears()
    model.append(nn.Linear(4, 3))
    model[3].weight = model[0].weight
    selection = Scope().select(model)
    assert list(selection.inside) == ["0.weight", "2.weight"]
    assert selection.inside["0.weight"] is model[3].weight
    assert selection.outside["3.weight"] == "tied to 0.weight"


def test_a_head_that_is_tied_to_an_embedding_is_an_embedding() -> None:
    tied = "tied to an embedding (embedding.weight), which types=[Embedding, ...] or also takes in"
    assert inside(Tied()) == ["mid.weight"]
    outside = Scope().select(Tied()).outside
    assert (outside["head.weight"], outside["embedding.weight"]) == (tied, "an embedding (Embedding)")
    assert inside(Tied(), Scope(types=(nn.Linear,))) == ["mid.weight"]
    assert inside(Tied(), Scope(types=(nn.Linear, nn.Embedding))) == ["embedding.weight", "mid.weight"]
    assert inside(Tied(), Scope(also=("head",))) == ["embedding.weight", "mid.weight"]
    refuses(Tied(), Scope(include=("head",)), "Scope(include=['head']) finds nothing that a layer multiplies with: emb")
    # What the head multiplies with is (outputs, inputs), whatever the embedding says.
    assert Scope(also=("head",)).select(Tied()).layouts["embedding.weight"] == Layout(0, 1)


def test_an_embedding_is_pruned_if_it_is_asked_for() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    assert inside(model) == ["1.weight"]
    assert Scope().select(model).outside["0.weight"] == "an embedding (Embedding)"
    assert inside(model, Scope(types=(nn.Embedding,))) == ["0.weight"]
    assert Scope(also=("0",)).select(model).layouts["0.weight"] == Layout(1, 0)


def test_selecting_does_not_untie() -> None:
    model = Tied()
    Scope().select(model)
    assert model.head.weight is model.embedding.weight


def test_a_tied_parameter_out_of_scope_is_told_twice_and_pruned_never() -> None:
    model = two_linears()
    model[2].bias = model[0].bias
    outside = Scope().select(model).outside
    assert outside["0.bias"] == outside["2.bias"] == "a vector"


def test_a_shared_module_is_pruned_once() -> None:
    shared = nn.Linear(2, 2)
    assert inside(nn.Sequential(shared, nn.ReLU(), shared)) == ["0.weight"]


def test_the_further_name_of_a_shared_module_is_told() -> None:
    shared = nn.Linear(2, 2)
    assert Scope().select(nn.Sequential(shared, shared)).outside.get("1.weight") == "tied to 0.weight"


@pytest.mark.parametrize("which", ["include", "types"])
def test_a_tied_parameter_is_in_scope_if_any_of_its_names_is(which: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Bilinear(2, 1, 2), nn.Conv2d(2, 2, 1))
    model[1].weight = model[0].weight
    scope = Scope(include=("1",)) if which == "include" else Scope(types=(nn.Bilinear,))
    selection = scope.select(model)
    assert list(selection.inside) == ["0.weight"]
    assert selection.outside["1.weight"] == "tied to 0.weight"  # not "not in include": it is pruned


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_a_tied_parameter_excluded_by_either_name_is_not_pruned(name: str) -> None:
    model = Tied()
    assert inside(model, Scope(exclude=(name,))) == ["mid.weight"]


def test_a_shared_module_excluded_by_its_first_name_is_not_pruned() -> None:
    shared = nn.Linear(2, 2)
    assert inside(nn.Sequential(shared, shared, nn.Linear(2, 2)), Scope(exclude=("0",))) == ["2.weight"]


def test_a_shared_module_excluded_by_its_second_name_is_not_pruned() -> None:
    shared = nn.Linear(2, 2)
    assert inside(nn.Sequential(shared, shared, nn.Linear(2, 2)), Scope(exclude=("1",))) == ["2.weight"]


def test_a_shared_module_is_included_by_its_second_name() -> None:
    shared = nn.Linear(2, 2)
    assert len(inside(nn.Sequential(shared, shared), Scope(include=("1",)))) == 1


# what cannot be pruned as it stands


def test_a_lazy_module_is_told_to_run_once() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    refuses(model, Scope(), "0.weight has no shape yet; run one forward pass before pruning")
    model(torch.zeros(1, 3))
    assert inside(model) == ["0.weight"]


@pytest.mark.parametrize("scope", [Scope(exclude=("1",)), Scope(include=("0",)), Scope(types=(nn.Conv2d,))])
def test_a_lazy_module_out_of_scope_is_no_obstacle(scope: Scope) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyLinear(2))
    assert inside(model, scope) == ["0.weight"]


def test_weights_that_cannot_be_pruned_are_refused_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(
        ValueError, match=re.escape("Leave them dense: Scope(exclude=['0.weight', '1.weight'])")
    ) as caught:
        Scope().select(model)
    assert "0.weight (it is torch.complex64; only real floating-point weights can be pruned)" in str(caught.value)
    assert "1.weight (its memory layout is torch.sparse_coo; only dense (strided)" in str(caught.value)
    assert inside(model, Scope(exclude=["0.weight", "1.weight"])) == ["2.weight"]


def test_what_cannot_be_pruned_may_be_excluded() -> None:
    odd = [torch.zeros(2, 2, dtype=torch.complex64), torch.eye(2).to_sparse()]
    model = nn.Sequential(nn.Linear(2, 2), *[Holder(nn.Parameter(value)) for value in odd])
    assert inside(model, Scope(exclude=("[12]",))) == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_real_floating_point_weight_is_pruned(dtype: torch.dtype) -> None:
    assert inside(two_linears().to(dtype)) == ["0.weight", "2.weight"]


torch_prune: Any = prune  # published without types


def _with_prune(model: nn.Sequential) -> Callable[[], object]:
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    return lambda: torch_prune.remove(model[0], "weight")


def _with_parametrize(model: nn.Sequential) -> Callable[[], object]:
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    return lambda: parametrize.remove_parametrizations(model[0], "weight")


def _with_old_spectral_norm(model: nn.Sequential) -> Callable[[], object]:
    nn.utils.spectral_norm(model[0])
    return lambda: nn.utils.remove_spectral_norm(model[0])


RECOMPUTED = [
    (_with_prune, "0.weight_orig (by a mask of torch.nn.utils.prune)", "pomona.from_torch_prune(model)"),
    (
        _with_parametrize,
        "0.parametrizations.weight.original (by Tanh)",
        "torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule('0'), 'weight')",
    ),
    (
        _with_old_spectral_norm,
        "0.weight_orig (by SpectralNorm)",
        "torch.nn.utils.remove_spectral_norm(model.get_submodule('0'), 'weight')",
    ),
]


@pytest.mark.parametrize(("recompute", "what", "remedy"), RECOMPUTED)
def test_a_computed_weight_is_refused_with_ways_out_that_work(
    recompute: Callable[[nn.Sequential], Callable[[], object]], what: str, remedy: str
) -> None:
    model = two_linears()
    recompute(model)
    told = "zeros in these parameters would not be zeros of their layers, which compute what they multiply with: "
    with pytest.raises(
        ValueError, match=re.escape(f"{told}{what}. Make them plain parameters first: {remedy}.")
    ) as error:
        Scope().select(model)
    suggested = str(error.value).rpartition("Or leave them dense: ")[2]
    assert inside(model, eval(suggested)) == ["2.weight"]
    assert inside(model, Scope(exclude=["0"])) == inside(model, Scope(exclude=["0.weight"])) == ["2.weight"]
    eval(remedy, {"torch": torch, "pomona": pomona, "model": model})
    assert sorted(inside(model)) == ["0.weight", "2.weight"]


def test_a_computed_root_is_refused_too() -> None:
    model = nn.Linear(2, 2)
    parametrize.register_parametrization(model, "weight", nn.Tanh())
    with pytest.raises(ValueError, match=r"remove_parametrizations\(model, 'weight'\)"):
        Scope().select(model)


def test_all_computed_weights_are_named_at_once() -> None:
    model = nn.Sequential(*[parametrizations.orthogonal(nn.Linear(4, 4)) for _ in range(3)], nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.para.*1\.para.*2\.para.*get_submodule\('0'\).*get_submodule\('2'\)"):
        Scope().select(model)
    assert inside(model, Scope(exclude=["*parametrizations*"])) == ["3.weight"]


def test_counting_does_not_refuse_computed_weights() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))
    selection = Scope().select(model, refuse=False)
    assert list(selection.inside) == ["1.weight"]
    assert selection.outside["0.parametrizations.weight.original"] == "cannot be pruned: by Orthogonal"


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_a_weight_norm_is_pruned_through_its_direction(is_old: bool) -> None:
    if is_old:
        with pytest.warns(FutureWarning, match="weight_norm"):
            model = nn.Sequential(nn.utils.weight_norm(nn.ConvTranspose2d(4, 6, 3)))
        v, g = "0.weight_v", "0.weight_g"
    else:
        model = nn.Sequential(parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3)))
        v, g = "0.parametrizations.weight.original1", "0.parametrizations.weight.original0"
    selection = Scope().select(model)
    assert list(selection.inside) == [v]
    assert selection.outside[g] == "the lengths of a weight norm"
    assert selection.layouts[v] == Layout(1, 0)
    with torch.no_grad():
        selection.inside[v][::2, 1] = 0.0
    model(torch.zeros(1, 4, 3, 3))  # the old one computes its weight when it is called
    assert ((model[0].weight == 0) == (selection.inside[v] == 0)).all()


def test_a_parameter_that_only_sounds_computed_is_pruned() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = 4
            self.image_orig = nn.Parameter(torch.zeros(2, 2))

    assert inside(Model(), Scope(also=["image_orig"])) == ["image_orig"]


# layers whose forward computes


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT and NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias)


class Padded(nn.Conv2d):
    """Its own forward, and the weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Scaled(nn.Linear):
    """Zeros stay zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 3, self.bias)


class Odd(nn.Linear):
    """It fails outside of its model."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + other


def test_a_layer_that_convolves_something_else_than_its_weight_is_refused() -> None:
    model = nn.Sequential(Standardised(3, 8, 3), Padded(8, 8, 3), Standardised(8, 8, 3), Scaled(2, 2), Odd(2, 2))
    before, states = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight \(by its Standardised, whose forward ") as error:
        Scope().select(model)
    assert "1.weight" not in str(error.value)
    assert inside(model, Scope(exclude_types=[Standardised])) == ["1.weight", "3.weight", "4.weight"]
    assert inside(model, eval(str(error.value).rpartition("dense: ")[2])) == ["1.weight", "3.weight", "4.weight"]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, states[name]) for name, p in model.named_parameters())


def test_a_refusal_of_many_is_short_and_its_patterns_fit_no_other() -> None:
    model = nn.ModuleDict(
        {
            "stages": nn.ModuleList(
                nn.ModuleDict({"conv": Standardised(3, 3, 3), "fc": nn.Linear(2, 2)}) for _ in range(9)
            ),
            "heads": nn.ModuleList([Standardised(3, 3, 3), nn.Conv2d(3, 3, 3), Standardised(3, 3, 3)]),
        }
    )
    with pytest.raises(ValueError, match=r"stages\.0\.conv\.weight, .* and 8 more \(by its Standardised") as error:
        Scope().select(model)
    suggested = str(error.value).rpartition("dense: ")[2]
    assert suggested == "Scope(exclude=['stages.*.conv.weight', 'heads.0.weight', 'heads.2.weight'])"
    assert inside(model, eval(suggested)) == [*(f"stages.{i}.fc.weight" for i in range(9)), "heads.1.weight"]


# modules that nobody knows


class Unknown(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))


def test_weights_of_unknown_modules_are_named_with_ways_out_that_work() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Unknown(4, 4), Unknown(4, 4))
    with pytest.warns(
        UserWarning, match="32 weights stay dense, because Pomona does not know .* 1.w of Unknown, 2"
    ) as seen:
        Scope().select(model)
    assert "Scope(also=['*.w'])" in str(seen[0].message) and "Scope(exclude_types=[Unknown])" in str(seen[0].message)
    assert inside(model, Scope(also=["*.w"])) == ["0.weight", "1.w", "2.w"]
    assert inside(model, Scope(exclude_types=[Unknown])) == ["0.weight"]
    assert Scope(types=[Unknown, nn.Linear]).select(model).layouts["1.w"] is None


def test_a_small_table_of_an_unknown_module_is_no_reason_for_a_warning() -> None:
    model = nn.Sequential(nn.Linear(20, 20), Unknown(4, 4))
    assert Scope().select(model).outside["1.w"] == "of Unknown, which is no layer that Pomona knows"


def test_a_parameter_without_elements_is_outside() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    model["a"].weight = nn.Parameter(torch.empty(0, 3))
    selection = Scope().select(model)
    assert list(selection.inside) == ["b.weight"]
    assert selection.outside["a.weight"] == "empty"
