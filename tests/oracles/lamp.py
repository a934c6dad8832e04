"""LAMP, rewritten in numpy: the slow and obvious version of arXiv 2010.07611, equation 4."""

import numpy as np

from tests.oracles.masks import Array


def lamp(layer: Array) -> Array:
    """Each squared weight over the sum of the squares of those that are not smaller; of equal ones the first leads."""
    w = np.ravel(layer).astype(np.float64)
    scores = np.zeros(len(w))
    for u in range(len(w)):
        not_smaller = [v for v in range(len(w)) if abs(w[v]) > abs(w[u]) or (abs(w[v]) == abs(w[u]) and v <= u)]
        if w[u]:
            scores[u] = w[u] ** 2 / np.square(w[not_smaller]).sum()
    return scores.reshape(np.shape(layer))


def block_norms(layer: Array, rows: int, columns: int) -> Array:
    """Root mean squares of the blocks of a matrix."""
    down, across = layer.shape[0] // rows, layer.shape[1] // columns
    squares = np.square(layer.astype(np.float64)).reshape(down, rows, across, columns)
    return np.sqrt(squares.mean((1, 3)))
