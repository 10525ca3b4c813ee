"""MINRES: the smallest residual of a symmetric operator that need not be definite."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor

from .._operators import Operator
from ._base import Prepared, PreparedBy, Solver
from ._cg import steps_allowed
from ._judge import condition_limit
from ._refine import IterationResult, read, refined
from ._solution import Status
from ._system import System, symmetric_system

_WATCHED = 200  # steps of the first row whose Ritz values are looked at: the lowest shows early


@final
@dataclass(frozen=True)
class MINRES(Solver):
    """Minimal residuals for symmetric operators, indefinite ones included (Paige and Saunders, 1975).

    It never fails for negative curvature; the lowest Ritz value of the first right-hand side is in
    `info["lowest_curvature"]`.

    Attributes:
        tolerance: On the relative residual; 1e-8 in float64, 1e-4 in float32.
        max_steps: At most so many steps per row; by default ten for each unknown, 100 to 10,000.
    """

    tolerance: float | None = None
    max_steps: int | None = None

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Check the operator.

        Raises:
            InputError: The operator is not symmetric, or an option is out of range.
        """
        system = symmetric_system(operator, damping, "MINRES", self.tolerance, self.max_steps)
        most = steps_allowed(self.max_steps, system.n)
        return PreparedBy(system, "MINRES", lambda rows: refined(system, rows, most, partial(_iterated, system)))


def _iterated(system: System, rows: Tensor, goals: Tensor, most: int) -> IterationResult:
    """Run Lanczos's recurrence on each row and rotate its tridiagonal matrix to a triangular one as it grows."""
    result, numbers = IterationResult.start(rows), list(range(rows.shape[0]))
    start = rows.norm(dim=1)
    zero, one = torch.zeros_like(start), torch.ones_like(start)
    x, v, old = torch.zeros_like(rows), rows / start[:, None], torch.zeros_like(rows)
    w, w_old = torch.zeros_like(rows), torch.zeros_like(rows)
    left, beta = start.clone(), zero  # `left` is the residual, with a sign
    watched: list[tuple[Tensor, Tensor]] = []
    c_old, c, s_old, s = one, one, zero, zero
    for step in range(1, most + 1):
        image = system.apply(v, finite=step > 1)
        alpha = (v * image).sum(1)
        norm = image.norm(dim=1).nan_to_num(0, 0, 0).max().clamp_min(result.norm)
        fresh = image - alpha[:, None] * v - beta[:, None] * old
        grown = fresh.norm(dim=1)
        if step <= _WATCHED and numbers[0] == 0:
            watched.append((alpha[0], grown[0]))
        delta = c * alpha - c_old * s * beta
        rho = torch.hypot(delta, grown)
        flat = torch.hypot(delta, c * grown) <= 4 * system.eps * norm  # the gradient A r is zero
        w, w_old = (v - (s_old * beta)[:, None] * w_old - (s * alpha + c_old * c * beta)[:, None] * w) / rho[:, None], w
        c_old, s_old = c, s
        c, s = delta / rho, grown / rho
        then = x + (c * left)[:, None] * w
        x = torch.where(flat[:, None], x, then)
        left = torch.where(flat, left, -s * left)
        scale = norm * x.norm(dim=1)
        done = left.abs() <= goals.maximum(0.5 * system.eps * scale)
        v, old, beta = fresh / grown[:, None], v, grown
        broken = ~torch.isfinite(left) & ~flat
        spent = flat | (grown <= 4 * system.eps * norm) | (scale > condition_limit(system.dtype) * start)
        broken = broken | ~(done | spent | v.isfinite().all(1))
        ended = _ended(result, step, step == most, read(norm, broken, done, spent))
        going = result.settle(numbers, x, ended)
        if not numbers:
            break
        if going is not None:
            state = (goals, start, x, v, old, w, w_old, left, beta, c_old, c, s_old, s)
            goals, start, x, v, old, w, w_old, left, beta, c_old, c, s_old, s = (part[going] for part in state)
    result.lowest = _lowest(watched)
    return result


def _ended(
    result: IterationResult, step: int, last: bool, seen: list[np.ndarray]
) -> dict[int, tuple[int, Status | None]]:
    """Return which rows end at a step and how, by place; note the norm, and why a row broke down."""
    result.norm = float(seen[0])
    if seen[1].any():
        result.reason = "a product is not finite"
    ended: dict[int, tuple[int, Status | None]] = {}
    for i, (broken, done, spent) in enumerate(zip(*seen[1:], strict=True)):
        if broken or done or spent or last:
            status = Status.SINGULAR if spent else Status.MAX_STEPS
            ended[i] = step, Status.BREAKDOWN if broken else None if done else status
    return ended


def _lowest(watched: list[tuple[Tensor, Tensor]]) -> float | None:
    """Return the lowest Ritz value of the first row."""
    if not watched:
        return None
    diagonal, beside = (torch.stack(part).double() for part in zip(*watched, strict=True))
    tridiagonal = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
    return float(torch.linalg.eigvalsh(tridiagonal)[0]) if bool(tridiagonal.isfinite().all()) else None
