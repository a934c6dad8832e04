"""A graph as a torch module, for everything that takes modules: export, `torch.compile`, other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.files.sparse import Sparse
from pomona.runtime.graph import Graph, Node


class GraphModule(nn.Module):
    """A module that computes a graph. Inputs and outputs are (N, *shape); weights are buffers in float32.

    Args:
        graph: what to compute.
        tensors: by name, dense or sparse.

    A call returns the output, or a tuple where the graph has several.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, np.ndarray[Any, Any] | Sparse]) -> None:
        super().__init__()
        graph.shapes(tensors)
        self._graph = graph
        self._names = {name: f"tensor{i}" for i, name in enumerate(graph.names())}  # theirs may hold dots
        for name, buffer in self._names.items():
            tensor = tensors[name]
            dense = tensor.dense() if isinstance(tensor, Sparse) else tensor
            self.register_buffer(buffer, torch.from_numpy(np.array(dense, dtype=np.float32)))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = list(inputs)
        for node in self._graph.nodes:
            weight, bias = (
                None if name is None else getattr(self, self._names[name]) for name in (node.weight, node.bias)
            )
            values.append(_run(node, [values[v] for v in node.operands], weight, bias))
        outputs = tuple(values[v] for v in self._graph.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def _run(node: Node, operands: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = operands[0]
    match node.op:
        case "conv":
            assert weight is not None
            weight = weight.reshape(*weight.shape, *(1 for _ in range(4 - weight.ndim)))
            return F.conv2d(x, weight, bias, node.stride, node.padding, node.dilation, node.groups)
        case "linear":
            assert weight is not None
            return F.linear(x, weight, bias)
        case "clip":
            return x.clamp(node.low, node.high)
        case "add":
            return x + operands[1]
        case "mul":
            return x * operands[1]
        case "scale":
            assert weight is not None
            along = (-1, 1, 1) if x.ndim == 4 else (-1,)
            return x * weight.view(along) + (0 if bias is None else bias.view(along))
        case "max_pool":
            return F.max_pool2d(x, node.kernel, node.stride, node.padding, ceil_mode=node.ceil)
        case "avg_pool":
            return F.avg_pool2d(x, node.kernel, node.stride, node.padding, node.ceil, node.count_padding)
        case "mean":
            return x.mean(dim=(2, 3), keepdim=True)
        case "flatten":
            return x.flatten(1)
        case "upsample":
            return x.repeat_interleave(node.stride[0], 2).repeat_interleave(node.stride[1], 3)
        case "concat":
            return torch.cat(operands, dim=1)
        case _:
            return _ELEMENTWISE[node.op](x)


_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}
