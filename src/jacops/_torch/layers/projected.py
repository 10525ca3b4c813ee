r"""Rows projected on both sides, $L^\top G R$, from their factors: the gradient $G$ of a weight is not formed.

Where a row is $\sum_t \delta_t a_t^\top$, it is $\sum_t (L^\top \delta_t) (R^\top a_t)^\top$ (Choe et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .part import RowFactors, slices
from .parts import Lookup, Outer, Several

Side = Tensor | None


def projected(part: RowFactors, left: Side, right: Side) -> Tensor:
    """Return rows `(n, k, a, b)`, seen as matrices `(F, W)`, times `left` `(F, a)` and `right` `(W, b)`.

    Args:
        part: One parameter's share of the rows.
        left: For the first axis; None leaves it as it is.
        right: For the second.
    """
    if isinstance(part, Several):
        return torch.stack([projected(use, left, right) for use in part.uses]).sum(0)
    if isinstance(part, Outer) and part.is_matrix:
        return _of_products(part, left, right)
    if isinstance(part, Lookup) and left is not None:
        delta = _times(part.delta[:, :, :, 0], right)
        return torch.einsum("nta,nktb->nkab", left[part.operand], delta)
    return _of_blocks(part, left, right)


def _times(values: Tensor, side: Side) -> Tensor:
    return values if side is None else values @ side


def _of_products(part: Outer, left: Side, right: Side) -> Tensor:
    """Project cotangents and operands; the rows of group g are the g-th of the blocks that `left` consists of."""
    delta, operand = part.delta, part.operand.unsqueeze(1)
    first, second = (operand, delta) if part.turned else (delta, operand)
    second = _times(second, right)
    if left is None:
        return torch.einsum("nktgf,nktgb->nkgfb", first, second).flatten(2, 3)
    groups = first.shape[3]
    if groups == 1:
        return torch.einsum("nkta,nktb->nkab", first[:, :, :, 0] @ left, second[:, :, :, 0])
    first = torch.einsum("nktgf,gfa->nktga", first, left.view(groups, -1, left.shape[1]))
    return torch.einsum("nktga,nktgb->nkab", first, second)


def _of_blocks(part: RowFactors, left: Side, right: Side) -> Tensor:
    """Project rows that are formed, some of the first axis at a time."""
    n, k, long, wide = part.shape
    parts = []
    for some in slices(long, n * k * wide * part.like.element_size()):
        block = _times(part.block(some), right)
        parts.append(block if left is None else torch.einsum("nkfb,fa->nkab", block, left[some]))
    if left is None:
        return torch.cat(parts, 2)
    return torch.stack(parts).sum(0)
