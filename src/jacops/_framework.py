"""Models of any framework: recorded, and what another framework than torch answers by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch

from ._finite import require_finite
from ._ladder.protocol import FrameworkModel, SampleRows, SweepOptions, is_framework_model
from ._operators import LayerFactors
from ._options import TorchOptions
from ._space import Space
from ._torch.protocol import At, Likelihood, ModelRun, RowLosses, Rows, likelihood_of
from ._trees import Selector, output_leaves
from .errors import InputError


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
    """Record the output of a model of any framework, as `ModelRun` does."""
    if is_framework_model(model):
        checks, fallback = options.get("checks", "first"), options.get("fallback", "warn")
        return model.record(inputs, SweepOptions(call, parameters, outputs, at, checks=checks, fallback=fallback))
    return ModelRun(model, inputs, call=call, parameters=parameters, outputs=outputs, at=at, **options).recorded()


def likelihood_at(model: Any, found: Any, losses: RowLosses, y: Any) -> Likelihood | None:
    """Return the likelihood of a loss by its slopes at a recorded output of any framework, if it has one."""
    if is_framework_model(model):
        return model.likelihood(found, losses.loss, y)
    if getattr(losses.loss, "weight", None) is not None and losses.counts_targets(y):
        return None  # what labels weigh does not show in a batch of one
    return likelihood_of(losses.scalar, *output_leaves(found.output, aside=True), y)


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


def framework_sample_gradients(model: FrameworkModel, loss: Any, x: Any, y: Any, options: SweepOptions) -> LayerFactors:
    """Return the gradients of the loss of every sample alone, `(n, P)`."""
    return _sample_rows(model.map_rows(x, options, y, loss))


def framework_sample_jacobians(model: FrameworkModel, x: Any, options: SweepOptions) -> LayerFactors:
    """Return the Jacobians of every sample's outputs by the parameters, `(n * k, P)`."""
    return _sample_rows(model.map_rows(x, options))


def framework_jacobian(model: FrameworkModel, x: Any, options: SweepOptions, check_finite: bool) -> Any:
    """Return the Jacobian of a model's output by its input for every sample, `(n, *out, *in)`.

    Returns:
        A tensor; a dict of them by name where the input is a tree.

    Raises:
        NonFiniteError: A derivative is NaN or Inf.
    """
    found = model.map_rows(x, options)
    space, (n, k) = found.domain, found.rows.shape[:2]
    parts = space.split(found.rows.reshape(n * k, space.dim))
    for name, part in zip(space.names, parts if check_finite else (), strict=False):
        require_finite(part, f"compute_jacobian: in the derivative by {name}")
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
