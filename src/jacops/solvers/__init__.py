"""Solvers for a damped operator: frozen dataclasses, with a status for each right-hand side."""

from .._lazy import eager
from ._auto import Auto
from ._base import Prepared, Solver
from ._cg import CG
from ._direct import Direct
from ._ekfac import EKFAC
from ._inverse import Inverse, inverse, require, solve, solver_of
from ._judge import Raw
from ._lissa import LiSSA
from ._low_rank import Lanczos, Nystrom
from ._minres import MINRES
from ._quadrature import Bounds, inverse_quadratic_bounds
from ._solution import Solution, Status
from ._system import System

__all__ = [
    "CG",
    "EKFAC",
    "MINRES",
    "Auto",
    "Bounds",
    "Direct",
    "Inverse",
    "Lanczos",
    "LiSSA",
    "Nystrom",
    "Prepared",
    "Raw",
    "Solution",
    "Solver",
    "Status",
    "System",
    "inverse",
    "inverse_quadratic_bounds",
    "require",
    "solve",
    "solver_of",
]

eager(__name__)
