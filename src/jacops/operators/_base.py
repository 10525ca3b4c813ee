"""Operator: a lazy linear map from one named space to another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .._backends._torch.memory import SMALL, Budget
from .._backends._torch.surroundings import eager
from .._finite import check_vector
from ..errors import InputError, InputTypeError, explain
from ..space import Space
from ._dense import CHUNK_ENTRIES, dense_plan, fitted, matrix_place


class Formed(Protocol):
    """A way to a symmetric operator's matrix that is cheaper than products; it checks itself."""

    def write(self, matrix: Tensor) -> bool:
        """Fill the matrix; False, with nothing of use in it, where this way is closed."""
        ...

    def add_half(self, matrix: Tensor, weight: float) -> bool:
        """Add X times `weight`, X + Xᵀ the matrix; False, with nothing changed, where this way is closed."""
        ...


_GRAM_ENTRIES = 2**26


class Operator(ABC):
    r"""A linear map $A$ that is applied, composed and transposed without being formed.

    A concrete operator says what its axes mean (`domain`, `codomain`) and how it acts on rows, `_apply` and
    `_apply_transpose`; all else follows. `A @ v` takes a flat vector `(n,)`, columns `(n, k)`, or a tree (a list in
    order or a dict by name) and answers in kind; `A @ B` composes; `A.T`, `A + B`, `2 * A` are operators again.

    Attributes:
        domain: What the columns mean.
        codomain: What the rows mean.
        symmetric: The operator is known to equal its transpose.
        positive: It is known to be positive semi-definite.
        formed: A cheaper way to its matrix than products, if there is one.
    """

    symmetric: bool = False
    positive: bool = False
    formed: Formed | None = None

    @property
    @abstractmethod
    def domain(self) -> Space:
        """What the columns mean."""

    @property
    @abstractmethod
    def codomain(self) -> Space:
        """What the rows mean."""

    @abstractmethod
    def _apply(self, rows: Tensor) -> Tensor:
        """Map rows `(k, n)` to rows `(k, m)`."""

    @abstractmethod
    def _apply_transpose(self, rows: Tensor) -> Tensor:
        """Map rows `(k, m)` to rows `(k, n)`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, `(m, n)`."""
        return self.codomain.dim, self.domain.dim

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps in memory: matrices, factors, recorded values."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Operator | Tensor))

    @property
    def T(self) -> Operator:  # noqa: N802
        """The transpose."""
        from ._algebra import Transposed

        return self if self.symmetric else Transposed(self)

    def __matmul__(self, other: Any) -> Any:
        """Compose with an operator, or apply to a vector, to columns, or to a tree of tensors."""
        if isinstance(other, Operator):
            from ._algebra import Product

            return Product(self, other)
        if isinstance(other, list | tuple | Mapping):
            names = self.codomain.names
            image = self.tree(self.apply(self.domain.flatten(other).unsqueeze(0))[0])
            return dict(zip(names, image, strict=True)) if isinstance(other, Mapping) else image
        if not isinstance(other, Tensor):
            raise InputTypeError(
                explain(
                    "the right-hand side of @",
                    f"a {type(other).__name__}",
                    "a tensor, a tree of tensors or an operator is needed",
                )
            )
        if other.ndim not in (1, 2) or other.shape[0] != self.domain.dim:
            raise InputError(
                explain(
                    "v",
                    f"of shape {tuple(other.shape)}",
                    f"its first axis needs {self.domain.dim} entries: {self.domain.layout}",
                    "Pass one tensor per array, or flatten with `A.domain.flatten(tree)`.",
                )
            )
        return self.apply(other.unsqueeze(0))[0] if other.ndim == 1 else self.apply(other.T).T

    @eager
    def apply(self, rows: Tensor) -> Tensor:
        """Map rows `(k, n)` to rows `(k, m)`, checking dtype, device and finiteness first.

        Raises:
            InputError: The rows have another width, dtype or device than the domain.
            NonFiniteError: They hold NaN or Inf.
        """
        space = self.domain
        if rows.ndim != 2 or rows.shape[1] != space.dim or rows.dtype != space.dtype or rows.device != space.device:
            came = f"of shape {tuple(rows.shape)}, {rows.dtype} on {rows.device}"
            raise InputError(
                explain("v", came, f"width {space.dim}, {space.dtype} on {space.device} is needed; nothing is cast")
            )
        check_vector(type(self).__name__, "v", [rows])
        return self._apply(rows)

    def __rmul__(self, factor: float) -> Operator:
        """Scale."""
        from ._algebra import Scaled

        return Scaled(self, float(factor)) if isinstance(factor, int | float) else NotImplemented

    __mul__ = __rmul__

    def __neg__(self) -> Operator:
        """Scale by -1."""
        return -1.0 * self

    def __add__(self, other: Operator) -> Operator:
        """Add an operator between the same spaces."""
        from ._algebra import Sum

        return Sum(self, other) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Operator) -> Operator:
        """Subtract an operator between the same spaces."""
        return self + (-other) if isinstance(other, Operator) else NotImplemented

    @eager
    def dense(self, out: Any = None, *, budget: Budget = None) -> Tensor:
        """Return the matrix `(m, n)`, by rows or by columns, whichever are fewer, written in place.

        Args:
            out: Where to write it, a tensor or an array (a `numpy.memmap` too); a new tensor otherwise.
            budget: Bytes that the matrix and the products may take, or a text such as `"2GiB"`; by default half of
                what is free.

        Raises:
            InputError: `out` has another shape.
            MemoryBudgetError: The matrix and one product do not fit the budget; nothing was allocated.
        """
        m, n = self.shape
        space = self.domain if n <= m else self.codomain
        chunk = max(1, min(64, space.dim, CHUNK_ENTRIES // max(1, m + n)))
        if budget is not None or m * n * self.codomain.dtype.itemsize >= SMALL:
            chunk = fitted(self, dense_plan(self, budget, out))
        matrix = matrix_place(self, out, budget)
        if self.formed is not None and self.formed.write(matrix):
            return matrix
        for start in range(0, space.dim, chunk):
            where = slice(start, min(start + chunk, space.dim))
            unit = torch.zeros(where.stop - start, space.dim, dtype=space.dtype, device=space.device)
            unit[:, where].fill_diagonal_(1)
            if n <= m:
                matrix[:, where] = self._apply(unit).T
            else:
                matrix[where] = self._apply_transpose(unit)
        return matrix

    def gram(self) -> Tensor:
        r"""Return $A A^\top$, `(m, m)`: inner products of all rows, without the matrix where that is large."""
        m, n = self.shape
        if m * n <= _GRAM_ENTRIES:
            matrix = self.dense()
            return matrix @ matrix.T
        space = self.codomain
        gram = torch.empty(m, m, dtype=space.dtype, device=space.device)
        step = max(1, _GRAM_ENTRIES // (8 * n))
        for start in range(0, m, step):
            unit = gram.new_zeros(min(step, m - start), m)
            unit[:, start : start + step].fill_diagonal_(1)
            gram[start : start + step] = self._apply(self._apply_transpose(unit))
        return gram

    def tree(self, flat: Tensor) -> list[Tensor]:
        """Return a flat vector of the codomain as one tensor per array."""
        return self.codomain.unflatten(flat)

    def __repr__(self) -> str:
        m, n = self.shape
        marks = " ".join(word for word in ("symmetric", "positive") if getattr(self, word))
        return f"{type(self).__name__}({m} × {n}{', ' + marks if marks else ''})"


def add_half(matrix: Tensor, operator: Operator, weight: float = 1.0) -> None:
    """Add X times `weight` to `matrix`, in place, where X + Xᵀ is the matrix of a symmetric operator.

    Sums over batches of data are added up so without a matrix per batch; `mirror` makes the sum whole in the end.
    """
    if operator.formed is None or not operator.formed.add_half(matrix, weight):
        matrix.add_(operator.dense(), alpha=0.5 * weight)


def check_same(left: Space, right: Space, what: str) -> None:
    """Refuse to join operators whose axes differ.

    Raises:
        InputError: The spaces differ in shapes, dtypes or device.
    """
    if (left.shapes, left.dtypes, left.device) != (right.shapes, right.dtypes, right.device) and not (
        left.dim == right.dim
        and left.dtype == right.dtype
        and left.device == right.device
        and 1 in (len(left.names), len(right.names))
    ):
        raise InputError(explain(what, f"between {left} and {right}", "the spaces must be the same"))
