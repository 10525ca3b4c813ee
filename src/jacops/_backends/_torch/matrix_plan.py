"""How many vectors to a pass when a whole Jacobian is formed from one tape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .memory import SMALL, Budget, Meter, budget_bytes, live, refuse, resident, startup_bytes
from .tape import Tape


@dataclass(frozen=True)
class MatrixPlan:
    """What forming a Jacobian from a tape takes.

    Attributes:
        result: Its bytes.
        allocated: How many of them the call allocates: none with `out`.
        largest: The largest block, in words.
        held: Bytes that the tape keeps.
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
    tape: Tape, budget: Budget, columns: bool | None = None, chunk_size: int | None = None, out: bool = False
) -> MatrixPlan:
    """Return what forming `J[output][leaf]` takes; one backward pass says what a cotangent does.

    Args:
        tape: Where the function was linearised.
        budget: Bytes allowed.
        columns: By input entries; None for the fewer.
        chunk_size: Most vectors to a pass.
        out: The result is given a place by the caller.
    """
    columns = by_columns(tape) if columns is None else columns
    sizes = {
        f"the Jacobian {(*o.shape, *leaf.shape)} of {name} by {by}": o.numel() * leaf.numel() * leaf.dtype.itemsize
        for name, o in zip(tape.codomain.names, tape.outputs, strict=True)
        for by, leaf in zip(tape.domain.names, tape.leaves, strict=True)
    }
    largest = max(sizes, key=lambda name: sizes[name], default="the Jacobian")
    result, startup = sum(sizes.values()), startup_bytes(tape.domain.device)
    allowed = budget_bytes(budget, tape.domain.device)
    held, allocated = tape.held_bytes, 0 if out else result
    room = live(allowed - startup - allocated) - (2 * held if columns else held)
    pull = _pulled(tape) if room > 0 else 0.0
    many = tape.domain.dim if columns else tape.codomain.dim
    chunk = max(1, min(chunk_size or tape.chunk(many), int(room / max(pull, 1.0))))
    return MatrixPlan(result, allocated, largest, held, startup, pull, allowed, chunk, columns)


def fitted_chunk(
    tape: Tape, budget: Budget, columns: bool | None = None, chunk_size: int | None = None, out: bool = False
) -> int | None:
    """Return how many vectors go into a pass, None for the tape's own choice where all is small.

    Raises:
        MemoryBudgetError: The result and one vector do not fit.
    """
    entries = sum(o.numel() for o in tape.outputs) * sum(leaf.numel() * leaf.dtype.itemsize for leaf in tape.leaves)
    if budget is None and entries < SMALL:
        return chunk_size
    plan = matrix_plan(tape, budget, columns, chunk_size, out)
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
        refuse(tape.call, parts, plan.budget, todo)
    return plan.chunk


def by_columns(tape: Tape) -> bool:
    """Say whether a push per input entry takes fewer sweeps."""
    return tape.domain.dim + 1 < tape.codomain.dim and not tape.trust.refused("push", "dual")


def _pulled(tape: Tape) -> float:
    """Return the bytes that one backward pass holds at once, its cotangent and its gradients included."""
    with Meter() as meter:
        tape.pull([torch.zeros_like(o) for o in tape.outputs])
    return float(meter.peak)
