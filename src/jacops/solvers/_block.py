"""Block conjugate gradients: one Krylov space for all right-hand sides (O'Leary, 1980; Ji and Li, 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._finite import is_finite
from .._saving import Savable
from ._judge import condition_limit
from ._kept import Kept, StateFile
from ._refine import IterationResult
from ._solution import Status
from ._system import System

_FLAT_STEPS = 50  # steps without curvature until the operator counts as singular: rounding makes a few of them flat

_Step = tuple[Tensor, Tensor, Tensor]  # directions, their products and their curvatures


def block_iteration(
    system: System, inner: Any, rows: Tensor, goals: Tensor, most: int, kept: Kept | None = None
) -> IterationResult:
    """Run preconditioned block conjugate gradients on all rows from zero, or from a state that was kept of this run.

    Each step minimises the error of every row over all directions, which are kept orthonormal, so that it neither
    matters how many rows there are nor whether some depend on others.
    """
    run = _BlockRun(system, inner, rows, goals)
    file = None if kept is None else StateFile(kept, BlockState, {"rows": rows, "goals": goals}, f"{most}")
    state = None if file is None else file.state(rows.device)
    if state is None or not run.restored(state):
        run.start()
    while bool(run.active.any()) and run.P.shape[0] and run.step < most:
        failed = run.advance()
        if failed is not None:
            return failed
        if file is not None and file.is_due():
            file.write(run.state())
    return run.ended()


@final
@dataclass(frozen=True, eq=False)
class BlockState(Savable):
    """Where an iteration stands between two steps: all that the next ones rest on.

    Attributes:
        x: Solutions.
        r: Residuals.
        directions: Of the next step.
        active: Which rows go on.
        step: Steps taken.
        flat: Those without curvature.
        steps: Of each row that ended.
        failed: Rows that failed, and how.
        norm: The largest stretch that was seen.
        lowest: The lowest curvature that was seen.
        exponent: The unit of the system.
        products: How many were made.
    """

    x: Tensor
    r: Tensor
    directions: Tensor
    active: Tensor
    step: int
    flat: int
    steps: tuple[int, ...]
    failed: tuple[tuple[int, str], ...]
    norm: float
    lowest: float | None
    exponent: int
    products: int


class _BlockRun:
    """An iteration at work."""

    def __init__(self, system: System, inner: Any, rows: Tensor, goals: Tensor) -> None:
        self.system, self.inner, self.r = system, inner, rows.clone()
        self.size, self.goals = rows.norm(dim=1), goals.to(rows.dtype)
        self.active = self.size > self.goals
        self.result, self.P, self.step, self.flat = IterationResult.start(rows), rows[:0], 0, 0
        self._products = system.products

    def start(self) -> None:
        """Find the first directions."""
        self.P = self._directions(None)

    def advance(self) -> IterationResult | None:
        """Take a step; return the result where that ends all."""
        system, result = self.system, self.result
        self.step += 1
        P, AP = self.P, system.apply(self.P)
        if not bool(AP.isfinite().all()):
            return self._failed(Status.BREAKDOWN, self.step, "a product is not finite")
        curvatures, turn = torch.linalg.eigh(P @ AP.T / 2 + AP @ P.T / 2)
        stretch = max(float(AP.norm(dim=1).max()), float(curvatures.abs().max()))
        if result.is_negative(system, stretch, float(curvatures[0])):
            return self._failed(Status.NEGATIVE_CURVATURE, self.step - 1)
        firm = curvatures > system.eps * result.norm
        self.flat += not bool(firm.all())
        if self.flat > _FLAT_STEPS:
            return self.ended()
        self._move(turn[:, firm].T @ P, turn[:, firm].T @ AP, curvatures[firm])
        return None

    def _move(self, P: Tensor, AP: Tensor, curvatures: Tensor) -> None:
        """Minimise along directions, let rows go that are done, and find the next directions."""
        x, r, active, result, system = self.result.x, self.r, self.active, self.result, self.system
        alpha = (r[active] @ P.T) / curvatures
        x[active] += alpha @ P
        r[active] -= alpha @ AP
        scale = result.norm * x.norm(dim=1)
        above = r.norm(dim=1) > self.goals.maximum(0.5 * system.eps * scale)
        far = active & above & (scale > condition_limit(system.dtype) * self.size)
        result.end(_numbers(active & ~above), self.step)
        result.end(_numbers(far), self.step, Status.SINGULAR)
        self.active = active & above & ~far
        self.P = self._directions((P, AP, curvatures))

    def _directions(self, last: _Step | None) -> Tensor:
        """Return orthonormal directions from the residuals, conjugate to the last ones."""
        r, active = self.r, self.active
        if not bool(active.any()):
            return r[:0]
        residual = r[active]
        z = self.inner(residual)
        if not bool(((residual * z).sum(1) > 0).all()) or not is_finite(z):
            self.result.reason = "the preconditioner is not positive definite"
            return r[:0]
        z = z / z.norm(dim=1, keepdim=True)
        if last is not None and last[0].shape[0]:
            P, AP, curvatures = last
            z = z - ((z @ AP.T) / curvatures) @ P
            z = z / z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        basis, triangle = torch.linalg.qr(z.T)
        left, singular, _ = torch.linalg.svd(triangle, full_matrices=False)
        # what rounding of the first residuals made of dependent rows is no direction
        shrunk = float((self.size[active] / residual.norm(dim=1)).max())
        # Rounding of a sum of that many terms, margin four; residuals that shrank carry that of the first ones.
        keep = singular > 4 * max(z.shape) ** 0.5 * torch.finfo(z.dtype).eps * max(shrunk, 1.0) * singular[0]
        keep[0] = True
        return (basis @ left[:, keep]).T.contiguous()  # as a state has them: sums of another layout round otherwise

    def ended(self) -> IterationResult:
        """Return the result, in which the rows that are left failed."""
        status = Status.STAGNATED if not self.P.shape[0] else Status.MAX_STEPS
        status = Status.BREAKDOWN if self.result.reason else Status.SINGULAR if self.flat else status
        return self._failed(status, self.step)

    def _failed(self, status: Status, step: int, reason: str = "") -> IterationResult:
        self.result.end(_numbers(self.active), step, status)
        self.result.reason = reason or self.result.reason
        return self.result

    # ---- states ----------------------------------------------------------------------------------------------------

    def state(self) -> BlockState:
        """Return where the iteration stands."""
        result, system = self.result, self.system
        failed = tuple((row, str(status)) for row, status in result.failed.items())
        products = system.products - self._products
        unit = system.fixed()
        parts = result.x, self.r, self.P, self.active, self.step, self.flat, tuple(result.steps), failed
        return BlockState(*parts, result.norm, result.lowest, unit, products)

    def restored(self, state: BlockState) -> bool:
        """Go on from a state; False where it was of another unit."""
        system, result = self.system, self.result
        if system._exponent not in (None, state.exponent):
            return False
        system.exponent = state.exponent
        system.products += state.products
        result.x, self.r, self.P, self.active = state.x, state.r, state.directions, state.active
        self.step, self.flat, result.steps = state.step, state.flat, list(state.steps)
        result.failed = {row: Status(status) for row, status in state.failed}
        result.norm, result.lowest = state.norm, state.lowest
        return True


def _numbers(flags: Tensor) -> Tensor:
    return flags.nonzero()[:, 0]
