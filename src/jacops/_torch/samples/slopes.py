"""The routes to Jacobians of samples that are to be differentiated again: sweeps that record their own graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ladder.plan import Cost
from ..._runtime.rows import plain
from ..sweeps.ask import SweepAsk


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
        lin, many, result = ask.lin, ask.many, []
        for index, output in enumerate(lin.outputs):
            entries = output.numel() // many
            lines: list[list[Tensor]] = [[] for _ in lin.leaves]
            for entry in range(entries):
                seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
                seed[:, entry] = 1
                # If it requires grad, once_differentiable backwards leave a mark instead of dropping their part.
                seed.requires_grad_(bool(lin.graph_info.functions))
                seeds = [seed.view(output.shape) if i == index else None for i in range(len(lin.outputs))]
                for line, leaf, grad in zip(lines, lin.leaves, lin.pull(seeds, create_graph=True), strict=True):
                    line.append(torch.zeros_like(leaf) if grad is None else plain(grad))
            pairs = zip(lines, lin.leaves, strict=True)
            result.append([torch.stack(line, 1) if line else leaf.new_zeros(many, 0) for line, leaf in pairs])
        return result


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
        for index, leaf in enumerate(lin.leaves):
            for entry in range(leaf.shape[1:].numel()):
                tangents = [
                    torch.zeros((1, *other.shape), dtype=other.dtype, device=other.device) for other in lin.leaves
                ]
                tangents[index].view(leaf.shape[0], -1)[:, entry] = 1
                for output, change in enumerate(lin.push_by_double_backward(tangents, create_graph=True)):
                    columns[output][index].append(change[0])
        return [[torch.stack(column, -1) for column in line] for line in columns]


SLOPES = (PulledSlopes(), PushedSlopes())
