"""Any derivative of a model, as an operator: exact, checked, and within the memory you have."""

from .attribution import (
    Contributions,
    JacobianVerification,
    Projection,
    contributions,
    pca_projection,
    project_jacobian,
    reduce_contributions,
    verify_jacobian,
)
from .checks import check
from .derivatives import ggn, ggnvp, hessian, hvp, jacobian
from .errors import (
    DataError,
    InputError,
    InputTypeError,
    JacopsError,
    JacopsWarning,
    MemoryBudgetError,
    MissingExtraError,
    ModelStateError,
    NonFiniteError,
    NotDifferentiableError,
    SolveError,
)
from .estimators import diagonal, trace
from .influence import (
    DataLoaderType,
    InfluenceFactors,
    Influences,
    InverseHvpResult,
    ModelType,
    TensorType,
    TensorUtilities,
    TorchTensorUtilities,
    TorchTwiceDifferentiable,
    TwiceDifferentiable,
    compute_influence_factors,
    compute_influences,
    self_influences,
)
from .jacobians import compute_jacobian, full_jacobian, modjac
from .operators import Diagonal, Identity, Matrix, Operator
from .per_sample import empirical_fisher, sample_gradients
from .products import batch_jvp, batch_vjp, jvp, model_jvp, model_vjp, vjp
from .space import Space

__version__ = "0.1.0"

__all__ = [
    "Contributions",
    "DataError",
    "DataLoaderType",
    "Diagonal",
    "Identity",
    "InfluenceFactors",
    "Influences",
    "InputError",
    "InputTypeError",
    "InverseHvpResult",
    "JacobianVerification",
    "JacopsError",
    "JacopsWarning",
    "Matrix",
    "MemoryBudgetError",
    "MissingExtraError",
    "ModelStateError",
    "ModelType",
    "NonFiniteError",
    "NotDifferentiableError",
    "Operator",
    "Projection",
    "SolveError",
    "Space",
    "TensorType",
    "TensorUtilities",
    "TorchTensorUtilities",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "batch_jvp",
    "batch_vjp",
    "check",
    "compute_influence_factors",
    "compute_influences",
    "compute_jacobian",
    "contributions",
    "diagonal",
    "empirical_fisher",
    "full_jacobian",
    "ggn",
    "ggnvp",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "model_jvp",
    "model_vjp",
    "modjac",
    "pca_projection",
    "project_jacobian",
    "reduce_contributions",
    "sample_gradients",
    "self_influences",
    "trace",
    "verify_jacobian",
    "vjp",
]
