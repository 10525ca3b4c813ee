r"""Sums over samples that make a Kronecker-factored curvature: factors first, eigenvalues in a second pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._operators._eigen_blocks import Block, DenseBlock, DiagonalBlock, KroneckerBlock
from .._runtime.chunks import ENTRIES
from .._torch.protocol import OuterGradients
from ..errors import NonFiniteError


@dataclass(frozen=True)
class Basis:
    """How Kronecker factors are made.

    Attributes:
        weighted: Weigh every row by the size of what it meets on the other side: the first step towards the nearest
            Kronecker product (Van Loan and Pitsianis, 1993). Otherwise all count alike (K-FAC).
        widest: Sides longer than this keep their own axes as eigenbasis.
    """

    weighted: bool
    widest: int


@final
class OuterSums:
    """Statistics of a weight `(g * p, q)` whose gradients are outer products.

    Args:
        where: Entries of the weight and its bias in a flat vector.
        name: How messages call the weight.
        turned: It is stored as `(q, p)`.
        rows: Length p of the left side where that is a table that is looked up in.
        basis: How the factors are made.
    """

    def __init__(self, where: tuple[slice, ...], name: str, turned: bool, rows: int | None, basis: Basis) -> None:
        self.where, self.name, self.turned, self.rows, self.basis = where, name, turned, rows, basis
        self._factors: dict[bool, list[Tensor]] = {}
        self._counts: dict[bool, float] = {}
        self._bases: tuple[Tensor | None, Tensor | None] | None = None
        self._squares: Tensor | None = None
        self.dtype = torch.float64

    def add(self, uses: Sequence[OuterGradients], factor: float, share: float) -> None:
        """Add a batch to the factors.

        Args:
            uses: The gradients of the batch.
            factor: With which the batch enters the whole.
            share: Which part of the batch's cotangents this is; what they multiply is counted once.
        """
        for use in uses:
            self.dtype = use.right.dtype
            sums = self._weighted(use, factor) if self.basis.weighted else self._plain(use, factor, share)
            old = self._factors.get(use.swapped)
            self._factors[use.swapped] = sums if old is None else [a + b for a, b in zip(old, sums, strict=True)]
            positions = use.left.numel() if use.looks_up else math.prod(use.left.shape[1:3])
            self._counts[use.swapped] = self._counts.get(use.swapped, 0.0) + share * positions

    def _plain(self, use: OuterGradients, factor: float, share: float) -> list[Tensor]:
        left = self._counted(use.left) if use.looks_up else self._factor(use.left)
        weights = [share, factor] if use.swapped else [factor, share]
        return [side * weight for side, weight in zip((left, self._factor(use.right)), weights, strict=True)]

    def _weighted(self, use: OuterGradients, factor: float) -> list[Tensor]:
        """Return the factors with every row weighted by the size of what it meets on the other side."""
        size = use.right.square().sum((0, -1), keepdim=True)
        if use.looks_up:
            return [factor * self._counted(use.left, size.flatten()), factor * self._factor(use.right)]
        other = use.left.square().sum((0, -1), keepdim=True)
        return [factor * self._factor(use.left * size.sqrt()), factor * self._factor(use.right * other.sqrt())]

    def _counted(self, entries: Tensor, weights: Tensor | None = None) -> Tensor:
        return torch.bincount(entries.flatten(), weights, minlength=self.rows or 0).double().unsqueeze(0)

    def _factor(self, side: Tensor) -> Tensor:
        """Return the sum of squares `(g, p, p)`, or `(g, p)` for a side too wide for more."""
        rows = side.movedim(3, 0).flatten(1, 3)
        if rows.shape[-1] > self.basis.widest:
            return rows.square().sum(1, dtype=torch.float64)
        return (rows.mT @ rows).double()

    def settle(self) -> None:
        """Find the eigenbases: of each side's sum, weighted by the size of the other where there are several."""
        sides: list[Tensor | None] = []
        for own in (0, 1):
            parts = [
                f[own] * (_diagonal(f[1 - own]).sum() / self._size(swapped)) for swapped, f in self._factors.items()
            ]
            total = torch.stack(parts).sum(0)
            if not bool(total.isfinite().all()):
                raise NonFiniteError(f"EKFAC: in the gradients by {self.name}, some are NaN or Inf. Look at the data.")
            sides.append(None if total.ndim == 2 else torch.linalg.eigh(total)[1])
        self._bases = (sides[0], sides[1])

    def _size(self, swapped: bool) -> float:
        """Return what the product of two factors is divided by."""
        if self.basis.weighted:
            return max(float(_diagonal(self._factors[swapped][0]).sum()), torch.finfo(torch.float64).tiny)
        return max(self._counts[swapped], torch.finfo(torch.float64).tiny)

    def correct(self, uses: Sequence[OuterGradients], factor: float) -> None:
        """Add the squares of a batch's gradients in the eigenbasis, sample by sample (George et al., 2018)."""
        left, right = (None if b is None else b.to(self.dtype) for b in self._bases or (None, None))
        turned = [
            OuterGradients(
                use.left if use.looks_up else _rotated(use.left, left), _rotated(use.right, right), use.swapped
            )
            for use in uses
        ]
        if turned:
            found = self._looked_up(turned) if turned[0].looks_up else _squares(turned)
            part = factor * found.double()
            self._squares = part if self._squares is None else self._squares + part

    def _looked_up(self, uses: Sequence[OuterGradients]) -> Tensor:
        """Return squares `(1, p, q)`, positions that look up the same entry for one sample added up before."""
        indices, right = torch.cat([u.left for u in uses], 1), torch.cat([u.right[:, :, :, 0] for u in uses], 2)
        table = self.rows or 0
        keys = indices + table * torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
        found, place = torch.unique(keys.flatten(), return_inverse=True)
        summed = right.new_zeros(right.shape[0], len(found), right.shape[-1])
        summed.index_add_(1, place, right.flatten(1, 2))
        squares = summed.new_zeros(table, right.shape[-1])
        return squares.index_add_(0, found % table, summed.square().sum(0)).unsqueeze(0)

    def block(self) -> Block:
        """Return what is known now; without a second pass, eigenvalues are products of the factors' (K-FAC)."""
        left, right = self._bases or (None, None)
        values = self._squares if self._squares is not None else self._products(left, right)
        bases = [None if basis is None else basis.to(self.dtype) for basis in (left, right)]
        return KroneckerBlock(self.where, bases[0], bases[1], values.clamp_min(0).to(self.dtype), self.turned)

    def _products(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        parts = [
            torch.einsum("gp,gq->gpq", _along(factors[0], left), _along(factors[1], right)) / self._size(swapped)
            for swapped, factors in self._factors.items()
        ]
        return torch.stack(parts).sum(0)


@final
class RowSums:
    """Statistics of parameters whose gradients come as rows: all of their curvature, or its diagonal where many.

    Args:
        where: Their entries in a flat vector.
        name: How messages call them.
        whole: Keep all of it.
    """

    def __init__(self, where: tuple[slice, ...], name: str, whole: bool) -> None:
        self.where, self.name, self.whole = where, name, whole
        self.dtype = torch.float64
        self._sum: Tensor | None = None

    def add(self, rows: Tensor, factor: float) -> None:
        """Add rows `(k, n, entries)`."""
        self.dtype = rows.dtype
        rows = rows.flatten(0, 1).double()
        part = factor * (rows.T @ rows if self.whole else rows.square().sum(0))
        self._sum = part if self._sum is None else self._sum + part

    def block(self) -> Block:
        """Return what is known.

        Raises:
            NonFiniteError: A gradient was NaN or Inf.
        """
        total = self._sum if self._sum is not None else torch.zeros(0, dtype=torch.float64)
        if not bool(total.isfinite().all()):
            raise NonFiniteError(f"EKFAC: in the gradients by {self.name}, some are NaN or Inf. Look at the data.")
        if not self.whole:
            return DiagonalBlock(self.where, total.to(self.dtype))
        values, basis = torch.linalg.eigh(total)
        return DenseBlock(self.where, basis.to(self.dtype), values.clamp_min(0).to(self.dtype))


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)


def _along(factor: Tensor, basis: Tensor | None) -> Tensor:
    """Return a factor's diagonal `(g, p)` in a basis."""
    return _diagonal(factor) if basis is None or factor.ndim == 2 else (basis * (factor @ basis)).sum(1)


def _rotated(side: Tensor, basis: Tensor | None) -> Tensor:
    """Return `(k, n, t, g, p)` in the eigenbasis `(g, p, p)`."""
    if basis is None:
        return side
    return side @ basis[0] if basis.shape[0] == 1 else (side.unsqueeze(-2) @ basis).squeeze(-2)


def _squares(uses: Sequence[OuterGradients]) -> Tensor:
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
