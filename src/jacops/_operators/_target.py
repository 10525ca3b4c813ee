"""Where an operator's matrix is written: in a place of its own, or added to what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .._torch.protocol import mirror


@dataclass(frozen=True)
class Target:
    """Where a matrix is written.

    Attributes:
        matrix: The place.
        weight: What the matrix is multiplied by.
        adds: It is added to what is there.
        half: Of a symmetric matrix, any X with X + Xᵀ the matrix is added.
    """

    matrix: Tensor
    weight: float = 1.0
    adds: bool = False
    half: bool = False

    @property
    def scale(self) -> float:
        """What entries are multiplied by."""
        return 0.5 * self.weight if self.half else self.weight

    @property
    def added(self) -> Target:
        """The same place, to be added to."""
        return replace(self, adds=True)

    @property
    def T(self) -> Target:  # noqa: N802
        """The place of the transpose."""
        return replace(self, matrix=self.matrix.T)

    def times(self, factor: float) -> Target:
        """Return the place of a matrix that is multiplied by a number."""
        return replace(self, weight=self.weight * factor)

    def part(self, *where: slice) -> Target:
        """Return a part of the place."""
        return replace(self, matrix=self.matrix[where])

    def put(self, entries: Tensor) -> None:
        """Write entries, or add them."""
        if self.adds:
            self.matrix.add_(entries, alpha=self.scale)
        else:
            self.matrix.copy_(entries)
            self.multiply()

    def put_diagonal(self, entries: Tensor | float) -> None:
        """Write a diagonal matrix, or add it."""
        if not self.adds:
            self.matrix.zero_()
        self.matrix.diagonal().add_(entries, alpha=self.scale)

    def multiply(self) -> None:
        """Multiply what was written by the weight."""
        if self.scale != 1.0:
            self.matrix.mul_(self.scale)

    def by_halves(self, add: Callable[[Target], None]) -> None:
        """Write a symmetric matrix that `add` adds by half."""
        if self.half:
            add(self)
        elif self.adds:
            for matrix in (self.matrix, self.matrix.T):
                add(replace(self, matrix=matrix, half=True))
        else:
            add(replace(self, matrix=self.matrix.zero_(), adds=True, half=True))
            mirror(self.matrix)
