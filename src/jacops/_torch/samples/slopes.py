"""The routes to Jacobians of samples that are to be differentiated again: sweeps that record their own graph."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..._ladder.plan import Cost
from ..._runtime.rows import plain
from ..sweeps.ask import SweepAsk
from .sweeps import unit_pulls, unit_pushes


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
        lin, many = ask.lin, ask.many
        lines: list[list[list[Tensor]]] = [[[] for _ in lin.leaves] for _ in lin.outputs]
        for out, _, grads in unit_pulls(lin, many, create_graph=True):
            for line, leaf, grad in zip(lines[out], lin.leaves, grads, strict=True):
                line.append(torch.zeros_like(leaf) if grad is None else plain(grad))
        return [
            [
                torch.stack(line, 1) if line else leaf.new_zeros(many, 0)
                for line, leaf in zip(row, lin.leaves, strict=True)
            ]
            for row in lines
        ]


class PushedSlopes:
    """A push per input entry, with its graph."""

    name, claims, leaving = "pushes", (), "silent"

    def refuses(self, ask: SweepAsk) -> str | None:
        """It is tried wherever it pays."""
        return None

    def cost(self, ask: SweepAsk) -> Cost:
        """A push sweeps a graph twice as long."""
        return Cost(2 * (sum(leaf[:1].numel() for leaf in ask.lin.leaves) + 1))

    def describe(self, ask: SweepAsk) -> str:
        """Name it."""
        return "pushes"

    def value(self, ask: SweepAsk) -> list[list[Tensor]]:
        """Return `(n, *out, in entries)` for every output and leaf by one push per input entry."""
        lin = ask.lin
        columns: list[list[list[Tensor]]] = [[[] for _ in lin.leaves] for _ in lin.outputs]
        for index in range(len(lin.leaves)):
            for _, changes in unit_pushes(lin, index, partial(lin.push_by_double_backward, create_graph=True)):
                for line, change in zip(columns, changes, strict=True):
                    line[index].append(change)
        return [[torch.stack(column, -1) for column in line] for line in columns]


SLOPES = (PulledSlopes(), PushedSlopes())
