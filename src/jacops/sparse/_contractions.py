"""Rules for products of matrices and vectors and for convolutions, which mix entries along known axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._pool import Array
from ._taint import parts_of
from ._trace import Rule, TracedCall, Tracer, rank_of

_EXPANDED = 20_000_000  # 160 MB for each of three index arrays; larger products are followed one by one


def product(tracer: Tracer, left: Tensor, right: Tensor) -> Array:
    """Return ids of `left @ right` for (b, m, k) and (b, k, n)."""
    if not tracer.tracks(right):
        return _one_sided(tracer, tracer.array(left), tracer.nonzero(right))
    if not tracer.tracks(left):
        turned = tracer.nonzero(left)
        ids = tracer.array(right.transpose(1, 2))
        return _one_sided(tracer, ids, None if turned is None else turned.transpose(0, 2, 1)).transpose(0, 2, 1)
    rows = _one_sided(tracer, tracer.array(left), None)
    columns = _one_sided(tracer, tracer.array(right.transpose(1, 2)), None).transpose(0, 2, 1)
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return tracer.union([rows, columns], shape)


def _one_sided(tracer: Tracer, ids: Array, nonzero: NDArray[np.bool_] | None) -> Array:
    """Return ids (b, m, n), or (b, m, 1) where all columns agree, of `left @ right` with a constant right."""
    b, m, k = ids.shape
    if nonzero is None:
        return tracer.along(ids, [2])
    n = nonzero.shape[2]
    if b > 1 and b * m * n * k <= _EXPANDED:
        each = np.broadcast_to(ids[:, :, None, :], (b, m, n, k))
        taken = np.broadcast_to(nonzero.transpose(0, 2, 1)[:, None], (b, m, n, k)) & (each != 0)
        groups = np.broadcast_to(np.arange(b * m * n).reshape(b, m, n, 1), (b, m, n, k))
        return tracer.group(groups[taken], each[taken], b * m * n).reshape(b, m, n)
    return np.stack([_masked(tracer, ids[i], nonzero[i]) for i in range(b)])


def _masked(tracer: Tracer, ids: Array, nonzero: NDArray[np.bool_]) -> Array:
    """Return ids of one product; equal rows of ids and equal columns of the mask are worked out once."""
    masks, mask_of = np.unique(nonzero.T, axis=0, return_inverse=True)
    rows, row_of = np.unique(ids, axis=0, return_inverse=True)
    mask, column = np.nonzero(masks)
    groups = np.arange(len(rows))[:, None] * len(masks) + mask[None, :]
    done = tracer.group(groups, rows[:, column], len(rows) * len(masks)).reshape(len(rows), len(masks))
    return done[row_of.ravel()][:, mask_of.ravel()]


def _product(tracer: Tracer, call: TracedCall) -> Any:
    """Follow `left @ right` of vectors, matrices or batches of them, and what it is added to."""
    is_sum = call.base in ("addmm", "addmv", "baddbmm")
    left, right = call.args[is_sum : is_sum + 2]
    ids = [tracer.ids(call.args[0]).numpy()] if is_sum else []
    if left.layout is not torch.strided:
        ids.append(_sparse_product(tracer, left, right))
    elif right.layout is not torch.strided:
        ids.append(_sparse_product(tracer, right.t(), left.t()).T)
    elif tracer.tracks(left) or tracer.tracks(right):
        wide = right[:, None] if right.ndim == 1 else right
        found = product(tracer, left[(None,) * (3 - left.ndim)], wide[(None,) * (3 - wide.ndim)])
        found = found[..., 0] if right.ndim == 1 else found
        ids.append(found[(0,) * (3 - left.ndim)])
    return tracer.union(ids, call.outs[0].shape)


def _sparse_product(tracer: Tracer, matrix: Tensor, right: Tensor) -> Array:
    """Return ids of the product of a sparse matrix, whose pattern counts, and a strided vector or matrix."""
    tracer.places_rest_on(parts_of(matrix)[:-1])
    if right.layout is not torch.strided:
        raise NotImplementedError
    coo = matrix.detach().to_sparse_coo()
    rows, columns = coo._indices().cpu().numpy()
    ids = tracer.array(right).reshape(right.shape[0], -1)
    many = ids.shape[1]
    groups = rows[:, None] * many + np.arange(many)
    found = tracer.group(groups, ids[columns], matrix.shape[0] * many)
    return found.reshape(matrix.shape[0], *right.shape[1:])


# ---- convolutions ----------------------------------------------------------------------------------------------


def _windows(
    large: Sequence[int], kernel: Sequence[int], small: Sequence[int], named: dict[str, Any]
) -> tuple[Array, Array]:
    """Return the entries of the larger side for each entry of the smaller side: flat places of both, in pairs."""
    stride, padding, dilation = (_each(named[k], len(large)) for k in ("stride", "padding", "dilation"))
    wide = narrow = np.zeros(1, np.int64)
    for d in range(len(large)):
        seen = np.arange(small[d])[:, None] * stride[d] - padding[d] + np.arange(kernel[d])[None] * dilation[d]
        place, tap = np.nonzero((seen >= 0) & (seen < large[d]))
        narrow = (narrow[:, None] * small[d] + place[None]).ravel()
        wide = (wide[:, None] * large[d] + seen[place, tap][None]).ravel()
    return wide, narrow


def _convolved(x: Tensor, weight: Tensor, out: Tensor, named: dict[str, Any]) -> tuple[Array, Array]:
    """Return the flat places of input and output of a convolution that reach each other, in pairs."""
    kernel, space, seen = weight.shape[2:], out.shape[2:], x.shape[2:]
    if named["transposed"]:
        places, given = _windows(space, kernel, seen, named)
        return given, places
    return _windows(seen, kernel, space, named)


def _each(value: Sequence[int] | int, rank: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * rank if len(value) == 1 else value


def _through(tracer: Tracer, ids: Array, groups: int, take: Array, give: Array, count: int) -> Array:
    """Return (N, groups, count) from ids (N, C, S): channels of a group united, then moved from `take` to `give`."""
    many, channels, size = ids.shape
    united = tracer.along(ids.reshape(many, groups, channels // groups, size), [2]).reshape(-1, size)
    place = np.arange(many * groups)[:, None] * count + give[None]
    return tracer.group(place, united[:, take], many * groups * count).reshape(many, groups, count)


def _flat(array: Array) -> Array:
    return array.reshape(*array.shape[:2], -1)


def _convolution(tracer: Tracer, call: TracedCall) -> Any:
    named, out = call.named, call.outs[0]
    x, weight, bias, groups = named["input"], named["weight"], named["bias"], named["groups"]
    space, parts = out.shape[2:], []
    if tracer.tracks(x):
        take, give = _convolved(x, weight, out, named)
        ids = _through(tracer, _flat(tracer.array(x)), groups, take, give, math.prod(space))
        parts.append(np.repeat(ids, out.shape[1] // groups, axis=1).reshape(tuple(out.shape)))
    if tracer.tracks(weight):
        if named["transposed"]:
            parts.append(np.full((1,) * out.ndim, tracer.pool.union(tracer.array(weight))))
        else:
            parts.append(tracer.along(tracer.array(weight), range(1, weight.ndim)).reshape(1, -1, *[1] * len(space)))
    if isinstance(bias, Tensor) and tracer.tracks(bias):
        parts.append(tracer.array(bias).reshape(1, -1, *[1] * len(space)))
    return tracer.union(parts, out.shape)


def _convolution_backward(tracer: Tracer, call: TracedCall) -> Any:
    named = call.named
    grad, x, weight, groups = (named[k] for k in ("grad_output", "input", "weight", "groups"))
    mask = named["output_mask"]
    if tracer.tracks(x) or tracer.tracks(weight):
        return tracer.everything(call)
    ids = tracer.array(grad)
    per_channel = tracer.along(ids, [0, *range(2, ids.ndim)]).ravel()
    found: list[Any] = []
    if mask[0]:
        give, take = _convolved(x, weight, grad, named)
        back = _through(tracer, _flat(ids), groups, take, give, math.prod(x.shape[2:]))
        found.append(np.repeat(back, x.shape[1] // groups, axis=1).reshape(tuple(x.shape)))
    if mask[1]:
        if named["transposed"]:
            per_group = tracer.group(np.arange(len(per_channel)) // (len(per_channel) // groups), per_channel, groups)
            own = np.repeat(per_group, weight.shape[0] // groups)
        else:
            own = per_channel
        found.append(own.reshape(-1, *[1] * (weight.ndim - 1)))
    if mask[2]:
        found.append(per_channel)
    return found


def _pooled(tracer: Tracer, call: TracedCall) -> Any:
    """Follow an average over windows, forwards or backwards."""
    named, out = call.named, call.outs[0]
    backward = call.base.endswith("_backward")
    large, small = (named["self"], named["grad_output"]) if backward else (named["self"], out)
    given = small if backward else large
    rank = rank_of(call)
    kernel = _each(named["kernel_size"], rank)
    shape = {"stride": named["stride"] or kernel, "padding": named["padding"], "dilation": 1}
    take, give = _windows(large.shape[-rank:], kernel, small.shape[-rank:], shape)
    take, give = (give, take) if backward else (take, give)
    ids = tracer.array(given)
    ids = ids.reshape(1, -1, math.prod(given.shape[-rank:]))
    moved = _through(tracer, ids, ids.shape[1], take, give, math.prod(out.shape[-rank:]))
    return moved.reshape(tuple(out.shape))


def _crossed(tracer: Tracer, call: TracedCall) -> Any:
    """Follow a cross product, whose entries take the two others of both operands."""
    named, shape = call.named, tuple(call.outs[0].shape)
    given = [np.broadcast_to(tracer.array(t), shape) for t in (named["self"], named["other"]) if tracer.tracks(t)]
    found = tracer.union([np.roll(ids, -shift, named["dim"]) for ids in given for shift in (1, 2)], shape)
    return tracer.of_shadows([torch.from_numpy(np.array(found))], call.outs)


_PRODUCTS = ["mm", "bmm", "mv", "dot", "vdot", "addmm", "addmv", "baddbmm"]
CONTRACTIONS: dict[str, Rule] = {
    **dict.fromkeys(_PRODUCTS, _product),
    "linalg_cross": _crossed,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "avg_pool2d": _pooled,
    "avg_pool3d": _pooled,
    "avg_pool2d_backward": _pooled,
    "avg_pool3d_backward": _pooled,
}
