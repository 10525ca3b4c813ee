"""Conjugate gradients, row by row as in the textbook or with one Krylov space for all right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from .._operators import Operator
from ._base import Prepared, PreparedBy, Solver
from ._block import block_iteration
from ._judge import Raw, condition_limit
from ._kept import Kept
from ._precondition import Preconditioner, preconditioner_of
from ._refine import Ended, IterationResult, noise, refined
from ._solution import Status
from ._system import System, symmetric_system


@final
@dataclass(frozen=True)
class CG(Solver):
    r"""Conjugate gradients for positive definite operators (Hestenes and Stiefel, 1952).

    With `block=True` all right-hand sides share one Krylov space (O'Leary, 1980), kept orthonormal and free of
    directions that depend on others (Ji and Li, 2017); rows that have converged leave it. Otherwise each row runs its
    own textbook iteration, all in one product per step. Negative curvature $p^\top A p < 0$ stops the rows that it
    concerns and is reported with its value: it is a bound on the damping needed.

    Attributes:
        preconditioner: None; `"jacobi"`, the diagonal; `"nystrom"`, a randomised sketch (Frangella, Tropp and Udell,
            2023), whose rank doubles until its smallest eigenvalue is at most ten times the damping; an operator that
            stands in for the inverse; or a solver such as `EKFAC()`. It has to be positive definite.
        block: Whether right-hand sides share their Krylov space.
        tolerance: On the relative residual; 1e-8 in float64, 1e-4 in float32.
        max_steps: At most so many steps per row; by default ten for each unknown, 100 to 10,000.
        rank: Of the sketch; by default found as above.
        max_rank: Of the sketch where it is found.
        seed: Of the sketch.
        kept: Where states of long solves are kept, by stored runs, to go on from after a kill; of blocks alone.
    """

    preconditioner: Any = None
    block: bool = True
    tolerance: float | None = None
    max_steps: int | None = None
    rank: int | None = None
    max_rank: int = 512
    seed: int = 0
    kept: Kept | None = field(default=None, repr=False, compare=False)

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Build the preconditioner.

        Raises:
            InputError: The operator is not symmetric, or an option is out of range.
        """
        system = symmetric_system(operator, damping, "CG", self.tolerance, self.max_steps)
        inner = preconditioner_of(system, self.preconditioner, self.rank, self.max_rank, self.seed)
        return prepared_cg(system, inner, steps_allowed(self.max_steps, system.n), self.block, self.kept)


def prepared_cg(
    system: System, inner: Preconditioner, most: int, block: bool = True, kept: Kept | None = None
) -> PreparedBy:
    """Return conjugate gradients with their preconditioner built, of so many steps at the most."""
    iteration = partial(block_iteration, kept=kept) if block else row_iteration

    def solve(rows: Tensor) -> Raw:
        raw = refined(system, rows, most, partial(iteration, system, inner.apply))
        raw.info.update(inner.info)
        return raw

    return PreparedBy(system, "block CG" if block else "CG", solve)


def row_iteration(system: System, inner: Any, rows: Tensor, goals: Tensor, most: int) -> IterationResult:
    """Run preconditioned conjugate gradients on each row from zero."""
    result = IterationResult.start(rows)
    ids = torch.arange(rows.shape[0], device=rows.device)
    x, r = torch.zeros_like(rows), rows
    p = z = inner(r)
    rz = (r * z).sum(1)
    for step in range(most + 1):
        scale = result.norm * x.norm(dim=1)
        finished = r.norm(dim=1) <= goals[ids].maximum(0.5 * system.eps * scale)
        last = step == most or bool(finished.all())
        Ap = p if last else system.apply(p)
        curvature = (p * Ap).sum(1)
        ended: list[Ended] = [(None, finished), (Status.BREAKDOWN, ~(rz > 0) | ~curvature.isfinite())]
        if last:
            ended.append((Status.MAX_STEPS, torch.ones_like(finished)))
        else:
            flat = (curvature <= 0) | (scale > condition_limit(system.dtype) * rows[ids].norm(dim=1))
            negative = _is_negative(system, result, p, Ap, curvature, ~finished)
            ended += [(Status.NEGATIVE_CURVATURE, negative), (Status.SINGULAR, flat)]
        active = result.settle(ids, x, step, ended)
        if not bool(active.any()):
            break
        ids, x, r, p, rz, Ap, curvature = (value[active] for value in (ids, x, r, p, rz, Ap, curvature))
        alpha = (rz / curvature).unsqueeze(1)
        x, r = x + alpha * p, r - alpha * Ap
        z = inner(r)
        along = (r * z).sum(1)
        p, rz = z + (along / rz).unsqueeze(1) * p, along
    if Status.BREAKDOWN in result.failed.values():
        result.reason = "the preconditioner is not positive definite, or a product is not finite"
    return result


def _is_negative(
    system: System, result: IterationResult, p: Tensor, Ap: Tensor, curvature: Tensor, active: Tensor
) -> Tensor:
    """Return along which directions the curvature is negative, beyond rounding; note norm and lowest curvature."""
    square = (p * p).sum(1)
    relative = curvature / square
    norm = float((Ap.norm(dim=1) / square.sqrt()).nan_to_num(0, 0, 0).max())
    seen = relative[active & relative.isfinite()]
    if len(seen):
        result.is_negative(system, norm, float(seen.min()))
    result.norm = max(result.norm, norm)
    return relative < -noise(system) * result.norm


def steps_allowed(max_steps: int | None, n: int) -> int:
    """Return the number of steps meant."""
    # In exact arithmetic n steps do; rounding takes some times as many, and 10,000 take too long anyway.
    return max_steps if max_steps is not None else min(max(10 * n, 100), 10_000)
