r"""Covariances that do not rest on a distribution of residuals: $A^{-1} B A^{-1}$.

With $g_k$ the gradient of one block of residuals, $B = \sum_k g_k g_k^\top$, and $A$ the Hessian of the objective,
second derivatives of the residuals left out (Huber, The behavior of maximum likelihood estimates under nonstandard
conditions, 1967; White, A heteroskedasticity-consistent covariance matrix estimator, 1980).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import InputError
from ..sparse._matrix import csc, csr, sp
from ._solvers import check_pivots
from ._system import LinearizedFit, Singular, positive

_PAIRS, _AT_ONCE = 16, 2**22  # pairs of columns worked with at once, at least; numbers by which there are more, 32 MiB


@dataclass(frozen=True, eq=False)
class Sandwich:
    r"""Such a covariance, entry by entry, times $m / (m - n)$ for m blocks and n columns (MacKinnon, White, 1985).

    Attributes:
        gradients: Those of each block, by columns of unit length, (blocks, columns).
        solve: The inverse of the Hessian by such columns, times columns.
        scale: What columns were divided by.
        factor: m / (m - n).
    """

    gradients: Any
    solve: Callable[[np.ndarray], np.ndarray]
    scale: np.ndarray
    factor: float

    @classmethod
    def of(cls, system: LinearizedFit) -> Sandwich:
        """Return the covariance of all columns of a problem.

        Raises:
            Singular: The Hessian is.
            InputError: There are no more blocks than columns, or it is not known which rows make a block.
        """
        if system.samples is None or system.curvature is None:
            needed = "a file of an older version does not hold which residuals are one block"
            raise InputError.of("robust", "True", needed)
        if (system.norms == 0).any():
            raise Singular("a column of zeros")
        scale, blocks = system.equilibration(None), system.curvature
        J = system.J @ sp.diags_array(1 / scale) if system.is_sparse else system.J / scale
        shape = len(blocks), len(system.samples)
        gradients = csr((system.r, (system.samples, np.arange(shape[1]))), shape=shape) @ J
        sizes = np.sqrt(np.bincount(system.samples, np.square(system.r), len(blocks)))
        count, size = int((np.bincount(system.samples, _squares(J), len(blocks)) > 0).sum()), J.shape[1]
        if count <= size:
            came, needed = f"True for {count} blocks of residuals", f"more than {size} columns are needed"
            raise InputError.of("robust", came, needed)
        # J.T @ J has the curvature along each residual as it was corrected; the rest is added, where it is another one.
        rest = np.where(sizes > 0, (blocks - 1) / positive(sizes) ** 2, 0.0)
        weighted = csr(sp.diags_array(rest)) @ gradients
        return cls(gradients, _solver(J.T @ J + gradients.T @ weighted), scale, count / (count - size))

    def joint(self, columns: np.ndarray) -> np.ndarray:
        """Return the rows and columns at these positions."""
        parts = self._parts(columns)
        return self.factor * parts.T @ parts

    def entries(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the entries at pairs of rows and columns."""
        found, many = np.empty(len(rows)), max(_PAIRS, _AT_ONCE // max(self.gradients.shape))
        for start in range(0, len(rows), many):
            own = slice(start, start + many)
            wanted, index = np.unique(np.r_[rows[own], columns[own]], return_inverse=True)
            parts, (left, right) = self._parts(wanted), np.split(index, 2)
            found[own] = np.einsum("mk,mk->k", parts[:, left], parts[:, right])
        return self.factor * found

    def _parts(self, columns: np.ndarray) -> np.ndarray:
        """Return a square root of the joint covariance of some columns."""
        unit = np.zeros((len(self.scale), len(columns)))
        unit[columns, np.arange(len(columns))] = 1 / self.scale[columns]
        return self.gradients @ self.solve(unit)


def _squares(J: Any) -> np.ndarray:
    return np.asarray(J.power(2).sum(1)).reshape(-1) if sp.issparse(J) else np.square(J).sum(1)


def _solver(hessian: Any) -> Callable[[np.ndarray], np.ndarray]:
    if not sp.issparse(hessian):
        from scipy.linalg import lu_factor, lu_solve

        check_pivots(np.abs(np.linalg.eigvalsh(hessian)), "robust")
        return partial(lu_solve, lu_factor(hessian))
    from scipy.sparse.linalg import splu

    try:
        factor = splu(csc(hessian))
    except RuntimeError as error:
        raise Singular(str(error)) from None
    check_pivots(np.abs(factor.U.diagonal()), "robust")
    return factor.solve
