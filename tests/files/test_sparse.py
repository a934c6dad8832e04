"""Sparse tensors without torch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pomona.files.sparse import Sparse

fast = settings(deadline=None)


@fast
@given(
    arrays(
        np.float32, array_shapes(min_dims=0, max_dims=4, min_side=0), elements=st.sampled_from([0.0, -0.0, 1.5, -2.0])
    )
)
def test_what_is_stored_makes_the_same_array_again(array: np.ndarray) -> None:
    sparse = Sparse.from_dense(array)
    assert sparse.dense().tobytes() == array.tobytes() and sparse.dense().shape == array.shape
    assert sparse.size == array.size


def test_minus_zero_is_stored_and_zero_is_not() -> None:
    assert Sparse.from_dense(np.array([0.0, -0.0, 0.0], np.float32)).positions.tolist() == [1]


def test_complex_numbers_are_zero_if_both_parts_are() -> None:
    assert Sparse.from_dense(np.array([0, 1j, 0, 2], np.complex64)).positions.tolist() == [1, 3]


@fast
@given(arrays(np.int8, array_shapes(min_dims=2, max_dims=4), elements=st.integers(0, 1)))
def test_csr_is_that_of_scipy(array: np.ndarray) -> None:
    from scipy.sparse import csr_array

    starts, columns = Sparse.from_dense(array).csr(array.shape[0])
    wanted = csr_array(array.reshape(array.shape[0], -1))
    assert starts.dtype == np.int64 and columns.dtype == np.int32
    assert starts.tolist() == wanted.indptr.tolist() and columns.tolist() == wanted.indices.tolist()


def test_csr_of_nothing() -> None:
    starts, columns = Sparse.from_dense(np.zeros((3, 0), np.float32)).csr(3)
    assert starts.tolist() == [0, 0, 0, 0] and columns.tolist() == []
    starts, _ = Sparse.from_dense(np.zeros((0, 3), np.float32)).csr(0)
    assert starts.tolist() == [0]


def test_csr_refuses_rows_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="no 4 rows of equal length"):
        Sparse.from_dense(np.ones((3, 5), np.float32)).csr(4)


def test_csr_refuses_columns_beyond_int32() -> None:
    with pytest.raises(ValueError, match="do not fit into int32"):
        Sparse((2, 2**32), np.array([5]), np.array([1.0])).csr(2)
