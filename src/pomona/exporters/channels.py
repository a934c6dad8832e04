"""Channels that nothing reads, or that always say the same, are taken out of a model, by Torch-Pruning."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def shrink(model: Model, example: Tensor | tuple[Any, ...]) -> tuple[Model, dict[str, int]]:
    """A smaller copy of a sparse model without its dead channels; it computes the same.

    A channel is dead if every weight that reads it is zero. Taking one out can leave the channels that only it read
    dead too, so this goes on until nothing changes. A channel all of whose own weights are zero (as
    ``granularity="channel"`` leaves them) is a constant, made by its bias: it goes into the bias of what reads it, and
    then nothing reads it. A convolution with zeros around its input cannot take in a constant other than zero, nor can
    a layer without a bias; such a channel stays. What depends on what is Torch-Pruning's dependency graph
    (arXiv 2301.12900): a channel goes from a layer together with its norm, its bias and its counterparts across
    residual connections, or not at all. One channel of each layer always stays.

    Args:
        model: not changed. Convolutions (without groups, or depthwise) and linear layers are looked at.
        example: an input, or a tuple of them.

    Returns:
        The copy in evaluation mode, and name of a layer -> number of channels taken out of it.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: the smaller model does not compute the same on the example.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        raise ImportError("shrink needs Torch-Pruning: pip install 'pomona[shrink]'") from None
    inputs = example if isinstance(example, tuple) else (example,)
    smaller = copy.deepcopy(model).eval()
    frozen = [name for name, p in smaller.named_parameters() if not p.requires_grad]
    for p in smaller.parameters():
        p.requires_grad_(p.is_floating_point())  # Torch-Pruning follows the graph of autograd
    with torch.no_grad():
        expected = smaller(*inputs)
    graph = tp.DependencyGraph().build_dependency(smaller, example_inputs=inputs)
    removed: dict[str, int] = {}
    while taken := _fold_and_shrink(tp, graph, smaller, inputs):
        for name, count in taken.items():
            removed[name] = removed.get(name, 0) + count
    with torch.no_grad():
        got = smaller(*inputs)
    for a, b in zip(_tensors(got), _tensors(expected), strict=True):
        # Sums of fewer terms may be added in another order.
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())):
            raise ValueError(
                f"without its dead channels the model computes something else (largest difference "
                f"{float((a - b).abs().max()):.3g}); please report this model"
            )
    for name in frozen:
        smaller.get_parameter(name).requires_grad_(False)
    return smaller, removed


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _tensors(value)


def _fold_and_shrink(tp: Any, graph: Any, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    with torch.no_grad():
        _fold_constants(tp, graph, model, inputs)
    return _shrink_once(tp, graph, model)


Group: TypeAlias = Any  # of Torch-Pruning: what goes together with the channels of a layer
Layer: TypeAlias = nn.Conv2d | nn.Linear


def _groups(tp: Any, graph: Any, model: nn.Module) -> Iterator[tuple[str, Layer, Group]]:
    """Layers, the last first, with all that hangs on their channels."""
    for name, layer in reversed(list(model.named_modules())):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and _mixes_all(layer) and layer in graph.module2node:
            prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
            yield name, layer, graph.get_pruning_group(layer, prune, idxs=list(range(layer.weight.shape[0])))


def _fold_constants(tp: Any, graph: Any, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Constants into the biases of their readers, whose weights for them become zero."""
    heard = _constants(model, inputs)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    free = {layer: values for layer, values in heard.items() if uses[id(layer.weight)] == 1}
    # Taken before the first fold: a channel that falls silent by one has a bias that was not heard yet.
    silent = {layer: (layer.weight == 0).flatten(1).all(1) for layer in heard}
    for _, layer, group in _groups(tp, graph, model):
        mine = silent[layer].clone() if layer in silent else torch.zeros(1, dtype=torch.bool)
        for reader, root, own in _readers(group, mine, silent, free) if bool(mine.any()) else ():
            places = own[mine[root]]
            if reader.bias is not None:
                reader.bias += reader.weight[:, places].unsqueeze(-1).flatten(2).sum(2) @ free[reader][places]
            reader.weight[:, places] = 0


def _readers(
    group: Group, mine: Tensor, silent: Mapping[Layer, Tensor], free: Mapping[Layer, Tensor]
) -> list[tuple[Any, Tensor, Tensor]]:
    """Layers that read the group's channels, with the channels and their own indices of these.

    ``mine`` loses the channels that another layer makes too, or that one of the readers cannot take in.
    """
    readers = []
    for item in group:
        layer = item.dep.target.module
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not _mixes_all(layer):
            continue  # whether it leaves a constant one was measured
        is_reader = "in_channels" in item.dep.handler.__name__
        if None in item.root_idxs or not (_follows(layer, item.idxs, free) if is_reader else layer in silent):
            mine[:] = False
            return []
        root, own = torch.tensor(item.root_idxs), torch.tensor(item.idxs)
        mine[root[~(_can_take(layer, free[layer][own]) if is_reader else silent[layer][own])]] = False
        if is_reader:
            readers.append((layer, root, own))
    return readers


def _follows(reader: Layer, idxs: list[int], free: Mapping[Layer, Tensor]) -> bool:
    """Whether it was heard, its weights are its own, and no channels were padded on the way."""
    return reader in free and max(idxs, default=-1) < len(free[reader])


def _can_take(reader: nn.Module, values: Tensor) -> Tensor:
    """Which constants a reader's bias can stand for; NaN is none."""
    has_edge = isinstance(reader, nn.Conv2d) and reader.padding_mode == "zeros" and reader.padding != (0, 0)
    if (has_edge and reader.padding != "valid") or reader.bias is None:
        return values == 0
    return ~values.isnan()


def _constants(model: nn.Module, inputs: tuple[Any, ...]) -> dict[Layer, Tensor]:
    """The value of each channel that each layer reads; NaN where it depends on place, example or input."""
    heard: dict[Layer, Tensor] = {}

    def listen(layer: Any, args: tuple[Any, ...]) -> None:
        x = args[0]
        x = x.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else x
        x = x.reshape(-1, x.shape[-1])
        value = torch.where((x == x[:1]).all(0), x[0], torch.nan)
        before = heard.get(layer, value)
        heard[layer] = torch.where(before == value, value, torch.nan)

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_pre_hook(listen) for layer in layers]
    try:
        for one in (inputs, tuple(_another(x) for x in inputs)):
            model(*one)
    finally:
        for handle in handles:
            handle.remove()
    return heard


def _another(x: Any) -> Any:
    """A different input that a model takes as well."""
    if not isinstance(x, Tensor):
        return x
    if not x.is_floating_point():
        return x.flatten().flip(0).view(x.shape)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator).to(x)


def _shrink_once(tp: Any, graph: Any, model: nn.Module) -> dict[str, int]:
    """Take dead channels out of each layer, the last first, as what only they read may then be dead too."""
    taken = {}
    for name, layer, group in _groups(tp, graph, model):
        count = layer.weight.shape[0]
        dead = _dead(group, count)[: count - 1]
        if dead:
            prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
            graph.get_pruning_group(layer, prune, idxs=dead).prune()
            taken[name] = len(dead)
    return taken


def _mixes_all(layer: nn.Module) -> bool:
    """Whether each output depends on every input: not so in grouped convolutions."""
    return getattr(layer, "groups", 1) == 1


_PASS_ON = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)  # modules that look at each channel alone


def _dead(group: Any, num_channels: int) -> list[int]:
    """Channels of the group's first layer that only zero weights read; none if that is unknown."""
    is_read = torch.zeros(num_channels, dtype=torch.bool)
    num_readers = 0
    for item in group:
        layer = item.dep.target.module
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and _mixes_all(layer):
            if "in_channels" not in item.dep.handler.__name__:
                continue  # another layer that makes the channels
            if None in item.root_idxs:
                return []
            if max(item.idxs, default=-1) >= layer.weight.shape[1]:
                return []  # channels were padded on the way, which Torch-Pruning does not follow
            used = (layer.weight != 0).transpose(0, 1).flatten(1).any(1)  # by input channel
            is_read[torch.tensor(item.root_idxs)[used[item.idxs]]] = True
            num_readers += 1
        elif isinstance(layer, nn.Conv2d):
            if layer.groups != layer.in_channels:
                return []  # grouped: Torch-Pruning would have to keep the groups equal
        elif not isinstance(layer, _PASS_ON) and next(layer.parameters(), None) is not None:
            return []  # such as a LayerNorm, whose mean a dead channel is part of
    return (~is_read).nonzero().flatten().tolist() if num_readers else []
