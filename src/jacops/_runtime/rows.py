"""Rows: `k` vectors at once as `(k, *shape)`, and the few things done with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .agreement import SQUARES, as_rows
from .side_effects import storage_of

Rows = list[Tensor]


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor without its subclass: derivatives of LieTensors are plain numbers."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def owned(result: Tensor, taken: set[int]) -> Tensor:
    """Return a result in memory of its own, and add that to what is taken.

    Torch passes a cotangent on as the gradient, to several leaves too, where an operation does nothing to it. A caller
    who writes into a result would write into the vector that was given, or into another result.
    """
    if storage_of(result) in taken:
        result = result.clone()
    taken.add(storage_of(result))
    return result


def dense(grad: Tensor | None) -> Tensor | None:
    """Return a gradient in dense layout (embeddings may give sparse ones)."""
    return grad.to_dense() if grad is not None and grad.layout is not torch.strided else grad


def rows_size(rows: Tensor) -> Tensor:
    """Return the norms of rows `(k, …)` as `(k,)` in float64."""
    flat, quick = as_rows(plain(rows.detach())), quick_size(rows)
    doubtful = is_doubtful(quick)
    norms = quick.to(torch.float64)
    if not bool(doubtful.any()) or not flat.shape[1]:
        return norms
    largest = torch.linalg.vector_norm(flat, math.inf, dim=1).to(torch.float64)
    doubtful &= (largest > 0) & (largest < math.inf)
    if bool(doubtful.any()):  # a copy, only where squares overflow or underflow
        wide = torch.complex128 if flat.is_complex() else torch.float64
        scale = largest[doubtful]
        norms[doubtful] = scale * torch.linalg.vector_norm(flat[doubtful].to(wide) / scale.unsqueeze(1), dim=1)
    return norms


def quick_size(rows: Tensor) -> Tensor:
    """Return the norms of rows `(k, …)` as `(k,)`, by squares that may overflow or underflow."""
    flat = as_rows(plain(rows.detach()))
    return torch.linalg.vector_norm(flat.to(torch.promote_types(flat.dtype, torch.float32)), dim=1)


def is_doubtful(quick: Tensor) -> Tensor:
    """Return which norms by squares may have overflowed or underflowed."""
    return ~((quick > SQUARES) & (quick < 1 / SQUARES))


def cut_length(tensors: Sequence[Tensor]) -> int:
    """Return the length of a vector that torch cuts into cotangents of all these tensors; 0 where it cannot."""
    dtype = tensors[0].dtype if tensors else None
    sizes = [t.numel() if type(t) is Tensor and t.dtype is dtype and t.requires_grad else 0 for t in tensors]
    return 0 if 0 in sizes else sum(sizes)


def stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    """Return gradients of several passes as rows, zeros where a pass gave none; those of one pass are not copied."""
    like = next((g for g in grads if g is not None), None)
    if like is None:
        return None
    full = [torch.zeros_like(like) if g is None else plain(g) for g in grads]
    return full[0].unsqueeze(0) if len(full) == 1 else torch.stack(full)


def basis(like: Tensor, where: slice) -> Tensor:
    """Return unit vectors `(k, *like)` for the flat entries `where`."""
    many = where.stop - where.start
    rows = torch.zeros(many, like.numel(), dtype=like.dtype, device=like.device)
    rows[torch.arange(many), torch.arange(where.start, where.stop)] = 1
    return rows.reshape(many, *like.shape)


def mixed(weights: Tensor, rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.tensordot(weights.to(wide), rows.detach().to(wide), 1).to(rows.dtype)


def zero_rows(many: int, output: Tensor) -> Tensor:
    return torch.zeros(many, *output.shape, dtype=output.dtype, device=output.device)


def written(rows: Rows, out: Rows | None) -> Rows:
    """Return `rows`, copied into `out` where there is one."""
    if out is None:
        return rows
    for place, row in zip(out, rows, strict=True):
        place.copy_(row.detach())
    return out


def contracted(blocks: Rows, tangents: Sequence[Tensor], many: int) -> Tensor:
    """Return real inner products `(k, rows)` of each tangent with each row of gradients."""
    total = torch.zeros(
        many, 1, device=blocks[0].device if blocks else None, dtype=blocks[0].real.dtype if blocks else None
    )
    for rows, tangent in zip(blocks, tangents, strict=True):
        wide = torch.promote_types(rows.dtype, tangent.dtype)
        part = as_rows(plain(tangent)).to(wide) @ as_rows(rows).to(wide).conj().T
        total = total + part.real
    return total
