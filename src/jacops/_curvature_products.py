"""Single products with curvature: the operator is made, used once and dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack, overload

from torch import Tensor

from ._derivatives import make_ggn, make_hessian
from ._keywords import keywords
from ._operators import Operator
from ._operators._finite_results import made_from
from ._options import AnyModel, CurvatureCallOptions, GraphOptions
from ._recorded_loss import Loss
from ._runtime.contexts import eager
from ._sharded import sharded_ggnvp, sharded_hvp
from ._torch.protocol import is_sharded


@overload
def hvp(model: AnyModel, loss: Loss, x: Any, y: Any, v: Tensor, **options: Unpack[GraphOptions]) -> Tensor: ...
@overload
def hvp(
    model: AnyModel, loss: Loss, x: Any, y: Any, v: Mapping[str, Tensor], **options: Unpack[GraphOptions]
) -> dict[str, Tensor]: ...
@overload
def hvp(
    model: AnyModel, loss: Loss, x: Any, y: Any, v: Sequence[Tensor], **options: Unpack[GraphOptions]
) -> list[Tensor]: ...
@keywords(CurvatureCallOptions)
@eager
def hvp(
    model: AnyModel,
    loss: Loss,
    x: Any,
    y: Any,
    v: Any,
    *,
    create_graph: bool = False,
    **options: Unpack[CurvatureCallOptions],
) -> Any:
    """Return the Hessian of the loss times `v`, in the form of `v`: flat, columns, list or dict by name.

    With `create_graph` it is differentiable, by the model's trainable parameters and by inputs that require grad.
    """
    if is_sharded(model):
        return sharded_hvp(model, loss, x, y, v, create_graph=create_graph, **options)
    return _for_one_product(model, loss, x, y, make_hessian, "hvp", create_graph=create_graph, **options) @ v


@overload
def ggnvp(model: AnyModel, loss: Loss, x: Any, y: Any, v: Tensor, **options: Unpack[GraphOptions]) -> Tensor: ...
@overload
def ggnvp(
    model: AnyModel, loss: Loss, x: Any, y: Any, v: Mapping[str, Tensor], **options: Unpack[GraphOptions]
) -> dict[str, Tensor]: ...
@overload
def ggnvp(
    model: AnyModel, loss: Loss, x: Any, y: Any, v: Sequence[Tensor], **options: Unpack[GraphOptions]
) -> list[Tensor]: ...
@keywords(CurvatureCallOptions)
@eager
def ggnvp(
    model: AnyModel,
    loss: Loss,
    x: Any,
    y: Any,
    v: Any,
    *,
    create_graph: bool = False,
    **options: Unpack[CurvatureCallOptions],
) -> Any:
    """Return the generalised Gauss-Newton matrix times `v`, in the form of `v`; `create_graph` is as in `hvp`."""
    if is_sharded(model):
        return sharded_ggnvp(model, loss, x, y, v, create_graph=create_graph, **options)
    return _for_one_product(model, loss, x, y, make_ggn, "ggnvp", create_graph=create_graph, **options) @ v


@made_from("x", "y")
def _for_one_product(
    model: AnyModel,
    loss: Loss,
    x: Any,
    y: Any,
    make: Callable[..., Operator],
    call: str,
    **options: Unpack[GraphOptions],
) -> Operator:
    """Return an operator that is dropped before anybody can write into the model's weights."""
    return make(model, loss, x, y, call, kept=False, **options)
