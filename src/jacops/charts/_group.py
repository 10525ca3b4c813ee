"""Charts of groups, with their arguments checked."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import Chart


@dataclass(frozen=True, repr=False)
class GroupChart(Chart):
    r"""A group chart with left multiplication: $X \leftarrow \exp(d)\,X$.

    All methods are batched over leading axes, which must agree exactly, and differentiable to any order.

    Attributes:
        space: Dimension of the points that it moves.
    """

    space: int

    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        r"""Return $\exp(d)\,X$: elements `(*, storage)` moved by tangent vectors `(*, tangent)`.

        Raises:
            InputError: A width or a leading axis does not fit.

        Example:
            >>> from jacops.charts import SE2
            >>> SE2.retract(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0]))
            tensor([1., 2., 0.])
        """
        self._check(x=x)
        self._check_like(x, d=d, width=self.tangent)
        return self.normalize(self._compose(self._exp(d), x))

    def local(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return the step that leads from `x` to `y`, $\log(Y X^{-1})$; `retract(x, step)` is `y`."""
        self._check(x=x, y=y)
        return self._log(self._compose(y, self._inverse(x)))

    def exp(self, d: Tensor) -> Tensor:
        """Return elements `(*, storage)` from tangent vectors `(*, tangent)`."""
        self._check_width("d", d, self.tangent)
        return self._exp(d)

    def log(self, x: Tensor) -> Tensor:
        """Return tangent vectors `(*, tangent)` from elements `(*, storage)`; angles lie in [-pi, pi]."""
        self._check(x=x)
        return self._log(x)

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a b`: first `b`, then `a`."""
        self._check(a=a, b=b)
        return self._compose(a, b)

    def inverse(self, x: Tensor) -> Tensor:
        """Return the inverse elements."""
        self._check(x=x)
        return self._inverse(x)

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        r"""Return $A^{-1} B$: `b` relative to `a`."""
        self._check(a=a, b=b)
        return self._between(a, b)

    def edge_error(self, expected: Tensor, a: Tensor, b: Tensor) -> Tensor:
        r"""Return $\log(Z^{-1} A^{-1} B)$, the residual of an edge of a pose graph, as tangent vectors `(*, tangent)`.

        It is `log(compose(expected, between(a, b)))` in fewer operations. Derivatives along the group are the same;
        those by numbers that lead off it (the length of a quaternion) may differ.

        Args:
            expected: The inverse of what was measured, $Z^{-1}$.
            a: Where the edge begins.
            b: Where it ends.

        Example:
            >>> from jacops.charts import SE2
            >>> a, b = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])
            >>> SE2.edge_error(SE2.inverse(torch.tensor([1.5, 0.0, 0.0])), a, b)
            tensor([0.5000, 0.0000, 0.0000])
        """
        self._check(expected=expected, a=a, b=b)
        return self._edge_error(expected, a, b)

    def act(self, x: Tensor, points: Tensor) -> Tensor:
        """Return points `(*, space)` turned and moved by elements `(*, storage)`."""
        self._check(x=x)
        self._check_like(x, points=points, width=self.space)
        return self._act(x, points)

    def matrix(self, x: Tensor) -> Tensor:
        """Return elements as matrices, rotations `(*, space, space)`, else homogeneous, one larger."""
        self._check(x=x)
        return self._matrix(x)

    def identity(self, *shape: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """Return identity elements `(*shape, storage)`."""
        return self._exp(torch.zeros(*shape, self.tangent, dtype=dtype, device=device))

    @abstractmethod
    def _exp(self, d: Tensor) -> Tensor: ...

    @abstractmethod
    def _log(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _compose(self, a: Tensor, b: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _act(self, x: Tensor, p: Tensor) -> Tensor: ...

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        return self._compose(self._inverse(a), b)

    def _edge_error(self, expected: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self._log(self._compose(expected, self._between(a, b)))

    def _matrix(self, x: Tensor) -> Tensor:
        moved = self._act(x, x.new_zeros(*x.shape[:-1], self.space))
        top = torch.cat([self._linear(x) - moved.unsqueeze(-1), moved.unsqueeze(-1)], -1)
        last = torch.zeros_like(top[..., :1, :])
        last[..., -1] = 1
        return torch.cat([top, last], -2)

    def _linear(self, x: Tensor) -> Tensor:
        """Return where the axes go, as columns."""
        axes = torch.eye(self.space, dtype=x.dtype, device=x.device)
        return torch.stack([self._act(x, axis.expand(*x.shape[:-1], -1)) for axis in axes], -1)
