r"""Sums over samples that make a Kronecker-factored curvature: factors first, eigenvalues in a second pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._operators._eigen_blocks import Block, Form
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
        reduced: Positions of a sample are summed (cotangents) and averaged (what they multiply) before any product
            (K-FAC "reduce", Eschenhagen et al., 2023). Otherwise each counts as a sample ("expand").
    """

    weighted: bool
    widest: int
    reduced: bool = False


@dataclass(frozen=True, eq=False)
class Pair:
    """Two factors of the curvature of a weight `(g * p, q)`, in g groups.

    Attributes:
        where: Entries of the weight, and of a bias that is its last column, in a flat vector.
        name: Of the weight.
        left: `(g, p, p)`, or `(g, p)` for a diagonal.
        right: `(g, q, q)`, or `(g, q)` for a diagonal.
        turned: The weight is stored as `(q, p)`.
        form: What it is of the curvature.
    """

    where: tuple[slice, ...]
    name: str
    left: Tensor
    right: Tensor
    turned: bool = False
    form: Form = "kronecker"

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factor of the weight's first axis as it is stored, and that of all others."""
        first, other = (self.right, self.left) if self.turned else (self.left, self.right)
        return _plain(first, dtype), _plain(other, dtype)

    def block(self, dtype: torch.dtype) -> Block:
        """Return it in its eigenbasis.

        Raises:
            NonFiniteError: It is not finite.
        """
        sides = [_eigen(side, self.name) for side in (self.left, self.right)]
        values = torch.einsum("gp,gq->gpq", *(own for own, _ in sides)).clamp_min(0)
        left, right = (None if basis is None else basis.to(dtype) for _, basis in sides)
        return Block(self.where, left, right, values.to(dtype), self.turned, self.form)


def _plain(side: Tensor, dtype: torch.dtype) -> Tensor:
    side = side.unsqueeze(-1) if side.ndim == 2 and side.shape[-1] == 1 else side
    return (side[0] if side.shape[0] == 1 else side).to(dtype)


def _eigen(side: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """Return eigenvalues `(g, p)` and eigenvectors as columns; None where it is diagonal."""
    if not bool(side.isfinite().all()):
        raise not_finite(name)
    return (side, None) if side.ndim == 2 else torch.linalg.eigh(side)


@final
class OuterSums:
    """Statistics of a weight `(g * p, q)` whose gradients are outer products.

    Args:
        where: Entries of the weight and its bias in a flat vector.
        names: How messages call them.
        turned: It is stored as `(q, p)`.
        rows: Length p of the left side where that is a table that is looked up in.
        basis: How the factors are made.
    """

    form: Form = "kronecker"

    def __init__(
        self, where: tuple[slice, ...], names: tuple[str, ...], turned: bool, rows: int | None, basis: Basis
    ) -> None:
        self.where, self.names, self.turned, self.rows, self.basis = where, names, turned, rows, basis
        self._factors: dict[bool, list[Tensor]] = {}
        self._counts: dict[bool, float] = {}
        self._bases: tuple[Tensor | None, Tensor | None] | None = None
        self._squares: Tensor | None = None
        self.dtype = torch.float64

    def add(self, uses: Any, factor: float, share: float) -> None:
        """Add a batch to the factors.

        Args:
            uses: The gradients of the batch.
            factor: With which the batch enters the whole.
            share: Which part of the batch's cotangents this is; what they multiply is counted once.
        """
        for use in _reduced(uses) if self.basis.reduced else uses:
            self.dtype = use.right.dtype
            sums = self._weighted(use, factor) if self.basis.weighted else self._plain(use, factor, share)
            self._take(use.swapped, sums, share * math.prod(use.right.shape[1:3]))

    def _take(self, swapped: bool, sums: Sequence[Tensor], count: float) -> None:
        old = self._factors.get(swapped)
        self._factors[swapped] = list(sums) if old is None else [a + b for a, b in zip(old, sums, strict=True)]
        self._counts[swapped] = self._counts.get(swapped, 0.0) + count

    def times(self, factor: float) -> OuterSums:
        """Return the statistics of the curvature times a number, none of which is corrected."""
        other = OuterSums(self.where, self.names, self.turned, self.rows, self.basis)
        other.dtype = self.dtype
        for swapped, sums in self._factors.items():
            scaled = [self.basis.weighted or side == swapped for side in (False, True)]  # the cotangents' side
            made = [factor * own if scale else own for own, scale in zip(sums, scaled, strict=True)]
            other._take(swapped, made, self._counts[swapped])
        return other

    def plus(self, other: OuterSums) -> OuterSums:
        """Return the statistics of both data sets together."""
        total = self.times(1.0)
        for swapped, sums in other._factors.items():
            total._take(swapped, sums, other._counts[swapped])
        return total

    def _plain(self, use: OuterGradients, factor: float, share: float) -> list[Tensor]:
        left = self._counted(use.left) if use.looks_up else self._factor(use.left)
        weights = [share, factor] if use.swapped else [factor, share]
        return [side * weight for side, weight in zip((left, self._factor(use.right)), weights, strict=True)]

    def _weighted(self, use: OuterGradients, factor: float) -> list[Tensor]:
        """Return the factors with every row weighted by the size of what it meets on the other side."""
        size = use.right.square().sum((0, -1), keepdim=True)
        if use.looks_up:
            return [factor * self._counted(use.left, size.flatten(1)), factor * self._factor(use.right)]
        other = use.left.square().sum((0, -1), keepdim=True)
        return [factor * self._factor(use.left * size.sqrt()), factor * self._factor(use.right * other.sqrt())]

    def _counted(self, entries: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return sums of squares `(1, rows)` of units, or of a sample's mean unit, under weights."""
        table = self.rows or 0
        if not self.basis.reduced:
            flat = None if weights is None else weights.flatten()
            return torch.bincount(entries.flatten(), flat, minlength=table).double().unsqueeze(0)
        n, positions = entries.shape
        keys = entries + table * torch.arange(n, device=entries.device).unsqueeze(1)
        found, times = torch.unique(keys.flatten(), return_counts=True)
        squares = (times / positions).double().square()
        if weights is not None:
            squares = squares * weights.flatten()[found // table]
        return torch.bincount(found % table, squares, minlength=table).unsqueeze(0)

    def _factor(self, side: Tensor) -> Tensor:
        """Return the sum of squares `(g, p, p)`, or `(g, p)` for a side too wide for more."""
        rows = side.movedim(3, 0).flatten(1, 3)
        if rows.shape[-1] > self.basis.widest:
            return rows.square().sum(1, dtype=torch.float64)
        return (rows.mT @ rows).double()

    def pair(self) -> Pair:
        """Return the factors; of a weight that enters in two ways those that keep the trace of the sum."""
        sizes = {swapped: self._size(swapped) for swapped in self._factors}
        if len(sizes) == 1:
            ((swapped, (left, right)),) = self._factors.items()
            divided = (left / sizes[swapped], right) if swapped else (left, right / sizes[swapped])
            return Pair(self.where, self.names[0], *divided, self.turned)
        weights = [[float(_diagonal(s).sum()) / sizes[way] for s in own] for way, own in self._factors.items()]
        sums = list(self._factors.values())
        left = torch.stack([own[0] * weight[1] for own, weight in zip(sums, weights, strict=True)]).sum(0)
        right = torch.stack([own[1] * weight[0] for own, weight in zip(sums, weights, strict=True)]).sum(0)
        total = max(float(_diagonal(left).sum()), torch.finfo(torch.float64).tiny)
        return Pair(self.where, self.names[0], left, right / total, self.turned)

    def pairs(self, separate: bool = False) -> list[Pair]:
        """Return the factors, of a weight and its bias together or of each."""
        joint = self.pair()
        if not separate or len(self.where) == 1:
            return [joint]
        weight, bias = self.where
        right, last = joint.right[..., :-1], _diagonal(joint.right)[:, -1:]
        right = right if right.ndim == 2 else right[:, :-1]
        return [
            Pair((weight,), self.names[0], joint.left, right, self.turned),
            Pair((bias,), self.names[1], joint.left, last),
        ]

    def settle(self) -> None:
        """Find the eigenbases: of each side's sum, weighted by the size of the other where there are several."""
        block = self.pair().block(torch.float64)
        self._bases = (block.left, block.right)

    def _size(self, swapped: bool) -> float:
        """Return what the product of two factors is divided by."""
        if self.basis.weighted:
            return max(float(_diagonal(self._factors[swapped][0]).sum()), torch.finfo(torch.float64).tiny)
        return max(self._counts[swapped], torch.finfo(torch.float64).tiny)

    def correct(self, uses: Any, factor: float) -> None:
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
        if self._squares is None:
            return self.pair().block(self.dtype)
        left, right = (None if basis is None else basis.to(self.dtype) for basis in self._bases or (None, None))
        return Block(self.where, left, right, self._squares.clamp_min(0).to(self.dtype), self.turned)


@final
class RowSums:
    """Statistics of parameters whose gradients come as rows: all of their curvature, or its diagonal where many.

    Args:
        where: Their entries in a flat vector.
        names: How messages call them.
        whole: Keep all of it.
    """

    def __init__(self, where: tuple[slice, ...], names: tuple[str, ...], whole: bool) -> None:
        self.where, self.names, self.whole = where, names, whole
        self.form: Form = "exact" if whole else "diagonal"
        self.dtype = torch.float64
        self._sum: Tensor | None = None

    def add(self, rows: Any, factor: float, share: float) -> None:
        """Add rows `(k, n, entries)`."""
        self.dtype = rows.dtype
        rows = rows.flatten(0, 1).double()
        part = factor * (rows.T @ rows if self.whole else rows.square().sum(0))
        self._sum = part if self._sum is None else self._sum + part

    def times(self, factor: float) -> RowSums:
        """Return the statistics of the curvature times a number."""
        other = RowSums(self.where, self.names, self.whole)
        other.dtype, other._sum = self.dtype, None if self._sum is None else factor * self._sum
        return other

    def plus(self, other: RowSums) -> RowSums:
        """Return the statistics of both data sets together."""
        total = self.times(1.0)
        total._sum = other._sum if total._sum is None else total._sum + other._total
        return total

    @property
    def _total(self) -> Tensor:
        return self._sum if self._sum is not None else torch.zeros(0, dtype=torch.float64)

    def pairs(self, separate: bool = False) -> list[Pair]:
        """Return the curvature itself, times one."""
        total = self._total.unsqueeze(0)
        return [Pair(self.where, self.names[0], total.new_ones(1, 1), total, turned=True, form=self.form)]

    def block(self) -> Block:
        """Return what is known.

        Raises:
            NonFiniteError: A gradient was NaN or Inf.
        """
        return self.pairs()[0].block(self.dtype)


def _reduced(uses: Sequence[OuterGradients]) -> Iterator[OuterGradients]:
    """Yield uses with one position each: the sum of the cotangents, and the mean of what they multiply.

    Entries that are looked up stay as they are, their mean is taken where they are counted.
    """
    for swapped in dict.fromkeys(use.swapped for use in uses):
        alike = [use for use in uses if use.swapped == swapped]
        looks_up = alike[0].looks_up
        left = torch.cat([use.left for use in alike], 1 if looks_up else 2)
        right = torch.cat([use.right for use in alike], 2)
        if swapped:
            yield OuterGradients(left if looks_up else left.mean(2, keepdim=True), right.sum(2, keepdim=True), True)
        else:
            yield OuterGradients(left.sum(2, keepdim=True), right.mean(2, keepdim=True))


def not_finite(name: str) -> NonFiniteError:
    """Return the error for a parameter with gradients that are not finite."""
    return NonFiniteError(f"EKFAC: in the gradients by {name}, some are NaN or Inf. Look at the data.")


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)


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
