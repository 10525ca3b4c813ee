r"""Evidence by exact second derivatives, for points where $J^\top J$ gives none.

Where the Jacobian has no full rank and residuals are not zero, $J^\top J$ is no approximation of the Hessian along what
it lacks: `x ** 2 + 1` has its minimum where it is zero, and `x ** 2 - 1` a maximum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._runtime.contexts import must_surface, recording
from .._runtime.kernels import norms_written_out
from .._runtime.restoring import restoring
from ._certificate import MOST_REDUCTION, Certificate
from ._implicit import Minima, factorised_hessians
from ._state import FitPoint
from ._undamped import lacks_rank

if TYPE_CHECKING:
    from ._problem import FitProblem

MOST_COLUMNS = 100  # each takes a pull for the Hessian; with more it is not computed
DOUBTED = 1e-2  # least reduction that an undamped step predicts where steps end: that is not its rounding
MINIMUM = "the exact Hessian is positive definite, and a Newton step with it predicts a reduction of at most 1e-8"
FLAT = "the Jacobian is zero: no parameter changes a residual here"
SADDLE = (
    "the gradient is zero, and the Hessian of the objective has a negative curvature: this is a saddle or a maximum. "
    "Start elsewhere"
)
_BENT = 4.0  # sized gradients that curvatures may be made of
_ROUNDING = 1e3  # rounding errors of a Hessian, sums over as many terms as residuals have
_FALLS = 1e-6  # least fall, by the size of the parameters, relative to the objective, that is not a rounding error


def by_curvature(
    problem: FitProblem, point: FitPoint, found: Certificate, refusals: int = 0
) -> tuple[Certificate, str]:
    """Return evidence by second derivatives where the Jacobian gives none, and why no step improves the point, if so.

    Args:
        problem: The problem.
        point: Where it is.
        found: The evidence by the Jacobian.
        refusals: How often a stop rule was met without evidence, as in `is_due`.
    """
    system = point.system
    flat, able = not system.norms.any(), len(system.norms) <= MOST_COLUMNS
    singular = not system.norms.all() or (able and lacks_rank(system))
    asked = singular if found.reason else is_due(refusals) and (singular or found.predicted >= DOUBTED)
    if asked and point.cost > point.floor:
        minimum = problem.minimum(problem.work, point.values, True)
        is_minimum, falls = minima_and_saddles(
            minimum, np.array([point.cost]), point.whole_magnitudes[None], system.eps
        )
        if falls[0] and (found.reason or flat):
            return replace(found, reason=""), SADDLE
        found = replace(found, reason=found.reason or MINIMUM) if is_minimum[0] else found
    return found, FLAT if flat and not found.reason else ""


def is_due(refusals: Any) -> Any:
    """Return whether the Hessian is computed after so many refusals of a stop rule: 0, 1, 3, 7 …, fewer and fewer."""
    return refusals & (refusals + 1) == 0


def minima_and_saddles(
    minima: Minima, cost: np.ndarray, sizes: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return which problems are at a minimum, and which at a point that the objective falls from both ways.

    Where second derivatives are not known, or the Hessian is singular, a problem is at neither.

    Args:
        minima: The problems; those with `success` are examined.
        cost: Their objectives, (n,).
        sizes: Magnitudes of what their free columns move, (n, columns).
        eps: Relative rounding error of residuals and Jacobians.
    """
    neither = np.zeros(len(cost), dtype=bool)
    if minima.layout.columns > MOST_COLUMNS or any(part.group for part in minima.layout.parts):
        return neither, neither
    try:
        gradient, H, free, usable = _expanded(minima)
    except (RuntimeError, TypeError, ValueError) as error:  # the fit itself goes on without them
        if must_surface(error):
            raise
        return neither, neither
    (factor, unit), regular = factorised_hessians(H, free, usable)
    regular &= factor.diagonal(dim1=1, dim2=2).square().amin(1) > _ROUNDING * eps
    gradient = torch.where(free, gradient, 0.0).double()
    lower = torch.where(regular[:, None, None], factor, torch.eye(H.shape[1]).to(factor))
    half = torch.linalg.solve_triangular(lower, (gradient / unit).unsqueeze(-1), upper=False)
    gains = half.square().sum((1, 2)).numpy() / 2
    sized = torch.from_numpy(np.maximum(sizes, 1.0)) * free
    curved = H * sized[:, :, None] * sized[:, None]
    least = torch.linalg.eigvalsh(curved)[:, 0].numpy()
    # Where turning everything changes no residual, the gradient that is left bends the objective along the turn.
    bent = _BENT * torch.linalg.vector_norm(gradient * sized, dim=1).numpy()
    rounding = _ROUNDING * eps * torch.linalg.matrix_norm(curved).numpy()
    falls = usable.numpy() & (least < -(_FALLS * cost + bent + rounding))
    return regular.numpy() & (gains <= MOST_REDUCTION * cost) & ~falls, falls


@restoring
def _expanded(minima: Minima) -> tuple[Any, ...]:
    like = next(iter(minima.values.values()))
    with recording(), norms_written_out():
        zero = like.new_zeros(len(like), minima.layout.columns).requires_grad_()
        gradient, H, usable = minima.expanded(zero, minima.success)
        gradient = gradient.detach()
        free = minima.free(gradient)
        H = torch.where(usable.to(H.device)[:, None, None], H, 0.0)
    return gradient.cpu(), H.cpu(), free.cpu(), usable.cpu()
