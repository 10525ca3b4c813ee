"""Conjugate gradients, row by row as in the textbook or with one Krylov space for all right-hand sides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..errors import InputError, explain
from ..operators import Operator
from ._base import Prepared, Solver
from ._block import block_course, noise
from ._judge import Raw, condition_limit
from ._precondition import Preconditioner, preconditioner_of
from ._refine import IterationResult, refined
from ._solution import Status
from ._system import System, check_symmetric


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
    """

    preconditioner: Any = None
    block: bool = True
    tolerance: float | None = None
    max_steps: int | None = None
    rank: int | None = None
    max_rank: int = 512
    seed: int = 0

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Build the preconditioner.

        Raises:
            InputError: The operator is not symmetric, or an option is out of range.
        """
        check_options(self.tolerance, self.max_steps)
        system = System(operator, damping)
        check_symmetric(system, "CG")
        inner = preconditioner_of(system, self.preconditioner, self.rank, self.max_rank, self.seed)
        return PreparedCG(self, system, inner)


@final
class PreparedCG(Prepared):
    """Conjugate gradients with their preconditioner built."""

    def __init__(self, recipe: CG, system: System, inner: Preconditioner) -> None:
        self.recipe, self.system, self.inner = recipe, system, inner
        self.method = ("block " if recipe.block else "") + "CG"
        self.most = steps_allowed(recipe.max_steps, system.n)

    @property
    def tolerance(self) -> float:
        """On the relative residual."""
        return self.recipe.tolerance or self.system.tolerance

    def _solve(self, rows: Tensor) -> Raw:
        course = block_course if self.recipe.block else row_course

        def run(rows: Tensor, goals: Tensor, most: int) -> IterationResult:
            return course(self.system, self.inner.apply, rows, goals, most)

        raw = refined(self.system, rows, self.tolerance, self.most, run)
        raw.info.update(self.inner.info)
        return raw


def row_course(system: System, inner: Any, rows: Tensor, goals: Tensor, most: int) -> IterationResult:
    """Run preconditioned conjugate gradients on each row from zero."""
    course = IterationResult(torch.zeros_like(rows), [0] * rows.shape[0])
    ids = torch.arange(rows.shape[0], device=rows.device)
    x, r = torch.zeros_like(rows), rows
    p = z = inner(r)
    rz = (r * z).sum(1)
    for step in range(most + 1):
        reach = course.norm * x.norm(dim=1)
        finished = r.norm(dim=1) <= goals[ids].maximum(0.5 * system.eps * reach)
        last = step == most or bool(finished.all())
        Ap = p if last else system.apply(p)
        bend = (p * Ap).sum(1)
        bad = {Status.BREAKDOWN: ~(rz > 0) | ~bend.isfinite()}
        if not last:
            bad[Status.NEGATIVE_CURVATURE] = _is_negative(system, course, p, Ap, bend, ~finished)
            bad[Status.SINGULAR] = (bend <= 0) | (reach > condition_limit(system.dtype) * rows[ids].norm(dim=1))
        going = _settle(course, ids, x, step, finished, bad, last)
        if not bool(going.any()):
            break
        ids, x, r, p, rz, Ap, bend = (value[going] for value in (ids, x, r, p, rz, Ap, bend))
        pace = (rz / bend).unsqueeze(1)
        x, r = x + pace * p, r - pace * Ap
        z = inner(r)
        along = (r * z).sum(1)
        p, rz = z + (along / rz).unsqueeze(1) * p, along
    return course


def _is_negative(system: System, course: IterationResult, p: Tensor, Ap: Tensor, bend: Tensor, alive: Tensor) -> Tensor:
    """Say along which directions the curvature is negative, beyond rounding, and note norm and lowest curvature."""
    square = (p * p).sum(1)
    curvature = bend / square
    course.norm = max(course.norm, float((Ap.norm(dim=1) / square.sqrt()).nan_to_num(0, 0, 0).max()))
    seen = curvature[alive & curvature.isfinite()]
    if len(seen):
        course.lowest = min(float(seen.min()), math.inf if course.lowest is None else course.lowest)
        if course.lowest < -noise(system) * course.norm:
            course.norm = max(course.norm, system.norm)  # rounding of a norm not seen yet is no curvature
    return curvature < -noise(system) * course.norm


def _settle(
    course: IterationResult, ids: Tensor, x: Tensor, step: int, finished: Tensor, bad: dict[Status, Tensor], last: bool
) -> Tensor:
    """Write down the rows that end here; return which go on."""
    going = ~finished
    for status, flags in bad.items():
        hit = flags & going
        for row in ids[hit].tolist():
            course.failed[row] = status
            if status == Status.BREAKDOWN:
                course.reason = "the preconditioner is not positive definite, or a product is not finite"
        going = going & ~hit
    if last:
        course.failed.update(dict.fromkeys(ids[going].tolist(), Status.MAX_STEPS))
        going = torch.zeros_like(going)
    course.x[ids[~going]] = x[~going]
    for row in ids[~going].tolist():
        course.steps[row] = step
    return going


def steps_allowed(max_steps: int | None, n: int) -> int:
    """Return the number of steps meant."""
    return max_steps if max_steps is not None else min(max(10 * n, 100), 10_000)


def check_options(tolerance: float | None, max_steps: int | None) -> None:
    """Refuse options out of range.

    Raises:
        InputError: One is.
    """
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(explain("tolerance", repr(tolerance), "a number between 0 and 1 is needed"))
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1):
        raise InputError(explain("max_steps", repr(max_steps), "a positive integer is needed"))
