"""Operators over a data set: sums and stacks of what single batches give. The only loops over data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from .._runtime.memory import Meter
from .._runtime.restoring import restoring
from .._space import Space
from ._base import Operator
from ._dense import DenseAsk
from ._finite_results import check_result
from ._held import Held
from ._kinds import Composite, OnSpace
from ._noise import Moments
from ._ranked_rows import RankedRows
from ._target import Target

Parts = Callable[[], Iterable[tuple[float, Operator]]]


@final
@dataclass(frozen=True, eq=False, repr=False)
class SumOver(OnSpace):
    r"""A symmetric sum over batches, $\sum_b c_b A_b + \mathrm{diag}(r)$.

    Attributes:
        parts: A pass over the data: each call yields $c_b$ and $A_b$ for every batch, in one order.
        space: Where it acts.
        ridge: The diagonal $r$ of a quadratic term, (n,).
        mark: Whether every part and the ridge are positive, or a function that computes that when it is first
            read.
        problem: What it is the curvature of, for methods that look inside.
        description: How the repr describes it.
        computed_in: The coarsest dtype of the batches' computations, None where that is not known.
    """

    parts: Parts
    space: Space
    ridge: Tensor | None = None
    mark: bool | Callable[[], bool] = False
    problem: Any = None
    description: str = ""
    computed_in: torch.dtype | None = None
    symmetric = True
    _own = "batch by batch"

    @cached_property
    def positive(self) -> bool:
        """Whether every part is positive and so is the ridge; may take a pass over the data."""
        return self.mark() if callable(self.mark) else self.mark

    def _apply(self, rows: Tensor) -> Tensor:
        return self._apply_each([rows])[0]

    def _apply_each(self, tiles: Sequence[Tensor]) -> list[Tensor]:
        """Return what `_apply` gives for each tile of rows, to the last bit, in one pass over the data."""
        totals = [torch.zeros_like(rows) if self.ridge is None else rows * self.ridge for rows in tiles]
        for factor, part in self.parts():
            for rows, total in zip(tiles, totals, strict=True):
                total += factor * part._apply(rows)
        return totals

    _apply_transpose = _apply

    def _drawn(self) -> Iterator[tuple[float, Moments]]:
        for factor, part in self.parts():
            drawn = [(factor * own, moments) for own, moments in part._drawn()]
            if not drawn:  # of a sum of batches all are estimates, or none is
                return
            yield from drawn
            del part

    @property
    def _halves(self) -> bool:
        return True

    def _held(self, ask: DenseAsk) -> Held:
        return _first(self.parts, ask)

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        for factor, part in self.parts():
            DenseAsk(part, ask.inner).fill(target.times(factor))
            del part
        if self.ridge is not None:  # last: what the layers say is held against a matrix without it
            target.put_diagonal(self.ridge)

    def _marks(self) -> Iterator[str]:
        yield "symmetric"
        if vars(self).get("positive", self.mark) is True:  # a repr takes no pass over the data
            yield "positive"

    def _facts(self) -> Iterator[tuple[str, str]]:
        # What batches take is kept by the problem, not here.
        yield from (fact for fact in super()._facts() if fact[0] != "memory")
        if self.description:
            yield "sum over", self.description


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
        return self._apply_each([rows], RankedRows(self.space))[0]

    def apply_each(self, tiles: Sequence[Tensor], held: RankedRows | None = None) -> list[Tensor]:
        """Return what `apply` gives for each tile of vectors `(k, P)`, to the last bit, in one pass over the data.

        Args:
            tiles: The vectors.
            held: How they are held, where that is not as they are; the rows are then layer factors.
        """
        held = held or RankedRows(self.space)
        for rows in tiles if held.is_dense else ():
            self.domain.check_rows("v", rows)
        return [check_result(self, found, "a product") for found in self._apply_each(tiles, held)]

    def _apply_each(self, tiles: Sequence[Tensor], held: RankedRows) -> list[Tensor]:
        results = [rows.new_empty(rows.shape[0], self.rows.dim) for rows in tiles]
        start = 0
        for factor, part in self.parts():
            stop = start + part.shape[0]
            for rows, result in zip(tiles, results, strict=True):
                result[:, start:stop] = factor * _along(part, rows, held)
            start = stop
        return results

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(rows.shape[0], self.space.dim)
        start = 0
        for factor, part in self.parts():
            stop = start + part.shape[0]
            total += factor * part._apply_transpose(rows[:, start:stop])
            start = stop
        return total

    _own = "batch by batch"

    def _held(self, ask: DenseAsk) -> Held:
        return _first(self.parts, ask)

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        start = 0
        for factor, part in self.parts():
            stop = start + part.shape[0]
            DenseAsk(part, ask.inner).fill(target.times(factor).part(slice(start, stop)))
            start = stop
            del part


def _along(part: Any, rows: Tensor, held: RankedRows) -> Tensor:
    return part._apply(rows) if held.is_dense else part.times(held.parts(rows), rows)


@restoring
def _first(parts: Parts, ask: DenseAsk) -> Held:
    """Return what the first batch holds, and what the pass keeps of the others."""
    if not 0 < ask.free < math.inf:
        return Held()
    with Meter() as meter:
        part = next((part for _, part in parts()), None)
    if part is None:
        return Held()
    will_hold = getattr(parts, "will_hold", None)
    held = part.nbytes if will_hold is None else will_hold(part.nbytes)
    ask.inner = max(0.0, ask.free - held)
    own = DenseAsk(part, ask.inner).held
    return replace(own, bytes=held + max(own.bytes, meter.peak - part.nbytes))


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(OnSpace, Composite):
    """Square operators side by side, each on its own part of the axis.

    Attributes:
        blocks: The operators.
        space: What the whole axis means.
    """

    blocks: tuple[Operator, ...]
    space: Space

    def _apply(self, rows: Tensor) -> Tensor:
        parts = rows.split([block.shape[1] for block in self.blocks], 1)
        return torch.cat([block._apply(part) for block, part in zip(self.blocks, parts, strict=True)], 1)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        parts = rows.split([block.shape[0] for block in self.blocks], 1)
        return torch.cat([block._apply_transpose(part) for block, part in zip(self.blocks, parts, strict=True)], 1)

    @property
    def _parts(self) -> tuple[Operator, ...]:
        return self.blocks

    def _places(self, target: Target) -> Iterator[Target]:
        if not target.adds:
            target.matrix.zero_()
        row = column = 0
        for block in self.blocks:
            rows, columns = block.shape
            yield target.part(slice(row, row + rows), slice(column, column + columns))
            row, column = row + rows, column + columns
