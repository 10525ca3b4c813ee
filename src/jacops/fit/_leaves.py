"""Fronts without children that are alike, worked with at once: points of a bundle adjustment, and what else there is.

What they leave is added to the factor's entries where it belongs, so that eliminating all of them leaves the Schur
complement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ._fronts import Fronts
from ._squares import Squares


@dataclass(frozen=True, eq=False)
class Leaves:
    """A batch of fronts.

    Attributes:
        wide: Own columns of each.
        entries: Where their entries are among those of the factor.
        columns: Own columns of each, in the order of elimination, (fronts, wide).
        rows: Rows below them, (fronts, high).
        squares: Where the products of the rows below go.
    """

    wide: int
    entries: slice
    columns: np.ndarray
    rows: np.ndarray
    squares: Squares

    @classmethod
    def of(cls, fronts: Fronts, batch: np.ndarray) -> Leaves:
        """Return a batch of fronts, given their numbers."""
        wide, high = int(fronts.wide[batch[0]]), int(fronts.high[batch[0]])
        first, number = int(fronts.starts[batch[0]]), np.int32 if fronts.size < 2**31 else np.int64
        counts = int(np.diff(fronts.below_ends)[batch[0]])
        units = fronts.below[fronts.below_ends[batch][:, None] + np.arange(counts)]
        places, steps = [], np.empty(units.shape, number)
        for unit, column in enumerate(units.T):
            rows = units[:, unit:]
            to, size = fronts.meeting(np.repeat(column, rows.shape[1]), rows.reshape(-1))
            places.append(to.reshape(rows.shape).astype(number))
            steps[:, unit] = size.reshape(rows.shape)[:, 0]
        squares = Squares(tuple(fronts.width[units[0]].tolist()), tuple(places), steps)
        columns = (fronts.columns[batch][:, None] + np.arange(wide)).astype(np.int32)
        rows = (fronts.ends[batch][:, None] + np.arange(high)).astype(np.int32)
        return cls(wide, slice(first, first + len(batch) * wide * (wide + high)), columns, fronts.rows[rows], squares)

    def _panels(self, L: np.ndarray) -> np.ndarray:
        """Return the entries of each front by columns, (fronts, wide, wide + high)."""
        return L[self.entries].reshape(len(self.columns), self.wide, -1)

    def factorise(self, L: np.ndarray) -> bool:
        """Eliminate the own columns in place; return whether they are positive definite."""
        panels = self._panels(L)
        for which in self.squares.chunks():
            own = panels[which]
            for j in range(self.wide):
                pivots = own[:, j, j, None]
                if not (pivots > 0).all():
                    return False
                own[:, j, j:] /= np.sqrt(pivots)
                for k in range(j + 1, self.wide):
                    own[:, k, k:] -= own[:, j, k, None] * own[:, j, k:]
            self.squares.add(which, own[:, :, self.wide :], L, np.subtract)
        return True

    def forward(self, L: np.ndarray, x: np.ndarray) -> None:
        """Solve with the factor in place, for columns `(n, k)` in the order of elimination."""
        for which, panels in self._chunks(L):
            own, below = x[self.columns[which]], self.rows[which].reshape(-1)
            for j in range(self.wide):
                own[:, j] /= panels[:, j, j, None]
                own[:, j + 1 :] -= panels[:, j, j + 1 : self.wide, None] * own[:, j, None]
            x[self.columns[which]] = own
            left = np.matmul(panels[:, :, self.wide :].swapaxes(1, 2), own).reshape(len(below), x.shape[1])
            for k in range(x.shape[1]):
                x[:, k] -= np.bincount(below, left[:, k], minlength=len(x))

    def backward(self, L: np.ndarray, x: np.ndarray) -> None:
        """Solve with the transpose of the factor."""
        for which, panels in self._chunks(L):
            own = x[self.columns[which]] - np.matmul(panels[:, :, self.wide :], x[self.rows[which]])
            for j in reversed(range(self.wide)):
                later = panels[:, j, j + 1 : self.wide, None] * own[:, j + 1 :]
                own[:, j] = (own[:, j] - later.sum(1)) / panels[:, j, j, None]
            x[self.columns[which]] = own

    def invert(self, L: np.ndarray, Z: np.ndarray, which: np.ndarray) -> None:
        """Put the entries of the inverse where the factor has its own, for some of the fronts; those above are there.

        Args:
            L: Entries of the factor.
            Z: Entries of the inverse.
            which: Which of the fronts.
        """
        panels, found, wide = self._panels(L), self._panels(Z), self.wide
        for own in self.squares.split(which):
            columns = panels[own]
            inverse = np.linalg.inv(np.triu(columns[:, :, :wide])).swapaxes(1, 2)  # of the lower triangles
            W = np.matmul(columns[:, :, wide:].swapaxes(1, 2), inverse)
            below = -np.matmul(self.squares.whole(own, Z), W)
            square = np.matmul(inverse.swapaxes(1, 2), inverse) - np.matmul(W.swapaxes(1, 2), below)
            found[own] = np.concatenate([square, below], 1).swapaxes(1, 2)

    def _chunks(self, L: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        panels = self._panels(L)
        return ((which, panels[which]) for which in self.squares.chunks())
