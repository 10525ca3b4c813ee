r"""The normal matrix $J^\top J$ of a Jacobian in dense blocks: its pattern once, its entries at every point."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..sparse._matrix import csc
from ._fronts import Graph
from ._multifrontal import FrontalAnalysis
from ._row_blocks import DenseBlocks, RowBlocks, spread

_CHUNK = 2**22  # entries of products that are made at once, 32 MiB


@dataclass(frozen=True, eq=False)
class NormalPattern:
    """The lower triangle by columns of units: in each, the square of the unit itself, and below it other units.

    Attributes:
        blocks: The Jacobian.
        ends: Where the units of each unit's column end, as CSC column pointers of units.
        units: They, rising; the first one is the unit itself.
    """

    blocks: RowBlocks
    ends: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, blocks: RowBlocks) -> NormalPattern:
        """Return the pattern for a Jacobian."""
        many = len(blocks.widths)
        diagonal = np.arange(many) * (many + 1)
        pairs = [np.unique(_pairs(kind.units, many)) for kind in blocks.kinds]
        keys = np.unique(np.concatenate([diagonal, *pairs]))
        return cls(blocks, np.searchsorted(keys, np.arange(many + 1) * many), keys % many)

    @property
    def widths(self) -> np.ndarray:
        """Columns of each unit."""
        return self.blocks.widths

    # ---- where entries are ---------------------------------------------------------------------------------------

    @cached_property
    def starts(self) -> np.ndarray:
        """The first column of each unit."""
        return np.cumsum(self.widths) - self.widths

    @cached_property
    def _above(self) -> np.ndarray:
        """Entries above each unit in its column, (len(units),)."""
        sizes = self.widths[self.units]
        total = np.cumsum(sizes) - sizes
        return total - np.repeat(total[self.ends[:-1]], np.diff(self.ends))

    @cached_property
    def heights(self) -> np.ndarray:
        """Entries in each column of a unit."""
        return np.add.reduceat(self.widths[self.units], self.ends[:-1])

    @cached_property
    def first(self) -> np.ndarray:
        """Where the entries of each unit's columns begin."""
        sizes = self.heights * self.widths
        return np.cumsum(sizes) - sizes

    @cached_property
    def analysis(self) -> FrontalAnalysis:
        """What a Cholesky factorisation needs to know."""
        return FrontalAnalysis.of(Graph(self.widths, self.ends, self.units), self.rows, self.cols)

    @property
    def size(self) -> int:
        """Stored entries."""
        return int((self.heights * self.widths).sum())

    @cached_property
    def diagonal(self) -> np.ndarray:
        """Where the diagonal is."""
        return self._columns + self._inside

    @cached_property
    def _inside(self) -> np.ndarray:
        return spread(np.zeros(len(self.widths), np.int64), self.widths)

    @cached_property
    def _columns(self) -> np.ndarray:
        """Where each column begins."""
        return np.repeat(self.first, self.widths) + self._inside * np.repeat(self.heights, self.widths)

    @cached_property
    def rows(self) -> np.ndarray:
        """Row of each stored entry."""
        column = spread(self.starts[self.units], self.widths[self.units])  # of a unit, once
        ends = np.cumsum(self.heights)
        return column[spread(np.repeat(ends - self.heights, self.widths), np.repeat(self.heights, self.widths))]

    @cached_property
    def cols(self) -> np.ndarray:
        """Column of each stored entry."""
        return np.repeat(np.arange(int(self.widths.sum())), np.repeat(self.heights, self.widths))

    def full(self, data: np.ndarray) -> Any:
        """Return the whole matrix, by columns."""
        rows, cols, places = self._both
        return csc((data[places], rows, cols))

    @cached_property
    def _both(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, column pointers and places of the stored entries and of those above the diagonal."""
        kept = np.flatnonzero(self.rows >= self.cols)
        mirrored = np.flatnonzero(self.rows > self.cols)
        rows, cols = np.r_[self.rows[kept], self.cols[mirrored]], np.r_[self.cols[kept], self.rows[mirrored]]
        order = np.lexsort((rows, cols))
        size = int(self.widths.sum())
        ends = np.searchsorted(cols[order], np.arange(size + 1)).astype(np.int32)
        return rows[order].astype(np.int32), ends, np.r_[kept, mirrored][order]

    # ---- entries -------------------------------------------------------------------------------------------------

    def product(self, data: np.ndarray) -> np.ndarray:
        """Return the stored entries for those of the Jacobian."""
        total = np.zeros(self.size + 1)
        for kind, places in zip(self.blocks.kinds, self._places, strict=True):
            blocks = kind.of(data)
            step = max(1, _CHUNK // max(1, kind.width**2))
            for start in range(0, len(kind.rows), step):
                own = blocks[start : start + step]
                found = np.matmul(own.swapaxes(1, 2), own)
                at = places[start : start + step].reshape(-1)
                total += np.bincount(at, found.reshape(-1), minlength=len(total))
        return total[:-1]

    @cached_property
    def _places(self) -> list[np.ndarray]:
        return [self._places_in(kind) for kind in self.blocks.kinds]

    def _places_in(self, kind: DenseBlocks) -> np.ndarray:
        """Return where the entries of `B.T @ B` of every block go, `(g, c, c)`; the last place takes the upper ones."""
        many, widths = len(self.widths), self.widths[kind.units[0]]
        slot = np.repeat(np.arange(len(widths)), widths)
        inside = spread(np.zeros(len(widths), np.int64), widths)
        keys = np.repeat(np.arange(many), np.diff(self.ends)) * many + self.units
        a, b = np.tril_indices(len(widths))
        found = np.searchsorted(keys, kind.units[:, b] * many + kind.units[:, a])
        above = np.zeros((len(kind.rows), len(widths), len(widths)), np.int64)
        above[:, a, b] = self._above[found]
        column = self.first[kind.units][:, slot] + inside * self.heights[kind.units][:, slot]
        places = column[:, None, :] + above[:, slot][:, :, slot] + inside[:, None]
        return np.where(slot[:, None] >= slot, places, self.size).astype(np.int32 if self.size < 2**31 else np.int64)


def _pairs(units: np.ndarray, many: int) -> np.ndarray:
    """Return a number for each pair of units that one block depends on, by columns of the lower triangle."""
    a, b = np.tril_indices(units.shape[1])
    return (units[:, b] * many + units[:, a]).reshape(-1)
