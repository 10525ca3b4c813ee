"""Random probes of a compressed Jacobian: every row is judged by its own size, every column by what it holds.

One backward pass for a random cotangent u gives J^T u without any compression. With u drawn as noise divided by the
sizes of the rows, all rows enter alike however they are scaled, so that an entry missing in a row of small scale
changes J^T u as much as one missing in a row of large scale. Each column j is then compared at the scale of its own
terms, sqrt(sum_i (u_i J_ij)^2), since its rounding errors are of that size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._operators import Operator
from .._runtime.agreement import few_operations_tolerance, tolerance
from .._runtime.contexts import private_noise
from .._runtime.restoring import NumericWarningsIgnored, restoring
from .._space import Space
from ._matrix import Csr
from ._pool import Array

Floats = NDArray[np.float64]

# Rows down to this share of the largest are judged by their own size. Below, a row that is a difference of equal
# numbers would be judged by its rounding errors. In other dtypes all rows are judged alike: 1.
_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5}
# Sizes that changed by no more than this are still used: an entry as large as its row still stands out of a column
# of about a thousand others, tolerance * sqrt(1000) * spread being below _LEAST.
_SPREAD = {torch.float64: 1e4, torch.float32: 32.0}
_LEAST = 0.25  # smallest number in a single probe, so that no row is hidden by a small random number
_EMPTY = 1e-2  # a column is judged by no less than this share of the tolerance of the largest column
_RAISED = {torch.float64: 1e3, torch.float32: 30.0}  # steps of the floor: four reach 1 from _FLOOR


def rounding(dtypes: Iterable[torch.dtype]) -> float:
    """Return how far two right sums in these dtypes may differ, relative to the root of the sum of squared terms."""
    real = (dtype.to_real() if dtype.is_complex else dtype for dtype in dtypes)
    return max((few_operations_tolerance(dtype, tolerance([dtype])) for dtype in real), default=0.0)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The result of probes.

    Attributes:
        excess: The largest error of a column relative to its terms; infinite if a probe alone is not finite.
        error: The largest error of a probe relative to the whole.
        rms: Root mean square of the errors of the probes.
        column: Where the largest excess is.
    """

    excess: float
    error: float
    rms: float
    column: int = 0


def draw(rows: Space, seed: int, divisors: Floats | None = None, apart: bool = False) -> Tensor:
    """Return a random cotangent, divided by the sizes of the rows; `apart` keeps it off zero."""
    noise = private_noise(torch.empty(rows.dim, dtype=rows.dtype, device=rows.device), seed)
    noise = noise + torch.copysign(torch.full_like(noise, _LEAST), noise) if apart else noise
    if divisors is None:
        return noise
    return (noise.double().cpu() / torch.from_numpy(divisors)).to(rows.device, rows.dtype)


def row_sizes(matrix: Csr) -> Floats:
    """Return the largest entry of each row in absolute value."""
    sizes = np.zeros(matrix.shape[0])
    held = np.flatnonzero(np.diff(matrix.indptr))
    if len(held):
        sizes[held] = np.maximum.reduceat(np.abs(matrix.data), matrix.indptr[held])
    return sizes


@restoring
def divisors_of(sizes: Floats, floor: float, importance: Floats | None) -> Floats:
    """Return what to divide a probe by, at most 1: the sizes of the rows, small ones raised to a floor.

    Args:
        sizes: Of the rows.
        floor: Share of the largest.
        importance: What rows are multiplied with by the caller (weights of least squares); the floor is then a share
            of the largest weighted row, if that is less.
    """
    top = sizes.max(initial=0.0)
    if not 0 < top < math.inf:
        return np.ones(len(sizes))
    lowest = np.full(len(sizes), floor * top)
    if importance is not None:
        with NumericWarningsIgnored("divide", "over", "invalid"):
            reach = floor * (sizes * importance).max(initial=0.0) / importance
        lowest = np.fmin(lowest, np.where(reach > 0, reach, np.inf))
    # The least divisor keeps probes from overflowing in float32, whose largest number is 3e38.
    return np.maximum(np.maximum(sizes, lowest) / top, 1e-18)


@restoring
def judged(matrix: Csr, probes: list[Tensor], pulled: Tensor, column_of: Array, limit: float) -> Verdict:
    """Compare the pulls of probes with the products of a matrix.

    Args:
        matrix: The Jacobian as it was put together.
        probes: Cotangents.
        pulled: What backward passes gave for them, one row each.
        column_of: Which column of the matrix each entry of a pull adds to.
        limit: The excess below which nothing needs to be known exactly.
    """
    width, excess, errors, whole, column = matrix.shape[1], 0.0, [], _norm(matrix.data), 0
    with NumericWarningsIgnored("invalid", "over"):
        for probe, pull in zip(probes, pulled, strict=True):
            u = probe.double().cpu().numpy()
            given = merged(pull, column_of, width)
            off = np.abs(given - matrix.T @ u)
            errors.append(_norm(off))
            whole = max(whole, _norm(given))
            worst, where = _excess(matrix, u, given, off, limit)
            excess, column = (worst, where) if worst > excess else (excess, column)
    biggest = max(errors)
    error = (biggest / whole if whole else 0.0) if math.isfinite(biggest) else math.nan
    return Verdict(excess, error, _norm(np.array(errors)) / math.sqrt(len(errors)), column)


def merged(pull: Tensor, column_of: Array, width: int) -> Floats:
    """Return a pull by the columns of the matrix; padding, which comes last, is left out."""
    return np.bincount(column_of, pull.double().cpu().numpy(), minlength=width)[:width].astype(np.float64, copy=False)


def _excess(matrix: Csr, u: Floats, given: Floats, off: Floats, limit: float) -> tuple[float, int]:
    """Return the largest error relative to the terms of its column, and the column."""
    worst = off.max(initial=0.0)
    if not math.isfinite(worst):
        return math.inf, int(np.flatnonzero(~np.isfinite(off))[0])
    size = _EMPTY * np.abs(given).max(initial=0.0)
    if worst <= limit * size:
        return float(worst / size) if size else 0.0, 0
    terms = np.repeat(u, np.diff(matrix.indptr)) * matrix.data
    peak = np.abs(terms).max(initial=0.0) or 1.0
    sizes = np.sqrt(np.bincount(matrix.indices, np.square(terms / peak), minlength=len(off))) * peak
    least = _EMPTY * sizes.max(initial=0.0)
    relative = off / np.where(sizes + least > 0, sizes + least, np.finfo(np.float64).tiny)
    where = int(relative.argmax())
    return float(relative[where]), where


def _norm(values: np.ndarray) -> float:
    """Return the Euclidean norm, also where squares would overflow."""
    peak = float(np.abs(values).max(initial=0.0))
    return peak * float(np.linalg.norm(values.astype(np.float64) / peak)) if 0 < peak < math.inf else peak


@dataclass(eq=False)
class Prober:
    """The state of the probes of a plan between evaluations.

    Attributes:
        rows: The dtype of the rows.
        dtypes: Dtypes met on the way, whose coarsest decides what is rounding.
        floor: Rows below this share of the largest are judged by it.
        slack: Factor on the tolerance, from rounding errors that were measured.
        sizes: Size of each row when it last was not zero.
        divisors: What single probes are divided by; None for nothing.
    """

    rows: torch.dtype
    dtypes: frozenset[torch.dtype]
    floor: float = 1.0
    slack: float = 1.0
    sizes: Floats | None = None
    divisors: Floats | None = None
    _spread: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        self.floor = _FLOOR.get(self.rows, 1.0)
        self._spread = _SPREAD.get(self.rows, math.inf)

    @classmethod
    def of(cls, operator: Operator, met: frozenset[torch.dtype]) -> Prober:
        """Return the state at first, for an operator that met these dtypes inside."""
        return cls(operator.codomain.dtype, met.union(operator.codomain.dtypes, operator.domain.dtypes))

    def fits(self, operator: Operator, met: frozenset[torch.dtype]) -> bool:
        """Return whether it is that of such an operator."""
        other = Prober.of(operator, met)
        return (self.rows, self.dtypes) == (other.rows, other.dtypes)

    @property
    def tolerance(self) -> float:
        """The largest excess that counts as rounding."""
        return rounding(self.dtypes) * self.slack

    @property
    def whole(self) -> float:
        """The largest error relative to the whole that counts as rounding."""
        return rounding(self.dtypes)

    def outdated(self, matrix: Csr, used: Floats | None, importance: Floats | None) -> bool:
        """Return whether divisors `used` are too far from the sizes of the rows; then keep new ones."""
        sizes = row_sizes(matrix)
        if self._spread == math.inf or not np.isfinite(sizes).all():
            return False
        if self.sizes is not None and len(self.sizes) == len(sizes):
            sizes = np.where(sizes > 0, sizes, self.sizes)
        wanted = divisors_of(sizes, self.floor, importance)
        ratio = wanted if used is None else wanted / used
        if ratio.max(initial=0.0) <= self._spread * ratio.min(initial=math.inf):
            return False
        self.sizes, self.divisors = sizes, wanted
        return True

    def raise_floor(self, importance: Floats | None) -> bool:
        """Judge small rows by more than their own size; return whether that was possible."""
        if self.floor >= 1 or self.sizes is None:
            return False
        self.floor = min(1.0, self.floor * _RAISED.get(self.rows, math.inf))
        self.divisors = divisors_of(self.sizes, self.floor, importance)
        return True
