"""Operations that move entries by indices made of data: each index stands for all that it could be.

A pattern takes the routes of its point. Whether samples mix must not depend on the point, so along the axes that such
an index points into, everything may come from or go anywhere; the other axes are followed as usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._pool import Array
from ._trace import Rule, TracedCall, Tracer

aten: Any = torch.ops.aten
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


def any_route(tracer: Tracer, call: TracedCall) -> Rule | None:
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
    everything = tracer.everything(call)
    return [everything for _ in call.outs]


def spread(tracer: Tracer, ids: Array, axes: Iterable[int]) -> Array:
    """Return the union along axes, in every place."""
    axes = {axis % max(ids.ndim, 1) for axis in axes}
    kept = [1 if i in axes else size for i, size in enumerate(ids.shape)]
    groups = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), ids.shape)
    return np.broadcast_to(tracer.group(groups, ids, math.prod(kept)).reshape(kept), ids.shape)


def _open_axes(tracer: Tracer, indices: Iterable[Any]) -> list[int]:
    """Return the axes that the indices made of data of `x[indices]` point into."""
    axes, axis = [], 0
    for index in indices:
        width = index.ndim if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None and tracer.is_open(index):
            axes += range(axis, axis + width)
        axis += width
    return axes


def _taken(tracer: Tracer, call: TracedCall) -> Any:
    """Follow entries that are taken from anywhere along an axis."""
    named, out = call.named, call.outs[0]
    source = named["weight"] if call.base == "embedding" else named["self"]
    axes = _open_axes(tracer, named["indices"]) if "index" in call.base and "indices" in named else [_axis(call)]
    places = torch.from_numpy(spread(tracer, tracer.array(source), axes).copy())
    if call.base == "embedding":
        return places[named["indices"].cpu()]
    if call.base == "gather":
        return places.gather(named["dim"], named["index"].cpu())
    if call.base == "index_select":
        return places.index_select(named["dim"], named["index"].cpu())
    return aten.index(places, [None if i is None else i.cpu() for i in named["indices"]]).reshape(out.shape)


def _axis(call: TracedCall) -> int:
    return call.named.get("dim", 0)


def _put(tracer: Tracer, call: TracedCall) -> Any:
    """Follow entries that are written or added anywhere along an axis, to what was there."""
    named, out = call.named, call.outs[0]
    places = torch.arange(out.numel()).reshape(out.shape)
    if "embedding" in call.base:
        axes, given, target = [0], tracer.ids(named["grad_output"]), places[named["indices"].cpu()]
    elif "index_put" in call.base:
        axes, given = _open_axes(tracer, named["indices"]), tracer.ids(named["values"])
        target = aten.index(places, [None if i is None else i.cpu() for i in named["indices"]])
    else:
        axes, index = [named["dim"]], named["index"].cpu()
        source = named.get("src", named.get("source"))
        given = tracer.ids(source) if isinstance(source, Tensor) else torch.zeros((), dtype=torch.int64)
        target = places.gather(named["dim"], index) if "scatter" in call.base else places.index_select(axes[0], index)
        if "scatter" in call.base and given.ndim:
            given = given[tuple(slice(0, size) for size in index.shape)]
    added = tracer.group(target.numpy(), given.expand(target.shape).numpy(), out.numel()).reshape(tuple(out.shape))
    there = named.get("self")
    parts = [spread(tracer, added, axes)] + ([tracer.array(there)] if isinstance(there, Tensor) else [])
    return tracer.union(parts, out.shape)


def _pooled(tracer: Tracer, call: TracedCall) -> Any:
    """Follow the largest of a window, which may be any: forwards or backwards, within each plane."""
    rank = 3 if "3d" in call.base else 2
    given = call.args[0]
    planes = spread(tracer, tracer.array(given), range(given.ndim - rank, given.ndim))
    one = planes[(..., *[slice(0, 1)] * rank)]
    return [one if out.is_floating_point() else 0 for out in call.outs]
