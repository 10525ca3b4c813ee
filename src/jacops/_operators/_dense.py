"""What forming an operator takes: its routes, bytes of the matrix, and of what is held while it is filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._cached import cached_property
from .._ladder.failures import RouteFailedError, RouteUndecidedError
from .._ladder.plan import Cost, Memory
from .._ladder.route import answer, candidates, refused
from .._progress import track
from .._runtime.chunks import ROWS, rows_of
from .._runtime.memory import SMALL, Budget, budget_bytes, given_tensors, live, refuse, startup_bytes
from .._space import Space
from .._torch.protocol import BY_LAYERS, PreparedFill, Proofs, WholeAsk, check_kept, flat, is_plain, measured
from ..errors import InputError
from ._finite_results import ranks_in
from ._held import HOLES, IN_MEMORY, TIGHT, Held
from ._target import Target

if TYPE_CHECKING:
    from ._base import Operator

_TODO = "Use products (`A @ v`) or `jacops.solve` instead, write into a memmap with `out=`, or raise `budget=`."


class DenseAsk:
    """An operator's matrix, to be written into a place.

    Args:
        operator: Whose.
        free: Bytes of tensors that may be held meanwhile; infinite where nobody counts.
        limits: What the whole call may take, where that is counted.
        call: The call of which this is a part.

    Attributes:
        target: Where it is written.
        inner: What parts may hold that are made on the way.
        whole: The same in the form of `modjac`, where rows are the outputs of samples.
        layers: What layers say of it, where they were asked.
        spoiled: Something that may be wrong was added to what was there before.
    """

    question, asked, fallback, argument = "dense", None, "silent", ""

    def __init__(
        self, operator: Operator, free: float = math.inf, limits: DenseLimits | None = None, call: str = ""
    ) -> None:
        self.operator, self.free, self.limits = operator, free, limits
        self.call = call or f"{operator.name}.dense"
        formed = operator.formed
        lin = operator.by_samples
        self.whole = WholeAsk(lin, free=free, noted={}) if lin is not None and is_plain(lin) else None
        known = self.whole or formed
        self.verdicts = Proofs("never") if known is None else known.verdicts
        self.routes: dict[str, str] = {} if known is None else known.routes
        self.shape, self.description = "", ""
        self.parts = [DenseAsk(part, free, limits, self.call) for part in operator._parts]
        self.inner = free
        self.layers: PreparedFill | None = None
        self.spoiled = False

    def fill(self, target: Target) -> None:
        """Write the matrix.

        Raises:
            RouteFailedError: What was added to the place is wrong; it has to be filled from the start.
        """
        self.target = target
        answer(self, DENSE)

    @cached_property
    def route(self) -> Any:
        """The route that will be taken."""
        return candidates(self, DENSE)[0][0]

    @cached_property
    def held(self) -> Held:
        """What it holds."""
        return self.route.held(self)

    @cached_property
    def by_products(self) -> Held:
        """What products hold."""
        return _by_products(self.operator, self.free)

    @property
    def leading(self) -> DenseAsk:
        """The largest part, which determines how the whole is filled."""
        ranked = sorted(self.parts, key=lambda part: (part.held.bytes, part.held is not IN_MEMORY))
        return ranked[-1].leading if ranked else self

    def memory(self, route: Any) -> Memory:
        """Return the bytes of the whole call where this route is taken; not known for another."""
        known = self.limits is not None and self.route is route
        return Memory(self.held.chunk, self.limits.peak) if known and self.limits else Memory(0, 0)


class DenseLimits:
    """What a call of `dense` may take.

    Args:
        operator: Whose matrix.
        budget: Bytes, or a text; None for half of what is free.
        out: The caller's place for it.

    Attributes:
        ask: The call.
        result: Bytes of the matrix.
        budget: Bytes allowed.
    """

    def __init__(self, operator: Operator, budget: Budget, out: Any) -> None:
        self.result = _result_bytes(operator)
        self.allocated = self.result if out is None else 0
        self._startup, self._ranks = startup_bytes(operator.domain.device), ranks_in(operator)
        room = budget_bytes(budget, operator.domain.device) - self._startup
        # Chunks, and with them the number of sums over ranks, follow from it: it is the same on all of them.
        self.budget = self._ranks.least(f"{operator.name}.dense", room) + self._startup
        self.ask = DenseAsk(operator, max(0.0, live(self.budget - self._startup - self.allocated)), self)

    @property
    def startup(self) -> int:
        """What the process takes for its first derivative; what needs no derivative loads nothing."""
        held, ask = self.ask.held, self.ask
        idle = held is IN_MEMORY or (ask.free > 0 and startup_bytes(ask.operator.domain.device))
        return 0 if idle else self._startup

    @property
    def peak(self) -> int:
        """Bytes held at once."""
        return self.startup + self.allocated + self.ask.held.resident

    def ensure(self) -> None:
        """Refuse what does not fit.

        Raises:
            MemoryBudgetError: It does not; nothing was allocated.
        """
        fits = self.peak <= self.budget
        if self._ranks.every(self.ask.call, lambda: fits):
            return
        parts: dict[str, float] = {}
        if self.ask.held is not IN_MEMORY:
            parts[f"working memory {self.ask.leading.route.name}"] = self.ask.held.resident
        if self.allocated:
            parts[f"the matrix {self.ask.operator.shape}"] = self.result
        if startup := self.startup:
            parts["what torch loads for the first derivative of a process"] = startup
        refuse(self.ask.call, parts, self.budget, _TODO)


def _result_bytes(operator: Operator) -> int:
    return operator.shape[0] * operator.shape[1] * operator.codomain.dtype.itemsize


def dense_ask(operator: Operator, out: Any, budget: Budget) -> DenseAsk:
    """Return the question, checked against a budget where one is given or the matrix is large.

    Raises:
        MemoryBudgetError: It does not fit; nothing was allocated.
    """
    if budget is None and _result_bytes(operator) < SMALL:
        return DenseAsk(operator)
    limits = DenseLimits(operator, budget, out)
    limits.ensure()
    return limits.ask


def matrix_place(operator: Operator, out: Any) -> Target:
    """Return where the matrix is written: the caller's place, or a new tensor.

    Raises:
        InputError: `out` has another shape.
    """
    (given,) = given_tensors(out) or (None,)
    if given is None:
        given = torch.empty(*operator.shape, dtype=operator.codomain.dtype, device=operator.domain.device)
    if tuple(given.shape) != operator.shape:
        raise InputError.of("out", f"of shape {tuple(given.shape)}", f"shape {operator.shape} is needed")
    return Target(given)


# ---- routes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """The matrix of an operator as the operator gives it, or by products with unit vectors, as many together as fit.

    Attributes:
        name: As in the operator's `_own`.
        why: Why it is taken.
        axis: The axis of the matrix that unit vectors run over; None for the former.
    """

    name: str
    why: str
    axis: int | None = None
    claims = ()
    leaving = "never"  # errors of parts, such as a model's, are the caller's

    def refuses(self, ask: DenseAsk) -> str | None:
        """Products always apply, the others to one kind of operators."""
        return None if self.axis is not None or ask.operator._own == self.name else ""

    def cost(self, ask: DenseAsk) -> Cost:
        """A product for each vector; less for others."""
        sweeps = -math.inf if self.axis is None else ask.operator.shape[self.axis]
        return Cost(sweeps, lambda: ask.memory(self))

    def held(self, ask: DenseAsk) -> Held:
        """Return what is held meanwhile."""
        return ask.operator._held(ask) if self.axis is None else ask.by_products

    def describe(self, ask: DenseAsk) -> str:
        """Name it."""
        return self.name if self.axis is None else f"{self.name}, {ask.operator.shape[self.axis]} products"

    def value(self, ask: DenseAsk) -> None:
        """Write the matrix.

        Raises:
            RouteFailedError: An earlier route has changed the tensor that it adds to.
        """
        if ask.spoiled:
            raise RouteFailedError("an earlier route has changed the tensor that it adds to")
        if self.axis is not None:
            ask.layers = None  # what it holds is no part of the products
            put_products(ask.operator, ask.target, ask.by_products.chunk)
            return
        ask.spoiled = ask.target.adds
        if ask.operator._halves:
            ask.target.by_halves(lambda target: ask.operator._fill(target, ask))
        else:
            ask.operator._fill(ask.target, ask)


class MatchesProduct:
    """A product with a random direction is the one of ordinary sweeps."""

    name, always = "matches a product", True  # where values are read it is looked at in every call

    def evidence(self, route: Any, ask: DenseAsk, found: tuple[PreparedFill, Tensor | float]) -> bool:
        """Return True where it is.

        Raises:
            RouteFailedError: It is not.
        """
        layers, before = found
        if layers.expected is not None:
            weight = ask.target.weight if ask.target.half else 2 * ask.target.weight
            layers.check(layers.along(ask.target.matrix) - before, weight)
        return True


class FilledByLayers:
    """Blocks of the matrix from what sweeps find at the outputs of layers."""

    name, claims, leaving = "by layers", (MatchesProduct(),), "silent"
    why = "fewest sweeps: one per number at the layers' outputs"

    def refuses(self, ask: DenseAsk) -> str | None:
        """It is for curvatures of which a parameter gains, and takes memory."""
        way = ask.operator.formed
        if way is None or not ask.free > 0:
            return ""
        if ask.layers is None:
            free = HOLES / TIGHT * ask.free  # few and large tensors leave few holes
            layers = way.begin(free)
            if layers.bytes > free:
                return "more than the budget"
            ask.layers = layers
        return None

    def cost(self, ask: DenseAsk) -> Cost:
        """Less than products."""
        return Cost(-math.inf, lambda: ask.memory(self))

    def held(self, ask: DenseAsk) -> Held:
        """Return what is held meanwhile."""
        layers = ask.layers
        return Held(layers.bytes, layers.most, "numbers to a round", tight=True) if layers else ask.by_products

    def describe(self, ask: DenseAsk) -> str:
        """Name layers and sweeps."""
        return ask.description

    def value(self, ask: DenseAsk) -> tuple[PreparedFill, Tensor | float]:
        """Write the matrix; return the part by layers, and a product with what was there before.

        Raises:
            RouteFailedError: Rounding would hide what is added.
        """
        layers, target, before = ask.layers, ask.target, 0.0
        if layers is None:
            raise RouteFailedError("nothing was prepared")
        if target.adds and layers.expected is not None:
            before = layers.along(target.matrix)
            layers.check_seen(before, target.weight)
        ask.spoiled = target.adds

        def add(place: Target) -> None:
            ask.description = layers.layers.add(place.matrix, place.weight, layers.most)

        target.by_halves(add)
        return layers, before


class FilledBySamples:
    """Columns of each parameter from what sweeps of all samples at once find at the outputs of layers."""

    name, claims, leaving = "by samples", (), "silent"
    why = "fewest sweeps: one per entry of one sample's output"

    def refuses(self, ask: DenseAsk) -> str | None:
        """It is for a model's output by its parameters, as the route of `modjac` is."""
        if ask.whole is None:
            return ""
        check_kept(ask.whole.lin.weights, ask.whole.call)
        return refused(ask.whole, BY_LAYERS)

    def cost(self, ask: DenseAsk) -> Cost:
        """As many sweeps as for `modjac`."""
        sweeps = math.inf if ask.whole is None else BY_LAYERS.cost(ask.whole).sweeps
        return Cost(sweeps, lambda: ask.memory(self))

    def held(self, ask: DenseAsk) -> Held:
        """Return what is held meanwhile."""
        if ask.whole is None:
            return ask.by_products
        together, held = BY_LAYERS.held(ask.whole)
        return Held(held, together, BY_LAYERS.unit)

    def describe(self, ask: DenseAsk) -> str:
        """Name the samples."""
        return self.name if ask.whole is None else BY_LAYERS.describe(ask.whole)

    def value(self, ask: DenseAsk) -> None:
        """Write the matrix in place.

        Raises:
            RouteFailedError: It disagrees with a plain sweep, or is to be added to another matrix.
        """
        whole, target = ask.whole, ask.target
        if whole is None or target.adds or target.matrix.dtype != whole.lin.domain.dtype:
            raise RouteUndecidedError("it is not written in place")
        whole.into = flat(whole.lin, [target.matrix]).blocks
        answer(whole, (BY_LAYERS,))
        target.multiply()


DENSE = (
    Filled("in memory", "the entries are there"),
    Filled("layer by layer", "each parameter writes its columns"),
    Filled("batch by batch", "one pass over the data"),
    Filled("part by part", "each part writes its own"),
    FilledByLayers(),
    FilledBySamples(),
    Filled("by columns", "fewer vectors", axis=1),
    Filled("by rows", "fewer vectors", axis=0),
)


def _shorter(operator: Operator) -> tuple[Space, Callable[[Tensor], Tensor], bool]:
    """Return the shorter axis, products with vectors of it, and whether these are columns of the matrix."""
    if operator.shape[1] <= operator.shape[0]:
        return operator.domain, operator._apply, True
    return operator.codomain, operator._apply_transpose, False


def put_products(operator: Operator, target: Target, chunk: int) -> None:
    """Write a matrix by products with unit vectors of its shorter axis."""
    space, apply, columns = _shorter(operator)
    place = target.T if columns else target
    for start in track(range(0, space.dim, chunk), "dense"):
        where = slice(start, min(start + chunk, space.dim))
        place.part(where).put(apply(space.units(where)))


def _by_products(operator: Operator, free: float) -> Held:
    m, n = operator.shape
    most = rows_of(m + n, max(1, min(ROWS, n, m)))
    if not 0 < free < math.inf:
        return Held(chunk=most)
    space, apply, _ = _shorter(operator)
    fixed, each = measured(apply, space)
    chunk = max(1, min(most, int((free - fixed) // max(each, 1.0))))
    chunk = ranks_in(operator).least(f"products with the {operator.name}", chunk)
    return Held(fixed + each * chunk, chunk)
