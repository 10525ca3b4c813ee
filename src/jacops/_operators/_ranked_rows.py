r"""Rows over parameters of which every weight's part, a matrix, is held as two factors of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._cached import cached_property
from .._runtime.contexts import private_noise
from .._space import Space
from .._torch.protocol import Vectors, matrix_shape

# Halko, Martinsson and Tropp (2011): some columns more than the rank, and two steps of the power method, come within
# some per cent of the best approximation of matrices whose singular values hardly fall.
_MORE, _POWERS = 8, 2
_PAYS = 4  # times as many columns as a sketch has: below that a decomposition costs about as much
_SEED = 41  # of the sketch, which is the same for all rows: what a row becomes depends on the row alone


@final
@dataclass(frozen=True)
class RankedRows:
    r"""How rows `(k, n)` over a space are held: of each weight the best $L R^\top$ of a rank, in `(k, dim)` numbers.

    A weight is seen as a matrix `(F, W)`, its first axis and the others laid end to end. Where factors would be no
    smaller than the matrix, it is held as it is.

    Attributes:
        space: What the columns of the rows mean.
        rank: Of the factors; None for rows that are held as they are.
    """

    space: Space
    rank: int | None = None

    @cached_property
    def _sides(self) -> list[tuple[int, int]]:
        return [matrix_shape(shape) for shape in self.space.shapes]

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of each parameter's factors; 0 for one that is held as it is."""
        rank = self.rank or 0
        return [rank if rank * (long + wide) < long * wide else 0 for long, wide in self._sides]

    @property
    def is_dense(self) -> bool:
        """Whether rows are held as they are."""
        return not any(self.ranks)

    @cached_property
    def slices(self) -> list[slice]:
        """Where each parameter's numbers stand."""
        found, start = list[slice](), 0
        for (long, wide), rank in zip(self._sides, self.ranks, strict=True):
            found.append(slice(start, start + (rank * (long + wide) or long * wide)))
            start = found[-1].stop
        return found

    @property
    def dim(self) -> int:
        """Numbers that a row is held in."""
        return self.slices[-1].stop if self.slices else 0

    def packed(self, rows: Tensor) -> Tensor:
        """Return rows `(k, n)`, all finite, as they are held, `(k, dim)`."""
        if self.is_dense:
            return rows
        held = rows.new_empty(rows.shape[0], self.dim)
        for where, into, side, rank in zip(self.space.slices, self.slices, self._sides, self.ranks, strict=True):
            part = rows[:, where]
            if rank:
                left, right = _factors(part.unflatten(1, side), rank)
                part = torch.cat([left.flatten(1), right.flatten(1)], 1)
            held[:, into] = part
        return held

    def dense(self, held: Tensor) -> Tensor:
        """Return the rows `(k, n)` that are held as `(k, dim)`."""
        if self.is_dense:
            return held
        rows = held.new_empty(held.shape[0], self.space.dim)
        for where, part in zip(self.space.slices, self._split(held), strict=True):
            formed = part if isinstance(part, Tensor) else part[0] @ part[1].mT
            rows[:, where] = formed.flatten(1)
        return rows

    def parts(self, held: Tensor) -> list[Vectors]:
        r"""Return what is held of each parameter, in its dtype: `(k, F, W)`, or L `(k, F, r)` and R `(k, W, r)`."""
        parts = zip(self._split(held), self.space.dtypes, strict=True)
        return [p.to(dtype) if isinstance(p, Tensor) else (p[0].to(dtype), p[1].to(dtype)) for p, dtype in parts]

    def truncated(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows `(k, n)` as holding them leaves them, and the change relative to their norms, `(k,)`."""
        found = self.dense(self.packed(rows))
        change, size = (torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in (rows - found, rows))
        return found, change / torch.where(size > 0, size, 1.0)

    def _split(self, held: Tensor) -> Iterator[Vectors]:
        many = held.shape[0]
        for where, (long, wide), rank in zip(self.slices, self._sides, self.ranks, strict=True):
            part = held[:, where]
            if rank:
                left, right = part.split([long * rank, wide * rank], 1)
                yield left.reshape(many, long, rank), right.reshape(many, wide, rank)
            else:
                yield part.reshape(many, long, wide)


def _factors(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return L and R of matrices `(k, F, W)`, of equal norms column by column."""
    few, basis = rank + _MORE, None
    if _PAYS * few <= min(matrices.shape[1:]):
        noise = private_noise(matrices.new_empty(matrices.shape[2], few), _SEED)
        basis = torch.linalg.qr(matrices @ noise).Q
        for _ in range(_POWERS):
            basis = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.mT @ basis).Q).Q
        matrices = basis.mT @ matrices
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    left = left if basis is None else basis @ left
    root = values[:, None, :rank].sqrt()
    return left[:, :, :rank] * root, right[:, :rank].mT * root
