r"""Parts: one parameter's share of many rows of a Jacobian, kept as factors or as it is.

Rows belong to n samples with k outputs each. Where a weight enters by `z = W a` at T positions, the row for output k
of sample n is $\sum_t \delta_{nkt} a_{nt}^\top$ (Goodfellow, 2015): T (in + k out) numbers stand for k in out. What is
asked of rows is then asked of the factors, wherever that costs less than forming rows; else rows are formed some
columns at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, final

import torch
from torch import Tensor

from .part import RowFactors, norm_of_largest, slices, spread


@dataclass(frozen=True, eq=False)
class Products(RowFactors):
    """Sums over T positions of cotangents with what they met there, in g groups.

    Attributes:
        delta: Cotangents, `(n, k, T, g, out)`.
        operand: What they met: `(n, T, g, in)`, or the entries of a table that were looked up, `(n, T)`.
    """

    delta: Tensor
    operand: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The two factors."""
        return self.delta, self.operand

    def largest(self) -> float:
        """Bound the sum over positions."""
        return self.delta.shape[2] * norm_of_largest(self.delta) * self._largest_operand()

    @abstractmethod
    def _largest_operand(self) -> float:
        """Return a bound of what a cotangent is multiplied by."""

    def scaled(self, factors: Tensor) -> Self:
        """Scale the cotangents."""
        return replace(self, delta=self.delta * spread(factors, self.delta))

    @abstractmethod
    def _images(self, v: Tensor) -> Tensor:
        """Return operands times `v`, `(m, F, W)`, as `(n, m, T, g, out)`."""

    @abstractmethod
    def _add_images(self, total: Tensor, mixed: Tensor) -> None:
        """Add cotangents `(m, n, T, g, out)` times operands to `total`, `(m, F, W)` zeros."""

    @abstractmethod
    def _inner(self, some: slice) -> Tensor:
        """Return inner products of some samples' operands between positions, `(n, g, T, T)`."""

    def times(self, v: Tensor) -> Tensor:
        """Contract with the operand first, then with the cotangents."""
        n, k, positions, groups, out = self.delta.shape
        found = v.new_empty(v.shape[0], n, k)
        for some in slices(v.shape[0], n * positions * groups * out * v.element_size()):
            found[some] = torch.einsum("nmtgo,nktgo->mnk", self._images(v[some]), self.delta)
        return found

    def transposed(self, u: Tensor) -> Tensor:
        """Contract with the cotangents first, then with the operand."""
        n, _, positions, groups, out = self.delta.shape
        found = u.new_zeros(u.shape[0], *self.shape[2:])
        for some in slices(u.shape[0], n * positions * groups * out * u.element_size()):
            self._add_images(found[some], torch.einsum("mnk,nktgo->mntgo", u[some], self.delta))
        return found

    def sample_grams(self) -> Tensor:
        """Pair the positions of each sample."""
        n, k, positions, groups, _ = self.delta.shape
        found = self.like.new_empty(n, k, k)
        for some in slices(n, positions**2 * groups * (1 + k * k) * self.like.element_size()):
            pairs = torch.einsum("nktgo,nlsgo->nklgts", self.delta[some], self.delta[some])
            found[some] = torch.einsum("ngts,nklgts->nkl", self._inner(some), pairs)
        return found

    def squares(self) -> Tensor:
        """Pair the positions of each sample."""
        n, k, positions, groups, _ = self.delta.shape
        found = self.like.new_empty(n, k)
        for some in slices(n, positions**2 * groups * (1 + k) * self.like.element_size()):
            pairs = torch.einsum("nktgo,nksgo->nkgts", self.delta[some], self.delta[some])
            found[some] = torch.einsum("ngts,nkgts->nk", self._inner(some), pairs)
        return found


@final
@dataclass(frozen=True, eq=False)
class Outer(Products):
    """Sums of outer products; over no positions for a parameter that enters nowhere.

    Attributes:
        turned: The parameter is `(g in, out)` instead of `(g out, in)`.
        long: Length of the parameter's first axis, where that is another.
    """

    turned: bool = False
    long: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the rows."""
        rows, columns = self._sizes
        long = self.long or rows
        return *self.delta.shape[:2], long, rows * columns // max(1, long)  # pyright: ignore[reportReturnType]

    @property
    def _sizes(self) -> tuple[int, int]:
        """Of the matrix whose groups lie one below the other."""
        (groups, out), inner = self.delta.shape[3:], self.operand.shape[3]
        return (groups * inner, out) if self.turned else (groups * out, inner)

    @property
    def is_matrix(self) -> bool:
        """The parameter's first axis is that of the matrix."""
        return self.long in (0, self._sizes[0])

    @property
    def _plain(self) -> bool:
        """One position, one group: a row is one outer product."""
        return self.delta.shape[2] == self.delta.shape[3] == 1

    def block(self, first: slice) -> Tensor:
        """Form some of the entries."""
        (_, _, long, wide), (rows, columns) = self.shape, self._sizes
        if long == rows:
            return self._block(first)
        start, stop = first.start * wide, first.stop * wide
        some = slice(start // max(1, columns), -(-stop // max(1, columns)))
        formed, before = self._block(some).flatten(2), some.start * columns
        return formed[:, :, start - before : stop - before].unflatten(2, (-1, wide))

    def _block(self, first: slice) -> Tensor:
        if self._plain:
            left, right = self._sides()
            return left[:, :, first].unsqueeze(3) * right.unsqueeze(2)
        if self.delta.shape[3] == 1:
            if self.turned:
                return self._product(self.delta[:, :, :, 0], self.operand[:, :, 0, first]).mT
            return self._product(self.delta[:, :, :, 0, first], self.operand[:, :, 0])
        each = self._sizes[0] // self.delta.shape[3]
        groups = slice(first.start // each, -(-first.stop // each))
        delta, operand = self.delta[:, :, :, groups], self.operand[:, :, groups]
        formed = torch.einsum(f"nktgo,ntgi->nkg{'io' if self.turned else 'oi'}", delta, operand).flatten(2, 3)
        return formed[:, :, first.start - groups.start * each : first.stop - groups.start * each]

    @staticmethod
    def _product(delta: Tensor, operand: Tensor) -> Tensor:
        """Return `(n, k, out, in)`, all cotangents of a sample in one product of matrices."""
        n, k, positions, out = delta.shape
        left = delta.permute(0, 1, 3, 2).reshape(n, k * out, positions)
        return torch.bmm(left, operand).view(n, k, out, operand.shape[2])

    def _sides(self) -> tuple[Tensor, Tensor]:
        """Return the first and the second factor of a single outer product, `(n, k, F)` and `(n, k, W)`."""
        delta, operand = self.delta[:, :, 0, 0], self.operand[:, 0].expand(-1, self.delta.shape[1], -1)
        return (operand, delta) if self.turned else (delta, operand)

    def into(self, target: Tensor, add: bool = False) -> None:
        """Write single outer products in place."""
        if not self._plain:
            super().into(target, add)
            return
        left, right = self._sides()
        target = target.view(*target.shape[:2], *self._sizes)
        if add:
            target.addcmul_(left.unsqueeze(3), right.unsqueeze(2))
        else:
            torch.mul(left.unsqueeze(3), right.unsqueeze(2), out=target)

    def _grouped(self, v: Tensor) -> Tensor:
        """Return `(m, F, W)` as `(m, g, out, in)`."""
        grouped = v.reshape(v.shape[0], self.delta.shape[3], -1, self._sizes[1])
        return grouped.mT if self.turned else grouped

    def _contracts(self, many: int) -> bool:
        """Return whether m products are cheaper by factors than by rows."""
        k, positions = self.delta.shape[1:3]
        if positions == 1:  # the same arithmetic either way: what counts is how much is written on the way
            return 2 * many <= k * self.operand.shape[3]
        return positions * many <= positions * k + k * many

    def _largest_operand(self) -> float:
        return norm_of_largest(self.operand)

    def _images(self, v: Tensor) -> Tensor:
        return torch.einsum("ntgi,mgoi->nmtgo", self.operand, self._grouped(v))

    def _add_images(self, total: Tensor, mixed: Tensor) -> None:
        self._grouped(total).copy_(torch.einsum("mntgo,ntgi->mgoi", mixed, self.operand))

    def _inner(self, some: slice) -> Tensor:
        return torch.einsum("ntgi,nsgi->ngts", self.operand[some], self.operand[some])

    def times(self, v: Tensor) -> Tensor:
        """Return products by factors, or by rows where those are cheaper."""
        return super().times(v) if self._contracts(v.shape[0]) else RowFactors.times(self, v)

    def transposed(self, u: Tensor) -> Tensor:
        """Return sums by factors, or by rows where those are cheaper."""
        return super().transposed(u) if self._contracts(u.shape[0]) else RowFactors.transposed(self, u)

    def gram(self) -> Tensor:
        """Multiply Gram matrices of the factors entry by entry, for every pair of positions, where that is cheaper."""
        n, k, positions, groups, out = self.delta.shape
        inner = self.operand.shape[3]
        pairs = positions**2 * (inner + k * k * (out + 1)) * groups
        if positions > 1 and pairs > k * k * groups * out * inner:
            return RowFactors.gram(self)
        if positions == 1:
            return self._gram_of_products()
        total = self.like.new_zeros(n, k, n, k)
        each = n * positions**2 * (1 + k * k) * self.like.element_size()
        for some in slices(n, each):
            for g in range(groups):
                left = torch.einsum("ati,bsi->abts", self.operand[some, :, g], self.operand[:, :, g])
                right = torch.einsum("akto,blso->akblts", self.delta[some, :, :, g], self.delta[:, :, :, g])
                total[some] += right.mul_(left[:, None, :, None]).sum((4, 5))
        return total.view(n * k, n * k)

    def sample_grams(self) -> Tensor:
        """Pair positions, or form rows where that is cheaper."""
        k, positions, _, out = self.delta.shape[1:]
        inner = self.operand.shape[3]
        pairs, rows = positions**2 * (inner + k * k * (out + 1)), k * out * inner * (positions + k)
        return super().sample_grams() if pairs <= rows else RowFactors.sample_grams(self)

    def _gram_of_products(self) -> Tensor:
        n, k, _, groups, _ = self.delta.shape
        total: Tensor | None = None
        for g in range(groups):
            left, right = self.operand[:, 0, g], self.delta[:, :, 0, g].flatten(0, 1)
            product = right @ right.T
            product.view(n, k, n, k).mul_((left @ left.T)[:, None, :, None])
            total = product if total is None else total.add_(product)
        return self.like.new_zeros(n * k, n * k) if total is None else total

    @cached_property
    def delta_squares(self) -> Tensor:
        """Sums of the squared cotangents `(n, g, out)` at the first position, over outputs."""
        return self.delta[:, :, 0].square().sum(1)

    def column_squares(self) -> Tensor:
        """Multiply the squares, where there is one position."""
        if self.delta.shape[2] != 1:
            return RowFactors.column_squares(self)
        by_group = torch.einsum("ngo,ngi->goi", self.delta_squares, self.operand[:, 0].square())
        return (by_group.mT if self.turned else by_group).reshape(self.shape[2:])


@final
@dataclass(frozen=True, eq=False)
class Lookup(Products):
    """Cotangents, in one group, added to the entries of a table that were looked up.

    Attributes:
        entries: How many the table has.
    """

    entries: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the rows."""
        n, k, _, _, width = self.delta.shape
        return n, k, self.entries, width

    def _largest_operand(self) -> float:
        return 1.0

    def _images(self, v: Tensor) -> Tensor:
        return v[:, self.operand].transpose(0, 1).unsqueeze(3)

    def _add_images(self, total: Tensor, mixed: Tensor) -> None:
        total.index_add_(1, self.operand.flatten(), mixed[:, :, :, 0].flatten(1, 2))

    def _inner(self, some: slice) -> Tensor:
        indices = self.operand[some]
        return (indices[:, None, :, None] == indices[:, None, None]).to(self.delta.dtype)

    def into(self, target: Tensor, add: bool = False) -> None:
        """Add to what was looked up, in place."""
        if not add:
            target.zero_()
        delta = self.delta[:, :, :, 0]
        target.scatter_add_(2, self.operand[:, None, :, None].expand_as(delta), delta)

    def block(self, first: slice) -> Tensor:
        """Form some of the entries; what falls outside goes to a row that is cut off."""
        n, k, _, width = self.shape
        many = first.stop - first.start
        inside = (self.operand >= first.start) & (self.operand < first.stop)
        where = torch.where(inside, self.operand - first.start, many)
        rows = self.delta.new_empty(n, k, many + 1, width)
        Lookup(self.delta, where, many + 1).into(rows)
        return rows[:, :, :many]

    def _compact(self) -> tuple[Tensor, Lookup]:
        """Return the entries that were looked up at all, and the same rows over these alone."""
        used, indices = self.operand.unique(return_inverse=True)
        return used, Lookup(self.delta, indices, used.shape[0])

    def gram(self) -> Tensor:
        """Form the entries that were looked up."""
        return RowFactors.gram(self._compact()[1])

    def column_squares(self) -> Tensor:
        """Form the entries that were looked up."""
        used, compact = self._compact()
        found = self.like.new_zeros(self.shape[2:])
        found[used] = RowFactors.column_squares(compact)
        return found


@final
@dataclass(frozen=True, eq=False)
class Several(RowFactors):
    """A parameter that enters in several places: the sum of what each contributes.

    Attributes:
        uses: One part for each place.
    """

    uses: Sequence[RowFactors]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the rows."""
        return self.uses[0].shape

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Those of all places."""
        return [tensor for use in self.uses for tensor in use.tensors]

    def largest(self) -> float:
        """Add up."""
        return sum(use.largest() for use in self.uses)

    def scaled(self, factors: Tensor) -> Several:
        """Scale all places."""
        return Several([use.scaled(factors) for use in self.uses])

    def block(self, first: slice) -> Tensor:
        """Add up."""
        total = self.uses[0].block(first)
        for use in self.uses[1:]:
            total = total + use.block(first)
        return total

    def times(self, v: Tensor) -> Tensor:
        """Add up."""
        return torch.stack([use.times(v) for use in self.uses]).sum(0)

    def transposed(self, u: Tensor) -> Tensor:
        """Add up."""
        return torch.stack([use.transposed(u) for use in self.uses]).sum(0)
