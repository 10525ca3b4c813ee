"""Kronecker factors of a curvature, layer by layer: what one pass over the data gives, and EK-FAC starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from .._cached import cached_property
from .._display import Described, Description
from .._operators._eigen_blocks import FORMS, EigenBlocks, covered
from .._runtime.memory import in_words
from .._space import Space
from .._words import FactorBias, Sharing
from ..errors import InputError
from ._kronecker_noise import Noise
from ._kronecker_sums import OuterSums, Pair, RowSums


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerFactors(Described, Mapping[str, tuple[Tensor, Tensor]]):
    r"""Kronecker factors of a curvature by parameter name: `factors["0.weight"]` is `(B, A)`.

    The block of a weight $W$, in the row-major order of its entries, is approximately $B \otimes A$
    (`torch.kron(B, A)`), in the scale of the objective. B belongs to the first axis of W as it is stored (of
    `nn.Linear` and convolutions: outputs), A to all others laid end to end (inputs). Cotangents are summed, what they
    multiply is averaged. A factor with one axis is a diagonal (a vocabulary, or a side longer than `widest`); of a
    weight in g groups both have a leading axis g, and the block is block diagonal.

    With `bias="joint"` a bias is one more, last, input of its weight, and has no entry of its own; with
    `bias="separate"` it has B of its weight and `[[1]]`. Parameters that enter otherwise than by a product have their
    curvature itself, or its diagonal where they are large, and `[[1]]`.

    `a + b` are the factors of both data sets together, B summed and A averaged over all, as if in one pass; `c * a`
    scales the curvature.

    Attributes:
        space: The parameters.
        sums: The statistics, one for each block.
        bias: How biases are taken.
        sharing: How positions of a sample are taken.
        kind: Of which curvature.
        drawn: Moments of the draws, where there are any.
    """

    space: Space
    sums: tuple[OuterSums | RowSums, ...]
    bias: FactorBias
    sharing: Sharing
    kind: str
    drawn: Noise | None = None

    @cached_property
    def _owners(self) -> dict[str, OuterSums | RowSums]:
        """The statistics that a parameter's factors are made of, in the order of the parameters."""
        own = {name: sums for sums in self.sums for name in sums.owners(self.bias == "separate")}
        return dict(sorted(own.items(), key=lambda item: self.space.names.index(item[0])))

    def _pair(self, name: str, sums: OuterSums | RowSums) -> Pair:
        return sums.pair_of(name, self.bias == "separate")

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the factors of a parameter, made anew."""
        sums = self._owners[name]
        return self._pair(name, sums).stored(sums.dtype)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of parameters with factors of their own."""
        return iter(self._owners)

    def __len__(self) -> int:
        """How many they are."""
        return len(self._owners)

    @property
    def noise(self) -> float | None:
        """The relative standard error that draws leave, estimated from above; None where there are none."""
        return None if self.drawn is None else self.drawn.value

    def __add__(self, other: object) -> KroneckerFactors:
        """Return the factors of two data sets together.

        Raises:
            InputError: They are of other parameters, or made otherwise.
        """
        if not isinstance(other, KroneckerFactors):
            return NotImplemented
        if self._made() != other._made():
            came = f"of {other.kind}, {other.sharing}, bias {other.bias}, by {other.space.layout}"
            needed = f"they must be made as the first: {self.kind}, {self.sharing}, bias {self.bias}"
            raise InputError.of("the other factors", came, needed)
        sums = tuple(a.plus(b) for a, b in zip(self.sums, other.sums, strict=True))  # pyright: ignore[reportArgumentType]
        drawn = None if self.drawn is None or other.drawn is None else self.drawn.plus(other.drawn)
        return replace(self, sums=sums, drawn=drawn)

    def _made(self) -> tuple[Any, ...]:
        sums = [(type(own), own.where, getattr(own, "basis", None), own.form) for own in self.sums]
        return self.bias, self.sharing, self.kind, self.space.shapes, self.space.names, sums

    def __mul__(self, factor: float) -> KroneckerFactors:
        """Scale the curvature."""
        if not isinstance(factor, int | float):
            return NotImplemented
        drawn = None if self.drawn is None else Noise().plus(self.drawn, factor)
        return replace(self, sums=tuple(own.times(float(factor)) for own in self.sums), drawn=drawn)

    __rmul__ = __mul__

    def to_operator(self) -> EigenBlocks:
        """Return the approximation to the curvature (K-FAC), an operator with `inverse(damping)` and `eigenvalues`.

        Raises:
            NonFiniteError: A factor holds NaN or Inf.
        """
        blocks = tuple(self._pair(name, own).block(own.dtype) for name, own in self._owners.items())
        return EigenBlocks(self.space, blocks, self.noise)

    @property
    def nbytes(self) -> int:
        """Bytes that the factors take."""
        return sum(side.nbytes for pair in self.values() for side in pair)

    @property
    def coverage(self) -> dict[str, int]:
        """How many parameters are in Kronecker form, exact, or known by their diagonal."""
        sizes = [(own.form, sum(w.stop - w.start for w in own.where)) for own in self.sums]
        return {form: sum(n for found, n in sizes if found == form) for form in FORMS}

    def _describe(self) -> Description:
        facts = [(name, " ⊗ ".join(str(tuple(side.shape)) for side in self[name])) for name in list(self)[:8]]
        if len(self) > len(facts):
            facts.append(("and", f"{len(self) - len(facts)} more"))
        facts += [("form", covered(self.coverage)), ("memory", in_words(self.nbytes))]
        return Description(f"KroneckerFactors({self.kind}, {self.sharing}, bias {self.bias})", tuple(facts))
