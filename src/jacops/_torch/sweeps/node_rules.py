"""How a tangent goes through one node of a recorded graph.

The general rule transposes the node's own backward by a second, local one. Operations that cost, matrix products and
convolutions, have the rule of their product written out; views move the tangent as they moved the value; and
what acts on each entry alone has a backward that is its own transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring

Tangents = Sequence[Tensor | None]
Rule = Callable[[Any, Tangents], Sequence[Tensor | None]]
_ENTRYWISE = (
    *("Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Softplus", "Tanh", "Sigmoid", "LogSigmoid", "Hardtanh"),
    *("Hardswish", "Hardsigmoid", "Threshold", "Exp", "Expm1", "Log", "Log1P", "Sin", "Cos", "Tan", "Asin", "Acos"),
    *("Atan", "Sinh", "Cosh", "Sqrt", "Rsqrt", "Pow", "Reciprocal", "Erf", "Abs", "Neg"),
)
_OWN_TRANSPOSE = frozenset(f"{name}Backward0" for name in (*_ENTRYWISE, "Softmax", "Clone", "Alias"))
_RESHAPED = frozenset(
    f"{name}Backward{i}" for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze") for i in range(3)
)


def rule_for(node: Any) -> Rule:
    """Return the rule of a node.

    Raises:
        RouteFailedError: There is none, because the node is not made by one of torch's own operations.
    """
    name = node.name()
    if "::" in name or name in ("CopySlices", "CopyBackwards") or not name[-1].isdigit():
        raise RouteFailedError(f"no rule for {name}")
    if name in _OWN_TRANSPOSE and len(node.next_functions) == 1:
        return _own_transpose
    if name in _RESHAPED:
        return _reshaped
    return _WRITTEN_OUT.get(name) or TransposedBackward()


class TransposedBackward:
    """The general rule: the derivative of a node's backward with respect to what goes into it.

    The backward is linear, so it is recorded once, from zeros.
    """

    def __init__(self) -> None:
        self._seeds: list[Tensor] = []
        self._grads: list[Tensor | None] = []

    @restoring
    def __call__(self, node: Any, tangents: Tangents) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            if not self._seeds:
                self._record(node)
            pairs = [
                (_fitted(g, t), t)
                for g, t in zip(self._grads, tangents, strict=True)
                if g is not None and t is not None and g.requires_grad
            ]
            if not pairs:
                return [None] * len(self._seeds)
            grads, moved = zip(*pairs, strict=True)
            return swept(grads, self._seeds, moved)

    def _record(self, node: Any) -> None:
        kinds = [(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata]
        if any(dtype.is_complex for _, dtype, _ in kinds):
            raise RouteFailedError("complex numbers")
        seeds = [torch.zeros(s, dtype=d, device=w, requires_grad=True) for s, d, w in kinds]
        grads = node(*seeds)
        self._grads = list(grads) if isinstance(grads, tuple) else [grads]
        self._seeds = seeds  # last: it marks the record as complete


def _fitted(grad: Tensor, tangent: Tensor) -> Tensor:
    """Return what a node gave as the engine would hand it on: summed over what was broadcast, in its dtype."""
    if grad.shape != tangent.shape:
        grad = grad.sum_to_size(tangent.shape)
    return grad if grad.dtype == tangent.dtype else grad.to(tangent.dtype)


def _own_transpose(node: Any, tangents: Tangents) -> list[Tensor | None]:
    return [node(tangents[0])]


def _reshaped(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    return [None if tangent is None else tangent.reshape(tuple(node._input_metadata[0].shape))]


def _turned(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    return [None if tangent is None else tangent.t()]


def _transposed(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    if tangent is None:
        return [None]
    one, other = (axis_of(d, tangent.ndim) for d in (node._saved_dim0, node._saved_dim1))
    return [tangent.transpose(one, other)]


def _permuted(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    return [None if tangent is None else tangent.permute([axis_of(d, tangent.ndim) for d in node._saved_dims])]


def selected(node: Any, tangents: Tangents) -> list[Tensor | None]:
    """Return the part of a tangent that an index selects."""
    (tangent,) = tangents
    if tangent is None:
        return [None]
    axis = axis_of(node._saved_dim, tangent.ndim)
    return [tangent.select(axis, axis_of(node._saved_index, tangent.shape[axis]))]


def _accumulated(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    if tangent is None:
        return [None]
    return [tangent.cumsum(axis_of(node._saved_dim, max(1, tangent.ndim)), dtype=node._input_metadata[0].dtype)]


def _summed(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    return [None if tangent is None else tangent.sum(dtype=node._input_metadata[0].dtype)]


def _summed_along(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    if tangent is None:
        return [None]
    axes = node._saved_dim and [axis_of(d, max(1, tangent.ndim)) for d in node._saved_dim]
    return [tangent.sum(axes, node._saved_keepdim, dtype=node._input_metadata[0].dtype)]


def _log_softmax(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (tangent,) = tangents
    if tangent is None:
        return [None]
    shares = node._saved_result.exp()
    return [tangent - (shares * tangent).sum(axis_of(node._saved_dim, tangent.ndim), keepdim=True)]


def axis_of(saved: int, many: int) -> int:
    """Negative axes and indices are saved as what they are in an unsigned number."""
    return saved if saved < many else saved - 2**64


def _added(node: Any, tangents: Tangents) -> list[Tensor | None]:
    left, right = (*tangents, None)[:2]
    return [_whole(node, left, right, right_factor=node._saved_alpha)]


def _subtracted(node: Any, tangents: Tangents) -> list[Tensor | None]:
    left, right = (*tangents, None)[:2]
    return [_whole(node, left, right, right_factor=-node._saved_alpha)]


def _multiplied(node: Any, tangents: Tangents) -> list[Tensor | None]:
    left, right = tangents
    return [
        _whole(
            node,
            None if left is None else left * node._saved_other,
            None if right is None else right * node._saved_self,
        )
    ]


def _divided(node: Any, tangents: Tangents) -> list[Tensor | None]:
    left, right = tangents
    below = node._saved_other
    return [
        _whole(
            node,
            None if left is None else left / below,
            None if right is None else right * (node._saved_self / below).neg_() / below,
        )
    ]


def _mm(node: Any, tangents: Tangents) -> list[Tensor | None]:
    left, right = tangents
    moved = None if left is None else left.mm(node._saved_mat2)
    return [moved if right is None else _plus_product(moved, node._saved_self, right)]


def _addmm(node: Any, tangents: Tangents) -> list[Tensor | None]:
    offset, left, right = tangents
    moved = None if left is None else left.mm(node._saved_mat2)
    moved = moved if right is None else _plus_product(moved, node._saved_mat1, right)
    if moved is None:
        return [_whole(node, None, offset, right_factor=node._saved_beta)]
    if node._saved_alpha != 1:
        moved = moved * node._saved_alpha
    return [moved if offset is None else torch.add(moved, offset, alpha=node._saved_beta)]  # a product is never spread


def _bmm(node: Any, tangents: Tangents) -> list[Tensor | None]:
    left, right = tangents
    moved = None if left is None else left.bmm(node._saved_mat2)
    return [_plus(moved, None if right is None else node._saved_self.bmm(right))]


def _linear(node: Any, tangents: Tangents) -> list[Tensor | None]:
    value, weight, offset = tangents
    moved = None if value is None else torch.nn.functional.linear(value, node._saved_weight)
    if weight is not None:
        moved = _plus(moved, torch.nn.functional.linear(node._saved_input, weight))
    return [_whole(node, moved, offset)]


def _convolved(node: Any, tangents: Tangents) -> list[Tensor | None]:
    value, weight, offset = tangents
    padding, moved = [*node._saved_output_padding], None
    how = (None, node._saved_stride, node._saved_padding, node._saved_dilation)
    more = (node._saved_transposed, padding, node._saved_groups)
    if value is not None:
        moved = torch.convolution(value, node._saved_weight, *how, *more)
    if weight is not None:
        moved = _plus(moved, torch.convolution(node._saved_input, weight, *how, *more))
    if offset is not None:
        offset = offset.reshape(-1, *[1] * (len(node._input_metadata[0].shape) - 2))
    return [_whole(node, moved, offset)]


def _prelu(node: Any, tangents: Tangents) -> list[Tensor | None]:
    """At zero, the derivative that torch has of this backward is another one than the backward itself."""
    value, slope = tangents
    at = node._saved_self
    moved = None if value is None else torch.where(at > 0, value, value * node._saved_weight)
    if slope is not None:
        moved = _plus(moved, torch.where(at > 0, 0.0, at) * slope)
    return [_whole(node, moved, None)]


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left.mm(right) if total is None else torch.addmm(total, left, right)  # in place it has no batching rule


def _plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return right if left is None else left if right is None else left.add_(right)


def _whole(node: Any, left: Tensor | None, right: Tensor | None, right_factor: float = 1) -> Tensor | None:
    """Return the sum of two parts of a tangent, either of which may still have to be broadcast to its shape."""
    meta = node._input_metadata[0]
    if left is None:
        moved = right if right is None or right_factor == 1 else right * right_factor
    else:
        moved = left if right is None else torch.add(left, right, alpha=right_factor)
    if moved is None:
        return None
    shape = tuple(meta.shape)
    moved = moved if moved.shape == shape else moved.expand(shape)
    return moved if moved.dtype == meta.dtype else moved.to(meta.dtype)


_WRITTEN_OUT: dict[str, Rule] = {
    "TBackward0": _turned,
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "SelectBackward0": selected,
    "CumsumBackward0": _accumulated,
    "LogSoftmaxBackward0": _log_softmax,
    "SumBackward0": _summed,
    "SumBackward1": _summed_along,
    "AddBackward0": _added,
    "SubBackward0": _subtracted,
    "MulBackward0": _multiplied,
    "DivBackward0": _divided,
    "MmBackward0": _mm,
    "AddmmBackward0": _addmm,
    "BmmBackward0": _bmm,
    "LinearBackward0": _linear,
    "ConvolutionBackward0": _convolved,
    "PreluKernelBackward0": _prelu,
}
