"""Jacobians of steps from the entries of a sparse plan, by products of small dense blocks.

The pattern is found once. At each point entries are put into blocks; charts, weights and kernels are then products of
small matrices, and the pattern stays the same although entries may vanish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..sparse._pool import distinct
from ._layout import Layout, ParameterPart
from ._normal import NormalPattern
from ._row_blocks import DenseBlocks, RowBlocks, Stack, spread

_PADDED = 1.5  # factor on the stored entries that whole blocks may cost; else columns are units of their own


@dataclass(frozen=True, eq=False)
class Units:
    """Which unknowns go together: the elements of a chart, rows of a parameter, or single columns.

    Attributes:
        of_stored: For each stored number the unit that it is in, -1 where it is fixed.
        stored: Stored numbers of each unit.
        moved: Free directions of each unit.
        part: Number of the parameter of each unit.
        element: Element of the chart of each unit, -1 without a chart.
    """

    of_stored: np.ndarray
    stored: np.ndarray
    moved: np.ndarray
    part: np.ndarray
    element: np.ndarray

    @property
    def alike(self) -> np.ndarray:
        """A number that units of one kind agree in."""
        return np.where(self.element < 0, -self.stored, self.part)

    @classmethod
    def of(cls, layout: Layout, ends: np.ndarray, columns: np.ndarray) -> Units:
        """Return the units of a layout, for a pattern whose entries are given.

        Args:
            layout: The parameters.
            ends: CSR row pointers.
            columns: Stored number of each entry.
        """
        of_stored, sizes, many, start = [], [], 0, 0
        for number, part in enumerate(layout.parts):
            own = _units_of(part, ends, columns, start)
            _, compact = np.unique(own[own >= 0], return_inverse=True)
            own[own >= 0] = compact + many
            widths = np.bincount(compact)
            moved = np.full(len(widths), part.chart.tangent) if part.chart else widths
            elements = np.unique(part.kept // part.width) if part.chart else np.full(len(widths), -1)
            sizes.append((widths, moved, np.full(len(widths), number), elements))
            of_stored.append(own)
            many, start = many + len(widths), start + part.stored
        return cls(np.concatenate(of_stored), *(np.concatenate(each) for each in zip(*sizes, strict=True)))


def _units_of(part: ParameterPart, ends: np.ndarray, columns: np.ndarray, start: int) -> np.ndarray:
    """Return for each number of a parameter, which is stored from `start` on, a number of its unit, -1 if fixed."""
    if part.chart:
        free = np.zeros(part.lead.numel(), bool)
        free[part.kept // part.width] = True
        return np.where(free, np.arange(len(free)), -1).repeat(part.chart.storage)
    free = np.full(part.columns, -1)
    free[part.kept] = part.kept
    wide = part.preferred_block
    if wide > 1 and not part.group:
        inside = (columns >= start) & (columns < start + part.stored)
        rows = np.repeat(np.arange(len(ends) - 1), np.diff(ends))[inside]
        own = columns[inside].astype(np.int64) - start
        blocks = rows * (part.columns // wide + 1) + own // wide  # rising, as entries are
        padded = wide * (1 + np.count_nonzero(np.diff(blocks)))
        wide = wide if padded <= _PADDED * len(own) else 1
    return np.where(free >= 0, free // wide, -1)


class Runs(NamedTuple):
    """Neighbouring entries of one row in one unit; those of units that are fixed are left out.

    Attributes:
        rows: Row of each.
        units: Unit of each.
        starts: First entry of each.
        counts: Entries of each.
    """

    rows: np.ndarray
    units: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, ends: np.ndarray, units: np.ndarray) -> Runs:
        """Return the runs of entries in CSR order, given the row pointers and the unit of each."""
        fresh = np.ones(len(units) + 1, bool)
        np.not_equal(units[1:], units[:-1], out=fresh[1:-1])
        fresh[ends] = True
        cuts = np.flatnonzero(fresh)
        starts = cuts[:-1]
        held = units[starts] >= 0
        starts, counts = starts[held], np.diff(cuts)[held]
        return cls(np.searchsorted(ends, starts, side="right") - 1, units[starts], starts, counts)


@dataclass(frozen=True, eq=False)
class FitPattern:
    """How the entries of a plan become the Jacobian of a step.

    Attributes:
        stored: DenseBlocks by stored numbers.
        moved: The same blocks by free directions; the same object where there is no chart.
        taken: Which entries of the plan count: those of what is fixed do not; None for all.
        places: Where they go among the stored; None where they are all of these.
        units: The unknowns.
        outputs: For each output its rows, and how many of them one block of weights or of a kernel has.
    """

    stored: RowBlocks
    moved: RowBlocks
    taken: np.ndarray | None
    places: np.ndarray | None
    units: Units
    outputs: Sequence[tuple[int, int]]

    @classmethod
    def of(
        cls, ends: np.ndarray, columns: np.ndarray, layout: Layout, outputs: Sequence[tuple[int, int]]
    ) -> FitPattern:
        """Return the pattern for the entries of a plan.

        Args:
            ends: CSR row pointers of the plan.
            columns: Its column indices, stored numbers.
            layout: The parameters.
            outputs: As the attribute.
        """
        units = Units.of(layout, ends, columns)
        runs = Runs.of(ends, units.of_stored[columns])
        blocks = [many // wide for many, wide in outputs]
        heights = np.repeat([wide for _, wide in outputs], blocks)
        keys = np.repeat(np.arange(len(heights)), heights)[runs.rows] * len(units.stored) + runs.units
        found = distinct(keys)
        own_ends = np.searchsorted(found, np.arange(len(heights) + 1) * len(units.stored))
        labels = np.repeat(np.arange(len(outputs)), blocks)
        slots = Stack(heights, own_ends, found % len(units.stored), labels)
        stack = slots.merged()
        stored = moved = RowBlocks.of(stack, units.stored, units.alike)
        if (units.element >= 0).any():
            moved = RowBlocks.of(stack, units.moved, units.alike)
        taken = None if runs.counts.sum() == len(columns) else spread(runs.starts, runs.counts)
        held = columns if taken is None else columns[taken]
        places = None
        if len(held) < len(stored.columns):
            compact = np.cumsum(units.of_stored >= 0) - 1  # columns without those that are fixed
            before = _widths_before(slots, units.stored)[np.searchsorted(found, keys)]
            firsts = stored.ends[runs.rows] + before - (np.cumsum(units.stored) - units.stored)[runs.units]
            places = np.repeat(firsts, runs.counts) + compact[held]
        return cls(stored, moved, taken, places, units, outputs)

    @cached_property
    def normal(self) -> NormalPattern:
        """The pattern of the normal matrix."""
        return NormalPattern.of(self.moved)

    def jacobian(self, entries: np.ndarray, moves: Sequence[np.ndarray]) -> np.ndarray:
        """Return the entries of the Jacobian by free directions.

        Args:
            entries: Those of the plan.
            moves: How the stored numbers of each parameter move, `(elements, storage, tangent)` on a chart.
        """
        if self.moved is self.stored:
            data = entries if self.taken is None else entries[self.taken]
            if self.places is not None:
                found, data = data, np.zeros(len(self.stored.columns))
                data[self.places] = found
            return data
        result = np.empty(len(self.moved.columns))
        for old, new, (source, blank) in zip(self.stored.kinds, self.moved.kinds, self._sources, strict=True):
            blocks = entries[source]
            blocks[blank] = 0
            new.put(self._on_charts(old, new, blocks.reshape(-1, old.height, old.width), moves), result)
        return result

    @cached_property
    def _sources(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each kind of blocks the flat place of each entry of the plan, and where there is none.

        One selection into blocks saves passing through arrays of all entries, whose fresh memory took most of the time.
        """
        count = len(self.stored.columns if self.places is None else self.places)
        taken = np.arange(count) if self.taken is None else self.taken
        every = taken if self.places is None else np.full(len(self.stored.columns), -1)
        if self.places is not None:
            every[self.places] = taken
        found = [kind.of(every).reshape(-1).astype(np.int64) for kind in self.stored.kinds]
        return [(np.maximum(own, 0), np.flatnonzero(own < 0)) for own in found]

    def _on_charts(
        self, old: DenseBlocks, new: DenseBlocks, blocks: np.ndarray, moves: Sequence[np.ndarray]
    ) -> np.ndarray:
        result = np.empty((len(blocks), new.height, new.width))
        at = to = 0
        for first, last in _runs(self.units.part[old.units[0]]):
            units = old.units[:, first:last]
            wide, free = int(self.units.stored[units[0]].sum()), int(self.units.moved[units[0]].sum())
            own, into = blocks[:, :, at : at + wide], result[:, :, to : to + free]
            if self.units.element[units[0, 0]] >= 0:
                # Axes that are split are views, so that products go where they belong.
                shape = len(own), old.height, last - first, -1
                slots, target = own.reshape(shape).swapaxes(1, 2), into.reshape(shape).swapaxes(1, 2)
                moved = moves[int(self.units.part[units[0, 0]])][self.units.element[units]]
                np.matmul(slots, moved, out=target)
            else:
                into[:] = own
            at, to = at + wide, to + free
        return result

    def weighted(self, data: np.ndarray, lefts: Sequence[np.ndarray | None]) -> np.ndarray:
        """Return the entries of the Jacobian multiplied from the left; `data` is overwritten.

        Args:
            data: Its entries.
            lefts: For each output None, a number per row, or a matrix per block.
        """
        ends, firsts = self.moved.ends, np.cumsum([0, *(many for many, _ in self.outputs)]).tolist()
        for left, first, last in zip(lefts, firsts[:-1], firsts[1:], strict=True):
            if left is not None and left.ndim == 1:
                data[ends[first] : ends[last]] *= np.repeat(left, np.diff(ends[first : last + 1]))
        for kind in self.moved.kinds:
            left = lefts[kind.label]
            if left is not None and left.ndim > 1:
                number = (kind.rows - firsts[kind.label]) // kind.height
                kind.put(np.matmul(left[number], kind.of(data)), data)
        return data


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield where runs of equal values begin and end."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return zip(cuts[:-1], cuts[1:], strict=True)


def _widths_before(slots: Stack, widths: np.ndarray) -> np.ndarray:
    """Return for each unit of each block how many columns the units before it in the block have."""
    wide = widths[slots.units]
    before = np.cumsum(wide) - wide
    held = np.diff(slots.ends)
    return before - np.repeat(before[slots.ends[:-1][held > 0]], held[held > 0])
