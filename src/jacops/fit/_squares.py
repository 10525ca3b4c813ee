r"""Products $B^\top B$ of many small blocks, added into the lower triangle of a matrix that is stored by columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

CHUNK = 2**21  # entries of products that are made at once, 16 MiB


@dataclass(frozen=True, eq=False)
class Squares:
    """Where the products of blocks with the same units go.

    Attributes:
        widths: Columns of each unit of a block.
        places: For each unit the places where its first column meets the first rows of itself and of those after it,
            (blocks, units that are left).
        steps: How far the next column of each unit is, (blocks, units).
    """

    widths: tuple[int, ...]
    places: tuple[np.ndarray, ...]
    steps: np.ndarray

    @cached_property
    def _offsets(self) -> list[int]:
        return np.cumsum([0, *self.widths]).tolist()

    @cached_property
    def _size(self) -> int:
        """Entries of the lower triangle of one product."""
        ends = self._offsets
        return sum(wide * (ends[-1] - start) for wide, start in zip(self.widths, ends[:-1], strict=True))

    def split(self, which: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the numbers of blocks, as many as are taken at once."""
        many = max(1, CHUNK // max(1, self._size))
        yield from (which[start : start + many] for start in range(0, len(which), many))

    def chunks(self) -> Iterator[slice]:
        """Yield which blocks are taken at once."""
        many = max(1, CHUNK // max(1, self._size))
        yield from (slice(start, start + many) for start in range(0, len(self.steps), many))

    def add(self, which: slice, blocks: np.ndarray, into: np.ndarray, combine: Any = np.add) -> None:
        """Add, or `combine`, the products of a chunk of blocks `(blocks, rows, columns)`."""
        for unit, places in enumerate(self._kept or self._at(which)):
            first, last = self._offsets[unit : unit + 2]
            found = np.matmul(blocks[:, :, first:last].swapaxes(1, 2), blocks[:, :, first:])
            combine.at(into, places, found.reshape(-1))

    def whole(self, which: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Return the symmetric matrices that stand where the products of some blocks go."""
        size = self._offsets[-1]
        found = np.empty((len(which), size, size))
        for unit, places in enumerate(self._at(which)):
            first, last = self._offsets[unit : unit + 2]
            columns = entries[places].reshape(len(which), last - first, size - first)
            found[:, first:last, first:] = columns
            found[:, first:, first:last] = columns.swapaxes(1, 2)
        return found

    @cached_property
    def _kept(self) -> list[np.ndarray] | None:
        """The places of all blocks, where these are one chunk."""
        return list(self._at(slice(None))) if len(self.steps) * self._size <= CHUNK else None

    def _at(self, which: slice | np.ndarray) -> Iterator[np.ndarray]:
        for unit, (wide, places) in enumerate(zip(self.widths, self.places, strict=True)):
            left = np.array(self.widths[unit:])
            inside = np.arange(left.sum()) - np.repeat(np.cumsum(left) - left, left)
            rows = places[which].repeat(left, axis=1) + inside
            columns = self.steps[which, unit, None].astype(np.int64) * np.arange(wide)
            yield (columns[:, :, None] + rows[:, None, :]).reshape(-1)
