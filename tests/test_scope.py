"""WHAT is pruned: each tensor once, nothing by accident, and no pattern ignored."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

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


def test_weights_of_two_or_more_dimensions_are_pruned_in_the_order_of_the_model() -> None:
    model = Block()
    selection = Scope().select(model)
    assert list(selection.inside) == ["token", "conv.weight", "layers.0.weight", "layers.1.weight", "head.weight"]
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in selection.inside.items())
    assert list(selection.inside) == [name for name, _ in model.named_parameters() if name in selection.inside]


def test_the_rest_is_outside_with_the_reason() -> None:
    vector = "1 dimension, min_ndim is 2"
    assert Scope().select(Block()).outside == {
        "conv.bias": vector,
        "bn.weight": vector,
        "bn.bias": vector,
        "layers.0.bias": vector,
        "head.bias": vector,
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


# min_ndim


@pytest.mark.parametrize(
    ("min_ndim", "names"),
    [
        (0, ["0.weight", "0.bias", "1.p"]),
        (1, ["0.weight", "0.bias"]),
        (2, ["0.weight"]),
    ],
)
def test_min_ndim_counts_dimensions(min_ndim: int, names: list[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Holder(nn.Parameter(torch.tensor(1.0))))
    assert inside(model, Scope(min_ndim=min_ndim)) == names


def test_a_scalar_is_told_to_have_no_dimensions() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Holder(nn.Parameter(torch.tensor(1.0))))
    assert Scope().select(model).outside["1.p"] == "0 dimensions, min_ndim is 2"


@pytest.mark.parametrize("min_ndim", [-1, 1.5, "2", None, True])
def test_a_bad_min_ndim_is_refused(min_ndim: Any) -> None:
    with pytest.raises(ValueError, match=rf"^Scope\(min_ndim=\.\.\.\) must be an integer >= 0, got {min_ndim!r}$"):
        Scope(min_ndim=min_ndim)


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


# patterns


@pytest.mark.parametrize(
    ("include", "names"),
    [
        (["*"], ["token", "conv.weight", "layers.0.weight", "layers.1.weight", "head.weight"]),
        (["head.weight"], ["head.weight"]),
        (["head"], ["head.weight"]),  # a module stands for its parameters
        (["layers.*"], ["layers.0.weight", "layers.1.weight"]),
        (["layers.[1-9]"], ["layers.1.weight"]),
        (["layers.?.weight"], ["layers.0.weight", "layers.1.weight"]),
        (["*.weight"], ["conv.weight", "layers.0.weight", "layers.1.weight", "head.weight"]),
        (["token"], ["token"]),
        (["head", "conv"], ["conv.weight", "head.weight"]),  # any of them, in the order of the model
    ],
)
def test_include_by_hand(include: list[str], names: list[str]) -> None:
    assert inside(Block(), Scope(include=tuple(include))) == names


def test_include_alone_does_not_bring_in_vectors() -> None:
    selection = Scope(include=("head",)).select(Block())
    assert selection.outside["head.bias"] == "1 dimension, min_ndim is 2"
    assert selection.outside["conv.weight"] == "not in include"


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
        "nothing to prune: none of the 2 parameters of Linear is in Scope(types=(), include=('bias',), exclude=(), "
        "min_ndim=2). weight: not in include; bias: 1 dimension, min_ndim is 2"
    )
    refuses(nn.Linear(2, 2), Scope(include=("bias",)), told)


def test_a_model_without_parameters_has_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match=r"^nothing to prune: .* The model has no parameters\.$"):
        Scope().select(nn.ReLU())


def test_only_the_first_five_reasons_are_told() -> None:
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(5)])
    with pytest.raises(ValueError, match=r"2\.weight: 1 dimension") as caught:
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
    selection = Scope().select(model)
    assert list(selection.inside) == ["0.weight"]
    assert selection.outside["1.p"] == "frozen (requires_grad is False)"


# tied parameters and shared modules


def test_a_tied_parameter_is_pruned_once_under_its_first_name() -> None:
    model = Tied()
    selection = Scope().select(model)
    assert list(selection.inside) == ["embedding.weight", "mid.weight"]
    assert selection.inside["embedding.weight"] is model.head.weight
    assert selection.outside == {"mid.bias": "1 dimension, min_ndim is 2", "head.weight": "tied to embedding.weight"}


def test_selecting_does_not_untie() -> None:
    model = Tied()
    Scope().select(model)
    assert model.head.weight is model.embedding.weight


def test_a_tied_parameter_out_of_scope_is_told_twice_and_pruned_never() -> None:
    model = two_linears()
    model[2].bias = model[0].bias
    outside = Scope().select(model).outside
    assert outside["0.bias"] == outside["2.bias"] == "1 dimension, min_ndim is 2"


def test_a_shared_module_is_pruned_once() -> None:
    shared = nn.Linear(2, 2)
    assert inside(nn.Sequential(shared, nn.ReLU(), shared)) == ["0.weight"]


def test_the_further_name_of_a_shared_module_is_told() -> None:
    shared = nn.Linear(2, 2)
    assert Scope().select(nn.Sequential(shared, shared)).outside.get("1.weight") == "tied to 0.weight"


@pytest.mark.parametrize("which", ["include", "types"])
def test_a_tied_parameter_is_in_scope_if_any_of_its_names_is(which: str) -> None:
    scope = Scope(include=("head",)) if which == "include" else Scope(types=(nn.Linear,), exclude=("mid",))
    selection = scope.select(Tied())
    (name,) = selection.inside
    other = {"embedding.weight": "head.weight", "head.weight": "embedding.weight"}[name]
    assert selection.outside[other] == f"tied to {name}"  # not "not in include": it is pruned


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


def test_a_complex_weight_is_refused() -> None:
    model = Holder(nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))
    refuses(model, Scope(), "p is torch.complex64; only real floating-point weights can be pruned")


def test_a_sparse_weight_is_refused() -> None:
    model = Holder(nn.Parameter(torch.eye(2).to_sparse()))
    refuses(model, Scope(), "p has layout torch.sparse_coo; only dense (strided) weights can be pruned")


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


def _with_new_weight_norm(model: nn.Sequential) -> Callable[[], object]:
    parametrizations.weight_norm(model[0])
    return lambda: parametrize.remove_parametrizations(model[0], "weight")


RECOMPUTED = [
    (_with_prune, "0.weight_orig"),
    (_with_parametrize, "0.parametrizations.weight.original"),
    (_with_new_weight_norm, "0.parametrizations.weight.original0"),
]


@pytest.mark.parametrize(("recompute", "name"), RECOMPUTED)
def test_a_recomputed_weight_is_refused_with_a_way_out_that_works(
    recompute: Callable[[nn.Sequential], Callable[[], object]], name: str
) -> None:
    model = two_linears()
    make_permanent = recompute(model)
    refuses(model, Scope(), f"{name} is recomputed by a parametrization (torch.nn.utils.parametrize or torch.nn.utils.")
    make_permanent()
    assert sorted(inside(model)) == ["0.weight", "2.weight"]


@pytest.mark.parametrize(("recompute", "name"), RECOMPUTED[:2])
def test_the_scope_that_the_refusal_suggests_works(
    recompute: Callable[[nn.Sequential], Callable[[], object]], name: str
) -> None:
    model = two_linears()
    recompute(model)
    with pytest.raises(ValueError, match="or exclude it") as caught:
        Scope().select(model)
    suggested = str(caught.value).rpartition("exclude it: ")[2]
    assert suggested == f"Scope(exclude=[{name!r}])"
    assert inside(model, eval(suggested)) == ["2.weight"]


def test_a_recomputed_root_is_refused_too() -> None:
    model = nn.Linear(2, 2)
    parametrize.register_parametrization(model, "weight", nn.Tanh())
    refuses(model, Scope(), "parametrizations.weight.original is recomputed")


def test_a_parameter_that_only_sounds_recomputed_is_pruned() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_orig = nn.Parameter(torch.zeros(2, 2))

    assert inside(Model()) == ["image_orig"]


def test_a_weight_recomputed_by_the_old_weight_norm_is_refused() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="recomputed"):
        Scope().select(model)


def test_a_parameter_without_elements_is_outside() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    model["a"].weight = nn.Parameter(torch.empty(0, 3))
    selection = Scope().select(model)
    assert list(selection.inside) == ["b.weight"]
    assert selection.outside["a.weight"] == "empty"
