"""What is kept of influences that come block by block: the strongest of each test sample, or sums over groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._requirements import check_choice, check_positive
from .._words import Which
from ..errors import InputError

Block = tuple[slice, slice, Tensor]


def _keys(values: Tensor, which: Which) -> Tensor:
    """Return numbers that are the larger the further to the front their entries belong."""
    return values.abs() if which == "magnitude" else -values if which == "smallest" else values


@final
class Strongest:
    """The `k` strongest of every row so far; of equal ones those that came first.

    Args:
        shape: Of the whole matrix.
        k: How many.
        which: The largest, the smallest, or the largest in magnitude.

    Raises:
        InputError: There are fewer columns, or `which` is unknown.
    """

    def __init__(self, shape: tuple[int, int], k: int, which: Which) -> None:
        check_choice("which", which, Which)
        if check_positive("k", k) > shape[1]:
            raise InputError.of("k", k, f"there are {shape[1]} training samples")
        self.k = k
        self.which: Which = which
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, blocks: Iterable[Block]) -> tuple[Tensor, Tensor]:
        """Return values and indices `(n, k)` of what blocks hold, row ranges one after the other."""
        for rows, columns, block in blocks:
            indices = torch.arange(columns.start, columns.stop, device=block.device).expand_as(block)
            if rows.start in self._rows:
                values, before = self._rows[rows.start]
                block, indices = torch.cat([values, block], 1), torch.cat([before, indices], 1)
            order = _keys(block, self.which).sort(dim=1, descending=True, stable=True).indices[:, : self.k]
            self._rows[rows.start] = block.gather(1, order), indices.gather(1, order)
        parts = [self._rows[start] for start in sorted(self._rows)]
        return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])


@final
class Grouping:
    """Which training sample belongs to which group.

    Args:
        groups: One label for each training sample: whole numbers or strings.
        count: Training samples.

    Attributes:
        names: The labels in order.
        codes: The place of each sample's label among them, `(count,)`.

    Raises:
        InputError: They are more or fewer, or no labels.
    """

    def __init__(self, groups: Any, count: int) -> None:
        labels = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
        if labels.shape != (count,) or labels.dtype.kind not in "iubUS":
            came = f"of shape {labels.shape} and type {labels.dtype}"
            raise InputError.of("groups", came, f"one whole number or string for each of {count} training samples")
        found, codes = np.unique(labels, return_inverse=True)
        self.names: list[Any] = found.tolist()
        self.codes = torch.from_numpy(codes.astype(np.int64))

    @property
    def counts(self) -> Tensor:
        """Samples of each group."""
        return self.codes.bincount(minlength=len(self.names))

    def sums(self, rows: int, blocks: Iterable[Block], shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums over the groups `(rows, groups)` of what blocks hold, plain and weighted by shares."""
        plain = weighted = torch.zeros(0)
        for where, columns, block in blocks:
            if not plain.numel():
                plain, weighted = (block.new_zeros(rows, len(self.names)) for _ in range(2))
            codes = self.codes[columns].to(block.device)
            plain[where].index_add_(1, codes, block)
            weighted[where].index_add_(1, codes, block * shares[columns].to(block))
        return plain, weighted


def cut(values: Tensor, step: int) -> Iterable[Block]:
    """Yield a matrix in blocks of `step` columns."""
    for start in range(0, values.shape[1], step):
        columns = slice(start, min(start + step, values.shape[1]))
        yield slice(0, len(values)), columns, values[:, columns]


def step_for(rows: int, each: int, most: int = 2**25) -> int:
    """Return how many columns of `rows` numbers of `each` bytes fit 32 MiB, a block that a far cache holds."""
    return max(1, most // max(1, rows * each))
