"""Rules for operations that add entries up at given places: the backwards of gathers, windows and paddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._trace import Rule, TracedCall, Tracer

aten: Any = torch.ops.aten
_PROBED = 2**24


def _places(like: Tensor) -> Tensor:
    return torch.arange(like.numel()).reshape(like.shape)


def _added(tracer: Tracer, base: Tensor | None, places: Tensor, ids: Tensor, out: Tensor) -> Any:
    """Return ids of `out`: those of `base`, and at each place those that were added there."""
    groups, given = places.reshape(-1).numpy(), ids.expand(places.shape).reshape(-1).numpy()
    if base is not None and tracer.tracks(base):
        groups = np.r_[np.arange(out.numel()), groups]
        given = np.r_[tracer.array(base).ravel(), given]
    return tracer.group(groups, given, out.numel()).reshape(tuple(out.shape))


def _index_put(tracer: Tracer, call: TracedCall) -> Any:
    named, out = call.named, call.outs[0]
    places = aten.index(_places(out), [None if i is None else i.cpu() for i in named["indices"]])
    ids = tracer.ids(named["values"]).expand(places.shape)
    if named["accumulate"]:
        return _added(tracer, named["self"], places, ids, out)
    whole = tracer.ids(named["self"]).clone().reshape(-1)
    whole[places.reshape(-1)] = ids.reshape(-1)
    return whole.reshape(out.shape)


def _index_add(tracer: Tracer, call: TracedCall) -> Any:
    named, out = call.named, call.outs[0]
    places = _places(out).index_select(named["dim"], named["index"].cpu())
    return _added(tracer, named["self"], places, tracer.ids(named["source"]), out)


def _scatter_add(tracer: Tracer, call: TracedCall) -> Any:
    named, out = call.named, call.outs[0]
    index = named["index"].cpu()
    places = _places(out).gather(named["dim"], index)
    ids = tracer.ids(named["src"])[tuple(slice(0, size) for size in index.shape)]
    return _added(tracer, named["self"], places, ids, out)


def _put(tracer: Tracer, call: TracedCall) -> Any:
    named, out = call.named, call.outs[0]
    places = _places(out).take(named["index"].cpu())
    return _added(tracer, named["self"], places, tracer.ids(named["source"]), out)


def _embedding_backward(tracer: Tracer, call: TracedCall) -> Any:
    out = call.outs[0]
    grad, indices = call.args[:2]
    return _added(tracer, None, _places(out)[indices.cpu()], tracer.ids(grad), out)


def _max_pool(tracer: Tracer, call: TracedCall) -> Any:
    """Take the route of the largest entry, as the operation did."""
    x, out, indices = call.tensors[0], call.outs[0], call.outs[1]
    rank = _rank(call)
    ids = tracer.ids(x).flatten(-rank)
    return [ids.gather(-1, indices.cpu().flatten(-rank)).reshape(out.shape), None]


def _max_pool_backward(tracer: Tracer, call: TracedCall) -> Any:
    out, rank = call.outs[0], _rank(call)
    grad, indices = call.args[0], call.named["indices"].cpu()
    places = _places(out).flatten(-rank).gather(-1, indices.flatten(-rank)).reshape(indices.shape)
    return _added(tracer, None, places, tracer.ids(grad), out)


def _rank(call: TracedCall) -> int:
    return 3 if "3d" in call.base else 2


def _unfold_backward(tracer: Tracer, call: TracedCall) -> Any:
    named, out = call.named, call.outs[0]
    places = _places(out).unfold(named["dim"], named["size"], named["step"])
    return _added(tracer, None, places, tracer.ids(named["grad_in"]), out)


def _window_backward(tracer: Tracer, call: TracedCall) -> Any:
    """Add columns up where windows overlap."""
    named, out = call.named, call.outs[0]
    where = _places(out).double()
    shape = [named[k] for k in ("kernel_size", "dilation", "padding", "stride")]
    places = aten.im2col(where + 1, *shape).long() - 1
    ids = tracer.ids(named["self"])
    held = places >= 0
    return _added(tracer, None, places[held], ids[held], out)


def _padding_backward(tracer: Tracer, call: TracedCall) -> Any:
    grad, x, padding = call.args[:3]
    forward = getattr(aten, call.base.removesuffix("_backward"))
    places = forward(_places(x).double(), padding).long()
    return _added(tracer, None, places, tracer.ids(grad), call.outs[0])


def _nearest_backward(tracer: Tracer, call: TracedCall) -> Any:
    named, out = call.named, call.outs[0]
    forward = getattr(aten, call.base.removesuffix("_backward"))
    scales = [v for k, v in named.items() if k.startswith("scale")]
    places = forward(_places(out).double(), named["output_size"], *scales).long()
    return _added(tracer, None, places, tracer.ids(named["grad_output"]), out)


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
    groups = np.arange(len(ids))[:, None] * result.numel() + target
    return tracer.group(groups, ids[:, source], out.numel()).reshape(tuple(out.shape))


SCATTERS: dict[str, Rule] = {
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "_unsafe_index_put": _index_put,
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "put": _put,
    "embedding_dense_backward": _embedding_backward,
    "unfold_backward": _unfold_backward,
    "col2im": _window_backward,
}
SCATTERS |= dict.fromkeys(
    ["max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"], _max_pool
)
SCATTERS |= dict.fromkeys(
    [
        "max_pool2d_with_indices_backward",
        "max_pool3d_with_indices_backward",
        "adaptive_max_pool2d_backward",
        "adaptive_max_pool3d_backward",
        "fractional_max_pool2d_backward",
        "fractional_max_pool3d_backward",
    ],
    _max_pool_backward,
)
SCATTERS |= {f"{kind}_pad{d}d_backward": _padding_backward for kind in ("reflection", "replication") for d in (1, 2, 3)}
SCATTERS |= {
    f"{kind}{d}d_backward": _nearest_backward
    for kind in ("upsample_nearest", "_upsample_nearest_exact")
    for d in (1, 2, 3)
}
SCATTERS |= dict.fromkeys(
    [
        f"{kind}{way}"
        for kind in (
            "upsample_linear1d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "upsample_trilinear3d",
            "_upsample_bilinear2d_aa",
            "_upsample_bicubic2d_aa",
            "_adaptive_avg_pool2d",
            "_adaptive_avg_pool3d",
        )
        for way in ("", "_backward")
    ],
    _resampled,
)
