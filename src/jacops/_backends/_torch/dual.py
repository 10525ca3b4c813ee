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

from .agreement import inner, size
from .ladder import RouteFailedError, attempt
from .rows import Rows, dense, plain, rows_size, zero_rows
from .surroundings import private_noise, sweeping

if TYPE_CHECKING:
    from .tape import Tape


_FLOOR = 1e-2


class Dual:
    """A backward pass of a tape, recorded as a function of its cotangent.

    Args:
        tape: Whose.

    Raises:
        RouteFailedError: The backward pass cannot be recorded.
    """

    def __init__(self, tape: Tape) -> None:
        if tape.survey.reentrant:
            raise RouteFailedError("a reentrant activation checkpoint answers plain backward passes only")
        self.tape = tape
        self.live = [o for o in tape.outputs if o.requires_grad]
        self.index = [*range(len(tape.leaves)), *(j for j, _ in tape.twins)]
        self.seeds: Rows = []
        self.grads: list[Tensor | None] = []
        self.seconds = 0.0
        if self.live:
            self._record()

    def _record(self) -> None:
        targets = [*self.tape.leaves, *(tensor for _, tensor in self.tape.twins)]
        with sweeping(self.live[0]):
            self.seeds = [private_noise(o, seed=i).requires_grad_() for i, o in enumerate(self.live)]
            self.tape.sweeps += 1
            options = {"create_graph": True, "retain_graph": True, "allow_unused": True}
            started = time.perf_counter()
            grads = attempt(lambda: torch.autograd.grad(self.live, targets, self.seeds, **options))
            self.seconds = time.perf_counter() - started  # about what one push takes
            self.grads = [dense(g) for g in grads]

    def push(self, tangents: Sequence[Tensor], create_graph: bool = False) -> Rows:
        """Return `(k, *output)` per output from `(k, *leaf)` per leaf.

        Raises:
            RouteFailedError: The function has no derivative of its backward, or it fails the adjoint identity.
        """
        many = tangents[0].shape[0]
        if not self.live:
            return [zero_rows(many, o) for o in self.tape.outputs]
        paired = [(g, tangents[j]) for g, j in zip(self.grads, self.index, strict=True) if g is not None]
        results: list[Tensor | None] = [None] * len(self.seeds)
        recorded = [(g, t) for g, t in paired if g.requires_grad]
        if recorded:
            results = self._swept([g for g, _ in recorded], [t for _, t in recorded], many, create_graph)
        pushed = [zero_rows(many, o) if r is None else plain(r) for o, r in zip(self.live, results, strict=True)]
        self._check_adjoint(paired, pushed)
        each = iter(pushed)
        return [next(each) if o.requires_grad else zero_rows(many, o) for o in self.tape.outputs]

    def _swept(self, grads: Rows, tangents: Rows, many: int, create_graph: bool) -> list[Tensor | None]:
        def sweep(rows: Rows, batched: bool) -> tuple[Tensor | None, ...]:
            self.tape.sweeps += 1
            options = {"create_graph": create_graph, "retain_graph": True, "allow_unused": True}
            return torch.autograd.grad(grads, self.seeds, rows, is_grads_batched=batched, **options)

        trust = self.tape.trust
        with sweeping(self.seeds[0]):
            if many > 1 and self.tape.may_batch("push", create_graph):
                started = time.perf_counter()
                try:
                    pushed = list(attempt(lambda: sweep(tangents, True)))
                    self.tape.settle("push", time.perf_counter() - started, many * self.seconds)
                    return pushed
                except RouteFailedError:
                    trust.refuse("push", "batched")
            each = [attempt(lambda i=i: sweep([t[i] for t in tangents], False)) for i in range(many)]
        if many == 1:
            return [None if r is None else plain(r).unsqueeze(0) for r in each[0]]
        columns = list(zip(*each, strict=True))
        return [None if column[0] is None else torch.stack([plain(c) for c in column]) for column in columns]

    def _check_adjoint(self, paired: list[tuple[Tensor, Tensor]], pushed: Rows) -> None:
        nothing = torch.zeros(pushed[0].shape[0], dtype=torch.float64, device=pushed[0].device)
        left = sum((inner(u, r) for u, r in zip(self.seeds, pushed, strict=True)), nothing)
        right = sum((inner(g, t) for g, t in paired), nothing)
        # The size of <g, v> is about that of v times a typical entry of g, whatever cancels in it; a gradient that is
        # zero but for rounding is measured by the typical entry of all.
        entries = sum(g.numel() for g, _ in paired)
        typical = _FLOOR * math.sqrt(sum(size(g) ** 2 for g, _ in paired) / max(entries, 1))
        scale = sum((rows_size(t) * (size(g) / math.sqrt(max(g.numel(), 1)) + typical) for g, t in paired), nothing)
        scale = scale + sum((rows_size(r) for r in pushed), nothing)
        error = float(((left - right).abs() / (scale + torch.finfo(torch.float64).tiny)).max())
        if not error <= self.tape.tolerance:
            names = self.tape.survey.functions
            blame = f", perhaps by the custom Function {', '.join(names)}" if names else ""
            cause = f"off by {error:.1e}" if math.isfinite(error) else "values are not finite"
            raise RouteFailedError(f"the differentiated backward pass fails the adjoint identity ({cause}){blame}")
