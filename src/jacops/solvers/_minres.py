"""MINRES: the smallest residual of a symmetric operator that need not be definite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._operators import Operator
from ._base import Prepared, Solver
from ._cg import check_options, steps_allowed
from ._judge import Raw, condition_limit
from ._refine import IterationResult, refined
from ._solution import Status
from ._system import System, check_symmetric

_WATCHED = 200  # steps of the first row whose Ritz values are looked at: the lowest shows early


@final
@dataclass(frozen=True)
class MINRES(Solver):
    """Minimal residuals for symmetric operators, indefinite ones included (Paige and Saunders, 1975).

    It never fails for negative curvature; the lowest Ritz value of the first right-hand side stands in
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
        check_options(self.tolerance, self.max_steps)
        system = System(operator, damping, self.tolerance)
        check_symmetric(system, "MINRES")
        return _PreparedMINRES(self, system)


@final
class _PreparedMINRES(Prepared):
    method = "MINRES"

    def __init__(self, recipe: MINRES, system: System) -> None:
        self.recipe, self.system = recipe, system

    def _solve(self, rows: Tensor) -> Raw:
        def run(rows: Tensor, goals: Tensor, most: int) -> IterationResult:
            return _iterated(self.system, rows, goals, most)

        return refined(self.system, rows, steps_allowed(self.recipe.max_steps, self.system.n), run)


def _iterated(system: System, rows: Tensor, goals: Tensor, most: int) -> IterationResult:
    """Run Lanczos's recurrence on each row and rotate its tridiagonal matrix to a triangular one as it grows."""
    result = IterationResult.start(rows)
    ids = torch.arange(rows.shape[0], device=rows.device)
    start = rows.norm(dim=1)
    zero, one = torch.zeros_like(start), torch.ones_like(start)
    x, v, old = torch.zeros_like(rows), rows / start[:, None], torch.zeros_like(rows)
    w, w_old = torch.zeros_like(rows), torch.zeros_like(rows)
    left, beta = start.clone(), zero  # `left` is the residual, with a sign
    watched: list[tuple[Tensor, Tensor]] = []
    c_old, c, s_old, s = one, one, zero, zero
    for step in range(1, most + 1):
        image = system.apply(v)
        alpha = (v * image).sum(1)
        result.norm = max(result.norm, float(image.norm(dim=1).nan_to_num(0, 0, 0).max()))
        fresh = image - alpha[:, None] * v - beta[:, None] * old
        grown = fresh.norm(dim=1)
        if step <= _WATCHED and ids[0] == 0:
            watched.append((alpha[0], grown[0]))
        delta = c * alpha - c_old * s * beta
        rho = torch.hypot(delta, grown)
        flat = torch.hypot(delta, c * grown) <= 4 * system.eps * result.norm  # the gradient A r is zero
        w, w_old = (v - (s_old * beta)[:, None] * w_old - (s * alpha + c_old * c * beta)[:, None] * w) / rho[:, None], w
        c_old, s_old = c, s
        c, s = delta / rho, grown / rho
        then = x + (c * left)[:, None] * w
        x = torch.where(flat[:, None], x, then)
        left = torch.where(flat, left, -s * left)
        scale = result.norm * x.norm(dim=1)
        done = left.abs() <= goals[ids].maximum(0.5 * system.eps * scale)
        broken = ~torch.isfinite(left) & ~flat
        spent = flat | (grown <= 4 * system.eps * result.norm) | (scale > condition_limit(system.dtype) * start[ids])
        ended = done | broken | spent
        failed = {Status.SINGULAR: spent & ~done & ~broken, Status.BREAKDOWN: broken}
        if step == most:
            failed[Status.MAX_STEPS], ended = ~ended, torch.ones_like(ended)
        result.x[ids[ended]] = x[ended]
        result.end(ids[ended], step)
        for status, flags in failed.items():
            result.end(ids[flags], step, status)
        if bool(broken.any()):
            result.reason = "a product is not finite"
        if bool(ended.all()):
            break
        v, old, beta = fresh / grown[:, None], v, grown
        state = (ids, x, v, old, w, w_old, left, beta, c_old, c, s_old, s)
        ids, x, v, old, w, w_old, left, beta, c_old, c, s_old, s = (value[~ended] for value in state)
    result.lowest = _lowest(watched)
    return result


def _lowest(watched: list[tuple[Tensor, Tensor]]) -> float | None:
    """Return the lowest Ritz value of the first row."""
    if not watched:
        return None
    diagonal, beside = (torch.stack(part).double() for part in zip(*watched, strict=True))
    tridiagonal = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
    return float(torch.linalg.eigvalsh(tridiagonal)[0]) if bool(tridiagonal.isfinite().all()) else None
