r"""Cholesky's factorisation of a symmetric matrix that is needed afterwards too, for residuals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from .._operators import Matrix
from .._runtime.blas import in_place, runs_in_place
from ._system import CHUNK_ENTRIES, RowMap, in_double

# Entries of a matrix from which one array is worth loading a part of SciPy (0.1 s): 4 MiB in single precision.
_IN_PLACE = 2**20
_BY_ROW = 3  # rows up to which two triangular solves each, 2.8 ms at 4,810 unknowns, cost less than all at once, 10 ms
_TILE = 1024  # side of the blocks that are copied from one triangle to the other


class FactorisedMatrix(ABC):
    """A symmetric positive definite matrix with its factor."""

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """Return rows times the inverse."""

    @abstractmethod
    def image(self, rows: Tensor) -> Tensor:
        """Return rows of double precision times the matrix, computed in double."""


def cholesky(matrix: Tensor) -> FactorisedMatrix | None:
    """Return a symmetric matrix factorised, or None where it is not positive definite and was left as it is.

    Args:
        matrix: Finite entries, whose memory belongs to the result. The lower triangle counts.
    """
    if matrix.numel() >= _IN_PLACE and runs_in_place(matrix):
        return _InPlace.of(matrix)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else _Beside(matrix, factor)


def symmetric_map(matrix: Tensor) -> RowMap:
    """Return products of single rows with a symmetric matrix, of which half is read where it is large."""
    if matrix.numel() < _IN_PLACE or not runs_in_place(matrix):
        return lambda rows: rows @ matrix.T
    n, one, zero = matrix.shape[0], matrix.new_ones(1), matrix.new_zeros(1)

    def image(rows: Tensor) -> Tensor:
        x, found = rows.contiguous(), rows.new_zeros(rows.shape)
        for row, own in zip(x, found, strict=True):  # of 4,810 rows 1.4 ms by two threads, where torch takes 4.5
            in_place("cython_blas", "symv", "L", n, one, matrix, n, row, 1, zero, own, 1)
        return found

    return image


def by_cholesky(factor: Tensor, rows: Tensor) -> Tensor:
    r"""Return rows times $(L L^\top)^{-1}$."""
    # `cholesky_solve` gives the same digits and copies the factor in every call, ten times the work of one row.
    half = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).T


@final
class _Beside(FactorisedMatrix):
    """Matrix and factor in an array each."""

    def __init__(self, matrix: Tensor, factor: Tensor) -> None:
        self._matrix, self._factor = Matrix(matrix), factor

    def solve(self, rows: Tensor) -> Tensor:
        """Return rows times the inverse."""
        return by_cholesky(self._factor, rows)

    def image(self, rows: Tensor) -> Tensor:
        """Return rows times the matrix."""
        return in_double(self._matrix, rows)


@final
class _InPlace(FactorisedMatrix):
    """Matrix and factor in one array: the matrix below the diagonal, the factor's transpose on it and above.

    LAPACK reads arrays by columns: what it takes for the lower triangle is the upper one here.

    Args:
        array: The array.
        diagonal: That of the matrix.
    """

    def __init__(self, array: Tensor, diagonal: Tensor) -> None:
        self._array, self._diagonal = array, diagonal

    @classmethod
    def of(cls, matrix: Tensor) -> FactorisedMatrix | None:
        """Factorise in place; where that fails, restore the matrix and return None."""
        n, diagonal = matrix.shape[0], matrix.diagonal().clone()
        failed = in_place("cython_lapack", "potrf", "L", n, matrix, n)
        if not failed:
            return cls(matrix, diagonal)
        for start in range(0, n, _TILE):
            where = slice(start, min(start + _TILE, n))
            matrix[where, where].copy_(_joined(matrix[where, where], diagonal[where]))
            matrix[: where.start, where].copy_(matrix[where, : where.start].T)
        return None

    def solve(self, rows: Tensor) -> Tensor:
        """Return rows times the inverse."""
        x, (k, n) = rows.clone(memory_format=torch.contiguous_format), rows.shape
        if k > _BY_ROW:
            in_place("cython_lapack", "potrs", "L", n, k, self._array, n, x, n)
            return x
        for row in x:
            for transpose in "NT":
                in_place("cython_blas", "trsv", "L", transpose, "N", n, self._array, n, row, 1)
        return x

    def image(self, rows: Tensor) -> Tensor:
        """Return rows times the matrix, of which each entry beside the diagonal is read once."""
        n, image = rows.shape[1], torch.empty_like(rows)
        step = max(1, CHUNK_ENTRIES // n)
        for start in range(0, n, step):
            where = slice(start, min(start + step, n))
            own, beside = self._array[where, where].double(), self._array[where, :start].double()
            torch.mm(rows[:, where], _joined(own, self._diagonal[where]), out=image[:, where])
            image[:, where].addmm_(rows[:, :start], beside.T)
            image[:, :start].addmm_(rows[:, where], beside)
        return image


def _joined(block: Tensor, diagonal: Tensor) -> Tensor:
    """Return the symmetric matrix with the strict lower triangle of a block and a diagonal."""
    lower = block.tril(-1)
    whole = lower + lower.T
    whole.diagonal().copy_(diagonal)
    return whole
