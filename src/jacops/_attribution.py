"""Attribution by input Jacobian: "which feature does this output rest on?", exact and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ._array_inputs import as_tensor, from_arrays, is_array
from ._contributions import Contributions, JacobianVerification, flattened, verification_of, verified, worst
from ._data import Unpack as Batching
from ._finite import require_finite
from ._keywords import keywords
from ._loaders import joined
from ._options import JacobianOptions
from ._planning import plan_contributions, planned_by
from ._projections import Projection
from ._requirements import check_choice
from ._runtime.contexts import eager
from ._runtime.memory import Budget, ensure_fits
from ._torch.protocol import (
    BiasParts,
    Errors,
    FollowedModel,
    SampleJacobians,
    Samples,
    Shared,
    Terms,
    check_identity,
    check_slopes,
)
from ._words import Magnitude
from .errors import InputError, InputTypeError, warn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any] | Tensor


@keywords()
def project_jacobian(jacobian: Array, proj_tensor: Array, *, check_finite: bool = True) -> Array:
    """Return a Jacobian by reduced inputs as one by original features: `(n, out, r) · (r, d) -> (n, out, d)`.

    `proj_tensor` is the derivative of the reduced input by the original features. For a whitened PCA that is not
    `pca.components_`: take `pca_projection(pca).matrix`.

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
def reduce_contributions(
    contributions: Array | Contributions, method: Magnitude = "l2", *, check_finite: bool = True
) -> Array:
    r"""Return one size per sample and feature, `(n, c, f, ...) -> (n, f, ...)`.

    With `"l2"` this is $\sqrt{\sum_o c_{nof}^2}$, the length of what feature $f$ adds to the embedding of sample $n$;
    it does not depend on how the embedding is rotated. `"l1"` sums absolute values, `"max"` takes the largest.

    Args:
        contributions: What each feature adds to each output, `(n, outputs, features, ...)`. NumPy, torch, or lists. A
            result of `contributions` knows which axes count outputs, however many there are, and all are reduced.
        method: How to measure a contribution across outputs.
        check_finite: Raise if a size is NaN or Inf.

    Returns:
        Sizes in the units of the output, of the dtype given (integers become float64). A torch tensor without grad
        comes back as NumPy, as the page's type says; one that requires grad stays a tensor, with its graph.

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


@planned_by(plan_contributions, JacobianOptions)
@keywords(JacobianOptions)
@joined()
@eager
def contributions(
    model: nn.Module | Callable[..., Any],
    x: Any,
    *,
    projection: Projection | None = None,
    features: Array | None = None,
    batch_size: int = 1024,
    shared: Shared = None,
    unpack: Batching | None = None,
    **options: Unpack[JacobianOptions],
) -> Contributions:
    r"""Return what each feature adds to each output, with the part that is due to constants, verified.

    For a piecewise-linear model, biases included, $f(x) = J(x)\,x + b(x)$ holds exactly. The bias part is carried
    through the forward operation by operation, in the model's precision but at least in single: an affine operation is
    applied to bias parts as to values, another one passes them on by its own derivative and adds its own constant.
    Neither $f(x)$ nor $J$ is used, and only then compared. Whether an operation is piecewise linear is measured where
    it is called; `notes` names those that are not, for which the identity need not hold. What the model detaches counts
    as constant.

    Smooth models add up where `freeze=` holds parts of them constant: while a module that it names runs, a norm divides
    by a constant scale, softmax and attention give constant weights, an activation multiplies by a constant gain
    $(\varphi(z) - \varphi(0)) / z$, a quotient has a constant denominator, and of two factors that depend on the input
    the gate (what comes out of an activation) is constant, or else the first. No value of the model changes, but
    `jacobian` is the derivative of what is left (Golden, 2025, "Equivalent Linear Mappings of Large Language Models").

    Args:
        model: A module, evaluated in eval mode on samples alone, a `Function`, or a plain function `f(x)`. Its output
            is a tensor of any shape, or a tuple or mapping of tensors (a ModelOutput too).
        x: The model's input, as in `compute_jacobian`: a tensor of any shape with a row per sample; a tuple of
            positional or a mapping of keyword arguments, which may hold integers, None, bool and numbers too; or a
            loader, whose inputs are joined. NumPy arrays and SciPy's sparse rows get the dtype and device of the
            model's floating-point parameters; integer arrays keep their dtype.
        projection: How `x` came from original features, such as `pca_projection(pca)`; contributions then are by
            those features.
        features: The original rows `(n, d)` behind `x`; needed with `projection`. With it the part of the features'
            mean counts to none of them: contributions are of `features - mean`.
        batch_size: Samples to a sweep.
        shared: As in `compute_jacobian`.
        unpack: For a loader, as in `compute_jacobian`.
        options: As in `compute_jacobian`; `freeze=` takes class names or paths of modules (`fnmatch` patterns such as
            `"LayerNorm"` or `"blocks.*.attn"`), or a function of name and module. With `outputs=` all parts are of
            these outputs, with `target=` of one output per sample, whose axis is not in the result. With `at=` from a
            hidden layer `values` are what its units add, and `bias` what the constants behind it do;
            `at=(None, "head")` ends at a layer, such as the one before a sigmoid. `out` is where the Jacobian is
            written. `checks="always"` compares slopes for all samples and not for some of very many, `"never"` for
            none.

    Returns:
        All parts, as tensors for one input tensor and one output tensor. For several inputs `values` and `jacobian` are
        in the structure of `x`, None where there is no derivative; for several outputs everything is in the structure
        of the output, and `found["mu"]` is the result for one of them.

    Raises:
        InputTypeError: `model` or `x` is of the wrong kind, or there is no such option.
        InputError: Shapes do not fit, `features` is missing, or `freeze` names no module, or one in which nothing can
            be held constant.
        MemoryBudgetError: Jacobians, contributions and the work on one sample do not fit the budget.
        ModelStateError: As in `compute_jacobian`; or a frozen module is scripted, or runs in an activation checkpoint.
        NotDifferentiableError: As in `compute_jacobian`.
        NonFiniteError: As in `compute_jacobian`; in the bias part, too.

    Warns:
        JacopsWarning: The identity fails by more than rounding, or the Jacobian is not the slope of the output.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        >>> contributions(model, torch.ones(5, 3, dtype=torch.float64)).verification.relative_error < 1e-12
        True
    """
    x = from_arrays(x, model)
    centred = _check_features(x, projection, features, options.get("at"))
    samples, swept = _swept(model, x, shared, batch_size, options)
    forward = FollowedModel(samples.runner, swept.followed)
    parts, names = forward.parts(samples.values), swept.output_tree.names
    if options.get("check_finite", True):
        for name, bias in zip(names, parts.bias, strict=True):
            require_finite(bias, f"contributions: in the bias part of {name}")
    around, checks = partial(forward.moved, samples.values), options.get("checks", "first")
    slopes = check_slopes(around, parts, names, swept.blocks, checks)
    blocks, bases = swept.blocks, parts.points
    if projection is not None and centred is not None:
        blocks, bases = _by_features(blocks, projection, options.get("budget")), [centred]
    terms = [Terms.of(output, row, bases) for output, row in zip(parts.outputs, blocks, strict=True)]
    notes = _noted(parts.curved, check_identity(parts, names, terms), slopes)
    if projection is not None:
        notes.append("contributions are of features minus their mean")
    frozen = samples.runner.frozen
    notes = notes if frozen is None else [frozen.describe(), *notes]
    found = _arranged(swept, parts, blocks, terms, slopes, notes)
    return found if frozen is None else replace(found, method="frozen")


def _arranged(
    swept: SampleJacobians,
    parts: BiasParts,
    blocks: Sequence[Sequence[Tensor]],
    terms: Sequence[Terms],
    slopes: Sequence[Errors],
    notes: Sequence[str],
) -> Contributions:
    """Return all parts in the structures of output and input."""
    build, outputs = swept.output_tree.build, parts.outputs
    bias = [of.to(output.dtype) for of, output in zip(parts.bias, outputs, strict=True)]
    verifications = [verified(o, b, t.added) for o, b, t in zip(outputs, bias, terms, strict=True)]
    values, jacobian = swept.arranged([of.values for of in terms]), swept.arranged(blocks)
    slope_error = max(check.largest for check in slopes)
    return Contributions(values, build(bias), build(outputs), jacobian, worst(verifications), slope_error, tuple(notes))


_OF_SAMPLES = ("outputs", "target", "at", "freeze", "checks", "fallback", "compile")  # the others are of a sweep


def _swept(
    model: Any, x: Any, shared: Shared, batch_size: int, options: Mapping[str, Any]
) -> tuple[Samples, SampleJacobians]:
    """Return the samples of a call and their Jacobians."""
    chosen: dict[str, Any] = {name: value for name, value in options.items() if name in _OF_SAMPLES}
    samples = Samples(model, x, call="contributions", shared=shared, batch_size=batch_size, **chosen)
    samples.beside = FollowedModel.beside(samples)
    how = {name: value for name, value in options.items() if name not in (*_OF_SAMPLES, "check_finite")}
    found = samples.jacobians(**how)
    if options.get("check_finite", True):
        found.check_finite("")
    return samples, found


def _noted(curved: Sequence[str], *checks: Sequence[Errors]) -> list[str]:
    """Return the notes of a result, warned of where a check fails: of several outputs the worst stands for all."""
    named = f"not piecewise linear, so output = features + bias need not hold: {', '.join(curved)}"
    failures = []
    for of in checks:
        failed = [check for check in of if not check.holds]
        more = f" (and {len(failed) - 1} more outputs)" if len(failed) > 1 else ""
        failures += [f"{max(failed, key=lambda check: check.beyond)}{more}"] if failed else []
    notes = [*([named] if curved else []), *failures]
    if failures:
        warn(f"contributions: {'; '.join(notes)}.")
    return notes


def _by_features(blocks: Sequence[Sequence[Tensor]], projection: Projection, budget: Budget) -> list[list[Tensor]]:
    """Return Jacobians by the model's one input as Jacobians by the features that it came from.

    Raises:
        MemoryBudgetError: They, and contributions of their size, do not fit the budget.
    """
    features = projection.matrix.shape[1]
    need = sum(2 * features * block.shape[:-1].numel() * block.element_size() for (block,) in blocks)
    named = {f"Jacobian and contributions by {features:,} features": need}
    ensure_fits("contributions", named, budget, blocks[0][0].device, "Pass fewer samples, or raise `budget=`.")
    found = []
    for (block,) in blocks:
        rows = block.reshape(len(block), block.shape[1:-1].numel(), block.shape[-1])
        by_features = torch.as_tensor(project_jacobian(rows, projection.matrix.to(rows)))
        found.append([by_features.reshape(*block.shape[:-1], features)])
    return found


def _check_features(x: Any, projection: Projection | None, features: Any, at: Any) -> Tensor | None:
    """Return the centred features, None where contributions are by the input itself."""
    if projection is None:
        if features is not None:
            raise InputError.of("features", "given", "they go with `projection`, which is missing")
        return None
    if at is not None and (isinstance(at, str) or at[0] is not None):
        raise InputError.of("projection", "given", f"with at={at!r} contributions are by a hidden layer, not by x")
    if not isinstance(x, Tensor) or x.ndim != 2:
        came = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError.of("x", came, "with `projection` a tensor (n, in) is needed")
    if features is None:
        raise InputError.of("features", "missing", "with `projection` the original rows behind `x` are needed")
    rows = as_tensor(features, "features", projection.mean) if is_array(features) else features
    if rows.shape != (x.shape[0], projection.matrix.shape[1]):
        needed = (x.shape[0], projection.matrix.shape[1])
        raise InputError.of("features", f"of shape {tuple(rows.shape)}", f"shape {needed} is needed")
    centred = rows.detach().to(projection.mean.dtype) - projection.mean
    rebuilt = centred @ projection.matrix.T
    off = (rebuilt - x.to(rebuilt.dtype)).abs().max() if x.numel() else torch.zeros(())
    # Float32 projections are good to 1e-5; other rows, or a mean left on, are off by a share of 1.
    if float(off) > 1e-3 * max(1.0, float(rebuilt.abs().max()) if x.numel() else 1.0):
        raise InputError(
            f"`x` is not what `projection` makes of `features`: they differ by {float(off):.1e}. Pass the rows "
            "`x` came from."
        )
    return centred
