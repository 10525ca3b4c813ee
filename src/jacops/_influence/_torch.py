"""Torch models that can be differentiated twice, and torch's tensor utilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._derivatives import hessian
from .._finite import check_finite, check_vector
from .._objective import Objective
from .._progress import track
from .._recorded_loss import check_loss, record_loss
from .._runtime.contexts import eager, sweeping
from .._torch.protocol import (
    Linearization,
    ModelLoss,
    bare,
    gradient_linearization,
    parameter_names,
    resolved_loss,
)
from ..errors import InputError, InputTypeError, ModelStateError, NotDifferentiableError
from ._twice_differentiable import ArrayUtilities, TwiceDifferentiable, joined_rows

_ORIGIN = "_jacops_private_inputs"


class TorchTwiceDifferentiable(TwiceDifferentiable[Tensor]):  # pyright: ignore[reportInvalidTypeArguments]
    """A torch model with its loss, called as `loss(model(x), y)`.

    The model is differentiated in its current mode, on private copies; buffers, modes, gradients and the caller's `x`
    are not changed. Parameters that do not require grad are left out.

    Args:
        model: A module with at least one parameter that requires grad.
        loss: `loss(output, y)`, one number; or `"model"`, the loss that a model of transformers computes from its
            `logits` where it is given `labels`, which is then taken of `(output, y)`.

    Raises:
        InputTypeError: `model` is not a module, `loss` is not callable, or the model has no loss of its own.
        ModelStateError: No parameter requires grad.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | Literal["model"]) -> None:
        found = resolved_loss(model, loss)
        check_loss(found)
        self.model, self.loss = model, found
        if not self.parameters:
            came = f"a {type(bare(model)).__name__} in which no parameter requires grad"
            needed = "there is nothing to differentiate"
            raise ModelStateError.of("model", came, needed, "Call `.requires_grad_()` on some.")

    @property
    def objective(self) -> Objective:
        """Model and loss, as `Problem` accepts them."""
        return Objective(self.model, self.loss)

    @property
    def parameters(self) -> list[Tensor]:
        """The model's own parameters that require grad, tied ones once."""
        return [p for p in parameter_names(bare(self.model)).values() if p.requires_grad]

    @property
    def num_params(self) -> int:
        """Number of entries of all of them."""
        return sum(p.numel() for p in self.parameters)

    @eager
    def grad(self, x: Any, y: Any, create_graph: bool = False) -> Tensor:
        """Return the gradient `[P]` of the loss by the parameters.

        Args:
            x: The model's input: a tensor, a tuple of positional or a mapping of keyword arguments. Not changed.
            y: The target, passed to the loss as it is.
            create_graph: Return a gradient with a graph, connected to the model's own parameters and to `x`, for `mvp`.

        Raises:
            InputError: The loss is not one number, or `y` would broadcast against the output.
            NonFiniteError: The loss or its gradient is NaN or Inf.
            NotDifferentiableError: With `create_graph`, there is no second derivative.
        """
        found = record_loss(self.model, self.loss, x, y, "grad", connected=create_graph)
        self._verify(x, y, found.before)
        lin = found.lin
        if not create_graph:
            rows = lin.pull_rows([torch.ones_like(lin.outputs[0]).unsqueeze(0)])
            check_finite("grad", rows, lin.domain.names, lin)
            return lin.domain.join(rows)[0].detach()
        gradient = gradient_linearization(found, "grad(create_graph=True)")
        with sweeping(lin.outputs[0]):
            flat = lin.domain.join([g.unsqueeze(0) for g in gradient.outputs])[0]
            if not flat.requires_grad:
                # A loss linear in the parameters: its gradient is constant, which mvp must not take for a missing
                # graph.
                for leaf in lin.leaves:
                    flat = flat + leaf.flatten()[:0].sum().to(flat.dtype)
        check_finite("grad", [flat], ["the parameters"], lin)
        setattr(flat, _ORIGIN, found.inputs)
        return flat

    @eager
    def hessian(self, x: Any, y: Any) -> Tensor:
        """Return the Hessian `[P, P]` of the loss by the parameters, for one batch.

        Args:
            x: The model's input: a tensor, a tuple of arguments or a mapping of keywords.
            y: The target, passed to the loss as it is.

        Raises:
            InputError: The loss is not one number, or `y` would broadcast.
            NonFiniteError: The loss or its Hessian is NaN or Inf.
            NotDifferentiableError: There is no second derivative; the message names the cause.
        """
        operator = hessian(self.model, self.loss, x, y)
        self._verify(x, y, operator.output)
        matrix = operator.dense()
        check_finite("hessian", [matrix], ["the parameters"], operator.lin)
        return matrix

    def _verify(self, x: Any, y: Any, output: Any) -> None:
        if isinstance(self.loss, ModelLoss) and not self.loss.verified:
            self.loss.check(self.model, x, y, output)

    @staticmethod
    @eager
    def mvp(grad_xy: Tensor, v: Any, backprop_on: Any, *, progress: bool = False) -> Tensor:
        """Return the derivative of `grad_xy` by `backprop_on`, along directions: `[D, P]` gives `[D, M]`.

        All directions go in one batched pass where that agrees with plain ones.

        Args:
            grad_xy: What `grad(x, y, create_graph=True)` returned.
            v: Directions `[D, P]`, or one `[P]`; torch or NumPy, in the gradient's dtype.
            backprop_on: The model's parameters (a tensor or several), or the `x` that went into `grad`.
            progress: Show a progress bar.

        Returns:
            `[D, M]`, detached; `M` counts the entries of `backprop_on`. A zero second derivative gives zeros.

        Raises:
            InputError: Shapes or dtypes do not match exactly, or `backprop_on` was not part of the computation.
            NotDifferentiableError: `grad_xy` has no graph; pass `create_graph=True` to `grad`.
        """
        if not isinstance(grad_xy, Tensor) or grad_xy.ndim != 1:
            raise InputTypeError.of("grad_xy", f"a {type(grad_xy).__name__}", "a gradient `[P]` from `grad` is needed")
        if not grad_xy.requires_grad:
            raise NotDifferentiableError("`grad_xy` has no graph. Make it with `grad(x, y, create_graph=True)`.")
        directions = _directions(v, grad_xy)
        targets = _targets(backprop_on, grad_xy)
        lin = Linearization(targets, [grad_xy], leaf_names="backprop_on", output_names=["grad_xy"], call="mvp")
        chunk = lin.chunk(max(1, directions.shape[0]))
        result = torch.zeros(directions.shape[0], lin.domain.dim, dtype=lin.domain.dtype, device=grad_xy.device)
        for start in track(range(0, directions.shape[0], chunk), "mvp", enabled=progress):
            rows = lin.pull_rows([directions[start : start + chunk]])
            result[start : start + chunk] = lin.domain.join(rows).detach()
        return result


def _directions(v: Any, grad_xy: Tensor) -> Tensor:
    if not isinstance(v, Tensor):
        try:
            v = torch.as_tensor(np.array(v))  # a copy, whatever its strides
        except (TypeError, ValueError, RuntimeError):
            came = f"a {type(v).__name__}"
            raise InputTypeError.of("v", came, "directions as a tensor `[D, P]` are needed") from None
    P = grad_xy.shape[0]  # noqa: N806
    rows = v.unsqueeze(0) if v.ndim == 1 else v
    if rows.ndim != 2 or rows.shape[1] != P:
        came = f"of shape {tuple(v.shape)}"
        raise InputError.of("v", came, f"shape [D, {P}] or [{P}] is needed; nothing is broadcast")
    if rows.dtype != grad_xy.dtype or rows.device != grad_xy.device:
        came = f"{rows.dtype} on {rows.device}"
        raise InputError.of("v", came, f"the gradient is {grad_xy.dtype} on {grad_xy.device}")
    check_vector("mvp", "v", [rows])
    return rows.detach()


def _targets(backprop_on: Any, grad_xy: Tensor) -> list[Tensor]:
    if not isinstance(backprop_on, Tensor | Iterable):
        came = f"a {type(backprop_on).__name__}"
        raise InputTypeError.of("backprop_on", came, "a tensor or several tensors are needed")
    listed = [backprop_on] if isinstance(backprop_on, Tensor) else list(backprop_on)
    origin: dict[int, tuple[Tensor, Tensor]] = getattr(grad_xy, _ORIGIN, {})
    targets = []
    for i, tensor in enumerate(listed):
        name = f"backprop_on[{i}]"
        if not isinstance(tensor, Tensor):
            raise InputTypeError.of(name, f"a {type(tensor).__name__}", "a tensor is needed")
        if id(tensor) in origin:
            tensor = origin[id(tensor)][1]
        elif not tensor.requires_grad:
            came = "neither a parameter that requires grad nor an input of `grad`"
            raise InputError.of(name, came, "the gradient must have been computed from it")
        targets.append(tensor)
    if not targets:
        raise InputError.of("backprop_on", "empty", "at least one tensor is needed")
    return targets


class TorchTensorUtilities(ArrayUtilities):
    """Torch's tensor operations."""

    twice_differentiable_type = TorchTwiceDifferentiable

    @staticmethod
    def einsum(equation: str, *operands: Tensor) -> Tensor:
        """Sum products of entries, by Einstein's convention."""
        return torch.einsum(equation, *operands)

    @staticmethod
    def cat(a: Sequence[Tensor], **kwargs: Any) -> Tensor:
        """Join tensors along an existing axis (`dim=`)."""
        return torch.cat(list(a), **kwargs)

    @staticmethod
    def stack(a: Sequence[Tensor], **kwargs: Any) -> Tensor:
        """Join tensors along a new axis (`dim=`)."""
        return torch.stack(list(a), **kwargs)

    @staticmethod
    def cat_gen(
        a: Iterator[Tensor] | Iterable[Tensor], resulting_shape: tuple[int, ...], model: TorchTwiceDifferentiable
    ) -> Tensor:
        """Join tensors from a generator along the first axis, in the dtype and on the device of the model.

        Raises:
            InputError: The generator gives fewer or more rows than `resulting_shape`, or rows of another shape.
        """
        like = model.parameters[0]
        result = torch.empty(resulting_shape, dtype=like.dtype, device=like.device)
        return joined_rows(result, a, Tensor.detach, "a tensor")


__all__ = ["TorchTensorUtilities", "TorchTwiceDifferentiable"]
