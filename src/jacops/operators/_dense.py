"""What forming an operator takes: bytes of the matrix, and of the products that fill it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._backends._torch.memory import (
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
from ..errors import InputError, explain

if TYPE_CHECKING:
    from ._base import Operator

CHUNK_ENTRIES = 2**22

_TODO = "Use products (`A @ v`) or `jacops.solve` instead, write into a memmap with `out=`, or raise `budget=`."


@dataclass(frozen=True)
class DensePlan:
    """What forming a matrix takes.

    Attributes:
        shape: The matrix's.
        result: Its bytes.
        allocated: They are allocated by the call.
        startup: What the process takes for its first derivative.
        fixed: Bytes held by the products, whatever their number.
        each: What every vector in a pass adds.
        budget: Bytes allowed.
        chunk: Vectors to a pass.
    """

    shape: tuple[int, int]
    result: int
    allocated: bool
    startup: int
    fixed: float
    each: float
    budget: int
    chunk: int

    @property
    def peak(self) -> int:
        """Bytes held at once."""
        return self.startup + self.result * self.allocated + resident(self.fixed + self.each * self.chunk)


def dense_plan(operator: Operator, budget: Budget, out: Any) -> DensePlan:
    """Return what `operator.dense()` takes, from products with one and with two vectors."""
    m, n = operator.shape
    space = operator.domain if n <= m else operator.codomain
    allowed, startup = budget_bytes(budget, space.device), startup_bytes(space.device)
    result = m * n * operator.codomain.dtype.itemsize
    room = live(allowed - startup - (result if out is None else 0))
    fixed = each = 0.0
    if room > 0 and operator.formed is None:
        fixed, each = _measured(operator)
        startup = 0 if startup_bytes(space.device) else startup  # products that need no derivative load nothing
    most = max(1, min(64, space.dim, CHUNK_ENTRIES // max(1, m + n)))
    chunk = max(1, min(most, int((room - fixed) // max(each, 1.0))))
    return DensePlan((m, n), result, out is None, startup, fixed, each, allowed, chunk)


def fitted(operator: Operator, plan: DensePlan) -> int:
    """Return how many vectors go into a pass.

    Raises:
        MemoryBudgetError: Not even one fits.
    """
    if plan.peak > plan.budget:
        parts: dict[str, float] = {"working memory of one product": plan.fixed + plan.each}
        if plan.allocated:
            parts[f"the matrix {plan.shape}"] = plan.result
        if plan.startup:
            parts["what torch loads for the first derivative of a process"] = plan.startup
        refuse(f"{type(operator).__name__}.dense", parts, plan.budget, _TODO)
    return plan.chunk


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
