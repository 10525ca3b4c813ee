"""Charts side by side in one last axis, and ordinary numbers to stand beside others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final, overload

import torch
from torch import Tensor

from .._keywords import keywords
from .._requirements import check_positive
from ..errors import InputError, InputTypeError
from ._base import Chart
from ._group import GroupChart


@final
@dataclass(frozen=True, repr=False)
class _Numbers(GroupChart):
    def magnitudes(self, x: Tensor) -> Tensor:
        return x.abs()

    def storage_jacobian(self, x: Tensor) -> Tensor:
        return torch.eye(self.tangent, dtype=x.dtype, device=x.device).expand(*x.shape, -1)

    def _exp(self, d: Tensor) -> Tensor:
        return d.clone()

    def _log(self, x: Tensor) -> Tensor:
        return x.clone()

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def _inverse(self, x: Tensor) -> Tensor:
        return -x

    def _act(self, x: Tensor, p: Tensor) -> Tensor:
        return x + p


@keywords()
def R(n: int) -> GroupChart:  # noqa: N802 - the name of the group
    """Return the chart of vectors of `n` numbers, with addition as the retraction.

    Args:
        n: How many.

    Returns:
        A chart of width `n`, whose points are `n` numbers.

    Raises:
        InputError: It is not positive.

    Example:
        >>> R(2).retract(torch.ones(1, 2), torch.tensor([[1.0, -1.0]]))
        tensor([[2., 0.]])
    """
    check_positive("n", n)
    return _Numbers(f"R({n})", n, n, n)


def _pieces(x: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    return x.split(list(widths), -1)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Return matrices `(*, m, n)` as one of blocks along the diagonal."""
    width, done, rows = sum(b.shape[-1] for b in blocks), 0, []
    for block in blocks:
        here = done + block.shape[-1]
        rows.append(torch.nn.functional.pad(block, (done, width - here)))
        done = here
    return torch.cat(rows, -2)


@dataclass(frozen=True, repr=False)
class _Charts(Chart):
    parts: tuple[Chart, ...]

    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        self._check(x=x)
        self._check_like(x, d=d, width=self.tangent)
        pieces = zip(self.parts, self._of_storage(x), self._of_tangent(d), strict=True)
        return torch.cat([part.retract(own, step) for part, own, step in pieces], -1)

    def local(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x=x, y=y)
        pieces = zip(self.parts, self._of_storage(x), self._of_storage(y), strict=True)
        return torch.cat([part.local(own, other) for part, own, other in pieces], -1)

    def storage_jacobian(self, x: Tensor) -> Tensor:
        return _block_diagonal([part.storage_jacobian(own) for part, own in self._parts_of(x)])

    def normalize(self, x: Tensor) -> Tensor:
        return torch.cat([part.normalize(own) for part, own in self._parts_of(x)], -1)

    def magnitudes(self, x: Tensor) -> Tensor:
        return torch.cat([part.magnitudes(own) for part, own in self._parts_of(x)], -1)

    def check(self, x: Any, argument: str = "x") -> None:
        super().check(x, argument)
        for part, own in self._parts_of(x):
            part.check(own, argument)

    def _of_storage(self, x: Tensor) -> Sequence[Tensor]:
        return _pieces(x, [part.storage for part in self.parts])

    def _of_tangent(self, d: Tensor) -> Sequence[Tensor]:
        return _pieces(d, [part.tangent for part in self.parts])

    def _parts_of(self, x: Tensor) -> list[tuple[Chart, Tensor]]:
        return list(zip(self.parts, self._of_storage(x), strict=True))


@final
@dataclass(frozen=True, repr=False)
class _GroupCharts(_Charts, GroupChart):
    parts: tuple[GroupChart, ...]

    def _exp(self, d: Tensor) -> Tensor:
        return torch.cat([part._exp(own) for part, own in zip(self.parts, self._of_tangent(d), strict=True)], -1)

    def _log(self, x: Tensor) -> Tensor:
        return torch.cat([part._log(own) for part, own in self._groups_of(x)], -1)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        pieces = zip(self._groups_of(a), self._of_storage(b), strict=True)
        return torch.cat([part._compose(own, other) for (part, own), other in pieces], -1)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.cat([part._inverse(own) for part, own in self._groups_of(x)], -1)

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        pieces = zip(self._groups_of(a), self._of_storage(b), strict=True)
        return torch.cat([part._between(own, other) for (part, own), other in pieces], -1)

    def _act(self, x: Tensor, p: Tensor) -> Tensor:
        points = _pieces(p, [part.space for part in self.parts])
        pieces = zip(self._groups_of(x), points, strict=True)
        return torch.cat([part._act(own, point) for (part, own), point in pieces], -1)

    def _matrix(self, x: Tensor) -> Tensor:
        return _block_diagonal([part._matrix(own) for part, own in self._groups_of(x)])

    def _groups_of(self, x: Tensor) -> list[tuple[GroupChart, Tensor]]:
        return list(zip(self.parts, self._of_storage(x), strict=True))


@overload
def Product(*charts: GroupChart) -> GroupChart: ...
@overload
def Product(*charts: Chart) -> Chart: ...
@keywords()
def Product(*charts: Chart) -> Chart:  # noqa: N802 - used like the names of charts
    """Return the chart of elements concatenated along the last axis, each with its own chart.

    Storage, tangents and points are those of the parts one after the other. Where all parts are groups the result is
    their direct product; its matrices have a block for each part.

    Args:
        charts: At least one.

    Returns:
        A chart whose points and tangents are those of `charts`, one after the other.

    Raises:
        InputTypeError: One is no chart.
        InputError: There is none.

    Example:
        >>> from jacops.charts import R, SE2, Product
        >>> pose_and_scale = Product(SE2, R(1))
        >>> pose_and_scale, pose_and_scale.storage, pose_and_scale.tangent
        (Product(SE2, R(1)), 4, 4)
        >>> pose_and_scale.retract(torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 0.0, 1.0]))
        tensor([1., 2., 0., 6.])
    """
    if not charts:
        raise InputError.of("charts", "empty", "at least one chart is needed")
    for chart in charts:
        if not isinstance(chart, Chart):
            raise InputTypeError.of("charts", f"{chart!r}", "charts such as jacops.charts.SE3 are needed")
    name = f"Product({', '.join(map(repr, charts))})"
    storage, tangent = sum(c.storage for c in charts), sum(c.tangent for c in charts)
    groups = tuple(c for c in charts if isinstance(c, GroupChart))
    if len(groups) == len(charts):
        return _GroupCharts(name, storage, tangent, sum(g.space for g in groups), groups)
    return _Charts(name, storage, tangent, charts)
