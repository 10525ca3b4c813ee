"""Operators over a data set: sums and stacks of what single batches give. The only loops over data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from .._cached import cached_property
from .._runtime.memory import Meter
from .._runtime.ranks import ALONE, Ranks
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
Rows = Callable[[], Iterable[tuple[float, int, Operator]]]


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
        ranks: Whose parts are added up, where each has some of the batches; the ridge is the first one's.
    """

    parts: Parts
    space: Space
    ridge: Tensor | None = None
    mark: bool | Callable[[], bool] = False
    problem: Any = None
    description: str = ""
    computed_in: torch.dtype | None = None
    ranks: Ranks = ALONE
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
        ridge = self.ridge if self.ranks.leads else None

        def own() -> list[Tensor]:
            totals = [torch.zeros_like(rows) if ridge is None else rows * ridge for rows in tiles]
            for factor, part in self.parts():
                for rows, total in zip(tiles, totals, strict=True):
                    total.add_(part._apply(rows), alpha=factor)
            return totals

        return self.ranks.sums(f"{self.name} @ v", own, vectors=tiles)

    _apply_transpose = _apply

    def diagonal(self, of: Callable[[Operator], Tensor]) -> Tensor:
        """Return the diagonal, where `of` gives that of a part."""
        space = self.space

        def own() -> Tensor:
            total = torch.zeros(space.dim, dtype=space.dtype, device=space.device)
            for factor, part in self.parts():
                total.add_(of(part), alpha=factor)
            return total

        total = self.ranks.total(f"the diagonal of the {self.name}", own)
        return total if self.ridge is None else total.add_(self.ridge)

    def _drawn(self) -> Iterator[tuple[float, Moments]]:
        first = next((part for _, part in self.parts()), None)
        if first is not None and any(True for _ in first._drawn()):  # of a sum all are estimates, or none is
            yield 1.0, self._moments

    def _moments(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        def own() -> list[Tensor]:
            squares = totals = torch.zeros(len(directions), dtype=torch.float64, device=directions.device)
            for factor, part in self.parts():
                for inner, moments in part._drawn():
                    fourth, second = moments(directions)
                    squares = squares + (factor * inner) ** 2 * fourth.double()
                    totals = totals + factor * inner * second.double()
            return [squares, totals]

        squares, totals = self.ranks.sums(f"the noise of the {self.name}", own)
        return squares, totals

    @property
    def _halves(self) -> bool:
        return True

    def _held(self, ask: DenseAsk) -> Held:
        return _first(self.parts, ask, self.ranks)

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        def own(place: Target) -> None:
            for factor, part in self.parts():
                DenseAsk(part, ask.inner).fill(place.times(factor))
                del part

        _added_up(f"{self.name}.dense", self.ranks, target, own)
        if self.ridge is not None:  # last: the result by layers is compared with a matrix without it
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
        parts: A pass over the data: each call yields a factor, the number of rows before, and the rows of every batch.
        space: What the columns mean.
        rows: What the rows mean.
        ranks: Who has the rows, where each has those of some batches.
    """

    parts: Rows
    space: Space
    rows: Space
    ranks: Ranks = ALONE

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
        def own() -> list[Tensor]:
            results = [rows.new_zeros(rows.shape[0], self.rows.dim) for rows in tiles]
            for factor, start, part in self.parts():
                for rows, result in zip(tiles, results, strict=True):
                    result[:, start : start + part.shape[0]] = factor * _along(part, rows, held)
            return results

        return self.ranks.sums(f"{self.name} @ v", own, vectors=tiles)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        def own() -> Tensor:
            total = rows.new_zeros(rows.shape[0], self.space.dim)
            for factor, start, part in self.parts():
                total += factor * part._apply_transpose(rows[:, start : start + part.shape[0]])
            return total

        return self.ranks.total(f"{self.name}.T @ v", own, rows)

    _own = "batch by batch"

    def _held(self, ask: DenseAsk) -> Held:
        return _first(lambda: ((factor, part) for factor, _, part in self.parts()), ask, self.ranks)

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        def own(place: Target) -> None:
            for factor, start, part in self.parts():
                where = slice(start, start + part.shape[0])
                DenseAsk(part, ask.inner).fill(place.times(factor).part(where))
                del part

        _added_up(f"{self.name}.dense", self.ranks, target, own)


def _added_up(call: str, ranks: Ranks, target: Target, fill: Callable[[Target], None]) -> None:
    """Write the sum of what each rank writes; one alone writes in place."""
    if not ranks.shared:
        fill(target)
        return

    def own() -> Tensor:
        place = Target(torch.zeros_like(target.matrix), adds=True, half=target.half)
        fill(place)
        return place.matrix

    whole = replace(target, half=False)  # halves were written as such
    whole.put(ranks.total(call, own))


def _along(part: Any, rows: Tensor, held: RankedRows) -> Tensor:
    return part._apply(rows) if held.is_dense else part.times(held.parts(rows), rows)


@restoring
def _first(parts: Parts, ask: DenseAsk, ranks: Ranks) -> Held:
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
    held += ask.operator.domain.dtype.itemsize * math.prod(ask.operator.shape) if ranks.shared else 0
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
        parts = zip(self.blocks, rows.split([block.shape[1] for block in self.blocks], 1), strict=True)
        # Outputs that autocast made coarser have products in their dtype.
        return torch.cat([block._apply(part) for block, part in parts], 1).to(rows.dtype)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        parts = zip(self.blocks, rows.split([block.shape[0] for block in self.blocks], 1), strict=True)
        return torch.cat([block._apply_transpose(part) for block, part in parts], 1).to(rows.dtype)

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
