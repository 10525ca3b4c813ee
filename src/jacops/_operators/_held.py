"""What is held while an operator's matrix is filled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .._runtime.memory import resident

TIGHT = 1.3  # what few and large tensors take from the system: measured over perceptrons and convolutions
HOLES = 1.65  # what others take, in `memory.resident`


@dataclass(frozen=True)
class Held:
    """What is held while a matrix is filled.

    Attributes:
        bytes: Besides the matrix; 0 where that was not asked or is nothing.
        chunk: How many of `unit` go together.
        unit: What is counted.
        tight: These are few and large tensors, which leave few holes.
    """

    bytes: float = 0.0
    chunk: int = 1
    unit: str = "vectors to a pass"
    tight: bool = False

    @property
    def resident(self) -> int:
        """Bytes that are taken from the system."""
        if self is IN_MEMORY:
            return 0
        return resident(0) + int(TIGHT * self.bytes) if self.tight else resident(self.bytes)


IN_MEMORY = Held(unit="copy")


def one_by_one(parts: Iterable[Held]) -> Held:
    """Return what is held where parts are filled one after the other."""
    parts = tuple(parts)
    larger = max(parts, key=lambda held: (held.bytes, held is not IN_MEMORY), default=IN_MEMORY)
    prepared = sum(held.bytes for held in parts if held.tight)  # what the layers say is there from the start
    return larger if prepared <= larger.bytes else replace(larger, bytes=prepared)
