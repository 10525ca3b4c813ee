r"""The normal matrix $J^\top J$ of a Jacobian in dense blocks: its pattern once, its entries at every point."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..sparse._matrix import csc
from ..sparse._pool import distinct
from ._fronts import Graph
from ._multifrontal import FrontalAnalysis
from ._row_blocks import DenseBlocks, RowBlocks, spread
from ._squares import Squares


@dataclass(frozen=True, eq=False)
class NormalPattern:
    """The lower triangle by columns of units: in each, the square of the unit itself, and below it other units.

    Attributes:
        blocks: The Jacobian.
        graph: Which units meet, and how their entries are stored.
        found: What was found of matrices with this pattern: `"singular"` where one without damping was.
        kept: What packages whose solvers were used keep for it.
    """

    blocks: RowBlocks
    graph: Graph
    found: set[str] = field(default_factory=set)
    kept: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, blocks: RowBlocks) -> NormalPattern:
        """Return the pattern for a Jacobian."""
        many = len(blocks.widths)
        diagonal = np.arange(many) * (many + 1)
        keys = distinct(np.concatenate([diagonal, *(_pairs(kind.units, many) for kind in blocks.kinds)]))
        return cls(blocks, Graph(blocks.widths, np.searchsorted(keys, np.arange(many + 1) * many), keys % many))

    # ---- where entries are ---------------------------------------------------------------------------------------

    @cached_property
    def analysis(self) -> FrontalAnalysis:
        """What a Cholesky factorisation needs."""
        return FrontalAnalysis.of(self.graph)

    @cached_property
    def diagonal(self) -> np.ndarray:
        """Where the diagonal is."""
        return self._starts + self._inside

    @cached_property
    def _inside(self) -> np.ndarray:
        return spread(np.zeros(len(self.graph.widths), np.int64), self.graph.widths)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each column begins."""
        graph = self.graph
        return np.repeat(graph.first, graph.widths) + self._inside * np.repeat(graph.heights, graph.widths)

    @cached_property
    def rows(self) -> np.ndarray:
        """Row of each stored entry."""
        graph = self.graph
        column = spread(graph.starts[graph.units], graph.widths[graph.units]).astype(np.int32)  # of a unit, once
        ends = np.cumsum(graph.heights)
        return column[spread(np.repeat(ends - graph.heights, graph.widths), np.repeat(graph.heights, graph.widths))]

    @cached_property
    def cols(self) -> np.ndarray:
        """Column of each stored entry."""
        widths = self.graph.widths
        return np.repeat(np.arange(int(widths.sum()), dtype=np.int32), np.repeat(self.graph.heights, widths))

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
        size = int(self.graph.widths.sum())
        ends = np.searchsorted(cols[order], np.arange(size + 1)).astype(np.int32)
        return rows[order].astype(np.int32), ends, np.r_[kept, mirrored][order]

    # ---- entries -------------------------------------------------------------------------------------------------

    def product(self, data: np.ndarray) -> np.ndarray:
        """Return the stored entries for those of the Jacobian."""
        total = np.zeros(self.graph.size)
        for kind, squares in zip(self.blocks.kinds, self._squares, strict=True):
            blocks = kind.of(data)
            for which in squares.chunks():
                squares.add(which, blocks[which], total)
        return total

    @cached_property
    def _squares(self) -> list[Squares]:
        return [self._squares_of(kind) for kind in self.blocks.kinds]

    def _squares_of(self, kind: DenseBlocks) -> Squares:
        """Return where the entries of `B.T @ B` of every block go."""
        graph, many, widths = self.graph, len(self.graph.widths), self.graph.widths[kind.units[0]]
        keys, places = graph.columns * many + graph.units, []
        for unit, column in enumerate(kind.units.T):
            found = np.searchsorted(keys, column[:, None] * many + kind.units[:, unit:])
            places.append((graph.first[column][:, None] + graph.above[found]).astype(graph.numbers))
        return Squares(tuple(widths.tolist()), tuple(places), graph.heights[kind.units].astype(graph.numbers))


def _pairs(units: np.ndarray, many: int) -> np.ndarray:
    """Return a number for each pair of units that one block depends on, by columns of the lower triangle."""
    a, b = np.tril_indices(units.shape[1])
    return (units[:, b] * many + units[:, a]).reshape(-1)
