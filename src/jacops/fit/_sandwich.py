r"""Covariances that do not rest on a distribution of residuals: $A^{-1} B A^{-1}$.

With $g_k$ the gradient of one block of residuals, $B = \sum_k g_k g_k^\top$, and $A$ the Hessian of the objective,
second derivatives of the residuals left out (Huber, The behavior of maximum likelihood estimates under nonstandard
conditions, 1967; White, A heteroskedasticity-consistent covariance matrix estimator, 1980).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..sparse._matrix import csc, csr, sp
from ._solvers import check_pivots
from ._system import LinearizedFit, Singular, positive


def sandwich(system: LinearizedFit, columns: np.ndarray) -> np.ndarray:
    r"""Return the covariance of some columns, times $m / (m - n)$ for m blocks and n columns (MacKinnon, White, 1985).

    Raises:
        Singular: The Hessian is.
        InputError: There are no more blocks than columns, or it is not known which rows make a block.
    """
    if system.samples is None or system.curvature is None:
        raise InputError.of("robust", "True", "a file of an older version does not hold which residuals are one block")
    if (system.norms == 0).any():
        raise Singular("a column of zeros")
    scale, blocks = system.equilibration(None), system.curvature
    J = system.J @ sp.diags_array(1 / scale) if system.is_sparse else system.J / scale
    shape = len(blocks), len(system.samples)
    gradients = csr((system.r, (system.samples, np.arange(shape[1]))), shape=shape) @ J
    sizes = np.sqrt(np.bincount(system.samples, np.square(system.r), len(blocks)))
    count, size = int((np.bincount(system.samples, _squares(J), len(blocks)) > 0).sum()), J.shape[1]
    if count <= size:
        raise InputError.of("robust", f"True for {count} blocks of residuals", f"more than {size} columns are needed")
    # J.T @ J has the curvature along each residual as it was corrected; the rest is added, where it is another one.
    rest = np.where(sizes > 0, (blocks - 1) / positive(sizes) ** 2, 0.0)
    weighted = csr(sp.diags_array(rest)) @ gradients
    found = _solved(J.T @ J + gradients.T @ weighted, np.eye(size)[:, columns])
    parts = (gradients @ found) / scale[columns]
    return count / (count - size) * parts.T @ parts


def _squares(J: Any) -> np.ndarray:
    return np.asarray(J.power(2).sum(1)).reshape(-1) if sp.issparse(J) else np.square(J).sum(1)


def _solved(hessian: Any, right: np.ndarray) -> np.ndarray:
    if not sp.issparse(hessian):
        try:
            found = np.linalg.solve(hessian, right)
        except np.linalg.LinAlgError as error:
            raise Singular(str(error)) from None
        check_pivots(np.abs(np.linalg.eigvalsh(hessian)), "robust")
        return found
    from scipy.sparse.linalg import splu

    try:
        factor = splu(csc(hessian))
    except RuntimeError as error:
        raise Singular(str(error)) from None
    check_pivots(np.abs(factor.U.diagonal()), "robust")
    return factor.solve(right)
