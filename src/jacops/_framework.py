"""Curvature of models that another framework than torch records: the same products of the same operators."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ._finite import is_finite, where_first
from ._ladder.protocol import FrameworkModel, Recorded, SampleRows, SweepOptions, everything, is_framework_model
from ._operators import LayerFactors, LinearizedMap, Operator, Product
from ._requirements import check_choice
from ._space import Space
from ._torch.protocol import CHECKS, Rows, check_fallback, positive_everywhere, record_model
from ._trees import output_leaves
from .errors import InputError, NonFiniteError


def recorded(model: Any, inputs: Any, **options: Any) -> Any:
    """Record the output of a model of any framework, with the options of `record_model`."""
    if not is_framework_model(model):
        return record_model(model, inputs, **options)
    return model.record(inputs, asked(**options))


def framework_hessian(model: FrameworkModel, loss: Any, x: Any, y: Any, call: str, options: Any) -> LinearizedMap:
    """Return the Hessian of the loss of one batch: the Jacobian of its gradient."""
    found = model.record_loss(loss, x, y, asked(call, **_by_parameters(options)))
    return LinearizedMap(found.lin, found.output, symmetric=True)


def framework_ggn(model: FrameworkModel, loss: Any, x: Any, y: Any, call: str, options: Any) -> Operator:
    r"""Return the generalised Gauss-Newton matrix $J^\top H_{loss} J$ of one batch."""
    return framework_ggn_at(model, model.record(x, asked(call, **_by_parameters(options))), loss, y, call)


def framework_ggn_at(model: FrameworkModel, found: Recorded, loss: Any, y: Any, call: str) -> Operator:
    """Return the generalised Gauss-Newton matrix at a recorded output."""
    J, H = LinearizedMap(found.lin, found.output), output_hessian(model, found, loss, y, call)  # noqa: N806
    return Product(Product(J.T, H), J)


def output_hessian(model: FrameworkModel, found: Recorded, loss: Any, y: Any, call: str) -> LinearizedMap:
    """Return the Hessian of a loss by the model's output; it is positive where no sample has a negative eigenvalue."""
    outer = model.record_at_output(found, loss, y, call)
    bare = LinearizedMap(outer.lin, outer.output, symmetric=True)
    convex = partial(positive_everywhere, bare._apply, output_leaves(found.output)[0])
    return LinearizedMap(outer.lin, outer.output, symmetric=True, mark=convex)


def _sample_rows(found: SampleRows) -> LayerFactors:
    """Return rows of every sample as an operator `(samples * rows, P)`, kept as they are."""
    domain, rows, one, route = found
    n, k = rows.shape[:2]
    codomain = Space(("output",), (torch.Size((n, *one)),), (rows.dtype,), rows.device)
    shapes = [(shape[0] if shape else 1, shape[1:].numel()) for shape in domain.shapes]
    parts = [
        Rows(part.reshape(n, k, *shape))
        for part, shape in zip(domain.split(rows.reshape(n * k, domain.dim)), shapes, strict=True)
    ]
    return LayerFactors(parts, domain, codomain, route=route)


def framework_sample_gradients(
    model: FrameworkModel, loss: Any, x: Any, y: Any, options: Mapping[str, Any]
) -> LayerFactors:
    """Return the gradients of the loss of every sample alone, `(n, P)`."""
    return _sample_rows(model.map_rows(x, asked("sample_gradients", **_by_parameters(options)), y, loss))


def framework_sample_jacobians(model: FrameworkModel, x: Any, options: Mapping[str, Any]) -> LayerFactors:
    """Return the Jacobians of every sample's outputs by the parameters, `(n * k, P)`."""
    return _sample_rows(model.map_rows(x, asked("sample_jacobians", **_by_parameters(options))))


def framework_jacobian(model: FrameworkModel, x: Any, check_finite: bool, **options: Any) -> Any:
    """Return the Jacobian of a model's output by its input for every sample, `(n, *out, *in)`.

    Returns:
        A tensor; a dict of them by name where the input is a tree.

    Raises:
        NonFiniteError: A derivative is NaN or Inf.
    """
    found = model.map_rows(x, asked("compute_jacobian", **options))
    space, (n, k) = found.domain, found.rows.shape[:2]
    parts = space.split(found.rows.reshape(n * k, space.dim))
    for name, part in zip(space.names, parts if check_finite else (), strict=False):
        if not is_finite(part):
            raise NonFiniteError(f"compute_jacobian: in the derivative by {name}, {where_first(part)}.")
    blocks = [part.reshape(n, *found.output, *shape) for part, shape in zip(parts, space.shapes, strict=True)]
    return dict(zip(space.names, blocks, strict=True)) if isinstance(x, Mapping | list | tuple) else blocks[0]


def refuse_options(todo: str = "", **given: Any) -> None:
    """Refuse options of a call that models of another framework than torch do not have.

    Raises:
        InputError: One is given; the message names it.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise InputError.of(name, repr(value), "models of another framework than torch have no such option", todo)


def asked(call: str, kept: bool = False, connected: bool = False, **options: Any) -> SweepOptions:
    """Return the options of a call, checked.

    Args:
        call: The public call.
        kept: Ignored: nothing that the model recorded can be written into.
        connected: Ignored: results that keep a graph are refused where they are computed.
        options: As in `SweepOptions`.

    Raises:
        InputError: `checks` or `fallback` is unknown.
    """
    check_choice("checks", options.get("checks", "first"), CHECKS)
    check_fallback(options.get("fallback", "warn"))
    return SweepOptions(call, **options)


def _by_parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": everything, **options}
