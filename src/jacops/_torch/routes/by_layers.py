"""A matrix by layers: tried, held against a product with a random direction, and foretold in bytes.

What it holds on the way is found without doing it: preparations and one sweep are measured, and the products of
matrices that follow are rehearsed on tensors that have shapes and no entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..._finite import is_finite
from ..._ladder.failures import RouteFailedError, attempt, attempted
from ..._runtime.agreement import size, worst_disagreement
from ..._runtime.contexts import private_noise
from ..._runtime.memory import Meter
from ..._runtime.restoring import restoring
from ..layers.blocks import ENTRIES
from ..sweeps.linearization import Linearization
from ..sweeps.weights import check_kept

Rows = Callable[[Tensor], Tensor]

_LEAST = 2**12  # entries to a round: below, calls of kernels cost more than their work
# Rounding of the sum must be 512 times below what is allowed, or a check of the new term decides nothing.
_DECIDED = 2.0**-9


class VerificationError(Exception):
    """A matrix was found wrong after something was added to it; it has to be started again, without this route."""


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
    """A way to a curvature matrix by layers.

    Attributes:
        lin: What was recorded: the loss, or the model's output.
        name: Under which trust in this route is remembered.
        prepare: Finds what the layers say; None where no parameter gains.
        rows: Products with the same operator by ordinary sweeps.
        entries: Finds the diagonal.
        routes: Where to note how it was done.
        most: Numbers that an array on the way may hold.
    """

    lin: Linearization
    name: str
    prepare: Callable[[], LayerCurvature | None]
    rows: Rows
    entries: Entries
    routes: dict[str, str]
    most: int = ENTRIES

    @restoring
    def begin(self, free: float = math.inf) -> PreparedFill | None:
        """Return what can be added to a matrix, within `free` bytes if that may be; None where this way is closed."""
        if self.lin.trust.refused("dense", self.name):
            return None
        check_kept(self.lin.weights, self.lin.call)
        trust, fresh, idle = self.lin.trust, self._is_fresh(self.name), (self.name, "gains nothing")
        if not trust.needs(*idle):
            return None
        with Meter() if free < math.inf else nullcontext() as meter:
            try:
                with attempted():
                    layers = self.prepare()
            except RouteFailedError:
                if not fresh:
                    raise
                return None
            if layers is None:
                if all(map(is_finite, self.lin.outputs)):  # NaN would look like samples that mix
                    trust.remember(*idle)
                return None
            expected = self.rows(self.direction().unsqueeze(0))[0] if fresh else None
        if meter is None:
            return PreparedFill(self, layers, self.most, 0.0, expected)
        held, peak, most = meter.live, meter.peak, self.most
        working = layers.working(most)
        while held + working > free and most > _LEAST:
            most //= 4
            working = layers.working(most)
        return PreparedFill(self, layers, most, max(peak, held + working), expected)

    def diagonal(self) -> Tensor | None:
        """Return the diagonal; None where this way is closed."""
        trust, name = self.lin.trust, f"{self.name}, the diagonal"
        if trust.refused("diagonal", name):
            return None
        check_kept(self.lin.weights, self.lin.call)
        fresh = self._is_fresh(name)
        try:
            found = attempt(lambda: self.entries(self.most))
        except RouteFailedError:
            if not fresh:
                raise
            return None
        if found is None:
            return None
        diagonal, route = found
        error = self._error_of(diagonal) if fresh else 0.0
        if not error <= self.lin.tolerance:
            if math.isfinite(error):
                trust.refuse("diagonal", name)
            return None
        trust.remember(name)
        self.routes["diagonal"] = route
        return diagonal

    def _error_of(self, diagonal: Tensor) -> float:
        """Return how far a diagonal is from products: of each parameter, its largest entry and another one."""
        slices = [where for where in self.lin.domain.slices if where.stop > where.start]
        largest = [where.start + int(diagonal[where].abs().argmax()) for where in slices]
        generator = torch.Generator().manual_seed(7)
        others = [int(torch.randint(where.start, where.stop, (), generator=generator)) for where in slices]
        pairs = []
        for some in zip(largest, others, strict=True):
            unit = diagonal.new_zeros(2, diagonal.shape[0])
            unit[[0, 1], some] = 1
            pairs.append((diagonal[list(some)], self.rows(unit)[[0, 1], some]))
        return worst_disagreement(pairs)

    def direction(self) -> Tensor:
        """Return the direction along which a matrix is held against a product."""
        space = self.lin.domain
        return private_noise(torch.empty(space.dim, dtype=space.dtype, device=space.device), seed=7)

    def _is_fresh(self, name: str) -> bool:
        effects = self.lin.trust.effects
        return self.lin.trust.needs(name) or bool(effects is not None and effects.reads)


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

    def accumulate(self, matrix: Tensor, weight: float = 1.0) -> bool:
        """Add X times `weight` in place, X + Xᵀ the curvature; False, with nothing changed, where it could not be told.

        Raises:
            VerificationError: What was added is wrong.
        """
        trust = self.way.lin.trust
        before = None if self.expected is None else self._along(matrix)
        if before is not None and self._is_lost_in(before, weight):
            return False
        try:
            route = attempt(lambda: self.layers.add(matrix, weight, self.most))
        except RouteFailedError as error:
            if before is None:
                raise
            raise VerificationError from error
        error = 0.0 if before is None else self._error(self._along(matrix) - before, weight)
        if not error <= self.way.lin.tolerance:
            if math.isfinite(error):
                trust.refuse("dense", self.way.name)
            raise VerificationError
        trust.remember(self.way.name)
        self.way.routes["dense"] = route
        return True

    def _along(self, half: Tensor) -> Tensor:
        direction = self.way.direction().to(half.dtype)
        return half @ direction + half.T @ direction

    def _is_lost_in(self, before: Tensor, weight: float) -> bool:
        """Say whether the matrix is so large already that rounding hides what is added."""
        rounding = torch.finfo(before.dtype).eps * size(before)
        return rounding > _DECIDED * self.way.lin.tolerance * abs(weight) * self._size

    @property
    def _size(self) -> float:
        return 0.0 if self.expected is None else size(self.expected)

    def _error(self, found: Tensor, weight: float) -> float:
        """Return how far what was added is from ordinary sweeps, parameter by parameter."""
        if self.expected is None:
            return 0.0
        expected = weight * self.expected
        return worst_disagreement([(found[where], expected[where]) for where in self.way.lin.domain.slices])
