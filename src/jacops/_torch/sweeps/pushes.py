"""Tangents: node by node, by a differentiated pull, or by all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ladder.plan import Cost
from ..._runtime.rows import Rows, contracted, zero_rows
from .ask import SweepAsk
from .double_backward import BatchedDoubleBackward, OneByOneDoubleBackward
from .nodewise import BatchedNodewise, NodewisePush


class PushByRows:
    """Every row of the Jacobian, times the tangents: right wherever pulls are."""

    name, claims, leaving = "rows", (), "never"

    def refuses(self, ask: SweepAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: SweepAsk) -> Cost:
        """A pass per output entry."""
        return Cost(ask.lin.live)

    def describe(self, ask: SweepAsk) -> str:
        """Name the number of passes."""
        few = ask.lin.live <= max(ask.many, 1)
        return "row by row, fewer outputs than tangents" if few else f"row by row, {ask.lin.live} backward passes"

    def value(self, ask: SweepAsk) -> Rows:
        """Return `(k, *output)` per output."""
        lin = ask.lin
        pushed: list[list[Tensor]] = [[] for _ in lin.outputs]
        for index, _, rows, turned in lin.rows(ask.create_graph):
            part = contracted(rows, ask.rows, ask.many)
            whole = part if turned is None else torch.complex(part, contracted(turned, ask.rows, ask.many))
            pushed[index].append(whole.to(lin.outputs[index].dtype))
        return [
            torch.cat(parts, 1).reshape(ask.many, *o.shape) if parts else zero_rows(ask.many, o)
            for parts, o in zip(pushed, lin.outputs, strict=True)
        ]


BY_DOUBLE_BACKWARD = (BatchedDoubleBackward(), OneByOneDoubleBackward())
COLUMNS = (BatchedNodewise(), NodewisePush(), *BY_DOUBLE_BACKWARD)
NEVER_BY_ROWS = (NodewisePush(), *BY_DOUBLE_BACKWARD)
PUSHES = (PushByRows(), *NEVER_BY_ROWS)
