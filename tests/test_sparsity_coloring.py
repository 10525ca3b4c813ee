"""Colourings separate every entry, are reproducible, and need no more colours than scipy's grouping."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize._numdiff import group_columns

from jacops.sparse import _coloring
from jacops.sparse._coloring import Coloring, color, greedy, group, reading


def is_valid(matrix: sp.csr_array, coloring: Coloring) -> bool:
    """Say, from the definition, whether every entry stands alone in some sweep."""
    dense = matrix.toarray()
    for i, j in zip(*dense.nonzero(), strict=True):
        same_rows = (coloring.rows == coloring.rows[i]) & dense[:, j]
        same_columns = (coloring.columns == coloring.columns[j]) & dense[i]
        pulled = coloring.rows[i] >= 0 and same_rows.sum() == 1
        pushed = coloring.columns[j] >= 0 and same_columns.sum() == 1
        mirror = coloring.symmetric and coloring.rows[j] >= 0
        mirrored = mirror and ((coloring.rows == coloring.rows[j]) & dense[:, i]).sum() == 1
        if not (pulled or pushed or mirrored):
            return False
    return True


def band(n: int, width: int) -> sp.csr_array:
    offsets = range(-width, width + 1)
    return sp.csr_array(sp.diags_array([np.ones(n - abs(k)) for k in offsets], offsets=list(offsets)).astype(bool))


def arrow(n: int, dense: int = 1) -> sp.csr_array:
    matrix = sp.lil_array((n, n), dtype=bool)
    matrix.setdiag(True)
    matrix[:dense] = True
    matrix[:, :dense] = True
    return sp.csr_array(matrix)


def grid(n: int) -> sp.csr_array:
    return sp.csr_array(sp.kronsum(band(n, 1).astype(float), band(n, 1).astype(float)).astype(bool))


def blocks(many: int, rows: int, columns: int, shared: int = 0) -> sp.csr_array:
    parts = [sp.kron(sp.eye_array(many), np.ones((rows, columns))), np.ones((rows * many, shared))]
    return sp.csr_array(sp.hstack(parts).astype(bool))


BENCHMARKS = {
    "banded": (band(2000, 2), 5),
    "arrowhead": (arrow(2000), 3),
    "arrow with two heads": (arrow(300, 2), 5),
    "five-point grid": (grid(30), 9),
    "lifted bundle with shared parameters": (blocks(500, 2, 12, 4), 6),
    "diagonal": (band(50, 0), 1),
    "dense": (sp.csr_array(np.ones((7, 5), bool)), 7),
    "empty": (sp.csr_array((4, 6), dtype=bool), 0),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_patterns(name: str) -> None:
    matrix, most = BENCHMARKS[name]
    found = color(matrix)
    if not matrix.nnz:
        assert found is None or found.pulls + found.pushes == 0
        return
    assert found.pulls + found.pushes <= most
    rows, columns = (a.astype(np.int64) for a in matrix.nonzero())
    assert reading(rows, columns, found) is not None
    if matrix.shape[0] <= 500:
        assert is_valid(matrix, found)
    ours = group(matrix).max()
    assert ours <= group_columns(sp.csr_array(matrix.T)).max()
    assert ours == group(matrix.copy()).max()
    star = color(matrix, symmetric=True) if matrix.shape[0] == matrix.shape[1] else None
    assert star is None or star.cost <= found.cost


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0.05, 0.6), st.integers(0, 99), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=150, database=None)
def test_colourings_are_valid_and_repeatable(m: int, n: int, density: float, seed: int, symmetric: bool) -> None:
    dense = np.random.default_rng(seed).random((m, m if symmetric else n)) < density
    matrix = sp.csr_array(dense | dense.T if symmetric else dense)
    found = color(matrix, symmetric=symmetric)
    if not matrix.nnz:
        return
    assert is_valid(matrix, found)
    rows, columns = (a.astype(np.int64) for a in matrix.nonzero())
    assert reading(rows, columns, found) is not None
    again = color(matrix.copy(), symmetric=symmetric)
    assert (again.rows == found.rows).all()
    assert (again.columns == found.columns).all()
    lone = Coloring(np.zeros(m, np.int64), np.full(matrix.shape[1], -1))
    assert (reading(rows, columns, lone) is not None) == is_valid(matrix, lone)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 0.6), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
def test_our_own_grouping_is_as_good_as_the_one_it_stands_in_for(m: int, n: int, density: float, seed: int) -> None:
    matrix = sp.csr_array(np.random.default_rng(seed).random((m, n)) < density)
    ours = greedy(matrix, np.arange(m))
    assert is_valid(matrix, Coloring(ours, np.full(n, -1)))
    assert ours.max() <= group_columns(sp.csr_array(matrix.T), order=np.arange(m)).max()


def test_without_scipys_private_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("scipy.optimize._numdiff.group_columns")
    assert _coloring._grouper() is greedy
    assert group(band(60, 2)).max() + 1 == 5
