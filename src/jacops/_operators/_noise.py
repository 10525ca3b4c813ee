"""How far a Monte Carlo estimate of a curvature may be off, by quadratic forms along random directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .._runtime.contexts import private_generator
from .._space import Space

# Of drawn terms along directions (k, n): the sums of squared terms and of terms, (k,) each.
Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
DIRECTIONS = 4  # one pass of few products; the mean over them settles the figure to some 10 %


def relative_noise(space: Space, parts: Iterable[tuple[float, Moments]]) -> float | None:
    r"""Return the relative standard error of $v^\top \hat F v$ for a random direction v, as an estimate from above.

    None where nothing was drawn.

    A sum of independent terms $t_i \ge 0$ has a variance of at most $\sum_i \mathrm{E}[t_i^2]$, which the terms
    themselves estimate. For normal slopes the result is 1.2 times the standard error.

    Args:
        space: The parameters.
        parts: Batches: the factor of each, and the moments of its terms.
    """
    squares = totals = directions = None
    for factor, moments in parts:
        if squares is None or totals is None or directions is None:
            directions = random_directions(space)
            squares = totals = torch.zeros(DIRECTIONS, dtype=torch.float64, device=space.device)
        fourth, second = moments(directions)
        squares, totals = squares + factor**2 * fourth.double(), totals + factor * second.double()
    return None if squares is None or totals is None else ratio(squares, totals)


def random_directions(space: Space) -> Tensor:
    """Return a few random directions, the same each time."""
    generator = private_generator(space.device, 0)
    rows = torch.randn(DIRECTIONS, space.dim, generator=generator, dtype=torch.float64, device=generator.device)
    return rows.to(space.device, space.dtype)


def ratio(squares: Tensor, totals: Tensor) -> float:
    """Return the root mean square over directions of what the sums of squares and of terms come to."""
    fine = totals > 0
    return float((squares[fine] / totals[fine].square()).mean().sqrt()) if bool(fine.any()) else 0.0
