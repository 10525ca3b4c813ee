r"""Random projections of gradients: small matrices on both sides of every parameter.

A parameter is seen as a matrix, its first axis and the others laid end to end. Its gradient $G$ becomes
$L^\top G R$ with at most $\mathrm{rank}^2$ entries. $L$ and $R$ have orthogonal columns in random directions, Gaussian
ones made orthogonal, and $E[L L^\top] = I$, so that inner products of projected gradients are those of the gradients in
expectation; near full rank they vary less than Gaussian columns themselves. A side that would not get shorter is left
as it is. Of layers only the factors are projected (Choe et al., 2024).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from .._operators import LayerFactors
from .._operators._finite_results import check_result
from .._runtime.counter import Draws
from .._space import Space
from .._torch.protocol import matrix_shape, projected

VERSION = 1  # of the numbers that are drawn: part of the identity of a stored index


@final
@dataclass(frozen=True)
class GradientSketch:
    """A random projection of rows over a space of parameters.

    Attributes:
        space: The parameters.
        rank: The longest that either side of a weight gets.
        seed: Of the numbers, which depend on it, on the parameter's name and on their place alone.
    """

    space: Space
    rank: int
    seed: int

    @cached_property
    def sides(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """What every parameter is multiplied with on the left and on the right; None for what stays as it is."""
        found: list[tuple[Tensor | None, Tensor | None]] = []
        shapes = zip(self.space.names, self.space.shapes, self.space.dtypes, self.lengths, strict=True)
        for name, shape, dtype, (a, b) in shapes:
            long, wide = matrix_shape(shape)
            sides = (self._drawn(f"{name} left", long, a), self._drawn(f"{name} right", wide, b))
            left, right = (None if side is None else side.to(self.space.device, dtype) for side in sides)
            found.append((left, right))
        return found

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """The two sides of every projected parameter: what one does not need of rank² entries the other may have."""
        return [_sides(*matrix_shape(shape), self.rank) for shape in self.space.shapes]

    @cached_property
    def slices(self) -> list[slice]:
        """The columns of every parameter."""
        found, start = list[slice](), 0
        for a, b in self.lengths:
            found.append(slice(start, start + a * b))
            start += a * b
        return found

    @property
    def dim(self) -> int:
        """Columns altogether."""
        return self.slices[-1].stop if self.slices else 0

    @property
    def is_exact(self) -> bool:
        """Whether nothing is projected."""
        return self.dim == self.space.dim

    def rows(self, factors: LayerFactors) -> Tensor:
        """Return the projected rows `(m, dim)`.

        Raises:
            NonFiniteError: They hold NaN or Inf; the message names the row of the data.
        """
        parts = zip(factors.parts, self.sides, strict=True)
        blocks = [projected(part, left, right).flatten(0, 1).flatten(1) for part, (left, right) in parts]
        found = torch.cat([block.to(self.space.dtype) for block in blocks], 1)
        return check_result(factors, found, "the projection")

    def _drawn(self, name: str, rows: int, columns: int) -> Tensor | None:
        """Return `(rows, columns)` in float64, drawn on the CPU whatever the device; None where they are as many."""
        if rows == columns:
            return None
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        draws = Draws(int.from_bytes(digest, "little"))
        gaussian = draws.normal(torch.ones(rows, columns, dtype=torch.bool), 1)[0]
        found, upper = torch.linalg.qr(gaussian)
        return found * upper.diagonal().sign() * (rows / columns) ** 0.5  # signs: which one is found is not said


def _sides(long: int, wide: int, rank: int) -> tuple[int, int]:
    a = min(long, rank)
    b = min(wide, rank**2 // max(1, a))
    return min(long, rank**2 // max(1, b)), b
