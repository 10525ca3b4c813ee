"""Sparse matrices made of dense blocks: rows that belong together times the units of columns they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..sparse._matrix import Csr, csr

_RUNS = 64  # ranges that are copied one by one; more of them are gathered entry by entry


def spread(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the ranges `start, ..., start + count - 1`, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(int(ends[-1]) if len(ends) else 0)


def classes(columns: Iterable[np.ndarray], many: int) -> list[np.ndarray]:
    """Return the numbers of rows that agree in all columns, each an array of `many` whole numbers."""
    label = np.zeros(many, np.int64)
    for column in columns:
        least, most = (int(column.min()), int(column.max())) if many else (0, 0)
        if least < most:
            label = np.unique(label * (most - least + 1) + (column - least), return_inverse=True)[1].reshape(-1)
    order = np.argsort(label, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(label[order])) + 1) if many else []


class Stack(NamedTuple):
    """DenseBlocks one below the other.

    Attributes:
        heights: Rows of each.
        ends: Where the units of each end, as CSR row pointers.
        units: They, rising in each block.
        labels: A number for each; blocks of one kind agree in it.
    """

    heights: np.ndarray
    ends: np.ndarray
    units: np.ndarray
    labels: np.ndarray

    def merged(self) -> Stack:
        """Return blocks in which neighbours of height one with the same units and label are put together."""
        heights, ends, units, labels = self
        counts = np.diff(ends)
        as_before = np.zeros(len(heights), bool)
        single = (heights[1:] == 1) & (heights[:-1] == 1) & (labels[1:] == labels[:-1])
        as_before[1:] = single & (counts[1:] == counts[:-1]) & (counts[1:] > 0)
        candidates = np.flatnonzero(as_before)
        if not len(candidates):
            return self
        own, before = (spread(ends[candidates - shift], counts[candidates]) for shift in (0, 1))
        firsts = np.cumsum(counts[candidates]) - counts[candidates]
        as_before[candidates] = np.logical_and.reduceat(units[own] == units[before], firsts)
        leads = np.flatnonzero(~as_before)
        kept = counts[leads]
        rows = np.add.reduceat(heights, leads)
        return Stack(rows, np.r_[0, np.cumsum(kept)], units[spread(ends[leads], kept)], labels[leads])

    def kinds(self, alike: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the numbers of blocks that agree in height, label, and `alike` of their units."""
        counts = np.diff(self.ends)
        for own in classes((self.heights, counts, self.labels), len(counts)):
            units = self.units[self.ends[own][:, None] + np.arange(int(counts[own[0]]))]
            for same in classes(alike[units].T, len(own)):
                yield own[same]


@dataclass(frozen=True, eq=False)
class DenseBlocks:
    """DenseBlocks of one kind.

    Attributes:
        label: What they have in common.
        height: Rows of each.
        rows: First row of each, (g,).
        units: Units that each depends on, rising, (g, s).
        width: Columns of these.
        starts: Where the entries of each begin, row by row, (g,).
    """

    label: int
    height: int
    rows: np.ndarray
    units: np.ndarray
    width: int
    starts: np.ndarray

    @cached_property
    def _runs(self) -> list[slice] | np.ndarray:
        """Where the entries are: ranges where these are few, else one place each."""
        size = self.height * self.width
        cuts = np.flatnonzero(np.diff(self.starts) != size) + 1
        if len(cuts) > _RUNS:
            return (self.starts[:, None] + np.arange(size)).reshape(-1)
        firsts, lasts = self.starts[np.r_[0, cuts]], self.starts[np.r_[cuts - 1, len(self.starts) - 1]]
        return [slice(first, last + size) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]

    def of(self, data: np.ndarray) -> np.ndarray:
        """Return the blocks `(g, height, width)` of stored entries; a view where they lie together."""
        runs = self._runs
        if isinstance(runs, np.ndarray):
            found = data[runs]
        else:
            found = data[runs[0]] if len(runs) == 1 else np.concatenate([data[run] for run in runs])
        return found.reshape(-1, self.height, self.width)

    def put(self, blocks: np.ndarray, data: np.ndarray) -> None:
        """Store the entries of the blocks."""
        entries, runs = blocks.reshape(-1), self._runs
        if isinstance(runs, np.ndarray):
            data[runs] = entries
            return
        start = 0
        for run in runs:
            stop = start + run.stop - run.start
            data[run] = entries[start:stop]
            start = stop


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """A sparse pattern by rows, all of whose entries are in dense blocks.

    Attributes:
        shape: Of the matrix.
        ends: CSR row pointers.
        columns: CSR column indices.
        kinds: The blocks, by kind.
        widths: Columns of each unit.
    """

    shape: tuple[int, int]
    ends: np.ndarray
    columns: np.ndarray
    kinds: tuple[DenseBlocks, ...]
    widths: np.ndarray

    @classmethod
    def of(cls, stack: Stack, widths: np.ndarray, alike: np.ndarray) -> RowBlocks:
        """Return the pattern of blocks one below the other.

        Args:
            stack: Their heights and units.
            widths: Columns of each unit; these follow one another.
            alike: A number for each unit; blocks of one kind agree in those of their units.
        """
        heights, ends, units, labels = stack
        starts, counts = np.cumsum(widths) - widths, np.diff(ends)
        wide = np.add.reduceat(np.r_[widths[units], 0], ends[:-1]) * (counts > 0)
        columns = spread(starts[units], widths[units]).astype(np.int32)
        block = np.repeat(np.arange(len(heights)), heights)
        row_ends = np.r_[0, np.cumsum(wide[block])]
        entries = columns[spread((np.cumsum(wide) - wide)[block], wide[block])]
        rows = np.cumsum(heights) - heights
        kinds = []
        for own in stack.kinds(alike):
            if counts[own[0]]:
                slots, first = units[ends[own][:, None] + np.arange(int(counts[own[0]]))], own[0]
                label, height, width = int(labels[first]), int(heights[first]), int(wide[first])
                kinds.append(DenseBlocks(label, height, rows[own], slots, width, row_ends[rows[own]]))
        shape = int(heights.sum()), int(widths.sum())
        return cls(shape, row_ends.astype(np.int32), entries, tuple(kinds), widths)

    @classmethod
    def of_matrix(cls, matrix: Csr) -> RowBlocks:
        """Return the pattern of a matrix with sorted columns, each a unit; rows that are alike go together."""
        ones = np.ones(matrix.shape[0], np.int64)
        stack = Stack(ones, matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), 0 * ones)
        widths = np.ones(matrix.shape[1], np.int64)
        return cls.of(stack.merged(), widths, widths)

    def matrix(self, data: np.ndarray) -> Any:
        """Return the matrix with these entries."""
        return csr((data, self.columns, self.ends), shape=self.shape)
