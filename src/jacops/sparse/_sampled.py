"""Rules for the backwards of operations that read entries at places: grids, bags of embeddings, distances of rows."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._pool import Array
from ._trace import Rule, TracedCall, Tracer

_NEAREST, _BICUBIC, _MAX = 1, 2, 2  # torch's numbers of modes; bilinear, sum and mean need none
_ZEROS, _REFLECTION = 0, 2  # of paddings; 1 is the border
_ROUNDINGS = 8  # of a coordinate in pixels, that kernels may differ by


def _only_grad(tracer: Tracer, grad: Tensor, others: list[Tensor]) -> None:
    """Leave a backward that is itself differentiated to the rule for unknown operations."""
    if not tracer.tracks(grad) or any(tracer.tracks(t) for t in others):
        raise NotImplementedError


# ---- grids -----------------------------------------------------------------------------------------------------


def _padded(at: Tensor, size: int, padding: int, align: bool) -> Tensor:
    """Return coordinates in pixels as paddings move them."""
    if padding == _REFLECTION:
        low, span = (0.0, size - 1.0) if align else (-0.5, float(size))
        if not span:
            return torch.zeros_like(at)
        at = (at - low).abs() % (2 * span)
        at = torch.minimum(at, 2 * span - at) + low
    return at if padding == _ZEROS else at.clamp(0, size - 1)


def _read_along(x: Tensor, size: int, mode: int, padding: int, align: bool) -> Tensor:
    """Return the pixels along one axis that may be read at each coordinate in [-1, 1], as (k, *); others are -1.

    Where rounding may decide which pixels are read, those of both sides are given.
    """
    x = x.detach().cpu()
    slack = _ROUNDINGS * torch.finfo(x.dtype).eps * (1 + x.abs().double()) * size
    x = x.double()
    at = (x + 1) / 2 * (size - 1) if align else ((x + 1) * size - 1) / 2
    sides = torch.stack([at - slack, at + slack])
    if mode == _BICUBIC:
        steps = torch.arange(-1, 3).reshape(-1, *[1] * sides.ndim)
        found = _padded(sides.floor() + steps, size, padding, align).round().flatten(0, 1)
    else:
        sides = _padded(sides, size, padding, align)  # at a border exact again, where the pixel beside it has no weight
        found = sides.round() if mode == _NEAREST else torch.cat([sides.floor(), sides.ceil()])
    inside = (found >= 0) & (found <= size - 1)  # NaN is outside, where kernels read nothing that is finite
    return torch.where(inside, found, -1.0).long()


def _grid_backward(tracer: Tracer, call: TracedCall) -> Any:
    named = call.named
    grad = named["grad_output"]
    _only_grad(tracer, grad, [named["input"], named["grid"]])
    ids = tracer.array(grad)
    return [_to_image(tracer, call, ids) if k == 0 else _to_grid(tracer, ids) for k in call.places]


def _to_grid(tracer: Tracer, ids: Array) -> Array:
    return np.moveaxis(tracer.along(ids, [1]), 1, -1)


def _to_image(tracer: Tracer, call: TracedCall, ids: Array) -> Array:
    named, image = call.named, call.named["input"]
    tracer.places_rest_on([named["grid"]])
    space = image.shape[2:]
    how = named["interpolation_mode"], named["padding_mode"], named["align_corners"]
    # The last axis of a grid names the axes of the image from the last one on.
    along = [_read_along(named["grid"][..., -1 - i], n, *how).flatten(2).numpy() for i, n in enumerate(space)]
    return _to_pixels(tracer, ids.reshape(*ids.shape[:2], -1), along, tuple(space)).reshape(tuple(image.shape))


def _to_pixels(tracer: Tracer, ids: Array, along: list[Array], space: tuple[int, ...]) -> Array:
    """Return ids of an image's pixels from those of samples (N, C, P) and the pixels that they read on each axis."""
    many, channels, _ = ids.shape
    maps = np.arange(many * channels).reshape(many, channels, 1) * math.prod(space)
    total = np.zeros(many * channels * math.prod(space), np.int64)
    for reads in product(*along):
        held = np.logical_and.reduce([read >= 0 for read in reads])
        flat = np.asarray(np.ravel_multi_index([np.maximum(read, 0) for read in reads], space))
        taken = np.where(held[:, None], ids, 0)
        part = tracer.group(maps + flat[:, None], taken, len(total))
        total = tracer.pool.union_pairs(total, part)
    return total


# ---- bags ------------------------------------------------------------------------------------------------------


def _bags(named: dict[str, Any]) -> Array:
    """Return the bag that each index is in."""
    bag_of, many = named["offset2bag"], named["indices"].numel()
    if bag_of.numel() != many:  # some kernels leave it out
        ends = named["offsets"].contiguous()
        bag_of = torch.searchsorted(ends, torch.arange(many, dtype=ends.dtype, device=ends.device), right=True) - 1
    return bag_of.cpu().numpy()


def _bag_backward(tracer: Tracer, call: TracedCall) -> Any:
    named = call.named
    grad, indices, weights = named["grad"], named["indices"], named["per_sample_weights"]
    _only_grad(tracer, grad, [weights] if isinstance(weights, Tensor) else [])
    ids = tracer.array(grad)
    width = ids.shape[1]
    if named["mode"] == _MAX:
        rows, taken = named["maximum_indices"].cpu().numpy(), ids
    else:
        rows = indices.cpu().numpy()
        rows, taken = np.where(rows == named["padding_idx"], -1, rows)[:, None], ids[_bags(named)]
    places = np.where(rows >= 0, rows * width + np.arange(width), 0)
    count = named["num_weights"] * width
    return tracer.group(places, np.where(rows >= 0, taken, 0), count).reshape(-1, width)


def _bag_weights_backward(tracer: Tracer, call: TracedCall) -> Any:
    named = call.named
    _only_grad(tracer, named["grad"], [named["weight"]])
    found = tracer.along(tracer.array(named["grad"]), [1])[_bags(named), 0]
    return np.where(named["indices"].cpu().numpy() == named["padding_idx"], 0, found)


# ---- distances -------------------------------------------------------------------------------------------------


def _distances_backward(tracer: Tracer, call: TracedCall) -> Any:
    """Give each row the sets of its distances to all others."""
    grad, *others = call.tensors  # two points and their distances; torch 2.14 has other names for them
    _only_grad(tracer, grad, others)
    return tracer.along(tracer.array(grad), [-1])


def _pairs_backward(tracer: Tracer, call: TracedCall) -> Any:
    """Give each row the sets of its distances to all other rows of one tensor."""
    grad, *others = call.tensors  # points and their distances
    _only_grad(tracer, grad, others)
    ids, many = tracer.array(grad), len(others[0])
    return tracer.group(np.concatenate(np.triu_indices(many, 1)), np.tile(ids, 2), many)[:, None]


SAMPLED: dict[str, Rule] = {
    "grid_sampler_2d_backward": _grid_backward,
    "grid_sampler_3d_backward": _grid_backward,
    "_embedding_bag_backward": _bag_backward,
    "_embedding_bag_dense_backward": _bag_backward,
    "_embedding_bag_per_sample_weights_backward": _bag_weights_backward,
    "_cdist_backward": _distances_backward,
    "_pdist_backward": _pairs_backward,
}
