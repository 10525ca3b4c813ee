"""What operators share with numbers and matrices: dtype and device, sums, multiples, and the ways to and from SciPy."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn, final

import torch
from torch import Tensor

from .._requirements import check_dense
from ..errors import InputError, InputTypeError
from ._graphs import without_graph
from ._scipy import as_linear_operator
from ._words import NotAnArray

if TYPE_CHECKING:
    from ._base import Operator

# What operators are composed to; `_algebra`, which builds on `_base`, puts its classes here when it is imported.
COMPOSED: dict[str, Callable[..., Any]] = {}


class Arithmetic(NotAnArray):
    """The part of an `Operator` that is the same for all: `2 * A`, `A + B`, `v @ A`, `A + 0.1 * eye`, `to_scipy()`."""

    __array_ufunc__ = None  # NumPy leaves `array @ A` and `number * A` to the operator

    @property
    def dtype(self: Any) -> torch.dtype:
        """The dtype of its entries."""
        return torch.promote_types(self.domain.dtype, self.codomain.dtype)

    @property
    def device(self: Any) -> torch.device:
        """Where its vectors live."""
        return self.domain.device

    def to_scipy(self: Any) -> Any:
        """Return this as a `scipy.sparse.linalg.LinearOperator`, for `eigsh`, `svds`, `cg`, `lsmr` and others.

        Products are computed here, in the operator's dtype and on its device; vectors of another precision are
        converted, so that results are as exact as the operator is. Half precision is presented as float32.

        Example:
            >>> import numpy as np
            >>> from jacops.linalg import Matrix
            >>> Matrix(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).to_scipy() @ np.ones(2, np.float32)
            array([3., 7.], dtype=float32)
        """
        return as_linear_operator(without_graph(self))

    def __array__(self: Any, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        """Refuse: an operator is not formed without being asked to.

        Raises:
            InputTypeError: Always; it names `dense()`.
        """
        todo = "Form it with `.dense()` (`.dense().numpy()`), or give SciPy `.to_scipy()`."
        raise InputTypeError.of("np.asarray", f"given a {self.name}", "an operator has no entries", todo)

    @property
    def matvec(self: Any) -> NoReturn:
        """Refuse: SciPy looks for this name to recognise a linear operator.

        Raises:
            InputTypeError: Always; it names `to_scipy()`.
        """
        came = f"a {self.name} of torch tensors"
        raise InputTypeError.of("the operator", came, "NumPy arrays are multiplied here", "Pass `A.to_scipy()`.")

    def __rmatmul__(self: Any, other: Any) -> Any:
        """Apply the transpose: `v @ A` for a flat vector `(m,)` or rows `(k, m)`."""
        if not isinstance(other, Tensor):
            raise not_a_tensor(other, "left")
        check_dense("v", other)
        if other.ndim not in (1, 2) or other.shape[-1] != self.codomain.dim:
            needed = f"its last axis needs {self.codomain.dim} entries: {self.codomain.layout}"
            raise InputError.of("v", f"of shape {tuple(other.shape)}", needed)
        return self.T @ other if other.ndim == 1 else (self.T @ other.T).T

    def __rmul__(self, factor: Any) -> Operator:
        """Scale by a number, or by a tensor that holds one, which receives gradients if it requires grad."""
        if isinstance(factor, Tensor) and factor.ndim == 0 and not factor.is_complex():
            scale = factor if factor.requires_grad else None
            return COMPOSED["scaled"](self, float(factor.detach()), scale=scale)
        if isinstance(factor, Tensor | Arithmetic):
            came = "an operator" if isinstance(factor, Arithmetic) else f"a tensor {tuple(factor.shape)}"
            todo = "Write `A @ B` for a product; `jacops.linalg.Diagonal(v) @ A` scales rows."
            raise InputTypeError.of("*", f"given {came} beside an operator", "a number is needed", todo)
        return COMPOSED["scaled"](self, float(factor)) if isinstance(factor, Real) else NotImplemented

    __mul__ = __rmul__

    def __truediv__(self, divisor: Any) -> Operator:
        """Divide by a number."""
        return self * (1 / divisor) if isinstance(divisor, Real | Tensor) else NotImplemented

    def __neg__(self) -> Operator:
        """Scale by -1."""
        return -1.0 * self  # pyright: ignore[reportReturnType, reportOperatorIssue]

    def __pos__(self: Any) -> Operator:
        """Return the operator itself."""
        return self

    def __add__(self: Any, other: Any) -> Operator:
        """Add an operator between the same spaces, a matrix `(m, n)`, or a multiple of `eye`."""
        return COMPOSED["sum"](self, self._summand(other))

    def __radd__(self: Any, other: Any) -> Operator:
        """Add, from the left; zero too, with which `sum([A, B])` begins."""
        return self if isinstance(other, Real) and other == 0 else COMPOSED["sum"](self._summand(other), self)

    def __sub__(self: Any, other: Any) -> Operator:
        """Subtract what can be added."""
        return COMPOSED["sum"](self, -self._summand(other))

    def __rsub__(self: Any, other: Any) -> Operator:
        """Subtract from what can be added."""
        return COMPOSED["sum"](self._summand(other), -self)

    def _summand(self: Any, other: Any) -> Operator:
        """Return what is added as an operator between the same spaces.

        Raises:
            InputTypeError: It is neither an operator nor a matrix.
            InputError: Its shape, dtype or device differ, or `eye` is added to an operator between two spaces.
        """
        if isinstance(other, Arithmetic):
            return other  # pyright: ignore[reportReturnType]
        if isinstance(other, ScalarIdentity):
            return other.factor * COMPOSED["identity"](self._one_space("a sum"))
        if isinstance(other, Tensor) and other.ndim == 2:
            if (*other.shape, other.dtype, other.device) != (*self.shape, self.dtype, self.device):
                came = f"a matrix {tuple(other.shape)}, {other.dtype} on {other.device}"
                raise InputError.of("a sum", came, f"the operator is {self.shape}, {self.dtype} on {self.device}")
            symmetric = self.symmetric and torch.equal(other, other.mT)
            return COMPOSED["matrix"](other, self.domain, self.codomain, symmetric)
        todo = "Write `A + 0.1 * jacops.linalg.eye` for damping, or pass a torch matrix."
        came = f"of an operator and a {type(other).__name__}"
        raise InputTypeError.of("a sum", came, "two operators are needed", todo)

    def _one_space(self: Any, what: str) -> Any:
        """Return the space from which and to which this maps.

        Raises:
            InputError: They are two.
        """
        if self.shape[0] != self.shape[1]:
            raise InputError.of(what, f"of `eye` and an operator of shape {self.shape}", "a square one is needed")
        return self.domain


@final
class ScalarIdentity:
    """A multiple of the identity, on the space of the other operand; `jacops.linalg.eye` is the identity.

    Example:
        >>> from jacops.linalg import Matrix, eye
        >>> (Matrix(torch.ones(2, 2)) + 0.5 * eye).dense()
        tensor([[1.5000, 1.0000],
                [1.0000, 1.5000]])
    """

    __slots__ = ("factor",)
    __array_ufunc__ = None

    def __init__(self, factor: float | Tensor = 1.0) -> None:
        self.factor = factor if isinstance(factor, Tensor) and factor.requires_grad else float(factor)

    def __mul__(self, factor: Any) -> ScalarIdentity:
        """Scale."""
        is_number = isinstance(factor, Real) or (isinstance(factor, Tensor) and factor.ndim == 0)
        scaled: Any = self.factor * factor if is_number else None
        return ScalarIdentity(scaled) if is_number else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> ScalarIdentity:
        """Divide by a number."""
        return self * (1 / divisor)

    def __neg__(self) -> ScalarIdentity:
        return ScalarIdentity(-self.factor)

    def __add__(self, other: Any) -> Any:
        """Add another multiple; an operator adds this itself."""
        return ScalarIdentity(self.factor + other.factor) if isinstance(other, ScalarIdentity) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        """Subtract another multiple; an operator does so itself."""
        return ScalarIdentity(self.factor - other.factor) if isinstance(other, ScalarIdentity) else NotImplemented

    def __matmul__(self, other: Any) -> Any:
        """Scale the right-hand operand: an operator, a tensor, or a tree."""
        if isinstance(other, list | tuple):
            return [self.factor * entry for entry in other]
        if isinstance(other, dict):
            return {name: self.factor * entry for name, entry in other.items()}
        return self.factor * other

    def __rmatmul__(self, other: Any) -> Any:
        """Scale the left-hand operand."""
        return self.factor * other

    def __call__(self, *size: Any) -> NoReturn:
        """Refuse a size: it takes that of the other operand.

        Raises:
            InputTypeError: Always.
        """
        todo = "Write `A + 0.1 * eye`; `Identity(A.domain)` is an operator of its own."
        raise InputTypeError.of("eye", f"called with {size}", "it is the identity of any size", todo)

    def __repr__(self) -> str:
        return f"{self.factor:g} * eye"


eye = ScalarIdentity()


def not_a_tensor(value: Any, side: str) -> InputTypeError:
    """Return the error for what an operator is multiplied with and is no tensor."""
    is_array = hasattr(value, "__array_interface__")
    named = "NumPy array" if is_array else type(value).__name__
    todo = "Pass `torch.as_tensor(v)`, or take `A.to_scipy()`, which multiplies NumPy arrays." if is_array else ""
    needed = "a tensor, a tree of tensors or an operator is needed"
    return InputTypeError.of(f"the {side}-hand side of @", f"a {named}", needed, todo)
