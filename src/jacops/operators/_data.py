"""Operators over a data set: sums and stacks of what single batches give. The only loops over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._backends._torch.layers.blocks import mirror
from .._backends._torch.memory import Budget
from ..space import Space
from ._base import Operator, add_half
from ._dense import matrix_place

Parts = Callable[[], Iterable[tuple[float, Operator]]]


@final
@dataclass(frozen=True, eq=False, repr=False)
class SumOver(Operator):
    r"""A symmetric sum over batches, $\sum_b c_b A_b + \mathrm{diag}(r)$.

    Attributes:
        parts: A pass over the data: each call yields $c_b$ and $A_b$ for every batch, in one order.
        space: Where it acts.
        ridge: The diagonal $r$ of a quadratic term, (n,).
        positive: Every part is positive and so is the ridge.
        problem: What it is the curvature of, for methods that look inside.
        told: What the repr says of it.
    """

    parts: Parts
    space: Space
    ridge: Tensor | None = None
    positive: bool = False
    problem: Any = None
    told: str = ""
    symmetric = True

    @property
    def domain(self) -> Space:
        """Where it acts."""
        return self.space

    @property
    def codomain(self) -> Space:
        """Where it acts."""
        return self.space

    def _apply(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows) if self.ridge is None else rows * self.ridge
        for factor, part in self.parts():
            total += factor * part._apply(rows)
        return total

    _apply_transpose = _apply

    def dense(self, out: Any = None, *, budget: Budget = None) -> Tensor:
        """Return the matrix `(n, n)`, one pass over the data.

        Raises:
            InputError: `out` has another shape.
            MemoryBudgetError: The matrix does not fit the budget; it was not allocated.
        """
        total = matrix_place(self, out, budget)
        total.zero_()
        if self.ridge is not None:
            total.diagonal().add_(self.ridge, alpha=0.5)
        for factor, part in self.parts():
            add_half(total, part, factor)
        mirror(total)
        return total

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}: {self.told})"


@final
@dataclass(frozen=True, eq=False, repr=False)
class StackOver(Operator):
    """Rows of all batches, one batch below the other.

    Attributes:
        parts: A pass over the data: each call yields 1 and the rows of every batch, in one order.
        space: What the columns mean.
        rows: What the rows mean.
    """

    parts: Parts
    space: Space
    rows: Space

    @property
    def domain(self) -> Space:
        """What the columns mean."""
        return self.space

    @property
    def codomain(self) -> Space:
        """What the rows mean."""
        return self.rows

    def _apply(self, rows: Tensor) -> Tensor:
        result = rows.new_empty(rows.shape[0], self.rows.dim)
        start = 0
        for factor, part in self.parts():
            stop = start + part.shape[0]
            result[:, start:stop] = factor * part._apply(rows)
            start = stop
        return result

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(rows.shape[0], self.space.dim)
        start = 0
        for factor, part in self.parts():
            stop = start + part.shape[0]
            total += factor * part._apply_transpose(rows[:, start:stop])
            start = stop
        return total

    def dense(self, out: Any = None, *, budget: Budget = None) -> Tensor:
        """Return the matrix, one pass over the data.

        Raises:
            InputError: `out` has another shape.
            MemoryBudgetError: The matrix does not fit the budget; it was not allocated.
        """
        matrix = matrix_place(self, out, budget)
        start = 0
        for factor, part in self.parts():
            stop = start + part.shape[0]
            torch.mul(part.dense(), factor, out=matrix[start:stop])
            start = stop
        return matrix


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Operator):
    """Square operators side by side, each on its own part of the axis.

    Attributes:
        blocks: The operators.
        space: What the whole axis means.
    """

    blocks: tuple[Operator, ...]
    space: Space

    @property
    def domain(self) -> Space:
        """What the whole axis means."""
        return self.space

    @property
    def codomain(self) -> Space:
        """What the whole axis means."""
        return self.space

    @property
    def symmetric(self) -> bool:
        """All blocks are."""
        return all(block.symmetric for block in self.blocks)

    @property
    def positive(self) -> bool:
        """All blocks are."""
        return all(block.positive for block in self.blocks)

    def _apply(self, rows: Tensor) -> Tensor:
        parts = rows.split([block.shape[1] for block in self.blocks], 1)
        return torch.cat([block._apply(part) for block, part in zip(self.blocks, parts, strict=True)], 1)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        parts = rows.split([block.shape[0] for block in self.blocks], 1)
        return torch.cat([block._apply_transpose(part) for block, part in zip(self.blocks, parts, strict=True)], 1)
