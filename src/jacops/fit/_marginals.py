r"""Chosen entries of the inverse of a factorised normal matrix, without the others.

Entries on the pattern of the factor follow from the root of the elimination tree down (Takahashi, Fagan and Chen, 1973;
Erisman and Tinney, On computing certain elements of the inverse of a sparse matrix, 1975), front by front:
with own columns F, rows below B, and $W = L_{BF} L_{FF}^{-1}$,

$$Z_{BF} = -Z_{BB} W, \qquad Z_{FF} = (L_{FF} L_{FF}^\top)^{-1} - W^\top Z_{BF}.$$

Only fronts between the wanted ones and the root are visited. Other entries are products of columns of $L^{-1}$, which
are zero outside of their paths to the root.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .._runtime.blas import one_blas_thread
from ..sparse._matrix import blas, lapack
from ._fronts import Fronts
from ._multifrontal import FrontalCholesky

_PAIRS = 128  # pairs off the pattern that are worked with at once, by up to 256 columns of the inverse factor


@dataclass(frozen=True, eq=False)
class SparseInverse:
    """The inverse of a matrix, entry by entry.

    Attributes:
        factor: Its Cholesky factor.
    """

    factor: FrontalCholesky

    @property
    def _fronts(self) -> Fronts:
        return self.factor.fronts

    @cached_property
    def _place(self) -> np.ndarray:
        """When each column of the matrix is eliminated."""
        order = self._fronts.eliminated
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return place

    def entries(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the entries at pairs of rows and columns."""
        a, b = self._place[rows], self._place[columns]
        low, high = np.minimum(a, b), np.maximum(a, b)
        at = _entries(self._fronts, low, high)
        found, inside = np.empty(len(low)), at >= 0
        if inside.any():
            owners = np.searchsorted(self._fronts.columns, low[inside], side="right") - 1
            found[inside] = self._on_pattern(_paths(self._fronts, owners))[at[inside]]
        outside = np.flatnonzero(~inside)
        outside = outside[np.lexsort((high[outside], low[outside]))]
        for start in range(0, len(outside), _PAIRS):
            own = outside[start : start + _PAIRS]
            wanted, index = np.unique(np.r_[low[own], high[own]], return_inverse=True)
            found[own] = self._products(wanted)[index[: len(own)], index[len(own) :]]
        return found

    def joint(self, columns: np.ndarray) -> np.ndarray:
        """Return the rows and columns of the inverse at these positions, which are all different."""
        place = self._place[columns]
        order = np.argsort(place)
        found = np.empty((len(place), len(place)))
        found[np.ix_(order, order)] = self._products(place[order])
        return found

    # ---- on the pattern of the factor --------------------------------------------------------------------------------

    def _on_pattern(self, needed: np.ndarray) -> np.ndarray:
        """Return the entries of the inverse where the factor has its own, for some fronts and those above them."""
        L = self.factor.entries
        Z = L.copy()
        with one_blas_thread():
            if self.factor.compiled is not None:
                self.factor.compiled.inverted(Z, needed)
                return Z
            self._by_fronts(needed, Z)
            for batch, leaves in zip(self._fronts.batches, self.factor.leaves, strict=True):
                leaves.invert(L, Z, np.flatnonzero(needed[batch]))
        return Z

    def _by_fronts(self, needed: np.ndarray, Z: np.ndarray) -> None:
        fronts, L = self._fronts, self.factor.entries
        ends, inside, above = fronts.ends, fronts.inside, {}
        for front in reversed(fronts.single[needed[fronts.single]].tolist()):
            panel, own = _panel(fronts, L, front), int(fronts.wide[front])
            whole = np.empty((len(panel), len(panel)))
            square = lapack.dpotri(panel[:own], lower=1)[0]
            square = np.tril(square) + np.tril(square, -1).T
            if len(panel) > own:
                below = above.pop(front)
                W = blas.dtrsm(1.0, panel[:own], panel[own:], side=1, lower=1)
                whole[own:, own:], whole[own:, :own] = below, -below @ W
                whole[:own, own:] = whole[own:, :own].T
                square -= W.T @ whole[own:, :own]
            whole[:own, :own] = (square + square.T) / 2
            _panel(fronts, Z, front)[:] = whole[:, :own]
            for child in fronts.children[front]:
                if needed[child]:
                    at = inside[ends[child] : ends[child + 1]]
                    above[child] = whole[np.ix_(at, at)]

    # ---- anywhere ----------------------------------------------------------------------------------------------------

    def _products(self, wanted: np.ndarray) -> np.ndarray:
        """Return the rows and columns of the inverse at rising places of the order of elimination."""
        fronts, L = self._fronts, self.factor.entries
        owners = np.searchsorted(fronts.columns, wanted, side="right") - 1
        firsts = np.searchsorted(owners, np.arange(fronts.count + 1)).tolist()
        total = np.zeros((len(wanted), len(wanted)))
        left: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        with one_blas_thread():
            for front in np.flatnonzero(_paths(fronts, owners)).tolist():
                own, panel = np.arange(firsts[front], firsts[front + 1]), _panel(fronts, L, front)
                parts, wide = left.pop(front, []), int(fronts.wide[front])
                active = np.sort(np.concatenate([own, *(columns for _, columns, _ in parts)]))
                x = np.zeros((len(panel), len(active)))
                x[wanted[own] - fronts.columns[front], np.searchsorted(active, own)] = 1.0
                for rows, columns, values in parts:
                    x[np.ix_(rows, np.searchsorted(active, columns))] += values
                solved = lapack.dtrtrs(panel[:wide], x[:wide], lower=1)[0]
                total[np.ix_(active, active)] += solved.T @ solved
                if len(panel) > wide:
                    rows = fronts.inside[fronts.ends[front] : fronts.ends[front + 1]]
                    rest = rows, active, x[wide:] - panel[wide:] @ solved
                    left.setdefault(int(fronts.parent[front]), []).append(rest)
        return total


def _panel(fronts: Fronts, entries: np.ndarray, front: int) -> np.ndarray:
    """Return the entries of one front: own columns and rows below, own columns."""
    start, own = int(fronts.starts[front]), int(fronts.wide[front])
    return entries[start : start + own * (own + int(fronts.high[front]))].reshape(own, -1).T


def _paths(fronts: Fronts, some: np.ndarray) -> np.ndarray:
    """Return which fronts are some of these or above them in the tree."""
    found, some = np.zeros(fronts.count, bool), np.unique(some)
    while len(some):
        found[some] = True
        some = fronts.parent[some]
        some = np.unique(some[(some >= 0) & ~found[some]])
    return found


def _entries(fronts: Fronts, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return where entries of the factor are; -1 for those that it does not have.

    Args:
        fronts: Its fronts.
        low: Places of columns in the order of elimination.
        high: Places of rows, not before them.
    """
    size = int(fronts.columns[-1])
    front = np.searchsorted(fronts.columns, low, side="right") - 1
    keys = np.repeat(np.arange(fronts.count), fronts.high) * size + fronts.rows
    below = np.searchsorted(keys, front * size + high)
    is_own = high < fronts.columns[front + 1]
    is_there = is_own.copy()
    if len(keys):
        is_there |= keys[np.minimum(below, len(keys) - 1)] == front * size + high
    row = np.where(is_own, high - fronts.columns[front], fronts.wide[front] + below - fronts.ends[front])
    at = fronts.starts[front] + (low - fronts.columns[front]) * (fronts.wide + fronts.high)[front] + row
    return np.where(is_there, at, -1)
