"""Curvature by layers: prepared, compared with products, and planned in bytes.

What it holds on the way is found without doing it: preparations and one sweep are measured, and the products of
matrices that follow are rehearsed on tensors that have shapes and no entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..._finite import is_finite
from ..._ladder.failures import RouteFailedError, RouteNotFiniteError, RouteUndecidedError, RouteWrongError, attempt
from ..._ladder.route import Asked, Way, answer
from ..._runtime.agreement import size, worst_disagreement
from ..._runtime.contexts import private_noise
from ..._runtime.memory import Meter
from ..._runtime.restoring import restoring
from ..layers.blocks import ENTRIES
from ..sweeps.linearization import Linearization
from ..sweeps.proofs import Proofs
from ..sweeps.weights import check_kept

Rows = Callable[[Tensor], Tensor]
Found = TypeVar("Found")

_LEAST = 2**12  # entries to a round: below, calls of kernels cost more than their work
_BYTES = "bytes by layers"  # what is remembered of a graph
# Rounding of the sum must be 512 times below what is allowed, or a check of the new term decides nothing.
_DECIDED = 2.0**-9


class Rehearsal(Meter):
    """A meter for work on tensors without entries; what would load torch's compiler for them is passed over."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first, aten = args[0] if args else None, torch.ops.aten
        if func is aten.triu_indices.default and first == args[1]:
            return self._empty(types, [2, args[0] * (args[0] + 1) // 2], torch.long)
        if isinstance(first, Tensor) and first.is_meta:
            if func._schema.is_mutable:
                return first  # writes in place make nothing
            if func in (aten.mul.Tensor, aten.add.Tensor):
                return self._empty(types, torch.broadcast_shapes(first.shape, args[1].shape), first.dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _empty(self, types: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
        options = {"dtype": dtype, "device": torch.device("meta")}
        return super().__torch_dispatch__(torch.ops.aten.empty.memory_format, types, (shape,), options)


class LayerCurvature(Protocol):
    """A curvature of which the samples' share is known at the outputs of layers, ready to be added to a matrix."""

    def working(self, most: int) -> float:
        """Return the bytes held while it is added, where an array on the way may hold `most` numbers."""
        ...

    def add(self, matrix: Tensor, weight: float, most: int) -> str:
        """Add a half, X with X + Xᵀ the curvature, times a weight, and say how it was done."""
        ...


Entries = Callable[[int], tuple[Tensor, str] | None]
"""Numbers that an array on the way may hold -> a diagonal and how it was found; None where no parameter gains."""


@dataclass(frozen=True, eq=False)
class ByLayers:
    """What layers say of a curvature.

    Attributes:
        lin: What was recorded: the loss, or the model's output.
        name: What is proved is kept under it.
        prepare: Finds what the layers say; None where no parameter gains.
        rows: Products with the same operator by ordinary sweeps.
        entries: Finds the diagonal.
        routes: Where it is noted how results were computed.
        most: Numbers that an array on the way may hold.
    """

    lin: Linearization
    name: str
    prepare: Callable[[], LayerCurvature | None]
    rows: Rows
    entries: Entries
    routes: dict[str, str]
    most: int = ENTRIES

    @property
    def verdicts(self) -> Proofs:
        """What is known of the graph."""
        return self.lin.proofs

    @restoring
    def begin(self, free: float = math.inf) -> PreparedFill:
        """Return what can be added to a matrix, within `free` bytes if that may be.

        Raises:
            RouteFailedError: No parameter gains, or torch cannot take the sweeps.
        """
        check_kept(self.lin.weights, self.lin.call)
        new, known = self.is_new("dense"), self.lin.proofs.measured
        prepared = None if new else known.get((_BYTES, self.name))
        with Meter() if free < math.inf and prepared is None else nullcontext() as meter:
            layers = self.gained(attempt(self.prepare))
            expected = self.rows(self.direction().unsqueeze(0))[0] if new else None
        if meter is None and prepared is None:
            return PreparedFill(self, layers, self.most, 0.0, expected)
        held, peak = prepared or (meter.live, meter.peak)  # pyright: ignore[reportOptionalMemberAccess]
        if not new:
            known.take((_BYTES, self.name), lambda: (held, peak))

        def working(most: int) -> float:
            return known.take((_BYTES, self.name, most), lambda: layers.working(most))

        most = self.most
        while held + working(most) > free and most > _LEAST:
            most //= 4
        return PreparedFill(self, layers, most, max(peak, held + working(most)), expected)

    def diagonal(self, plain: Callable[[], Tensor]) -> Tensor:
        """Return the diagonal, by `plain` where no parameter gains or entries disagree with products."""
        check_kept(self.lin.weights, self.lin.call)
        ask = DiagonalAsk("diagonal", self.lin.call, self.verdicts, routes=self.routes, way=self, plain=plain)
        return answer(ask, DIAGONAL)

    def gained(self, found: Found | None) -> Found:
        """Return what layers say.

        Raises:
            RouteFailedError: They say nothing.
        """
        if found is not None:
            return found
        if all(map(is_finite, self.lin.outputs)):
            raise RouteFailedError("no parameter gains by layers")
        raise RouteNotFiniteError("values are not finite")  # they look like samples that mix

    def direction(self) -> Tensor:
        """Return the direction along which a matrix is compared with a product."""
        space = self.lin.domain
        return private_noise(torch.empty(space.dim, dtype=space.dtype, device=space.device), seed=7)

    def is_new(self, result: str) -> bool:
        """Return whether a result must still be compared with products: where values are read, the graph may differ."""
        effects = self.lin.proofs.effects
        return self.lin.proofs.needs(self.name, result) or bool(effects is not None and effects.reads)

    def verify(self, result: str, error: float) -> None:
        """Note that a result is as far from products as rounding allows.

        Raises:
            RouteFailedError: It is further, or not finite.
        """
        if math.isnan(error):
            raise RouteNotFiniteError("values are not finite")
        if not error <= self.lin.tolerance:
            raise RouteWrongError(f"by layers it is off a product by {error:.1e}")
        self.lin.proofs.remember(self.name, result)


@dataclass(frozen=True, eq=False)
class PreparedFill:
    """A matrix by layers that is ready to be added to another.

    Attributes:
        way: What it is of.
        layers: What the layers say.
        most: Numbers that an array on the way may hold.
        bytes: Bytes held on the way, what the layers say included; 0 where that was not asked.
        expected: A product by ordinary sweeps with `way.direction()`, where the route still has to be proved.
    """

    way: ByLayers
    layers: LayerCurvature
    most: int
    bytes: float
    expected: Tensor | None

    def along(self, half: Tensor) -> Tensor:
        """Return the product of `half + half.T` with the direction."""
        direction = self.way.direction().to(half.dtype)
        return half @ direction + half.T @ direction

    def check_seen(self, before: Tensor, weight: float) -> None:
        """Refuse to add to a matrix that is so large already that rounding hides what is added.

        Raises:
            RouteUndecidedError: It is.
        """
        rounding = torch.finfo(before.dtype).eps * size(before)
        allowed = (
            0.0 if self.expected is None else _DECIDED * self.way.lin.tolerance * abs(weight) * size(self.expected)
        )
        if rounding > allowed:
            raise RouteUndecidedError("rounding of the sum would hide what is added by layers")

    def check(self, added: Tensor, weight: float) -> None:
        """Compare a product with what was added to plain sweeps, parameter by parameter.

        Raises:
            RouteFailedError: They disagree.
        """
        if self.expected is not None:
            expected = weight * self.expected
            pairs = [(added[where], expected[where]) for where in self.way.lin.domain.slices]
            self.way.verify("dense", worst_disagreement(pairs))


# ---- the diagonal --------------------------------------------------------------------------------------------------


@dataclass
class DiagonalAsk(Asked):
    """The diagonal of a curvature.

    Attributes:
        way: What layers say of it.
        plain: Finds it by products.
        description: How it was found by layers.
    """

    way: ByLayers = None  # type: ignore[assignment]
    plain: Callable[[], Tensor] = None  # type: ignore[assignment]
    description: str = ""


class EntriesMatchProducts:
    """Of each parameter, the largest entry and another one are what products give."""

    name, always = "entries match products", True

    def evidence(self, route: Any, ask: DiagonalAsk, found: Tensor) -> bool:
        """Return True where they are.

        Raises:
            RouteFailedError: They are not.
        """
        if ask.way.is_new("diagonal"):
            ask.way.verify("diagonal", _error_of(ask.way, found))
        return True


def _by_layers(ask: DiagonalAsk) -> Tensor:
    found, ask.description = ask.way.gained(ask.way.entries(ask.way.most))
    return found


DIAGONAL = (
    Way("by layers", _by_layers, words=lambda ask: ask.description, claims=(EntriesMatchProducts(),)),
    Way("by products", lambda ask: ask.plain(), leaving="never"),
)


def _error_of(way: ByLayers, diagonal: Tensor) -> float:
    """Return how far a diagonal is from products: of each parameter, its largest entry and another one."""
    slices = [where for where in way.lin.domain.slices if where.stop > where.start]
    largest = [where.start + int(diagonal[where].abs().argmax()) for where in slices]
    generator = torch.Generator().manual_seed(7)
    others = [int(torch.randint(where.start, where.stop, (), generator=generator)) for where in slices]
    pairs = []
    for some in zip(largest, others, strict=True):
        unit = diagonal.new_zeros(2, diagonal.shape[0])
        unit[[0, 1], some] = 1
        pairs.append((diagonal[list(some)], way.rows(unit)[[0, 1], some]))
    return worst_disagreement(pairs)
