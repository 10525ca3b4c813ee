"""Names that other libraries have for what this one computes, for the message where one is not found."""

from __future__ import annotations

# torch.func, torch.autograd.functional, torch-secorder, curvlinops, SciPy, PyPose, captum, in this order.
OURS = {
    "jacrev": "modjac by parameters, or compute_jacobian by the input",
    "jacfwd": "modjac by parameters, or compute_jacobian(mode='forward') by the input",
    "linearize": "jacobian",
    "vhp": "hvp, since a Hessian is symmetric",
    "exact_hvp": "hvp",
    "model_hvp": "hvp",
    "approximate_hvp": "hvp",
    "gauss_newton_product": "ggnvp",
    "hessian_diagonal": "linalg.diagonal(hessian(...))",
    "hessian_trace": "linalg.trace(hessian(...))",
    "HessianLinearOperator": "hessian, or Problem(...).hessian() over a data set",
    "GGNLinearOperator": "ggn, or Problem(...).ggn() over a data set",
    "JacobianLinearOperator": "jacobian",
    "KFACLinearOperator": "kronecker_factors",
    "least_squares": "levenberg_marquardt",
    "curve_fit": "levenberg_marquardt",
    "LM": "levenberg_marquardt",
    "GN": "gauss_newton",
    "saliency": "compute_jacobian",
    "integrated_gradients": "integrated_jacobian",
}


def hint(name: str) -> str:
    """Return the end of a message about a name that is not here; empty for one that is not known from elsewhere."""
    return f"; use {OURS[name]}" if name in OURS else ""
