"""Options of calls as typed dicts: what public calls take besides their first arguments, and what they pass on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from torch import Tensor, nn

from ._data import Unpack
from ._ladder.protocol import FrameworkModel, Picked
from ._picks import Picks
from ._runtime.memory import Budget
from ._torch.protocol import At, Freeze, Shared
from ._trees import Selector
from ._words import Checks, Fallback, Mode, Randomness, Sweeps, Wrt

Model = nn.Module | FrameworkModel
AnyModel = Model | Callable[..., Any]
"""A model, or a function `f(x)`, which is differentiated by its inputs."""


class JacobianOptions(TypedDict, total=False):
    """Options of `compute_jacobian`, for calls that make Jacobians with it."""

    outputs: Selector
    target: Tensor | None
    at: At
    freeze: Freeze
    mode: Mode
    budget: Budget
    out: Any
    checks: Checks
    fallback: Fallback
    check_finite: bool
    compile: bool
    progress: bool | None


class ComputeJacobianOptions(JacobianOptions, total=False):
    """All options of `compute_jacobian`."""

    shared: Shared
    unpack: Unpack | None
    create_graph: bool


class ModjacKeywords(TypedDict, total=False):
    """Options of `modjac` beside those that its page has; without `sparse`, on which the type of the result depends."""

    parameters: Picks
    tangent: bool
    outputs: Selector
    budget: Budget
    out: Any
    check_finite: bool
    progress: bool | None


class ModjacOptions(ModjacKeywords, total=False):
    """Options of `modjac` without those on which the type of the result depends."""

    create_graph: bool
    strict: bool
    vectorize: bool
    strategy: Sweeps


class InputDerivativeOptions(TypedDict, total=False):
    """Options of the derivatives of higher order by the input."""

    outputs: Selector
    target: Tensor | None
    shared: Shared
    unpack: Unpack | None
    checks: Checks
    fallback: Fallback
    progress: bool | None
    create_graph: bool


class RowOptions(TypedDict, total=False):
    """Options of public calls that return an operator made from a model.

    Attributes:
        parameters: Which parameters, as in `jacobian`.
        checks: `"first"`, `"always"` or `"never"` check fast routes against the plain one.
        fallback: `"warn"`, `"silent"` or `"error"` where a fast route is left.
        check_finite: Results with NaN or Inf raise.
    """

    parameters: Picks
    checks: Checks
    fallback: Fallback
    check_finite: bool


class OperatorOptions(RowOptions, total=False):
    """Options of public calls that return an operator made from a model with a loss.

    Attributes:
        outputs: Part of the output that the loss is given, as in `jacobian`.
    """

    outputs: Selector


class SampleGradientOptions(OperatorOptions, total=False):
    """Options of `sample_gradients`.

    Attributes:
        shared: Inputs without an axis of samples.
        unpack: How a loader's batches become inputs and targets.
        randomness: `"error"` refuses dropout in train mode; `"same"` draws the same masks for every sample.
        seed: Of those masks.
        create_graph: Products are differentiable.
    """

    shared: Shared
    unpack: Unpack | None
    randomness: Randomness
    seed: int | None
    create_graph: bool


class CurvatureCallOptions(OperatorOptions, total=False):
    """Options of `hessian`, `ggn` and `fisher`.

    Attributes:
        wrt: `"parameters"`, or `"inputs"` (those of floating point).
        at: A submodule's path to differentiate by its output, as in `jacobian`; needs `wrt="inputs"`.
    """

    wrt: Wrt
    at: At


class GraphOptions(CurvatureCallOptions, total=False):
    """Options of an operator that may keep the graph of its products.

    Attributes:
        create_graph: Products are differentiable.
    """

    create_graph: bool


class TorchOptions(TypedDict, total=False):
    """What only torch is asked when a model is recorded, as in `ModelRun`."""

    checks: Checks
    fallback: Fallback
    connected: bool
    kept: bool
    aside: bool
    pulled: bool
    consists: Any


class RecordOptions(TypedDict, total=False):
    """How a model is recorded by its parameters.

    Attributes:
        parameters: Which parameters, by name and value.
        checks: `"first"`, `"always"` or `"never"` check fast routes against the plain one.
        fallback: `"warn"`, `"silent"` or `"error"` where a fast route is left.
    """

    parameters: Picked | None
    checks: Checks
    fallback: Fallback


class OutputRowOptions(RecordOptions, total=False):
    """How a model is recorded for rows of its output.

    Attributes:
        aside: Parts of the output that have no derivative are set aside, as where a loss reads the others.
    """

    aside: bool


class CurvatureOptions(RecordOptions, total=False):
    """How a model with a loss is recorded.

    Attributes:
        outputs: Part of the output that the loss is given, as in `jacobian`.
    """

    outputs: Selector


class LocatedOptions(CurvatureOptions, total=False):
    """How a model with a loss is recorded, as a whole or cut.

    Attributes:
        at: A cut at submodules.
    """

    at: At


class LossOptions(LocatedOptions, total=False):
    """How a loss is recorded.

    Attributes:
        kept: It is kept for later products, so the caller may write into the weights meanwhile.
        connected: It stays connected to the caller's parameters, for derivatives of derivatives.
        shift: Added to parameters, by name, for finite differences.
        pulled: Only pulls are taken of it, never their derivatives.
    """

    kept: bool
    connected: bool
    pulled: bool
    shift: Mapping[str, Tensor] | None
