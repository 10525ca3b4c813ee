"""Iterate, look at the true residual, and iterate on that: what recurrences claim is always computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._judge import FOR_GOOD, Raw
from ._solution import Status
from ._system import System

_ROUNDS = 5  # each has to halve the residual; at the rounding level none does, and one or two reach it


@dataclass(eq=False)
class IterationResult:
    """What one run of an iteration from zero did.

    Attributes:
        x: Where it came to, `(k, n)`.
        steps: Steps per row.
        failed: Rows that failed and how.
        norm: The largest stretch measured, a lower bound of the operator's norm.
        lowest: The lowest curvature measured, an upper bound of the lowest eigenvalue; None if none.
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

    def end(self, rows: Iterable[int], step: int, status: Status | None = None) -> None:
        """Note the numbers of rows that end at a step, and how those of them end that failed."""
        for row in rows:
            self.steps[row] = step
            if status is not None:
                self.failed[row] = status

    def is_negative(self, system: System, norm: float, lowest: float) -> bool:
        """Record a measured stretch and curvature; return whether the lowest curvature is negative beyond rounding."""
        self.norm, self.lowest = max(self.norm, norm), min(lowest, math.inf if self.lowest is None else self.lowest)
        if self.lowest < -noise(system) * self.norm:
            self.norm = max(self.norm, system.norm)  # rounding of a norm not seen yet is no curvature
        return self.lowest < -noise(system) * self.norm

    def settle(self, rows: list[int], x: Tensor, ended: Mapping[int, tuple[int, Status | None]]) -> Tensor | None:
        """Keep what rows that end came to.

        Args:
            rows: The numbers of the rows that are left; those that end are taken out.
            x: Where these came to.
            ended: By place among them, at which step and how some of them end; None for success.

        Returns:
            The places of those that go on, where some end; None where all go on.
        """
        if not ended:
            return None
        for place, (step, status) in ended.items():
            self.end([rows[place]], step, status)
        last = list(ended)
        self.x[[rows[place] for place in last]] = x[last]
        places = [place for place in range(len(rows)) if place not in ended]
        rows[:] = [rows[place] for place in places]
        return torch.tensor(places, dtype=torch.long, device=x.device)


def read(*parts: Tensor) -> list[np.ndarray]:
    """Return the values of small tensors in double precision, all in one copy from the device."""
    flat = torch.cat([part.detach().reshape(-1).to(torch.float64) for part in parts]).cpu().numpy()
    found, start = [], 0
    for part in parts:
        found.append(flat[start : start + part.numel()].reshape(part.shape))
        start += part.numel()
    return found


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
    x = left = rows  # until the first round, which starts at zero; its result counts whatever it is, without copies
    size = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    goals, now = share * system.tolerance * size, size.clone()
    steps, failed = [0] * k, {}
    info: dict[str, Any] = {}
    norm = 0.0
    todo = torch.arange(k, device=rows.device)
    for round in range(_ROUNDS):
        # residuals are run at the size of right-hand sides, so that squares do not underflow
        ratio = (size / now)[todo, None]
        start = rows if round == 0 else (left[todo] * ratio).to(x.dtype)
        result = run(start, goals[todo] * ratio[:, 0], most - max(steps))
        norm = max(norm, result.norm)
        if result.lowest is not None:
            info["lowest_curvature"] = min(result.lowest, info.get("lowest_curvature", result.lowest))
        if result.reason:
            info["reason"] = result.reason
        better = result.x.contiguous() if round == 0 else x[todo] + (result.x / ratio).to(x.dtype)
        ended = {i: status for i, status in result.failed.items() if round == 0 or status == Status.NEGATIVE_CURVATURE}
        left_then = _true_residuals(residual or system.residual, better, rows if round == 0 else rows[todo], ended)
        then = torch.linalg.vector_norm(left_then, dim=1)
        won = then < now[todo]
        halved = then <= 0.5 * now[todo]
        if round == 0:
            x, left, now = better, left_then, then
        else:
            x[todo] = torch.where(won[:, None], better, x[todo])
            left[todo] = torch.where(won[:, None], left_then, left[todo])
            now[todo] = torch.where(won, then, now[todo])
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
    """Return residuals, NaN for rows that failed whatever their residual."""
    asked = torch.tensor([ended.get(i) not in FOR_GOOD for i in range(len(x))], device=x.device)
    if bool(asked.all()):
        return residual(x, b)
    left = torch.full_like(x, math.nan, dtype=torch.float64)
    left[asked] = residual(x[asked], b[asked])
    return left
