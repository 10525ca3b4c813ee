r"""Functions that build operators: Jacobian, Hessian, generalised Gauss-Newton.

Everything is a Jacobian of something: the Hessian is the Jacobian of the gradient, the Gauss-Newton matrix is
$J^\top H_{loss} J$.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ._keywords import keywords
from ._requirements import check_choice
from ._runtime.agreement import size
from ._runtime.contexts import arithmetic, eager, out_of_inference, private_noise, recording
from ._runtime.restoring import restoring
from ._torch.protocol import (
    At,
    ByLayers,
    Linearization,
    Recording,
    call_loss,
    computed_convex,
    difference_step,
    disagreement,
    dropped,
    gauss_newton_diagonal,
    gauss_newton_layers,
    gradient_tape,
    hessian_diagonal,
    hessian_layers,
    is_convex,
    record_model,
)
from .errors import InputError, InputTypeError, NotDifferentiableError
from .operators import LinearizedMap, Operator, Product
from .operators._finite_results import made_from
from .trees import Selector, flatten, hint_at_labels

Loss = Callable[[Any, Any], Tensor]
Wrt = Literal["parameters", "inputs"] | Callable[[str, Tensor], bool]


class RecordOptions(TypedDict, total=False):
    """Options of calls that record a model by its parameters.

    Attributes:
        parameters: Which parameters, by name and value; those that require grad by default.
        checks: `"first"`, `"always"` or `"never"` check fast routes against the plain one.
        fallback: `"warn"`, `"silent"` or `"error"` where a fast route is left.
    """

    parameters: Callable[[str, Tensor], bool]
    checks: str
    fallback: str


class CurvatureOptions(RecordOptions, total=False):
    """Options of calls that take a model with a loss.

    Attributes:
        outputs: Part of the output that the loss is given, as in `jacobian`.
    """

    outputs: Selector


class OperatorOptions(CurvatureOptions, total=False):
    """Options of public calls that return an operator made from a model with a loss.

    Attributes:
        check_finite: Results with NaN or Inf raise.
    """

    check_finite: bool


def trainable(name: str, parameter: Tensor) -> bool:
    """Say whether a parameter requires grad: the default set for curvature."""
    return parameter.requires_grad


@keywords()
@eager
@made_from("inputs")
def jacobian(
    model: nn.Module,
    inputs: Any,
    wrt: Wrt = "parameters",
    *,
    outputs: Selector = None,
    at: At = None,
    checks: str = "first",
    fallback: str = "warn",
    allow_zero: bool = False,
) -> LinearizedMap:
    """Return the Jacobian of a model's output on one batch, as an operator.

    The model runs once, as it stands (train or eval mode), on private copies; products are sweeps over that graph.

    Args:
        model: A module.
        inputs: Its input: a tuple is unpacked into positional arguments, a mapping into keyword arguments.
        wrt: `"parameters"` (those that require grad), `"inputs"` (those of floating point), or a function of name and
            parameter that picks parameters.
        outputs: Part of the output: indices along a tensor's last axis, an entry of a tuple or dict, or a callable.
        at: A submodule's path to differentiate by its output, or a pair `(source, target)`; a source needs
            `wrt="inputs"`.
        checks: `"first"`, `"always"` or `"never"` check fast routes against the plain one.
        fallback: `"warn"`, `"silent"` or `"error"` where a fast route is left.
        allow_zero: Accept an output that nothing connects to what it is differentiated by.

    Returns:
        An operator from the space of parameters (or inputs) to the space of outputs.

    Raises:
        NotDifferentiableError: No path leads from the output to anything it is differentiated by.
        InputError: An argument does not fit.
        ModelStateError: There are no parameters to differentiate, or they have no values.

    Example:
        >>> model = torch.nn.Linear(2, 3, bias=False)
        >>> J = jacobian(model, torch.ones(4, 2))
        >>> J.shape
        (12, 6)
    """
    picks = picked(wrt)
    if picks is not None and (at[0] if isinstance(at, tuple) else at) is not None:
        todo = "Pass `wrt='inputs'`, or a pair `(None, target)`."
        raise InputError.of("at", repr(at), "a source other than the input cuts the parameters before it off", todo)
    hint_at_labels("jacobian", outputs, inputs)
    found = record_model(
        model,
        inputs,
        call="jacobian",
        parameters=picks,
        outputs=outputs,
        at=at,
        checks=checks,
        fallback=fallback,
        kept=True,
    )
    if allow_zero:
        real_only(found.lin)
    else:
        check_usable(found.lin, todo=" Pass `allow_zero=True` if that is meant.")
    return LinearizedMap(found.lin, found.output)


def picked(wrt: Wrt) -> Callable[[str, Tensor], bool] | None:
    """Return which parameters are meant, None for the inputs.

    Raises:
        InputError: `wrt` is none of the known.
    """
    if callable(wrt):
        return wrt
    check_choice("wrt", wrt, ("parameters", "inputs"), " or a function of name and parameter")
    return trainable if wrt == "parameters" else None


def real_only(lin: Linearization) -> None:
    """Refuse complex outputs and leaves.

    Raises:
        NotDifferentiableError: There is one.
    """
    for space in (lin.domain, lin.codomain):
        for name, dtype in zip(space.names, space.dtypes, strict=True):
            if dtype.is_complex:
                todo = "Use torch.view_as_real, or the calls that return tensors (modjac, jvp)."
                raise NotDifferentiableError.of(name, f"of dtype {dtype}", "operators are real", todo)


def check_usable(lin: Linearization, what: str = "", todo: str = "") -> None:
    """Refuse what is complex, or does not depend on anything it is differentiated by.

    Args:
        lin: The linearization.
        what: How to call its outputs, by default by their names.
        todo: What the caller can do.

    Raises:
        NotDifferentiableError: An output or a leaf is complex, or no path leads from any output to any leaf.
    """
    real_only(lin)
    if not lin.is_connected():
        raise NotDifferentiableError(
            f"{lin.call}: no path leads from {what or lin.codomain.layout} to any of {lin.domain.layout}; the "
            f"derivative is zero everywhere.{todo}"
        )


def record_loss(model: nn.Module, loss: Loss, x: Any, y: Any, call: str, **options: Any) -> Recording:
    """Record the loss of one batch by the parameters that are asked for.

    Raises:
        InputTypeError: `loss` is not callable or does not return a tensor.
        InputError: The loss is not one number.
    """
    if not callable(loss):
        raise InputTypeError.of("loss", f"a {type(loss).__name__}", "a callable `loss(output, y)` is needed")
    options.setdefault("parameters", trainable)
    y = _recordable(y, kept=bool(options.get("kept")))
    found = record_model(
        model, x, call=call, finish=lambda output: _checked(call_loss(loss, output, y)), purpose=loss, **options
    )
    check_usable(found.lin, "the loss")
    return found


@restoring
def _recordable(y: Any, kept: bool) -> Any:
    """Return a target whose tensors may take part in a recorded computation, copied where that is kept."""
    leaves, tree = flatten(y, "y")
    with arithmetic(True):
        plain = [out_of_inference(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree.build([leaf.clone() if kept and isinstance(leaf, Tensor) else leaf for leaf in plain])


def _checked(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        came = f"a {type(value).__name__}"
        needed = "a tensor with a graph is needed"
        raise NotDifferentiableError.of("the loss", came, needed, "Drop `.item()` and `float()` from it.")
    if value.ndim > 0:
        todo = "Take its mean or sum (`reduction='mean'`), or `.squeeze()` it."
        raise InputError.of("the loss", f"of shape {tuple(value.shape)}", "one number, shape (), is needed", todo)
    if not value.is_floating_point():
        todo = "Take scores rather than labels or counts."
        came = f"of dtype {value.dtype}"
        raise NotDifferentiableError.of("the loss", came, "a floating-point number is needed", todo)
    return value


@keywords(OperatorOptions)
@eager
@made_from("x", "y")
def hessian(model: nn.Module, loss: Loss, x: Any, y: Any, **options: Unpack[OperatorOptions]) -> LinearizedMap:
    r"""Return the Hessian of `loss(model(x), y)` by the trainable parameters, for one batch, as an operator.

    A product is one sweep over the recorded gradient (Pearlmutter, 1994). Where the graph holds custom autograd
    Functions, one product is held against a central difference of gradients first, since torch does not notice a
    second derivative that a backward drops.

    Args:
        model: A module, differentiated as it stands.
        loss: `loss(output, y)`, one number; the objective as you reduce it.
        x: The model's input, as in `jacobian`.
        y: The target, passed to the loss as it is.
        options: `parameters=` (a function of name and parameter), `outputs=`, `checks=`, `fallback=`, `check_finite=`
            (results with NaN or Inf raise).

    Returns:
        A symmetric operator on the space of parameters.

    Raises:
        NotDifferentiableError: There is no second derivative; the message names the cause.
        InputError: The loss is not one number, or `y` would broadcast.
        ModelStateError: No parameter requires grad.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> H = hessian(model, torch.nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1))
        >>> H.dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return _hessian(model, loss, x, y, "hessian", options, kept=True)


def _hessian(
    model: nn.Module, loss: Loss, x: Any, y: Any, call: str, options: CurvatureOptions, kept: bool
) -> LinearizedMap:
    found = record_loss(model, loss, x, y, call, kept=kept, **options)
    lin = gradient_tape(found, call)
    operator = LinearizedMap(lin, found.output, symmetric=True)
    rows = operator._apply
    layers = partial(hessian_layers, found.lin, _leading(x, y), rows)
    entries = partial(hessian_diagonal, found.lin, _leading(x, y), rows)
    operator = replace(operator, formed=ByLayers(found.lin, "Hessian by layers", layers, rows, entries, lin.routes))
    if found.lin.graph_info.functions and all(type(leaf) in (Tensor, nn.Parameter) for leaf in lin.leaves):
        _spot_check(operator, found, lambda shift: _shifted_gradient(model, loss, x, y, shift, options))
    return operator


def _shifted_gradient(
    model: nn.Module, loss: Loss, x: Any, y: Any, shift: dict[str, Tensor], options: CurvatureOptions
) -> Tensor:
    found = record_loss(model, loss, x, y, "hessian", shift=shift, **options)
    lin = found.lin
    return lin.domain.join(lin.pull_rows([torch.ones_like(lin.outputs[0]).unsqueeze(0)]))[0]


def _spot_check(operator: LinearizedMap, found: Recording, gradient: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """Compare one product with central differences of gradients along a random direction."""
    space, lin = operator.domain, operator.lin
    direction = private_noise(torch.empty(space.dim, dtype=space.dtype, device=space.device))
    direction = direction / size(direction)

    def central(step: float) -> Tensor:
        moved = [dict(zip(space.names, space.unflatten(sign * step * direction), strict=True)) for sign in (1, -1)]
        return (gradient(moved[0]) - gradient(moved[1])) / (2 * step)

    step = difference_step(lin.leaves)
    error = disagreement(operator @ direction, central(step), central, step)
    if error is not None:
        what = "a product with the Hessian and a central difference of gradients"
        raise dropped(lin.call, what, error, found.lin.graph_info.functions)


@keywords(OperatorOptions)
@eager
@made_from("x", "y")
def ggn(model: nn.Module, loss: Loss, x: Any, y: Any, **options: Unpack[OperatorOptions]) -> Operator:
    r"""Return the generalised Gauss-Newton matrix $J^\top H_{loss} J$ for one batch (Schraudolph, 2002; Martens, 2014).

    Args:
        model: A module, differentiated as it stands.
        loss: `loss(output, y)`, one number, twice differentiable in the output.
        x: The model's input, as in `jacobian`.
        y: The target.
        options: As in `hessian`.

    Returns:
        A symmetric operator on the space of parameters. It is marked positive for those of torch's own losses that
        are convex in the output, and for any other loss whose Hessian by the output has no negative eigenvalue in
        any sample; that is computed when `positive` is first read, and a loss of more than some hundred outputs has
        to be diagonal or of a softmax's form to be marked.

    Raises:
        NotDifferentiableError: As in `hessian`.
        InputError: As in `hessian`.
        ModelStateError: As in `hessian`.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ggn(model, torch.nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1)).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return _ggn(model, loss, x, y, "ggn", options, kept=True)


@restoring
def _ggn(model: nn.Module, loss: Loss, x: Any, y: Any, call: str, options: CurvatureOptions, kept: bool) -> Operator:
    options.setdefault("parameters", trainable)
    found = record_model(model, x, call=call, kept=kept, **options)
    real_only(found.lin)
    J = LinearizedMap(found.lin, found.output)
    with recording():
        leaves = [o.detach().requires_grad_() for o in found.lin.outputs]
        value = _checked(call_loss(loss, found.tree.build([leaf.clone() for leaf in leaves]), _recordable(y, kept)))
    names = found.lin.codomain.names
    outer = Linearization(leaves, [value], leaf_names=names, output_names=["loss"], call=call, private=True)
    H = LinearizedMap(gradient_tape(Recording(outer, flatten(value, "loss")[1], value), call), value, symmetric=True)
    H = replace(
        H, mark=is_convex(loss, y) or partial(computed_convex, loss, y, H._apply, found.lin.outputs, found.tree)
    )
    product = Product(Product(J.T, H), J)
    rows, name = product._apply, "Gauss-Newton matrix by layers"
    layers = partial(gauss_newton_layers, found.lin, H._apply, rows)
    entries = partial(gauss_newton_diagonal, found.lin, H._apply, rows)
    return replace(product, formed=ByLayers(found.lin, name, layers, rows, entries, found.lin.routes))


def _leading(x: Any, y: Any) -> list[int]:
    """Return how many samples a batch may hold: the lengths of its tensors."""
    tensors = [v for part in (x, y) for v in flatten(part, "x, y")[0] if isinstance(v, Tensor) and v.ndim]
    return [tensor.shape[0] for tensor in tensors if tensor.shape[0]]


@keywords(OperatorOptions)
@eager
def hvp(model: nn.Module, loss: Loss, x: Any, y: Any, v: Any, **options: Unpack[OperatorOptions]) -> Any:
    """Return the Hessian of the loss times `v`, in the form of `v`: flat, columns, list or dict by name."""
    return _for_one_product(model, loss, x, y, _hessian, "hvp", **options) @ v


@keywords(OperatorOptions)
@eager
def ggnvp(model: nn.Module, loss: Loss, x: Any, y: Any, v: Any, **options: Unpack[OperatorOptions]) -> Any:
    """Return the generalised Gauss-Newton matrix times `v`, in the form of `v`."""
    return _for_one_product(model, loss, x, y, _ggn, "ggnvp", **options) @ v


@made_from("x", "y")
def _for_one_product(
    model: nn.Module, loss: Loss, x: Any, y: Any, make: Callable[..., Operator], call: str, **options: Any
) -> Operator:
    """Return an operator that is dropped before anybody can write into the model's weights."""
    return make(model, loss, x, y, call, options, kept=False)
