"""The judge: sets aside the rows that need no solver, and gives each of the others a status by its true residual."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from .._finite import where_first
from ._solution import OUT_OF_RANGE, Solution, Status
from ._system import System

FOR_GOOD = {Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.BREAKDOWN, Status.DIVERGED}  # whatever the residual
_SIZES = {"lowest_curvature", "remainder", "scale", "scale_needed", "sketch_curvature"}  # figures of the size of A
# Exponents of the largest entry of a row between which scaling by a power of two is exact: that of the smallest normal
# number plus the digits of the dtype, and that of the largest number.
_EXACT = {torch.float32: (-101, 128), torch.float64: (-968, 1024)}


def condition_limit(dtype: torch.dtype) -> float:
    """Return the condition number from which a matrix counts as singular in a precision."""
    # A 45th and an eighth of 1 / eps: a solution has one or two digits left at the most.
    return 1e14 if dtype == torch.float64 else 1e6


def is_attainable(system: System, residual: float, condition: float) -> bool:
    """Whether a relative residual is at the level that rounding of the operator's products allows.

    Args:
        system: The equations.
        residual: Of a right-hand side.
        condition: The norm of the operator times that of the solution, over that of the right-hand side.
    """
    return residual <= system.rounding * condition and condition <= condition_limit(system.dtype) and residual < 1


@dataclass(eq=False)
class Raw:
    """The result of a method for finite right-hand sides that are not zero; the judge makes a `Solution` of it.

    Attributes:
        x: Solutions, `(k, n)`.
        iterations: Steps per row.
        failed: Rows that failed and how; the others are judged by their residual.
        norm: A lower estimate of the norm of the damped operator, where the method has one for free.
        info: The method's own figures; tensors of length k are per row.
        left: Norms of the true residuals, `(k,)` in double, where the method has just computed them.
        approximate: The answer is an approximation by design: a residual above the tolerance is no failure.
        unchecked: Its residual was not requested and is NaN.
        measured: `left` was computed for it, together with that of others.
    """

    x: Tensor
    iterations: list[int]
    failed: dict[int, Status] = field(default_factory=dict)
    norm: float | None = None
    info: dict[str, Any] = field(default_factory=dict)
    left: Tensor | None = None
    approximate: bool = False
    unchecked: bool = False
    measured: bool = False


@final
class Judge:
    r"""Right-hand sides and what becomes of them.

    Rows are scaled by powers of two to entries of at most 1, so that tiny and huge gradients are solved alike; the
    operator has a unit of its own (`System`). Solutions are scaled back here, once they are known.

    Attributes:
        rows: The scaled right-hand sides.
        exponents: The binary exponents by which they were divided.
        solvable: Indices of the rows that are finite and not zero; zero rows have the solution zero, in no step.
        info: Figures, collected.
    """

    def __init__(self, system: System, rows: Tensor) -> None:
        k, device = rows.shape[0], rows.device
        largest = _largest(rows)
        finite, zero = largest.isfinite(), largest == 0
        # Exponents whose power of two, and its inverse, are normal numbers (limits: 1022 and 126).
        least = 1000 if rows.dtype == torch.float64 else 120
        exponents = torch.frexp(largest).exponent.clamp(-least, least) - 1
        self.exponents = torch.where(finite & ~zero, exponents, 0)
        self.rows = rows / torch.ldexp(torch.ones_like(largest), self.exponents).unsqueeze(1)
        self.size = torch.linalg.vector_norm(self.rows, dim=1, dtype=torch.float64)
        self.solvable = (finite & ~zero).nonzero()[:, 0]
        self.system = system
        nan = torch.full((k,), math.nan, dtype=torch.float64, device=device)
        self.x = torch.empty_like(rows)  # rows that are solved for are written in the end
        if len(self.solvable) < k:
            self.x.zero_()[~finite] = math.nan
        self.residual = torch.where(finite, torch.zeros_like(nan), nan)
        self.attainable, self.bound = self.residual.clone(), self.residual.clone()
        self.status = [Status.CONVERGED if ok else Status.NONFINITE_INPUT for ok in finite.tolist()]
        self.iterations = [0] * k
        self.info: dict[str, Any] = {"approximate": False}
        if not bool(finite.all()):
            self.info["nonfinite"] = where_first(rows[0] if k == 1 else rows)

    def some(self, where: Tensor) -> Tensor:
        """Return some of the rows; all of them without a copy."""
        return self.rows if len(where) == len(self.rows) else self.rows[where]

    def take(self, where: Tensor, raw: Raw) -> None:
        """Judge what a method found for some rows."""
        system, shift = self.system, self.exponents[where] - self.system.fixed()
        scaled, x, loss = _scaled_back(raw.x, shift)
        if len(where) == len(self.x):
            self.x = scaled.to(self.x).contiguous()
        else:
            self.x[where] = scaled
        judged = _largest(x).isfinite() & ~_failed_for_good(raw, where)
        left = self._left(where, raw, x, judged, loss)
        length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        norm = max(raw.norm or system.norm, system.damping) if bool(judged.any()) else math.nan
        scale = norm * length / self.size[where]
        self.residual[where] = left / self.size[where]
        self.attainable[where] = system.rounding * scale
        if not raw.unchecked and system.is_positive:  # which may take a pass over the data
            self.bound[where] = self._bound(left, norm * length, self.size[where], shift)
        self.info["approximate"] |= raw.approximate
        if raw.unchecked:
            self.info["unchecked"] = True
        facts = (self.residual[where].tolist(), scale.tolist(), judged.tolist(), loss.tolist())
        for i, (row, residual, condition, ok, gone) in enumerate(zip(where.tolist(), *facts, strict=True)):
            self.iterations[row] = raw.iterations[i]
            self.status[row] = self._status(raw, raw.failed.get(i), residual, condition, ok, gone)
        self._note(where, raw.info)

    def _left(self, where: Tensor, raw: Raw, x: Tensor, judged: Tensor, loss: Tensor) -> Tensor:
        """Return the norms of the true residuals, by one product for each row that needs one; NaN for the others."""
        left = torch.full_like(loss, math.nan)
        if raw.unchecked:
            return left
        known = judged & (loss <= self.system.eps) if raw.left is not None else torch.zeros_like(judged)
        if raw.left is not None:
            left[known] = raw.left[known]
        ask = judged & ~known
        if bool(ask.all()):
            return torch.linalg.vector_norm(self.system.residual(x, self.some(where)), dim=1)
        if bool(ask.any()):
            rows = self.system.residual(x[ask], self.rows[where[ask]])
            left[ask] = torch.linalg.vector_norm(rows, dim=1)
        return left

    def _bound(self, left: Tensor, image: Tensor, size: Tensor, shift: Tensor) -> Tensor:
        """Return bounds on the errors of positive operators, the rounding of what is returned included."""
        system = self.system
        # Rounding errors of n terms add up like their root; for few unknowns like four.
        rounding = system.rounding * max(4.0, math.sqrt(system.n)) * (image + size)
        bound = times(((left + rounding) / system.damping).unsqueeze(1), shift)[:, 0]
        return bound + math.sqrt(system.n) * torch.finfo(system.dtype).smallest_normal * system.eps

    def _status(
        self, raw: Raw, failed: Status | None, residual: float, condition: float, judged: bool, loss: float
    ) -> Status:
        """Return how the solve of a row ended; `loss` is what the range of the dtype took from its solution."""
        if failed is not None and failed in FOR_GOOD:
            return failed
        promised = not (raw.approximate or raw.unchecked)
        limit = condition_limit(self.system.dtype)
        if promised and judged and residual <= self.system.tolerance:
            return Status.CONVERGED
        if promised and judged and is_attainable(self.system, residual, condition):
            return Status.ATTAINABLE
        if loss > (self.system.eps if promised else self.system.tolerance):
            self.info["reason"] = f"{OUT_OF_RANGE} {self.system.dtype}"
            return Status.BREAKDOWN
        if not judged or (residual != residual and not raw.unchecked):
            return Status.BREAKDOWN
        if promised:
            return Status.SINGULAR if condition > limit else failed or Status.STAGNATED
        return failed or (Status.UNCHECKED if raw.unchecked else Status.APPROXIMATE)

    def _note(self, where: Tensor, info: dict[str, Any]) -> None:
        for name, value in info.items():
            if isinstance(value, Tensor) and value.shape == where.shape:
                whole = self.info.setdefault(name, torch.full_like(self.residual, math.nan))
                whole[where] = value.to(whole.dtype)
                continue
            if name in _SIZES and isinstance(value, float):
                value = self.system.from_unit(value)
            if name == "lowest_curvature" and name in self.info:
                value = min(self.info[name], value)
            self.info[name] = value

    def verdict(self, method: str) -> Solution:
        """Return all rows with what is known of them."""
        info = {"tolerance": self.system.tolerance, "attainable": self.attainable, **self.info}
        if "unchecked" not in info and self.system.is_positive:
            info["error_bound"] = self.bound
        info = {name: info[name] for name in sorted(info)}
        status, iterations = tuple(self.status), tuple(self.iterations)
        return Solution(self.x, status, self.residual, iterations, self.system.given_damping, method, info)


def _failed_for_good(raw: Raw, where: Tensor) -> Tensor:
    """Return for each row whether it failed whatever its residual."""
    failed = [raw.failed.get(i) in FOR_GOOD for i in range(len(where))]
    return torch.tensor(failed, dtype=torch.bool, device=where.device)


def _largest(rows: Tensor) -> Tensor:
    """Return the size of the largest entry of each row, NaN where one is NaN, without a copy of the rows."""
    if not rows.numel():
        return rows.new_zeros(rows.shape[0])
    # Of 200 rows of 4,810, 0.1 ms; a norm of order infinity along an axis takes 2.4.
    return torch.maximum(rows.amax(1), rows.amin(1).neg_())


def times(rows: Tensor, shift: Tensor) -> Tensor:
    """Return rows times powers of two, in two halves where one power would leave the range of the dtype."""
    # Exponents whose power of two, and its inverse, are normal numbers (limits: 126 and 1022).
    most = 120 if rows.dtype == torch.float32 else 1000
    one = torch.ones(len(shift), 1, dtype=rows.dtype, device=rows.device)
    shift = shift.clamp(-2 * most, 2 * most).unsqueeze(1)
    if not shift.numel() or int(shift.abs().max()) <= most:
        return rows * torch.ldexp(one, shift)
    half = shift // 2
    return rows * torch.ldexp(one, half) * torch.ldexp(one, shift - half)


def _scaled_back(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows times powers of two; the rows as the dtype's range left them; and the relative change by it."""
    scaled, (low, high) = times(x, shift), _EXACT[x.dtype]
    largest = _largest(x)
    reached = torch.frexp(largest).exponent + shift
    edge = largest.isfinite() & (largest > 0) & ((reached < low) | (reached > high))
    loss = torch.zeros_like(largest, dtype=torch.float64)
    if not bool(edge.any()):
        return scaled, x, loss
    back = times(scaled[edge], -shift[edge])
    size = torch.linalg.vector_norm(x[edge], dim=1, dtype=torch.float64)
    loss[edge] = torch.linalg.vector_norm(back - x[edge], dim=1, dtype=torch.float64) / size
    x = x.clone()
    x[edge] = back
    return scaled, x, loss
