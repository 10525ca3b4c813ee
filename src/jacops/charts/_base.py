"""What every chart can do, with its arguments checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError


@dataclass(frozen=True)
class Chart(ABC):
    r"""A group whose elements are stored as `storage` numbers and move along `tangent` directions.

    All methods are batched over leading axes, which must agree exactly, and differentiable to any order.

    Attributes:
        name: What messages call it.
        storage: Numbers per element, the last axis of `x`.
        tangent: Directions per element, the last axis of `d`.
        space: Dimension of the points that it moves.
    """

    name: str
    storage: int
    tangent: int
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
        r"""Return $A^{-1} B$: `b` as seen from `a`."""
        self._check(a=a, b=b)
        return self._between(a, b)

    def act(self, x: Tensor, points: Tensor) -> Tensor:
        """Return points `(*, space)` turned and moved by elements `(*, storage)`."""
        self._check(x=x)
        self._check_like(x, points=points, width=self.space)
        return self._act(x, points)

    def matrix(self, x: Tensor) -> Tensor:
        """Return elements as matrices: `(*, space, space)` for rotations, one larger for poses (homogeneous)."""
        self._check(x=x)
        eye = torch.eye(self.space, dtype=x.dtype, device=x.device)
        columns = [self._act(x, eye[i].expand(*x.shape[:-1], -1)) for i in range(self.space)]
        if self.tangent == self.storage == 1 or self.name == "SO3":
            return torch.stack(columns, -1)
        moved = self._act(x, torch.zeros_like(columns[0]))
        top = torch.stack([*(c - moved for c in columns), moved], -1)
        last = torch.zeros_like(top[..., :1, :])
        last[..., -1] = 1
        return torch.cat([top, last], -2)

    def identity(self, *shape: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """Return identity elements `(*shape, storage)`."""
        return self._exp(torch.zeros(*shape, self.tangent, dtype=dtype, device=device))

    def normalize(self, x: Tensor) -> Tensor:
        """Return elements with unit quaternions; what has none is returned as it is."""
        return x

    def check(self, x: Any, argument: str = "x") -> None:
        """Refuse a tensor that does not hold elements of this group.

        Raises:
            InputTypeError: It is not a tensor of real floating-point numbers.
            InputError: Its last axis has another width, or a quaternion is not of length one.
        """
        self._check_width(argument, x, self.storage)

    @abstractmethod
    def storage_jacobian(self, x: Tensor) -> Tensor:
        r"""Return how stored numbers move with $d$ in $\exp(d) X$ at $d = 0$, `(*, storage, tangent)`."""

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

    def _check(self, **elements: Tensor) -> None:
        first, shape = "", None
        for argument, x in elements.items():
            self._check_width(argument, x, self.storage)
            if shape is not None and x.shape != shape:
                needed = f"it must have the shape of `{first}`, {tuple(shape)}"
                raise InputError.of(argument, f"of shape {tuple(x.shape)}", needed, "Nothing is broadcast.")
            first, shape = first or argument, x.shape

    def _check_like(self, x: Tensor, *, width: int, **given: Tensor) -> None:
        for argument, value in given.items():
            self._check_width(argument, value, width)
            if value.shape[:-1] != x.shape[:-1]:
                needed = f"shape {(*x.shape[:-1], width)} is needed beside elements of shape {tuple(x.shape)}"
                raise InputError.of(argument, f"of shape {tuple(value.shape)}", needed, "Nothing is broadcast.")

    def _check_width(self, argument: str, value: Any, width: int) -> None:
        if not isinstance(value, Tensor):
            raise InputTypeError.of(argument, f"a {type(value).__name__}", "a tensor is needed")
        if not value.is_floating_point():
            raise InputTypeError.of(argument, f"of dtype {value.dtype}", f"{self.name} needs floating-point numbers")
        if value.shape[-1:] != (width,):
            needed = f"{self.name} needs a last axis of {width} here"
            raise InputError.of(argument, f"of shape {tuple(value.shape)}", needed)

    def __repr__(self) -> str:
        return self.name
