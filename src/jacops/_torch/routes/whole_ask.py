"""The question of a whole Jacobian, and the memory it may take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._cached import cached_property
from ..._ladder.plan import Memory
from ..._runtime.memory import SMALL, Budget, Meter, budget_bytes, live, refuse, resident, size_of, startup_bytes
from ..._runtime.restoring import restoring
from ..sweeps.linearization import Linearization
from ..sweeps.proofs import Proofs

Blocks = list[list[Tensor]]
_TODO = (
    "Pick outputs with `outputs=`, pass fewer parameters, write into a memmap with `out=`, use products "
    "(`jvp`, `vjp`), or raise `budget=`."
)


@dataclass(frozen=True)
class WholeBlocks:
    """Whole Jacobians.

    Attributes:
        blocks: `J[output][leaf]`, `(output entries, *leaf)`.
        finite: It is certain that no entry is NaN or Inf.
        by_rows: They took a sweep per output entry.
    """

    blocks: Blocks
    finite: bool = False
    by_rows: bool = False


@dataclass
class WholeAsk:
    """All blocks `J[output][leaf]`, each `(output entries, *leaf)`, of a linearisation.

    Attributes:
        lin: Where the function was linearised.
        budget: Bytes that result and working memory may take.
        columns: True for a push per input entry, False for a pull per output entry, None for the fewer.
        create_graph: Keep the result differentiable.
        layers: The route by layers may be taken.
        placed: The result is given a place by the caller, and is no part of the budget.
        chunk_size: Most vectors to a pass; by default by size.
        free: Bytes of tensors that may be alive beside the result and the graph, where the caller counts all others;
            infinite where nobody counts.
        into: Where to write blocks, if they have places already; not with `create_graph`.
        noted: Where it is noted how the result was computed; by default with what was recorded.
    """

    lin: Linearization
    budget: Budget = None
    columns: bool | None = None
    create_graph: bool = False
    layers: bool = True
    placed: bool = False
    chunk_size: int | None = None
    free: float | None = None
    into: Blocks | None = None
    noted: dict[str, str] | None = None
    question: str = field(default="whole", init=False)
    argument: str = field(default="strategy=", init=False)

    def __post_init__(self) -> None:
        self.startup = startup_bytes(self.lin.domain.device)  # now: looking for layers takes a derivative already
        self.call, self.fallback = self.lin.call, self.lin.fallback
        self.shape = self.lin.domain.names
        self.routes = self.lin.routes if self.noted is None else self.noted
        self.asked = "forward" if self.columns else None
        self._kept: dict[str, Any] = {}

    def kept(self, what: str, make: Callable[[], Any]) -> Any:
        """Return what a route prepared for this question; it is prepared now if it was not before."""
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    def known(self, what: str) -> Any:
        """Return what `kept` made, None where it did not."""
        return self._kept.get(what)

    @property
    def verdicts(self) -> Proofs:
        """What is known of the graph."""
        return self.lin.proofs

    @cached_property
    def result(self) -> int:
        """Bytes of the result."""
        return sum(o.numel() for o in self.lin.outputs) * sum(size_of(leaf) for leaf in self.lin.leaves)

    @property
    def allocated(self) -> int:
        """Bytes of the result that the call allocates."""
        return 0 if self.placed else self.result

    @property
    def is_small(self) -> bool:
        """Nothing has to be measured."""
        return self.budget is None and self.result < SMALL if self.free is None else self.free == math.inf

    @cached_property
    def allowed(self) -> int:
        """Bytes allowed."""
        return budget_bytes(self.budget, self.lin.domain.device)

    @property
    def room(self) -> float:
        """Bytes of tensors that may be alive beside the result and the graph."""
        if self.free is not None:
            return self.free
        return live(self.allowed - self.startup - self.allocated) - self.lin.held_bytes

    def peak(self, held: float) -> int:
        """Return the bytes held at once where a route keeps so many bytes of tensors beside the graph."""
        return self.startup + self.allocated + resident(self.lin.held_bytes + held)

    def sweeping(self, columns: bool) -> Memory:
        """Return the memory of sweeps by columns, or by rows; a push needs the recorded backward pass too."""
        held = self.lin.held_bytes if columns else 0
        pull = self.pull_bytes if self.room > held else 0.0
        many = self.lin.domain.dim if columns else self.lin.codomain.dim
        most = min(self.chunk_size or self.lin.chunk(many), int((self.room - held) / max(pull, 1.0)))
        return Memory(max(1, most), self.peak(held + pull * max(1, most)))

    @cached_property
    @restoring
    def pull_bytes(self) -> float:
        """Bytes that one backward pass holds at once, its cotangent and its gradients included."""
        with Meter() as meter:
            self.lin.pull([torch.zeros_like(o) for o in self.lin.outputs])
        return float(meter.peak)

    def refuse(self, memory: Memory) -> None:
        """Refuse a result that does not fit.

        Raises:
            MemoryBudgetError: Always; nothing was allocated.
        """
        parts: dict[str, float] = {"working memory of one pass": memory.peak - self.startup - self.allocated}
        if self.allocated:
            sizes = {
                f"the Jacobian {(*o.shape, *leaf.shape)} of {name} by {by}": o.numel() * size_of(leaf)
                for name, o in zip(self.lin.codomain.names, self.lin.outputs, strict=True)
                for by, leaf in zip(self.lin.domain.names, self.lin.leaves, strict=True)
            }
            parts[max(sizes, key=lambda name: sizes[name], default="the Jacobian")] = self.allocated
        if self.startup:
            parts["what torch loads for the first derivative of a process"] = self.startup
        refuse(self.call, parts, self.allowed, _TODO)
