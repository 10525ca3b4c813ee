"""The routes to Jacobians of samples that are to be differentiated again: sweeps that record their own graph."""

from __future__ import annotations

from torch import Tensor

from ..._ladder.plan import Cost
from ..sweeps.ask import SweepAsk
from .sweeps import pulled_slopes, pushed_slopes


def pays_to_push(rows: int, columns: int) -> bool:
    """Return whether pushes take less than pulls: a push sweeps a graph twice as long."""
    return 2 * (columns + 1) < rows


class PulledSlopes:
    """A pull per output entry, with its graph."""

    name, claims, leaving = "pulls", (), "never"

    def refuses(self, ask: SweepAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: SweepAsk) -> Cost:
        """A sweep per output entry of a sample."""
        return Cost(sum(o.numel() for o in ask.lin.outputs) // ask.many)

    def describe(self, ask: SweepAsk) -> str:
        """Name it."""
        return "pulls"

    def value(self, ask: SweepAsk) -> list[list[Tensor]]:
        """Return `(n, out entries, *in)` for every output and leaf by one pull per output entry."""
        return pulled_slopes(ask.lin, ask.many)


class PushedSlopes:
    """A push per input entry, with its graph."""

    name, claims, leaving = "pushes", (), "silent"

    def refuses(self, ask: SweepAsk) -> str | None:
        """It is tried wherever it saves sweeps."""
        return None

    def cost(self, ask: SweepAsk) -> Cost:
        """A push sweeps a graph twice as long."""
        return Cost(2 * (sum(leaf[:1].numel() for leaf in ask.lin.leaves) + 1))

    def describe(self, ask: SweepAsk) -> str:
        """Name it."""
        return "pushes"

    def value(self, ask: SweepAsk) -> list[list[Tensor]]:
        """Return `(n, *out, in entries)` for every output and leaf by one push per input entry."""
        return pushed_slopes(ask.lin, ask.many)


SLOPES = (PulledSlopes(), PushedSlopes())
