"""LiSSA: the truncated Neumann series of the inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._operators import Operator
from .._requirements import check_range
from ._base import Prepared, PreparedBy, Solver
from ._judge import Raw
from ._refine import IterationResult, noise, read
from ._solution import Status
from ._system import System, symmetric_system

_WINDOW = 10  # steps between two looks at the residual: one that has not shrunk since then never will


@final
@dataclass(frozen=True)
class LiSSA(Solver):
    r"""The series $x = \frac1s \sum_j (I - A/s)^j b$ (Agarwal, Bullins and Hazan, 2017), with exact products.

    Its terms are the residuals. For a symmetric operator, once they grow over some steps, they never decrease again:
    the first window of ten steps over which they grow ends the solve, as `diverged` with the scale to use in
    `info["scale_needed"]`, or as `negative_curvature`, which no scale avoids. It takes about $\log(1/\text{tolerance})$
    times the condition number of steps; it is a baseline, conjugate gradients need the root of that.

    Attributes:
        scale: $s$, above half of the largest eigenvalue; by default an estimate of that.
        tolerance: On the relative residual; 1e-8 in float64, 1e-4 in float32.
        max_steps: At most so many terms.
    """

    scale: float | None = None
    tolerance: float | None = None
    max_steps: int = 5_000

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Find the scale.

        Raises:
            InputError: The operator is not symmetric, or an option is out of range.
        """
        if self.scale is not None:
            check_range("scale", self.scale)
        system = symmetric_system(operator, damping, "LiSSA", self.tolerance, self.max_steps)
        scale = (system.in_unit(self.scale) if self.scale is not None else system.norm) or 1.0
        return PreparedBy(system, "LiSSA", lambda rows: _summed(system, scale, self.max_steps, rows))


def _summed(system: System, scale: float, most: int, rows: Tensor) -> Raw:
    """Add up terms of the series for each row."""
    result, info, left = IterationResult.start(rows), {"scale": scale}, list(range(rows.shape[0]))
    x, r = torch.zeros_like(rows), rows
    before = rows.norm(dim=1)
    goals = system.tolerance * before
    for step in range(most + 1):
        now = r.norm(dim=1)
        # A residual at its rounding level wavers by some roundings; growth is a factor per step.
        grown = (now > before * (1 + 100 * system.eps)) & (now > goals)
        done, finite, grew = read(now <= goals, now.isfinite(), grown)
        ended: dict[int, tuple[int, Status | None]] = dict.fromkeys(done.nonzero()[0].tolist(), (step, None))
        if not finite.all():
            status = _overflowed(system, info)
            ended |= {i: (step, status) for i in (1 - finite).nonzero()[0].tolist()}
        if step and step % _WINDOW == 0:
            growing = [i for i in grew.nonzero()[0].tolist() if i not in ended]
            if growing:
                negative = _is_negative(system, r[growing], info).tolist()
                kinds = [Status.NEGATIVE_CURVATURE if is_so else Status.DIVERGED for is_so in negative]
                ended |= {i: (step, kind) for i, kind in zip(growing, kinds, strict=True)}
            before = now
        if step == most:
            ended = dict.fromkeys(range(len(left)), (step, Status.MAX_STEPS)) | ended
        going = result.settle(left, x, ended)
        if not left:
            break
        if going is not None:
            x, r, before, goals = (value[going] for value in (x, r, before, goals))
        x = x + r / scale
        r = r - system.apply(r, finite=True) / scale
    return Raw(result.x, result.steps, result.failed, info=info)


def _overflowed(system: System, info: dict[str, Any]) -> Status:
    """Return why residuals are not finite: they grew beyond the range of the dtype, or products are not finite."""
    if not math.isfinite(system.norm):
        return Status.BREAKDOWN
    info["scale_needed"] = system.norm
    return Status.DIVERGED


def _is_negative(system: System, r: Tensor, info: dict[str, Any]) -> Tensor:
    """Return whether residuals grow along negative curvature: of what grows they are mostly made."""
    unit = r / r.norm(dim=1, keepdim=True)
    image = system.apply(unit)
    curvature = (unit * image).sum(1)
    largest = max(system.norm, float(image.norm(dim=1).max()))
    negative = curvature < -noise(system) * largest
    if bool(negative.any()):
        info["lowest_curvature"] = float(curvature.min())
    else:
        info["scale_needed"] = largest
    return negative
