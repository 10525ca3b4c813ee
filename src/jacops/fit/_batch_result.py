"""What a batch of fits gives back: for every problem where it ended and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from .._display import Described, Description, listed
from .._interop import ArrayLike
from .._saving import Savable
from ._batch_points import REASONS
from ._result import Found

_WORDS = {
    "gradient": "the scaled gradient is at most gtol",
    "objective": "the objective changes by no more than ftol of itself, or by rounding",
    "step": "a step is no longer than xtol of the scaled parameters",
    "max_steps": "max_steps were not enough",
    "max_nfev": "max_nfev forward passes were not enough",
    "max_seconds": "max_seconds were not enough",
    "stalled": "steps led nowhere, the Jacobian is zero, or this is a saddle or a maximum",
    "nonfinite": "a residual at the start, or a Jacobian, is NaN or Inf",
}


@dataclass(frozen=True, eq=False, repr=False)
class BatchFitResult(ArrayLike, Savable, Described, Generic[Found]):
    r"""The result of a batch of fits; the first axis of each array counts the problems.

    Attributes:
        x: The parameters found, in the form of `params`. With `create_graph=True` they have a graph. A problem without
            success has the best parameters found, one that is NaN at the start its initial values.
        cost: The objectives $\tfrac12 \sum_k \rho(\lVert r_k \rVert^2)$ there, (n,), in double precision; NaN where a
            residual is not finite at the start.
        fun: Outputs minus targets there, flat for each problem, neither weighted nor corrected, (n, rows).
        optimality: Scaled gradients, as in `LeastSquaresResult`, (n,).
        success: Whether a stop rule was met and there is evidence for a minimum, as in `LeastSquaresResult`, (n,).
        status: The test that stopped each problem: `"gradient"`, `"objective"`, `"step"` (the rules gtol, ftol, xtol),
            or `"max_steps"`, `"max_nfev"`, `"max_seconds"`, `"stalled"`, `"nonfinite"`; n words.
        predicted: The reduction of the objective that an undamped step predicts at the end, relative to it, (n,).
        steps: Steps tried, (n,).
        nfev: Forward passes, each of all problems that were still worked on.
        njev: Jacobians, likewise.
        route: How Jacobians were taken.
        method: The call and its strategy.
        reasons: The evidence for each minimum, as a number; `certificate` describes it.
        active_mask: With bounds, in the form of `x`: -1 where a lower bound is met, 1 an upper one, else 0; else None.
    """

    x: Found
    cost: Tensor
    fun: Tensor
    optimality: Tensor
    success: Tensor
    status: list[str]
    predicted: Tensor
    steps: Tensor
    nfev: int
    njev: int
    route: str
    method: str
    reasons: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    active_mask: Found | None = None

    @property
    def failed(self) -> Tensor:
        """Positions of the problems without success."""
        return (~self.success).nonzero()[:, 0]

    def certificate(self, problem: int) -> str:
        """Return the evidence that a problem's point is a minimum, in words; empty where there is none."""
        return REASONS[int(self.reasons[problem])]

    def _describe(self) -> Description:
        many, good = len(self.status), int(self.success.sum())
        counts = Counter(self.status)
        facts = [
            (word, f"{count:,}: {_WORDS[word]}") for word, count in counts.most_common()
        ]  # most frequent first, ties as they came
        known = self.cost[torch.isfinite(self.cost)].numpy()
        if len(known):
            low, mid, high = np.quantile(known, [0.0, 0.5, 1.0])
            facts.append(("objectives", f"median {mid:.6e}, from {low:.2e} to {high:.2e}"))
        steps = self.steps.double()
        facts.append(("steps", f"median {float(steps.median()):.0f}, at most {int(steps.max())}"))
        facts.append(("passes", f"{self.nfev} forward, {self.njev} Jacobians ({self.route})"))
        if good < many:
            facts.append(("without success", listed([str(i) for i in self.failed.tolist()])))
        return Description(f"BatchFitResult({good:,} of {many:,} problems with success)", facts)
