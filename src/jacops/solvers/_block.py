"""Block conjugate gradients: one Krylov space for all right-hand sides (O'Leary, 1980; Ji and Li, 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._judge import condition_limit
from ._refine import IterationResult, read
from ._solution import Status
from ._system import System

_FLAT_STEPS = 50  # steps without curvature until the operator counts as singular: rounding makes a few of them flat


def block_iteration(system: System, inner: Any, rows: Tensor, goals: Tensor, most: int) -> IterationResult:
    """Run preconditioned block conjugate gradients on all rows from zero.

    Each step minimises the error of every row over all directions, which are kept orthonormal, so that it neither
    matters how many rows there are nor whether some depend on others. Curvatures, the rows that are left and the rank
    of their residuals decide on shapes: each of them is read from the device once a step, as a few numbers, and small
    matrices are decomposed on the processor.
    """
    result = IterationResult.start(rows)
    x, r, size, goals = result.x, rows.clone(), rows.norm(dim=1), goals.to(rows.dtype)
    active = _places(*read(size > goals))
    rows_left = _index(active, len(rows))
    P, step = _directions(inner, r[rows_left], None, result, size[rows_left]), 0
    flat = 0
    while active and P.shape[0] and step < most:
        step += 1
        AP = system.apply(P, finite=True)
        small, longest, finite = read(P @ AP.T / 2 + AP @ P.T / 2, AP.norm(dim=1).max(), AP.isfinite().all())
        if not finite:
            return _failed(result, active, Status.BREAKDOWN, step, "a product is not finite")
        curvatures, turn = np.linalg.eigh(small)
        stretch = max(float(longest), float(np.abs(curvatures).max()))
        if result.is_negative(system, stretch, float(curvatures[0])):
            return _failed(result, active, Status.NEGATIVE_CURVATURE, step - 1)
        firm = curvatures > system.eps * result.norm
        flat += not firm.all()
        if flat > _FLAT_STEPS:
            break
        turned, bent = torch.from_numpy(turn[:, firm].T.copy()).to(P), torch.from_numpy(curvatures[firm]).to(P)
        P, AP = turned @ P, turned @ AP
        alpha = (r[rows_left] @ P.T) / bent
        x[rows_left] += alpha @ P
        r[rows_left] -= alpha @ AP
        active = _left(system, result, step, active, (x, r, goals, size))
        rows_left = _index(active, len(rows))
        P = _directions(inner, r[rows_left], (P, AP, bent), result, size[rows_left])
    status = Status.STAGNATED if not P.shape[0] else Status.MAX_STEPS
    status = Status.BREAKDOWN if result.reason else Status.SINGULAR if flat else status
    return _failed(result, active, status, step)


def _left(
    system: System, result: IterationResult, step: int, active: list[int], state: tuple[Tensor, Tensor, Tensor, Tensor]
) -> list[int]:
    """Note the rows that end at a step; return those that are left."""
    x, r, goals, size = state
    scale = result.norm * x.norm(dim=1)
    above, far = read(
        r.norm(dim=1) > goals.maximum(0.5 * system.eps * scale), scale > condition_limit(system.dtype) * size
    )
    result.end([row for row in active if not above[row]], step)
    result.end([row for row in active if above[row] and far[row]], step, Status.SINGULAR)
    return [row for row in active if above[row] and not far[row]]


def _directions(
    inner: Any, residual: Tensor, last: tuple[Tensor, Tensor, Tensor] | None, result: IterationResult, size: Tensor
) -> Tensor:
    """Return orthonormal directions from residuals, conjugate to the last ones; `size` is that of right-hand sides."""
    if not residual.shape[0]:
        return residual
    z = inner(residual)
    along, shrunk = (residual * z).sum(1), (size / residual.norm(dim=1)).max()
    z = z / z.norm(dim=1, keepdim=True)
    if last is not None and last[0].shape[0]:
        P, AP, curvatures = last
        z = z - ((z @ AP.T) / curvatures) @ P
        z = z / z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    basis, triangle = torch.linalg.qr(z.T)
    positive, shrinking, small = read(along > 0, shrunk, triangle)
    if not positive.all() or not np.isfinite(small).all():
        result.reason = "the preconditioner is not positive definite"
        return residual[:0]
    left, singular, _ = np.linalg.svd(small, full_matrices=False)
    # Rounding of a sum of that many terms, margin four; residuals that shrank carry that of the first ones, and what
    # rounding of the first residuals made of dependent rows is no direction.
    rounding = 4 * max(z.shape) ** 0.5 * torch.finfo(z.dtype).eps * max(float(shrinking), 1.0)
    keep = singular > rounding * singular[0]
    keep[0] = True
    return (basis @ torch.from_numpy(left[:, keep].copy()).to(basis)).T


def _index(active: list[int], many: int) -> slice | list[int]:
    """Return what picks some of `many` rows; all of them without a copy."""
    return slice(None) if len(active) == many else active


def _places(flags: np.ndarray) -> list[int]:
    return flags.nonzero()[0].tolist()


def _failed(result: IterationResult, active: list[int], status: Status, step: int, reason: str = "") -> IterationResult:
    """Return a result in which the rows that are left failed."""
    result.end(active, step, status)
    result.reason = reason or result.reason
    return result
