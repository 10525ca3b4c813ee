r"""What an operator is made of: a congruence $s\,J^\top S J$ with few rows can be solved in the space of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor

from .._operators import Diagonal, Identity, Matrix, Operator, Product, Scaled, Sum, Transposed
from .._operators._algebra import factors_of
from .._operators._data import BlockDiagonal, StackOver, SumOver
from .._runtime.chunks import ENTRIES
from .._space import Space

MOST_ROWS = 10_000  # whose matrix is still factorised: 800 MB in float64, some seconds


@final
@dataclass(frozen=True, eq=False)
class Congruence:
    r"""$s\,J^\top S J + t I$.

    Attributes:
        J: The outer factor, (m, n).
        S: The inner one, (m, m); None for the identity.
        scale: $s$.
        shift: $t$.
    """

    J: Operator
    S: Operator | None
    scale: float
    shift: float


def congruence(operator: Operator) -> Congruence | None:
    """Return the congruence that an operator is written as, or None."""
    if isinstance(operator, SumOver):
        return _summed(operator)
    shift, scale = 0.0, 1.0
    if isinstance(operator, Sum):
        for part, other in ((operator.left, operator.right), (operator.right, operator.left)):
            factor, inner = _unscaled(part)
            if isinstance(inner, Identity):
                shift, operator = factor, other
                break
    scale, operator = _unscaled(operator)
    if not isinstance(operator, Product):
        return None
    first, *middle = factors_of(operator.left)
    if not (isinstance(first, Transposed) and first.of is operator.right):
        return None
    return Congruence(operator.right, reduce(Product, middle) if middle else None, scale, shift)


def _summed(operator: SumOver) -> Congruence | None:
    """Return a sum of congruences over batches as one with their rows stacked, while these stay few.

    Where ranks share the batches, each takes all of them: so few rows are not worth an exchange.
    """
    ridge = operator.ridge
    if operator.ranks.apart or (ridge is not None and bool((ridge != ridge[0]).any())):
        return None
    found: list[tuple[float, int, Congruence]] = []
    rows = 0
    for factor, part in getattr(operator.parts, "whole", operator.parts)():
        one = congruence(part)
        many = one.J.shape[0] if one is not None else 0
        rows += many
        if one is None or one.shift or factor * one.scale < 0 or rows >= min(operator.shape[0], MOST_ROWS):
            return None
        found.append((math.sqrt(factor * one.scale), rows - many, one))
    stacked = Space.flat(rows, "rows", torch.empty(0, dtype=operator.space.dtype, device=operator.space.device))
    J = StackOver(lambda: iter((root, start, one.J) for root, start, one in found), operator.space, stacked)
    inner = [one.S or Identity(one.J.codomain) for *_, one in found]
    plain = all(one.S is None for *_, one in found)
    S = None if plain else BlockDiagonal(tuple(inner), stacked)
    return Congruence(J, S, 1.0, 0.0 if ridge is None else float(ridge[0]))


def _unscaled(operator: Operator) -> tuple[float, Operator]:
    factor = 1.0
    while isinstance(operator, Scaled):
        factor, operator = factor * operator.factor, operator.of
    return factor, operator


def in_memory(operator: Operator) -> bool:
    """Return whether the entries of an operator are there already, so that its matrix costs next to nothing."""
    if isinstance(operator, Transposed | Scaled):
        return in_memory(operator.of)
    if isinstance(operator, Sum | Product):
        return in_memory(operator.left) and in_memory(operator.right)
    return isinstance(operator, Matrix | Diagonal | Identity)


def dense_of(operator: Operator) -> Tensor:
    """Return the matrix of an operator; that of a `Matrix` is not copied."""
    return operator.matrix if isinstance(operator, Matrix) else operator.dense(check_finite=False)


def is_symmetric(matrix: Tensor) -> bool:
    """Return whether a matrix equals its transpose to rounding."""
    step = max(1, ENTRIES // max(1, matrix.shape[1]))
    worst = largest = 0.0
    for start in range(0, matrix.shape[0], step):
        block = matrix[start : start + step]
        worst = max(worst, float((block - matrix[:, start : start + step].T).abs().max()))
        largest = max(largest, float(block.abs().max()))
    # Entries are sums over data: about as many rounding errors as they have terms.
    return worst <= 1e3 * torch.finfo(matrix.dtype).eps * largest
