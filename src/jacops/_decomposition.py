"""`contributions`: what every feature adds to every output, exact for piecewise-linear models and verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from ._array_inputs import as_tensor, from_arrays, is_array
from ._attribution import project_jacobian
from ._contributions import Contributions, verified, worst
from ._data import Unpack as Batching
from ._features import FeatureGroups, FeatureLabels, feature_names
from ._finite import require_finite
from ._keywords import keywords
from ._loaders import joined
from ._options import JacobianOptions
from ._planning import plan_contributions, planned_by
from ._projections import Projection, as_projection
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
from .errors import InputError, warn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any] | Tensor


@planned_by(plan_contributions, JacobianOptions)
@keywords(JacobianOptions)
@joined()
@eager
def contributions(
    model: nn.Module | Callable[..., Any],
    x: Any,
    *,
    projection: Any = None,
    features: Array | None = None,
    names: FeatureLabels = None,
    groups: FeatureGroups = None,
    batch_size: int = 1024,
    shared: Shared = None,
    unpack: Batching | None = None,
    **options: Unpack[JacobianOptions],
) -> Contributions:
    r"""Return the contribution of each feature to each output, and that of the constants, verified.

    For a piecewise-linear model, biases included, $f(x) = J(x)\,x + b(x)$ holds exactly. The bias part is carried
    through the forward operation by operation, in the model's precision but at least in single: an affine operation is
    applied to bias parts as to values, another one passes them on by its own derivative and adds its own constant. It
    does not use $f(x)$ or $J$; they are compared with it afterwards. Whether an operation is piecewise linear is
    measured where it is called; `notes` names those that are not, for which the identity need not hold. What the model
    detaches counts as constant.

    Contributions of smooth models sum to the output where `freeze=` holds parts of them constant: while a module that
    it names runs, a norm divides by a constant scale, softmax and attention give constant weights, an activation
    multiplies by a constant gain $(\varphi(z) - \varphi(0)) / z$, a quotient has a constant denominator, and of two
    factors that depend on the input the gate (the output of an activation) is constant, or else the first. No value of
    the model changes, but `jacobian` is the derivative with these parts constant (Golden, 2025, "Equivalent Linear
    Mappings of Large Language Models").

    Args:
        model: A module, evaluated in eval mode on samples alone, a `Function`, or a plain function `f(x)`. Its output
            is a tensor of any shape, or a tuple or mapping of tensors (a ModelOutput too).
        x: The model's input, as in `compute_jacobian`: a tensor of any shape with a row per sample; a tuple of
            positional or a mapping of keyword arguments, which may hold integers, None, bool and numbers too; or a
            loader, whose inputs are joined. NumPy arrays and SciPy's sparse rows get the dtype and device of the
            model's floating-point parameters; integer arrays keep their dtype.
        projection: How `x` was computed from original features: a fitted scikit-learn transformer or pipeline, or a
            `Projection`, see `jacops.attribution.projection`; contributions then refer to those features.
        features: The original rows `(n, d)` behind `x`; needed with `projection`. With it the part of the features'
            mean counts to none of them: contributions are of `features - projection.mean`, and what the projection
            itself adds (`projection.offset`) counts to the bias part.
        names: Of the features, for `top`, `plot`, `to_pandas` and `to_html`: a name for each, or a table whose columns
            they are; for features with several axes an entry per axis, its names or None; for several inputs a mapping
            from inputs. By default those that the projection's estimator was fitted with.
        groups: Groups of features, for `grouped`: a mapping from groups to features (by name, pattern or index; what
            is in none is in `"other"`), or a label for every feature.
        batch_size: Samples to a sweep.
        shared: Inputs without an axis of samples, by name or position.
        unpack: For a loader, as in `compute_jacobian`.
        options: `outputs=`, `target=`, `mode=`, `at=`, `budget=`, `out=`, `checks=`, `fallback=`, `check_finite=`,
            `progress=`; see `compute_jacobian`; `freeze=` takes class names or paths of modules (`fnmatch` patterns
            such as
            `"LayerNorm"` or `"blocks.*.attn"`), or a function of name and module. With `outputs=` all parts are of
            these outputs, with `target=` of one output per sample, whose axis is not in the result. With `at=` from a
            hidden layer `values` are what its units add, and `bias` what the constants behind it do;
            `at=(None, "head")` ends at a layer, such as the one before a sigmoid. `out` is where the Jacobian is
            written. `checks="first"` compares slopes for some of very many samples, and for a model that is known from
            earlier calls only now and then; `"always"` for all samples, `"never"` for none.

    Returns:
        All parts, as tensors for one input tensor and one output tensor. For several inputs `values` and `jacobian` are
        in the structure of `x`, None where there is no derivative; for several outputs everything is in the structure
        of the output, and `found["mu"]` is the result for one of them.

    Raises:
        InputTypeError: `model` or `x` is of the wrong kind, or there is no such option.
        InputError: Shapes do not fit, `features` is missing, or `freeze` names no module, or one in which nothing can
            be held constant.
        MemoryBudgetError: Jacobians, contributions and the work on one sample do not fit the budget.
        ModelStateError: Parameters are lazy or without values, `at` does not fit the forward, or a frozen module is
            scripted or runs in an activation checkpoint.
        NotDifferentiableError: Inputs or outputs are of integer or complex dtype.
        NonFiniteError: An output or a derivative is NaN or Inf; in the bias part, too.

    Warns:
        JacopsWarning: The identity fails by more than rounding, or the Jacobian is not the slope of the output.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        >>> contributions(model, torch.ones(5, 3, dtype=torch.float64)).verification.relative_error < 1e-12
        True
    """
    x, projection = from_arrays(x, model), as_projection(projection)
    centred, hidden = _check_features(x, projection, features, options.get("at")), _starts_inside(options.get("at"))
    labels = None if hidden else feature_names(x if centred is None else centred, names, groups, projection)
    samples, swept = _swept(model, x, shared, batch_size, options)
    called, error = swept.output_tree.names, swept.slope_error()
    forward = FollowedModel(samples.runner, swept.followed)
    parts = forward.parts(samples.values, swept.runs, slopes=error is None)
    if options.get("check_finite", True):
        _check_bias(parts, called)
    blocks, bases = swept.blocks, parts.points
    slopes = _slopes(forward, samples, swept, parts, options.get("checks", "first")) if error is None else []
    if projection is not None and centred is not None:
        parts, blocks, bases = *_by_features(parts, blocks, projection, options.get("budget")), [centred]
    terms = [Terms.of(output, row, bases) for output, row in zip(parts.outputs, blocks, strict=True)]
    notes, frozen = _noted(parts.curved, check_identity(parts, called, terms), slopes), samples.runner.frozen
    return replace(
        _arranged(swept, parts, blocks, terms),
        slope_error=swept.keep_slopes(slopes) if error is None else error,
        notes=(*([frozen.describe()] if frozen else []), *notes, *(projection.notes() if projection else [])),
        method="exact" if frozen is None else "frozen",
        names=feature_names(parts.points[0], names, groups) if hidden else labels,
    )


def _slopes(
    forward: FollowedModel, samples: Samples, swept: SampleJacobians, parts: BiasParts, checks: str
) -> list[Errors]:
    """Return how far slopes are from Jacobians."""
    around = partial(forward.moved, samples.values)
    return check_slopes(around, parts, swept.output_tree.names, swept.blocks, checks)


def _arranged(
    swept: SampleJacobians, parts: BiasParts, blocks: Sequence[Sequence[Tensor]], terms: Sequence[Terms]
) -> Contributions:
    """Return all parts in the structures of output and input."""
    build, outputs = swept.output_tree.build, parts.outputs
    bias = [of.to(output.dtype) for of, output in zip(parts.bias, outputs, strict=True)]
    verifications = [verified(o, b, t.added) for o, b, t in zip(outputs, bias, terms, strict=True)]
    values, jacobian = swept.arranged([of.values for of in terms]), swept.arranged(blocks)
    return Contributions(values, build(bias), build(outputs), jacobian, worst(verifications), None, ())


_OF_SAMPLES = ("outputs", "target", "at", "freeze", "checks", "fallback", "compile")  # the others are of a sweep


def _swept(
    model: Any, x: Any, shared: Shared, batch_size: int, options: Mapping[str, Any]
) -> tuple[Samples, SampleJacobians]:
    """Return the samples of a call and their Jacobians."""
    chosen: dict[str, Any] = {name: value for name, value in options.items() if name in _OF_SAMPLES}
    samples = Samples(model, x, call="contributions", shared=shared, batch_size=batch_size, **chosen)
    samples.beside, samples.follows = FollowedModel.beside(samples), options.get("budget") is None
    how = {name: value for name, value in options.items() if name not in (*_OF_SAMPLES, "check_finite")}
    found = samples.jacobians(**how)
    if options.get("check_finite", True):
        found.check_finite("")
    return samples, found


def _check_bias(parts: BiasParts, names: Sequence[str]) -> None:
    for name, bias in zip(names, parts.bias, strict=True):
        require_finite(bias, f"contributions: in the bias part of {name}")


def _noted(curved: Sequence[str], *checks: Sequence[Errors]) -> list[str]:
    """Return the notes of a result, and warn if a check fails, for several outputs that of the worst."""
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


def _starts_inside(at: Any) -> bool:
    """Return whether contributions are by a hidden layer."""
    return at is not None and (isinstance(at, str) or at[0] is not None)


def _by_features(
    parts: BiasParts, blocks: Sequence[Sequence[Tensor]], projection: Projection, budget: Budget
) -> tuple[BiasParts, list[list[Tensor]]]:
    """Return bias parts and Jacobians by the features that the model's one input came from.

    What the projection adds by itself is a part of the input that no feature accounts for.

    Raises:
        MemoryBudgetError: They, and contributions of their size, do not fit the budget.
    """
    features = projection.matrix.shape[1]
    need = sum(2 * features * block.shape[:-1].numel() * block.element_size() for (block,) in blocks)
    named = {f"Jacobian and contributions by {features:,} features": need}
    ensure_fits("contributions", named, budget, blocks[0][0].device, "Pass fewer samples, or raise `budget=`.")
    if projection.offset is not None:
        offset, pairs = projection.offset.to(parts.bias[0]), zip(parts.bias, blocks, strict=True)
        parts = replace(parts, bias=[bias + block.to(bias) @ offset for bias, (block,) in pairs])
    found = []
    for (block,) in blocks:
        rows = block.reshape(len(block), block.shape[1:-1].numel(), block.shape[-1])
        by_features = torch.as_tensor(project_jacobian(rows, projection.matrix.to(rows)))
        found.append([by_features.reshape(*block.shape[:-1], features)])
    return parts, found


def _check_features(x: Any, projection: Projection | None, features: Any, at: Any) -> Tensor | None:
    """Return the centred features, None where contributions are by the input itself."""
    if projection is None:
        if features is not None:
            raise InputError.of("features", "given", "they go with `projection`, which is missing")
        return None
    if _starts_inside(at):
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
    rows = rows.detach().to(projection.mean.dtype)
    centred, rebuilt = rows - projection.mean, projection(rows)
    off = (rebuilt - x.to(rebuilt.dtype)).abs().max() if x.numel() else torch.zeros(())
    # Float32 projections are accurate to 1e-5; other rows, or a mean that was not subtracted, differ by about 100 %.
    if float(off) > 1e-3 * max(1.0, float(rebuilt.abs().max()) if x.numel() else 1.0):
        raise InputError(
            f"`x` is not `projection` applied to `features`: they differ by {float(off):.1e}. Pass the rows "
            "`x` came from."
        )
    return centred
