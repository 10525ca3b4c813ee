"""Rows of a curvature matrix for parameters that no layer describes, by ordinary sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._cached import cached_property
from ..._runtime.chunks import ROWS
from ..._runtime.memory import Meter
from ..._runtime.restoring import restoring
from ..._space import Space
from ..layers.blocks import ENTRIES
from ..sweeps.linearization import Linearization
from .by_layers import Rows


@dataclass(eq=False)
class ByProducts:
    """Parameters whose rows take products.

    Attributes:
        lin: By which parameters.
        rows: Products with the curvature.
        lost: The parameters, as parts of the flat vector.
    """

    lin: Linearization
    rows: Rows
    lost: list[slice]

    @classmethod
    def beside(cls, lin: Linearization, described: Set[int], rows: Rows) -> ByProducts:
        """Return the parameters that are not among those described."""
        slices = enumerate(lin.domain.slices)
        return cls(lin, rows, [w for i, w in slices if i not in described and w.stop > w.start])

    @property
    def many(self) -> int:
        """How many parameters these are."""
        return sum(where.stop - where.start for where in self.lost)

    def add(self, matrix: Tensor, weight: float, most: int) -> str:
        """Add a half of their rows and columns times a weight; say how many there were."""
        share = torch.full((self.lin.domain.dim,), weight, dtype=matrix.dtype, device=matrix.device)
        for where in self.lost:
            share[where] *= 0.5
        for some in self._rounds(most):
            matrix[some] += self._products(some) * share
        return self._description

    def add_diagonal(self, diagonal: Tensor, most: int) -> str:
        """Add their entries of the diagonal; say how many there were."""
        for some in self._rounds(most):
            diagonal[some] += self._products(some)[:, some].diagonal()
        return self._description

    def working(self, most: int) -> float:
        """Return the bytes held where an array may hold `most` numbers."""
        if not self.lost:
            return 0.0
        fixed, each = self._measured
        return fixed + each * min(_step(most), max(where.stop - where.start for where in self.lost))

    @property
    def _description(self) -> str:
        return f"; {self.many} of {self.lin.domain.dim} parameters by ordinary sweeps" if self.lost else ""

    def _rounds(self, most: int) -> Iterator[slice]:
        """Yield rows that go into one pass."""
        step = _step(most)
        for where in self.lost:
            for start in range(where.start, where.stop, step):
                yield slice(start, min(start + step, where.stop))

    @cached_property
    def _measured(self) -> tuple[float, float]:
        space = self.lin.domain
        fixed, each = measured(self.rows, space)
        return fixed, each + space.dim * space.dtype.itemsize  # a second one, multiplied by its share

    def _products(self, some: slice) -> Tensor:
        return self.rows(self.lin.domain.units(some))


@restoring
def measured(products: Rows, space: Space) -> tuple[float, float]:
    """Return bytes that do not depend on the number of rows in a pass of products, and bytes that each row adds."""
    peaks = []
    for many in (1, 1, 2):  # what the first product sets up for all is no part of the others
        with Meter() as meter:
            found = products(space.units(slice(0, min(many, space.dim))))
            peaks.append(meter.peak)
            del found
    each = max(peaks[2] - peaks[1], 1)
    return float(max(0, peaks[0] - each)), float(each)


def _step(most: int) -> int:
    """Return how many rows go into a pass."""
    return max(1, min(ROWS, ROWS * most // ENTRIES))
