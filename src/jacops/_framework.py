"""Models of any framework: recorded, and what another framework than torch answers by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import torch

from ._finite import is_finite, where_first
from ._ladder.protocol import FrameworkModel, SampleRows, is_framework_model
from ._operators import LayerFactors
from ._recorded_loss import CurvatureOptions, trainable
from ._space import Space
from ._torch.protocol import At, Likelihood, RowLosses, Rows, likelihood_of, record_model
from ._trees import Selector, output_leaves
from .errors import InputError, NonFiniteError


class TorchOptions(TypedDict, total=False):
    """What only torch is asked when a model is recorded, as in `record_model`."""

    checks: str
    fallback: str
    connected: bool
    kept: bool


def recorded(
    model: Any,
    inputs: Any,
    *,
    call: str,
    parameters: Callable[[str, Any], bool] | None,
    outputs: Selector = None,
    at: At = None,
    **options: Unpack[TorchOptions],
) -> Any:
    """Record the output of a model of any framework, as `record_model` does."""
    if is_framework_model(model):
        return model.record(inputs, call=call, parameters=parameters, outputs=outputs, at=at)
    return record_model(model, inputs, call=call, parameters=parameters, outputs=outputs, at=at, **options)


def likelihood_at(model: Any, found: Any, losses: RowLosses, y: Any) -> Likelihood | None:
    """Return the likelihood of a loss by its slopes at a recorded output of any framework, if it has one."""
    if is_framework_model(model):
        return model.likelihood(found, losses.loss, y)
    return likelihood_of(losses.scalar, *output_leaves(found.output), y)


def sample_rows(found: SampleRows) -> LayerFactors:
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


def framework_jacobian(
    model: FrameworkModel, x: Any, outputs: Any, mode: str, check_finite: bool, **others: Any
) -> Any:
    """Return the Jacobian of a model's output by its input for every sample, `(n, *out, *in)`.

    Returns:
        A tensor; a dict of them by name where the input is a tree.

    Raises:
        InputError: One of the other options of `compute_jacobian` is given.
        NonFiniteError: A derivative is NaN or Inf.
    """
    for name, value in others.items():
        if value is not None and value is not False:
            raise InputError.of(name, repr(value), "models of another framework than torch have no such option")
    found = model.map_rows(x, call="compute_jacobian", outputs=outputs, mode=mode)
    space, (n, k) = found.domain, found.rows.shape[:2]
    parts = space.split(found.rows.reshape(n * k, space.dim))
    for name, part in zip(space.names, parts if check_finite else (), strict=False):
        if not is_finite(part):
            raise NonFiniteError(f"compute_jacobian: in the derivative by {name}, {where_first(part)}.")
    blocks = [part.reshape(n, *found.output, *shape) for part, shape in zip(parts, space.shapes, strict=True)]
    return dict(zip(space.names, blocks, strict=True)) if isinstance(x, Mapping | list | tuple) else blocks[0]


def asked(call: str, options: CurvatureOptions) -> dict[str, Any]:
    """Return the options of a call that a framework's model takes."""
    return {"call": call, "parameters": options.get("parameters", trainable), "outputs": options.get("outputs")}
