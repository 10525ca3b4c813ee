"""Attribution by input Jacobian: "which feature does this output depend on?", exact and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._contributions import Contributions, JacobianVerification, flattened, verification_of
from ._finite import require_finite
from ._keywords import keywords
from ._requirements import check_choice
from ._words import Magnitude
from .errors import InputError, InputTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any] | Tensor


@keywords()
def project_jacobian(jacobian: Array, proj_tensor: Array, *, check_finite: bool = True) -> Array:
    """Return a Jacobian by reduced inputs as one by original features: `(n, out, r) · (r, d) -> (n, out, d)`.

    `proj_tensor` is the derivative of the reduced input by the original features. For a whitened PCA that is not
    `pca.components_`: take `jacops.attribution.projection(pca).matrix`.

    Args:
        jacobian: `(n, out, r)`, torch or NumPy; gradients flow through it.
        proj_tensor: `(r, d)`, of the same kind and dtype.
        check_finite: Raise if the result holds NaN or Inf.

    Returns:
        `(n, out, d)`, of the kind and dtype of the arguments.

    Raises:
        InputTypeError: One is torch and the other NumPy, or neither.
        InputError: Shapes, dtypes or devices do not match exactly.
        NonFiniteError: The result holds NaN or Inf.

    Example:
        >>> project_jacobian(torch.ones(1, 1, 2), torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]))
        tensor([[[1., 3., 3.]]])
    """
    kinds = Tensor if isinstance(jacobian, Tensor) else np.ndarray
    for name, value, axes in (("jacobian", jacobian, 3), ("proj_tensor", proj_tensor, 2)):
        if not isinstance(value, kinds):
            came = f"a {type(value).__name__}"
            raise InputTypeError.of(name, came, "both must be torch tensors, or both NumPy arrays")
        if value.ndim != axes:
            raise InputError.of(name, f"of shape {tuple(value.shape)}", f"{axes} axes are needed")
    if jacobian.shape[2] != proj_tensor.shape[0]:
        came = f"of shape {tuple(proj_tensor.shape)}"
        raise InputError.of("proj_tensor", came, f"its first axis must be the Jacobian's last, {jacobian.shape[2]}")
    if jacobian.dtype != proj_tensor.dtype or getattr(jacobian, "device", None) != getattr(proj_tensor, "device", None):
        came = f"of dtype {proj_tensor.dtype}"
        raise InputError.of("proj_tensor", came, f"the Jacobian has {jacobian.dtype}", "Cast one of them.")
    return _finite("project_jacobian", jacobian @ proj_tensor, check_finite)


@keywords()
def reduce_contributions(
    contributions: Array | Contributions, method: Magnitude = "l2", *, check_finite: bool = True
) -> Array:
    r"""Return one magnitude per sample and feature, `(n, c, f, ...) -> (n, f, ...)`.

    With `"l2"` this is $\sqrt{\sum_o c_{nof}^2}$, the length of what feature $f$ adds to the embedding of sample $n$;
    it does not depend on how the embedding is rotated. `"l1"` sums absolute values, `"max"` takes the largest.

    Args:
        contributions: What each feature adds to each output, `(n, outputs, features, ...)`. NumPy, torch, or lists. A
            result of `contributions` records which axes count outputs, however many there are, and all are reduced.
        method: How to measure a contribution across outputs.
        check_finite: Raise if a size is NaN or Inf.

    Returns:
        Sizes in the units of the output, of the dtype given (integers become float64). A torch tensor without grad
        is returned as NumPy, as documented; one that requires grad stays a tensor, with its graph.

    Raises:
        InputError: `method` is unknown, there are fewer than 3 axes, or the result is of several outputs or inputs.
        NonFiniteError: A size is NaN or Inf.

    Example:
        >>> reduce_contributions(np.array([[[3.0, 0.0], [4.0, 1.0]]]))
        array([[5., 1.]])
    """
    check_choice("method", method, Magnitude)
    if isinstance(contributions, Contributions):
        contributions = flattened(contributions, "reduce_contributions").values
    return _finite("reduce_contributions", _reduced(contributions, method), check_finite)


def _reduced(contributions: Any, method: Magnitude) -> Array:
    if isinstance(contributions, Tensor) and contributions.requires_grad:
        _three_axes(contributions.shape)
        order = {"l2": 2, "l1": 1, "max": torch.inf}[method]
        return torch.linalg.vector_norm(contributions.double(), ord=order, dim=1).to(contributions.dtype)
    if isinstance(contributions, Tensor) and contributions.dtype == torch.bfloat16:
        contributions = contributions.float()
    given = np.asarray(contributions)
    _three_axes(given.shape)
    kind = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(np.float64)
    sizes = np.abs(given.astype(np.promote_types(kind, np.float32), copy=False))
    largest = sizes.max(axis=1, initial=0)
    if method == "max":
        return largest.astype(kind)
    if method == "l1":
        return sizes.sum(axis=1).astype(kind)
    safe = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return (safe * np.sqrt(((sizes / np.expand_dims(safe, 1)) ** 2).sum(axis=1))).astype(kind)


def _three_axes(shape: Any) -> None:
    if len(shape) < 3:
        came = f"of shape {tuple(shape)}"
        raise InputError.of("contributions", came, "at least 3 axes (samples, outputs, features) are needed")


@keywords()
def verify_jacobian(Z: Array, J: Array, X: Array) -> JacobianVerification:  # noqa: N803
    """Return the error of `Z = J X` for each sample.

    The identity holds for piecewise-linear models without biases (take `contributions` for models with them). Data
    that went through a PCA must be centred first: `Z = J (x - mean)`.

    Args:
        Z: Outputs, `(n, out)`.
        J: Jacobians, `(n, out, in)`.
        X: Inputs, `(n, in)`.

    Returns:
        A `JacobianVerification`: the largest error, the relative one, and whether both are at rounding level.

    Raises:
        InputError: Shapes do not match exactly, or there are no samples.
        NonFiniteError: An argument holds NaN or Inf.

    Example:
        >>> verify_jacobian(np.array([[2.0]]), np.array([[[1.0, 1.0]]]), np.array([[1.0, 1.0]])).max_error
        0.0
    """
    z, j, x = (_as_float(name, value) for name, value in (("Z", Z), ("J", J), ("X", X)))
    if z.ndim != 2 or j.shape != (*z.shape, *x.shape[1:]) or x.ndim != 2 or x.shape[0] != z.shape[0]:
        raise InputError(
            f"`Z`, `J`, `X` have shapes {z.shape}, {j.shape}, {x.shape}, but (n, out), (n, out, in), (n, in) "
            "are needed."
        )
    if z.size == 0:
        raise InputError.of("Z", f"of shape {z.shape}", "at least one sample and one output are needed")
    return verification_of(z, (j @ x[:, :, None])[:, :, 0])


def _as_float(name: str, value: Any) -> NDArray[np.float64]:
    array = np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, dtype=np.float64)
    require_finite(torch.from_numpy(array), f"verify_jacobian: in `{name}`")
    return array


def _finite(call: str, result: Array, wanted: bool) -> Array:
    if wanted:
        tensor = result if isinstance(result, Tensor) else torch.from_numpy(np.ascontiguousarray(result))
        require_finite(tensor, f"{call}: in the result", " (first axis: sample).")
    return result
