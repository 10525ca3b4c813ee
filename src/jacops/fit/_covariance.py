"""Covariances of what a fit found, from the factor of its normal matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._requirements import check_flag
from ..errors import InputError, SolveError
from ._columns import FitColumns
from ._freedom import UNSEEN, free_directions, what_to_hold
from ._marginals import SparseInverse
from ._sandwich import Sandwich
from ._solvers import check_pivots, factorised, triangle
from ._system import LinearizedFit, Singular

if TYPE_CHECKING:
    from ._result import LeastSquaresResult

_SUSPECT = 1e-9  # pivots of a matrix with unit diagonal: those of free directions are rounding, up to 1e-11 was seen


@dataclass(frozen=True, eq=False)
class DenseInverse:
    """The inverse from the triangle of a QR factorisation.

    Attributes:
        root: The inverse of the triangle, transposed.
    """

    root: np.ndarray

    @classmethod
    def of(cls, J: np.ndarray) -> DenseInverse:
        """Return the inverse of the normal matrix of a Jacobian.

        Raises:
            Singular: It has no full rank.
        """
        R = triangle(torch.from_numpy(J))[2]
        eye = torch.eye(len(R), dtype=R.dtype)
        return cls(torch.linalg.solve_triangular(R.T, eye, upper=False).numpy())

    def entries(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the entries at pairs of rows and columns."""
        wanted, index = np.unique(np.r_[rows, columns], return_inverse=True)
        return self.joint(wanted)[index[: len(rows)], index[len(rows) :]]

    def joint(self, columns: np.ndarray) -> np.ndarray:
        """Return the rows and columns at these positions."""
        root = self.root[:, columns]
        return root.T @ root


def joint(result: LeastSquaresResult[Any], columns: Any, rows: Any, absolute: bool, robust: bool) -> np.ndarray:
    """Return the covariance of chosen columns, as `LeastSquaresResult.covariance`."""
    system, variance = _asked(result, absolute, robust)
    wanted = _chosen(result, system, columns, rows)
    moving, index = np.unique(wanted[wanted >= 0], return_inverse=True)
    found, some = np.zeros((len(wanted), len(wanted))), _inverse(system, result, robust).joint(moving)
    if not robust:
        scale = system.equilibration(None)[moving]
        some = some / np.outer(scale, scale)
    inside = np.flatnonzero(wanted >= 0)
    found[np.ix_(inside, inside)] = some[np.ix_(index, index)]
    return variance * _checked(found, np.diag(found), result)


def blocks(
    result: LeastSquaresResult[Any], name: str | None, rows: Any, against: Any, absolute: bool, robust: bool
) -> np.ndarray:
    """Return covariances of pairs of rows, as `LeastSquaresResult.marginals`."""
    system, variance = _asked(result, absolute, robust)
    own = _columns(result).of(name).rows(rows)
    other = own if against is None else _other(result, name, against)
    if len(own) != len(other):
        raise InputError.of("against", f"{len(other)} rows", f"one for each of the {len(own)} rows is needed")
    shape = len(own), own.shape[1], other.shape[1]
    a, b = np.broadcast_to(own[:, :, None], shape), np.broadcast_to(other[:, None], shape)
    moves = (a >= 0) & (b >= 0)
    found = np.zeros(shape)
    found[moves] = _inverse(system, result, robust).entries(a[moves], b[moves])
    if not robust:
        scale = system.equilibration(None)
        found[moves] /= scale[a[moves]] * scale[b[moves]]
    return variance * _checked(found, found[moves & (a == b)], result)


def _asked(result: LeastSquaresResult[Any], absolute: bool, robust: bool) -> tuple[LinearizedFit, float]:
    """Return the linearised problem and the variance of a residual of weight one."""
    check_flag("robust", robust)
    if absolute and robust:
        raise InputError.of("robust", "True with `absolute=True`", "its variances are those of the residuals left over")
    system = result._system
    if system is None:
        raise SolveError("there is no Jacobian at the end of this call, so no covariance", result)
    rows, size = system.J.shape
    absolute = absolute or robust
    if not absolute and rows <= size:
        came = f"of {rows} residuals for {size} columns"
        todo = "Pass `absolute=True` if weights are inverse variances."
        raise InputError.of("the problem", came, "the variance is estimated from what is left over", todo)
    return system, 1.0 if absolute else 2 * result.cost / (rows - size)


def _columns(result: LeastSquaresResult[Any]) -> FitColumns:
    if result._columns is None:
        raise InputError.of("name", "given", "a file of an older version does not hold which columns are whose")
    return result._columns


def _other(result: LeastSquaresResult[Any], name: str | None, against: Any) -> np.ndarray:
    if not isinstance(against, Mapping):
        return _columns(result).of(name).rows(against)
    if len(against) != 1:
        raise InputError.of("against", f"rows of {len(against)} parameters", "rows of one are needed")
    ((other, rows),) = against.items()
    return _columns(result).of(other).rows(rows)


def _chosen(result: LeastSquaresResult[Any], system: LinearizedFit, columns: Any, rows: Any) -> np.ndarray:
    """Return the numbers of columns that the caller means; -1 for fixed ones."""
    size = system.J.shape[1]
    if columns is None and rows is not None:
        return _columns(result).of(None).rows(rows).reshape(-1)
    if columns is None:
        return np.arange(size)
    listed = columns if isinstance(columns, str | Mapping) else list(columns)
    if isinstance(listed, str | Mapping) or any(isinstance(each, str) for each in listed):
        return _columns(result).chosen(listed, rows)
    if rows is not None:
        raise InputError.of("rows", "given with positions", "they belong to one parameter", "Pass its name before.")
    wanted = np.asarray(listed if listed else np.zeros(0, np.int64))
    if wanted.dtype.kind not in "iu":
        raise InputError.of("columns", repr(columns), "parameter names or whole numbers are needed")
    if wanted.size and not (wanted.min() >= 0 and wanted.max() < size):
        raise InputError.of("columns", f"reaching from {wanted.min()} to {wanted.max()}", f"there are {size}")
    return wanted


def _inverse(
    system: LinearizedFit, result: LeastSquaresResult[Any], robust: bool
) -> SparseInverse | DenseInverse | Sandwich:
    """Return the inverse of the normal matrix with unit diagonal, or the robust covariance; the problem keeps it.

    Raises:
        SolveError: It is singular.
    """
    kind = "sandwich" if robust else "inverse"
    found = system.memory.get(kind)
    if found is None:
        try:
            found = system.memory[kind] = Sandwich.of(system) if robust else _of_normal(system)
        except Singular:
            raise _failure(result) from None
    return found


def _of_normal(system: LinearizedFit) -> SparseInverse | DenseInverse:
    if (system.norms == 0).any():
        raise Singular("a column of zeros")
    if not system.is_sparse:
        return DenseInverse.of(system.J / system.equilibration(None))
    factor = factorised(system)
    check_pivots(factor.pivots, "sparse_cholesky")
    if factor.pivots.min(initial=1.0) < _SUSPECT and free_directions(system, UNSEEN):
        raise Singular("a direction changes no residual")
    return SparseInverse(factor)


def _failure(result: LeastSquaresResult[Any]) -> SolveError:
    system, names = result._system, result._columns
    todo = "hold something fixed with `fixed=`"
    if system is not None and names is not None:
        todo = what_to_hold(system, names, None)
    about = "the Jacobian at the end has no full rank, so that some direction has no variance"
    return SolveError(f"{about}: {todo}.", result)


def _checked(found: np.ndarray, variances: np.ndarray, result: LeastSquaresResult[Any]) -> np.ndarray:
    """Return covariances that are finite, of variances that are not negative."""
    if not (np.isfinite(found).all() and (variances >= 0).all()):
        raise _failure(result)
    return found
