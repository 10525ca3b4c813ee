"""Passes over a problem's data that linearise every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, final

from ._data import Batch
from ._finite import InBatch
from ._objective import Objective
from ._operators import Operator
from ._sharing import PLACES, number_of, refuse_apart
from ._words import Curvature, FisherKind
from .errors import DataError, InputError

FISHERS: dict[Curvature, FisherKind] = {
    "fisher": "exact",
    "empirical_fisher": "empirical",
    "monte_carlo_fisher": "monte_carlo",
}


@final
class BatchPasses:
    """Linearised batches, again and again; those that fit into memory are kept from the first pass on."""

    def __init__(self, problem: Any, kind: str) -> None:
        self.problem, self.kind = problem, kind
        self._kept: list[tuple[float, Operator]] = []
        self._held, self._whole = 0, False
        self._unchanged = problem.objective.unchanged()

    def first(self) -> Operator:
        """Linearise the first batch that counts.

        Raises:
            DataError: There is none.
        """
        for _, part in self():
            return part
        raise DataError.of(self.problem.data.name, "without rows", "at least one is needed")

    def __call__(self) -> Iterator[tuple[float, Operator]]:
        """Yield the factor and the curvature of every batch."""
        if self._whole:
            yield from self._kept
            return
        self.check()
        count = 0
        for number, (row, point, term, factor) in enumerate(self.problem.terms(self.kind)):
            count += 1
            if number < len(self._kept):
                yield self._kept[number]
                continue
            with InBatch(number_of(point.batch)):
                part = self._made(term, point.batch, row)
            held = self._held + part.nbytes - self.problem.keep(point)
            if number == len(self._kept) and held <= self.problem.room:
                self._held = held
                self._kept.append((factor, part))
            yield factor, part
            del part  # whoever took it decides how long it lives
        self._whole = count == len(self._kept)

    def whole(self) -> Iterator[tuple[float, Operator]]:
        """Yield what a pass does, of the batches of all ranks; those of others are not kept."""
        if not self.problem.ranks.shared:
            yield from self()
            return
        self.check()
        for row, point, term, factor in self.problem.terms(self.kind, everyone=True):
            with InBatch(number_of(point.batch)):
                yield factor, self._made(term, point.batch, row)

    def check(self) -> None:
        """Refuse to run a model again that changed since the first pass: sums would mix two points.

        Raises:
            ModelStateError: It did; the message names the parameter.
        """
        self._unchanged(f"Problem.{self.kind}")

    def release(self) -> None:
        """Drop what is linearised, unless all batches are small; a later pass begins anew."""
        if not all(self.problem.fits(part.nbytes) for _, part in self._kept):
            self._kept, self._held, self._whole = [], 0, False

    def will_hold(self, each: int) -> int:
        """Return the bytes that the next pass holds beside what is kept already, for batches of `each` bytes."""
        left = each * (0 if self._whole else self.problem.data.count - len(self._kept))
        return min(left, self.problem.room - self._held + each)

    def _made(self, term: Objective, batch: Batch, row: int) -> Operator:
        if self.kind not in FISHERS:
            build: Callable[..., Operator] = getattr(term, self.kind)
            return build(batch.x, batch.y)
        if batch.weights is not None:
            todo = "Take the GGN, which is the Fisher matrix for the usual losses."
            raise InputError.of("curvature", repr(self.kind), "a Fisher matrix takes no sample weights", todo)
        if self.kind == "monte_carlo_fisher":
            refuse_apart(self.problem.data, self.problem.ranks, PLACES)
        return term.fisher(FISHERS[self.kind], batch.x, batch.y, row)
