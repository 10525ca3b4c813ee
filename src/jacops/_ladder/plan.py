"""What routes take, in sweeps and in bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Memory:
    """What a route holds at once within a budget.

    Attributes:
        chunk: Vectors, samples or sweeps that are worked on together; 0 where not even one fits.
        peak: Bytes held at once with that chunk, the result included where the call allocates it.
    """

    chunk: int
    peak: int


class Cost(NamedTuple):
    """What a route takes.

    Attributes:
        sweeps: Passes over the model; inf where that is not known.
        measure: Returns its memory. It may run one sweep to measure it, so it is called by planners only, and where a
            result is large or a budget was given.
    """

    sweeps: float
    measure: Callable[[], Memory] | None = None

    @property
    def memory(self) -> Memory | None:
        """Its memory, measured now; None where that is not known."""
        return None if self.measure is None else self.measure()
