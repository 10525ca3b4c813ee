"""Attribution by input Jacobian: "which feature does this output rest on?", exact and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ._contributions import Contributions, JacobianVerification, verification_of
from ._data import Unpack as Batching
from ._features import FeatureGroups, FeatureLabels, feature_names
from ._finite import check_outputs, require_finite
from ._keywords import keywords
from ._loaders import joined
from ._options import JacobianOptions
from ._projections import Projection, as_projection
from ._requirements import check_choice, check_positive
from ._runtime.contexts import eager
from ._torch.protocol import FollowedModel, Samples, bare, check_identity, check_slopes, summed
from ._words import Magnitude
from .errors import InputError, InputTypeError, warn

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
def reduce_contributions(contributions: Array, method: Magnitude = "l2", *, check_finite: bool = True) -> Array:
    r"""Return one size per sample and feature, `(n, c, f, ...) -> (n, f, ...)`.

    With `"l2"` this is $\sqrt{\sum_o c_{nof}^2}$, the length of what feature $f$ adds to the embedding of sample $n$;
    it does not depend on how the embedding is rotated. `"l1"` sums absolute values, `"max"` takes the largest.

    Args:
        contributions: What each feature adds to each output, `(n, outputs, features, ...)`. NumPy, torch, or lists.
        method: How to measure a contribution across outputs.
        check_finite: Raise if a size is NaN or Inf.

    Returns:
        Sizes in the units of the output, of the dtype given (integers become float64). A torch tensor without grad
        comes back as NumPy, as the page's type says; one that requires grad stays a tensor, with its graph.

    Raises:
        InputError: `method` is unknown, or there are fewer than 3 axes.
        NonFiniteError: A size is NaN or Inf.

    Example:
        >>> reduce_contributions(np.array([[[3.0, 0.0], [4.0, 1.0]]]))
        array([[5., 1.]])
    """
    check_choice("method", method, Magnitude)
    return _finite("reduce_contributions", _reduced(contributions, method), check_finite)


def _reduced(contributions: Array, method: Magnitude) -> Array:
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
    """Return how well `Z = J X` holds, sample by sample.

    The identity holds for piecewise-linear models without biases (take `contributions` for models with them). Data
    that went through a PCA must be centred first: `Z = J (x - mean)`.

    Args:
        Z: Outputs, `(n, out)`.
        J: Jacobians, `(n, out, in)`.
        X: Inputs, `(n, in)`.

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


@keywords(JacobianOptions)
@joined
@eager
def contributions(
    model: nn.Module,
    x: Tensor | Iterable[Any],
    *,
    projection: Any = None,
    features: Tensor | None = None,
    names: FeatureLabels = None,
    groups: FeatureGroups = None,
    batch_size: int = 1024,
    unpack: Batching | None = None,
    **options: Unpack[JacobianOptions],
) -> Contributions:
    r"""Return what each feature adds to each output, with the part that is due to constants, verified.

    For a piecewise-linear model, biases included, $f(x) = J(x)\,x + b(x)$ holds exactly. The bias part is carried
    through the forward operation by operation, in double precision: an affine operation is applied to bias parts as
    to values, another one passes them on by its own derivative and adds its own constant. Neither $f(x)$ nor $J$ is
    used, and only then compared. Whether an operation is piecewise linear is measured where it is called; `notes`
    names those that are not, for which the identity need not hold. What the model detaches counts as constant.

    Args:
        model: A module, evaluated in eval mode on samples alone; its output is `(n, out)`.
        x: The model's inputs, `(n, in)`, or a loader as in `compute_jacobian`, whose inputs are joined.
        projection: How `x` came from original features: a fitted scikit-learn transformer or pipeline, or a
            `Projection`, see `jacops.attribution.projection`; contributions then are by those features.
        features: The original rows `(n, d)` behind `x`; needed with `projection`. With it the part of the features'
            mean counts to none of them: contributions are of `features - projection.mean`, and what the projection
            itself adds (`projection.offset`) counts to the bias part.
        names: Of the features, for `top`, `plot`, `to_pandas` and `to_html`: a name for each, or a table whose columns
            they are; for features with several axes an entry per axis, its names or None; for several inputs a mapping
            from inputs. By default those that the projection's estimator was fitted with.
        groups: Groups of features, for `grouped`: a mapping from groups to features (by name, pattern or index; what
            is in none is in `"other"`), or a label for every feature.
        batch_size: Samples to a sweep.
        unpack: For a loader, as in `compute_jacobian`.
        options: As in `compute_jacobian`. With `outputs=` all parts are of these outputs, with `target=` of one output
            per sample, which is an axis of length one. With `at=` from a hidden
            layer `values` are what its units add, and `bias` what the constants behind it do. `checks="always"`
            compares slopes for all samples and not for some of very many, `"never"` for none.

    Raises:
        InputTypeError: `model` or `x` is of the wrong kind, or there is no such option.
        InputError: Shapes do not fit, or `features` is missing.
        ModelStateError: As in `compute_jacobian`.
        NonFiniteError: As in `compute_jacobian`.

    Warns:
        JacopsWarning: The identity fails by more than rounding, or the Jacobian is not the slope of the output.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        >>> contributions(model, torch.ones(5, 3, dtype=torch.float64)).verification.relative_error < 1e-12
        True
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[0] == 0:
        came = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError.of("x", came, "a tensor (n, in) of at least one sample is needed")
    projection = as_projection(projection)
    centred = _check_features(x, projection, features, options.get("at"))
    jacobian, forward = _swept(bare(model), x, batch_size, options)
    found = forward.parts(x)
    labels = feature_names(found.point if features is None else features, names, groups, projection)
    require_finite(found.bias, "contributions: in the bias part")
    slopes = check_slopes(forward, x, found, jacobian, options.get("checks", "first"))
    if projection is not None:
        found, jacobian = _by_features(found, jacobian, projection)
    basis = (found.point if centred is None else centred).to(jacobian.dtype)
    bias, values = found.bias.to(found.output.dtype), jacobian * basis.unsqueeze(1)
    added = summed(jacobian, basis)
    verification = verification_of(*(t.cpu().double().numpy() for t in (found.output - bias, added)))
    notes = _noted(found.curved, (check_identity(found, jacobian, basis, added), slopes))
    notes += [] if projection is None else projection.notes()
    worst = float(slopes.relative.max())
    return Contributions(values, bias, found.output, jacobian, verification, worst, tuple(notes), labels)


def _noted(curved: Sequence[str], checks: Iterable[Any]) -> list[str]:
    """Return the notes of a result, warned of where a check fails."""
    named = f"not piecewise linear, so output = features + bias need not hold: {', '.join(curved)}"
    failures = [str(check) for check in checks if not check.holds]
    notes = [*([named] if curved else []), *failures]
    if failures:
        warn(f"contributions: {'; '.join(notes)}.")
    return notes


_OF_SAMPLES = ("outputs", "target", "at", "checks", "fallback", "compile")  # the others are of a sweep


def _swept(model: nn.Module, x: Tensor, batch_size: int, options: Any) -> tuple[Tensor, FollowedModel]:
    """Return the Jacobian `(n, out, *in)`, and the same function to be followed as samples were taken."""
    check_positive("batch_size", batch_size)
    chosen: dict[str, Any] = {name: value for name, value in options.items() if name in _OF_SAMPLES}
    samples = Samples(model, x, call="contributions", keep=True, **chosen)
    how = {name: value for name, value in options.items() if name not in (*_OF_SAMPLES, "check_finite")}
    found = samples.jacobians(batch_size, **how)
    if not found.output_tree.single or found.output[0].ndim != 2:
        came = "giving several outputs" if not found.output_tree.single else f"giving {tuple(found.output[0].shape)}"
        todo = "Pick a part of it with `outputs=`, in a list so as to keep the axis."
        raise InputError.of("model", came, "one output (n, out) is needed", todo)
    if options.get("check_finite", True):
        check_outputs("contributions", found.output, found.output_tree.names)
        require_finite(found.blocks[0][0], "contributions: in the Jacobian")
    many = 1 if found.alone else batch_size
    forward = FollowedModel(model, options.get("outputs"), options.get("at"), many, samples.runner.target)
    return found.blocks[0][0], forward


def _by_features(found: Any, jacobian: Tensor, projection: Projection) -> tuple[Any, Tensor]:
    """Return parts and Jacobian by features in place of those by the model's input.

    What the projection adds by itself is a part of the input that no feature accounts for.
    """
    if projection.offset is not None:
        found = replace(found, bias=found.bias + jacobian.to(found.bias) @ projection.offset.to(found.bias))
    return found, torch.as_tensor(project_jacobian(jacobian, projection.matrix.to(jacobian.dtype)))


def _check_features(x: Tensor, projection: Projection | None, features: Tensor | None, at: Any) -> Tensor | None:
    """Return the centred features, None where contributions are by the input itself."""
    if projection is None:
        return None
    if at is not None and (isinstance(at, str) or at[0] is not None):
        raise InputError.of("projection", "given", f"with at={at!r} contributions are by a hidden layer, not by x")
    if features is None:
        raise InputError.of("features", "missing", "with `projection` the original rows behind `x` are needed")
    if features.shape != (x.shape[0], projection.matrix.shape[1]):
        needed = (x.shape[0], projection.matrix.shape[1])
        raise InputError.of("features", f"of shape {tuple(features.shape)}", f"shape {needed} is needed")
    centred = features.detach().to(projection.mean.dtype) - projection.mean
    rebuilt = projection(features.detach().to(projection.mean.dtype))
    off = (rebuilt - x.to(rebuilt.dtype)).abs().max() if x.numel() else torch.zeros(())
    # Float32 projections are good to 1e-5; other rows, or a mean left on, are off by a share of 1.
    if float(off) > 1e-3 * max(1.0, float(rebuilt.abs().max()) if x.numel() else 1.0):
        raise InputError(
            f"`x` is not what `projection` makes of `features`: they differ by {float(off):.1e}. Pass the rows "
            "`x` came from."
        )
    return centred
