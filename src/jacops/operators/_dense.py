"""What forming an operator takes: bytes of the matrix, and of what is held while it is filled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
from ..errors import InputError, explain

if TYPE_CHECKING:
    from ._base import Operator

CHUNK_ENTRIES = 2**22
_TIGHT = 1.3  # what few and large tensors take from the system: measured over perceptrons and convolutions
_HOLES = 1.65  # what others take, in `memory.resident`

_TODO = "Use products (`A @ v`) or `jacops.solve` instead, write into a memmap with `out=`, or raise `budget=`."


@dataclass(frozen=True)
class FillRoute:
    """How an operator's matrix is filled.

    Attributes:
        name: In a word or two.
        bytes: Held on the way besides the matrix; 0 where that was not asked or is nothing.
        chunk: How many of `unit` go together.
        unit: What is counted.
        begun: What the layers say, where the matrix is filled by layers.
        inner: What parts may hold, where there are parts that are made on the way.
        tight: What is held are few and large tensors, which leave few holes.
    """

    name: str
    bytes: float = 0.0
    chunk: int = 1
    unit: str = "vectors to a pass"
    prepared: PreparedFill | None = None
    inner: Headroom | None = None
    tight: bool = False

    @property
    def resident(self) -> int:
        """Bytes that are taken from the system."""
        if self is IN_MEMORY:
            return 0
        return resident(0) + int(_TIGHT * self.bytes) if self.tight else resident(self.bytes)


IN_MEMORY = FillRoute("in memory", unit="copy")


@dataclass(frozen=True, eq=False)
class Headroom:
    """What may be held while a matrix is filled, and how each operator goes about it.

    Attributes:
        free: Bytes of tensors; infinite where nobody counts.
        layers: Whether matrices may be filled by layers.
    """

    free: float = math.inf
    layers: bool = True
    _fill_routes: dict[int, tuple[Operator, FillRoute]] = field(default_factory=dict)

    @property
    def tight(self) -> float:
        """The same for few and large tensors, which leave few holes."""
        return max(self.free, _HOLES * self.free / _TIGHT)

    def way(self, operator: Operator) -> FillRoute:
        """Return how an operator's matrix is filled; found once."""
        if id(operator) not in self._fill_routes:
            self._fill_routes[id(operator)] = operator, operator._fill_route(self)
        return self._fill_routes[id(operator)][1]

    def forget(self, operator: Operator) -> None:
        """Let go of what was found out about an operator."""
        self._fill_routes.pop(id(operator), None)

    def less(self, held: float) -> Headroom:
        """Return the room beside what is held."""
        return Headroom(max(0.0, self.free - held), self.layers)


@dataclass(frozen=True)
class DensePlan:
    """What forming a matrix takes.

    Attributes:
        shape: The matrix's.
        result: Its bytes.
        allocated: They are allocated by the call.
        startup: What the process takes for its first derivative.
        way: How it is filled.
        room: What may be held meanwhile.
        budget: Bytes allowed.
    """

    shape: tuple[int, int]
    result: int
    allocated: bool
    startup: int
    way: FillRoute
    room: Headroom
    budget: int

    @property
    def peak(self) -> int:
        """Bytes held at once."""
        return self.startup + self.result * self.allocated + self.way.resident


def dense_plan(operator: Operator, budget: Budget, out: Any) -> DensePlan:
    """Return what `operator.dense()` takes, from a few sweeps or products."""
    device = operator.domain.device
    allowed, startup = budget_bytes(budget, device), startup_bytes(device)
    result = operator.shape[0] * operator.shape[1] * operator.codomain.dtype.itemsize
    room = Headroom(max(0.0, live(allowed - startup - (result if out is None else 0))))
    way = room.way(operator)
    if way is IN_MEMORY or (room.free > 0 and startup_bytes(device)):
        startup = 0  # what needs no derivative loads nothing
    return DensePlan(operator.shape, result, out is None, startup, way, room, allowed)


def dense_room(operator: Operator, budget: Budget, out: Any) -> Headroom:
    """Return what may be held while the matrix is filled; nobody counts where it is small and no budget is given.

    Raises:
        MemoryBudgetError: It does not fit; nothing was allocated.
    """
    if budget is None and operator.shape[0] * operator.shape[1] * operator.codomain.dtype.itemsize < SMALL:
        return Headroom()
    plan = dense_plan(operator, budget, out)
    if plan.peak > plan.budget:
        parts: dict[str, float] = {}
        if plan.way is not IN_MEMORY:
            parts[f"working memory {plan.way.name}"] = plan.way.resident
        if plan.allocated:
            parts[f"the matrix {plan.shape}"] = plan.result
        if plan.startup:
            parts["what torch loads for the first derivative of a process"] = plan.startup
        refuse(f"{type(operator).__name__}.dense", parts, plan.budget, _TODO)
    return plan.room


def matrix_place(operator: Operator, out: Any, budget: Budget) -> Tensor:
    """Return where the matrix is written: the caller's place, or a new tensor.

    Raises:
        InputError: `out` has another shape.
        MemoryBudgetError: The matrix does not fit the budget; it was not allocated.
    """
    (given,) = given_tensors(out) or (None,)
    if given is not None:
        if tuple(given.shape) != operator.shape:
            raise InputError(explain("out", f"of shape {tuple(given.shape)}", f"shape {operator.shape} is needed"))
        return given
    options = {"dtype": operator.codomain.dtype, "device": operator.domain.device}
    matrix = f"the matrix {operator.shape}"
    need = operator.shape[0] * operator.shape[1] * operator.codomain.dtype.itemsize
    ensure_fits(f"{type(operator).__name__}.dense", {matrix: need}, budget, operator.domain.device, _TODO)
    return torch.empty(*operator.shape, **options)


def plain_way(operator: Operator, room: Headroom) -> FillRoute:
    """Return how the matrix of an operator without parts is filled: by layers where that is open, or by products."""
    if operator.formed is not None and room.layers and room.free > 0:
        prepared = operator.formed.begin(room.tight)
        if prepared is not None and prepared.bytes <= room.tight:
            return FillRoute("by layers", prepared.bytes, prepared.most, "numbers to a round", prepared, tight=True)
        del prepared  # what it holds is no part of the products
    return by_products(operator, room)


def by_products(operator: Operator, room: Headroom) -> FillRoute:
    m, n = operator.shape
    name = "by columns" if n <= m else "by rows"
    most = max(1, min(64, n, m, CHUNK_ENTRIES // max(1, m + n)))
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
