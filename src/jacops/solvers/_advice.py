"""What to do about a solve that failed, in words."""

from __future__ import annotations

import math

from ._solution import OUT_OF_RANGE, Solution, Status, gravest, residual_text


def advice(solution: Solution) -> str:
    """Return what failed, how far it came, and what to do."""
    status = gravest(solution.status)
    first = solution.status.index(status)
    asked = "" if math.isnan(solution.worst) else f" where {solution.info['tolerance']:.0e} was asked"
    head = (
        f"the solve by {solution.method} with damping {solution.damping:g} failed for "
        f"{sum(not Status(s).success for s in solution.status)} of {len(solution.status)} right-hand sides "
        f"({solution.counts}); the first {status} is row {first}; {residual_text(solution.residual.tolist())}{asked}. "
    )
    return head + _WORDS[status](solution) + " `on_failure='return'` returns what was found."


def _nonfinite(solution: Solution) -> str:
    return f"In `b`, {solution.info['nonfinite']}. Look for the gradient or sample that these rows came from."


def _negative(solution: Solution) -> str:
    lowest = solution.info.get("lowest_curvature")
    if lowest is None or not lowest <= 0:
        return "The operator is not positive definite. Raise `damping`, take the GGN, or use `MINRES()`."
    needed = solution.damping - lowest
    return (
        f"The damped operator is not positive definite: in one direction its curvature is {lowest:.3g}, so that "
        f"`damping` of more than {needed:.3g} is needed at least. Raise it (try {2 * needed:.1g}), take the GGN "
        "instead of the Hessian, or, if an indefinite system is meant, use `MINRES()` or `Direct(indefinite=True)`."
    )


def _singular(solution: Solution) -> str:
    found = solution.info.get("condition")
    known = f" (condition number about {found:.1e})" if found is not None else ""
    wider = "" if _is_double(solution) else " or run the problem in float64"
    return f"The damped operator is singular to rounding{known}. Raise `damping`{wider}."


def _diverged(solution: Solution) -> str:
    needed = solution.info.get("scale_needed")
    rescale = f"Use `scale={needed:.3g}` or more" if needed else "Leave `scale` out, to have it estimated"
    return f"The series grows: the scale is too small for the operator's largest eigenvalue. {rescale}, or use `CG()`."


def _broken(solution: Solution) -> str:
    reason = solution.info.get("reason", "numbers stopped being finite")
    if reason.startswith(OUT_OF_RANGE):
        wider = "" if _is_double(solution) else "Run the problem in float64, or rescale"
        return f"{reason[0].upper()}{reason[1:]}. {wider or 'Rescale'} the operator or `b`, or raise `damping`."
    return (
        f"The iteration broke down: {reason}. Use another preconditioner or none, raise `damping`, or use `Direct()`."
    )


def _stagnated(solution: Solution) -> str:
    level = float(solution.info["attainable"].nan_to_num(0.0).max())
    wider = "Raise `damping`" if _is_double(solution) else "Run the problem in float64, raise `damping`"
    return (
        f"It no longer improves; the level that rounding allows here is about {level:.1e}. {wider} or ask for a "
        "`tolerance` above that."
    )


def _unfinished(solution: Solution) -> str:
    if "pairs_found" in solution.info:
        found, asked = solution.info["pairs_found"], solution.info["pairs_asked"]
        return (
            f"Only {found} of {asked} eigenpairs converged. Raise `max_steps`, ask for a smaller `rank`, or use `CG()`."
        )
    return (
        f"It took {max(solution.iterations)} steps, as many as were allowed. Raise `max_steps` or `damping`, use a "
        "preconditioner (`CG(preconditioner='nystrom')`), or `Direct()` where the matrix fits into memory."
    )


_WORDS = {
    Status.NONFINITE_INPUT: _nonfinite,
    Status.NEGATIVE_CURVATURE: _negative,
    Status.SINGULAR: _singular,
    Status.DIVERGED: _diverged,
    Status.BREAKDOWN: _broken,
    Status.STAGNATED: _stagnated,
    Status.MAX_STEPS: _unfinished,
}


def _is_double(solution: Solution) -> bool:
    return solution.x.dtype.itemsize == 8
