"""Single products with curvature: the operator is made, used once and dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack, overload

from torch import Tensor

from ._derivatives import make_ggn, make_hessian
from ._keywords import keywords
from ._operators import Operator
from ._operators._finite_results import Source, with_source
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
    """Return the Hessian of the loss of one batch times a vector, by the trainable parameters.

    One sweep over the recorded gradient (Pearlmutter, 1994). For many products keep `hessian(...)`.

    Args:
        model: A module, differentiated in its current mode, or a `JaxFunction`.
        loss: `loss(output, y)`, one number; the objective as you reduce it.
        x: The model's input: a tensor, a tuple of arguments or a mapping of keywords.
        y: The target, passed to the loss as it is.
        v: A vector `(P,)`, columns `(P, k)`, or one tensor per parameter in a list or a dict.
        create_graph: Keep the result differentiable, by trainable parameters, by `v` and by inputs that require grad.
        options: `parameters=`, `wrt=`, `at=`, `outputs=`, `checks=`, `fallback=`, `check_finite=`; see `hessian`.

    Returns:
        The product, in the form of `v`.

    Raises:
        InputError: `v` does not match the parameters, or the loss is not one number.
        ModelStateError: No parameter requires grad.
        NotDifferentiableError: There is no second derivative; the message names the cause.
        NonFiniteError: `v` or the result holds NaN or Inf.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> hvp(model, torch.nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1), torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if is_sharded(model):
        return sharded_hvp(model, loss, x, y, v, {"create_graph": create_graph, **options})
    return _for_one_product(model, loss, x, y, make_hessian, "hvp", create_graph=create_graph, **options)._image(v)


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
    r"""Return the generalised Gauss-Newton matrix of one batch times a vector, $J^\top H_\ell J v$.

    A sweep forward, the product with the loss's Hessian by the output, and a sweep backward (Schraudolph, 2002).

    Args:
        model: A module, differentiated in its current mode, or a `JaxFunction`.
        loss: `loss(output, y)`, one number; the objective as you reduce it.
        x: The model's input: a tensor, a tuple of arguments or a mapping of keywords.
        y: The target, passed to the loss as it is.
        v: A vector `(P,)`, columns `(P, k)`, or one tensor per parameter in a list or a dict.
        create_graph: Keep the result differentiable, by the parameters and by `v`.
        options: `parameters=`, `wrt=`, `at=`, `outputs=`, `checks=`, `fallback=`, `check_finite=`; see `hessian`.

    Returns:
        The product, in the form of `v`.

    Raises:
        InputError: `v` does not match the parameters, or the loss is not one number.
        ModelStateError: No parameter requires grad.
        NotDifferentiableError: The output has no derivative; the message names the cause.
        NonFiniteError: `v` or the result holds NaN or Inf.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ggnvp(model, torch.nn.functional.mse_loss, torch.eye(2), torch.zeros(2, 1), torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if is_sharded(model):
        return sharded_ggnvp(model, loss, x, y, v, {"create_graph": create_graph, **options})
    return _for_one_product(model, loss, x, y, make_ggn, "ggnvp", create_graph=create_graph, **options)._image(v)


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
    check_finite = options.pop("check_finite", True)
    operator = make(model, loss, x, y, call, kept=False, **options)
    return with_source(operator, Source(call, {"x": x, "y": y}), check_finite)
