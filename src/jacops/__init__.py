"""Any derivative of a model, as an operator: exact, checked, and within the memory you have.

Which features?     compute_jacobian, contributions, integrated_jacobian, verify_jacobian, input_hessian, laplacian
Which samples?      compute_influences, self_influences, compute_influence_factors; TorchTwiceDifferentiable
Which step?         gauss_newton, levenberg_marquardt; jacops.fit, jacops.charts
Operators           jacobian, hessian, ggn, fisher; Problem for sums over a data set
Products            jvp, vjp, batch_jvp, batch_vjp, model_jvp, model_vjp, hvp, ggnvp
Whole Jacobians     modjac, full_jacobian, sample_jacobians, sample_gradients; sparse_plan
Inverses            solve, inverse; kronecker_factors; jacops.solvers
Before and after    plan (memory and cost of a call), check (a model against finite differences)

jacops.attribution  contributions and related functions: projection, jacobian_lens, logit_difference
jacops.influence    the strongest alone, groups, layers; projected_index for many queries; tracin, ensembles
jacops.linalg       operators, empirical_fisher; trace, norm, diagonal, eigenpairs, spectral_density of one
jacops.solvers      CG, MINRES, Direct, EKFAC, Nystrom, Lanczos, LiSSA
jacops.sparse       sparse Jacobians: detect_pattern, sparse_plan, jacobian
jacops.fit          least squares: solvers of a step, strategies, robust kernels
jacops.charts       SO2 ... Sim3, S2, products: parameters on a manifold
jacops.store        results on disk, in tiles; a stopped run can be continued
jacops.results      types of results
jacops.errors       types of errors; all of them are a JacopsError
jacops.testing      check_operator: the laws of linear maps

A model is a module, `Function(f, params)` for a pure `f(params, x)`, or, by inputs alone, a plain function.
"""

# fmt: off
# isort: off
import sys

from . import attribution, charts, errors, fit, influence, linalg, results, solvers, sparse, store, testing
from ._attribution import JacobianVerification, project_jacobian, reduce_contributions, verify_jacobian
from ._checks import check
from ._curvature_products import ggnvp, hvp
from ._decomposition import contributions
from ._derivatives import ggn, hessian, jacobian
from ._extras import lie as _lie  # noqa: F401 - registers the rules for LieTensors with the sparse engine
from ._fisher import fisher
from ._function import Function
from ._integrated import integrated_jacobian
from ._influence import (
    DataLoaderType, InverseHvpResult, ModelType, TensorType, TensorUtilities, TorchTensorUtilities,
    TorchTwiceDifferentiable, TwiceDifferentiable, compute_influence_factors, compute_influences, self_influences,
)
from ._keywords import check_namespaces as _check_namespaces
from ._jacobians import compute_jacobian, full_jacobian, modjac
from ._kronecker import kronecker_factors
from ._per_sample import sample_gradients, sample_jacobians
from ._planning import plan
from ._problem import Problem
from ._products import batch_jvp, batch_vjp, jvp, model_jvp, model_vjp, vjp
from ._saved_files import load
from ._second_order import directional_derivative, input_hessian, laplacian
from .errors import JacopsError, JacopsWarning, MissingExtraError as _MissingExtraError
from .fit import gauss_newton, levenberg_marquardt
from .solvers import inverse, solve
from .sparse import sparse_plan

__version__ = "0.1.0"

__all__ = [
    "DataLoaderType", "Function", "InverseHvpResult", "JacobianVerification", "JacopsError", "JacopsWarning",
    "ModelType", "Problem", "TensorType", "TensorUtilities", "TorchTensorUtilities", "TorchTwiceDifferentiable",
    "TwiceDifferentiable", "attribution", "batch_jvp", "batch_vjp", "charts", "check", "compute_influence_factors",
    "compute_influences", "compute_jacobian", "contributions", "directional_derivative", "errors", "fisher", "fit",
    "full_jacobian", "gauss_newton", "ggn", "ggnvp", "hessian", "hvp", "influence", "input_hessian",
    "integrated_jacobian", "inverse", "jacobian", "jvp", "kronecker_factors", "laplacian", "levenberg_marquardt",
    "linalg", "load", "model_jvp", "model_vjp", "modjac", "plan", "project_jacobian", "reduce_contributions", "results",
    "sample_gradients", "sample_jacobians", "self_influences", "solve", "solvers", "sparse", "sparse_plan", "store",
    "verify_jacobian", "vjp",
]
# fmt: on
# isort: on

_check_namespaces(
    sys.modules[__name__],
    attribution,
    charts,
    errors,
    fit,
    influence,
    linalg,
    results,
    solvers,
    sparse,
    store,
    testing,
)

_OF_JAX = ("JaxFunction", "JaxTensorUtilities", "JaxTwiceDifferentiable")


def __dir__() -> list[str]:
    """Return what is public; modules with a leading underscore are not."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Load what needs JAX (extra `jax`) when it is asked for; say where else a name is."""
    if name not in _OF_JAX:
        spaces = (attribution, influence, linalg, solvers, sparse, fit, results, errors)
        homes = [home for home in spaces if name in home.__all__]
        hint = f"; it is {homes[0].__name__}.{name}" if homes else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    try:
        from ._influence import _jax
    except ModuleNotFoundError:
        raise _MissingExtraError("jax", "jax") from None
    return getattr(_jax, name)
