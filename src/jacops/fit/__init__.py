"""Least squares: "which step makes the residual smaller?" Gauss-Newton and Levenberg-Marquardt, dense and sparse."""

from .._lazy import eager
from ._batch import least_squares_batch
from ._batch_result import BatchFitResult
from ._fit import gauss_newton, levenberg_marquardt
from ._kernels import Arctan, Cauchy, Huber, Kernel, PseudoHuber, Scale, SoftLOne, Tolerant
from ._named_solvers import QDLDL, RSLAB
from ._result import FitProgress, LeastSquaresResult, StepRecord
from ._solvers import LSTSQ, PCG, QR, AutoStepSolver, Cholesky, SparseCholesky, SparseLU, StepSolver
from ._strategies import Adaptive, Constant, Marquardt, Nielsen, Strategy, TrustRegion

# fmt: off
__all__ = [
    "LSTSQ", "PCG", "QDLDL", "QR", "RSLAB", "Adaptive", "Arctan", "AutoStepSolver", "BatchFitResult", "Cauchy",
    "Cholesky", "Constant",
    "FitProgress", "Huber", "Kernel", "LeastSquaresResult", "Marquardt", "Nielsen", "PseudoHuber", "Scale", "SoftLOne",
    "StepSolver",
    "SparseCholesky", "SparseLU", "StepRecord", "Strategy", "Tolerant", "TrustRegion", "gauss_newton",
    "least_squares_batch", "levenberg_marquardt",
]
# fmt: on

eager(__name__)


def __getattr__(name: str) -> object:
    """Name the equivalent of a function of another library."""
    from .._familiar_names import hint

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint(name)}")
