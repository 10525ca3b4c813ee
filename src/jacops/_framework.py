"""Curvature of models that another framework than torch records: the same products of the same operators."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ._ladder.protocol import FrameworkModel, Recorded, SampleRows
from ._torch.protocol import Rows, positive_everywhere, record_model
from .errors import InputError, explain
from .operators import LayerFactors, LinearizedMap, Operator, Product
from .space import Space
from .trees import output_leaves


def recorded(model: Any, inputs: Any, **options: Any) -> Any:
    """Record the output of a model of any framework, with the options of `record_model`."""
    if not isinstance(model, FrameworkModel):
        return record_model(model, inputs, **options)
    known = {name: options.get(name) for name in ("call", "parameters", "outputs", "at")}
    return model.record(inputs, **known)  # pyright: ignore[reportArgumentType]


def framework_hessian(model: FrameworkModel, loss: Any, x: Any, y: Any, call: str, options: Any) -> LinearizedMap:
    """Return the Hessian of the loss of one batch: the Jacobian of its gradient."""
    found = model.record_loss(loss, x, y, **_asked(call, options))
    return LinearizedMap(found.lin, found.output, symmetric=True)


def framework_ggn(model: FrameworkModel, loss: Any, x: Any, y: Any, call: str, options: Any) -> Operator:
    r"""Return the generalised Gauss-Newton matrix $J^\top H_{loss} J$ of one batch."""
    found = model.record(x, **_asked(call, options))
    J, H = LinearizedMap(found.lin, found.output), output_hessian(model, found, loss, y, call)  # noqa: N806
    return Product(Product(J.T, H), J)


def output_hessian(model: FrameworkModel, found: Recorded, loss: Any, y: Any, call: str) -> LinearizedMap:
    """Return the Hessian of a loss by the model's output; it is positive where no sample has a negative eigenvalue."""
    outer = model.record_at_output(found, loss, y, call)
    bare = LinearizedMap(outer.lin, outer.output, symmetric=True)
    convex = partial(positive_everywhere, bare._apply, output_leaves(found.output)[0])
    return LinearizedMap(outer.lin, outer.output, symmetric=True, mark=convex)


def sample_rows(found: SampleRows, codomain: Space | None = None) -> LayerFactors:
    """Return rows of every sample as an operator `(samples * rows, P)`, kept as they are."""
    domain, rows, one, route = found
    n, k = rows.shape[:2]
    shapes = [(shape[0] if shape else 1, shape[1:].numel()) for shape in domain.shapes]
    parts = [
        Rows(part.reshape(n, k, *shape))
        for part, shape in zip(domain.split(rows.reshape(n * k, domain.dim)), shapes, strict=True)
    ]
    return LayerFactors(parts, domain, codomain or Space.flat(n * k, "rows", rows), route=route)


def refuse_given(framework: str, **given: Any) -> None:
    """Refuse options that models of a framework do not have.

    Raises:
        InputError: One is given; the message names it.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise InputError(explain(name, repr(value), f"{framework} models have no such option"))


def _asked(call: str, options: Any) -> dict[str, Any]:
    return {"call": call, "parameters": options.get("parameters", _all), "outputs": options.get("outputs")}


def _all(name: str, array: Tensor) -> bool:
    return True
