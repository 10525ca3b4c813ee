"""Solution: what a solver found, and how it went, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor


class Status(StrEnum):
    """How the solve of one right-hand side ended; each is a plain string."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    STAGNATED = "stagnated"
    NEGATIVE_CURVATURE = "negative_curvature"
    SINGULAR = "singular"
    BREAKDOWN = "breakdown"
    DIVERGED = "diverged"
    NONFINITE_INPUT = "nonfinite_input"


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    r"""Solutions of $(A + \lambda I) x = b$, one row per right-hand side.

    Attributes:
        x: The solutions, `(k, n)`; a row that has none is NaN.
        status: One `Status` per row.
        residual: $\lVert b - (A + \lambda I) x \rVert / \lVert b \rVert$ per row, `(k,)`, recomputed from $A$ itself.
        iterations: Steps per row; 0 for direct methods.
        damping: $\lambda$.
        method: The solver's name.
        info: The method's own figures, of these what applies: `tolerance`; `attainable`, the residual that rounding
            allows, per row; `error_bound` on $\lVert x - x^* \rVert$, per row, for positive operators under damping;
            `norm`; `condition`; `lowest_curvature`; `rank`; `approximate`, whether the method answers with an
            approximation, whose residual is then no failure; `chosen`; `products`, rows put through $A$; `seconds`.
    """

    x: Tensor
    status: tuple[str, ...]
    residual: Tensor
    iterations: tuple[int, ...]
    damping: float
    method: str
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Every row is."""
        return all(status == Status.CONVERGED for status in self.status)

    @property
    def worst(self) -> float:
        """The largest relative residual of all rows that have one, 0 without rows."""
        finite = self.residual[~self.residual.isnan()]
        return float(finite.max()) if len(finite) else 0.0 if not len(self.residual) else float("nan")

    @property
    def counts(self) -> str:
        """How many rows ended how, in words."""
        return ", ".join(f"{count} {status}" for status, count in Counter(map(str, self.status)).items()) or "no rows"

    def __repr__(self) -> str:
        steps = f", at most {max(self.iterations)} steps" if any(self.iterations) else ""
        approximate = ", approximate" if self.info.get("approximate") else ""
        residual = "residuals not asked for" if self.info.get("unchecked") else f"worst residual {self.worst:.1e}"
        return (
            f"Solution({tuple(self.x.shape)} by {self.method}, damping {self.damping:g}: {self.counts}, "
            f"{residual}{steps}{approximate})"
        )
