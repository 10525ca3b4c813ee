"""Blocks of a curvature matrix from what sweeps found at the outputs of layers.

With `K[n, e, f]` the second derivative by entry e of one layer's output and f of another's, and `a`, `b` the layers'
operands, the block of their weights is the sum over samples of `K ⊗ a ⊗ b`, plus `g ⊗ delta ⊗ a` where the later
operand moves with the earlier output (`g`, its derivative) under the loss's cotangent `delta`. One product of matrices
over the samples gives each; the result is added to a view of the whole matrix.

Matrices are filled by halves: what is written here is X, and the curvature is X + Xᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .sites import LayerOutput, ParameterBlock

ENTRIES = 2**22  # 16 MiB in float32, what was best to keep at work in a processor's caches
"""Numbers that an array on the way to a matrix may hold, where memory is no matter."""

# Inputs of an earlier layer from which both terms of a block are added up before the product: a term of its own takes
# two operations for each of them, adding it up the time of some 25.
_JOINED = 32

# Sides of tiles, least and most: of a 2,048 matrix, 256 took 13 ms, 64 20, 1,024 34, whole 43 (transposes miss caches);
# of 4,810 rows 512 take 19 ms and 1,024 34.
_TILES = 256, 512


@dataclass(frozen=True)
class Chunk:
    """Entries of a site's output that one round of sweeps was about.

    Attributes:
        positions: Which positions.
        channels: Which channels.
        most: Numbers that an array on the way may hold.
    """

    positions: slice
    channels: slice
    most: int = ENTRIES


@dataclass(frozen=True)
class Found:
    """What the sweeps of a chunk found at a later site.

    Attributes:
        second: `(n, positions, channels of the chunk, positions, channels of the site)`: K above.
        moved: For a use whose operand moves, by identity: how, `(n, positions, channels of the chunk, *operand)`.
        delta: The loss's cotangent there, `(n, positions, channels)`, if anything moved.
    """

    second: Tensor
    moved: dict[int, Tensor]
    delta: Tensor | None = None


@dataclass(frozen=True)
class _Rows:
    """One panel's rows of a block: `values (samples, rows, *shape)`, times an operand `(samples, inputs)` or ones."""

    panel: ParameterBlock
    where: slice | Tensor
    values: Tensor
    operand: Tensor | None = None


@dataclass(frozen=True)
class _Columns:
    """One panel's columns of a block.

    Attributes:
        panel: Which.
        values: `(n, positions, channels of the chunk, *shape)`.
        operand: What multiplies them sample by sample, `(n, inputs)`; None for ones.
        axes: Takes `(rows, *shape, row inputs, operand)` to `(rows, row inputs, channels, inputs)`.
        parts: How many of the panel's parts this is about.
    """

    panel: ParameterBlock
    values: Tensor
    operand: Tensor | None
    axes: tuple[int, int, int, int]
    parts: int | None = None


def add_blocks(
    matrix: Tensor, site: LayerOutput, chunk: Chunk, later: LayerOutput, found: Found, weight: float
) -> None:
    """Add to `matrix` the rows of a site's parameters that belong to a chunk, against those of a later site."""
    if later is site:
        _halve(found.second, chunk)
    for panel in later.panels:
        terms = _columns(panel, found)
        for layer_block in site.panels:
            pairs = [(rows, term) for term in terms if (rows := _rows(layer_block, chunk, term.values)) is not None]
            if len(pairs) == 2 and _joinable(pairs[0][0], panel):
                _add_joined(matrix, pairs[0], pairs[1], weight, chunk.most)
                continue
            for rows, columns in pairs:
                _add(matrix, rows, columns, weight, chunk.most)


def _halve(second: Tensor, chunk: Chunk) -> None:
    """Turn a site's K against itself, which is symmetric, into a part whose transpose is the rest; in place."""
    if second.shape[3] > 1:
        second.mul_(0.5)
        return
    start, stop = chunk.channels.start, chunk.channels.stop
    share = torch.ones(stop - start, second.shape[4], dtype=second.dtype, device=second.device).triu_(start)
    share[:, start:stop].diagonal().fill_(0.5)
    second[:, 0, :, 0].mul_(share)


def _columns(panel: ParameterBlock, found: Found) -> list[_Columns]:
    if panel.operand is None:
        return [_Columns(panel, by_entry(panel, found), None, (0, 2, 1, 3))]
    second, moved, delta = found.second, found.moved.get(id(panel.use)), found.delta
    second = second[..., panel.channels]
    if moved is not None and delta is not None:
        moved, delta = moved[..., panel.group, :], delta[..., panel.channels]
    if panel.site.positions > 1:  # gradients sample by sample
        values = torch.einsum("nabtj,nti->nabji", second, panel.operand)
        if moved is not None and delta is not None:
            values[..., : moved.shape[-1]] += torch.einsum("nabti,ntj->nabji", moved, delta)
        return [_Columns(panel, values, None, (0, 3, 1, 2))]
    result = [_Columns(panel, second[..., 0, :], panel.operand[:, 0], (0, 2, 1, 3))]
    if moved is not None and delta is not None:
        result.append(_Columns(panel, moved[..., 0, :], delta[:, 0], (0, 2, 3, 1), parts=1))
    return result


def by_entry(panel: ParameterBlock, found: Found) -> Tensor:
    """Return what was found for a panel of factors, `(n, positions, channels of the chunk, entries)`."""
    values, moved = found.second, found.moved.get(id(panel.use))
    if panel.factor is not None:
        values = values * panel.factor[:, None, None]
    if moved is not None and found.delta is not None:
        values = values + moved * found.delta[:, None, None]
    return panel.reduced(values)


def _rows(panel: ParameterBlock, chunk: Chunk, values: Tensor) -> _Rows | None:
    """Return the chunk's rows of a panel; None where the chunk is about other channels."""
    if panel.operand is None:
        return _summed(panel, chunk, values)
    low = max(chunk.channels.start, panel.channels.start)
    high = min(chunk.channels.stop, panel.channels.stop)
    if low >= high:
        return None
    held = values[:, :, low - chunk.channels.start : high - chunk.channels.start].flatten(0, 1)
    where = slice(low - panel.channels.start, high - panel.channels.start)
    return _Rows(panel, where, held, panel.operand[:, chunk.positions].flatten(0, 1))


def _summed(panel: ParameterBlock, chunk: Chunk, values: Tensor) -> _Rows:
    """Return the chunk's rows of a panel of factors, added up where they belong to one entry of the parameter."""
    if panel.factor is not None:
        factor = panel.factor[:, chunk.positions, chunk.channels]
        values = values * factor.reshape(*factor.shape, *[1] * (values.ndim - 3))
    index = panel.numbers[chunk.positions, chunk.channels].flatten()
    values = values.flatten(1, 2)
    entries, inverse = torch.unique(index, return_inverse=True)
    if not torch.equal(entries, index):
        summed = values.new_zeros(values.shape[0], len(entries), *values.shape[2:])
        values = summed.index_add_(1, inverse.to(values.device), values)
    start, stop = int(entries[0]), int(entries[-1]) + 1
    return _Rows(panel, slice(start, stop) if stop - start == len(entries) else entries, values)


def _add(matrix: Tensor, rows: _Rows, columns: _Columns, weight: float, most: int) -> None:
    left, values = rows.operand, rows.values
    right = _repeated(columns.operand, values.shape[0])
    # A panel times itself is symmetric, and K was cut to a triangle: columns before the rows hold zeros.
    own = rows.panel is columns.panel and right is not None
    for some, both, inner, packed in _pairs(left, right, values.shape[0], own, most // 2):
        # A quarter: the product, its two operands and the block that is written share what is allowed.
        for start, stop in _steps(rows, values.shape[2:].numel() * inner.numel(), own, most // 4):
            where = slice(rows.where.start + start, rows.where.start + stop) if isinstance(rows.where, slice) else None
            first = where.start if own and where is not None else 0
            part = values[some, start:stop, first:] if first else values[some, start:stop]
            flat = part.flatten(1)
            block = flat.sum(0) if both is None else flat.T @ both
            block = block if packed is None else block.index_select(1, packed)
            block = block.reshape(*part.shape[1:], *inner)
            block = (block.squeeze(-1) if block.ndim > 4 else block).permute(columns.axes)
            _write(matrix, rows, columns, (where, first), block, weight)


def _joinable(rows: _Rows, panel: ParameterBlock) -> bool:
    return rows.operand is not None and rows.operand.shape[1] >= _JOINED and rows.panel is not panel


def _add_joined(
    matrix: Tensor, fixed: tuple[_Rows, _Columns], moved: tuple[_Rows, _Columns], weight: float, most: int
) -> None:
    """Add the terms of operands that stay and that move by one product, sample by sample added up before."""
    (rows, columns), (more, moves) = fixed, moved
    (samples, many, _), left = rows.values.shape, rows.operand
    right, delta = (_repeated(part.operand, samples) for part in (columns, moves))
    if left is None or right is None or delta is None or not isinstance(rows.where, slice):
        raise ValueError("both terms need operands")
    inputs, wide = more.values.shape[2], delta.shape[1] * right.shape[1]
    step = max(1, most // 4 // (wide * max(samples, left.shape[1])))
    chunk = _even(samples, most // 4 // (step * wide))
    held = right.new_empty(min(chunk, samples), step, delta.shape[1], right.shape[1])  # for every round
    for start in range(0, many, step):
        stop = min(start + step, many)
        where = slice(rows.where.start + start, rows.where.start + stop)
        for first in range(0, samples, chunk):
            some = slice(first, min(first + chunk, samples))
            values = held[: some.stop - first, : stop - start]
            torch.mul(rows.values[some, start:stop, :, None], right[some, None, None], out=values)
            values[..., :inputs].addcmul_(more.values[some, start:stop, None], delta[some, None, :, None])
            block = (left[some].T @ values.flatten(1)).reshape(-1, *values.shape[1:]).transpose(0, 1)
            _write(matrix, rows, columns, (where, 0), block, weight)


def _repeated(operand: Tensor | None, samples: int) -> Tensor | None:
    """Return what multiplies samples, once for each position of an earlier layer."""
    if operand is None or operand.shape[0] >= samples:
        return operand
    return operand.repeat_interleave(samples // operand.shape[0], 0)


def _steps(rows: _Rows, size: int, own: bool, most: int) -> Iterator[tuple[int, int]]:
    """Yield rows at a time such that their block fits in fast memory."""
    many = rows.values.shape[1]
    step = max(1, most // max(1, size)) if isinstance(rows.where, slice) else many
    # Eight steps: only the upper half of a square is made, and the steps cut the diagonal's blocks finely enough.
    step = min(step, max(4, many // 8)) if own else step
    for start in range(0, many, step):
        yield start, min(start + step, many)


def _pairs(
    left: Tensor | None, right: Tensor | None, many: int, own: bool, most: int
) -> Iterator[tuple[slice, Tensor | None, torch.Size, Tensor | None]]:
    """Yield products of two operands for some samples at a time, `(samples, left * right)`, and their shape.

    Of an operand with itself only one half is made; the last item maps products to those that were made.
    """
    inner = torch.Size([1 if left is None else left.shape[1], 1 if right is None else right.shape[1]])
    if left is None or right is None:
        yield slice(0, many), left if right is None else right, inner, None
        return
    half = _half_of(inner[0], left.device) if own else None
    chunk = _even(many, most // max(1, inner.numel() if half is None else len(half[0])))
    for start in range(0, many, chunk):
        some = slice(start, start + chunk)
        a, b = left[some], right[some]
        if half is None:
            yield some, (a[:, :, None] * b[:, None, :]).flatten(1), inner, None
        else:
            i, j, packed = half
            yield some, a.index_select(1, i).mul_(b.index_select(1, j)), inner, packed


def _even(many: int, most: int) -> int:
    """Return how many of so many go into a round that takes `most`: a last round of few costs as many writes."""
    return math.ceil(many / math.ceil(many / max(1, most))) if many else 1


def _half_of(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of a square's upper half, and for every pair of the square its place among them."""
    i, j = torch.triu_indices(size, size, device=device)
    packed = torch.empty(size, size, dtype=torch.long, device=device)
    packed[i, j] = packed[j, i] = torch.arange(len(i), device=device)
    return i, j, packed.flatten()


def _write(
    matrix: Tensor, rows: _Rows, columns: _Columns, at: tuple[slice | None, int], block: Tensor, weight: float
) -> None:
    """Add a block `(channels, inputs, channels, inputs)` at some rows and from a first column channel on."""
    where, first = at
    for row_part in rows.panel.parts:
        for part in columns.panel.parts[: columns.parts]:
            target = part.split(row_part.split(matrix, 0), 2)[:, :, first:]
            piece = block[:, row_part.columns, :, part.columns]
            if where is not None:
                target[where].add_(piece, alpha=weight)
            elif isinstance(rows.where, Tensor):
                target.index_add_(0, rows.where.to(target.device), piece, alpha=weight)


def mirror(matrix: Tensor) -> Tensor:
    """Replace X by X + Xᵀ, in place, tile by tile."""
    size = matrix.shape[0]
    tile = min(max(size // 4, _TILES[0]), _TILES[1])
    for i in range(0, size, tile):
        for j in range(i, size, tile):
            upper, lower = matrix[i : i + tile, j : j + tile], matrix[j : j + tile, i : i + tile]
            if i == j:
                upper.copy_(upper + lower.T)
            else:
                lower.copy_(upper.add_(lower.T).T)
    return matrix
