"""Work in chunks: how many vectors to a pass, and fewer where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import JacopsError, warn
from .contexts import is_memory_error

ENTRIES = 2**22  # 32 MiB of vectors and images in float64: more leave the caches
ROWS = 64  # 32 to 64 were fastest for a perceptron; 4 took twice as long, 128 and more a quarter longer
MOST_COLUMNS = 128  # tangents of one parameter: 1.4 times faster than 64 through small nets, and no slower than 256
# For a perceptron over 1,500 samples 1.5 times faster than 64 rows, and a tenth faster than twice as much, whose arrays
# are too large for memory that was just freed to hold them: 54,000 page faults of a solve become 5,000.
_CACHED = 2**24


def rows_of(entries: int, most: int | None = None) -> int:
    """Return how many rows of so many entries, vectors and images together, go into one batched pass."""
    return max(1, min(ROWS if most is None else most, ENTRIES // max(1, entries)))


def to_a_pass(rows: int, entries: int, passed: int, most: int | None = None) -> int:
    """Return how many of `rows` vectors go into one batched pass, such that passes are even.

    Args:
        rows: How many there are.
        entries: Numbers of a vector and of its image.
        passed: Bytes of cotangents that one vector's pass makes, where caches should hold those of a batch; else 0.
        most: Most of them, if not `ROWS`.
    """
    most = min(rows, rows_of(entries, most), _CACHED // max(1, passed))
    passes = math.ceil(rows / max(1, most))
    return max(1, math.ceil(rows / max(1, passes)))


class Chunks:
    """Slices of `count` entries, `rows` at a time, which may be halved while they are gone through.

    Attributes:
        rows: Entries to a chunk.
        halved: How often memory ran out.
    """

    def __init__(self, count: int, rows: int) -> None:
        self.count, self.rows, self.halved, self._again = count, rows, 0, False

    def __len__(self) -> int:
        return -(-self.count // self.rows)

    def __iter__(self) -> Iterator[slice]:
        start = 0
        while start < self.count:
            self._again, where = False, slice(start, min(start + self.rows, self.count))
            yield where
            start = start if self._again else where.stop

    def halving(self, where: slice, call: str, unit: str = "vectors") -> Halving:
        """Return a context: where memory runs out inside, `where` comes again in halves; one entry is final."""
        return Halving(self, where.stop - where.start, call, unit)

    def halve(self, many: int) -> None:
        """Repeat the current slice, `many // 2` entries at a time."""
        self.rows, self.halved, self._again = many // 2, self.halved + 1, True


@dataclass(frozen=True)
class Halving:
    """A context that swallows an error for want of memory and halves the chunk, with one warning."""

    chunks: Chunks
    many: int
    call: str
    unit: str

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Return whether the error was dealt with."""
        if not isinstance(error, RuntimeError | MemoryError) or isinstance(error, JacopsError):
            return False
        if self.many < 2 or not is_memory_error(error):
            return False
        self.chunks.halve(self.many)
        if self.chunks.halved == 1:
            warn(f"{self.call}: memory ran out with {self.many} {self.unit} to a pass; going on with half as many.")
        return True
