"""The evidence that a point is a minimum, by the undamped Gauss-Newton step from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ._solvers import StepSolver
from ._system import LinearizedFit, Singular
from ._undamped import above_rounding, predicted_reduction, replace_undamped, undamped

MOST_REDUCTION = 1e-8  # predicted by the undamped step, relative to the objective: what success means
ROUNDING = 64.0  # rounding errors of a residual that is computed in some tens of operations
FEW = 4.0  # rounding errors of a residual of few operations, or of a step that changes nothing


@dataclass(frozen=True)
class Certificate:
    """The evidence of the undamped step at a point.

    Attributes:
        predicted: The reduction it predicts, relative to the objective; NaN where it was not needed or not found.
        reason: Why the point is a minimum; empty where there is no evidence.
        length: Its length relative to the parameters, both scaled; NaN where it was not needed or not found.
        at_rounding: Why it may be no more than rounding, which counts once steps change nothing; else empty.
    """

    predicted: float
    reason: str = ""
    length: float = float("nan")
    at_rounding: str = ""


def certificate(system: LinearizedFit, cost: float, solver: StepSolver, magnitudes: np.ndarray) -> Certificate:
    """Return the evidence at a point: a small predicted reduction, or residual or step at their rounding level.

    Args:
        system: The linearised problem.
        cost: The objective, robust where there is a kernel; the problem is then the reweighted one.
        solver: The solver of the call, which is tried first.
        magnitudes: Magnitudes of what the columns move.
    """
    if not cost > 0:
        return Certificate(0.0, "the objective is zero")
    rounding = ROUNDING * system.eps * magnitude_of_terms(system, magnitudes)
    if (np.abs(system.r) <= FEW / ROUNDING * rounding).all():
        return Certificate(float("nan"), "every residual is at the rounding level of its terms")
    if not system.norms.any():
        return Certificate(0.0)  # a minimum or a plateau: nothing distinguishes them
    kept = system.memory.get("certificate")
    if kept is None:
        kept = system.memory["certificate"] = _by_the_step(system, cost, solver, rounding, magnitudes)
    if not kept.reason and (np.abs(system.r) <= rounding).all():
        return replace(kept, at_rounding="every residual is near the rounding level of its terms")
    return kept


def magnitude_of_terms(system: LinearizedFit, magnitudes: np.ndarray) -> np.ndarray:
    """Return the magnitude of the terms each residual is made of: outputs, targets, and parameters times slopes."""
    found = system.memory.get("terms")
    if found is None:
        own = np.abs(system.r) if system.terms is None else system.terms()
        found = system.memory["terms"] = own + abs(system.J) @ magnitudes
    return found


def small_reduction(predicted: float) -> Certificate:
    """Return the evidence of a predicted reduction, relative to the objective, that is small enough."""
    return Certificate(predicted, f"an undamped step predicts a reduction of {predicted:.1e} of the objective")


def _by_the_step(
    system: LinearizedFit, cost: float, solver: StepSolver, rounding: np.ndarray, magnitudes: np.ndarray
) -> Certificate:
    try:
        step = undamped(system, solver).step
    except Singular:
        return Certificate(float("nan"))
    found = _judged(system, cost, step, rounding, magnitudes)
    if not found.reason and (other := above_rounding(system)) is not None:
        second = _judged(system, cost, other.step, rounding, magnitudes)
        if second.predicted > 2 * found.predicted:  # the solver's step was inexact: worth a try of its own
            replace_undamped(system, other)
            return second
        found = second if second.reason else found
    return found


def _judged(
    system: LinearizedFit, cost: float, step: np.ndarray, rounding: np.ndarray, magnitudes: np.ndarray
) -> Certificate:
    predicted = max(predicted_reduction(system, step) / cost, 0.0) + 0.0
    length, size = np.linalg.norm(step * system.scale), np.linalg.norm(magnitudes * system.scale)
    found = Certificate(predicted, "", float(length / size) if size > 0 else float("nan"))
    if predicted <= MOST_REDUCTION:
        return replace(found, reason=small_reduction(predicted).reason)
    moved = np.abs(system.J @ step)
    if (moved <= FEW / ROUNDING * rounding).all():
        return replace(found, reason="an undamped step moves every residual by no more than the rounding of its terms")
    if (moved <= rounding).all():
        return replace(
            found, at_rounding="an undamped step moves residuals by little more than the rounding of its terms"
        )
    return found
