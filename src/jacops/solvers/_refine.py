"""Iterate, look at the true residual, and iterate on that: what recurrences claim is always computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._judge import FOR_GOOD, Raw
from ._solution import Status
from ._system import System

_ROUNDS = 5  # each has to halve the residual; at the rounding level none does, and one or two reach it


Ended = tuple[Status | None, Tensor]  # how rows end, None for success, and of which rows that is true


@dataclass(eq=False)
class IterationResult:
    """What one run of an iteration from zero did.

    Attributes:
        x: Where it came to, `(k, n)`.
        steps: Steps per row.
        failed: Rows that failed and how.
        norm: The largest stretch that it saw, a lower bound of the operator's norm.
        lowest: The lowest curvature that it saw, an upper bound of the lowest eigenvalue; None if none.
        reason: Why it broke down, if it did.
    """

    x: Tensor
    steps: list[int]
    failed: dict[int, Status] = field(default_factory=dict)
    norm: float = 0.0
    lowest: float | None = None
    reason: str = ""

    @classmethod
    def start(cls, rows: Tensor) -> IterationResult:
        """Return where an iteration begins: at zero, for each row."""
        return cls(torch.zeros_like(rows), [0] * rows.shape[0])

    def end(self, rows: Tensor, step: int, status: Status | None = None) -> None:
        """Note the numbers of rows that end at a step, and how those of them end that failed."""
        for row in rows.tolist():
            self.steps[row] = step
            if status is not None:
                self.failed[row] = status

    def is_negative(self, system: System, norm: float, lowest: float) -> bool:
        """Note a stretch and a curvature that were seen; return whether the lowest one is negative beyond rounding."""
        self.norm, self.lowest = max(self.norm, norm), min(lowest, math.inf if self.lowest is None else self.lowest)
        if self.lowest < -noise(system) * self.norm:
            self.norm = max(self.norm, system.norm)  # rounding of a norm not seen yet is no curvature
        return self.lowest < -noise(system) * self.norm

    def settle(self, ids: Tensor, x: Tensor, step: int, ended: Iterable[Ended]) -> Tensor:
        """Note the rows that end at a step, each by the first status that is true of it; return which go on.

        Args:
            ids: The numbers of the rows that are left.
            x: Where these came to.
            step: How many steps they took.
            ended: How, in order of precedence.
        """
        active = torch.ones_like(ids, dtype=torch.bool)
        for status, flags in ended:
            self.end(ids[flags & active], step, status)
            active = active & ~flags
        self.x[ids[~active]] = x[~active]
        return active


def noise(system: System) -> float:
    """Return what rounding may make of a curvature of zero, relative to the norm."""
    return system.n**0.5 * system.eps


Iteration = Callable[[Tensor, Tensor, int], IterationResult]
Residual = Callable[[Tensor, Tensor], Tensor]


def refined(
    system: System, rows: Tensor, most: int, run: Iteration, residual: Residual | None = None, share: float = 1.0
) -> Raw:
    """Run an iteration on the residual until that is small or no longer halves (iterative refinement).

    Args:
        system: The equations.
        rows: Right-hand sides, `(k, n)`.
        most: Steps per row altogether.
        run: Iterates from zero on right-hand sides, to residuals of norm `goals` per row, in at most so many steps.
        residual: Returns residuals in double; by default those of the system.
        share: Of the tolerance, to which residuals are brought down.
    """
    k = rows.shape[0]
    x, left = torch.zeros_like(rows), rows.to(torch.float64, copy=True)
    size = torch.linalg.vector_norm(left, dim=1)
    goals, now = share * system.tolerance * size, size.clone()
    steps, failed = [0] * k, {}
    info: dict[str, Any] = {}
    norm = 0.0
    todo = torch.arange(k, device=rows.device)
    for round in range(_ROUNDS):
        # residuals are run at the size of right-hand sides, so that squares do not underflow
        ratio = (size / now)[todo, None]
        result = run((left[todo] * ratio).to(x.dtype), goals[todo] * ratio[:, 0], most - max(steps))
        norm = max(norm, result.norm)
        if result.lowest is not None:
            info["lowest_curvature"] = min(result.lowest, info.get("lowest_curvature", result.lowest))
        if result.reason:
            info["reason"] = result.reason
        better = x[todo] + (result.x / ratio).to(x.dtype)
        ended = {i: status for i, status in result.failed.items() if round == 0 or status == Status.NEGATIVE_CURVATURE}
        left_then = _true_residuals(residual or system.residual, better, rows[todo], ended)
        then = torch.linalg.vector_norm(left_then, dim=1)
        won = then < now[todo]
        halved = then <= 0.5 * now[todo]
        kept = won | (round == 0)
        x[todo] = torch.where(kept[:, None], better, x[todo])
        left[todo] = torch.where(kept[:, None], left_then, left[todo])
        now[todo] = torch.where(kept, then, now[todo])
        for i, row in enumerate(todo.tolist()):
            steps[row] += result.steps[i]
            if i in ended:
                failed[row] = ended[i]
        goals = goals.maximum(system.eps * norm * torch.linalg.vector_norm(x, dim=1, dtype=torch.float64))
        again = [
            row
            for row, good in zip(todo.tolist(), halved.tolist(), strict=True)
            if good and row not in failed and float(now[row]) > float(goals[row]) and steps[row] < most
        ]
        todo = torch.tensor(again, dtype=torch.long, device=rows.device)
        if not again:
            break
    return Raw(x, steps, failed, norm or None, info, left=now)


def _true_residuals(residual: Residual, x: Tensor, b: Tensor, ended: dict[int, Status]) -> Tensor:
    """Return residuals, NaN for the rows of which no residual is asked since they failed for good."""
    asked = torch.tensor([ended.get(i) not in FOR_GOOD for i in range(len(x))], device=x.device)
    if bool(asked.all()):
        return residual(x, b)
    left = torch.full_like(x, math.nan, dtype=torch.float64)
    left[asked] = residual(x[asked], b[asked])
    return left
