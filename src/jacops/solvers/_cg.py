"""Conjugate gradients, row by row as in the textbook or with one Krylov space for all right-hand sides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._operators import Operator
from ._base import Prepared, PreparedBy, Solver
from ._block import block_iteration
from ._judge import Raw, condition_limit
from ._kept import Kept
from ._precondition import Preconditioner, preconditioner_of
from ._refine import IterationResult, noise, read, refined
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
            approximates the inverse; or a solver such as `EKFAC()`. It has to be positive definite.
        block: Whether right-hand sides share their Krylov space.
        tolerance: On the relative residual; 1e-8 in float64, 1e-4 in float32.
        max_steps: At most so many steps per row; by default ten for each unknown, 100 to 10,000.
        rank: Of the sketch; by default found as above.
        max_rank: Of the sketch where it is found.
        seed: Of the sketch.
        kept: Where stored runs keep the states of long solves, from which a killed run continues; for blocks only.
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
    """Run preconditioned conjugate gradients on each row from zero.

    How rows stand is read from the device once a step: what ends a row in a product is acted upon at the next step, and
    the row stays where it is until then.
    """
    result, left = IterationResult.start(rows), list(range(rows.shape[0]))
    x, r, size = torch.zeros_like(rows), rows, rows.norm(dim=1)
    p = z = inner(r)
    rz = (r * z).sum(1)
    seen = _Seen.nothing(size)
    for step in range(most + 1):
        finished = r.norm(dim=1) <= goals.maximum(0.5 * system.eps * seen.norm * x.norm(dim=1))
        ended = seen.ended(system, result, step, finished, (rz > 0) & p.isfinite().all(1))
        if step == most:
            ended = dict.fromkeys(range(len(left)), (step, Status.MAX_STEPS)) | ended
        going = result.settle(left, x, ended)
        if not left:
            break
        if going is not None:
            x, r, p, rz, goals, size = (value[going] for value in (x, r, p, rz, goals, size))
        Ap = system.apply(p, finite=True)
        curvature = (p * Ap).sum(1)
        far = result.norm * x.norm(dim=1) > condition_limit(system.dtype) * size
        seen = _Seen.along(p, Ap, curvature, far, result.norm)
        alpha = torch.where(seen.stopped, 0, rz / curvature).unsqueeze(1)
        x = x + alpha * p
        r = torch.where(seen.stopped[:, None], r, r - alpha * Ap)
        z = inner(r)
        along = (r * z).sum(1)
        p, rz = z + (along / rz).unsqueeze(1) * p, along
    if Status.BREAKDOWN in result.failed.values():
        result.reason = "the preconditioner is not positive definite, or a product is not finite"
    return result


@dataclass(eq=False)
class _Seen:
    """What a step measured of the operator, on its device.

    Attributes:
        broken: Rows whose product is not finite.
        flat: Rows along whose direction the curvature is negligible or negative.
        relative: The curvature along each direction of unit length.
        norm: The largest stretch so far.
    """

    broken: Tensor
    flat: Tensor
    relative: Tensor
    norm: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> _Seen:
        """Return what is seen before the first step."""
        none = torch.zeros_like(like, dtype=torch.bool)
        return cls(none, none, torch.full_like(like, math.inf), like.new_zeros(()))

    @classmethod
    def along(cls, p: Tensor, Ap: Tensor, curvature: Tensor, far: Tensor, norm: float) -> _Seen:
        """Return what a product along the directions `p` shows; `far` are rows of which no digit is left."""
        square = (p * p).sum(1)
        stretch = (Ap.norm(dim=1) / square.sqrt()).nan_to_num(0, 0, 0).max()
        return cls(~curvature.isfinite(), (curvature <= 0) | far, curvature / square, stretch.clamp_min(norm))

    @property
    def stopped(self) -> Tensor:
        """The rows that a step does not move."""
        return self.broken | self.flat

    def ended(
        self, system: System, result: IterationResult, step: int, finished: Tensor, sound: Tensor
    ) -> dict[int, tuple[int, Status | None]]:
        """Return which rows end and how, by place; note norm and lowest curvature."""
        broken, flat, relative, norm, done, fit = read(
            self.broken, self.flat, self.relative, self.norm, finished, sound
        )
        known = relative[np.isfinite(relative)]
        if known.size:
            result.is_negative(system, float(norm), float(known.min()))
        result.norm = max(result.norm, float(norm))
        negative = relative < -noise(system) * result.norm
        ended: dict[int, tuple[int, Status | None]] = {}
        for i in range(len(done)):
            if broken[i]:
                ended[i] = step - 1, Status.BREAKDOWN
            elif flat[i]:
                ended[i] = step - 1, Status.NEGATIVE_CURVATURE if negative[i] else Status.SINGULAR
            elif done[i]:
                ended[i] = step, None
            elif not fit[i]:
                ended[i] = step, Status.BREAKDOWN
        return ended


def steps_allowed(max_steps: int | None, n: int) -> int:
    """Return the number of steps meant."""
    # In exact arithmetic n steps are enough; rounding multiplies that by some, and 10,000 take too long in any case.
    return max_steps if max_steps is not None else min(max(10 * n, 100), 10_000)
