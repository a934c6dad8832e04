"""Channels that nothing reads are taken out of a model, by Torch-Pruning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def shrink(model: Model, example: Tensor | tuple[Any, ...]) -> tuple[Model, dict[str, int]]:
    """A smaller copy of a sparse model without its dead channels; it computes the same.

    A channel is dead if every weight that reads it is zero. Taking one out can leave the channels that only it read
    dead too, so this goes on until nothing changes. What depends on what is Torch-Pruning's dependency graph
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
    with torch.no_grad():
        expected = smaller(*inputs)
    graph = tp.DependencyGraph().build_dependency(smaller, example_inputs=inputs)
    removed: dict[str, int] = {}
    while taken := _shrink_once(tp, graph, smaller):
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


def _shrink_once(tp: Any, graph: Any, model: nn.Module) -> dict[str, int]:
    """Take dead channels out of each layer, the last first, as what only they read may then be dead too."""
    taken = {}
    for name, layer in reversed(list(model.named_modules())):
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not _mixes_all(layer) or layer not in graph.module2node:
            continue
        prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
        count = layer.weight.shape[0]
        dead = _dead(graph.get_pruning_group(layer, prune, idxs=list(range(count))), count)[: count - 1]
        if dead:
            graph.get_pruning_group(layer, prune, idxs=dead).prune()
            taken[name] = len(dead)
    return taken


def _mixes_all(layer: nn.Module) -> bool:
    """Whether each output depends on every input: not so in grouped convolutions."""
    return getattr(layer, "groups", 1) == 1


_PASS_ON = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)  # modules that look at each channel alone


def _dead(group: Any, num_channels: int) -> list[int]:
    """Channels of the group's first layer that only zero weights read; none where that cannot be told."""
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
