"""Solution: what a solver found, and how it went, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor

from .._display import Described, Description
from .._interop import ArrayLike
from .._saving import Savable


class Status(StrEnum):
    """The status of the solve of one right-hand side, a string.

    The first four are results, the others are failures, which raise `SolveError` unless failures are returned.

    Attributes:
        CONVERGED: The true residual is at most the tolerance.
        ATTAINABLE: The residual is above the tolerance, but at the level that rounding allows, and below 1.
        APPROXIMATE: The method has no tolerance on the residual (EK-FAC, Nyström, Lanczos); it was computed.
        UNCHECKED: No residual was computed.
        MAX_STEPS: The iteration took as many steps as were allowed.
        STAGNATED: The residual no longer decreases, and is above what rounding allows.
        NEGATIVE_CURVATURE: The operator is not positive definite.
        SINGULAR: The operator is singular to rounding.
        BREAKDOWN: A number stopped being finite, or the solution is outside the range of the dtype.
        DIVERGED: The series diverges.
        NONFINITE_INPUT: The right-hand side holds NaN or Inf.
    """

    CONVERGED = "converged"
    ATTAINABLE = "attainable"
    APPROXIMATE = "approximate"
    UNCHECKED = "unchecked"
    MAX_STEPS = "max_steps"
    STAGNATED = "stagnated"
    NEGATIVE_CURVATURE = "negative_curvature"
    SINGULAR = "singular"
    BREAKDOWN = "breakdown"
    DIVERGED = "diverged"
    NONFINITE_INPUT = "nonfinite_input"

    @property
    def success(self) -> bool:
        """Whether this is a result rather than a failure."""
        return self in RESULTS


RESULTS = (Status.CONVERGED, Status.ATTAINABLE, Status.APPROXIMATE, Status.UNCHECKED)
"""Statuses that do not raise, from the best to the one of which least is known."""

OUT_OF_RANGE = "entries of the solution are outside the range of"
_BY_WEIGHT = (
    Status.NONFINITE_INPUT,
    Status.NEGATIVE_CURVATURE,
    Status.SINGULAR,
    Status.DIVERGED,
    Status.BREAKDOWN,
    Status.STAGNATED,
    Status.MAX_STEPS,
    *reversed(RESULTS),
)


def gravest(statuses: Iterable[str]) -> Status:
    """Return the worst of some statuses; converged where there are none."""
    found = {Status(status) for status in statuses}
    return next((status for status in _BY_WEIGHT if status in found), Status.CONVERGED)


@dataclass(frozen=True, eq=False, repr=False)
class Solution(ArrayLike, Savable, Described):
    r"""Solutions of $(A + \lambda I) x = b$, one row per right-hand side.

    Attributes:
        x: The solutions, `(k, n)`; a row that has none is NaN.
        status: One `Status` per row.
        residual: $\lVert b - (A + \lambda I) x \rVert / \lVert b \rVert$ per row, `(k,)`, recomputed from $A$ itself;
            NaN for rows that are unchecked, and for rows that failed whatever their residual.
        iterations: Steps per row; 0 for direct methods.
        damping: $\lambda$.
        method: The solver's name.
        info: The method's own figures, of these what applies: `tolerance`; `attainable`, the residual that rounding
            allows, per row; `error_bound` on $\lVert x - x^* \rVert$, per row, for positive operators under damping;
            `condition`; `lowest_curvature`; `rank`; `approximate`, whether the method has no tolerance on the residual;
            `unchecked`, whether none was computed; `query_rank` and `truncation`, the relative change of a solution by
            that, per row, NaN where there was nothing to solve; `reason` of a breakdown; `chosen`; `products`, rows put
            through $A$; `seconds`.
    """

    x: Tensor
    status: tuple[str, ...]
    residual: Tensor
    iterations: tuple[int, ...]
    damping: float
    method: str
    info: dict[str, Any] = field(default_factory=dict)
    _array: ClassVar[str] = "x"

    @property
    def converged(self) -> bool:
        """The true residual of every row is at most the tolerance."""
        return all(status == Status.CONVERGED for status in self.status)

    @property
    def success(self) -> bool:
        """No row failed: each is converged, attainable, approximate or unchecked."""
        return all(Status(status).success for status in self.status)

    @property
    def worst(self) -> float:
        """The largest relative residual of all rows that have one, 0 without rows, NaN where no row has one."""
        known = self.residual[~self.residual.isnan()]
        return float(known.max()) if len(known) else 0.0 if not len(self.residual) else float("nan")

    @property
    def counts(self) -> str:
        """How many rows ended how, in words."""
        return ", ".join(f"{count} {status}" for status, count in Counter(map(str, self.status)).items()) or "no rows"

    def _describe(self) -> Description:
        shape = " × ".join(f"{length:,}" for length in self.x.shape)
        dtype = str(self.x.dtype).removeprefix("torch.")
        level = level_text(self.status, self.info)
        facts = [("status", f"{self.counts}, {residual_text(self.residual.tolist())}{level}")]
        facts += [("method", f"{self.method}, damping {self.damping:g}")]
        facts += truncation_facts(self.info)
        facts += [("steps", f"at most {max(self.iterations)}")] if any(self.iterations) else []
        facts += [("products", f"{self.info['products']}")] if "products" in self.info else []
        return Description(f"Solution({shape}, {dtype}, {self.x.device})", facts)


def residual_text(residuals: Iterable[float]) -> str:
    """Return the worst of some residuals in words; NaN is one that was not computed."""
    given = list(residuals)
    known = [residual for residual in given if residual == residual]
    if given and not known:
        return "no residual computed"
    return f"worst residual {max(known, default=0.0):.1e}"


def truncation_facts(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return to which rank solutions were truncated, and the largest change by that; nothing where they were not."""
    if "query_rank" not in info:
        return []
    worst = max((change for change in info["truncation"].tolist() if change == change), default=0.0)
    return [("solutions", f"rank {info['query_rank']} for each weight, relative change up to {worst:.1e}")]


def level_text(statuses: Iterable[str], info: Mapping[str, Any]) -> str:
    """Return the level that rounding allows in words, where a row stopped there; nothing otherwise."""
    levels = info.get("attainable")
    if levels is None:
        return ""
    reached = [level for status, level in zip(statuses, levels, strict=True) if status == Status.ATTAINABLE]
    return f" (rounding allows {float(max(reached)):.1e})" if reached else ""
