r"""Sparse Cholesky factors $L L^\top$ of a normal matrix by dense fronts; the analysis is kept, values change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._runtime.blas import one_blas_thread
from ..sparse._matrix import blas, lapack
from ._fronts import Fronts, Graph
from ._leaves import Leaves

_LEAF = 96  # columns of subtrees that make one front: 48 to 128 took the same time on graphs of 1,000 to 10,000 poses
_BATCH = 8  # equal fronts without children that are worked with at once
_LEAF_COMPILED = 24  # where a front costs no Python


@dataclass(frozen=True, eq=False)
class FrontalAnalysis:
    """What a factorisation needs of a pattern.

    Attributes:
        fronts: The dense blocks.
        places: Where the stored entries of the normal matrix go.
        leaves: Fronts that are worked with at once.
        compiled: The loops compiled, None where numba is not installed.
    """

    fronts: Fronts
    places: np.ndarray
    leaves: tuple[Leaves, ...]
    compiled: Any

    @classmethod
    def of(cls, graph: Graph) -> FrontalAnalysis:
        """Return the analysis of a symmetric matrix."""
        try:
            from ._compiled import Loops
        except ImportError:
            Loops = None  # noqa: N806
        if Loops is None:
            fronts = Fronts.of(graph, _LEAF, _BATCH)
            compiled, leaves = None, tuple(Leaves.of(fronts, batch) for batch in fronts.batches)
        else:
            fronts = Fronts.of(graph, _LEAF_COMPILED)
            compiled, leaves = Loops(fronts, fronts.children), ()
        return cls(fronts, fronts.scattered(), leaves, compiled)

    @property
    def description(self) -> str:
        """What is eliminated how, in a phrase."""
        fronts = self.fronts
        single = np.diff(fronts.firsts) == 1
        single &= np.bincount(fronts.parent + 1, minlength=fronts.count + 1)[1:] == 0  # nothing is left to them
        blocks = fronts.wide[single]
        if 2 * blocks.sum() <= fronts.columns[-1]:
            blocks, single = blocks[:0], np.zeros_like(single)
        rest, most = int((~single).sum()), int((fronts.wide + fronts.high)[~single].max(initial=0))
        others = f"{rest:,} dense front{_s(rest)} of up to {most:,} rows, ordered by minimum degree"
        if not len(blocks):
            return others
        counted = zip(*(found.tolist() for found in np.unique(blocks, return_counts=True)), strict=True)
        parts = [f"{many:,} block{_s(many)} of {wide} column{_s(wide)}" for wide, many in counted]
        return f"{' and '.join(parts)} eliminated first (Schur complement)" + (f", then {others}" if rest else "")

    def factorised(self, entries: np.ndarray) -> FrontalCholesky:
        """Return the factors of a matrix with these entries.

        Raises:
            LinAlgError: It is not positive definite.
        """
        L = np.zeros(self.fronts.size)
        L[self.places] = entries
        with one_blas_thread():
            definite = self._by_fronts(L) if self.compiled is None else self.compiled.factorised(L)
        if not definite:
            raise np.linalg.LinAlgError("the matrix is not positive definite")
        return FrontalCholesky(self.fronts, L, self.leaves, self.compiled)

    def _by_fronts(self, L: np.ndarray) -> bool:
        """Factorise in place, from the entries of the matrix; return whether it is positive definite."""
        if not all(leaves.factorise(L) for leaves in self.leaves):
            return False
        left: dict[int, np.ndarray] = {}
        inside, ends = self.fronts.inside, self.fronts.ends.tolist()
        for front, panel, own in self.fronts.panels(L):
            rest = None
            if self.fronts.children[front]:
                whole = np.zeros((len(panel), len(panel)), order="F")
                whole[:, :own] = panel
                flat = whole.T.reshape(-1)
                for child in self.fronts.children[front]:
                    at = inside[ends[child] : ends[child + 1]]
                    flat[(at[:, None] * len(panel) + at).reshape(-1)] += left.pop(child).T.reshape(-1)
                panel[:], rest = whole[:, :own], np.asfortranarray(whole[own:, own:])
            diagonal, failed = lapack.dpotrf(panel[:own], lower=1, clean=0)
            if failed:
                return False
            panel[:own] = diagonal
            if len(panel) > own:
                panel[own:] = rows = blas.dtrsm(1.0, diagonal, panel[own:], side=1, lower=1, trans_a=1)
                more = {} if rest is None else {"beta": 1.0, "c": rest, "overwrite_c": 1}
                left[front] = blas.dsyrk(-1.0, rows, lower=1, **more)
        return True


def _s(many: int) -> str:
    return "s" * (many != 1)


@dataclass(frozen=True, eq=False)
class FrontalCholesky:
    """The factors of a matrix.

    Attributes:
        fronts: Where their entries are.
        entries: They, front by front, by columns.
        leaves: Fronts that are worked with at once.
        compiled: The loops compiled.
    """

    fronts: Fronts
    entries: np.ndarray
    leaves: tuple[Leaves, ...]
    compiled: Any

    @property
    def pivots(self) -> np.ndarray:
        """The squared diagonal of the factor."""
        fronts = self.fronts
        inside = np.arange(int(fronts.columns[-1])) - np.repeat(fronts.columns[:-1], fronts.wide)
        at = np.repeat(fronts.starts, fronts.wide) + inside * np.repeat(fronts.wide + fronts.high + 1, fronts.wide)
        return np.square(self.entries[at])

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Return the solution for right-hand sides `(n,)` or `(n, k)`."""
        x = np.array(right[self.fronts.eliminated], np.float64)
        if self.compiled is not None and x.ndim == 1:
            self.compiled.solved(self.entries, x)
        else:
            with one_blas_thread():
                self._solve(x if x.ndim > 1 else x[:, None])
        result = np.empty_like(x)
        result[self.fronts.eliminated] = x
        return result

    def _solve(self, x: np.ndarray) -> None:
        """Solve in place for columns in the order of elimination."""
        columns, ends, rows = self.fronts.columns.tolist(), self.fronts.ends.tolist(), self.fronts.rows
        L = self.entries
        fronts = [
            (panel[:wide], panel[wide:], slice(columns[f], columns[f + 1]), rows[ends[f] : ends[f + 1]])
            for f, panel, wide in self.fronts.panels(L)
        ]
        for leaves in self.leaves:
            leaves.forward(L, x)
        for diagonal, below, own, at in fronts:
            x[own] = lapack.dtrtrs(diagonal, x[own], lower=1)[0]
            if len(at):
                x[at] -= below @ x[own]
        for diagonal, below, own, at in reversed(fronts):
            right = x[own] - below.T @ x[at] if len(at) else x[own]
            x[own] = lapack.dtrtrs(diagonal, right, lower=1, trans=1)[0]
        for leaves in self.leaves:
            leaves.backward(L, x)
