r"""Sums over samples that make a Kronecker-factored curvature: factors first, eigenvalues in a second pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._operators._eigen_blocks import Block, Form
from .._torch.protocol import OuterGradients
from ..errors import NonFiniteError
from ._running_sums import Running, SideSum, squares


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
    if side.ndim == 2:
        return side, None
    try:
        values, basis = torch.linalg.eigh(side)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # In single precision LAPACK gives up on some matrices with close eigenvalues.
        values, basis = torch.linalg.eigh(side.double())
    return values.to(side), basis.to(side)


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
        self._factors: dict[bool, tuple[SideSum, SideSum]] = {}
        self._counts: dict[bool, float] = {}
        self._bases: tuple[Tensor | None, Tensor | None] | None = None
        self._squares = Running()
        self.dtype = torch.float64

    def add(self, uses: Any, factor: float, share: float) -> None:
        """Add a batch to the factors.

        Args:
            uses: The gradients of the batch.
            factor: With which the batch enters the whole.
            share: 1 for the first of the batch's cotangents, 0 for others: what they multiply is added once.
        """
        for use in _reduced(uses) if self.basis.reduced else uses:
            self.dtype = use.right.dtype
            sides = self._factors.setdefault(use.swapped, (SideSum(self.basis.widest), SideSum(self.basis.widest)))
            (self._add_weighted if self.basis.weighted else self._add_plain)(sides, use, factor, share)
            counted = share * math.prod(use.right.shape[1:3])
            self._counts[use.swapped] = self._counts.get(use.swapped, 0.0) + counted

    def times(self, factor: float) -> OuterSums:
        """Return the statistics of the curvature times a number, none of which is corrected."""
        other = self._empty()
        for swapped, (left, right) in self._factors.items():
            scaled = [factor if self.basis.weighted or side == swapped else 1.0 for side in (False, True)]
            other._factors[swapped] = left.times(scaled[0]), right.times(scaled[1])  # the cotangents' side
        other._counts = dict(self._counts)
        return other

    def plus(self, other: OuterSums) -> OuterSums:
        """Return the statistics of both data sets together."""
        total = self.times(1.0)
        for swapped, (left, right) in other._factors.items():
            own = total._factors.get(swapped)
            total._factors[swapped] = (left, right) if own is None else (own[0].plus(left), own[1].plus(right))
            total._counts[swapped] = total._counts.get(swapped, 0.0) + other._counts[swapped]
        return total

    def _empty(self) -> OuterSums:
        other = OuterSums(self.where, self.names, self.turned, self.rows, self.basis)
        other.dtype = self.dtype
        return other

    def _add_plain(self, sides: tuple[SideSum, SideSum], use: OuterGradients, factor: float, share: float) -> None:
        (left, right), once = sides, share or not sides[not use.swapped].strips
        if not use.swapped or once:
            weight = share if use.swapped else factor
            if use.looks_up:
                left.add_diagonal(self._counted(use.left), weight)
            else:
                left.add(_rows(use.left), weight)
        if use.swapped or once:
            right.add(_rows(use.right), factor if use.swapped else share)

    def _add_weighted(self, sides: tuple[SideSum, SideSum], use: OuterGradients, factor: float, share: float) -> None:
        """Add with every row weighted by the size of what it meets on the other side."""
        size = use.right.square().sum((0, -1), keepdim=True)
        if use.looks_up:
            sides[0].add_diagonal(self._counted(use.left, size.flatten(1)), factor)
            sides[1].add(_rows(use.right), factor)
            return
        other = use.left.square().sum((0, -1), keepdim=True)
        sides[0].add(_rows(use.left * size.sqrt()), factor)
        sides[1].add(_rows(use.right * other.sqrt()), factor)

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

    def _joined(self) -> tuple[SideSum, SideSum, tuple[float, float]]:
        """Return both sides' sums, and by what each has to be multiplied.

        Of a weight that enters in two ways they are those that keep the trace of the sum.
        """
        sizes = {swapped: self._size(swapped) for swapped in self._factors}
        if len(sizes) == 1:
            ((swapped, (left, right)),) = self._factors.items()
            whole = 1 / sizes[swapped]
            return left, right, (whole, 1.0) if swapped else (1.0, whole)
        weights = [[side.trace() / sizes[way] for side in own] for way, own in self._factors.items()]
        (left, right), *others = self._factors.values()
        left, right = left.times(weights[0][1]), right.times(weights[0][0])
        for own, weight in zip(others, weights[1:], strict=True):
            left, right = left.plus(own[0].times(weight[1])), right.plus(own[1].times(weight[0]))
        return left, right, (1.0, 1 / max(left.trace(), self._tiny))

    def pair(self, separate: bool = False) -> Pair:
        """Return the factors of the weight, and of its bias as its last column unless that is `separate`."""
        left, right, (p, q) = self._joined()
        where = self.where[:1] if separate else self.where
        other = right.matrix(q, len(self.where) - len(where))
        return Pair(where, self.names[0], left.matrix(p), other, self.turned)

    def owners(self, separate: bool = False) -> tuple[str, ...]:
        """Return the names of parameters with factors of their own."""
        return self.names if separate else self.names[:1]

    def pair_of(self, name: str, separate: bool = False) -> Pair:
        """Return the factors of the weight, with its bias or without, or of the bias."""
        if name == self.names[0]:
            return self.pair(separate)
        left, right, (p, q) = self._joined()
        return Pair(self.where[1:], name, left.matrix(p), right.last(q), self.turned)

    def running(self) -> list[Running]:
        """Return the sums that are over samples, in an order that does not depend on these."""
        return [s for _, own in sorted(self._factors.items()) for side in own for s in side.strips] + [self._squares]

    def parts(self) -> list[Tensor]:
        """Return the tensors that sums over ranks add up."""
        counts = torch.tensor([self._counts[way] for way in sorted(self._factors)], dtype=torch.float64)
        return [part for own in self.running() for part in own.parts()] + [counts]

    def take(self, parts: Iterator[Tensor]) -> None:
        """Replace the tensors that `parts` returns."""
        for own in self.running():
            own.take(parts)
        self._counts |= dict(zip(sorted(self._factors), next(parts).tolist(), strict=True))

    def settle(self, leading: Callable[[list[Tensor]], list[Tensor]] = list) -> None:
        """Find the eigenbases, of each side's sum, and drop the sums; `leading` chooses those that all ranks take."""
        pair, self._factors = self.pair(), {}
        found = [_eigen(side, pair.name)[1] for side in (pair.left, pair.right)]
        taken = iter(leading([basis for basis in found if basis is not None]))
        left, right = (None if basis is None else next(taken) for basis in found)
        self._bases = left, right

    @property
    def _tiny(self) -> float:
        return torch.finfo(self.dtype).tiny

    def _size(self, swapped: bool) -> float:
        """Return what the product of two factors is divided by."""
        size = self._factors[swapped][0].trace() if self.basis.weighted else self._counts[swapped]
        return max(size, self._tiny)

    def correct(self, uses: Any, factor: float) -> None:
        """Add the squares of a batch's gradients in the eigenbasis, sample by sample (George et al., 2018)."""
        left, right = self._bases or (None, None)
        turned = [
            OuterGradients(
                use.left if use.looks_up else _rotated(use.left, left), _rotated(use.right, right), use.swapped
            )
            for use in uses
        ]
        if turned:
            found = self._looked_up(turned) if turned[0].looks_up else squares(turned)
            self._squares.add(found, factor)

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
        if self._bases is None:
            return self.pair().block(self.dtype)
        return Block(self.where, *self._bases, self._squares.value().clamp_min_(0), self.turned)


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
        self._sum = SideSum(where[0].stop - where[0].start if whole else 0)

    def add(self, rows: Any, factor: float, share: float) -> None:
        """Add rows `(k, n, entries)`."""
        self.dtype = rows.dtype
        self._sum.add(rows.flatten(0, 1).unsqueeze(0), factor)

    def parts(self) -> list[Tensor]:
        """Return the tensors that sums over ranks add up."""
        return [part for strip in self._sum.strips for part in strip.parts()]

    def take(self, parts: Iterator[Tensor]) -> None:
        """Replace the tensors that `parts` returns."""
        for strip in self._sum.strips:
            strip.take(parts)

    def times(self, factor: float) -> RowSums:
        """Return the statistics of the curvature times a number."""
        return self._with(self._sum.times(factor))

    def plus(self, other: RowSums) -> RowSums:
        """Return the statistics of both data sets together."""
        return self._with(self._sum.plus(other._sum))

    def _with(self, total: SideSum) -> RowSums:
        other = RowSums(self.where, self.names, self.whole)
        other.dtype, other._sum = self.dtype, total
        return other

    def owners(self, separate: bool = False) -> tuple[str, ...]:
        """Return the name of the parameter."""
        return self.names

    def pair_of(self, name: str, separate: bool = False) -> Pair:
        """Return the curvature itself, times one."""
        total = self._sum.matrix()
        return Pair(self.where, name, total.new_ones(1, 1), total, turned=True, form=self.form)

    def block(self) -> Block:
        """Return what is known.

        Raises:
            NonFiniteError: A gradient was NaN or Inf.
        """
        return self.pair_of(self.names[0]).block(self.dtype)


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
    return NonFiniteError(f"EKFAC: in the gradients by {name}, some are NaN or Inf. Check the data.")


def _rows(side: Tensor) -> Tensor:
    """Return `(b, g, r, p)`, what a factor is the sum of squares of, over parts b with r rows each.

    One part where rows stand in one run; sample by sample where only positions do, as those of images, and channels
    are fewer than these, so that products of samples are smaller than copies; else what has to be copied is so.
    """
    (_, n, t, g, p), strides = side.shape, side.stride()
    if g == 1 and side.is_contiguous():
        return side.view(1, 1, -1, p)
    if n > 1 and t >= p and strides[2] == 1 and strides[1] != t:
        return side.permute(0, 1, 3, 2, 4).flatten(0, 1)  # 8 times faster for 16 channels of 32 x 32 pixels
    return side.permute(3, 4, 0, 1, 2).flatten(2).mT.unsqueeze(0)


def _rotated(side: Tensor, basis: Tensor | None) -> Tensor:
    """Return `(k, n, t, g, p)` in the eigenbasis `(g, p, p)`."""
    if basis is None:
        return side
    return side @ basis[0] if basis.shape[0] == 1 else (side.unsqueeze(-2) @ basis).squeeze(-2)
