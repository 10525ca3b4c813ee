"""The judge: sets aside the rows that need no solver, and gives each of the others a status by its true residual."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from .._finite import where_first
from ._solution import Solution, Status
from ._system import System

_FOR_GOOD = {Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.BREAKDOWN, Status.DIVERGED}


def condition_limit(dtype: torch.dtype) -> float:
    """Return the condition number from which a matrix counts as singular in a precision."""
    return 1e14 if dtype == torch.float64 else 1e6


@dataclass(eq=False)
class Raw:
    """What a method hands back for finite right-hand sides that are not zero; the judge makes a `Solution` of it.

    Attributes:
        x: Solutions, `(k, n)`.
        iterations: Steps per row.
        failed: Rows that failed and how; the others are judged by their residual.
        norm: A lower estimate of the norm of the damped operator, where the method has one for free.
        info: The method's own figures; tensors of length k are per row.
        left: Norms of the true residuals, `(k,)` in double, where the method has just computed them.
        approximate: The answer is an approximation by design: a residual above the tolerance is no failure.
        unchecked: Its residual was not asked for: it is NaN.
    """

    x: Tensor
    iterations: list[int]
    failed: dict[int, Status] = field(default_factory=dict)
    norm: float | None = None
    info: dict[str, Any] = field(default_factory=dict)
    left: Tensor | None = None
    approximate: bool = False
    unchecked: bool = False


@final
class Judge:
    r"""Right-hand sides and what becomes of them.

    Rows are scaled by powers of two to entries of at most 1, so that tiny and huge gradients are solved alike.

    Attributes:
        rows: The scaled right-hand sides.
        solvable: Indices of the rows that are finite and not zero; zero rows have the solution zero, in no step.
        info: Figures, collected.
    """

    def __init__(self, system: System, tolerance: float, rows: Tensor) -> None:
        k, device = rows.shape[0], rows.device
        largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(k)
        finite, zero = largest.isfinite(), largest == 0
        least = 1000 if rows.dtype == torch.float64 else 120
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-least, least) - 1)
        self.scale = torch.where(finite & ~zero, scale, 1.0)
        self.rows = rows / self.scale.unsqueeze(1)
        self.size = torch.linalg.vector_norm(self.rows, dim=1, dtype=torch.float64)
        self.solvable = (finite & ~zero).nonzero()[:, 0]
        self.system, self.tolerance = system, tolerance
        nan = torch.full((k,), math.nan, dtype=torch.float64, device=device)
        self.x = torch.zeros_like(rows)
        self.x[~finite] = math.nan
        self.residual = torch.where(finite, torch.zeros_like(nan), nan)
        self.attainable, self.bound = self.residual.clone(), self.residual.clone()
        self.status = [Status.CONVERGED if ok else Status.NONFINITE_INPUT for ok in finite.tolist()]
        self.iterations = [0] * k
        self.info: dict[str, Any] = {"approximate": False}
        if not bool(finite.all()):
            self.info["nonfinite"] = where_first(rows)

    def take(self, where: Tensor, raw: Raw) -> None:
        """Judge what a method found for some rows."""
        system, x = self.system, raw.x
        left = torch.full_like(self.size[where], math.nan) if raw.unchecked else raw.left
        if left is None:
            left = torch.linalg.vector_norm(system.residual(x, self.rows[where]), dim=1)
        length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        norm = max(raw.norm or system.norm, system.damping)
        reach = norm * length / self.size[where]
        self.residual[where] = left / self.size[where]
        self.attainable[where] = system.eps * reach
        if system.is_positive:
            rounding = system.eps * max(4.0, math.sqrt(system.n)) * (norm * length + self.size[where])
            self.bound[where] = (left + rounding) / system.damping * self.scale[where]
        self.x[where] = x * self.scale[where].unsqueeze(1)
        finite = self.x[where].isfinite().all(1) & (left.isfinite() | raw.unchecked)
        self.info["approximate"] |= raw.approximate
        if raw.unchecked:
            self.info["unchecked"] = True
        facts = zip(where.tolist(), self.residual[where].tolist(), reach.tolist(), finite.tolist(), strict=True)
        for i, (row, residual, condition, ok) in enumerate(facts):
            self.iterations[row] = raw.iterations[i]
            self.status[row] = self._status(raw.failed.get(i), residual, condition, ok, raw.approximate)

        self._note(where, raw.info)

    def _status(self, failed: Status | None, residual: float, condition: float, finite: bool, approx: bool) -> Status:
        if failed is not None and failed in _FOR_GOOD:
            return failed
        if not finite:
            return Status.BREAKDOWN
        if approx:
            return failed or Status.CONVERGED
        limit = condition_limit(self.system.dtype)
        if residual <= self.tolerance or (residual <= self.system.eps * condition and condition <= limit):
            return Status.CONVERGED
        return Status.SINGULAR if condition > limit else failed or Status.STAGNATED

    def _note(self, where: Tensor, info: dict[str, Any]) -> None:
        for name, value in info.items():
            if isinstance(value, Tensor) and value.shape == where.shape:
                whole = self.info.setdefault(name, torch.full_like(self.residual, math.nan))
                whole[where] = value.to(whole.dtype)
            elif name == "lowest_curvature" and name in self.info:
                self.info[name] = min(self.info[name], value)
            else:
                self.info[name] = value

    def verdict(self, method: str) -> Solution:
        """Return all rows with what is known of them."""
        info = {"tolerance": self.tolerance, "attainable": self.attainable, **self.info}
        if self.system.is_positive:
            info["error_bound"] = self.bound
        info = {name: info[name] for name in sorted(info)}
        status, iterations = tuple(self.status), tuple(self.iterations)
        return Solution(self.x, status, self.residual, iterations, self.system.damping, method, info)
