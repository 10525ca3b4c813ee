"""Any derivative of a model, as an operator: exact, checked, and within the memory you have."""

# fmt: off
# isort: off
from ._attribution import Contributions, JacobianVerification, contributions, project_jacobian, reduce_contributions, verify_jacobian
from .charts import SE2, SE3, SO2, SO3, Chart
from ._checks import check
from ._derivatives import ggn, ggnvp, hessian, hvp, jacobian
from .errors import DataError, InputError, InputTypeError, JacopsError, JacopsWarning, MemoryBudgetError, MissingExtraError, ModelStateError, NonFiniteError, NotDifferentiableError, SolveError, StoreBusyError, StoreDamagedError, StoreError, StoreFileError, StoreIncompleteError, StoreMismatchError
from ._estimators import DiagonalEstimate, Eigenpairs, Estimate, SpectralDensity, SpectralNorm, diagonal, effective_dimension, eigenpairs, norm, spectral_density, spectral_norm, trace
from ._extras import lie as _lie  # noqa: F401 - tells the sparse engine what it knows of LieTensors
from .store import Grid, Store, StoredRun, read_store
from ._fisher import fisher
from ._influence import DataLoaderType, InfluenceFactors, Influences, InverseHvpResult, ModelType, TensorType, TensorUtilities, TorchTensorUtilities, TorchTwiceDifferentiable, TwiceDifferentiable, compute_influence_factors, compute_influences, self_influences
from ._jacobians import compute_jacobian, full_jacobian, modjac
from .fit import LeastSquaresResult, gauss_newton, levenberg_marquardt
from ._operators import Diagonal, Identity, LayerFactors, Matrix, Operator
from ._per_sample import empirical_fisher, sample_gradients, sample_jacobians
from ._planning import Plan, PlannedRoute, plan
from ._problem import Problem
from ._products import batch_jvp, batch_vjp, jvp, model_jvp, model_vjp, vjp
from ._projections import Projection, pca_projection
from ._second_order import directional_derivative, input_hessian, laplacian
from .solvers import CG, EKFAC, MINRES, Auto, Direct, Lanczos, LiSSA, Nystrom, Solution, Solver, Status, inverse, inverse_quadratic_bounds, solve
from ._space import Space
from .sparse import Pattern, SparseJacobian, SparsePlan, detect_pattern, samples_apart, sparse, sparse_plan

__version__ = "0.1.0"

__all__ = [
    "Auto", "CG", "Chart", "Contributions", "DataError", "DataLoaderType", "Diagonal", "DiagonalEstimate", "Direct",
    "EKFAC", "Eigenpairs", "Estimate", "Grid", "Identity", "InfluenceFactors", "Influences", "InputError",
    "InputTypeError", "InverseHvpResult", "JacobianVerification", "JacopsError", "JacopsWarning", "Lanczos",
    "LayerFactors", "LeastSquaresResult", "LiSSA", "MINRES", "Matrix", "MemoryBudgetError", "MissingExtraError",
    "ModelStateError", "ModelType", "NonFiniteError", "NotDifferentiableError", "Nystrom", "Operator", "Pattern",
    "Plan", "Problem", "Projection", "PlannedRoute", "SE2", "SE3", "SO2", "SO3", "Solution", "SolveError", "Solver",
    "Space", "SparseJacobian", "SparsePlan", "SpectralDensity", "SpectralNorm", "Status", "Store", "StoreBusyError",
    "StoreDamagedError", "StoreError", "StoreFileError", "StoreIncompleteError", "StoreMismatchError", "StoredRun",
    "TensorType", "TensorUtilities", "TorchTensorUtilities", "TorchTwiceDifferentiable", "TwiceDifferentiable",
    "batch_jvp", "batch_vjp", "check", "compute_influence_factors", "compute_influences", "compute_jacobian",
    "contributions", "detect_pattern", "diagonal", "directional_derivative", "effective_dimension", "eigenpairs",
    "empirical_fisher", "fisher", "full_jacobian", "gauss_newton", "ggn", "ggnvp", "hessian", "hvp", "input_hessian",
    "inverse", "inverse_quadratic_bounds", "jacobian", "jvp", "laplacian", "levenberg_marquardt", "model_jvp",
    "model_vjp", "modjac", "norm", "pca_projection", "plan", "project_jacobian", "read_store", "reduce_contributions",
    "sample_gradients", "sample_jacobians", "samples_apart", "self_influences", "solve", "sparse", "sparse_plan",
    "spectral_density", "spectral_norm", "trace", "verify_jacobian", "vjp",
]
# fmt: on
# isort: on


def __getattr__(name: str) -> object:
    """Load what needs JAX (extra `jax`) when it is asked for."""
    if name not in ("JaxFunction", "JaxTensorUtilities", "JaxTwiceDifferentiable"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ._influence import _jax
    except ModuleNotFoundError:
        raise MissingExtraError("jax", "jax") from None
    return getattr(_jax, name)
