"""Diagonals of curvature matrices through the outputs of layers: of every block, only where an entry meets itself.

What the sweeps find is what `blocks` is given. Of a layer's own second derivatives `K[n, e, f]` its weights need those
of a channel with itself, times two operands; where one parameter enters at several places, so do pairs of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Chunk, Found, by_entry
from .sites import BlockPart, LayerOutput, ParameterBlock, settled, without


def pairable(sites: Sequence[LayerOutput], slices: Sequence[slice]) -> list[LayerOutput]:
    """Return the sites without leaves that enter in one way here and in another there: their entries do not line up."""
    ways: dict[int, list[set[tuple[int, int, int, bool, bool]]]] = {}
    for site in sites:
        for leaf in {use.leaf for use in site.uses}:
            where = slices[leaf]
            row_block = {_way(p, part) for p in site.panels for part in p.parts if _within(part.where, where)}
            ways.setdefault(leaf, []).append(row_block)
    lost = {leaf for leaf, found in ways.items() if any(way != found[0] for way in found)}
    if not lost:
        return list(sites)
    return settled(without([LayerOutput(s.uses, s.many, s.ahead) for s in sites], lost), slices)


def _way(panel: ParameterBlock, part: BlockPart) -> tuple[int, int, int, bool, bool]:
    return part.where.start, part.where.stop, part.inputs, part.turned, panel.operand is None


def _within(inner: slice, outer: slice) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def together(sites: Sequence[LayerOutput]) -> list[LayerOutput]:
    """Return the first site and later ones at which one of its parameters enters again."""
    leaves = {use.leaf for use in sites[0].uses}
    return [sites[0], *(site for site in sites[1:] if leaves & {use.leaf for use in site.uses})]


def add_pairs(diagonal: Tensor, site: LayerOutput, chunk: Chunk, later: LayerOutput, found: Found) -> None:
    """Add a chunk of a site's output for parameters that enter there, alone or at a later site too."""
    share = 1.0 if later is site else 2.0  # of two sites, each is met by the other
    for row_block in site.panels:
        for column_block in later.panels:
            if row_block.operand is None and column_block.operand is None:
                if row_block.parts[0].where == column_block.parts[0].where:
                    _add_factors(diagonal, row_block, chunk, column_block, found, share)
            elif row_block.operand is not None and column_block.operand is not None:
                _add_outer(diagonal, row_block, chunk, column_block, found, share)


def _add_outer(
    diagonal: Tensor, row_block: ParameterBlock, chunk: Chunk, column_block: ParameterBlock, found: Found, share: float
) -> None:
    low = max(chunk.channels.start, row_block.channels.start)
    high = min(chunk.channels.stop, row_block.channels.stop)
    pairs = [(a, b) for a in row_block.parts for b in column_block.parts if a.where == b.where]
    if low >= high or not pairs or row_block.operand is None or column_block.operand is None:
        return
    rows = slice(low - chunk.channels.start, high - chunk.channels.start)
    ahead = column_block.channels.start - row_block.channels.start
    columns = slice(low + ahead, high + ahead)
    second = found.second[:, :, rows, :, columns].diagonal(dim1=2, dim2=4)
    operand, moved = row_block.operand[:, chunk.positions], found.moved.get(id(column_block.use))
    for a, b in pairs:
        left = operand[..., a.columns]
        block = _contracted(second, left, column_block.operand[..., b.columns])
        if moved is not None and found.delta is not None and b is column_block.parts[0]:
            moves = moved[:, :, rows][..., column_block.group, :]
            block += torch.einsum("npcti,ntc,npi->ci", moves, found.delta[..., columns], left)
        here = slice(low - row_block.channels.start, high - row_block.channels.start)
        a.split(diagonal, 0)[here].add_(block, alpha=share)


def _contracted(second: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of `second (n, p, t, c)` times operands `(n, p, i)` and `(n, t, i)`, `(c, i)`."""
    if second.shape[1] == second.shape[2] == 1:
        return second[:, 0, 0].T @ (left[:, 0] * right[:, 0])
    return torch.einsum("nptc,nti->npci", second, right).mul_(left.unsqueeze(2)).sum((0, 1))


def _add_factors(
    diagonal: Tensor, row_block: ParameterBlock, chunk: Chunk, column_block: ParameterBlock, found: Found, share: float
) -> None:
    values = by_entry(column_block, found)
    index = row_block.numbers[chunk.positions, chunk.channels].to(values.device)
    where = index[None, :, :, None].expand(values.shape[0], -1, -1, 1)
    met = values.gather(3, where).squeeze(3)
    if row_block.factor is not None:
        met = met * row_block.factor[:, chunk.positions, chunk.channels]
    diagonal[row_block.parts[0].where].index_add_(0, index.flatten(), met.sum(0).flatten(), alpha=share)
