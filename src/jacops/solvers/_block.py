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

_FLAT_STEPS = 50  # steps that meet directions without curvature, before the operator counts as singular


def block_course(system: System, inner: Any, rows: Tensor, goals: Tensor, most: int) -> IterationResult:
    """Run preconditioned block conjugate gradients on all rows from zero.

    Each step minimises the error of every row over all directions, which are kept orthonormal, so that it neither
    matters how many rows there are nor whether some depend on others.
    """
    course = IterationResult(torch.zeros_like(rows), [0] * rows.shape[0])
    x, r, size, goals = course.x, rows.clone(), rows.norm(dim=1), goals.to(rows.dtype)
    going = r.norm(dim=1) > goals
    P, step = _directions(inner, r, going, None, course, size), 0
    flat = 0
    while bool(going.any()) and P.shape[0] and step < most:
        step += 1
        AP = system.apply(P)
        if not bool(AP.isfinite().all()):
            return _ended(course, going, Status.BREAKDOWN, step, "a product is not finite")
        bends, turn = torch.linalg.eigh(_symmetric(P @ AP.T))
        course.norm = max(course.norm, float(AP.norm(dim=1).max()), float(bends.abs().max()))
        course.lowest = min(float(bends[0]), float("inf") if course.lowest is None else course.lowest)
        if course.lowest < -noise(system) * course.norm:
            course.norm = max(course.norm, system.norm)  # rounding of a norm not seen yet is no curvature
        if course.lowest < -noise(system) * course.norm:
            return _ended(course, going, Status.NEGATIVE_CURVATURE, step - 1)
        firm = bends > system.eps * course.norm
        flat += not bool(firm.all())
        if flat > _FLAT_STEPS:
            break
        P, AP = turn[:, firm].T @ P, turn[:, firm].T @ AP
        bends = bends[firm]
        pace = (r[going] @ P.T) / bends
        x[going] += pace @ P
        r[going] -= pace @ AP
        reach = course.norm * x.norm(dim=1)
        going = _left_over(course, going, r.norm(dim=1) > goals.maximum(0.5 * system.eps * reach), step)
        far = going & (reach > condition_limit(system.dtype) * size)
        going = _ended_rows(course, going, far, Status.SINGULAR, step)
        P = _directions(inner, r, going, (P, AP, bends), course, size)
    status = Status.STAGNATED if not P.shape[0] else Status.MAX_STEPS
    status = Status.BREAKDOWN if course.reason else Status.SINGULAR if flat else status
    return _ended(course, going, status, step)


def noise(system: System) -> float:
    """Return what rounding may make of a curvature of zero, relative to the norm."""
    return system.n**0.5 * system.eps


def _directions(
    inner: Any,
    r: Tensor,
    going: Tensor,
    last: tuple[Tensor, Tensor, Tensor] | None,
    course: IterationResult,
    size: Tensor,
) -> Tensor:
    """Return orthonormal directions from the residuals, conjugate to the last ones."""
    if not bool(going.any()):
        return r[:0]
    residual = r[going]
    z = inner(residual)
    if not bool(((residual * z).sum(1) > 0).all()) or not is_finite(z):
        course.reason = "the preconditioner is not positive definite"
        return r[:0]
    z = z / z.norm(dim=1, keepdim=True)
    if last is not None and last[0].shape[0]:
        P, AP, bends = last
        z = z - ((z @ AP.T) / bends) @ P
        z = z / z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    basis, triangle = torch.linalg.qr(z.T)
    left, singular, _ = torch.linalg.svd(triangle, full_matrices=False)
    # what rounding of the first residuals made of dependent rows is no direction
    shrunk = float((size[going] / residual.norm(dim=1)).max())
    keep = singular > 4 * max(z.shape) ** 0.5 * torch.finfo(z.dtype).eps * max(shrunk, 1.0) * singular[0]
    keep[0] = True
    return (basis @ left[:, keep]).T


def _left_over(course: IterationResult, going: Tensor, above: Tensor, step: int) -> Tensor:
    for row in (going & ~above).nonzero()[:, 0].tolist():
        course.steps[row] = step
    return going & above


def _ended_rows(course: IterationResult, going: Tensor, hit: Tensor, status: Status, step: int) -> Tensor:
    for row in hit.nonzero()[:, 0].tolist():
        course.steps[row] = step
        course.failed[row] = status
    return going & ~hit


def _ended(course: IterationResult, going: Tensor, status: Status, step: int, reason: str = "") -> IterationResult:
    _ended_rows(course, going, going, status, step)
    course.reason = reason or course.reason
    return course


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
