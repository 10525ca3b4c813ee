"""The names by which solvers can be requested."""

from __future__ import annotations

from .._words import SolverName
from ._auto import Auto
from ._base import Solver
from ._cg import CG
from ._direct import Direct
from ._ekfac import EKFAC
from ._lissa import LiSSA
from ._low_rank import Lanczos, Nystrom
from ._minres import MINRES

NAMES: dict[SolverName, type[Solver]] = {
    "arnoldi": Lanczos,
    "auto": Auto,
    "cg": CG,
    "direct": Direct,
    "ekfac": EKFAC,
    "lanczos": Lanczos,
    "lissa": LiSSA,
    "minres": MINRES,
    "nystrom": Nystrom,
}
