"""What forming an operator takes: bytes of the matrix, and of what is held while it is filled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._runtime.chunks import ROWS, rows_of
from .._runtime.memory import (
    SMALL,
    Budget,
    Meter,
    budget_bytes,
    ensure_fits,
    given_tensors,
    live,
    refuse,
    resident,
    startup_bytes,
)
from .._runtime.restoring import restoring
from .._torch.protocol import PreparedFill
from ..errors import InputError

if TYPE_CHECKING:
    from ._base import Operator

_TIGHT = 1.3  # what few and large tensors take from the system: measured over perceptrons and convolutions
_HOLES = 1.65  # what others take, in `memory.resident`

_TODO = "Use products (`A @ v`) or `jacops.solve` instead, write into a memmap with `out=`, or raise `budget=`."


@dataclass(frozen=True)
class Headroom:
    """What may be held while a matrix is filled.

    Attributes:
        free: Bytes of tensors; infinite where nobody counts.
        layers: Whether matrices may be filled by layers.
    """

    free: float = math.inf
    layers: bool = True

    @property
    def tight(self) -> float:
        """The same for few and large tensors, which leave few holes."""
        return max(self.free, _HOLES * self.free / _TIGHT)

    def less(self, held: float) -> Headroom:
        """Return the room beside what is held."""
        return Headroom(max(0.0, self.free - held), self.layers)


@dataclass(frozen=True)
class FillRoute:
    """How an operator's matrix is filled.

    Attributes:
        name: In a word or two.
        bytes: Held on the way besides the matrix; 0 where that was not asked or is nothing.
        chunk: How many of `unit` go together.
        unit: What is counted.
        prepared: What the layers say, where the matrix is filled by layers.
        room: What parts may hold, where there are parts that are made on the way.
        parts: The routes of the operators that this one is made of.
        tight: What is held are few and large tensors, which leave few holes.
    """

    name: str
    bytes: float = 0.0
    chunk: int = 1
    unit: str = "vectors to a pass"
    prepared: PreparedFill | None = None
    room: Headroom = field(default_factory=Headroom)
    parts: tuple[FillRoute, ...] = ()
    tight: bool = False

    @property
    def resident(self) -> int:
        """Bytes that are taken from the system."""
        if self is IN_MEMORY:
            return 0
        return resident(0) + int(_TIGHT * self.bytes) if self.tight else resident(self.bytes)

    def part(self, number: int) -> FillRoute:
        """Return the route of a part; where all are in memory, that of the whole."""
        return self.parts[number] if self.parts else self


IN_MEMORY = FillRoute("in memory", unit="copy")


def one_by_one(parts: Iterable[FillRoute]) -> FillRoute:
    """Return the route of an operator whose parts are filled one after the other."""
    parts = tuple(parts)
    larger = max(parts, key=lambda route: (route.bytes, route is not IN_MEMORY), default=IN_MEMORY)
    if larger is IN_MEMORY:
        return IN_MEMORY
    prepared = sum(route.bytes for route in parts if route.prepared)  # what the layers say is there from the start
    return replace(larger, bytes=max(larger.bytes, prepared), prepared=None, parts=parts)


@dataclass(frozen=True)
class DenseLimits:
    """What forming an operator's matrix may take.

    Attributes:
        operator: Whose matrix.
        result: Its bytes.
        allocated: They are allocated by the call.
        budget: Bytes allowed.
    """

    operator: Operator
    result: int
    allocated: bool
    budget: int

    @classmethod
    def of(cls, operator: Operator, budget: Budget, out: Any) -> DenseLimits:
        """Return the limits of a call of `dense`."""
        return cls(operator, _result_bytes(operator), out is None, budget_bytes(budget, operator.domain.device))

    @cached_property
    def _startup(self) -> int:
        return startup_bytes(self.operator.domain.device)

    @cached_property
    def room(self) -> Headroom:
        """What may be held beside the matrix."""
        return Headroom(max(0.0, live(self.budget - self._startup - self.result * self.allocated)))

    def startup(self, route: FillRoute) -> int:
        """Return what the process takes for its first derivative; what needs no derivative loads nothing."""
        idle = route is IN_MEMORY or (self.room.free > 0 and startup_bytes(self.operator.domain.device))
        return 0 if idle else self._startup

    def peak(self, route: FillRoute) -> int:
        """Return the bytes that a route holds at once."""
        return self.startup(route) + self.result * self.allocated + route.resident

    def ensure(self, route: FillRoute) -> None:
        """Refuse a route that does not fit.

        Raises:
            MemoryBudgetError: It does not; nothing was allocated.
        """
        if self.peak(route) <= self.budget:
            return
        parts: dict[str, float] = {}
        if route is not IN_MEMORY:
            parts[f"working memory {route.name}"] = route.resident
        if self.allocated:
            parts[f"the matrix {self.operator.shape}"] = self.result
        if startup := self.startup(route):
            parts["what torch loads for the first derivative of a process"] = startup
        refuse(f"{type(self.operator).__name__}.dense", parts, self.budget, _TODO)


def _result_bytes(operator: Operator) -> int:
    return operator.shape[0] * operator.shape[1] * operator.codomain.dtype.itemsize


def is_counted(operator: Operator, budget: Budget) -> bool:
    """Return whether forming a matrix is held against a budget: one is given, or the matrix is large."""
    return budget is not None or _result_bytes(operator) >= SMALL


def matrix_place(operator: Operator, out: Any, budget: Budget) -> Tensor:
    """Return where the matrix is written: the caller's place, or a new tensor.

    Raises:
        InputError: `out` has another shape.
        MemoryBudgetError: The matrix does not fit the budget; it was not allocated.
    """
    (given,) = given_tensors(out) or (None,)
    if given is not None:
        if tuple(given.shape) != operator.shape:
            raise InputError.of("out", f"of shape {tuple(given.shape)}", f"shape {operator.shape} is needed")
        return given
    options = {"dtype": operator.codomain.dtype, "device": operator.domain.device}
    matrix = f"the matrix {operator.shape}"
    device = operator.domain.device
    ensure_fits(f"{type(operator).__name__}.dense", {matrix: _result_bytes(operator)}, budget, device, _TODO)
    return torch.empty(*operator.shape, **options)


def by_products(operator: Operator, room: Headroom) -> FillRoute:
    """Return how a matrix is filled by products with unit vectors, as many together as fit."""
    m, n = operator.shape
    name = "by columns" if n <= m else "by rows"
    most = rows_of(m + n, max(1, min(ROWS, n, m)))
    if not 0 < room.free < math.inf:
        return FillRoute(name, chunk=most)
    fixed, each = _measured(operator)
    chunk = max(1, min(most, int((room.free - fixed) // max(each, 1.0))))
    return FillRoute(name, fixed + each * chunk, chunk)


@restoring
def _measured(operator: Operator) -> tuple[float, float]:
    """Return bytes that do not depend on the number of vectors in a pass, and bytes that each of them adds."""
    m, n = operator.shape
    space = operator.domain if n <= m else operator.codomain
    peaks = []
    for many in (1, 1, 2):  # what the first product sets up for all is no part of the others
        with Meter() as meter:
            unit = torch.zeros(min(many, space.dim), space.dim, dtype=space.dtype, device=space.device)
            unit[:, :1] = 1
            product = operator._apply(unit) if n <= m else operator._apply_transpose(unit)
            peaks.append(meter.peak)
            del product
    each = max(peaks[2] - peaks[1], 1)
    return float(max(0, peaks[0] - each)), float(each)
