"""Bounds on b' A^-1 b from below and above, from a few products: Gauss and Gauss-Radau quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._keywords import keywords
from .._lanczos import KrylovSpace
from .._operators import Operator
from .._operators._graphs import without_graph
from .._requirements import check_positive
from .._runtime.contexts import eager
from ..errors import InputError
from ._judge import Judge, times
from ._system import System

_WORKING_ENTRIES = 2**26  # 512 MiB of Krylov bases in float64


@final
@dataclass(frozen=True, eq=False)
class Bounds:
    """A lower and an upper bound per row.

    Attributes:
        lower: `(k,)`, in double.
        upper: `(k,)`, in double.
        steps: Products per row.
    """

    lower: Tensor
    upper: Tensor
    steps: int


@keywords()
@eager
def inverse_quadratic_bounds(operator: Operator, rows: Tensor, *, damping: float, steps: int = 30) -> Bounds:
    r"""Bracket $b^\top (A + \lambda I)^{-1} b$ for each row b, such as the self-influence of a sample's gradient.

    Lanczos's matrix of each row gives a lower bound (Gauss) and, since no eigenvalue is below $\lambda$, an upper one
    (Gauss-Radau); both tighten with every step (Golub and Meurant, 1994). The vectors are kept orthogonal; without
    that rounding can break the upper one late.

    Args:
        operator: A positive operator.
        rows: `(k, n)`, or one as `(n,)`.
        damping: $\lambda > 0$.
        steps: Products per row, at most; fewer where the space ends.

    Returns:
        `Bounds` with `lower` and `upper`, each `(k,)` in double precision; NaN for rows with NaN or Inf.

    Raises:
        InputError: The operator is not marked positive, `damping` is 0, or the rows do not fit.

    Example:
        >>> from jacops.linalg import Matrix
        >>> A = Matrix(torch.diag(torch.tensor([1.0, 3.0])), symmetric=True, positive=True)
        >>> found = inverse_quadratic_bounds(A, torch.ones(2), damping=1.0)
        >>> found.lower, found.upper
        (tensor([0.7500], dtype=torch.float64), tensor([0.7500], dtype=torch.float64))
    """
    operator = without_graph(operator)
    system = System(operator, damping)
    rows = rows.unsqueeze(0) if isinstance(rows, Tensor) and rows.ndim == 1 else rows
    operator.domain.check_rows("rows", rows)
    if not operator.positive or not damping > 0:
        raise InputError.of("operator", repr(operator), "bounds need a positive one, and damping above 0")
    check_positive("steps", steps)
    k, capacity = rows.shape[0], min(steps, system.n)
    lower = torch.zeros(k, dtype=torch.float64, device=rows.device)
    upper = lower.clone()
    judge = Judge(system, rows)
    for where in judge.solvable.split(max(1, _WORKING_ENTRIES // max(1, capacity * system.n))):
        if len(where):
            square = judge.size[where] ** 2
            below, above = _bounds(system, judge.rows[where], capacity)
            shift = 2 * judge.exponents[where] - system.fixed()
            lower[where], upper[where] = _in_range(square * below, square * above, shift)
    finite = rows.isfinite().all(1)
    return Bounds(lower.where(finite, math.nan), upper.where(finite, math.nan), capacity)


def _in_range(lower: Tensor, upper: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds times powers of two; what leaves the range of double precision still is a bound."""
    limits = torch.finfo(torch.float64)
    lower, upper = (times(bound.unsqueeze(1), shift)[:, 0] for bound in (lower, upper))
    smallest = limits.tiny * limits.eps
    return lower.clamp(0.0, limits.max).nan_to_num(0.0), upper.clamp_min(smallest).nan_to_num(math.inf, math.inf)


def _bounds(system: System, rows: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return the bounds for unit vectors along the rows."""
    krylov = KrylovSpace(system.apply, rows.unsqueeze(1), capacity).fill()
    T = krylov.projected
    runs, m, _ = T.shape
    last = torch.linalg.vector_norm(krylov.ritz().residuals, dim=1)
    eye = torch.eye(m, dtype=T.dtype, device=T.device)
    right = last.square().reshape(-1, 1, 1) * eye[:, -1:]
    # A little below the least eigenvalue, so that T less it stays invertible; the bound stays one, and as sharp.
    ends = torch.linalg.solve_ex(T - 0.999999 * system.damping * eye, right).result
    bordered = T.new_zeros(runs, m + 1, m + 1)
    bordered[:, :m, :m] = T
    bordered[:, m, m] = system.damping + ends[:, -1, 0]
    bordered[:, m - 1, m] = bordered[:, m, m - 1] = last
    return _corner(T), _corner(bordered)


def _corner(T: Tensor) -> Tensor:
    """Return the first entry of each inverse."""
    unit = torch.eye(T.shape[1], dtype=T.dtype, device=T.device)[:, :1]
    return torch.linalg.solve_ex(T, unit.expand(T.shape[0], -1, 1)).result[:, 0, 0]
