"""What every chart can do: elements moved by flat steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._requirements import check_positive
from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from ..errors import InputError, InputTypeError, NotDifferentiableError


@dataclass(frozen=True, repr=False)
class Chart(ABC):
    r"""A chart: elements stored as `storage` numbers each, with `tangent` directions.

    A custom chart is a subclass with `retract` and `local`; the other methods are derived from them, and may be
    overridden for speed. Both take elements along leading axes and treat each by itself, with operations of torch that
    can be differentiated, also at a step of zero: write series where `d / d.norm()` would be 0 / 0. `check_laws` checks
    that they agree with each other. Charts of groups are `GroupChart`s.

    Attributes:
        name: Its name in messages.
        storage: Numbers per element, the last axis of `x`.
        tangent: Directions per element, the last axis of `d`.

    Raises:
        InputError: A width is not positive.

    Example:
        >>> from jacops.charts import Chart, check_laws
        >>> class Positive(Chart):
        ...     def retract(self, x, d):
        ...         return x * d.exp()
        ...
        ...     def local(self, x, y):
        ...         return (y / x).log()
        >>> positive = Positive("positive", storage=1, tangent=1)
        >>> check_laws(positive, torch.tensor([[0.5], [3.0]], dtype=torch.float64))
        >>> positive.storage_jacobian(torch.tensor([[3.0]]))
        tensor([[[3.]]])
    """

    name: str
    storage: int
    tangent: int

    def __post_init__(self) -> None:
        check_positive("storage", self.storage)
        check_positive("tangent", self.tangent)

    @abstractmethod
    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        """Return elements `(*, storage)` moved by steps `(*, tangent)`; a step of zero gives `x`."""

    @abstractmethod
    def local(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the step `(*, tangent)` that leads from `x` to `y`: `local(x, retract(x, d))` is `d` for small `d`."""

    @restoring
    def storage_jacobian(self, x: Tensor) -> Tensor:
        r"""Return how stored numbers move with $d$ at $d = 0$, `(*, storage, tangent)`; here by autograd.

        Raises:
            NotDifferentiableError: `retract` is not recorded by autograd.
        """
        with arithmetic(True):
            zero = x.new_zeros(*x.shape[:-1], self.tangent).requires_grad_()
            moved = self.retract(x, zero)
            if not moved.requires_grad:
                raise NotDifferentiableError(f"{self.name}: `retract` does not depend on `d` by operations of torch.")
            rows = [
                torch.autograd.grad(
                    each.sum(), zero, retain_graph=True, create_graph=x.requires_grad, materialize_grads=True
                )[0]
                for each in moved.unbind(-1)
            ]
        return torch.stack(rows, -2)

    def normalize(self, x: Tensor) -> Tensor:
        """Return the valid elements nearest to rounded numbers, such as quaternions of length one."""
        return x

    def magnitudes(self, x: Tensor) -> Tensor:
        """Return the magnitude of what each direction moves, `(*, tangent)`: a length, or one for an angle.

        Rounding of the stored numbers moves an element by a rounding of that; here the length of all stored numbers.
        """
        return x.norm(dim=-1, keepdim=True).expand(*x.shape[:-1], self.tangent)

    def check(self, x: Any, argument: str = "x") -> None:
        """Refuse a tensor that does not hold elements.

        Raises:
            InputTypeError: It is not a tensor of real floating-point numbers.
            InputError: Its last axis has another width, or its numbers are those of no element (a quaternion that is
                not of length one).
        """
        self._check_width(argument, x, self.storage)

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
