"""The algebra of operators: sums, products, scalings, the one transpose, and the plain matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor

from .._runtime.contexts import in_own_dtype
from .._runtime.restoring import restoring
from .._space import Space
from .._torch.protocol import ByLayers
from ._base import COMPOSED, Operator, check_same
from ._dense import DenseAsk
from ._kinds import Backwards, Composite, OnSpace
from ._noise import Moments
from ._target import Target


@final
@dataclass(frozen=True, eq=False, repr=False)
class Transposed(Backwards, Composite):
    """An operator the other way round.

    Attributes:
        of: The operator.
    """

    of: Operator

    @property
    def T(self) -> Operator:  # noqa: N802
        """The operator itself."""
        return self.of

    def _apply(self, rows: Tensor) -> Tensor:
        return self.of._apply_transpose(rows)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        return self.of._apply(rows)

    @property
    def _parts(self) -> tuple[Operator, ...]:
        return (self.of,)

    def _places(self, target: Target) -> Iterable[Target]:
        return (target.T,)

    def _formula(self) -> str:
        return f"{self.of._in_formula()}ᵀ"

    def _in_formula(self) -> str:
        return self._formula()


@final
@dataclass(frozen=True, eq=False, repr=False)
class Product(Operator):
    """`left @ right`: first right, then left.

    Attributes:
        left: Applied last.
        right: Applied first.
        formed: A cheaper way to its matrix than products, if there is one.
    """

    left: Operator
    right: Operator
    formed: ByLayers | None = None

    def __post_init__(self) -> None:
        """Compare the inner spaces with each other."""
        check_same(self.left.domain, self.right.codomain, "a product")

    @property
    def domain(self) -> Space:
        """What the right factor takes."""
        return self.right.domain

    @property
    def codomain(self) -> Space:
        """What the left factor gives."""
        return self.left.codomain

    @property
    def symmetric(self) -> bool:
        """Whether this is known to be a congruence `B.T @ A @ B` with symmetric A."""
        return self._is_congruence("symmetric")

    @property
    def positive(self) -> bool:
        """Whether this is known to be a congruence of a positive operator."""
        return self._is_congruence("positive")

    def _is_congruence(self, mark: str) -> bool:
        if _is_transpose(self.left, self.right):
            return True
        factors = factors_of(self)
        while len(factors) >= 2 and _is_transpose(factors[0], factors[-1]):
            factors = factors[1:-1]
        return not factors or (len(factors) == 1 and getattr(factors[0], mark))

    def _apply(self, rows: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(rows))

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        return self.right._apply_transpose(self.left._apply_transpose(rows))

    def _formula(self) -> str:
        return " · ".join(factor._in_formula() for factor in factors_of(self))


def factors_of(operator: Operator) -> list[Operator]:
    """Return the factors of a product, from left to right; another operator is its own factor."""
    return [*factors_of(operator.left), *factors_of(operator.right)] if isinstance(operator, Product) else [operator]


def _is_transpose(a: Operator, b: Operator) -> bool:
    return (
        (isinstance(a, Transposed) and a.of is b)
        or (isinstance(b, Transposed) and b.of is a)
        or (a is b and a.symmetric)
    )


@final
@dataclass(frozen=True, eq=False, repr=False)
class Sum(Composite):
    """`left + right`, between the same spaces.

    Attributes:
        left: One.
        right: The other.
    """

    left: Operator
    right: Operator

    def __post_init__(self) -> None:
        """Compare the spaces with each other."""
        check_same(self.left.domain, self.right.domain, "a sum")
        check_same(self.left.codomain, self.right.codomain, "a sum")

    def _drawn(self) -> Iterator[tuple[float, Moments]]:
        yield from self.left._drawn()
        yield from self.right._drawn()

    def _apply(self, rows: Tensor) -> Tensor:
        return self.left._apply(rows) + self.right._apply(rows)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        return self.left._apply_transpose(rows) + self.right._apply_transpose(rows)

    @property
    def _halves(self) -> bool:
        return self.symmetric and (self.left._halves or self.right._halves)

    @property
    def _parts(self) -> tuple[Operator, ...]:
        """Which is written and which is added to it: what is found by halves or checks itself comes first."""
        return (self.right, self.left) if self.right._halves and not self.left._halves else (self.left, self.right)

    def _places(self, target: Target) -> Iterable[Target]:
        return target, target.added

    def _formula(self) -> str:
        parts = (self.left, self.right)
        return " + ".join(part.name if part.meaning is not None else part._formula() or part.name for part in parts)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Composite):
    """An operator times a number.

    Attributes:
        of: The operator.
        factor: The number.
        moments: Of the terms of a Monte Carlo estimate that this is, along directions.
        scale: The number as a tensor that receives gradients, if it is one.
    """

    of: Operator
    factor: float
    moments: Moments | None = None
    scale: Tensor | None = None

    @property
    def create_graph(self) -> bool:
        """The number receives gradients."""
        return self.scale is not None and self.scale.requires_grad

    def _drawn(self) -> Iterator[tuple[float, Moments]]:
        own = self.of._drawn() if self.moments is None else [(1.0, self.moments)]
        yield from ((self.factor * factor, moments) for factor, moments in own)

    @property
    def positive(self) -> bool:
        """As the operator is, for a factor that is not negative."""
        return self.of.positive and self.factor >= 0

    def _apply(self, rows: Tensor) -> Tensor:
        return (self.factor if self.scale is None else self.scale) * self.of._apply(rows)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        return (self.factor if self.scale is None else self.scale) * self.of._apply_transpose(rows)

    @property
    def _halves(self) -> bool:
        return self.of._halves

    @property
    def _parts(self) -> tuple[Operator, ...]:
        return (self.of,)

    def _places(self, target: Target) -> Iterable[Target]:
        return (target.times(self.factor),)

    def _formula(self) -> str:
        return f"{self.factor:.4g} · {self.of._in_formula()}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield from super()._facts()
        if self.moments is not None:
            yield "relative standard error", f"up to {self.noise:.2g}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Identity(OnSpace):
    """The identity; `damping * Identity(space)` is a damping.

    Attributes:
        space: Where it acts.
    """

    space: Space
    symmetric = True
    positive = True

    def _apply(self, rows: Tensor) -> Tensor:
        return rows

    _apply_transpose = _apply

    _own = "in memory"

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        target.put_diagonal(1.0)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Matrix(Operator):
    """A matrix in memory.

    Attributes:
        matrix: Its entries, (m, n).
        domain: What the columns mean; by default one flat array.
        codomain: What the rows mean; by default one flat array.
        symmetric: Whether it is known to be symmetric.
        positive: Whether it is known to be positive semi-definite.
    """

    matrix: Tensor
    domain: Space = None  # type: ignore[assignment]
    codomain: Space = None  # type: ignore[assignment]
    symmetric: bool = False
    positive: bool = False

    def __post_init__(self) -> None:
        """Name the axes that were not named."""
        for axis, (side, name) in enumerate((("codomain", "rows"), ("domain", "columns"))):
            if getattr(self, side) is None:
                object.__setattr__(self, side, Space.flat(self.matrix.shape[axis], name, self.matrix))

    @restoring
    def _apply(self, rows: Tensor) -> Tensor:
        with in_own_dtype(rows):
            return rows @ self.matrix.T

    @restoring
    def _apply_transpose(self, rows: Tensor) -> Tensor:
        with in_own_dtype(rows):
            return rows @ self.matrix

    _own = "in memory"

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        target.put(self.matrix)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Operator):
    """A diagonal matrix.

    Attributes:
        entries: The diagonal, (n,).
        space: Where it acts; by default one flat array.
    """

    entries: Tensor
    space: Space | None = None
    symmetric = True

    @property
    def positive(self) -> bool:
        """Whether no entry is negative."""
        return bool((self.entries >= 0).all())

    @property
    def domain(self) -> Space:
        """Where it acts."""
        return self.space or Space.flat(self.entries.shape[0], "entries", self.entries)

    @property
    def codomain(self) -> Space:
        """Where it acts."""
        return self.domain

    def _apply(self, rows: Tensor) -> Tensor:
        return rows * self.entries

    _apply_transpose = _apply

    _own = "in memory"

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        target.put_diagonal(self.entries)


COMPOSED.update(transposed=Transposed, product=Product, sum=Sum, scaled=Scaled, identity=Identity, matrix=Matrix)
