r"""Many linearised problems of one shape: their steps and what these predict, each problem for itself.

All of it is made of the triangles of $U = Q R$, $U$ a problem's Jacobian with unit columns: a damped step, or one that
holds some columns, is that of the triangle with rows of a diagonal matrix below it. Triangles are Cholesky factors of
$U^\top U$ where this has enough digits, else those of $U$ itself; what has no full rank goes to singular values.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ._certificate import FEW, MOST_REDUCTION, ROUNDING
from ._layout import Values
from ._second_order import DOUBTED, MINIMUM
from ._state import NOISE
from ._strategies import dogleg
from ._system import positive
from ._undamped import shortest

_PIVOT = 1e-6  # smallest entry of a triangle's diagonal, of unit columns, whose step has ten digits in double precision
_COARSE = 1e4  # or so many rounding errors of the Jacobian, since gains along smaller ones are uncertain by 1e-8
_SQUARED = 1e-3  # smallest entry of a Cholesky factor's diagonal whose squares leave ten digits
# Why a point is a minimum, by number.
REASONS = (
    "",
    "the objective is zero",
    "every residual is at the rounding level of its terms",
    "an undamped step predicts a reduction of at most 1e-8 of the objective",
    "an undamped step moves every residual by no more than the rounding of its terms",
    "every parameter is at a bound that the gradient leads out of",
    "residuals are near the rounding level of their terms",
)
AT_ROUNDING, BY_CURVATURE = len(REASONS) - 1, len(REASONS)
REASONS = (*REASONS, MINIMUM)


@dataclass(eq=False)
class Points:
    """Where problems are, linearised.

    Attributes:
        values: Their parameters by name, (n, ...).
        cost: Objectives, (n,).
        J: Jacobians, weighted and corrected, (n, rows, columns).
        gram: `J.T @ J`, (n, columns, columns), not finite where squares overflow.
        norms: Norms of their columns, (n, columns).
        r: Residuals, weighted and corrected, (n, rows).
        raw: Outputs minus targets, (n, rows).
        terms: Magnitudes of what residuals are differences of, (n, rows).
        magnitudes: Magnitudes of what columns move, (n, columns).
        lengths: What lengths of steps are measured with, (n, columns), positive.
        unit: Factor that makes a damping in these scales one in units of the normal matrix, (n, 1).
        eps: Relative rounding error of `J` and `r`.
        room: How far columns may go down and up, (n, columns) each; None without bounds.
    """

    values: Values
    cost: np.ndarray
    J: np.ndarray
    gram: np.ndarray
    norms: np.ndarray
    r: np.ndarray
    raw: np.ndarray
    terms: np.ndarray
    magnitudes: np.ndarray
    lengths: np.ndarray
    unit: np.ndarray
    eps: float
    room: tuple[np.ndarray, np.ndarray] | None

    @property
    def is_finite(self) -> np.ndarray:
        """Whether residuals and Jacobian of each problem are finite."""
        return np.asarray(by_column(np.isfinite(self.norms)).all(0) & by_column(np.isfinite(self.r)).all(0))

    def silence(self, which: np.ndarray) -> None:
        """Take the residuals of some problems for zero, before anything is made of them."""
        for array in (self.J, self.gram, self.norms, self.r, self.terms):
            array[which] = 0.0

    def some(self, which: np.ndarray) -> Points:
        """Return some of the points, with what has been computed of them."""
        places = torch.from_numpy(which)

        def picked(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return value[which]
            if isinstance(value, dict):
                return {name: tensor[places.to(tensor.device)] for name, tensor in value.items()}
            return tuple(picked(part) for part in value) if isinstance(value, tuple) else value

        found = copy(self)
        vars(found).update({name: picked(value) for name, value in vars(self).items()})
        return found

    @cached_property
    def gradient(self) -> np.ndarray:
        """The gradient of the objective, (n, columns)."""
        return np.matmul(self.r[:, None], self.J)[:, 0]

    @cached_property
    def blocked(self) -> np.ndarray:
        """Columns at a bound that the gradient leads out of."""
        if self.room is None:
            return np.zeros(self.norms.shape, dtype=bool)
        down, up = self.room
        return ((down >= 0) & (self.gradient > 0)) | ((up <= 0) & (self.gradient < 0))

    @cached_property
    def optimality(self) -> np.ndarray:
        """The scaled gradient: the largest cosine between residual and a column that bounds leave."""
        slopes = np.where(self.blocked, 0.0, np.abs(self.gradient) / positive(self.norms))
        largest = by_column(slopes).max(0, initial=0.0)
        return np.where(self.cost > 0, largest / np.sqrt(2 * positive(self.cost)), 0.0)

    @cached_property
    def _triangle(self) -> tuple[np.ndarray, np.ndarray]:
        """The triangles of unit columns, and what their orthogonal factors make of the residuals."""
        norms = positive(self.norms)
        cosines = self.gram / (norms[:, :, None] * norms[:, None])
        diagonal = np.arange(norms.shape[1])
        cosines[:, diagonal, diagonal] = 1.0  # also of columns of zeros, which never move
        lower, info = torch.linalg.cholesky_ex(torch.from_numpy(cosines))
        right = torch.from_numpy((self.gradient / norms)[:, :, None])
        along = torch.linalg.solve_triangular(lower, right, upper=False).numpy()[:, :, 0]
        R, pivots = lower.mT.numpy(), lower.diagonal(dim1=1, dim2=2).amin(1)
        weak = (~(pivots > _SQUARED) | (info != 0)).nonzero()[:, 0].numpy()
        if len(weak):
            R = R.copy()
            R[weak], along[weak] = self._by_qr(weak)
        return R, along

    def _by_qr(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the same of some problems without squaring their numbers."""
        columns = self.J.shape[2]
        Q, R = torch.linalg.qr(torch.from_numpy(self.J[which] / positive(self.norms)[which, None]))
        along, rows = np.matmul(self.r[which, None], Q.numpy())[:, 0], R.shape[1]
        below = ((0, 0), (0, columns - rows))
        return np.pad(R.numpy(), (*below, (0, 0))), np.pad(along, below)

    def moved(self, step: np.ndarray) -> np.ndarray:
        """Return what the Jacobians make of steps, (n, rows)."""
        return np.matmul(self.J, step[:, :, None])[:, :, 0]

    def predicted(self, step: np.ndarray) -> np.ndarray:
        """Return the reductions of the objective that the linearised problems predict."""
        moved = self.moved(step)
        return -np.einsum("nk,nk->n", self.gradient, step) - np.einsum("nm,nm->n", moved, moved) / 2

    @cached_property
    def newton(self) -> tuple[np.ndarray, np.ndarray]:
        """The Gauss-Newton steps, the shortest where rank lacks, and the columns that they move.

        Columns at a bound that the gradient or the step leads out of are held.
        """
        free = (self.norms > 0) & ~self.blocked
        step = self._undamped(free)
        if self.room is not None:
            down, up = self.room
            for _ in range(free.shape[1]):
                out = free & (((down >= 0) & (step < 0)) | ((up <= 0) & (step > 0)))
                if not out.any():
                    break
                free = free & ~out
                step = self._undamped(free)
        return step, free

    @cached_property
    def whole(self) -> np.ndarray:
        """The reductions that the Gauss-Newton steps predict."""
        return self.predicted(self.newton[0])

    def bent(self, whole: np.ndarray, radius: np.ndarray) -> np.ndarray:
        """Return the Gauss-Newton steps, of problems that are not to take the whole one where dogleg paths end.

        Args:
            whole: Which problems take it whole.
            radius: The radius of each, which the steps of the others exceed.
        """
        step, which = self.newton[0].copy(), (~whole).nonzero()[0]
        rows: Any = which if 2 * len(which) <= len(whole) else slice(None)  # a copy of most Jacobians costs more
        if len(which):
            lengths = self.lengths[rows]
            slope = np.where(self.newton[1], self.gradient, 0.0)[rows] / lengths
            moved = np.matmul(self.J[rows], (slope / lengths)[:, :, None])[:, :, 0]
            bend = np.einsum("nm,nm->n", moved, moved)
            path = dogleg(step[rows] * lengths, slope, bend, radius[rows]) / lengths
            step[rows] = np.where(whole[rows, None], step[rows], path)
        return step

    def damped(self, damping: np.ndarray) -> np.ndarray:
        """Return the steps for a damping per column, (n, columns), that is added to the normal matrix."""
        free = self.newton[1]
        return self._solved(free, np.sqrt(damping) / positive(self.norms))[0]

    def _undamped(self, free: np.ndarray) -> np.ndarray:
        step, pivots = self._solved(free, None)
        weak = (~(pivots > max(_PIVOT, _COARSE * self.eps)) & by_column(free).any(0)).nonzero()[0]
        if len(weak):
            unit = self.J[weak] / positive(self.norms)[weak, None] * free[weak, None]
            finite = np.isfinite(unit).all((1, 2))
            step[weak] = 0.0
            step[weak[finite]] = shortest(unit[finite], self.r[weak[finite]], self.eps)[0] / positive(
                self.norms[weak[finite]]
            )
        return step

    def _solved(self, free: np.ndarray, diagonal: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return steps of the free columns, and the smallest entry of each triangle's diagonal."""
        R, along = self._triangle
        below = np.where(free, 0.0 if diagonal is None else diagonal, 1.0)
        if below.any():
            many, columns = free.shape
            stack = np.zeros((many, R.shape[1] + columns, columns))
            np.multiply(R, free[:, None], out=stack[:, : R.shape[1]])
            stack[:, R.shape[1] + np.arange(columns), np.arange(columns)] = below
            Q, T = torch.linalg.qr(torch.from_numpy(stack))
            R, along = T.numpy(), np.matmul(along[:, None], Q.numpy()[:, : along.shape[1]])[:, 0]
        pivots = smallest_pivots(R)
        upper, right = torch.from_numpy(np.ascontiguousarray(R)), torch.from_numpy(-along[:, :, None])
        step = torch.linalg.solve_triangular(upper, right, upper=True).numpy()[:, :, 0]
        step = np.where(free, step / positive(self.norms), 0.0)
        return step, np.where(by_column(np.isfinite(step)).all(0), pivots, 0.0)

    # ---- evidence ----------------------------------------------------------------------------------------------

    @cached_property
    def magnitude(self) -> np.ndarray:
        """Magnitudes of the terms each residual is made of: outputs, targets, and parameters times slopes."""
        return self.terms + np.matmul(np.abs(self.J), self.magnitudes[:, :, None])[:, :, 0]

    @cached_property
    def noise(self) -> np.ndarray:
        """How far rounding of the residuals moves the objectives."""
        products = self.r * self.magnitude
        return NOISE * self.eps * np.maximum(2 * self.cost, np.sqrt(np.einsum("nm,nm->n", products, products)))

    @cached_property
    def evidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Why each point is a minimum, by number in `REASONS`, 0 for no reason; what an undamped step predicts there.

        The third is where the evidence would be the rounding level, which counts once steps change nothing.
        """
        step, free = self.newton
        rounding = ROUNDING * self.eps * self.magnitude
        few = FEW / ROUNDING * rounding
        moved, held = np.abs(self.moved(step)), ~free & ~self.blocked & (self.norms > 0)
        gains = np.where(held, np.square(self.gradient / positive(self.norms)) / 2, 0.0).sum(1)
        known = self.cost > 0
        share = np.maximum(self.whole + gains, 0.0) / positive(self.cost)
        moves = by_column(self.norms).any(0)
        tests = [
            ~known,
            by_column(np.abs(self.r) <= few).all(0),
            moves & (share <= MOST_REDUCTION),
            moves & (gains == 0) & by_column(moved <= few).all(0),
            moves & by_column(self.blocked).all(0),
        ]
        reason = np.select(tests, [1, 2, 3, 4, 5], 0)
        close = by_column(np.abs(self.r) <= rounding).all(0) | (moves & by_column(moved <= rounding).all(0))
        return reason, np.where(known, share, 0.0), np.asarray(close)

    def doubted(self, which: np.ndarray) -> np.ndarray:
        """Return the points among these where the Jacobian is singular, or predicts much although steps end."""
        reason, predicted, _ = self.evidence
        pivots = smallest_pivots(self._triangle[0])
        singular = by_column(self.norms == 0).any(0) | ~(pivots > max(_PIVOT, _COARSE * self.eps))
        found = which & (reason != 1) & (singular | ((reason == 0) & (predicted >= DOUBTED)))
        if found.any():
            found &= by_column(np.abs(self.r) > ROUNDING * self.eps * self.magnitude).any(0)
        return found


def by_column(rows: np.ndarray) -> np.ndarray:
    """Return numbers that stand in rows, one row per problem, column by column.

    NumPy reduces many short rows one by one: the largest of each of 5,000 x 3 numbers takes 140 µs, and 7 µs so.
    """
    return rows.T.copy()


def row_norms(rows: np.ndarray) -> np.ndarray:
    """Return the norm of each row."""
    return np.sqrt(np.einsum("nk,nk->n", rows, rows))


def smallest_pivots(triangles: np.ndarray) -> np.ndarray:
    """Return the smallest entry of each triangle's diagonal."""
    return by_column(np.abs(np.diagonal(triangles, axis1=1, axis2=2))).min(0, initial=np.inf)


def column_norms(J: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return the norms of the columns of Jacobians, safe from overflow and underflow.

    Args:
        J: The Jacobians, (n, rows, columns).
        gram: `J.T @ J`.
    """
    squares = np.diagonal(gram, axis1=1, axis2=2)
    norms = np.sqrt(squares)
    unsafe = ~((squares > 1e-250) & (squares < 1e250))  # digits may be lost; the smallest normal number is 2e-308
    if unsafe.any():
        largest = np.abs(J).max(1, initial=0.0)
        safe = largest * np.sqrt(np.square(J / positive(largest)[:, None]).sum(1))
        norms = np.where(unsafe, safe, norms)
    return norms
