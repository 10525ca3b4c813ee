"""One parameter's share of many rows: computations some columns at a time, and rows kept as they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

WRITTEN = 2**23  # bytes formed elsewhere before they are written: 8 MiB, which a far cache holds
# Where a product reads what is formed once: 2 MiB stay in a near cache, and memory that was just freed holds them; of
# 500 rows of 4,160, forming took 3 ms at once, as long as a third of the product, and 0.5 in pieces. A product with
# fewer columns than 512 at a time is slower than those of all.
_NEAR, _DEEP = 2**21, 512
_TEMPORARY = 2**25  # bytes that a temporary may take (below `memory.SMALL` nothing is planned), or as much as is held


def slices(total: int, each: int, most: int | None = None) -> Iterator[slice]:
    """Yield ranges over `total` things of `each` bytes that stay within the bytes of a temporary."""
    step = max(1, (most or _TEMPORARY) // max(1, each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


class RowFactors(ABC):
    """One parameter's share of all rows.

    The parameter is seen as a matrix `(F, W)`: its first axis, and the others laid end to end.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """Samples n, outputs k of each, F and W."""

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the entries."""
        return self.tensors[0]

    @property
    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """What is held."""

    @abstractmethod
    def largest(self) -> float:
        """Return a bound of the entries' absolute values; NaN where one is NaN."""

    @abstractmethod
    def scaled(self, factors: Tensor) -> RowFactors:
        """Return the same with the rows of each sample times a number, `(n,)`."""

    @abstractmethod
    def block(self, first: slice) -> Tensor:
        """Return the rows' entries `(n, k, f, W)` for some of the parameter's first axis."""

    def into(self, target: Tensor, add: bool = False) -> None:
        """Write all rows, or add them, into `(n, k, F, W)`."""
        for first in self._firsts(min(WRITTEN, _TEMPORARY)):
            (target[:, :, first].add_ if add else target[:, :, first].copy_)(self.block(first))

    def times(self, v: Tensor) -> Tensor:
        """Return products `(m, n, k)` of the rows with `v`, `(m, F, W)`."""
        n, k, _, _ = self.shape
        total = v.new_zeros(v.shape[0], n * k)
        for first, rows in self._blocks(min(_TEMPORARY, max(_NEAR, _DEEP * n * k * self.like.element_size()))):
            total.addmm_(v[:, first].flatten(1), rows.T)
        return total.view(v.shape[0], n, k)

    def transposed(self, u: Tensor) -> Tensor:
        """Return sums `(m, F, W)` of the rows times `u`, `(m, n, k)`."""
        total = u.new_empty(u.shape[0], *self.shape[2:])
        for first, rows in self._blocks():
            total[:, first] = (u.flatten(1) @ rows).view(total[:, first].shape)
        return total

    def gram(self) -> Tensor:
        """Return inner products of all rows, `(n k, n k)`."""
        n, k, _, _ = self.shape
        total = self.like.new_zeros(n * k, n * k)
        for _, rows in self._blocks():
            total.addmm_(rows, rows.T)
        return total

    def sample_grams(self) -> Tensor:
        """Return inner products of each sample's own rows, `(n, k, k)`."""
        n, k, _, _ = self.shape
        total = self.like.new_zeros(n, k, k)
        for first in self._firsts():
            rows = self.block(first).flatten(2)
            total.baddbmm_(rows, rows.mT)
        return total

    def squares(self) -> Tensor:
        """Return squared norms of the rows, `(n, k)`."""
        n, k, _, _ = self.shape
        total = self.like.new_zeros(n * k)
        for _, rows in self._blocks():
            total += torch.linalg.vector_norm(rows, dim=1).square()
        return total.view(n, k)

    def column_squares(self) -> Tensor:
        """Return sums over rows of squared entries, `(F, W)`."""
        total = self.like.new_empty(self.shape[2:])
        for first, rows in self._blocks():
            total[first] = torch.linalg.vector_norm(rows, dim=0).square().view(total[first].shape)
        return total

    def _firsts(self, most: int | None = None) -> Iterator[slice]:
        n, k, long, wide = self.shape
        return slices(long, n * k * wide * self.like.element_size(), most)

    def _blocks(self, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield some of the columns at a time as matrices `(n k, f W)`."""
        n, k, _, wide = self.shape
        for first in self._firsts(most):
            yield first, self.block(first).reshape(n * k, (first.stop - first.start) * wide)


@final
@dataclass(frozen=True, eq=False)
class Rows(RowFactors):
    """The rows themselves.

    Attributes:
        rows: `(n, k, F, W)`.
    """

    rows: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the rows."""
        n, k, long, wide = self.rows.shape
        return n, k, long, wide

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The rows."""
        return (self.rows,)

    def largest(self) -> float:
        """Look at them."""
        return norm_of_largest(self.rows)

    def scaled(self, factors: Tensor) -> Rows:
        """Scale them."""
        return Rows(self.rows * spread(factors, self.rows))

    def block(self, first: slice) -> Tensor:
        """Return some of them."""
        return self.rows[:, :, first]

    def times(self, v: Tensor) -> Tensor:
        """One product of matrices."""
        n, k, _, _ = self.shape
        return (v.flatten(1) @ self.rows.reshape(n * k, v[:1].numel()).T).view(v.shape[0], n, k)

    def squares(self) -> Tensor:
        """Square them."""
        return torch.linalg.vector_norm(self.rows, dim=(2, 3)).square()  # a graph may keep the norms

    def column_squares(self) -> Tensor:
        """Square them."""
        return self.rows.square().sum((0, 1))


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the lengths of a parameter's first axis and of the others laid end to end, as `RowFactors` views it."""
    return shape[0] if shape else 1, shape[1:].numel()


def norm_of_largest(tensor: Tensor) -> float:
    """Return the largest absolute value in a tensor, 0 if it is empty."""
    return float(torch.linalg.vector_norm(tensor.detach(), math.inf)) if tensor.numel() else 0.0


def spread(factors: Tensor, like: Tensor) -> Tensor:
    """Return numbers `(n,)` with as many axes as another tensor."""
    return factors.to(like).view(-1, *[1] * (like.ndim - 1))
