"""Plans: what a call will take in sweeps and in bytes, known before it runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from .._display import Described, Description, Table
from .._keywords import keys_of, unknown
from .._ladder.route import candidates
from .._runtime.memory import in_words
from .._saving import Savable
from .._tables import record_table
from ..errors import InputError, InputTypeError

if TYPE_CHECKING:
    import pandas

Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True)
class PlannedRoute(Savable):
    """One route of a plan.

    Attributes:
        name: What it is called, as in `mode=` where there is such an argument.
        sweeps: Passes over the model for every chunk; None where that is not known.
        peak_bytes: Largest number of bytes held at once, with the result if the call allocates it; None if unknown.
        why: Why it is taken, or why not.
        chosen: It is taken.
    """

    name: str
    sweeps: int | None
    peak_bytes: int | None
    why: str
    chosen: bool = False


@dataclass(frozen=True, repr=False)
class Plan(Savable, Described):
    """The predicted sweeps and memory of a call.

    Attributes:
        call: The call.
        routes: The ways there are, the chosen one first.
        result_bytes: Bytes of the result, also where the caller allocates it.
        startup_bytes: Part of every peak: what torch loads for the first derivative of a process, 0 later.
        budget_bytes: Bytes allowed.
        chunk: How many of `unit` go through the model together.
        unit: What is counted: samples to a sweep, or vectors to a batched pass.
    """

    call: str
    routes: tuple[PlannedRoute, ...]
    result_bytes: int
    startup_bytes: int
    budget_bytes: int
    chunk: int
    unit: str

    @property
    def chosen(self) -> PlannedRoute:
        """The route that will be taken."""
        return next(route for route in self.routes if route.chosen)

    @property
    def peak_bytes(self) -> int:
        """Predicted bytes held at once on the chosen route."""
        return self.chosen.peak_bytes or 0

    @property
    def fits(self) -> bool:
        """Whether the chosen route keeps to the budget; where not, the call raises `MemoryBudgetError`."""
        return self.peak_bytes <= self.budget_bytes

    def to_pandas(self) -> pandas.DataFrame:
        """Return the routes as a table, one row each, with a column per field of `PlannedRoute`.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
        """
        return record_table(self.routes, PlannedRoute, "name")

    def _describe(self) -> Description:
        verdict = "" if self.fits else " (over the budget: the call will refuse)"
        title = (
            f"Plan for {self.call}: {self.chunk} {self.unit}, result {in_words(self.result_bytes)}, "
            f"budget {in_words(self.budget_bytes)}{verdict}"
        )
        rows = [
            (
                f"{'→' if route.chosen else ' '} {route.name}",
                "" if route.sweeps is None else f"{route.sweeps:,d}",
                "" if route.peak_bytes is None else in_words(route.peak_bytes),
                route.why,
            )
            for route in self.routes
        ]
        return Description(title, tables=[Table(("  route", "sweeps", "peak", "why"), rows)])


_Planner = Callable[[dict[str, Any]], Plan]
_PLANNERS: dict[str, tuple[Callable[..., Any], _Planner, frozenset[str]]] = {}


def planned_by(planner: _Planner, options: type | None = None) -> Callable[[Call], Call]:
    """Return a decorator that registers a call with `plan`.

    Args:
        planner: Takes the call's arguments by name, defaults filled in; those of `**options` as a dict.
        options: The typed dict of the call's `**options`, where it has some.
    """

    def register(call: Call) -> Call:
        _PLANNERS[call.__name__] = call, planner, keys_of(options)
        return call

    return register


def plan(call: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Plan:
    """Return the predicted sweeps and memory of `call(*args, **kwargs)`, without running it.

    At most one forward pass is run over the whole input, and for calls by samples only runs of one and of two samples.

    Args:
        call: The call (`jacops.compute_jacobian`, `jacops.contributions`, `jacops.full_jacobian`, `jacops.modjac`, or
            an operator's `dense` as in `plan(H.dense)`), or its name.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        The routes with sweeps and predicted peaks, and the one that will be taken.

    Raises:
        InputError: There is no plan for such a call.

    Example:
        >>> import jacops, torch
        >>> plan("dense", jacops.linalg.Matrix(torch.eye(3))).result_bytes
        36
    """
    if isinstance(call, MethodType):
        args, call = (call.__self__, *args), call.__func__.__name__
    name = call if isinstance(call, str) else getattr(call, "__name__", f"a {type(call).__name__}")
    if name not in _PLANNERS:
        known = ", ".join(sorted(_PLANNERS))
        todo = "Pass `A.dense`, not an operator `A`." if hasattr(call, "dense") else ""
        raise InputError.of("call", repr(name), f"one of {known} is needed", todo)
    function, planner, options = _PLANNERS[name]
    parameters = inspect.signature(function).parameters
    known = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD] + sorted(options)
    for keyword in kwargs:
        if keyword not in known:
            raise unknown(f"plan: {name}", keyword, known)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise InputTypeError(f"plan: these are not arguments of {name}: {error}.") from None
    bound.apply_defaults()
    return planner(bound.arguments)


def listed(ask: Any, routes: Sequence[Any], result: int, startup: int, budget: int, unit: str) -> Plan:
    """Return the plan of a question from its routes: each with its cost, and why it is taken or not."""
    rows, chunk, order = [], 1, candidates(ask, routes)
    only = next((reason for _, reason in order if reason), "") if len(order) == 1 or order[1][1] is not None else ""
    for number, (route, reason) in enumerate(order):
        cost, chosen = route.cost(ask), number == 0
        memory = cost.memory if reason != "" or not rows else None
        if reason == "":  # it does not apply to such a question at all
            continue
        asked = f"asked for by `{ask.argument}`" if ask.asked else ""
        why = reason or (
            asked or only or getattr(route, "why", "fewest sweeps")
            if chosen
            else f"not {asked}"
            if asked
            else "more sweeps"
        )
        sweeps = None if math.isinf(cost.sweeps) else int(cost.sweeps)
        rows.append(PlannedRoute(route.name, sweeps, memory.peak if memory and memory.chunk else None, why, chosen))
        chunk = memory.chunk if chosen and memory else chunk
        unit = getattr(route, "unit", unit) if chosen else unit
    return Plan(ask.call, tuple(rows), result, startup, budget, chunk, unit)
