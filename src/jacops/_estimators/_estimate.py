"""Estimate: a number and how far it may be off, with the arithmetic of numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, final

from .._display import with_error
from .._interop import ArrayLike, Unpacked
from .._saving import Savable

_Slopes = Callable[[float, float], tuple[float, float]]


def _binary(operation: Callable[[Any, Any], Any], slopes: _Slopes, *, reflected: bool = False) -> Any:
    """Return a method that combines an estimate with a number; with anything else it is its value."""

    def method(self: Estimate, other: Any) -> Any:
        if not isinstance(other, Estimate | Real):
            return operation(other, self.value) if reflected else operation(self.value, other)
        pair = [(self.value, self.standard_error), (float(other), getattr(other, "standard_error", 0.0))]
        (a, error_a), (b, error_b) = reversed(pair) if reflected else pair
        value, (by_a, by_b) = operation(a, b), slopes(a, b)
        return Estimate(value, sum(abs(s) * e for s, e in ((by_a, error_a), (by_b, error_b)) if e))

    return method


def _compared(operation: Callable[[float, float], bool]) -> Any:
    def method(self: Estimate, other: Any) -> bool:
        return operation(self.value, float(other)) if isinstance(other, Estimate | Real) else NotImplemented

    return method


@final
@dataclass(frozen=True, eq=False, repr=False)
class Estimate(ArrayLike, Unpacked, Savable):
    """A number and its standard error; unpacks as `value, standard_error`.

    Arithmetic, comparisons and conversions (`float`, `np.asarray`) use the value. Sums and products propagate the
    standard error to first order. Standard errors are added linearly, which is an upper bound for any correlation,
    because two estimates may depend on the same random vectors.

    Attributes:
        value: The estimate.
        standard_error: One standard error of it; 0 where it is exact.

    Example:
        >>> 2 * Estimate(3.0, 0.25) + 1
        7.0 ± 0.5
        >>> Estimate(3.0, 0.25) > 2
        True
    """

    value: float
    standard_error: float
    _array: ClassVar[str] = "value"
    # NumPy's scalars leave arithmetic to the right-hand side: as an array the error would be lost.
    __array_priority__: ClassVar[float] = 1000.0

    __add__ = _binary(operator.add, lambda a, b: (1, 1))
    __radd__ = _binary(operator.add, lambda a, b: (1, 1), reflected=True)
    __sub__ = _binary(operator.sub, lambda a, b: (1, 1))
    __rsub__ = _binary(operator.sub, lambda a, b: (1, 1), reflected=True)
    __mul__ = _binary(operator.mul, lambda a, b: (b, a))
    __rmul__ = _binary(operator.mul, lambda a, b: (b, a), reflected=True)
    __truediv__ = _binary(operator.truediv, lambda a, b: (1 / b, a / b / b))
    __rtruediv__ = _binary(operator.truediv, lambda a, b: (1 / b, a / b / b), reflected=True)

    __lt__ = _compared(operator.lt)
    __le__ = _compared(operator.le)
    __gt__ = _compared(operator.gt)
    __ge__ = _compared(operator.ge)

    def __repr__(self) -> str:
        return with_error(self.value, self.standard_error)

    def __eq__(self, other: object) -> bool:
        """Compare values; of two estimates the standard errors too."""
        if isinstance(other, Estimate):
            return (self.value, self.standard_error) == (other.value, other.standard_error)
        return self.value == other if isinstance(other, Real) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value)

    def __pow__(self, exponent: float) -> Estimate:
        """Return a power, with the standard error to first order."""
        if not isinstance(exponent, Real):
            return NotImplemented
        slope = exponent * self.value ** (exponent - 1) if self.standard_error else 0.0
        return Estimate(self.value**exponent, abs(slope) * self.standard_error)

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, self.standard_error)

    def __pos__(self) -> Estimate:
        return self

    def __abs__(self) -> Estimate:
        return Estimate(abs(self.value), self.standard_error)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __round__(self, digits: int | None = None) -> float:
        return round(self.value, digits)

    def __int__(self) -> int:
        return math.trunc(self.value)

    def __format__(self, spec: str) -> str:
        """Return value and standard error, both in the format given."""
        return f"{self.value:{spec}} ± {self.standard_error:{spec}}" if spec else str(self)
