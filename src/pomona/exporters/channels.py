"""Channels that nothing reads, or that always say the same, are taken out of a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pomona.example import Example, Returned, randomness_kept
from pomona.exporters.carry import Indices, Optim, carry, cut
from pomona.exporters.flow import Flow, UnreadableError, differing, read, rigid, sizes_by_module
from pomona.torch_compile import unwrapped

Model = TypeVar("Model", bound=nn.Module)


@overload
def shrink(model: Model, example: Any, *, optimizer: None = None) -> tuple[Model, dict[str, int]]: ...
@overload
def shrink(model: Model, example: Any, *, optimizer: Optim) -> tuple[Model, dict[str, int], Optim]: ...


def shrink(model: Model, example: Any, *, optimizer: Any = None) -> Any:
    """A smaller copy of a sparse model without its dead channels; it computes the same, whatever the input.

    A channel is dead if every weight that reads it is zero, or is in a channel that is dead itself. A channel all of
    whose own weights are zero (as ``granularity="channel"`` leaves them) is a constant, made by its bias: it goes into
    the bias of what reads it, and then nothing reads it. A convolution with zeros around its input cannot take in a
    constant other than zero, nor can a layer without a bias; such a channel stays.

    What a channel is, and that it goes without a trace, is proved from the operators that ``torch.export`` finds in the
    model, never measured. A channel is a row of a layer together with its bias, its entries in norms that treat each
    channel alone (batch norm, instance norm), its filter in depthwise layers, and its counterparts across additions,
    products, concatenations, and halves of gated units. All of these go or none. A channel stays if it reaches an
    operator that mixes channels otherwise, or that is not known: a group or layer norm, a softmax over channels,
    attention, a recurrent layer, an output of the model. At last the smaller model is read again, and every operator in
    it has to be the old one without the channels that went: where the model's own code holds on to a size, those
    channels stay. One channel of each layer always stays.

    The proof takes activations to be finite, and the model to run the same operators for every input of the example's
    kind, as it does if ``torch.export`` accepts it; parts that are used in training only are left as they are.

    Args:
        model: not changed. Of one that ``torch.compile`` has wrapped the plain model shrinks.
        example: an input, a tuple of inputs, or a dictionary of keyword arguments, with as few samples as you like:
            only shapes and types matter, save for a last comparison of outputs on it and on inputs drawn at random.
        optimizer: of the model, if training is to go on; not changed. Then a third result is an optimizer of the same
            class for the copy, with the same groups and hyperparameters, and with all that it remembers of the weights
            that stay. For an optimizer that treats each weight alone (SGD, Adam, AdamW and most others) the next step
            of these weights is the one that the model would have made, where a channel was dead because nothing read
            it. What hangs on the optimizer (a Pruner, a scheduler, hooks) stays with the old one: make it anew.

    Returns:
        The copy in evaluation mode, and name of a layer -> number of channels taken out of it; then the optimizer, if
        one was given. A depthwise layer is not listed: it loses the channels of the layer before it.

    Raises:
        ValueError: ``torch.export`` cannot read the model, or the optimizer remembers something that has no entry for
            each weight; or, against the proof, the smaller model computes something else.
    """
    called = Example.of(example)
    with unwrapped(model) as inner, randomness_kept():
        whole = copy.deepcopy(inner).eval()
        smaller, removed, indices = _smaller(whole, called)
        _compare(whole, copy.deepcopy(smaller), called)
        return (
            (smaller, removed) if optimizer is None else (smaller, removed, carry(optimizer, inner, smaller, indices))
        )


def _smaller(whole: Model, example: Example) -> tuple[Model, dict[str, int], dict[str, Indices]]:
    flow = read(whole, example)
    while bool((removed := flow.removable()).any()):
        smaller = _without(whole, flow, removed)
        blamed = _in_the_way(flow, removed, smaller, example)
        if blamed is None:
            return smaller, _counts(flow, removed), _indices(flow, removed)
        flow.pin(*(blamed if any(bool(removed[slots].any()) for slots in blamed) else [removed.nonzero().flatten()]))
    return copy.deepcopy(whole), {}, {}


def _in_the_way(flow: Flow, removed: Tensor, smaller: nn.Module, example: Example) -> list[Tensor] | None:
    """Slots that cannot go after all, as the model's own code wants the old sizes; None if it does not."""
    try:
        _run(copy.deepcopy(smaller), example)
    except Exception:  # whatever the model's own code raises
        return rigid(flow, removed)
    try:
        return differing(flow, removed, read(smaller, example, _left(flow, removed)))
    except UnreadableError:
        return rigid(flow, removed)


def _left(flow: Flow, removed: Tensor) -> dict[str, list[Tensor]]:
    return {name: [slots[~removed[slots]] for slots in dims] for name, dims in flow.slots.items()}


def _counts(flow: Flow, removed: Tensor) -> dict[str, int]:
    """Name of a layer that mixes channels -> rows of its weight that have gone."""
    rows = {int(reader.outputs[0]) for reader in flow.readers if len(reader.outputs)}
    counts = {
        name.removesuffix(".weight"): int(removed[slots].sum())
        for name, dims in flow.slots.items()
        for slots in dims
        if len(slots) and int(slots[0]) in rows
    }
    return {name: count for name, count in counts.items() if count}


# The smaller model


def _indices(flow: Flow, removed: Tensor) -> dict[str, Indices]:
    """Parameter or buffer -> what stays of it, if not all."""
    found = {
        name: [(~removed[slots]).nonzero().flatten() if bool(removed[slots].any()) else None for slots in dims]
        for name, dims in flow.slots.items()
    }
    return {name: indices for name, indices in found.items() if any(index is not None for index in indices)}


@torch.no_grad()
def _without(model: Model, flow: Flow, removed: Tensor) -> Model:
    """A copy with constants in the biases of their readers, and without the slots."""
    smaller = copy.deepcopy(model)
    for reader in flow.readers:
        is_read = reader.uses[~removed[reader.outputs]].any(0)
        gone = removed[reader.inputs] & is_read & (reader.constants != 0)
        if reader.bias is not None and bool(gone.any()):
            bias = smaller.get_parameter(reader.bias)
            added = reader.weight[:, gone].double().sum(2) @ reader.constants[gone].double()
            bias.copy_(bias.double().cpu() + added)
    named = dict(smaller.named_parameters()) | dict(smaller.named_buffers())
    old = {name: named[name] for name in _indices(flow, removed)}
    new = {id(old[name]): _cut(old[name], indices) for name, indices in _indices(flow, removed).items()}
    for layer in smaller.modules():
        own: list[dict[str, Any]] = [layer._parameters, layer._buffers]
        for tensors in own:
            tensors.update({name: new[id(x)] for name, x in tensors.items() if id(x) in new})
        _tell_sizes(layer)
    layers = dict(smaller.named_modules(remove_duplicate=False))
    for name, size in sizes_by_module(flow, removed).items():
        norm = layers.get(name)
        if isinstance(norm, _NormBase):
            norm.num_features = size
    return smaller


def _cut(tensor: Tensor, indices: Indices) -> Tensor:
    left = cut(tensor.detach(), indices)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        left = left.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def _tell_sizes(layer: nn.Module) -> None:
    """The numbers of channels that a layer shows, and the number of groups that it passes on."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, _NormBase):
        some = next((x for x in (weight, layer.running_mean) if x is not None), None)
        layer.num_features = layer.num_features if some is None else len(some)
    elif weight is None:
        return
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(weight)
    elif type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # of transformers
        layer.__dict__.update(zip(("nx", "nf"), weight.shape, strict=True))
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = weight.shape[1]
    elif isinstance(layer, _ConvNd):
        first = layer.in_channels if layer.transposed else layer.out_channels
        layer.groups = len(weight) // (first // layer.groups) if layer.groups > 1 else 1
        sizes = (len(weight), weight.shape[1] * layer.groups)
        layer.in_channels, layer.out_channels = sizes if layer.transposed else sizes[::-1]


# The last comparison


def _compare(model: nn.Module, smaller: nn.Module, example: Example) -> None:
    """Outputs on the example and on inputs unlike it; that they agree has been proved, so this finds our own faults."""
    for given in (example, *_examples_like(example)):
        try:
            wanted = _run(model, given)
        except Exception:
            if given is example:
                raise
            continue  # an input that the model does not take
        found = _run(smaller, given)
        if not all(map(_equal, found, wanted)) and not _agree_exactly(model, smaller, given):
            apart = [float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True) if a.shape == b.shape]
            raise ValueError(
                f"without its dead channels the model computes something else (largest difference "
                f"{max(apart, default=math.inf):.3g}); please report this model"
            )


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    """All tensors that the model returns, each time of the same random numbers."""
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(0)
        return list(Returned.of(example.map(Tensor.clone).run(model)).tensors.values())


def _agree_exactly(model: nn.Module, smaller: nn.Module, example: Example) -> bool:
    """In double precision, where a norm does not enlarge roundings to what can be seen."""
    try:
        exact = example.map(lambda x: x.double() if x.is_floating_point() else x)
        found, wanted = (_run(copy.deepcopy(x).double(), exact) for x in (smaller, model))
    except RuntimeError:  # a model that insists on another precision
        return False
    return all(map(_equal, found, wanted))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not b.numel() or not b.is_floating_point():
        return torch.equal(a, b)
    # Sums of fewer terms may be added in another order: a thousand roundings.
    tolerance = min(0.1, max(1000 * torch.finfo(b.dtype).eps, 1e-7))
    scale = float(b.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(a, b, rtol=tolerance, atol=0.1 * tolerance * scale, equal_nan=True)


def _examples_like(example: Example) -> Iterator[Example]:
    """Other inputs of the example's form: larger, darker, brighter, all zero."""
    generator = torch.Generator().manual_seed(0)
    for scale, shift in ((1.0, 0.0), (3.0, -2.0), (0.3, 2.0), (0.0, 0.0)):
        yield example.map(partial(_another, scale=scale, shift=shift, generator=generator))


def _another(x: Tensor, scale: float, shift: float, generator: torch.Generator) -> Tensor:
    if x.is_complex():
        return x
    if not x.is_floating_point():  # tokens and masks: those of the example in another order
        return x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].view(x.shape)
    return (torch.randn(x.shape, generator=generator) * scale + shift).to(x)
