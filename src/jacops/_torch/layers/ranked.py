r"""Products of rows with vectors of low rank: $\langle G, L R^\top \rangle$ from the factors of both.

Where a row is $\sum_t \delta_t a_t^\top$, that is $\sum_t (L^\top \delta_t) \cdot (R^\top a_t)$, so that for short
sequences neither the row nor the vector is formed. For long ones some columns of both are.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .part import RowFactors, slices
from .parts import Lookup, Outer, Products, Several

Vectors = Tensor | tuple[Tensor, Tensor]
"""One parameter's share of m vectors: `(m, F, W)`, or of those of low rank L `(m, F, r)` and R `(m, W, r)`."""


def times_vectors(part: RowFactors, vectors: Vectors) -> Tensor:
    """Return products `(m, n, k)` of rows with vectors, held as they are or in low rank."""
    return part.times(vectors) if isinstance(vectors, Tensor) else _times_ranked(part, *vectors)


def _times_ranked(part: RowFactors, left: Tensor, right: Tensor) -> Tensor:
    if isinstance(part, Several):
        return torch.stack([_times_ranked(use, left, right) for use in part.uses]).sum(0)
    if isinstance(part, Lookup) or (isinstance(part, Outer) and part.is_matrix and _contracts(part, left, right)):
        return _by_factors(cast(Products, part), left, right)
    return _by_blocks(part, left, right)


def _contracts(part: Outer, left: Tensor, right: Tensor) -> bool:
    """Return whether factors take less arithmetic than the entries of rows and vectors."""
    n, k, positions, groups, out = part.delta.shape
    (many, long, rank), wide, inner = left.shape, right.shape[1], part.operand.shape[3]
    by_factors = n * positions * groups * many * rank * (inner + k * (out + 1))
    formed = n * k * positions * groups * out * inner
    return by_factors <= formed + long * wide * many * (rank + n * k)


def _by_factors(part: Products, left: Tensor, right: Tensor) -> Tensor:
    """Contract cotangents and operands with the factors, then both with each other, some vectors at a time."""
    n, k, positions, groups, _ = part.delta.shape
    many, rank = left.shape[0], left.shape[2]
    found = part.delta.new_empty(many, n, k)
    for some in slices(many, n * (1 + k) * positions * groups * rank * left.element_size()):
        first, second = left[some], right[some]
        if isinstance(part, Lookup):
            met = first[:, part.operand].unsqueeze(3)
            own = second.unsqueeze(1)
        else:
            turned = isinstance(part, Outer) and part.turned
            first = first.unflatten(1, (groups, -1))  # the rows of group g are the g-th of the blocks one below another
            second = second.unsqueeze(1).expand(-1, groups, -1, -1)
            own, of_operand = (second, first) if turned else (first, second)
            met = torch.einsum("ntgi,mgir->mntgr", part.operand, of_operand)
        found[some] = torch.einsum("mntgr,mnktgr->mnk", met, torch.einsum("nktgo,mgor->mnktgr", part.delta, own))
    return found


def _by_blocks(part: RowFactors, left: Tensor, right: Tensor) -> Tensor:
    """Form some columns at a time, of the rows and of the vectors."""
    (n, k, long, wide), many = part.shape, left.shape[0]
    found = left.new_zeros(many, n * k)
    for first in slices(long, (n * k + many) * wide * left.element_size()):
        rows = part.block(first).reshape(n * k, (first.stop - first.start) * wide)
        found += (left[:, first] @ right.mT).flatten(1) @ rows.T
    return found.view(many, n, k)
