"""Rules for operations that add entries up at given places: the backwards of gathers, windows and paddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._runtime.contexts import arithmetic
from .._runtime.restoring import Guard, restoring
from ._pool import Array
from ._trace import Rule, TracedCall, Tracer, rank_of

_PROBED = 2**24  # products of entries given and returned that unit vectors are sent for; in float64 that is 128 MB


class _Recording(Guard):
    """A context in which operations are recorded on the CPU: inside a dispatch mode they are not, by torch's keys."""

    def save(self) -> None:
        """Make the guard from the keys as they are."""
        kind, some = torch._C.DispatchKey, torch._C.DispatchKeySet
        hidden = some(kind.AutogradCPU) | some(kind.AutogradOther) | some(kind.AutogradFunctionality)
        hidden = hidden | some(kind.AutogradNestedTensor) | some(kind.ADInplaceOrView)
        include = torch._C._dispatch_tls_local_include_set() | some(kind.ADInplaceOrView)
        self._keys = torch._C._ForceDispatchKeyGuard(include, torch._C._dispatch_tls_local_exclude_set() - hidden)

    def change(self) -> None:
        """Set the keys."""
        self._keys.__enter__()

    def restore(self) -> None:
        """Set them back."""
        self._keys.__exit__(None, None, None)


@restoring
def scattered(tracer: Tracer, call: TracedCall, left_out: Any = None) -> Array:
    """Follow entries each of which adds to one entry of the result, by the transpose of the operation.

    Of the numbers of its result the transpose gives for each entry the number where that entry goes, times a factor; of
    ones it gives the factor, which is zero for entries that go nowhere.

    Args:
        tracer: Where sets are kept.
        call: The operation.
        left_out: An operand that is not followed.
    """
    shape, followed, leaves = call.outs[0].shape, [], []

    def given(value: Any) -> Any:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value.cpu() if isinstance(value, Tensor) else value
        leaf = value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64)
        if tracer.tracks(value) and value is not left_out:
            followed.append(value)
            leaves.append(leaf.requires_grad_())
        return leaf.clone()  # it may be written into

    if not any(tracer.tracks(t) and t is not left_out for t in call.tensors):
        return tracer.union([], shape)
    with _Recording(), arithmetic(True):
        out = call.func(*tree_map(given, call.args), **tree_map(given, call.kwargs))
        numbers = torch.arange(1, shape.numel() + 1).reshape(shape).to(out.dtype)
        sent = [
            torch.autograd.grad(out, leaves, seed, retain_graph=True, materialize_grads=True)
            for seed in (numbers, torch.ones_like(numbers))
        ]
    total = tracer.union([], shape)
    for value, number, factor in zip(followed, *sent, strict=True):
        held = factor != 0
        places = (number[held] / factor[held]).real.round().long() - 1
        moved = tracer.group(places.numpy(), tracer.ids(value)[held].numpy(), shape.numel())
        total = tracer.union([total, moved.reshape(shape)], shape)
    return total


def _max_pool(tracer: Tracer, call: TracedCall) -> Any:
    """Take the route of the largest entry, as the operation did."""
    x, out, indices = call.tensors[0], call.outs[0], call.outs[1]
    rank = rank_of(call)
    ids = tracer.ids(x).flatten(-rank)
    return [ids.gather(-1, indices.cpu().flatten(-rank)).reshape(out.shape), None]


def _resampled(tracer: Tracer, call: TracedCall) -> Any:
    """Follow a fixed linear map of each channel by itself: running it on unit vectors shows what reaches what."""
    given, out = call.tensors[0], call.outs[0]
    space, result = given.shape[2:], out.shape[2:] if out.ndim == given.ndim else ()
    many = space.numel()
    if not result or many * result.numel() > _PROBED:
        raise NotImplementedError
    unit = torch.eye(many, dtype=torch.float64).reshape(1, many, *space)
    args: list[Any] = [unit, *call.args[1:]]
    for i, value in enumerate(args[1:], 1):
        if isinstance(value, Tensor):
            args[i] = unit.new_zeros(1, many, *result)
        elif isinstance(value, list | tuple) and len(value) == given.ndim:
            args[i] = [1, many, *value[2:]]
    source, target = call.func(*args, **call.kwargs).reshape(many, -1).nonzero().T.numpy()
    ids = tracer.array(given).reshape(-1, many)
    groups = torch.arange(len(ids)).numpy()[:, None] * result.numel() + target
    return tracer.group(groups, ids[:, source], out.numel()).reshape(tuple(out.shape))


# fmt: off
_SCATTERED = [
    "index_put", "_index_put_impl", "_unsafe_index_put", "index_add", "scatter_add", "put", "embedding_dense_backward",
    "unfold_backward", "col2im", "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    *(f"{kind}_pad{d}d_backward" for kind in ("reflection", "replication") for d in (1, 2, 3)),
    *(f"{kind}{d}d_backward" for kind in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)),
]
_POOLED = ["max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"]
_RESAMPLED = [
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
]
# fmt: on
SCATTERS: dict[str, Rule] = {
    **dict.fromkeys(_SCATTERED, scattered),
    **dict.fromkeys(_POOLED, _max_pool),
    **dict.fromkeys([*_RESAMPLED, *(f"{name}_backward" for name in _RESAMPLED)], _resampled),
}
