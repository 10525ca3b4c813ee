"""Operator: a lazy linear map from one named space to another."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from .._display import Described, Description
from .._finite import check_vector, is_finite
from .._ladder.route import answer
from .._progress import shows_progress, tick, track
from .._requirements import check_dense
from .._runtime.contexts import arithmetic, eager, keeping, out_of_inference
from .._runtime.memory import Budget, ensure_fits, in_words
from .._runtime.restoring import restoring
from .._runtime.rows import owned
from .._runtime.side_effects import storage_of
from .._saving import Savable
from .._space import Space
from .._torch.protocol import ByLayers, Linearization
from ..errors import InputError
from ._arithmetic import COMPOSED, Arithmetic, ScalarIdentity, not_a_tensor
from ._computed import Computed
from ._dense import DENSE, DenseAsk, dense_ask, matrix_place
from ._finite_results import Source, check_result, leaves_of
from ._graphs import keeps_graph
from ._held import Held, one_by_one
from ._naming import Meaning
from ._noise import Moments, relative_noise
from ._target import Target

_GRAPH_TODO = "Use products (`A @ v`), or raise `budget=`; the graph takes more than the matrix."
_GRAM_ENTRIES = 2**26  # 512 MiB in float64: larger matrices are not formed, but applied to an eighth of that at a time


class Operator(Arithmetic, Savable, ABC, Described):
    r"""A linear map $A$ that is applied, composed and transposed without being formed.

    A concrete operator defines its axes (`domain`, `codomain`) and how it acts on rows, `_apply` and
    `_apply_transpose`; all else follows. `A @ v` takes a flat vector `(n,)`, columns `(n, k)`, or a tree (a list in
    order or a dict by name) and returns the same form; `A @ B` composes; `A.T`, `A + B`, `2 * A` are operators again.

    Attributes:
        domain: What the columns mean.
        codomain: What the rows mean.
        symmetric: The operator is known to equal its transpose.
        positive: It is known to be positive semi-definite.
        formed: A cheaper way to its matrix than products, if there is one.
        by_samples: What was recorded, where its matrix is the Jacobian of a model's output by its parameters.
        check_finite: Results with NaN or Inf raise.
        create_graph: Its products keep their graph, whatever its parts do.
        source: The call and the data that it was made from, for messages.
        meaning: A name for it, where it is more than the composition of its parts.
        computed: What was computed on the way to it, where that is of a single batch.
        has_parts: Such operators may be made of others.
    """

    symmetric: bool = False
    positive: bool = False
    formed: ByLayers | None = None
    by_samples: Linearization | None = None
    check_finite: bool = True
    create_graph: bool = False
    source: Source | None = None
    meaning: Meaning | None = None
    computed: Computed | None = None
    has_parts: ClassVar[bool] = True

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

    def _apply_vector(self, vector: Tensor) -> Tensor:
        """Map one vector `(n,)` to `(m,)`, without a graph."""
        return self._apply(vector.unsqueeze(0))[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, `(m, n)`."""
        return self.codomain.dim, self.domain.dim

    @property
    def output(self) -> Any:
        """The model's output on the batch, or the selected part of it; None where there is no single one."""
        return None if self.computed is None else self.computed.output

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Return the loss that a `hessian` or `ggn` of one batch is of, and its gradient `(P,)`, at the same point.

        The model does not run again: a Hessian has both already, a Gauss-Newton matrix takes one backward sweep.

        Raises:
            InputError: The operator is not the curvature of a loss on one batch.
            ModelStateError: A parameter was written into since, and the sweep is not done yet.
            NonFiniteError: The gradient holds NaN or Inf.
        """
        known = self.computed
        if known is None or known.loss is None or known.gradient is None:
            needed, todo = "`hessian` or `ggn` of a loss on one batch is needed", "A `Problem` has it for all its data."
            raise InputError.of("the operator", f"a {self.name}", needed, todo)
        return float(known.loss), check_result(self, known.gradient(), "the gradient")

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

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Operator) -> Operator: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    @overload
    def __matmul__(self, other: Sequence[Tensor]) -> list[Tensor]: ...
    def __matmul__(self, other: Any) -> Any:
        """Compose with an operator, or apply to a vector, to columns, or to a tree of tensors."""
        if not isinstance(other, Tensor):
            if isinstance(other, Operator):
                return COMPOSED["product"](self, other)
            if isinstance(other, ScalarIdentity):
                return other.factor * self
        return self._product(other)

    def _image(self, other: Any) -> Any:
        """Return the product with a vector, columns or a tree, inside of a public call."""
        if isinstance(other, Tensor):
            return self._of_tensor(other)
        if isinstance(other, list | tuple | Mapping):
            return self._of_tree(other)
        raise not_a_tensor(other, "right")

    _product = eager(_image)

    def _of_tree(self, other: Any) -> Any:
        with keeping(keeps_graph(self)):
            image = self.tree(self.apply(self.domain.flatten(other).unsqueeze(0))[0])
        return dict(zip(self.codomain.names, image, strict=True)) if isinstance(other, Mapping) else image

    def _of_tensor(self, other: Tensor) -> Any:
        check_dense("v", other)
        if other.ndim not in (1, 2) or other.shape[0] != self.domain.dim:
            if self.domain.shapes == (other.shape,):  # the one array that there is, in its own shape
                image = self._of_tree([other])
                return image[0] if len(image) == 1 else image
            plain = self.domain.is_plain
            needed = f"its first axis needs {self.domain.dim} entries" + ("" if plain else f": {self.domain.layout}")
            todo = "" if plain else "Pass one tensor per array, or `A.domain.flatten(tree)`."
            raise InputError.of("v", f"of shape {tuple(other.shape)}", needed, todo)
        if not keeps_graph(self):
            return self._of_vector(other) if other.ndim == 1 else self._applied(other.T, False).T
        with keeping(True):
            return self._applied(other.unsqueeze(0), True)[0] if other.ndim == 1 else self._applied(other.T, True).T

    @eager
    def apply(self, rows: Tensor) -> Tensor:
        """Map rows `(k, n)` to rows `(k, m)`, checking dtype, device and finiteness first.

        Raises:
            InputError: The rows have another width, dtype or device than the domain.
            NonFiniteError: They or the product hold NaN or Inf.
        """
        kept = keeps_graph(self)
        with keeping(kept):
            return self._applied(rows, kept)

    def _of_vector(self, vector: Tensor) -> Tensor:
        space = self.domain
        if vector.dtype != space.dtype or vector.device != space.device:
            space.check_rows("v", vector.unsqueeze(0))
        tick()
        if self.check_finite and not is_finite(vector):
            check_vector(self.name, "v", [vector])
        return check_result(self, owned(self._apply_vector(vector), {storage_of(vector)}), "a product")

    def _applied(self, rows: Tensor, kept: bool) -> Tensor:
        self.domain.check_rows("v", rows)
        tick()
        if self.check_finite and not is_finite(rows):
            check_vector(self.name, "v", [rows[0] if len(rows) == 1 else rows])
        image = self._apply(out_of_inference(rows)) if kept else owned(self._apply(rows), {storage_of(rows)})
        return check_result(self, image, "a product")

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
            progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

        Raises:
            InputError: `out` has another shape.
            MemoryBudgetError: The matrix and what has to be held on the way do not fit the budget; nothing was
                allocated.
            NonFiniteError: An entry is NaN or Inf; the message names batch and row where the data hold one.
        """
        if keeps_graph(self):
            matrix = self._with_graph(out, budget)
            return check_result(self, matrix, "the matrix") if check_finite else matrix
        ask = dense_ask(self, out, budget)
        ask.target = matrix_place(self, out)
        answer(ask, DENSE)
        matrix = ask.target.matrix
        looked_at = check_finite and not self._largest() < torch.finfo(matrix.dtype).max
        return check_result(self, matrix, "the matrix") if looked_at else matrix

    @restoring
    def _with_graph(self, out: Any, budget: Budget) -> Tensor:
        """Return the matrix with its graph, by products of all rows or columns at once."""
        if out is not None:
            raise InputError.of("out", "given", "a matrix with a graph is not written in place", "Leave it out.")
        matrix = {f"the matrix {self.shape}": math.prod(self.shape) * self.dtype.itemsize}
        ensure_fits(f"{type(self).__name__}.dense", matrix, budget, self.device, _GRAPH_TODO)
        with arithmetic(True):
            return self._formed_with_graph()

    def _formed_with_graph(self) -> Tensor:
        """Return the matrix: all columns, or all rows, whichever are fewer."""
        (m, n), (rows, columns) = self.shape, (self.codomain, self.domain)
        return self._apply(columns.units(slice(0, n))).T if n < m else self._apply_transpose(rows.units(slice(0, m)))

    # ---- how the matrix is filled ----------------------------------------------------------------------------------

    def _largest(self) -> float:
        """Return a bound of the matrix's entries where that takes less than to look at them."""
        return math.inf

    _own: str = ""  # the route to the matrix that such operators have to themselves, by name
    _parts: tuple[Operator, ...] = ()  # what the matrix is put together from

    @property
    def _halves(self) -> bool:
        """Whether the matrix is found as X + Xᵀ, so that it is best added to others before the two are joined."""
        return self.formed is not None

    def _held(self, ask: DenseAsk) -> Held:
        """Return what is held while the matrix is filled."""
        return one_by_one(part.held for part in ask.parts)

    def _places(self, target: Target) -> Iterable[Target]:
        """Return where each part goes."""
        return ()

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        """Write the matrix by the operator's own route: part by part."""
        for part, place in zip(ask.parts, self._places(target), strict=True):
            part.fill(place)

    @eager
    @shows_progress()
    def gram(self) -> Tensor:
        r"""Return $A A^\top$, `(m, m)`: inner products of all rows, without the matrix where that is large.

        Raises:
            NonFiniteError: An entry is NaN or Inf.
        """
        with keeping(keeps_graph(self)):
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

    @property
    def name(self) -> str:
        """What it is, such as `"Hessian"`; `"Operator"` for what was composed."""
        if self.meaning is not None:
            return self.meaning.name
        return "Operator" if self._formula() else type(self).__name__

    def _formula(self) -> str:
        """Return what it is made of, as a formula."""
        return ""

    def _in_formula(self) -> str:
        """Return how the formulas of others write it."""
        return self.name if self.meaning is not None or not self._formula() else f"({self._formula()})"

    def _routes(self) -> Mapping[str, str] | None:
        """Return how products were computed, by what they are; None where there is one way only."""
        return None

    def _routes_of_parts(self) -> Iterator[tuple[str, str]]:
        """Yield how products were computed, by itself or by each of what it is made of."""
        swept = [(part, routes) for part in leaves_of(self).values() if (routes := part._routes()) is not None]
        for part, routes in swept:
            yield from ((word if len(swept) == 1 else f"{part.name} {word}", way) for word, way in routes.items())
        if swept and not any(routes for _, routes in swept):
            yield "route", "not yet used"

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Yield what else is shown of it."""
        marks = ", ".join(self._marks()).replace("positive", "positive semi-definite")
        if marks:
            yield "known to be", marks
        sides = {"rows": self.codomain, "columns": self.domain}
        if self.symmetric or self.domain is self.codomain:
            sides = {"rows and columns": self.domain}
        yield from ((word, side.layout) for word, side in sides.items() if not side.is_plain)
        yield from self._routes_of_parts()
        if self.nbytes:
            m, n = self.shape
            yield "memory", f"{in_words(self.nbytes)} held, {in_words(m * n * self.domain.dtype.itemsize)} dense"

    def _describe(self) -> Description:
        (m, n), dtype = self.shape, str(self.domain.dtype).removeprefix("torch.")
        inside = ", ".join([f"{m:,} × {n:,}", dtype, str(self.domain.device)])
        formula = self._formula() if self.meaning is None else self.meaning.formula
        return Description(f"{self.name}({inside}){f': {formula}' if formula else ''}", tuple(self._facts()))


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
