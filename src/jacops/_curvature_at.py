"""Curvature at a recorded point: the Hessian of a recorded loss, the Gauss-Newton matrix at a recorded output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._ladder.protocol import is_framework_model
from ._operators import LinearizedMap, Operator, Product
from ._operators._computed import Computed, detached, with_computed
from ._operators._naming import named
from ._recorded_loss import (
    Loss,
    check_real,
    loss_of_output,
    record_loss,
    recordable,
)
from ._runtime.agreement import size
from ._runtime.contexts import private_noise
from ._runtime.restoring import restoring
from ._torch.protocol import (
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
from ._trees import flatten, output_leaves
from .errors import NotDifferentiableError


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


def unlayered(found: Recording, call: str) -> LinearizedMap:
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
        return with_computed(Product(Product(J.T, replace(H, mark=convex)), J), known)
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
    rows, name = product._apply, "Gauss-Newton matrix by layers"
    layers = partial(gauss_newton_layers, found.lin, H._apply, rows)
    entries = partial(gauss_newton_diagonal, found.lin, H._apply, rows)
    formed = ByLayers(found.lin, name, layers, rows, entries, found.lin.routes)
    if create_graph:  # what is formed without a graph is formed as ever
        J, H = replace(J, create_graph=True), replace(H, create_graph=True)
        product = Product(Product(J.T, H), J)
    return with_computed(replace(product, formed=formed), known)


def joined(lin: Any) -> Tensor:
    """Return the recorded gradient, flat."""
    return lin.domain.join([part.detach().unsqueeze(0) for part in lin.outputs])[0]


def _pulled(J: LinearizedMap, slope: Any) -> Tensor:  # noqa: N803
    """Return the gradient by the parameters, from that by the output."""
    return J._apply_transpose(joined(slope)[None])[0]


def _leading(x: Any, y: Any) -> list[int]:
    """Return how many samples a batch may hold: the lengths of its tensors."""
    tensors = [v for part in (x, y) for v in flatten(part, "x, y")[0] if isinstance(v, Tensor) and v.ndim]
    return [tensor.shape[0] for tensor in tensors if tensor.shape[0]]
