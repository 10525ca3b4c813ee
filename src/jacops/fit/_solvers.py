r"""Linear solvers for one step: $(J^\top J + \mathrm{diag}(\lambda)) p = -J^\top r$, each with its true residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch

from ..sparse._matrix import csc, sp
from ._multifrontal import FrontalCholesky
from ._system import LinearizedFit, Singular, Solved

Map = Callable[[np.ndarray], np.ndarray]

_LEAST_PIVOT = 2e-15  # pivots of a matrix with unit diagonal that are rounding errors
_EXACT = 1e-12  # left of equations with unit diagonal, relative: refining such a step changes nothing that is used
_FEW_ENTRIES = 2_000_000  # up to so many, orthogonal factors cost little and are the most exact


@dataclass(frozen=True)
class StepSolver(ABC):
    """A recipe for the linear equations of a step."""

    @abstractmethod
    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step.

        Raises:
            Singular: There is none.
        """


@final
@dataclass(frozen=True)
class QR(StepSolver):
    """Householder QR of the Jacobian over the root of the damping, without squaring the condition number. Dense."""

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step."""
        J, r = _stacked(system, damping)
        factor, tau, R = triangle(J)
        turned = torch.ormqr(factor, tau, r.unsqueeze(1), transpose=True)[: len(R)]
        p = torch.linalg.solve_triangular(R, turned, upper=True)[:, 0].numpy()
        return system.solved(-p / system.equilibration(damping), damping, "qr")


def triangle(J: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Householder's factors of a Jacobian with unit columns, and R.

    Raises:
        Singular: It has no full rank.
    """
    rows, columns = J.shape
    if rows < columns:
        raise Singular(f"{rows} residuals do not determine {columns} columns")
    factor, tau = torch.geqrf(J)
    R = factor[:columns].triu()
    pivots = R.diagonal().abs().numpy()
    # Pivots of unit columns that are rounding errors of sums over all rows.
    if not pivots.min(initial=np.inf) > 1e-13 * rows * pivots.max(initial=0.0):
        raise Singular("the Jacobian has columns that depend on one another")
    return factor, tau, R


@final
@dataclass(frozen=True)
class Cholesky(StepSolver):
    r"""Cholesky of the normal matrix with unit diagonal, and one refinement. Dense.

    With damping and fewer rows than columns, that of $I + J \Lambda^{-1} J^\top$ instead, which is smaller (Woodbury).
    """

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step."""
        if damping is not None and system.J.shape[0] < system.J.shape[1]:
            return _by_rows(system, damping)
        total = system.unit_normal(damping)
        total = total.toarray() if system.is_sparse else total
        factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(total))
        if failed:
            raise Singular("the normal matrix is not positive definite")

        def solve(v: np.ndarray) -> np.ndarray:
            return torch.cholesky_solve(torch.from_numpy(v).unsqueeze(1), factor)[:, 0].numpy()

        return refined(system, damping, solve, factor.diagonal().square().numpy(), "cholesky")


def _by_rows(system: LinearizedFit, damping: np.ndarray) -> Solved:
    root = np.sqrt(damping)
    J = torch.from_numpy(system.dense / root)
    total = J @ J.T
    total.diagonal().add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise Singular("the damping is too small for this Jacobian")

    def solve(v: np.ndarray) -> np.ndarray:
        v = v / root
        inner = torch.cholesky_solve((J @ torch.from_numpy(v)).unsqueeze(1), factor)[:, 0]
        return (v - (J.T @ inner).numpy()) / root

    right = torch.cholesky_solve(torch.from_numpy(system.r).unsqueeze(1), factor)[:, 0]
    p = -(J.T @ right).numpy() / root
    p -= solve(system.residual(p, damping))
    return system.solved(p, damping, "cholesky", note="by rows, which are fewer")


@final
@dataclass(frozen=True)
class LSTSQ(StepSolver):
    """The minimum-norm solution, by singular values, for Jacobians without full rank. Dense."""

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step."""
        J, r = _stacked(system, damping)
        found = torch.linalg.lstsq(J, -r.unsqueeze(1), driver="gelsd")
        note = rank_note(int(found.rank), J.shape[1])
        return system.solved(found.solution[:, 0].numpy() / system.equilibration(damping), damping, "lstsq", note=note)


def rank_note(rank: int, columns: int) -> str:
    """Return a note on a rank, empty where it is full."""
    return f"rank {rank} of {columns}" if rank < columns else ""


@final
@dataclass(frozen=True)
class SparseCholesky(StepSolver):
    """Cholesky of the sparse normal matrix by dense fronts (the multifrontal method), and one refinement.

    Ordering and analysis are made once for a structure and kept with its plan. Duff and Reid, The multifrontal
    solution of indefinite sparse symmetric linear equations, 1983.
    """

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step."""
        factor = factorised(system, damping)
        return refined(system, damping, factor.solve, factor.pivots, "sparse_cholesky")


def factorised(system: LinearizedFit, damping: np.ndarray | None = None) -> FrontalCholesky:
    """Return the Cholesky factors of the sparse normal matrix with unit diagonal.

    Raises:
        Singular: It is not positive definite.
    """
    try:
        return system.normal.analysis.factorised(system.unit_entries(damping))
    except np.linalg.LinAlgError as error:
        raise Singular(f"sparse_cholesky: {error}") from None


@final
@dataclass(frozen=True)
class SparseLU(StepSolver):
    """SciPy's SuperLU on the normal matrix, ordered and pivoted as if by Cholesky, and one refinement."""

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step."""
        from scipy.sparse.linalg import splu

        total, options = csc(system.unit_normal(damping)), {"SymmetricMode": True}
        try:
            factor = splu(total, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        except RuntimeError as error:
            raise Singular(f"SuperLU: {error}") from None
        return refined(system, damping, factor.solve, factor.U.diagonal(), "splu")


@final
@dataclass(frozen=True)
class PCG(StepSolver):
    """Conjugate gradients with products by the Jacobian, preconditioned by the diagonal blocks of the normal matrix.

    Attributes:
        tolerance: On the relative residual.
        max_steps: At most so many iterations; by default ten times the number of columns, at least a thousand.
    """

    tolerance: float = 1e-8
    max_steps: int | None = None

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step; one that stopped early is marked and kept, since every iterate is a descent direction."""
        bound = self.tolerance * float(np.linalg.norm(system.gradient))
        p, steps = conjugate_gradients(
            system,
            damping,
            _block_jacobi(system, damping),
            np.zeros_like(system.gradient),
            lambda left, _: float(np.linalg.norm(left)) <= bound,
            self.max_steps or max(1000, 10 * len(system.gradient)),
        )
        found = system.solved(p, damping, "pcg", steps)
        # The recursive residual, which stops it, drifts from the true one by rounding.
        if found.residual <= 10 * self.tolerance:
            return found
        return replace(found, note="stopped before its tolerance")


def conjugate_gradients(
    system: LinearizedFit,
    damping: np.ndarray | None,
    precondition: Map,
    start: np.ndarray,
    enough: Callable[[np.ndarray, float], bool],
    most: int,
) -> tuple[np.ndarray, int]:
    """Return a step improved by conjugate gradients on the residual itself (CGLS), and the number of iterations.

    Björck, Numerical methods for least squares problems, 1996, section 7.4.

    Args:
        system: The linearised problem.
        damping: Its damping.
        precondition: About the inverse of the normal matrix.
        start: The step to begin with.
        enough: Called with what is left of the normal equations and its square in the norm of `precondition`.
        most: The most iterations.
    """
    penalty = 0.0 if damping is None else damping
    p, left = start, system.r + system.J @ start
    s = -(system.J.T @ left) - penalty * p
    direction = precondition(s)
    square, steps = float(s @ direction), 0
    while steps < most and not enough(s, square):
        moved = system.J @ direction
        curvature = float(moved @ moved) + float(direction @ (penalty * direction))
        if not curvature > 0:
            break
        alpha = square / curvature
        p, left = p + alpha * direction, left + alpha * moved
        s = -(system.J.T @ left) - penalty * p
        z = precondition(s)
        last, square = square, float(s @ z)
        direction = z + square / last * direction
        steps += 1
    return p, steps


def _block_jacobi(system: LinearizedFit, damping: np.ndarray | None) -> Map:
    total, scale = sp.coo_array(system.unit_normal(damping)), system.equilibration(damping)
    rows, columns = total.coords
    inside = system.blocks[rows] == system.blocks[columns]
    counts = np.bincount(system.blocks)
    offset = np.arange(len(system.blocks)) - (np.cumsum(counts) - counts)[system.blocks]
    width = int(counts.max(initial=1))
    squares = np.zeros((len(counts), width, width))
    squares[system.blocks[rows[inside]], offset[rows[inside]], offset[columns[inside]]] = total.data[inside]
    index = np.arange(width)
    empty = index[None] >= counts[:, None]
    diagonal = squares[:, index, index]
    # Blocks that are singular by rounding become invertible; a preconditioner needs no more digits.
    squares[:, index, index] = np.where(empty | (diagonal <= 0), 1.0, diagonal * (1 + 1e-12))
    try:
        inverses = np.linalg.inv(squares)
    except np.linalg.LinAlgError:
        raise Singular("a diagonal block of the normal matrix is singular") from None

    def apply(v: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(counts), width))
        padded[system.blocks, offset] = v / scale
        return np.einsum("bij,bj->bi", inverses, padded)[system.blocks, offset] / scale

    return apply


@final
@dataclass(frozen=True)
class AutoStepSolver(StepSolver):
    """Chooses by the storage and size of the Jacobian and by damping, and reports the reason."""

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step."""
        rows, columns = system.J.shape
        if system.is_sparse:
            chosen, why = SparseCholesky(), "sparse"
        elif rows * columns <= _FEW_ENTRIES or damping is None:
            chosen, why = QR(), "dense and small" if rows * columns <= _FEW_ENTRIES else "dense, no damping"
        else:
            chosen, why = Cholesky(), "dense and damped"
        try:
            solved = chosen.solve(system, damping)
        except Singular as reason:
            if system.is_sparse:
                raise
            solved, why = LSTSQ().solve(system, damping), f"{reason}: the shortest step"
        note = f"auto: {why}" + (f", {solved.note}" if solved.note else "")
        return replace(solved, note=note)


def check_pivots(pivots: np.ndarray, name: str) -> None:
    """Refuse pivots of a normal matrix with unit diagonal that are rounding errors.

    Raises:
        Singular: One is.
    """
    if not pivots.min(initial=np.inf) > _LEAST_PIVOT:
        raise Singular(f"{name}: the normal matrix is singular (a pivot of {pivots.min():.0e} where 1 is the largest)")


def refined(system: LinearizedFit, damping: np.ndarray | None, solve: Map, pivots: np.ndarray, name: str) -> Solved:
    """Return the step of a factorisation of the normal matrix with unit diagonal, refined where that changes it."""
    scale = system.equilibration(damping)
    check_pivots(pivots, name)
    p = -solve(system.gradient / scale) / scale
    if not np.isfinite(p).all():
        raise Singular(f"{name}: the normal matrix is singular")
    left = system.residual(p, damping) / scale
    if not np.linalg.norm(left) <= _EXACT * np.linalg.norm(system.gradient / scale):
        p = p - solve(left) / scale
    found = system.solved(p, damping, name)
    # After one refinement; a step with a larger residual is not a solution.
    if found.residual > 1e-3:
        raise Singular(f"{name}: the normal matrix is too near to singular (relative residual {found.residual:.0e})")
    return found


def _stacked(system: LinearizedFit, damping: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Jacobian over root of the damping, columns scaled, and the residual over zeros."""
    scale = system.equilibration(damping)
    J = system.dense / scale
    if not (np.isfinite(scale).all() and np.isfinite(system.r).all()):  # LAPACK would end in an internal error
        raise Singular("the damped Jacobian overflows")
    if damping is None:
        return torch.from_numpy(J), torch.from_numpy(system.r)
    J = np.vstack([J, np.diag(np.sqrt(damping) / scale)])
    return torch.from_numpy(J), torch.from_numpy(np.concatenate([system.r, np.zeros(J.shape[1])]))
