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
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import attribution, errors, influence, linalg, results
from ._extras import registered as _registered  # noqa: F401 - before anything that asks what there is
from ._lazy import eager as _eager, lazy as _from_homes, settle as _settle
from .errors import JacopsError, JacopsWarning, MissingExtraError as _MissingExtraError

if _TYPE_CHECKING:
    from . import charts, fit, solvers, sparse, store, testing as testing
    from ._attribution import JacobianVerification, project_jacobian, reduce_contributions, verify_jacobian
    from ._checks import check
    from ._curvature_products import ggnvp, hvp
    from ._decomposition import contributions
    from ._derivatives import ggn, hessian, jacobian
    from ._fisher import fisher
    from ._function import Function
    from ._integrated import integrated_jacobian
    from ._influence import (
        DataLoaderType, InverseHvpResult, ModelType, TensorType, TensorUtilities, TorchTensorUtilities,
        TorchTwiceDifferentiable, TwiceDifferentiable, compute_influence_factors, compute_influences, self_influences,
    )
    from ._jacobians import compute_jacobian, full_jacobian, modjac
    from ._kronecker import kronecker_factors
    from ._per_sample import sample_gradients, sample_jacobians
    from ._planning import plan
    from ._problem import Problem
    from ._products import batch_jvp, batch_vjp, jvp, model_jvp, model_vjp, vjp
    from ._saved_files import load
    from ._second_order import directional_derivative, input_hessian, laplacian
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
_HOMES = {  # as above
    "": "charts fit solvers sparse store testing",
    "_attribution": "JacobianVerification project_jacobian reduce_contributions verify_jacobian",
    "_checks": "check",
    "_curvature_products": "ggnvp hvp",
    "_decomposition": "contributions",
    "_derivatives": "ggn hessian jacobian",
    "_fisher": "fisher",
    "_function": "Function",
    "_integrated": "integrated_jacobian",
    "_influence": (
        "DataLoaderType InverseHvpResult ModelType TensorType TensorUtilities TorchTensorUtilities "
        "TorchTwiceDifferentiable TwiceDifferentiable compute_influence_factors compute_influences "
        "self_influences"
    ),
    "_jacobians": "compute_jacobian full_jacobian modjac",
    "_kronecker": "kronecker_factors",
    "_per_sample": "sample_gradients sample_jacobians",
    "_planning": "plan",
    "_problem": "Problem",
    "_products": "batch_jvp batch_vjp jvp model_jvp model_vjp vjp",
    "_saved_files": "load",
    "_second_order": "directional_derivative input_hessian laplacian",
    "fit": "gauss_newton levenberg_marquardt",
    "solvers": "inverse solve",
    "sparse": "sparse_plan",
}
_OF_JAX = ("JaxFunction", "JaxTensorUtilities", "JaxTwiceDifferentiable")
# fmt: on
# isort: on

_eager(errors.__name__)
_load, _ = _from_homes(__name__, _HOMES)


def __dir__() -> list[str]:
    """Return what is public; modules with a leading underscore are not."""
    return sorted(__all__)


def __getattr__(name: str) -> object:
    """Load a name when it is requested; for an unknown one name the nearest."""
    if name in __all__ or name == "testing":
        return _load(name)
    if name in _OF_JAX:
        return _of_jax(name)
    if name.startswith("_"):  # what Python and its tools look for loads nothing
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    spaces = attribution, influence, linalg, _load("solvers"), _load("sparse"), _load("fit"), results, errors
    from ._familiar_names import hint

    homes = [space for space in spaces if name in space.__all__]
    where = f"; it is {homes[0].__name__}.{name}" if homes else hint(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{where}")


def _of_jax(name: str) -> object:
    """Load what needs JAX (extra `jax`)."""
    try:
        from ._influence import _jax
    except ModuleNotFoundError:
        raise _MissingExtraError("jax", "jax") from None
    _settle()
    return getattr(_jax, name)
