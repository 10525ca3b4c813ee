"""Many cotangents: in one batched pass, compared with a plain one, or one at a time by `autograd.grad`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteNotFiniteError, RouteWrongError
from ..._ladder.names import RouteName
from ..._ladder.plan import Cost
from ..._runtime.agreement import size, worst_disagreement
from ..._runtime.contexts import private_noise
from ..._runtime.rounding import is_rounding
from ..._runtime.rows import Rows, mixed, plain, written
from .ask import SweepAsk

if TYPE_CHECKING:
    from .linearization import Linearization


class MatchesPlain:
    """A random mixture of the rows is what one plain pass over the mixed cotangents gives."""

    name, always = "matches plain", False

    def evidence(self, route: Any, ask: SweepAsk, found: Rows) -> bool:
        """Return whether the rows were distinguished from rounding.

        Raises:
            RouteWrongError: They disagree.
            RouteNotFiniteError: Values are not finite.
        """
        lin, many, tolerance = ask.lin, ask.many, ask.lin.tolerance
        error = _disagreement(lin, ask.rows, found, many)
        if tolerance < error < math.inf:
            # Rows that nearly cancel differ by rounding alone: noise, which does not cancel, decides.
            noise = [None if c is None else private_noise(c) for c in ask.rows]
            error = _disagreement(lin, noise, route.value(replace(ask, rows=noise, out=None)), many)
        if not error <= tolerance:
            if not math.isfinite(error):
                raise RouteNotFiniteError("values are not finite")
            raise RouteWrongError(f"a {route.name} backward pass disagrees with the plain one (by {error:.1e})")
        return error >= 0


def _disagreement(lin: Linearization, cotangents: Sequence[Tensor | None], rows: Rows, many: int) -> float:
    """Return how far a random mixture of rows is from a plain pass over it."""
    weights = private_noise(torch.empty(many, dtype=torch.float64, device=lin.domain.device))
    seeds = [None if c is None else mixed(weights, c) for c in cotangents]
    pairs = [(mixed(weights, r), g) for r, g in zip(rows, lin.gradient(seeds), strict=True)]
    scales = [float(weights.abs().max()) * size(row) for row in rows]
    error = worst_disagreement(pairs, scales)
    lost = lin.tolerance < error < math.inf and is_rounding(lambda: lin.pull(seeds), pairs)
    return -1.0 if lost or not any(scales) else error  # zeros and rounding decide nothing


class BatchedPull:
    """All cotangents in one pass under vmap."""

    name, claims, leaving = RouteName.BATCHED, (MatchesPlain(),), "noted"

    def refuses(self, ask: SweepAsk) -> str | None:
        """One cotangent needs no batch; a custom Function can lose the graph of its result under vmap."""
        return "" if ask.many == 1 or (ask.create_graph and ask.lin.graph_info.functions) else None

    def cost(self, ask: SweepAsk) -> Cost:
        """As many vectors as there are cotangents."""
        return Cost(ask.many)

    def describe(self, ask: SweepAsk) -> str:
        """Name the number of cotangents."""
        return f"{ask.many} cotangents in one batched pass"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *leaf)` per leaf."""
        grads = ask.lin.pull(ask.rows, ask.create_graph, batched=True)
        return written(ask.lin.filled(grads, ask.many), ask.out)


class PlainPull:
    """`autograd.grad`, one cotangent at a time: what is right by definition."""

    name, claims, leaving = "one by one", (), "never"

    def refuses(self, ask: SweepAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: SweepAsk) -> Cost:
        """A pass per cotangent."""
        return Cost(ask.many)

    def describe(self, ask: SweepAsk | None) -> str:
        """Name the function."""
        return "autograd.grad, one cotangent at a time"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *leaf)` per leaf."""
        lin, out = ask.lin, ask.out
        if ask.many == 1 and out is None:
            grads = lin.pull([None if c is None else c[0] for c in ask.rows], ask.create_graph)
            return lin.filled([None if g is None else g.unsqueeze(0) for g in grads], 1)
        kept: list[list[Tensor | None]] = []
        for i in range(ask.many):
            grads = lin.pull([None if c is None else c[i] for c in ask.rows], ask.create_graph)
            if out is None:
                kept.append(grads)
                continue
            for rows, grad in zip(out, grads, strict=True):
                rows[i] = 0 if grad is None else plain(grad).detach()
        return out or [lin.stacked([grads[j] for grads in kept], j) for j in range(len(lin.leaves))]


PULLS = (BatchedPull(), PlainPull())
