"""Block conjugate gradients: one Krylov space for all right-hand sides (O'Leary, 1980; Ji and Li, 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._finite import is_finite
from ._judge import condition_limit
from ._refine import IterationResult
from ._solution import Status
from ._system import System

_FLAT_STEPS = 50  # steps without curvature until the operator counts as singular: rounding makes a few of them flat


def block_iteration(system: System, inner: Any, rows: Tensor, goals: Tensor, most: int) -> IterationResult:
    """Run preconditioned block conjugate gradients on all rows from zero.

    Each step minimises the error of every row over all directions, which are kept orthonormal, so that it neither
    matters how many rows there are nor whether some depend on others.
    """
    result = IterationResult.start(rows)
    x, r, size, goals = result.x, rows.clone(), rows.norm(dim=1), goals.to(rows.dtype)
    active = r.norm(dim=1) > goals
    P, step = _directions(inner, r, active, None, result, size), 0
    flat = 0
    while bool(active.any()) and P.shape[0] and step < most:
        step += 1
        AP = system.apply(P)
        if not bool(AP.isfinite().all()):
            return _failed(result, active, Status.BREAKDOWN, step, "a product is not finite")
        curvatures, turn = torch.linalg.eigh(P @ AP.T / 2 + AP @ P.T / 2)
        stretch = max(float(AP.norm(dim=1).max()), float(curvatures.abs().max()))
        if result.is_negative(system, stretch, float(curvatures[0])):
            return _failed(result, active, Status.NEGATIVE_CURVATURE, step - 1)
        firm = curvatures > system.eps * result.norm
        flat += not bool(firm.all())
        if flat > _FLAT_STEPS:
            break
        P, AP = turn[:, firm].T @ P, turn[:, firm].T @ AP
        curvatures = curvatures[firm]
        alpha = (r[active] @ P.T) / curvatures
        x[active] += alpha @ P
        r[active] -= alpha @ AP
        scale = result.norm * x.norm(dim=1)
        above = r.norm(dim=1) > goals.maximum(0.5 * system.eps * scale)
        far = active & above & (scale > condition_limit(system.dtype) * size)
        result.end(_numbers(active & ~above), step)
        result.end(_numbers(far), step, Status.SINGULAR)
        active = active & above & ~far
        P = _directions(inner, r, active, (P, AP, curvatures), result, size)
    status = Status.STAGNATED if not P.shape[0] else Status.MAX_STEPS
    status = Status.BREAKDOWN if result.reason else Status.SINGULAR if flat else status
    return _failed(result, active, status, step)


def _directions(
    inner: Any,
    r: Tensor,
    active: Tensor,
    last: tuple[Tensor, Tensor, Tensor] | None,
    result: IterationResult,
    size: Tensor,
) -> Tensor:
    """Return orthonormal directions from the residuals, conjugate to the last ones."""
    if not bool(active.any()):
        return r[:0]
    residual = r[active]
    z = inner(residual)
    if not bool(((residual * z).sum(1) > 0).all()) or not is_finite(z):
        result.reason = "the preconditioner is not positive definite"
        return r[:0]
    z = z / z.norm(dim=1, keepdim=True)
    if last is not None and last[0].shape[0]:
        P, AP, curvatures = last
        z = z - ((z @ AP.T) / curvatures) @ P
        z = z / z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    basis, triangle = torch.linalg.qr(z.T)
    left, singular, _ = torch.linalg.svd(triangle, full_matrices=False)
    # what rounding of the first residuals made of dependent rows is no direction
    shrunk = float((size[active] / residual.norm(dim=1)).max())
    # Rounding of a sum of that many terms, margin four; residuals that shrank carry that of the first ones.
    keep = singular > 4 * max(z.shape) ** 0.5 * torch.finfo(z.dtype).eps * max(shrunk, 1.0) * singular[0]
    keep[0] = True
    return (basis @ left[:, keep]).T


def _numbers(flags: Tensor) -> Tensor:
    return flags.nonzero()[:, 0]


def _failed(result: IterationResult, active: Tensor, status: Status, step: int, reason: str = "") -> IterationResult:
    """Return a result in which the rows that are left failed."""
    result.end(_numbers(active), step, status)
    result.reason = reason or result.reason
    return result
