"""The curvature of a loss of named tensors: its Hessian's top eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Parameters = dict[str, Tensor]  # name -> value
Loss = Callable[[Parameters], Tensor]  # scalar, twice differentiable
TOLERANCE = 1e-3  # of the residuals of eigenpairs


def flat(parameters: Parameters) -> Tensor:
    """All values in one vector."""
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def shaped(vector: Tensor, like: Parameters) -> Parameters:
    """The inverse of ``flat``."""
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def hessian_product(losses: Sequence[Loss], at: Parameters) -> Callable[[Tensor], Tensor]:
    """The function v -> H v, where H is the Hessian of the sum of ``losses``; one graph is held at a time."""
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    inputs = list(leaves.values())

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for loss in losses:
            gradient = torch.autograd.grad(loss(leaves), inputs, create_graph=True, materialize_grads=True)
            slope = flat(dict(zip(leaves, gradient, strict=True))) @ vector
            rows = torch.autograd.grad(slope, inputs, materialize_grads=True)
            total += flat(dict(zip(leaves, rows, strict=True)))
        return total

    return product


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues and eigenvectors of a symmetric matrix, the largest eigenvalue first.

    Attributes:
        values: [k].
        vectors: [k, size], orthonormal rows.
        residuals: [k], |H v - value v|.
        steps: number of matrix-vector products used.
        is_converged: whether all residuals are within the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    steps: int
    is_converged: bool


def top_eigenpairs(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    max_steps: int,
    tolerance: float = TOLERANCE,
    generator: Generator,
) -> Eigenpairs:
    """The ``k`` algebraically largest eigenvalues and their vectors, by Lanczos with full reorthogonalisation.

    One start vector sees one direction of each eigenspace, so copies of an exactly repeated eigenvalue may be missed.
    Memory: one vector per step.

    Args:
        product: v -> H v, where H is symmetric.
        start: a random vector; its size and dtype are those of all others.
        k: in [1, size].
        max_steps: at least k; the maximum number of products.
        tolerance: allowed residual, as a fraction of the eigenvalue that is largest in magnitude.
        generator: generates new directions if the ones found so far are closed under H.
    """
    size, eps = start.numel(), torch.finfo(start.dtype).eps
    if not 1 <= k <= size:
        raise ValueError(f"the number of eigenvectors must be in [1, {size:,}], the number of parameters, got {k}")
    limit = min(size, max(k, max_steps))
    basis = start.new_empty(limit, size)
    T = torch.zeros(limit + 1, limit + 1, dtype=torch.float64)  # H in the basis: tridiagonal
    basis[0] = start / start.norm()
    for m in range(1, limit + 1):
        found = basis[:m]
        rest = product(found[-1])
        T[m - 1, m - 1] = found[-1] @ rest
        rest = _orthogonal(rest, found)
        beta = rest.norm()
        ritz, s = torch.linalg.eigh(T[:m, :m])
        scale = ritz.abs().max()
        residuals = float(beta) * s[-1].abs()
        is_converged = m >= k and bool((residuals[-k:] <= tolerance * scale).all())
        if is_converged or m == limit:
            break
        if beta <= 100 * eps * scale:
            rest = _orthogonal(torch.randn(size, dtype=start.dtype, generator=generator), found)
        else:
            T[m, m - 1] = T[m - 1, m] = beta
        basis[m] = rest / rest.norm()
    top = torch.arange(m - 1, m - 1 - k, -1)
    vectors = s[:, top].T.to(start.dtype) @ basis[:m]
    vectors /= vectors.norm(dim=1, keepdim=True)
    return Eigenpairs(ritz[top], vectors, residuals[top], m, is_converged)


def _orthogonal(vector: Tensor, rows: Tensor) -> Tensor:
    for _ in range(2):  # once is not enough where little is left
        vector = vector - rows.T @ (rows @ vector)
    return vector


def coordinates(direction: Tensor, vectors: Tensor) -> Tensor:
    """The coordinates of the unit vector along ``direction`` in the orthonormal rows of ``vectors``."""
    inside: Tensor = vectors @ (direction / direction.norm())
    return inside


def pruned_like(a: Parameters, b: Parameters, score: Callable[[Tensor], Tensor]) -> Parameters:
    """``a`` with as many zeros in each tensor as ``b`` has, at the places with the lowest score."""
    pruned = {}
    for name, value in a.items():
        cut = score(value).reshape(-1).argsort(stable=True)[: int((b[name] == 0).sum())]
        pruned[name] = value.reshape(-1).index_fill(0, cut, 0).view(value.shape)
    return pruned
