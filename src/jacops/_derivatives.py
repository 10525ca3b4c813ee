r"""Functions that build operators: Jacobian, Hessian, generalised Gauss-Newton.

Everything is a Jacobian of something: the Hessian is the Jacobian of the gradient, the Gauss-Newton matrix is
$J^\top H_{loss} J$.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn

from ._framework import TorchOptions, asked, recorded
from ._keywords import keywords
from ._ladder.protocol import is_framework_model
from ._operators import LinearizedMap, Operator, Product
from ._operators._finite_results import made_from
from ._operators._naming import named
from ._options import Model
from ._picks import Picks, differentiated, variable
from ._recorded_loss import (
    Loss,
    OperatorOptions,
    check_real,
    check_usable,
    loss_of_output,
    record_loss,
    recordable,
    resolved,
)
from ._runtime.agreement import size
from ._runtime.contexts import eager, private_noise
from ._runtime.restoring import restoring
from ._torch.protocol import (
    At,
    ByLayers,
    Recording,
    computed_convex,
    difference_step,
    disagreement,
    dropped,
    gauss_newton_diagonal,
    gauss_newton_layers,
    gradient_linearization,
    hessian_diagonal,
    hessian_layers,
    is_convex,
    positive_everywhere,
    record_at_outputs,
)
from ._trees import Selector, flatten, hint_at_labels, output_leaves
from ._words import Checks, Fallback, Wrt
from .errors import InputError


@keywords()
@eager
@made_from("inputs")
def jacobian(
    model: Model,
    inputs: Any,
    wrt: Wrt = "parameters",
    *,
    parameters: Picks = None,
    outputs: Selector = None,
    at: At = None,
    checks: Checks = "first",
    fallback: Fallback = "warn",
    allow_zero: bool = False,
    check_finite: bool = True,
) -> LinearizedMap:
    """Return the Jacobian of a model's output on one batch, as an operator.

    The model runs once, as it stands (train or eval mode), on private copies; products are sweeps over that graph.

    Args:
        model: A module, or a `JaxFunction`.
        inputs: Its input: a tuple is unpacked into positional arguments, a mapping into keyword arguments.
        wrt: `"parameters"`, or `"inputs"` (those of floating point).
        parameters: Which parameters: None and `"trainable"` take those that require grad; name patterns (`"head.*"`),
            tensors of the model, or a function of name and parameter pick others.
        outputs: Part of the output: indices along a tensor's last axis, an entry of a tuple or dict, or a callable.
        at: A submodule's path to differentiate by its output, or a pair `(source, target)`; a source needs
            `wrt="inputs"`.
        checks: `"first"`, `"always"` or `"never"` check fast routes against the plain one.
        fallback: `"warn"`, `"silent"` or `"error"` where a fast route is left.
        allow_zero: Accept an output that nothing connects to what it is differentiated by.
        check_finite: Results with NaN or Inf raise.

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
    picks = differentiated(variable(model, wrt, parameters))
    if picks is not None and (at[0] if isinstance(at, tuple) else at) is not None:
        todo = "Pass `wrt='inputs'`, or a pair `(None, target)`."
        raise InputError.of("at", repr(at), "a source other than the input cuts the parameters before it off", todo)
    hint_at_labels("jacobian", outputs, inputs)
    ladder: TorchOptions = {"checks": checks, "fallback": fallback, "kept": True}
    found = recorded(model, inputs, call="jacobian", parameters=picks, outputs=outputs, at=at, **ladder)
    if allow_zero:
        check_real(found.lin)
    else:
        check_usable(found.lin, todo=" Pass `allow_zero=True` if that is meant.")
    return named(LinearizedMap(found.lin, found.output), "jacobian by inputs" if picks is None else "jacobian")


@keywords(OperatorOptions)
@eager
@made_from("x", "y")
def hessian(model: Model, loss: Loss, x: Any, y: Any, **options: Unpack[OperatorOptions]) -> LinearizedMap:
    r"""Return the Hessian of `loss(model(x), y)` by the trainable parameters, for one batch, as an operator.

    A product is one sweep over the recorded gradient (Pearlmutter, 1994). Where the graph holds custom autograd
    Functions, one product is held against a central difference of gradients first, since torch does not notice a
    second derivative that a backward drops.

    Args:
        model: A module, differentiated as it stands, or a `JaxFunction`.
        loss: `loss(output, y)`, one number; the objective as you reduce it.
        x: The model's input, as in `jacobian`.
        y: The target, passed to the loss as it is.
        options: `parameters=` (as in `jacobian`), `outputs=`, `checks=`, `fallback=`, `check_finite=`
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
    return _hessian(model, loss, x, y, "hessian", kept=True, **options)


def _hessian(
    model: Model, loss: Loss, x: Any, y: Any, call: str, *, kept: bool, **options: Unpack[OperatorOptions]
) -> LinearizedMap:
    chosen = resolved(model, options)
    if is_framework_model(model):
        there = model.record_loss(loss, x, y, asked(call, **chosen))
        return LinearizedMap(there.lin, there.output, symmetric=True)
    found = record_loss(model, loss, x, y, call, kept=kept, **chosen)
    return hessian_at(found, x, y, call, lambda shift: shifted_gradient(model, loss, x, y, shift, chosen))


def hessian_at(
    found: Recording, x: Any, y: Any, call: str, gradient: Callable[[dict[str, Tensor]], Tensor]
) -> LinearizedMap:
    """Return the Hessian of a recorded loss.

    Args:
        found: The loss by the parameters.
        x: The batch that it is of.
        y: Its target.
        call: The public call on whose behalf this is done.
        gradient: Returns the gradient `(P,)` at parameters that are changed by so much, by name.
    """
    lin = gradient_linearization(found, call)
    operator = LinearizedMap(lin, found.output, symmetric=True)
    rows = operator._apply
    layers = partial(hessian_layers, found.lin, _leading(x, y), rows)
    entries = partial(hessian_diagonal, found.lin, _leading(x, y), rows)
    operator = replace(operator, formed=ByLayers(found.lin, "Hessian by layers", layers, rows, entries, lin.routes))
    if found.lin.graph_info.functions and all(type(leaf) in (Tensor, nn.Parameter) for leaf in lin.leaves):
        _spot_check(operator, found, gradient)
    return operator


def shifted_gradient(
    model: nn.Module, loss: Loss, x: Any, y: Any, shift: dict[str, Tensor], options: Mapping[str, Any]
) -> Tensor:
    """Return the gradient `(P,)` of a loss where parameters are changed by so much, by name."""
    lin = record_loss(model, loss, x, y, "hessian", shift=shift, **options).lin
    return lin.domain.join(lin.pull_rows([torch.ones_like(lin.outputs[0]).unsqueeze(0)]))[0]


def _spot_check(operator: LinearizedMap, found: Recording, gradient: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """Compare one product with central differences of gradients along a random direction."""
    space, lin = operator.domain, operator.lin
    direction = private_noise(torch.empty(space.dim, dtype=space.dtype, device=space.device))
    direction = direction / size(direction)

    def central(step: float) -> Tensor:
        moved = [dict(zip(space.names, space.unflatten(sign * step * direction), strict=True)) for sign in (1, -1)]
        return (gradient(moved[0]) - gradient(moved[1])) / (2 * step)

    step = difference_step(found.lin.leaves)
    error = disagreement(operator @ direction, central(step), central, step)
    if error is not None:
        what = "a product with the Hessian and a central difference of gradients"
        raise dropped(lin.call, what, error, found.lin.graph_info.functions)


@keywords(OperatorOptions)
@eager
@made_from("x", "y")
def ggn(model: Model, loss: Loss, x: Any, y: Any, **options: Unpack[OperatorOptions]) -> Operator:
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
    return _ggn(model, loss, x, y, "ggn", kept=True, **options)


def _ggn(
    model: Model, loss: Loss, x: Any, y: Any, call: str, *, kept: bool, **options: Unpack[OperatorOptions]
) -> Operator:
    return ggn_at(model, recorded(model, x, call=call, kept=kept, **resolved(model, options)), loss, y, call, kept)


@restoring
def ggn_at(model: Any, found: Any, loss: Loss, y: Any, call: str, kept: bool = True) -> Operator:
    """Return the generalised Gauss-Newton matrix at a recorded output; a target is copied where the result is kept."""
    check_real(found.lin)
    J = LinearizedMap(found.lin, found.output)
    if is_framework_model(model):
        there = model.record_at_output(found, loss, y, call)
        H = LinearizedMap(there.lin, there.output, symmetric=True)
        convex = partial(positive_everywhere, H._apply, output_leaves(found.output)[0])
        return Product(Product(J.T, replace(H, mark=convex)), J)
    y = recordable(y, kept)
    outer = record_at_outputs(found, loss_of_output(loss, y), loss, call)
    H = LinearizedMap(gradient_linearization(outer, call), outer.output, symmetric=True)
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


@overload
def hvp(model: Model, loss: Loss, x: Any, y: Any, v: Tensor, **options: Unpack[OperatorOptions]) -> Tensor: ...
@overload
def hvp(
    model: Model, loss: Loss, x: Any, y: Any, v: Mapping[str, Tensor], **options: Unpack[OperatorOptions]
) -> dict[str, Tensor]: ...
@overload
def hvp(
    model: Model, loss: Loss, x: Any, y: Any, v: Sequence[Tensor], **options: Unpack[OperatorOptions]
) -> list[Tensor]: ...
@keywords(OperatorOptions)
@eager
def hvp(model: Model, loss: Loss, x: Any, y: Any, v: Any, **options: Unpack[OperatorOptions]) -> Any:
    """Return the Hessian of the loss times `v`, in the form of `v`: flat, columns, list or dict by name."""
    return _for_one_product(model, loss, x, y, _hessian, "hvp", **options) @ v


@overload
def ggnvp(model: Model, loss: Loss, x: Any, y: Any, v: Tensor, **options: Unpack[OperatorOptions]) -> Tensor: ...
@overload
def ggnvp(
    model: Model, loss: Loss, x: Any, y: Any, v: Mapping[str, Tensor], **options: Unpack[OperatorOptions]
) -> dict[str, Tensor]: ...
@overload
def ggnvp(
    model: Model, loss: Loss, x: Any, y: Any, v: Sequence[Tensor], **options: Unpack[OperatorOptions]
) -> list[Tensor]: ...
@keywords(OperatorOptions)
@eager
def ggnvp(model: Model, loss: Loss, x: Any, y: Any, v: Any, **options: Unpack[OperatorOptions]) -> Any:
    """Return the generalised Gauss-Newton matrix times `v`, in the form of `v`."""
    return _for_one_product(model, loss, x, y, _ggn, "ggnvp", **options) @ v


@made_from("x", "y")
def _for_one_product(
    model: Model,
    loss: Loss,
    x: Any,
    y: Any,
    make: Callable[..., Operator],
    call: str,
    **options: Unpack[OperatorOptions],
) -> Operator:
    """Return an operator that is dropped before anybody can write into the model's weights."""
    return make(model, loss, x, y, call, kept=False, **options)
