"""LiSSA: the truncated Neumann series of the inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._requirements import check_range
from ..operators import Operator
from ._base import Prepared, Solver
from ._cg import check_options
from ._judge import Raw
from ._solution import Status
from ._system import System, check_symmetric

_WINDOW = 10  # steps between two looks at the residual: one that has not shrunk since then never will


@final
@dataclass(frozen=True)
class LiSSA(Solver):
    r"""The series $x = \frac1s \sum_j (I - A/s)^j b$ (Agarwal, Bullins and Hazan, 2017), with exact products.

    Its terms are the residuals. Those of a symmetric operator, once they grow over some steps, grow for ever: the first
    window of ten steps over which they do ends the solve, as `diverged` with the scale to use in
    `info["scale_needed"]`, or as `negative_curvature`, which no scale mends. It takes about $\log(1/\text{tolerance})$
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
        check_options(self.tolerance, self.max_steps)
        if self.scale is not None:
            check_range("scale", self.scale)
        system = System(operator, damping, self.tolerance)
        check_symmetric(system, "LiSSA")
        scale = system.in_unit(self.scale) if self.scale is not None else system.norm
        return _PreparedLiSSA(self, system, scale or 1.0)


@final
class _PreparedLiSSA(Prepared):
    method = "LiSSA"

    def __init__(self, recipe: LiSSA, system: System, scale: float) -> None:
        self.recipe, self.system, self.scale = recipe, system, scale

    def _solve(self, rows: Tensor) -> Raw:
        k = rows.shape[0]
        raw = Raw(torch.zeros_like(rows), [0] * k, info={"scale": self.scale})
        ids, x, r = torch.arange(k, device=rows.device), torch.zeros_like(rows), rows
        size = rows.norm(dim=1)
        goals, before = self.system.tolerance * size, size
        for step in range(self.recipe.max_steps + 1):
            now = r.norm(dim=1)
            lost = ~now.isfinite()
            ended = (now <= goals[ids]) | lost
            self._overflowed(raw, ids[lost])
            if step and step % _WINDOW == 0:
                # A residual at its rounding level wavers by some roundings; growth is a factor per step.
                grown = (now > before * (1 + 100 * self.system.eps)) & ~ended
                self._grew(raw, ids[grown], r[grown])
                ended, before = ended | grown, now
            if step == self.recipe.max_steps:
                raw.failed.update(dict.fromkeys(ids[~ended].tolist(), Status.MAX_STEPS))
                ended = torch.ones_like(ended)
            raw.x[ids[ended]] = x[ended]
            for row in ids[ended].tolist():
                raw.iterations[row] = step
            if bool(ended.all()):
                break
            ids, x, r, before = (value[~ended] for value in (ids, x, r, before))
            x = x + r / self.scale
            r = r - self.system.apply(r) / self.scale
        return raw

    def _overflowed(self, raw: Raw, ids: Tensor) -> None:
        """Note that residuals grew beyond the range of the dtype, unless products themselves are not finite."""
        if len(ids) and math.isfinite(self.system.norm):
            raw.failed.update(dict.fromkeys(ids.tolist(), Status.DIVERGED))
            raw.info["scale_needed"] = self.system.norm

    def _grew(self, raw: Raw, ids: Tensor, r: Tensor) -> None:
        """Say why residuals grow: of what grows they are mostly made."""
        if not len(ids):
            return
        unit = r / r.norm(dim=1, keepdim=True)
        image = self.system.apply(unit)
        curvature: Any = (unit * image).sum(1)
        largest = max(self.system.norm, float(image.norm(dim=1).max()))
        negative = curvature < -(self.system.n**0.5) * self.system.eps * largest
        for row, below in zip(ids.tolist(), negative.tolist(), strict=True):
            raw.failed[row] = Status.NEGATIVE_CURVATURE if below else Status.DIVERGED
        if bool(negative.any()):
            raw.info["lowest_curvature"] = float(curvature.min())
        else:
            raw.info["scale_needed"] = largest
