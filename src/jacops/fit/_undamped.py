r"""The undamped Gauss-Newton step, as exact as the Jacobian allows, whatever its rank and condition.

It is what a stop is judged by: the reduction it predicts is $\tfrac12 \lVert Q r \rVert^2$, $Q$ the projection onto the
range of the Jacobian. A damped step can be small where this is large.
"""

from __future__ import annotations

import numpy as np
import torch

from ._solvers import (
    PCG,
    AutoStepSolver,
    Cholesky,
    Map,
    SparseCholesky,
    StepSolver,
    conjugate_gradients,
    factorised,
    rank_note,
)
from ._system import LinearizedFit, Singular, Solved, positive

_RANK = 32.0  # singular values below so many rounding errors of a Jacobian with unit columns are taken for zero
_NOISE = 4.0  # a gradient has this many rounding errors of the residual; components below are left out
_ACCURATE = 1e-10  # relative residual of the normal equations that needs no refinement
_ROUNDING = 100.0  # or so many rounding errors of the residual: the normal equations hold no more digits
_LEAST_DAMPING = 1e-12  # of a matrix with unit diagonal, whose pivots have rounding errors of 1e-16 to 1e-15
_COARSE = 1e4  # gains along singular values of fewer rounding errors than this are uncertain by 1e-8 of the objective
_DOUBLE = 1e-12  # rounding errors below this are those of double precision
_SMALL = 2_000_000  # entries of a Jacobian that are worth a dense factorisation at a stop (a second or less)
_COLUMNS = 500  # columns up to which singular values of a triangle take less than a second
_MOST = 200  # iterations; each gains one direction that the damping of the preconditioner hides


def undamped(system: LinearizedFit, solver: StepSolver) -> Solved:
    """Return the undamped step; the shortest where the Jacobian has no full rank, as far as rounding shows.

    Raises:
        Singular: None could be computed.
    """
    found = system.memory.get("undamped")
    if found is None:
        if _is_whole(system):
            found = system.memory["whole"]
        elif system.has_safe_squares:
            found = _computed(system, solver)
        else:
            scaled = _computed(system.with_unit_columns(), solver)
            found = system.solved(scaled.step / positive(system.norms), None, scaled.solver, scaled.steps, scaled.note)
        system.memory["undamped"] = found
    return found


def remember(system: LinearizedFit, solved: Solved) -> None:
    """Keep a step that a solver found without damping; it is judged when an undamped one is needed."""
    system.memory["whole"] = solved


def is_undamped(system: LinearizedFit, solved: Solved) -> bool:
    """Return whether a step is the undamped one, as exact as a stop is judged by."""
    return solved is system.memory.get("undamped") or (solved is system.memory.get("whole") and _is_whole(system))


def lacks_rank(system: LinearizedFit) -> bool:
    """Return whether some direction changes no residual, as far as rounding shows."""
    found = system.memory.get("undamped")
    if found is not None and found.solver == "svd" and found.note.startswith("rank"):
        return True
    columns, normal = system.J.shape[1], system.unit_normal(None)
    least = float(np.linalg.eigvalsh(normal.toarray() if system.is_sparse else normal)[0]) if columns else 1.0
    # Of the normal matrix, whose rounding errors are those of a sum, and the Jacobian's squared.
    return least <= max(_RANK * np.finfo(np.float64).eps * columns, (_RANK * system.eps) ** 2)


def _is_whole(system: LinearizedFit) -> bool:
    whole = system.memory.get("whole")
    return whole is not None and system.eps < _DOUBLE and _is_accurate(system, whole.step)


def replace_undamped(system: LinearizedFit, solved: Solved) -> None:
    """Keep a better undamped step, which was not tried yet."""
    system.memory["undamped"] = solved
    system.memory.pop("tried", None)


def predicted_reduction(system: LinearizedFit, step: np.ndarray) -> float:
    """Return the reduction of the objective that the linearised problem predicts for a step."""
    return -float(system.gradient @ step) - float(np.sum((system.J @ step) ** 2)) / 2


def above_rounding(system: LinearizedFit) -> Solved | None:
    """Return the undamped step along what is above rounding of the gradient; None for a large Jacobian.

    Where columns depend on one another nearly, rounding alone lets the undamped step predict a reduction.
    """
    rows, columns = system.J.shape
    if rows * columns > _SMALL or min(rows, columns) > _COLUMNS:
        return None
    return _dense(system)


def _computed(system: LinearizedFit, solver: StepSolver) -> Solved:
    if not system.gradient.any():
        return Solved(np.zeros_like(system.gradient), 0.0, 0, "none", "the gradient is zero")
    if system.eps >= _DOUBLE or isinstance(solver, PCG):  # iterations stop before small singular values
        found = above_rounding(system)
        if found is not None:
            return found
    if system.eps >= _DOUBLE:
        damping = (_COARSE * system.eps) ** 2
        return _lightly_damped_sparse(system, damping)[0] if system.is_sparse else _lightly_damped(system, damping)
    # Where a scale is free, as in bundles, it is free at every point: the factorisation would fail at its last pivot.
    by_fronts = system.is_sparse and isinstance(solver, SparseCholesky | AutoStepSolver)
    known = system.normal.found if by_fronts else set[str]()
    if "singular" not in known:
        try:
            found = (PCG(_ACCURATE) if isinstance(solver, PCG) else solver).solve(system, None)
            if _is_accurate(system, found.step):
                return found
        except Singular:
            known.add("singular")
    if not system.is_sparse:
        return _dense(system)
    found = _refined(system)
    return found if _is_accurate(system, found.step) else above_rounding(system) or found


def _is_accurate(system: LinearizedFit, step: np.ndarray) -> bool:
    """Return whether what a step leaves of the normal equations, by unit columns, is small or rounding."""
    unit = system.equilibration(None)
    left = float(np.linalg.norm(system.residual(step, None) / unit))
    floor = _ROUNDING * system.eps * float(np.linalg.norm(system.r))
    return left <= max(_ACCURATE * float(np.linalg.norm(system.gradient / unit)), floor)


def _dense(system: LinearizedFit) -> Solved:
    """Return the shortest step by QR and the singular values of R, along what rounding of J leaves certain."""
    J, unit = system.dense, system.equilibration(None)
    try:
        step, rank = shortest(J / unit, system.r, system.eps)
    except RuntimeError as error:
        raise Singular(f"svd: {error}") from None
    return system.solved(step / unit, None, "svd", note=rank_note(int(rank), J.shape[1]))


def shortest(J: np.ndarray, r: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the shortest step that makes `J p + r` smallest, along what rounding of J leaves certain, and the rank.

    Args:
        J: Jacobian with unit columns, (..., rows, columns).
        r: Residual, (..., rows).
        eps: Relative rounding error of both.
    """
    scaled, given = torch.from_numpy(J), torch.from_numpy(r)
    wide = J.shape[-2] < J.shape[-1]
    Q, R = torch.linalg.qr(scaled.mT if wide else scaled)
    U, s, Vt = torch.linalg.svd(R)
    along = _times(Vt, given) if wide else _times(U.mT, _times(Q.mT, given))
    largest = s.amax(-1, keepdim=True)
    kept = s > _RANK * eps * largest
    size = torch.linalg.vector_norm(given, dim=-1, keepdim=True)
    gained = kept & (along.abs() * s > _NOISE * eps * largest * size)
    scaled_back = torch.where(gained, along / torch.where(kept, s, 1.0), 0.0)
    step = -_times(Q, _times(U, scaled_back)) if wide else -_times(Vt.mT, scaled_back)
    return step.numpy(), kept.sum(-1).numpy()


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _lightly_damped(system: LinearizedFit, damping: float) -> Solved:
    found = Cholesky().solve(system, damping * system.equilibration(None) ** 2)
    return system.solved(found.step, None, found.solver, note=f"damped by {damping:.0e}")


def _lightly_damped_sparse(system: LinearizedFit, damping: float) -> tuple[Solved, Map]:
    """Return a step, and the inverse of the normal matrix plus `damping` times its diagonal."""
    diagonal = damping * system.equilibration(None) ** 2
    unit, factor = system.equilibration(diagonal), factorised(system, diagonal)

    def inverse(v: np.ndarray) -> np.ndarray:
        return factor.solve(v / unit) / unit

    return system.solved(-inverse(system.gradient), None, "sparse_cholesky", note=f"damped by {damping:.0e}"), inverse


def _refined(system: LinearizedFit) -> Solved:
    r"""Return a step with as little damping as it takes, undamped by conjugate gradients on the residual itself.

    Directions whose singular value $\sigma$ is below the root of the damping are what is left to find. Those with
    $\sigma$ at the rounding of the Jacobian add $\sigma^2 / \lambda$ to the square that is looked at, and are left out
    by the bound on it.
    """
    damping = _LEAST_DAMPING
    while True:
        try:
            found, inverse = _lightly_damped_sparse(system, damping)
            break
        except Singular:
            # From the rounding errors of a matrix with unit diagonal up in seven steps.
            damping *= 100
            if damping > 1.0:
                raise
    floor = (_RANK * system.eps) ** 2 / damping * float(system.r @ system.r)
    p, steps = conjugate_gradients(system, None, inverse, found.step, lambda _, square: square <= floor, _MOST)
    return system.solved(p, None, "sparse_cholesky", steps, f"{found.note}, undamped by {steps} iterations")
