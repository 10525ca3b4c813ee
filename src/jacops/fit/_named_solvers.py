"""Solvers of other packages, and all solvers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, final

import numpy as np
import torch

from .._requirements import check_choice, check_kind
from .._words import StepSolverName
from ..errors import MissingExtraError
from ..sparse._matrix import sp
from ._solvers import (
    LSTSQ,
    PCG,
    QR,
    AutoStepSolver,
    Cholesky,
    SparseCholesky,
    SparseLU,
    StepSolver,
    refined,
)
from ._system import LinearizedFit, Singular, Solved


@final
@dataclass(frozen=True)
class QDLDL(StepSolver):
    """The LDL factorisation of the package `qdldl` (extra `qdldl`) on the normal matrix, and one refinement.

    Its ordering and analysis are made once for a structure and kept with the plan.
    """

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step.

        Raises:
            MissingExtraError: The package is not installed.
        """
        qdldl, total = _package("qdldl"), sp.csc_matrix(system.unit_normal(damping))
        try:
            with _kept(system, "qdldl", lambda: qdldl.Solver(total)) as (factor, is_new):
                if not is_new:
                    factor.update(total)
                return refined(system, damping, factor.solve, factor.factors()[1], "qdldl")
        except RuntimeError as error:
            raise Singular(f"qdldl: {error}") from None


@final
@dataclass(frozen=True)
class RSLAB(StepSolver):
    """The supernodal LDL factorisation of the package `rslab` (extra `rslab`) on the normal matrix, and one refinement.

    Its ordering and analysis are made once for a structure and kept with the plan.
    """

    def solve(self, system: LinearizedFit, damping: np.ndarray | None) -> Solved:
        """Return a step.

        Raises:
            MissingExtraError: The package is not installed.
        """
        rslab = _package("rslab")
        total, threads = sp.csc_matrix(system.unit_normal(damping)), torch.get_num_threads()
        try:
            with _kept(system, "rslab", lambda: rslab.analyze(total, path="ldlt", threads=threads)) as (analysis, _):
                factor = analysis.factor(total)
        except RuntimeError as error:
            raise Singular(f"rslab: {error}") from None
        if factor.inertia != (total.shape[0], 0, 0):
            raise Singular("rslab: the normal matrix is not positive definite")
        # Pivots are not available: a bound on the least eigenvalue, which no pivot is smaller than, replaces them.
        noise = np.random.default_rng(0).standard_normal(total.shape[0])
        bound = np.linalg.norm(noise) / np.linalg.norm(factor.solve(noise)) if len(noise) else np.inf
        return refined(system, damping, factor.solve, np.array([bound]), "rslab")


def _package(name: str) -> Any:
    """Return a package that the extra of its name installs.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtraError(name, name) from None


@contextmanager
def _kept(system: LinearizedFit, package: str, made: Callable[[], Any]) -> Iterator[tuple[Any, bool]]:
    """Give what a package keeps for a structure, and whether it was made anew; to one thread at a time."""
    if not system.is_sparse:
        yield made(), True
        return
    kept = system.normal.kept
    found = kept.pop(package, None)
    own = made() if found is None else found
    yield own, found is None
    kept[package] = own  # not after an error, which may have left it half-way


_NAMES: dict[StepSolverName, type[StepSolver]] = {
    "auto": AutoStepSolver,
    "qr": QR,
    "cholesky": Cholesky,
    "lstsq": LSTSQ,
    "sparse_cholesky": SparseCholesky,
    "splu": SparseLU,
    "qdldl": QDLDL,
    "rslab": RSLAB,
    "pcg": PCG,
}


def solver_of(solver: Any) -> StepSolver:
    """Return the solver for a name or an object.

    Raises:
        InputError: The name is unknown.
        InputTypeError: It is neither a name nor a solver.
    """
    if isinstance(solver, StepSolver):
        return solver
    check_kind("solver", solver, str, f"one of {list(_NAMES)} or a StepSolver is needed")
    check_choice("solver", solver, StepSolverName, " or a StepSolver")
    return _NAMES[solver]()
