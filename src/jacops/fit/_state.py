"""The state of a least-squares loop: points, trials, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ._certificate import ROUNDING, Certificate, magnitude_of_terms
from ._layout import Values
from ._result import StepRecord
from ._system import LinearizedFit, Solved, positive

NOISE = 4.0  # rounding errors of each residual that may show in the objective


@dataclass(eq=False)
class FitPoint:
    """A linearised point.

    Attributes:
        values: The parameters.
        cost: The objective.
        system: The linearised problem.
        raw: Outputs minus targets, neither weighted nor corrected.
        magnitudes: Magnitudes of what the columns move.
    """

    values: Values
    cost: float
    system: LinearizedFit
    raw: np.ndarray
    magnitudes: np.ndarray

    @property
    def optimality(self) -> float:
        r"""The scaled gradient: the largest $|J_j^\top r| / (\lVert J_j \rVert \sqrt{2F})$."""
        if self.cost <= 0:
            return 0.0
        slopes = np.abs(self.system.gradient / positive(self.system.norms))
        return float(slopes.max(initial=0.0)) / (2 * self.cost) ** 0.5

    @property
    def floor(self) -> float:
        """The objective of residuals that are all at the rounding level of their terms."""
        terms = ROUNDING * self.system.eps * magnitude_of_terms(self.system, self.magnitudes)
        return float(terms @ terms) / 2

    @property
    def noise(self) -> float:
        """How far rounding of the residuals moves the objective."""
        terms = magnitude_of_terms(self.system, self.magnitudes)
        return NOISE * self.system.eps * max(2 * self.cost, float(np.linalg.norm(self.system.r * terms)))


@dataclass(frozen=True, eq=False)
class Trial:
    """A step that was tried.

    Attributes:
        solved: The step.
        damping: The damping or radius it was made for.
        values: The parameters after it.
        tried: The objective after it.
        predicted: The reduction that the linearised problem predicts.
        ratio: Actual by predicted reduction.
        at_noise: Whether both reductions are at the rounding level of the objective.
        insisted: Whether it is the undamped step after a stop without evidence.
        good: Whether it was taken.
        point: The point after it, where it is linearised already.
    """

    solved: Solved
    damping: float | None
    values: Values
    tried: float
    predicted: float
    ratio: float
    at_noise: bool
    insisted: bool
    good: bool = False
    point: FitPoint | None = None


@dataclass(frozen=True)
class Stop:
    """Why the loop stopped."""

    status: str
    message: str
    certificate: Certificate = field(default_factory=lambda: Certificate(float("nan")))


@dataclass(eq=False)
class Outcome:
    """How the loop ended."""

    point: FitPoint
    stop: Stop
    log: list[StepRecord]
