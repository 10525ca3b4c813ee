"""The evidence that a point is a minimum, by the undamped Gauss-Newton step from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._solvers import Solver
from ._system import Singular, System, positive
from ._undamped import above_rounding, predicted_reduction, undamped

MOST_REDUCTION = 1e-8  # predicted by the undamped step, relative to the objective: what success means
ROUNDING = 64.0  # rounding errors of a residual that is computed in some tens of operations


@dataclass(frozen=True)
class Certificate:
    """What the undamped step says of a point.

    Attributes:
        predicted: The reduction it predicts, relative to the objective; NaN where it was not needed or not found.
        reason: Why the point is a minimum; empty where there is no evidence.
        length: Its length relative to the parameters, both scaled; NaN where it was not needed or not found.
    """

    predicted: float
    reason: str = ""
    length: float = float("nan")


def certificate(system: System, cost: float, solver: Solver, magnitudes: np.ndarray) -> Certificate:
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
    if (np.abs(system.r) <= rounding).all():
        return Certificate(float("nan"), "every residual is at the rounding level of its terms")
    kept = system.memory.get("certificate")
    if kept is None:
        with np.errstate(over="ignore", invalid="ignore"):
            kept = system.memory["certificate"] = _by_the_step(system, cost, solver, rounding, magnitudes)
    return kept


def magnitude_of_terms(system: System, magnitudes: np.ndarray) -> np.ndarray:
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
    system: System, cost: float, solver: Solver, rounding: np.ndarray, magnitudes: np.ndarray
) -> Certificate:
    try:
        step = undamped(system, solver).step
    except Singular:
        return Certificate(float("nan"))
    found = _judged(system, cost, step, rounding, magnitudes)
    if not found.reason and (other := above_rounding(system)) is not None:
        second = _judged(system, cost, other.step, rounding, magnitudes)
        found = second if second.reason else found
    return found


def _judged(
    system: System, cost: float, step: np.ndarray, rounding: np.ndarray, magnitudes: np.ndarray
) -> Certificate:
    predicted = max(predicted_reduction(system, step), 0.0) / cost
    length = float(np.linalg.norm(step * system.scale) / positive(np.linalg.norm(magnitudes * system.scale)))
    if predicted <= MOST_REDUCTION:
        return Certificate(predicted, small_reduction(predicted).reason, length)
    if (np.abs(system.push(step)) <= rounding).all():
        reason = "an undamped step moves every residual by no more than the rounding of its terms"
        return Certificate(predicted, reason, length)
    return Certificate(predicted, "", length)
