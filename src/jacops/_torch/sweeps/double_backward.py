"""Pushes by differentiating a pull: `J v = d<Jᵀu, v>/du` (Griewank and Walther, 2008, §5), with a free certificate.

One backward pass is recorded from a random cotangent `u`, once; every push is one backward pass over that record.
The adjoint identity `<u, J v> = <Jᵀu, v>` then compares the push with the plain pull that it came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError, RouteNotFiniteError, attempt
from ..._ladder.names import RouteName
from ..._ladder.plan import Cost
from ..._runtime.agreement import inner, size
from ..._runtime.contexts import private_noise, sweeping
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring
from ..._runtime.rows import Rows, dense, is_doubtful, plain, quick_size, rows_size, stacked, zero_rows
from ..._runtime.side_effects import unwatched
from .ask import SweepAsk

if TYPE_CHECKING:
    from .linearization import Linearization


# Share of all gradients' typical entry that a gradient is measured by at least: a zero one holds rounding.
_FLOOR = 1e-2
_OTHER = 1000  # the seed of another cotangent than the recorded one, whose seeds count from 0


class DoubleBackward:
    """A backward pass of a linearization, recorded as a function of its cotangent.

    Args:
        lin: Whose; it holds this, and not the other way round, so that both go when it goes.

    Raises:
        RouteFailedError: The backward pass cannot be recorded.
    """

    def __init__(self, lin: Linearization) -> None:
        if lin.graph_info.reentrant:
            raise RouteFailedError("a reentrant activation checkpoint supports plain backward passes only")
        self.live = [o for o in lin.outputs if o.requires_grad]
        self.index = [*range(len(lin.leaves)), *(j for j, _ in lin.aliased_leaves)]
        self.seeds: Rows = []
        self.grads: list[Tensor | None] = []
        self.sizes: list[float] = []
        self.typical = 0.0
        if self.live:
            self._record(lin)

    @restoring
    def _record(self, lin: Linearization) -> None:
        targets = [*lin.leaves, *(tensor for _, tensor in lin.aliased_leaves)]
        with sweeping(self.live[0]):
            with unwatched():  # a push may be part of a function that is itself being watched
                self.seeds = [private_noise(o, seed=i).requires_grad_() for i, o in enumerate(self.live)]
            lin.sweeps += 1
            grads = attempt(lambda: swept(self.live, targets, self.seeds, create_graph=True))
            self.grads = [dense(g) for g in grads]
            with unwatched():
                self.sizes = [size(g) for g in self.grads if g is not None]
                self.typical = typical_entry(self.grads, self.sizes)

    def push(self, lin: Linearization, tangents: Sequence[Tensor | None], create_graph: bool, batched: bool) -> Rows:
        """Return `(k, *output)` per output from `(k, *leaf)` per leaf, None for zero."""
        many = next(t.shape[0] for t in tangents if t is not None)
        if not self.live:
            return [zero_rows(many, o) for o in lin.outputs]
        results: list[Tensor | None] = [None] * len(self.seeds)
        recorded = [(g, t) for g, t in self.paired(tangents) if g.requires_grad]
        if recorded:
            results = self._swept(lin, [g for g, _ in recorded], [t for _, t in recorded], create_graph, batched)
        pushed = iter(zero_rows(many, o) if r is None else plain(r) for o, r in zip(self.live, results, strict=True))
        return [next(pushed) if o.requires_grad else zero_rows(many, o) for o in lin.outputs]

    def paired(self, tangents: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """Return each gradient with the tangents of its leaf, where both are there."""
        pairs = ((g, tangents[j]) for g, j in zip(self.grads, self.index, strict=True))
        return [(g, t) for g, t in pairs if g is not None and t is not None]

    def sizes_along(self, tangents: Sequence[Tensor | None]) -> list[float]:
        """Return the norms of the gradients that `paired` returns."""
        known = zip(self.sizes, (j for g, j in zip(self.grads, self.index, strict=True) if g is not None), strict=True)
        return [norm for norm, j in known if tangents[j] is not None]

    @restoring
    def _swept(
        self, lin: Linearization, grads: Rows, tangents: Rows, create_graph: bool, batched: bool
    ) -> list[Tensor | None]:
        def sweep(rows: Rows) -> tuple[Tensor | None, ...]:
            lin.sweeps += 1
            return swept(grads, self.seeds, rows, create_graph, batched)

        with sweeping(self.seeds[0]):
            if batched:
                return list(sweep(tangents))
            each = [sweep([t[i] for t in tangents]) for i in range(tangents[0].shape[0])]
        return [stacked(column) for column in zip(*each, strict=True)]


class AdjointOfItsPull:
    """`<u, J v> = <Jᵀu, v>` for the pull that was recorded: free of charge, so checked for every push."""

    name, always = "adjoint", True

    def evidence(self, route: Any, ask: SweepAsk, found: Rows) -> bool:
        """Return whether the identity holds.

        Raises:
            RouteFailedError: It does not.
            RouteNotFiniteError: Values are not finite.
        """
        own, lin = ask.lin.double_backward, ask.lin
        pushed = [rows for rows, o in zip(found, lin.outputs, strict=True) if o.requires_grad]
        if not pushed:
            return True
        with unwatched():
            error = adjoint_error(own.seeds, own.paired(ask.rows), pushed, own.typical, own.sizes_along(ask.rows))
        if not error <= lin.tolerance:
            names = lin.graph_info.functions
            blame = f", perhaps by the custom Function {', '.join(names)}" if names else ""
            if not math.isfinite(error):
                raise RouteNotFiniteError("values are not finite")
            raise RouteFailedError(
                f"the differentiated backward pass fails the adjoint identity (off by {error:.1e}){blame}"
            )
        return True


class LinearPull:
    """`<w, J v> = <Jᵀw, v>` for a pull along another random `w`.

    The pull that was recorded does not show a backward pass that is not linear in its cotangent, such as a hook that
    reads a number out of it: there that number is a constant.
    """

    name, always = "linear", False

    def evidence(self, route: Any, ask: SweepAsk, found: Rows) -> bool:
        """Return whether the identity holds.

        Raises:
            RouteFailedError: It does not.
        """
        lin = ask.lin
        with unwatched():
            other = [2 * private_noise(o, seed=_OTHER + i) for i, o in enumerate(lin.outputs)]
            error = error_beside(lin.pull(other), other, ask, found)
        if not error <= lin.tolerance:
            raise RouteFailedError(f"the backward pass is not linear in its cotangent (off by {error:.1e})")
        return True


class OneByOneDoubleBackward:
    """A backward pass over a recorded backward pass for every tangent."""

    name, claims, leaving = RouteName.DOUBLE_BACKWARD, (AdjointOfItsPull(), LinearPull()), "warned"

    def refuses(self, ask: SweepAsk) -> str | None:
        """It is tried wherever it has not failed."""
        return None

    def cost(self, ask: SweepAsk) -> Cost:
        """A sweep per tangent, besides the recorded one."""
        return Cost(ask.many)

    def describe(self, ask: SweepAsk) -> str:
        """Name the check."""
        return "differentiated backward pass"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *output)` per output."""
        return ask.lin.double_backward.push(ask.lin, ask.rows, ask.create_graph, batched=False)


class BatchedDoubleBackward(OneByOneDoubleBackward):
    """All tangents in one such pass under vmap."""

    name, leaving = RouteName.BATCHED, "silent"

    def refuses(self, ask: SweepAsk) -> str | None:
        """One tangent needs no batch; a custom Function can lose the graph of its result under vmap."""
        return "" if ask.many == 1 or (ask.create_graph and ask.lin.graph_info.functions) else None

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *output)` per output."""
        return ask.lin.double_backward.push(ask.lin, ask.rows, ask.create_graph, batched=True)


def error_beside(pulled: Sequence[Tensor | None], seeds: Rows, ask: SweepAsk, pushed: Rows) -> float:
    """Return the error of the adjoint identity of a push beside a plain pull along `seeds`."""
    there = [(plain(g), t) for g, t in zip(pulled, ask.rows, strict=True) if g is not None]
    sizes = [size(g) for g, _ in there]
    typical = typical_entry([g for g, _ in there], sizes)
    paired = [(g, t) for g, t in there if t is not None]
    return adjoint_error(
        seeds, paired, pushed, typical, [s for s, (_, t) in zip(sizes, there, strict=True) if t is not None]
    )


def typical_entry(grads: Sequence[Tensor | None], sizes: list[float]) -> float:
    """Return the root mean square entry of all gradients, those of leaves that do not move included.

    Args:
        grads: The gradients.
        sizes: The norms of those that are there.
    """
    return math.hypot(*sizes) / math.sqrt(max(sum(g.numel() for g in grads if g is not None), 1))  # squares overflow


def adjoint_error(
    seeds: Rows, paired: list[tuple[Tensor, Tensor]], pushed: Rows, typical: float, sizes: list[float]
) -> float:
    """Return how far `<u, J v>` and `<Jᵀu, v>` are apart, relative to the size of their parts, at worst over rows.

    Args:
        seeds: `u`, one tensor per output.
        paired: Gradients `Jᵀu`, each with the rows `(k, …)` of `v` for the same tensor.
        pushed: `J v`, rows `(k, …)` per output.
        typical: The typical entry of all gradients.
        sizes: The norms of the gradients in `paired`.
    """
    nothing = torch.zeros(pushed[0].shape[0], dtype=torch.float64, device=pushed[0].device)
    left = sum((inner(u, r) for u, r in zip(seeds, pushed, strict=True)), nothing)
    right = sum((inner(g, t) for g, t in paired), nothing)
    # The size of <g, v> is about that of v times a typical entry of g, whatever cancels in it; a gradient that is
    # zero but for rounding is measured by the typical entry of all.
    floor = _FLOOR * typical
    spread = [s / math.sqrt(max(g.numel(), 1)) + floor for s, (g, _) in zip(sizes, paired, strict=True)]
    pairs = [(s, t) for s, (_, t) in zip(spread, paired, strict=True)] + [(1.0, r) for r in pushed]
    return _relative_gap((left - right).abs(), pairs)


def _relative_gap(gap: Tensor, weighed: list[tuple[float, Tensor]]) -> float:
    """Return the largest ratio of gaps `(k,)` to weighed sums of the sizes of rows, in one read from their device."""
    tiny = torch.finfo(torch.float64).tiny
    norms = [quick_size(rows) for _, rows in weighed]
    scale = sum((n.to(torch.float64) * w for n, (w, _) in zip(norms, weighed, strict=True)), torch.zeros_like(gap))
    doubtful = torch.stack([is_doubtful(n).any() for n in norms]).any()
    worst, doubt = torch.stack([(gap / (scale + tiny)).max(), doubtful.to(gap.dtype)]).tolist()
    if not doubt:
        return worst
    sizes = (rows_size(rows) * w for w, rows in weighed)
    return float((gap / (sum(sizes, torch.zeros_like(gap)) + tiny)).max())
