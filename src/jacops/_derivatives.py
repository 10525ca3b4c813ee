r"""Functions that build operators: Jacobian, Hessian, generalised Gauss-Newton.

Everything is a Jacobian of something: the Hessian is the Jacobian of the gradient, the Gauss-Newton matrix is
$J^\top H_{loss} J$.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ._framework import recorded, refuse_options
from ._keywords import keywords
from ._ladder.protocol import SweepOptions, is_framework_model
from ._operators import LinearizedMap, Operator, Product
from ._operators._computed import Computed, detached, with_computed
from ._operators._finite_results import made_from
from ._operators._naming import named
from ._options import AnyModel, CurvatureCallOptions, GraphOptions, TorchOptions
from ._picks import Picks, differentiated, variable
from ._recorded_loss import (
    Loss,
    check_real,
    check_source,
    check_usable,
    located,
    loss_of_output,
    record_loss,
    recordable,
)
from ._runtime.agreement import size
from ._runtime.contexts import eager, private_noise
from ._runtime.restoring import restoring
from ._torch.protocol import (
    At,
    ByLayers,
    RecordedLabels,
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
    record_closure,
)
from ._trees import Selector, flatten, hint_at_labels, output_leaves
from ._words import Checks, Fallback, Wrt
from .errors import InputError, InputTypeError, NotDifferentiableError


@keywords()
@eager
@made_from("inputs")
def jacobian(
    model: AnyModel,
    inputs: Any,
    wrt: Wrt = "parameters",
    *,
    parameters: Picks = None,
    outputs: Selector = None,
    at: At = None,
    checks: Checks = "first",
    fallback: Fallback = "warn",
    allow_zero: bool = False,
    create_graph: bool = False,
    check_finite: bool = True,
) -> LinearizedMap:
    """Return the Jacobian of a model's output on one batch, as an operator.

    The model runs once, in its current mode (train or eval), on private copies; products are sweeps over that graph.

    Args:
        model: A module, a `JaxFunction`, or with `wrt="inputs"` a function `f(x)`.
        inputs: Its input: a tuple is unpacked into positional arguments, a mapping into keyword arguments.
        wrt: `"parameters"`, or `"inputs"` (those of floating point).
        parameters: Which parameters: None and `"trainable"` take those that require grad; name patterns (`"head.*"`),
            tensors of the model, or a function of name and parameter pick others.
        outputs: Part of the output: indices along a tensor's last axis, an entry of a tuple or dict, or a callable.
        at: A submodule's path to differentiate by its output, or a pair `(source, target)`; a source needs
            `wrt="inputs"`.
        checks: `"first"`, `"always"` or `"never"` check fast routes against the plain one.
        fallback: `"warn"`, `"silent"` or `"error"` where a fast route is left.
        allow_zero: Accept an output without a path to what it is differentiated by.
        create_graph: Keep products differentiable, by the model's trainable parameters and by inputs that
            require grad. Writing into the parameters invalidates such an operator.
        check_finite: Results with NaN or Inf raise.

    Returns:
        An operator from the space of parameters (or inputs) to the space of outputs; `output` is what the model
        returned.

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
    check_source(picks, at)
    hint_at_labels("jacobian", outputs, inputs)
    if is_framework_model(model):
        refuse_options(create_graph=create_graph)
    ladder: TorchOptions = {"checks": checks, "fallback": fallback, "kept": not create_graph, "connected": create_graph}
    found = recorded(model, inputs, call="jacobian", parameters=picks, outputs=outputs, at=at, **ladder)
    if allow_zero:
        check_real(found.lin)
    else:
        check_usable(found.lin, todo=" Pass `allow_zero=True` if that is meant.")
    J = LinearizedMap(found.lin, found.output, by_parameters=picks is not None, create_graph=create_graph)
    named(J, "jacobian by inputs" if picks is None else "jacobian")
    return with_computed(J, Computed(detached(found.output)))


@keywords(CurvatureCallOptions)
@eager
@made_from("x", "y")
def hessian(
    model: AnyModel,
    loss: Loss | None = None,
    x: Any = None,
    y: Any = None,
    *,
    create_graph: bool = False,
    **options: Unpack[CurvatureCallOptions],
) -> LinearizedMap:
    r"""Return the Hessian of `loss(model(x), y)` by the trainable parameters, for one batch, as an operator.

    Without a loss, `hessian(func, parameters=tensors)` is that of any function without arguments by tensors that it
    closes over, as in `jvp`: `func` is called once, without arguments, and returns one number.

    A product is one sweep over the recorded gradient (Pearlmutter, 1994). Where the graph holds custom autograd
    Functions, one product is compared with a central difference of gradients first, since torch does not detect a
    second derivative that a backward drops.

    Args:
        model: A module, differentiated in its current mode, a `JaxFunction`, or with `wrt="inputs"` a function `f(x)`.
        loss: `loss(output, y)`, one number; the objective as you reduce it.
        x: The model's input, as in `jacobian`.
        y: The target, passed to the loss as it is.
        create_graph: Keep products and all that is made of them differentiable.
        options: `parameters=`, `wrt=` and `at=` (as in `jacobian`: by inputs or hidden values), `outputs=`, `checks=`,
            `fallback=`, `check_finite=` (results with NaN or Inf raise).

    Returns:
        A symmetric operator on the space of parameters. `output` is what the model returned, and
        `value_and_gradient()` gives the loss and its gradient; neither runs the model again.

    Raises:
        NotDifferentiableError: There is no second derivative; the message names the cause.
        InputError: The loss is not one number, or `y` would broadcast.
        InputTypeError: A function without arguments is passed with `x` or `y`, or without `parameters`.
        ModelStateError: No parameter requires grad.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> H = hessian(model, torch.nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1))
        >>> H.dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if loss is None and callable(model) and not isinstance(model, nn.Module) and not is_framework_model(model):
        if create_graph:
            todo = "Write it as a `jacops.Function` with a loss, or differentiate the closure itself."
            raise InputError.of("create_graph", "True", "the Hessian of a closure has no graph", todo)
        return _of_closure(model, x, y, options)
    options = GraphOptions(**options, create_graph=create_graph)
    return make_hessian(model, loss, x, y, "hessian", kept=True, **options)  # pyright: ignore[reportArgumentType]


def _of_closure(func: Any, x: Any, y: Any, options: CurvatureCallOptions) -> LinearizedMap:
    for name, value in {"x": x, "y": y, **options}.items():
        if value is not None and name not in ("parameters", "fallback", "check_finite"):
            needed = "without a loss, a function without arguments is differentiated"
            raise InputTypeError.of(name, "given", needed, "Pass a module with `loss`, `x` and `y`.")
    params, fallback = options.get("parameters"), options.get("fallback", "warn")
    if params is None or isinstance(params, str):
        needed = "the tensors that a function without arguments is differentiated by are needed"
        raise InputTypeError.of("parameters", repr(params), needed)
    found = record_closure(func, params, "hessian", fallback)
    if not isinstance(found.output, Tensor) or found.output.numel() != 1:
        shape = tuple(found.output.shape) if isinstance(found.output, Tensor) else type(found.output).__name__
        raise InputError.of("func()", f"of shape {shape}", "one number is needed", "Take its mean or sum.")
    check_usable(found.lin)
    H = named(_unlayered(found, "hessian"), "hessian")  # noqa: N806
    return with_computed(H, Computed(None, None, found.lin.outputs[0].detach(), partial(_joined, H.lin)))


def make_hessian(
    model: AnyModel, loss: Loss, x: Any, y: Any, call: str, *, kept: bool, **options: Unpack[GraphOptions]
) -> LinearizedMap:
    """Return the Hessian, `kept` where the caller may write into the weights before it is used."""
    create_graph = options.pop("create_graph", False)
    chosen = located(model, options)
    if is_framework_model(model):
        refuse_options(create_graph=create_graph)
        there = model.record_loss(loss, x, y, SweepOptions(call, **chosen))
        H = LinearizedMap(there.lin, there.output, symmetric=True)  # noqa: N806
        named(H, "hessian by inputs" if chosen.get("parameters") is None else "hessian")
        return with_computed(H, Computed(loss=there.output, gradient=partial(model.slope, there)))
    once = not kept
    kept = kept and not create_graph
    found = record_loss(model, loss, x, y, call, kept=kept, connected=create_graph, **chosen)
    if found.by_inputs:
        H = named(_unlayered(found, call), "hessian by inputs")  # noqa: N806
    else:
        moved = partial(shifted_gradient, model, loss, x, y, options=chosen)
        H = hessian_at(found, x, y, call, moved, once)  # noqa: N806
    if once and not create_graph:
        return H
    gradient = partial(_joined, H.lin)
    H = replace(H, create_graph=True) if create_graph else H  # noqa: N806
    return with_computed(H, Computed(detached(found.before), None, found.lin.outputs[0].detach(), gradient))


def _unlayered(found: Recording, call: str) -> LinearizedMap:
    """Return the Hessian by inputs, hidden values or tensors of a closure, for which no layers are taken.

    Raises:
        NotDifferentiableError: A custom Function may drop its second derivative, which nothing here would show.
    """
    functions = found.lin.graph_info.functions
    if functions:
        came = f"with the custom Function {', '.join(functions)}"
        todo = "Take a model's parameters, or `input_hessian`, which are compared with differences."
        raise NotDifferentiableError.of("the graph", came, f"{call} cannot check its second derivative here", todo)
    return LinearizedMap(gradient_linearization(found, call), found.output, symmetric=True)


def _joined(lin: Any) -> Tensor:
    """Return the recorded gradient, flat."""
    return lin.domain.join([part.detach().unsqueeze(0) for part in lin.outputs])[0]


def hessian_at(
    found: Recording, x: Any, y: Any, call: str, gradient: Callable[[dict[str, Tensor]], Tensor], once: bool = False
) -> LinearizedMap:
    """Return the Hessian of a recorded loss.

    Args:
        found: The loss by the parameters.
        x: The batch that it is of.
        y: Its target.
        call: The public call on whose behalf this is done.
        gradient: Returns the gradient `(P,)` at parameters that are changed by so much, by name.
        once: It is for one product only; ways to its matrix and diagonal are not prepared.
    """
    lin = gradient_linearization(found, call)
    operator = LinearizedMap(lin, found.output, True)
    if not once:
        rows, many = operator._apply, _leading(x, y)
        layers = partial(hessian_layers, found.lin, many, rows)
        entries = partial(hessian_diagonal, found.lin, many, rows)
        formed = ByLayers(found.lin, "Hessian by layers", layers, rows, entries, lin.routes)
        operator = LinearizedMap(lin, found.output, True, formed=formed)
    if found.lin.graph_info.functions and all(type(leaf) in (Tensor, nn.Parameter) for leaf in lin.leaves):
        _spot_check(operator, found, gradient)
    return operator


def shifted_gradient(
    model: Any, loss: Loss, x: Any, y: Any, shift: dict[str, Tensor], options: Mapping[str, Any]
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


@keywords(CurvatureCallOptions)
@eager
@made_from("x", "y")
def ggn(
    model: AnyModel,
    loss: Loss,
    x: Any,
    y: Any,
    *,
    create_graph: bool = False,
    **options: Unpack[CurvatureCallOptions],
) -> Operator:
    r"""Return the generalised Gauss-Newton matrix $J^\top H_{loss} J$ for one batch (Schraudolph, 2002; Martens, 2014).

    Args:
        model: A module, differentiated in its current mode, a `JaxFunction`, or with `wrt="inputs"` a function `f(x)`.
        loss: `loss(output, y)`, one number, twice differentiable in the output.
        x: The model's input, as in `jacobian`.
        y: The target.
        create_graph: Keep products and all that is made of them differentiable.
        options: `parameters=`, `wrt=`, `at=`, `outputs=`, `checks=`, `fallback=`, `check_finite=`; see `hessian`.

    Returns:
        A symmetric operator on the space of parameters. It is marked positive for those of torch's own losses that
        are convex in the output, and for any other loss whose Hessian by the output has no negative eigenvalue in
        any sample; that is computed when `positive` is first read, and a loss of more than some hundred outputs has
        to be diagonal or of a softmax's form to be marked. `output` and `value_and_gradient()` as in `hessian`.

    Raises:
        NotDifferentiableError: There is no derivative; the message names the cause.
        InputError: The loss is not one number, or `y` would broadcast.
        ModelStateError: No parameter requires grad.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ggn(model, torch.nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1)).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return make_ggn(model, loss, x, y, "ggn", kept=True, create_graph=create_graph, **options)


def make_ggn(
    model: AnyModel, loss: Loss, x: Any, y: Any, call: str, *, kept: bool, **options: Unpack[GraphOptions]
) -> Operator:
    """Return the generalised Gauss-Newton matrix, `kept` where the caller may write into the weights before its use."""
    create_graph = options.pop("create_graph", False)
    if is_framework_model(model):
        refuse_options(create_graph=create_graph)
    kept = kept and not create_graph
    found = recorded(model, x, call=call, kept=kept, connected=create_graph, aside=True, **located(model, options))
    return ggn_at(model, found, loss, y, call, kept, create_graph)


@restoring
def ggn_at(
    model: Any, found: Any, loss: Loss, y: Any, call: str, kept: bool = True, create_graph: bool = False
) -> Operator:
    """Return the generalised Gauss-Newton matrix at a recorded output; a target is copied where the result is kept."""
    check_real(found.lin)
    J = LinearizedMap(found.lin, found.output)
    if is_framework_model(model):
        there = model.record_at_output(found, loss, y, call)
        H = LinearizedMap(there.lin, there.output, symmetric=True)
        convex = partial(positive_everywhere, H._apply, output_leaves(found.output)[0])
        known = Computed(found.output, None, there.output, lambda: J._apply_transpose(model.slope(there)[None])[0])
        product = Product(Product(J.T, replace(H, mark=convex)), J)
        by_inputs = found.lin.options.parameters is None
        return with_computed(named(product, "ggn by inputs") if by_inputs else product, known)
    y = recordable(y, kept)
    outer = record_at_outputs(found, loss_of_output(loss, y), loss, call, create_graph)
    slope = gradient_linearization(outer, call)
    H = LinearizedMap(slope, outer.output, symmetric=True)
    H = replace(
        H, mark=is_convex(loss, y) or partial(computed_convex, loss, y, H._apply, found.lin.outputs, found.tree)
    )
    product = Product(Product(J.T, H), J)
    known = Computed(detached(found.output), None, outer.lin.outputs[0].detach(), lambda: _pulled(J, slope))
    if found.by_inputs:
        return with_computed(named(product, "ggn by inputs"), known)
    lin, rows, labels = found.lin, product._apply, RecordedLabels(loss, y, found.lin.outputs, outer.lin.proofs)
    layers = partial(gauss_newton_layers, lin, H._apply, rows)
    entries = partial(gauss_newton_diagonal, lin, H._apply, rows, labels)
    formed = ByLayers(lin, "Gauss-Newton matrix by layers", layers, rows, entries, lin.routes)
    if create_graph:  # what is formed without a graph is formed as ever
        J, H = replace(J, create_graph=True), replace(H, create_graph=True)
        product = Product(Product(J.T, H), J)
    return with_computed(replace(product, formed=formed), known)


def _pulled(J: LinearizedMap, slope: Any) -> Tensor:  # noqa: N803
    """Return the gradient by the parameters, from that by the output."""
    return J._apply_transpose(_joined(slope)[None])[0]


def _leading(x: Any, y: Any) -> list[int]:
    """Return how many samples a batch may hold: the lengths of its tensors."""
    tensors = [v for part in (x, y) for v in flatten(part, "x, y")[0] if isinstance(v, Tensor) and v.ndim]
    return [tensor.shape[0] for tensor in tensors if tensor.shape[0]]
