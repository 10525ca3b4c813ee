"""The state of a least-squares loop: points, trials, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ._certificate import ROUNDING, Certificate, magnitude_of_terms
from ._layout import Layout, Values
from ._result import StepRecord
from ._system import LinearizedFit, Solved, positive

NOISE = 4.0  # rounding errors of each residual that may show in the objective


@dataclass(frozen=True, eq=False)
class Face:
    """Where a point is within bounds.

    Attributes:
        whole: The linearised problem in all columns.
        magnitudes: Magnitudes of what they move.
        free: Which of them move.
        blocked: Which are at a bound that the gradient leads out of.
        down: How far each may go down, zero or less.
        up: How far each may go up.
    """

    whole: LinearizedFit
    magnitudes: np.ndarray
    free: np.ndarray
    blocked: np.ndarray
    down: np.ndarray
    up: np.ndarray

    def full(self, step: np.ndarray) -> np.ndarray:
        """Return a step of all columns."""
        found = np.zeros(len(self.free))
        found[self.free] = step
        return found


@dataclass(eq=False)
class FitPoint:
    """A linearised point.

    Attributes:
        values: The parameters.
        cost: The objective.
        system: The linearised problem.
        raw: Outputs minus targets, neither weighted nor corrected.
        magnitudes: Magnitudes of what the columns move.
        face: Where it is within bounds, where there are some; `system` then has the free columns only.
    """

    values: Values
    cost: float
    system: LinearizedFit
    raw: np.ndarray
    magnitudes: np.ndarray
    face: Face | None = None

    @property
    def whole(self) -> LinearizedFit:
        """The linearised problem in all columns."""
        return self.system if self.face is None else self.face.whole

    @property
    def whole_magnitudes(self) -> np.ndarray:
        """Magnitudes of what all columns move."""
        return self.magnitudes if self.face is None else self.face.magnitudes

    @property
    def optimality(self) -> float:
        r"""The scaled gradient: the largest $|J_j^\top r| / (\lVert J_j \rVert \sqrt{2F})$ that bounds leave."""
        if self.cost <= 0:
            return 0.0
        slopes = np.abs(self.whole.gradient / positive(self.whole.norms))
        if self.face is not None:
            slopes = slopes[~self.face.blocked]
        return float(slopes.max(initial=0.0)) / (2 * self.cost) ** 0.5

    def moved(self, layout: Layout, step: np.ndarray) -> Values:
        """Return the parameters after a step."""
        return layout.moved(self.values, step if self.face is None else self.face.full(step))

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
