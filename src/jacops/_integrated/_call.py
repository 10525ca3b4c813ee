"""Integrated gradients of all outputs at once: contributions that add up along a path, for smooth models too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, Unpack

from torch import nn

from .._contributions import Contributions
from .._data import Unpack as Batching
from .._features import FeatureGroups, FeatureLabels, feature_names
from .._finite import require_finite
from .._keywords import keywords
from .._ladder.protocol import is_framework_model
from .._loaders import joined
from .._options import JacobianOptions
from .._progress import shows_progress
from .._requirements import check_choice, check_number, check_positive, check_whole
from .._runtime.contexts import arithmetic, eager
from .._torch.protocol import Samples, Shared
from .._words import OnFailure
from ..errors import InputError, InputTypeError, SolveError, warn
from ._adaptive import SMOOTH
from ._baselines import Paths, starts_of
from ._integral import Integral
from ._layers import from_layer, source_of

# A transformer block with ReLU takes 6,000 to be complete to 1e-6, a convolutional net of 3,000 units 1,600; smooth
# models take less than 100.
_MAX_STEPS = 10_000
_TODO = "Raise the number of steps or `tolerance`; where an output jumps or is rounded, no number of steps is enough."
_OF_SAMPLES = ("outputs", "checks", "fallback", "compile")


@keywords(JacobianOptions)
@joined()
@eager
@shows_progress("steps")
def integrated_jacobian(
    model: nn.Module | Callable[..., Any],
    x: Any,
    *,
    baseline: Any = None,
    baselines: Any = None,
    steps: int | Literal["auto"] = "auto",
    tolerance: float | None = None,
    max_steps: int = _MAX_STEPS,
    on_failure: OnFailure = "raise",
    names: FeatureLabels = None,
    groups: FeatureGroups = None,
    batch_size: int = 1024,
    shared: Shared = None,
    unpack: Batching | None = None,
    **options: Unpack[JacobianOptions],
) -> Contributions:
    r"""Return contributions of features along the path from a baseline, for any differentiable model.

    These are the integrated gradients of Sundararajan, Taly and Yan (2017), of all outputs at once: feature $f$ adds
    $(x - x_0)_f \int_0^1 \partial F_o / \partial x_f (x_0 + t (x - x_0))\, dt$ to output $o$, and all of them together
    add $F(x) - F(x_0)$. With a set of `baselines` they are expected gradients (Erion et al. 2021): the exact mean over
    the set, at the cost of as many paths per sample.

    The sum is known, and so is the error of the quadrature on a path and on each part of it: its completeness gap.
    Smooth parts are integrated by Gauss-Legendre rules, halved while gaps are too large. Where a piecewise-linear model
    has kinks, pieces of the path are found by outputs and slopes, and each one is integrated exactly. Errors that
    cancel in the sum are measured along random directions. A sweep takes `batch_size` points, of one or several
    samples, and Jacobians are accumulated.

    Args:
        model: A module (its copy is put in eval mode), or a plain function.
        x: Samples along the first axis, `(n, *in)`; a tuple or mapping of such tensors, or a loader, whose inputs are
            joined.
        baseline: Where paths begin: None for zeros, a number, a tensor of one sample's shape `(*in)` or `(1, *in)`, or
            one for each sample `(n, *in)`; for several inputs a structure of these as `x` is, with None for an input
            that stays as it is, which those without derivatives do.
        baselines: A set of them, `(m, *in)`, in the structure of `x`; instead of `baseline`.
        steps: `"auto"` refines until gaps are below the tolerance; a number is that of Gauss-Legendre nodes of each
            path, whatever the gap.
        tolerance: The largest gap of a sample, relative to its largest change of an output from baseline to sample (or
            to a tenth of the length of its contributions, where they cancel to less). By default 1e-6 in double, 1e-3
            in single and 0.1 in half precision.
        max_steps: Most Jacobians of a path; the refinement of paths that would take more ends.
        on_failure: With `"raise"` a gap above the tolerance is an error, with `"return"` a warning.
        names: Of the features: a name for each, or a table whose columns they are; for several inputs a mapping.
        groups: A mapping from groups to features (by name, pattern or index), or a label for every feature.
        batch_size: Most points of paths to a sweep.
        shared: Inputs without an axis of samples, by name or position.
        unpack: For a loader, as in `compute_jacobian`.
        options: `outputs=`, `target=`, `at=`, `mode=`, `budget=`, `out=`, `checks=`, `fallback=`, `progress=`; see
            `compute_jacobian`, without `freeze`. With `at=` from a hidden layer paths lead from the layer's
            output at the baseline to that at the sample, the model's inputs being the sample's. `out` takes the
            Jacobian.

    Returns:
        `values` of the features along the path, `jacobian` averaged over it, `bias` as the output at the baseline (its
        mean over a set), `steps` as the most Jacobians of a path, and `verification` of the sum. `notes` give the
        baseline, steps and the largest gap. Several inputs and outputs give the structures of `compute_jacobian`.

    Raises:
        InputTypeError: An argument is of the wrong kind.
        InputError: A shape, dtype or number does not fit; the message names the argument.
        MemoryBudgetError: The result, two tensors of the Jacobian's size, and one sweep do not fit the budget.
        ModelStateError: Parameters are lazy or without values, or `at` does not fit the forward.
        NonFiniteError: A baseline, or an output or derivative along a path is NaN or Inf.
        NotDifferentiableError: Inputs or outputs are of integer or complex dtype.
        SolveError: A gap is above the tolerance; the result is its `solution`.

    Warns:
        JacopsWarning: A gap is above the tolerance, with a number of steps or `on_failure="return"`.

    Example:
        >>> found = integrated_jacobian(lambda x: x**3, torch.tensor([[1.0, -2.0]]).double(), steps=2)
        >>> found.values[0].diagonal(), found.verification.max_error < 1e-12
        (tensor([ 1., -8.], dtype=torch.float64), True)
    """
    _check_numbers(steps, tolerance, max_steps, on_failure)
    with arithmetic(False):
        paths, begin = _paths(model, x, (baseline, baselines), shared, batch_size, options)
        labels = feature_names(x if source_of(options.get("at")) is None else paths.samples.values[0], names, groups)
        integral = Integral.of(paths, batch_size, tolerance, options)
        integral.integrate(None if isinstance(steps, str) else steps, max_steps)
        found = replace(integral.contributions(begin), names=labels)
    failure = integral.failure
    if failure is not None:
        message = f"integrated_jacobian: {failure}. {_TODO}"
        if steps == "auto" and on_failure == "raise":
            raise SolveError(message, found)
        warn(message)
    return found


def _check_numbers(steps: Any, tolerance: Any, max_steps: int, on_failure: Any) -> None:
    if isinstance(steps, str):
        check_choice("steps", steps, Literal["auto"], " or a number of nodes")
    else:
        check_positive("steps", steps)
    if tolerance is not None:
        check_number("tolerance", tolerance)
    check_whole("max_steps", max_steps, SMOOTH)
    check_choice("on_failure", on_failure, OnFailure)


def _paths(
    model: Any, x: Any, given: tuple[Any, Any], shared: Shared, batch_size: int, options: Mapping[str, Any]
) -> tuple[Paths, str]:
    """Return the paths that a call is about, and in words where they begin."""
    if is_framework_model(model):
        raise InputTypeError.of("model", f"a {type(model).__name__}", "a torch module or function is needed")
    if options.get("freeze") is not None:
        needed = "with parts held constant derivatives are no slopes, which do not add up along a path"
        raise InputError.of("freeze", repr(options["freeze"]), needed, "Take `contributions(freeze=...)`.")
    chosen: dict[str, Any] = {name: options[name] for name in _OF_SAMPLES if name in options}
    chosen["batch_size"] = batch_size
    at, target = options.get("at"), options.get("target")
    samples = Samples(model, x, call="integrated_jacobian", shared=shared, at=at, target=target, **chosen)
    for name, value in zip(samples.input_tree.names, samples.values, strict=False):  # the target has no name
        require_finite(value, f"integrated_jacobian: in `{name}`", " (first axis: sample).")
    inside = source_of(at) is not None
    starts, many, begin = starts_of(samples, x, given, inside=inside)
    paths = Paths(samples, starts, many)
    if inside and samples.count:
        paths = from_layer(paths, at, target, chosen)
    return paths, begin
