"""Block conjugate gradients: one Krylov space for all right-hand sides (O'Leary, 1980; Ji and Li, 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._runtime.blas import one_blas_thread
from .._runtime.restoring import restoring
from .._saving import Savable
from ._judge import condition_limit
from ._kept import Kept, StateFile
from ._refine import IterationResult, read
from ._solution import Status
from ._system import System

_SHARED = 64  # rows of a matrix that a BLAS decomposes by several threads, and for which loading SciPy's is worth it
_FLAT_STEPS = 50  # steps without curvature until the operator counts as singular: rounding makes a few of them flat


@dataclass(frozen=True, eq=False)
class _BlockStep:
    """Directions of a step.

    Attributes:
        P: The directions, `(k, n)`.
        AP: Their products.
        turn: Eigenvectors of $P A P^T$ with firm curvature, as columns.
        curvatures: Their eigenvalues.
    """

    P: Tensor
    AP: Tensor
    turn: Tensor
    curvatures: Tensor

    def solved(self, rows: Tensor) -> Tensor:
        r"""Return small rows `(m, k)` times the inverse of $P A P^\top$, without turning the directions themselves."""
        return ((rows @ self.turn) / self.curvatures) @ self.turn.T


def block_iteration(
    system: System, inner: Any, rows: Tensor, goals: Tensor, most: int, kept: Kept | None = None
) -> IterationResult:
    """Run preconditioned block conjugate gradients on all rows from zero, or from a state that was kept of this run.

    Each step minimises the error of every row over all directions, which are kept orthonormal, so that it neither
    matters how many rows there are nor whether some depend on others. Curvatures, the rows that are left and the rank
    of their residuals decide on shapes: each of them is read from the device once a step, as a few numbers, and small
    matrices are decomposed on the processor.
    """
    run = _BlockRun(system, inner, rows, goals)
    file = None if kept is None else StateFile(kept, BlockState, {"rows": rows, "goals": goals}, f"{most}")
    state = None if file is None else file.state(rows.device)
    if state is None or not run.restored(state):
        run.start()
    while run.active and run.P.shape[0] and run.step < most:
        failed = run.advance()
        if failed is not None:
            return failed
        if file is not None and file.is_due():
            file.write(run.state())
    return run.ended()


@final
@dataclass(frozen=True, eq=False)
class BlockState(Savable):
    """The state of an iteration between two steps: all that the next ones depend on.

    Attributes:
        x: Solutions.
        r: Residuals.
        directions: Of the next step.
        active: Numbers of the rows that go on.
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
    active: tuple[int, ...]
    step: int
    flat: int
    steps: tuple[int, ...]
    failed: tuple[tuple[int, str], ...]
    norm: float
    lowest: float | None
    exponent: int
    products: int


@restoring
def _alone(decompose: Callable[[Any], Any], small: Any) -> Any:
    """Return a decomposition of a small matrix, by one thread of NumPy's BLAS.

    Its threads and those of torch mostly wait for one another: of 200 rows, 26 ms instead of 7.
    """
    if len(small) < _SHARED:
        return decompose(small)
    with one_blas_thread():
        return decompose(small)


def _add(rows: Tensor, left: slice | list[int], alpha: Tensor, P: Tensor, factor: float = 1) -> None:
    """Add multiples of directions to some rows; to all of them without an array in between."""
    if isinstance(left, slice):
        rows.addmm_(alpha, P, alpha=factor)
    else:
        rows[left] = rows[left].addmm_(alpha, P, alpha=factor)


class _BlockRun:
    """An iteration at work."""

    def __init__(self, system: System, inner: Any, rows: Tensor, goals: Tensor) -> None:
        self.system, self.inner, self.r = system, inner, rows.clone()
        self.size, self.goals = rows.norm(dim=1), goals.to(rows.dtype)
        self.active: list[int] = read(self.size > self.goals)[0].nonzero()[0].tolist()
        self.result, self.P, self.step, self.flat = IterationResult.start(rows), rows[:0], 0, 0
        self._products = system.products

    @property
    def left(self) -> slice | list[int]:
        """What picks the rows that go on; all of them without a copy."""
        return slice(None) if len(self.active) == len(self.r) else self.active

    def start(self) -> None:
        """Find the first directions."""
        self.P = self._directions(None)

    def advance(self) -> IterationResult | None:
        """Take a step; return the result where that ends all."""
        system, result, P = self.system, self.result, self.P
        self.step += 1
        AP = system.apply(P, finite=True)
        # A sum in double of finite numbers in single precision is finite, and takes a fifth of a look at each of them.
        small, longest, finite = read(P @ AP.T, AP.norm(dim=1).max(), AP.sum(dtype=torch.float64).isfinite())
        if not finite:
            return self._failed(Status.BREAKDOWN, self.step, "a product is not finite")
        curvatures, turn = _alone(np.linalg.eigh, (small + small.T) / 2)
        stretch = max(float(longest), float(np.abs(curvatures).max()))
        if result.is_negative(system, stretch, float(curvatures[0])):
            return self._failed(Status.NEGATIVE_CURVATURE, self.step - 1)
        firm = curvatures > system.eps * result.norm
        self.flat += not firm.all()
        if self.flat > _FLAT_STEPS:
            return self.ended()
        turned, bent = torch.from_numpy(turn[:, firm].copy()).to(P), torch.from_numpy(curvatures[firm]).to(P)
        self._move(_BlockStep(P, AP, turned, bent))
        return None

    def _move(self, step: _BlockStep) -> None:
        """Minimise along directions, let rows go that are done, and find the next directions."""
        x, r, left, result, system = self.result.x, self.r, self.left, self.result, self.system
        alpha = step.solved(r[left] @ step.P.T)
        _add(x, left, alpha, step.P)
        _add(r, left, alpha, step.AP, -1)
        scale = result.norm * x.norm(dim=1)
        above, far = read(
            r.norm(dim=1) > self.goals.maximum(0.5 * system.eps * scale),
            scale > condition_limit(system.dtype) * self.size,
        )
        result.end([row for row in self.active if not above[row]], self.step)
        result.end([row for row in self.active if above[row] and far[row]], self.step, Status.SINGULAR)
        self.active = [row for row in self.active if above[row] and not far[row]]
        self.P = self._directions(step)

    def _directions(self, last: _BlockStep | None) -> Tensor:
        """Return orthonormal directions from the residuals, conjugate to the last ones."""
        residual = self.r[self.left] if self.active else self.r[:0]
        if not self.active:
            return residual
        z = self.inner(residual)
        along, shrunk = (residual * z).sum(1), (self.size[self.left] / residual.norm(dim=1)).max()
        z = z / z.norm(dim=1, keepdim=True)  # a tensor of its own from here on
        if last is not None and len(last.curvatures):
            z.addmm_(last.solved(z @ last.AP.T), last.P, alpha=-1)
            z.div_(z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny))
        basis, triangle = torch.linalg.qr(z.T)
        positive, shrinking, small = read(along > 0, shrunk, triangle)
        if not positive.all() or not np.isfinite(small).all():
            self.result.reason = "the preconditioner is not positive definite"
            return residual[:0]
        turn, singular, _ = _alone(partial(np.linalg.svd, full_matrices=False), small)
        # Rounding of a sum of that many terms, margin four; residuals that shrank carry that of the first ones, and
        # what rounding of the first residuals leaves of dependent rows is not a direction.
        rounding = 4 * max(z.shape) ** 0.5 * torch.finfo(z.dtype).eps * max(float(shrinking), 1.0)
        keep = singular > rounding * singular[0]
        keep[0] = True
        # Contiguous as a state has them: sums of another layout round otherwise.
        return (basis @ torch.from_numpy(turn[:, keep].copy()).to(basis)).T.contiguous()

    def ended(self) -> IterationResult:
        """Return the result, in which the rows that are left failed."""
        status = Status.STAGNATED if not self.P.shape[0] else Status.MAX_STEPS
        status = Status.BREAKDOWN if self.result.reason else Status.SINGULAR if self.flat else status
        return self._failed(status, self.step)

    def _failed(self, status: Status, step: int, reason: str = "") -> IterationResult:
        self.result.end(self.active, step, status)
        self.result.reason = reason or self.result.reason
        return self.result

    # ---- states ----------------------------------------------------------------------------------------------------

    def state(self) -> BlockState:
        """Return the state of the iteration."""
        result, system = self.result, self.system
        failed = tuple((row, str(status)) for row, status in result.failed.items())
        products, unit = system.products - self._products, system.fixed()
        parts = result.x, self.r, self.P, tuple(self.active), self.step, self.flat, tuple(result.steps), failed
        return BlockState(*parts, result.norm, result.lowest, unit, products)

    def restored(self, state: BlockState) -> bool:
        """Go on from a state; False where it was of another unit."""
        system, result = self.system, self.result
        if system._exponent not in (None, state.exponent):
            return False
        system.exponent = state.exponent
        system.products += state.products
        result.x, self.r, self.P, self.active = state.x, state.r, state.directions, list(state.active)
        self.step, self.flat, result.steps = state.step, state.flat, list(state.steps)
        result.failed = {row: Status(status) for row, status in state.failed}
        result.norm, result.lowest = state.norm, state.lowest
        return True
