"""Operator: a lazy linear map from one named space to another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .._finite import check_vector
from .._progress import shows_progress, tick, track
from .._runtime.contexts import eager
from .._runtime.memory import Budget
from .._saving import Savable
from .._space import Space
from .._torch.protocol import PreparedFill, VerificationError, mirror
from ..errors import InputError
from ._arithmetic import COMPOSED, Arithmetic, ScalarIdentity, not_a_tensor
from ._dense import IN_MEMORY, DenseLimits, FillRoute, Headroom, by_products, is_counted, matrix_place
from ._finite_results import Source, check_result
from ._noise import Moments, relative_noise


class Formed(Protocol):
    """A way to a symmetric operator's matrix or diagonal that is cheaper than products; it checks itself."""

    def begin(self, free: float) -> PreparedFill | None:
        """Return what can be added to a matrix, within `free` bytes if that may be; None where this way is closed."""
        ...

    def diagonal(self) -> Tensor | None:
        """Return the diagonal; None where this way is closed."""
        ...


_GRAM_ENTRIES = 2**26  # 512 MiB in float64: larger matrices are not formed, but applied to an eighth of that at a time


class Operator(Arithmetic, Savable, ABC):
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
        check_finite: Results with NaN or Inf raise.
        source: The call and the data that it was made from, for messages.
    """

    symmetric: bool = False
    positive: bool = False
    formed: Formed | None = None
    check_finite: bool = True
    source: Source | None = None

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
        """Bytes that it keeps in memory: matrices, factors, recorded values; what is shared counts once."""
        return sum(_kept(self).values())

    @property
    def noise(self) -> float | None:
        r"""The relative standard error of $v^\top A v$ for a random v, estimated from above by a few products.

        For Monte Carlo estimates; None for every other operator. A part that is known exactly does not count.
        """
        return relative_noise(self.domain, self._drawn())

    def _drawn(self) -> Iterator[tuple[float, Moments]]:
        """Yield the parts that are Monte Carlo estimates: the factor of each, and the moments of its terms."""
        yield from ()

    @property
    def T(self) -> Operator:  # noqa: N802
        """The transpose."""
        return self if self.symmetric else COMPOSED["transposed"](self)

    def __matmul__(self, other: Any) -> Any:
        """Compose with an operator, or apply to a vector, to columns, or to a tree of tensors."""
        if isinstance(other, Operator):
            return COMPOSED["product"](self, other)
        if isinstance(other, ScalarIdentity):
            return other.factor * self
        if isinstance(other, list | tuple | Mapping):
            names = self.codomain.names
            image = self.tree(self.apply(self.domain.flatten(other).unsqueeze(0))[0])
            return dict(zip(names, image, strict=True)) if isinstance(other, Mapping) else image
        if not isinstance(other, Tensor):
            raise not_a_tensor(other, "right")
        if other.ndim not in (1, 2) or other.shape[0] != self.domain.dim:
            needed = f"its first axis needs {self.domain.dim} entries: {self.domain.layout}"
            todo = "Pass one tensor per array, or flatten with `A.domain.flatten(tree)`."
            raise InputError.of("v", f"of shape {tuple(other.shape)}", needed, todo)
        return self.apply(other.unsqueeze(0))[0] if other.ndim == 1 else self.apply(other.T).T

    @eager
    def apply(self, rows: Tensor) -> Tensor:
        """Map rows `(k, n)` to rows `(k, m)`, checking dtype, device and finiteness first.

        Raises:
            InputError: The rows have another width, dtype or device than the domain.
            NonFiniteError: They or the product hold NaN or Inf.
        """
        space = self.domain
        if rows.ndim != 2 or rows.shape[1] != space.dim or rows.dtype != space.dtype or rows.device != space.device:
            came = f"of shape {tuple(rows.shape)}, {rows.dtype} on {rows.device}"
            needed = f"width {space.dim}, {space.dtype} on {space.device} is needed; nothing is cast"
            raise InputError.of("v", came, needed)
        tick()
        if self.check_finite:
            check_vector(type(self).__name__, "v", [rows])
        return check_result(self, self._apply(rows), "a product")

    @eager
    @shows_progress()
    def dense(
        self, out: Any = None, *, budget: Budget = None, check_finite: bool = True, progress: bool | None = None
    ) -> Tensor:
        """Return the matrix `(m, n)`, written in place: by layers, or by rows or columns, whichever are fewer.

        Args:
            out: Where to write it, a tensor or an array (a `numpy.memmap` too); a new tensor otherwise.
            budget: Bytes that the matrix and the work on it may take, or a text such as `"2GiB"`; by default half of
                what is free.
            check_finite: Raise if an entry is NaN or Inf.
            progress: Force the progress bar on or off; by default it is shown after 2 s, where someone looks.

        Raises:
            InputError: `out` has another shape.
            MemoryBudgetError: The matrix and what has to be held on the way do not fit the budget; nothing was
                allocated.
            NonFiniteError: An entry is NaN or Inf; the message names batch and row where the data hold one.
        """
        limits = DenseLimits.of(self, budget, out) if is_counted(self, budget) else None
        room = Headroom() if limits is None else limits.room
        route = self._fill_route(room)
        if limits is not None:
            limits.ensure(route)
        matrix = matrix_place(self, out, budget)
        try:
            self._write(matrix, route)
        except VerificationError:  # by layers it was wrong: once more, by products
            del route
            self._write(matrix, self._fill_route(Headroom(room.free, layers=False)))
        return check_result(self, matrix, "the matrix") if check_finite else matrix

    # ---- how the matrix is filled ----------------------------------------------------------------------------------

    @property
    def _halves(self) -> bool:
        """Whether the matrix is found as X + Xᵀ, so that it is best added to others before the two are joined."""
        return self.formed is not None

    def _fill_route(self, room: Headroom) -> FillRoute:
        """Return how the matrix is filled where so much may be held meanwhile: by layers, or by products."""
        if self.formed is not None and room.layers and room.free > 0:
            prepared = self.formed.begin(room.tight)
            if prepared is not None and prepared.bytes <= room.tight:
                most, unit = prepared.most, "numbers to a round"
                return FillRoute("by layers", prepared.bytes, most, unit, prepared, room, tight=True)
            del prepared  # what it holds is no part of the products
        return by_products(self, room)

    def _write(self, matrix: Tensor, route: FillRoute) -> None:
        """Fill `matrix` on a route of `_fill_route`.

        Raises:
            VerificationError: What the layers said is wrong; the matrix holds nothing of use.
        """
        if route.prepared is not None:
            if route.prepared.accumulate(matrix.zero_()):
                mirror(matrix)
                return
            route = by_products(self, route.room)
        for where, part in self._units(route):
            matrix[where] = part

    def _add(self, matrix: Tensor, weight: float, route: FillRoute, half: bool) -> None:
        """Add the matrix times `weight`; by `half`, for a symmetric one, any X times `weight` with X + Xᵀ the matrix.

        Raises:
            VerificationError: As in `_write`.
        """
        if route.prepared is not None:
            if route.prepared.accumulate(matrix, weight):
                if not half and not route.prepared.accumulate(matrix.T, weight):
                    raise VerificationError
                return
            route = by_products(self, route.room)
        for where, part in self._units(route):
            matrix[where].add_(part, alpha=0.5 * weight if half else weight)

    def _units(self, route: FillRoute) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Yield places in the matrix and what stands there, by products with unit vectors."""
        m, n = self.shape
        space, everything = self.domain if n <= m else self.codomain, slice(None)
        for start in track(range(0, space.dim, route.chunk), "dense"):
            where = slice(start, min(start + route.chunk, space.dim))
            if n <= m:
                yield (everything, where), self._apply(space.units(where)).T
            else:
                yield (where, everything), self._apply_transpose(space.units(where))

    @shows_progress()
    def gram(self) -> Tensor:
        r"""Return $A A^\top$, `(m, m)`: inner products of all rows, without the matrix where that is large.

        Raises:
            NonFiniteError: An entry is NaN or Inf.
        """
        return check_result(self, self._gram(), "the Gram matrix")

    def _gram(self) -> Tensor:
        m, n = self.shape
        if m * n <= _GRAM_ENTRIES:
            matrix = self.dense(check_finite=False)
            return matrix @ matrix.T
        space = self.codomain
        gram = torch.empty(m, m, dtype=space.dtype, device=space.device)
        step = max(1, _GRAM_ENTRIES // (8 * n))
        for start in track(range(0, m, step), "gram"):
            where = slice(start, min(start + step, m))
            gram[where] = self._apply(self._apply_transpose(space.units(where)))
        return gram

    def tree(self, flat: Tensor) -> list[Tensor]:
        """Return a flat vector of the codomain as one tensor per array."""
        return self.codomain.unflatten(flat)

    def _marks(self) -> Iterator[str]:
        return (word for word in ("symmetric", "positive") if getattr(self, word))

    def __repr__(self) -> str:
        m, n = self.shape
        marks = " ".join(self._marks())
        return f"{type(self).__name__}({m} × {n}{', ' + marks if marks else ''})"


class OnSpace(Operator):
    """An operator from a space to itself.

    Attributes:
        space: Where it acts.
    """

    space: Any

    @property
    def domain(self) -> Space:
        """Where it acts."""
        return self.space

    @property
    def codomain(self) -> Space:
        """Where it acts."""
        return self.space


class InMemory(Operator):
    """An operator whose entries are there already."""

    def _fill_route(self, room: Headroom) -> FillRoute:
        return IN_MEMORY

    def _write(self, matrix: Tensor, route: FillRoute) -> None:
        self._add(matrix.zero_(), 1.0, route, half=False)


def _kept(operator: Operator) -> dict[int, int]:
    """Return the bytes of what an operator keeps, by identity."""
    if type(operator).nbytes is not Operator.nbytes:
        return {id(operator): operator.nbytes}
    kept: dict[int, int] = {}
    for value in vars(operator).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Operator):
                kept |= _kept(part)
            elif isinstance(part, Tensor):
                kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return kept


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
        raise InputError.of(what, f"between {left} and {right}", "the spaces must be the same")
