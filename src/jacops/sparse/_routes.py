"""Operations that move entries by indices made of data: each index may take any of its values.

A pattern takes the routes of its point. Whether samples mix must not depend on the point, so along the axes that such
an index points into, everything may come from or go anywhere; the other axes are followed as usual.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._pool import Array
from ._rules import move, rule_for
from ._scatters import scattered
from ._trace import Decomposed, Rule, TracedCall, Tracer, rank_of

_TAKE = {"gather", "index_select", "embedding", "index", "_unsafe_index"}
_PUT = {
    "index_put",
    "_index_put_impl",
    "_unsafe_index_put",
    "index_add",
    "index_copy",
    "scatter",
    "scatter_add",
    "embedding_dense_backward",
}
_WHEREVER = {"take", "put", "masked_select", "masked_scatter", "masked_scatter_backward", "repeat_interleave",
             "index_fill", "_unsafe_masked_index", "_unsafe_masked_index_put_accumulate"}  # fmt: skip


def rule_of(tracer: Tracer, call: TracedCall) -> Rule | Decomposed | None:
    """Return how an operation is followed; None where nothing is known about it."""
    found = _any_route(tracer, call) if tracer.takes_all_routes else tracer.note_indices(call)
    return found or rule_for(call.func, call.base)


def _any_route(tracer: Tracer, call: TracedCall) -> Rule | None:
    """Return a rule for an operation whose indices are made of data; None where they are not."""
    if not any(_is_route(tracer, t) for t in call.tensors):
        return None
    if call.base in _TAKE:
        return _taken
    if call.base in _PUT:
        return _put
    if "max_pool" in call.base:
        return _pooled
    return _anything if call.base in _WHEREVER else None


def _is_route(tracer: Tracer, tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return whole and not tracer.tracks(tensor) and tracer.is_open(tensor)


def _anything(tracer: Tracer, call: TracedCall) -> Any:
    return [tracer.everything(call)] * len(call.outs)


def _spread(tracer: Tracer, ids: Array, axes: Iterable[int]) -> Array:
    """Return the union along axes, in every place."""
    return np.broadcast_to(tracer.along(ids, axes), ids.shape)


def _pointed_into(tracer: Tracer, call: TracedCall) -> list[int]:
    """Return the axes that the indices made of data of an operation point into."""
    named = call.named
    if "embedding" in call.base or "indices" not in named:
        return [named.get("dim", 0)]
    axes, axis = [], 0
    for index in named["indices"]:
        width = index.ndim if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None and tracer.is_open(index):
            axes += range(axis, axis + width)
        axis += width
    return axes


def _taken(tracer: Tracer, call: TracedCall) -> Any:
    """Follow entries that are taken from anywhere along an axis."""
    named = call.named
    source = named["weight"] if call.base == "embedding" else named["self"]
    ids = _spread(tracer, tracer.array(source), _pointed_into(tracer, call))
    return move(tracer, call, {id(source): torch.from_numpy(ids.copy())})


def _put(tracer: Tracer, call: TracedCall) -> Any:
    """Follow entries that are written or added anywhere along an axis, to what was there."""
    there = call.named.get("self")
    parts = [_spread(tracer, scattered(tracer, call, left_out=there), _pointed_into(tracer, call))]
    return tracer.union([*parts, tracer.array(there)] if isinstance(there, Tensor) else parts, call.outs[0].shape)


def _pooled(tracer: Tracer, call: TracedCall) -> Any:
    """Follow the largest of a window, which may be any: forwards or backwards, within each plane."""
    rank, given = rank_of(call), call.args[0]
    planes = _spread(tracer, tracer.array(given), range(given.ndim - rank, given.ndim))
    one = planes[(..., *[slice(0, 1)] * rank)]
    return [one if out.is_floating_point() else 0 for out in call.outs]
