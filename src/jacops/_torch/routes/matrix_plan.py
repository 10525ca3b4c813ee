"""How many vectors to a pass, or sweeps to a write, when a whole Jacobian is formed from one linearization."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..._ladder.failures import RouteFailedError
from ..._runtime.memory import SMALL, Budget, Meter, budget_bytes, live, refuse, resident, size_of, startup_bytes
from ..._runtime.restoring import restoring
from ..sweeps.linearization import Linearization
from .whole import LayerRoute


@dataclass(frozen=True)
class MatrixPlan:
    """What forming a Jacobian from a linearization takes.

    Attributes:
        result: Its bytes.
        allocated: How many of them the call allocates: none with `out`.
        largest: The largest block, in words.
        held: Bytes that the linearization keeps.
        startup: What the process takes for its first derivative.
        pull: Bytes that a cotangent takes in a pass.
        budget: Bytes allowed.
        chunk: Vectors to a pass.
        columns: By input entries instead of output entries.
    """

    result: int
    allocated: int
    largest: str
    held: int
    startup: int
    pull: float
    budget: int
    chunk: int
    columns: bool

    def peak(self, columns: bool) -> int:
        """Return the bytes held at once by columns, or by rows."""
        graph = 2 * self.held if columns else self.held  # a push needs the recorded backward pass too
        return self.startup + self.allocated + resident(graph + self.pull * self.chunk)


def matrix_plan(
    lin: Linearization,
    budget: Budget,
    columns: bool | None = None,
    chunk_size: int | None = None,
    out: bool = False,
    startup: int | None = None,
) -> MatrixPlan:
    """Return what forming `J[output][leaf]` takes; one backward pass says what a cotangent does.

    Args:
        lin: Where the function was linearised.
        budget: Bytes allowed.
        columns: By input entries; None for the fewer.
        chunk_size: Most vectors to a pass.
        out: The result is given a place by the caller.
        startup: What the process takes for its first derivative, where that was taken before this; else it is asked.
    """
    columns = by_columns(lin) if columns is None else columns
    sizes = {
        f"the Jacobian {(*o.shape, *leaf.shape)} of {name} by {by}": o.numel() * leaf.numel() * leaf.dtype.itemsize
        for name, o in zip(lin.codomain.names, lin.outputs, strict=True)
        for by, leaf in zip(lin.domain.names, lin.leaves, strict=True)
    }
    largest = max(sizes, key=lambda name: sizes[name], default="the Jacobian")
    result = sum(sizes.values())
    startup = startup_bytes(lin.domain.device) if startup is None else startup
    allowed = budget_bytes(budget, lin.domain.device)
    held, allocated = lin.held_bytes, 0 if out else result
    room = live(allowed - startup - allocated) - (2 * held if columns else held)
    pull = _pulled(lin) if room > 0 else 0.0
    many = lin.domain.dim if columns else lin.codomain.dim
    chunk = max(1, min(chunk_size or lin.chunk(many), int(room / max(pull, 1.0))))
    return MatrixPlan(result, allocated, largest, held, startup, pull, allowed, chunk, columns)


@dataclass(frozen=True)
class LayersPlan:
    """What forming a Jacobian by layers takes.

    Attributes:
        peak: Bytes held at once.
        together: Sweeps that are written together.
        sweeps: All of them.
    """

    peak: int
    together: int
    sweeps: int


def layers_plan(route: LayerRoute, budget: Budget, out: bool, startup: int) -> LayersPlan | None:
    """Return what the route by layers takes within the budget; None where it does not fit, or fails.

    Args:
        route: The route.
        budget: Bytes allowed.
        out: The result is given a place by the caller.
        startup: What the process takes for its first derivative, which the route itself may have been.
    """
    lin, allocated = route.lin, 0 if out else _result_bytes(route.lin)
    room = live(budget_bytes(budget, lin.domain.device) - startup - allocated) - lin.held_bytes
    try:
        together = route.together(room) if room > 0 else 0
    except RouteFailedError:
        return None
    if not together:
        return None
    peak = startup + allocated + resident(lin.held_bytes + route.needs.live(together))
    return LayersPlan(peak, together, route.sweeps)


def fitted_layers(route: LayerRoute, budget: Budget, out: bool, startup: int) -> int:
    """Return how many sweeps are written together by layers; 0 where not even one fits."""
    if budget is None and _result_bytes(route.lin) < SMALL:
        return route.together(None)
    plan = layers_plan(route, budget, out, startup)
    return plan.together if plan else 0


def _result_bytes(lin: Linearization) -> int:
    return sum(o.numel() for o in lin.outputs) * sum(size_of(leaf) for leaf in lin.leaves)


def fitted_chunk(
    lin: Linearization,
    budget: Budget,
    columns: bool | None = None,
    chunk_size: int | None = None,
    out: bool = False,
    startup: int | None = None,
) -> int | None:
    """Return how many vectors go into a pass, None for the linearization's own choice where all is small.

    Raises:
        MemoryBudgetError: The result and one vector do not fit.
    """
    if budget is None and _result_bytes(lin) < SMALL:
        return chunk_size
    plan = matrix_plan(lin, budget, columns, chunk_size, out, startup)
    if plan.peak(plan.columns) > plan.budget:
        parts: dict[str, float] = {"working memory of one pass": plan.held * (1 + plan.columns) + plan.pull}
        if plan.allocated:
            parts[plan.largest] = plan.allocated
        if plan.startup:
            parts["what torch loads for the first derivative of a process"] = plan.startup
        todo = (
            "Pick outputs with `outputs=`, pass fewer parameters, write into a memmap with `out=`, use products "
            "(`jvp`, `vjp`), or raise `budget=`."
        )
        refuse(lin.call, parts, plan.budget, todo)
    return plan.chunk


def by_columns(lin: Linearization) -> bool:
    """Say whether a push per input entry takes fewer sweeps."""
    return lin.domain.dim + 1 < lin.codomain.dim and not lin.trust.refused("push", "dual")


@restoring
def _pulled(lin: Linearization) -> float:
    """Return the bytes that one backward pass holds at once, its cotangent and its gradients included."""
    with Meter() as meter:
        lin.pull([torch.zeros_like(o) for o in lin.outputs])
    return float(meter.peak)
