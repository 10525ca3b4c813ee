r"""How strongly curvature is damped: by a given number, or relative to the curvature's own scale.

A network that was trained briefly has moved along the directions of large curvature only, and a retrained one moves
along these only, too: directions whose curvature is small beside the largest should have little weight in a score. So
`"auto"` is $\lambda = c\,\lVert A \rVert_2$. It has the units of the curvature, follows the loss's scale and reduction,
does not change where parameters are added that do nothing (the mean eigenvalue would), is defined for indefinite
curvature, and bounds the condition number of a positive system by $1 + 1/c$, so that solves converge in any precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, get_args

from .._estimators import spectral_norm
from .._operators import Operator
from .._requirements import check_range
from .._words import AutoDamping
from ..errors import InputError
from ..solvers import EKFAC, Solver

# By `python -m benchmarks.datamodelling --damping`, whose table is in `docs/influence.md`: five networks have their
# best shares between 0.001 and 0.05. At 0.02 all are well above plain products of gradients, and none is more than 14 %
# below its best; at 0.01 the first of them hardly is above, at 0.03 another one is 17 % below.
SHARE = 0.02
_TOLERANCE = 1e-2  # of the norm: no score changes by a larger share than the damping
_STEPS = 12  # of Lanczos, at most, which holds as many vectors; the largest eigenvalues of networks stand far apart
GIVEN = "given"
RULE = f"auto: {SHARE:g} × the spectral norm of the curvature"


class Damping(NamedTuple):
    r"""A damping and where it comes from.

    Attributes:
        value: $\lambda$.
        rule: In words, how it was chosen.
    """

    value: float
    rule: str = GIVEN


def checked_damping(damping: Any) -> float | AutoDamping:
    """Return a damping that is in range, or `"auto"`.

    Raises:
        InputError: It is neither.
    """
    if isinstance(damping, str):
        if damping not in get_args(AutoDamping):
            raise InputError.of("damping", repr(damping), "a number that is not negative or 'auto' is needed")
        return "auto"
    return check_range("damping", damping, zero=True)


def identity_of(damping: float | AutoDamping) -> str:
    """Return its entry in a stored run's identity: the number, or the rule."""
    return RULE if isinstance(damping, str) else repr(damping)


def settled(asked: float | AutoDamping, operator: Operator, solver: Solver) -> tuple[Damping, Solver]:
    """Return the damping of a curvature, and the solver with whatever it estimated for that.

    The norm comes by Lanczos, from a private seed. EK-FAC has eigenvalues of its own, and no pass over the data beside
    those that estimate them.

    Raises:
        InputError: There is no curvature to be relative to.
    """
    if not isinstance(asked, str):
        return Damping(asked), solver
    if isinstance(solver, EKFAC):
        factors = solver.approximate(operator)
        solver, norm, source = replace(solver, factors=factors), factors.largest, "the largest eigenvalue of EK-FAC"
    else:
        found = spectral_norm(operator, tolerance=_TOLERANCE, max_steps=_STEPS, progress=False)
        norm, source = found.value, f"± {found.error:.1g}, by {found.products} products"
    return relative(norm, source), solver


def relative(norm: float, source: str) -> Damping:
    """Return the damping of a curvature with this spectral norm.

    Raises:
        InputError: There is no curvature to be relative to.
    """
    if not norm > 0:
        needed = "'auto' takes a share of its norm: the loss is linear in the output, or nothing depends on it"
        raise InputError.of("damping", "'auto' where the curvature is zero", needed, "Pass a number.")
    return Damping(SHARE * norm, f"{RULE} ({norm:.4g}, {source})")
