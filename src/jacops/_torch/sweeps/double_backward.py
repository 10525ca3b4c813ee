"""Pushes by differentiating a pull: `J v = d<Jᵀu, v>/du` (Griewank and Walther, 2008, §5), with a free certificate.

One backward pass is recorded from a random cotangent `u`, once; every push is one backward pass over that record.
The adjoint identity `<u, J v> = <Jᵀu, v>` then holds the push against the plain pull that it came from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError, RouteNotFiniteError, attempt
from ..._runtime.agreement import inner, size
from ..._runtime.contexts import private_noise, sweeping
from ..._runtime.restoring import restoring
from ..._runtime.rows import Rows, dense, plain, rows_size, zero_rows
from ..._runtime.side_effects import unwatched

if TYPE_CHECKING:
    from .linearization import Linearization


_FLOOR = 1e-2


class DoubleBackward:
    """A backward pass of a linearization, recorded as a function of its cotangent.

    Args:
        lin: Whose; it holds this, and not the other way round, so that both go when it goes.

    Raises:
        RouteFailedError: The backward pass cannot be recorded.
    """

    def __init__(self, lin: Linearization) -> None:
        if lin.graph_info.reentrant:
            raise RouteFailedError("a reentrant activation checkpoint answers plain backward passes only")
        self.live = [o for o in lin.outputs if o.requires_grad]
        self.index = [*range(len(lin.leaves)), *(j for j, _ in lin.aliased_leaves)]
        self.seeds: Rows = []
        self.grads: list[Tensor | None] = []
        self.sizes: list[float] = []
        self.seconds = 0.0
        if self.live:
            self._record(lin)

    @restoring
    def _record(self, lin: Linearization) -> None:
        targets = [*lin.leaves, *(tensor for _, tensor in lin.aliased_leaves)]
        with sweeping(self.live[0]):
            with unwatched():  # a push may be part of a function that is itself being watched
                self.seeds = [private_noise(o, seed=i).requires_grad_() for i, o in enumerate(self.live)]
            lin.sweeps += 1
            options = {"create_graph": True, "retain_graph": True, "allow_unused": True}
            started = time.perf_counter()
            grads = attempt(lambda: torch.autograd.grad(self.live, targets, self.seeds, **options))
            self.seconds = time.perf_counter() - started  # about what one push takes
            self.grads = [dense(g) for g in grads]
            with unwatched():
                self.sizes = [size(g) for g in self.grads if g is not None]

    def push(self, lin: Linearization, tangents: Sequence[Tensor], create_graph: bool = False) -> Rows:
        """Return `(k, *output)` per output from `(k, *leaf)` per leaf.

        Raises:
            RouteFailedError: The function has no derivative of its backward, or it fails the adjoint identity.
        """
        many = tangents[0].shape[0]
        if not self.live:
            return [zero_rows(many, o) for o in lin.outputs]
        paired = [(g, tangents[j]) for g, j in zip(self.grads, self.index, strict=True) if g is not None]
        results: list[Tensor | None] = [None] * len(self.seeds)
        recorded = [(g, t) for g, t in paired if g.requires_grad]
        if recorded:
            results = self._swept(lin, [g for g, _ in recorded], [t for _, t in recorded], create_graph)
        pushed = [zero_rows(many, o) if r is None else plain(r) for o, r in zip(self.live, results, strict=True)]
        self._check_adjoint(lin, paired, pushed)
        each = iter(pushed)
        return [next(each) if o.requires_grad else zero_rows(many, o) for o in lin.outputs]

    @restoring
    def _swept(self, lin: Linearization, grads: Rows, tangents: Rows, create_graph: bool) -> list[Tensor | None]:
        many = tangents[0].shape[0]

        def sweep(rows: Rows, batched: bool) -> tuple[Tensor | None, ...]:
            lin.sweeps += 1
            options = {"create_graph": create_graph, "retain_graph": True, "allow_unused": True}
            return torch.autograd.grad(grads, self.seeds, rows, is_grads_batched=batched, **options)

        trust = lin.trust
        with sweeping(self.seeds[0]):
            if many > 1 and lin.may_batch("push", create_graph):
                started = time.perf_counter()
                try:
                    pushed = list(attempt(lambda: sweep(tangents, True)))
                    lin.settle("push", time.perf_counter() - started, many * self.seconds)
                    return pushed
                except RouteFailedError as reason:
                    trust.refuse("push", "batched", str(reason))
            each = [attempt(lambda i=i: sweep([t[i] for t in tangents], False)) for i in range(many)]
        if many == 1:
            return [None if r is None else plain(r).unsqueeze(0) for r in each[0]]
        columns = list(zip(*each, strict=True))
        return [None if column[0] is None else torch.stack([plain(c) for c in column]) for column in columns]

    def _check_adjoint(self, lin: Linearization, paired: list[tuple[Tensor, Tensor]], pushed: Rows) -> None:
        with unwatched():
            error = adjoint_error(self.seeds, paired, pushed, self.sizes)
        if not error <= lin.tolerance:
            names = lin.graph_info.functions
            blame = f", perhaps by the custom Function {', '.join(names)}" if names else ""
            if not math.isfinite(error):
                raise RouteNotFiniteError("values are not finite")
            raise RouteFailedError(
                f"the differentiated backward pass fails the adjoint identity (off by {error:.1e}){blame}"
            )


def adjoint_error(
    seeds: Rows, paired: list[tuple[Tensor, Tensor]], pushed: Rows, sizes: list[float] | None = None
) -> float:
    """Return how far `<u, J v>` and `<Jᵀu, v>` are apart, relative to the size of their parts, at worst over rows.

    Args:
        seeds: `u`, one tensor per output.
        paired: Gradients `Jᵀu`, each with the rows `(k, …)` of `v` for the same tensor.
        pushed: `J v`, rows `(k, …)` per output.
        sizes: The norms of the gradients, where they are known.
    """
    nothing = torch.zeros(pushed[0].shape[0], dtype=torch.float64, device=pushed[0].device)
    left = sum((inner(u, r) for u, r in zip(seeds, pushed, strict=True)), nothing)
    right = sum((inner(g, t) for g, t in paired), nothing)
    sizes = [size(g) for g, _ in paired] if sizes is None else sizes
    # The size of <g, v> is about that of v times a typical entry of g, whatever cancels in it; a gradient that is
    # zero but for rounding is measured by the typical entry of all.
    entries = sum(g.numel() for g, _ in paired)
    typical = _FLOOR * math.sqrt(sum(s**2 for s in sizes) / max(entries, 1))
    spread = [s / math.sqrt(max(g.numel(), 1)) + typical for s, (g, _) in zip(sizes, paired, strict=True)]
    scale = sum((rows_size(t) * s for s, (_, t) in zip(spread, paired, strict=True)), nothing)
    scale = scale + sum((rows_size(r) for r in pushed), nothing)
    return float(((left - right).abs() / (scale + torch.finfo(torch.float64).tiny)).max())
