"""Many cotangents at once through a recorded graph: in one batched pass where arrays are small, else one by one.

A pass over small arrays costs its operations, whatever they hold; over large ones it costs their numbers, and batches
gain nothing (measured: 2.3 times faster at 16,000 numbers a layer, equal at 200,000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteNotFiniteError, RouteWrongError
from ..._ladder.plan import Cost
from ..._ladder.route import answer
from ..._runtime.agreement import worst_disagreement
from ..._runtime.contexts import is_sweeping, sweeping
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring
from ..._runtime.rows import plain, stacked
from .ask import SweepAsk
from .linearization import Linearization

_MOST = 32  # cotangents to a pass: 32 to 64 were equally fast, and fewer hold less memory
_NUMBERS = 2**19  # 2 MiB of float32 found at each place, which stays in a near cache


def at_once(numbers: int) -> int:
    """Return how many cotangents should share a pass that finds so many numbers for each."""
    return max(1, min(_MOST, _NUMBERS // max(1, numbers)))


@dataclass
class EdgeAsk(SweepAsk):
    """Cotangents `rows`, `(m, …)` per output, to be swept to places inside a graph.

    Attributes:
        outputs: Where the cotangents are given.
        edges: Where they are requested.
    """

    outputs: Sequence[Tensor] = ()
    edges: Sequence[Any] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shape = len(self.edges)  # proofs are per number of places
        self.routes: dict[str, str] = {}  # a part of other routes, which describe themselves

    def sweep(self, rows: Sequence[Tensor], batched: bool = False) -> list[Tensor | None]:
        """Return what one pass finds at every edge."""
        return list(_one_pass(self.lin, self.outputs, self.edges, rows, batched))


def _one_pass(
    lin: Linearization, outputs: Sequence[Tensor], edges: Sequence[Any], rows: Sequence[Tensor], batched: bool = False
) -> Sequence[Tensor | None]:
    lin.sweeps += 1
    if is_sweeping(outputs[0]):
        return swept(outputs, edges, rows, batched=batched)
    return _swept_elsewhere(outputs, edges, rows, batched)


@restoring
def _swept_elsewhere(outputs: Sequence[Tensor], edges: Sequence[Any], rows: Sequence[Tensor], batched: bool) -> Any:
    """Sweep where the caller has switched gradients off, or autocast on."""
    with sweeping(outputs[0]):
        return swept(outputs, edges, rows, batched=batched)


class LastRowMatchesPlain:
    """The last row is what one plain pass gives."""

    name, always = "last row matches plain", False

    def evidence(self, route: Any, ask: EdgeAsk, found: Sequence[Tensor | None]) -> bool:
        """Return whether it is.

        Raises:
            RouteWrongError: It is not.
            RouteNotFiniteError: Values are not finite, which is no evidence about the route.
        """
        plain = ask.sweep([c[-1] for c in ask.rows])
        pairs = [
            (_or_zero(None if rows is None else rows[-1], other), _or_zero(other, rows))
            for rows, other in zip(found, plain, strict=True)
            if rows is not None or other is not None
        ]
        error = worst_disagreement(pairs)
        if math.isnan(error):
            raise RouteNotFiniteError("values are not finite")
        if not error <= ask.lin.tolerance:
            raise RouteWrongError(f"it disagrees with a plain pass by {error:.1e}")
        return True


class BatchedEdges:
    """All cotangents in one pass under vmap."""

    name, claims, leaving = "batched", (LastRowMatchesPlain(),), "silent"

    def refuses(self, ask: EdgeAsk) -> str | None:
        """One cotangent needs no batch."""
        return "" if ask.many == 1 else None

    def cost(self, ask: EdgeAsk) -> Cost:
        """As many vectors as there are cotangents."""
        return Cost(ask.many)

    def describe(self, ask: EdgeAsk) -> str:
        """Name it."""
        return "in one batched pass"

    def value(self, ask: EdgeAsk) -> list[Tensor | None]:
        """Return `(m, …)` at every edge."""
        return ask.sweep(ask.rows, batched=True)


class SingleEdges:
    """One cotangent to a pass."""

    name, claims, leaving = "one by one", (), "never"

    def refuses(self, ask: EdgeAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: EdgeAsk) -> Cost:
        """A pass per cotangent."""
        return Cost(ask.many)

    def describe(self, ask: EdgeAsk) -> str:
        """Name it."""
        return "one by one"

    def value(self, ask: EdgeAsk) -> list[Tensor | None]:
        """Return `(m, …)` at every edge."""
        alone = [ask.sweep([c[i] for c in ask.rows]) for i in range(ask.many)]
        return [stacked(grads) for grads in zip(*alone, strict=True)]


TO_EDGES = (BatchedEdges(), SingleEdges())


def passed(
    lin: Linearization, outputs: Sequence[Tensor], edges: Sequence[Any], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return `(m, …)` at every edge for cotangents `(m, …)` of every output; None where nothing arrives."""
    if cotangents[0].shape[0] == 1:  # a plain pass, which is right by definition and needs no choice of routes
        found = _one_pass(lin, outputs, edges, [c[0] for c in cotangents])
        return [None if own is None else plain(own).unsqueeze(0) for own in found]
    question = f"pull to {len(edges)} places"
    return answer(EdgeAsk(question, lin, cotangents, cotangents[0].shape[0], outputs=outputs, edges=edges), TO_EDGES)


def _or_zero(tensor: Tensor | None, other: Tensor | None) -> Tensor:
    if tensor is not None:
        return tensor
    return torch.zeros(()) if other is None else torch.zeros_like(other)
