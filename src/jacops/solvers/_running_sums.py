"""Sums over batches that stay exact to rounding in single precision, and the symmetric matrices they are kept of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Self, final

import torch
from torch import Tensor

from .._runtime.chunks import ENTRIES
from .._torch.protocol import OuterGradients

_STRIP = 256  # rows of a symmetric matrix summed together: 64 to 512 took the same time for a side of 2,048


@final
class Running:
    """A sum of tensors of one shape, by Kahan's method (1965) in single precision; double is summed plainly.

    Tensors are replaced and never changed, so that copies share them.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._excess: Tensor | None = None  # by which the total is too large

    def add(self, part: Tensor, factor: float = 1.0) -> None:
        """Add a tensor times a factor; its memory may be used up."""
        part = part.mul_(factor) if factor != 1.0 else part
        if self.total is None:
            self.total = part
        elif part.dtype == torch.float64:
            self.total = self.total + part
        else:
            part = part if self._excess is None else part.sub_(self._excess)
            total = self.total + part
            self._excess, self.total = (total - self.total).sub_(part), total

    def times(self, factor: float) -> Running:
        """Return the sum times a number."""
        other = copy.copy(self)
        if factor != 1.0:
            other.total, other._excess = (None if t is None else factor * t for t in (self.total, self._excess))
        return other

    def plus(self, other: Running) -> Running:
        """Return the sum of both."""
        found = copy.copy(self)
        for part, sign in ((other.total, 1.0), (other._excess, -1.0)):
            if part is not None:
                found.add(part.clone(), sign)
        return found

    def parts(self) -> list[Tensor]:
        """Return the tensors that sums over ranks add up."""
        if self.total is None or self.total.dtype == torch.float64:
            return [] if self.total is None else [self.total]
        return [self.total, torch.zeros_like(self.total) if self._excess is None else self._excess]

    def take(self, parts: Iterator[Tensor]) -> None:
        """Replace the tensors that `parts` returns."""
        if self.total is not None:
            self.total = next(parts)
            self._excess = None if self.total.dtype == torch.float64 else next(parts)

    def value(self) -> Tensor:
        """Return the sum, which has no entries before anything was added."""
        return torch.zeros(0) if self.total is None else self.total


@final
class SideSum:
    """The sum of `factor * rows.T @ rows` over batches of rows `(b, g, n, p)`; its diagonal alone where p is large.

    Parts b of a batch, which may be missing, are added up: rows that are not laid out in one run need not be copied.

    Of the matrices `(g, p, p)` strips of rows up to the diagonal are computed and kept, about half of all entries.

    Args:
        widest: Largest p for which it is more than the diagonal.
    """

    def __init__(self, widest: int) -> None:
        self.widest = widest
        self.strips: list[Running] = []
        self.diagonal = True

    def add(self, rows: Tensor, factor: float) -> None:
        """Add rows."""
        rows = rows.unsqueeze(0) if rows.ndim == 3 else rows
        size = rows.shape[-1]
        self.diagonal = size > self.widest
        if self.diagonal:
            self.add_diagonal(rows.square().sum((0, 2)), factor)
            return
        if size <= _STRIP:  # one strip, which is all
            self.strips = self.strips or [Running()]
            self.strips[0].add(_gram(rows, rows), factor)
            return
        starts = range(0, size, _STRIP)
        self.strips = self.strips or [Running() for _ in starts]
        for strip, start in zip(self.strips, starts, strict=True):
            stop = start + _STRIP
            strip.add(_gram(rows[..., start:stop], rows[..., :stop]), factor)

    def add_diagonal(self, part: Tensor, factor: float) -> None:
        """Add `(g, p)` to a sum that is a diagonal."""
        self.strips = self.strips or [Running()]
        self.strips[0].add(part, factor)

    def _with(self, strips: list[Running]) -> Self:
        other = copy.copy(self)
        other.strips = strips
        return other

    def times(self, factor: float) -> Self:
        """Return the sum times a number."""
        return self._with([strip.times(factor) for strip in self.strips])

    def plus(self, other: SideSum) -> Self:
        """Return the sum of both."""
        return self._with([a.plus(b) for a, b in zip(self.strips, other.strips, strict=True)])

    def trace(self) -> float:
        """Return the sum of all entries of the diagonal, or of the diagonals of all groups."""
        if self.diagonal:
            return float(self.strips[0].value().sum(dtype=torch.float64))
        parts = (strip.value() for strip in self.strips)
        ends = (part[:, :, -part.shape[1] :].diagonal(dim1=1, dim2=2) for part in parts)
        return sum(float(end.sum(dtype=torch.float64)) for end in ends)

    def matrix(self, factor: float = 1.0, without: int = 0) -> Tensor:
        """Return the sum times a number, `(g, p, p)`, or the diagonal `(g, p)`, in memory of its own.

        Args:
            factor: The number.
            without: So many places at the end are left out.
        """
        last = self.strips[-1].value()
        size = last.shape[-1] - without
        if self.diagonal:
            return last[:, :size] * factor
        if len(self.strips) == 1:
            return last[:, :size, :size] * factor
        found = last.new_empty(last.shape[0], size, size)
        start = 0
        for strip in self.strips:
            part = strip.value()[:, : size - start, :size]
            stop = part.shape[2]
            torch.mul(part, factor, out=found[:, start:stop, :stop])
            torch.mul(part[:, :, :start].mT, factor, out=found[:, :start, start:stop])
            start = stop
        return found

    def last(self, factor: float = 1.0) -> Tensor:
        """Return the last entry of the diagonal times a number, `(g, 1)`."""
        part = self.strips[-1].value()
        return (part[:, -1:] if self.diagonal else part[:, -1, -1:]) * factor


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """Return `left.T @ right`, `(g, p, q)`, of rows `(b, g, n, p)` and `(b, g, n, q)`, some parts b at a time."""
    if left.shape[0] == 1:
        first = left[0]
        return torch.bmm(first.mT, first if right is left else right[0])
    step = max(1, ENTRIES // max(1, left.shape[1] * left.shape[3] * right.shape[3]))
    parts = ((a.mT @ b).sum(0) for a, b in zip(left.split(step), right.split(step), strict=True))
    return sum(parts, left.new_zeros(()))


def squares(uses: Sequence[OuterGradients]) -> Tensor:
    """Return the sum of squares `(g, p, q)` of the gradients of all samples under all cotangents."""
    if len(uses) == 1 and uses[0].left.shape[2] == 1:
        left, right = (side.square().sum(0)[:, 0].movedim(1, 0) for side in (uses[0].left, uses[0].right))
        return left.mT @ right
    many = max(side.shape[0] for use in uses for side in (use.left, use.right))
    alike = len({use.swapped for use in uses}) == 1
    left, right = (
        torch.cat([s if alike else s.expand(many, *s.shape[1:]) for s in sides], 2).permute(1, 3, 0, 4, 2)
        for sides in zip(*((use.left, use.right) for use in uses), strict=True)
    )  # (n, g, k or 1, p, t)
    n, g, _, p, _ = left.shape
    q = right.shape[3]
    chunk = max(1, ENTRIES // max(1, many * g * p * q))
    total = left.new_zeros(g, p, q)
    for start in range(0, n, chunk):
        total += _squared_sums(left[start : start + chunk], right[start : start + chunk])
    return total


def _squared_sums(left: Tensor, right: Tensor) -> Tensor:
    """Return squares `(g, p, q)` of `sum_t left outer right`, `(n, g, k or 1, p or q, t)` each, summed over n and k."""
    (n, g, a, p, t), (_, _, b, q, _) = left.shape, right.shape
    if a == b:
        return (left @ right.mT).square().sum((0, 2))
    product = left.reshape(n, g, a * p, t) @ right.reshape(n, g, b * q, t).mT
    return product.square().reshape(n, g, a, p, b, q).sum((0, 2, 4))
