"""Questions to a linearisation: many cotangents or tangents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..._runtime.rows import Rows

if TYPE_CHECKING:
    from .linearization import Linearization


@dataclass
class SweepAsk:
    """Rows to be swept through a linearisation, at once or one by one.

    Attributes:
        question: PULL or PUSH.
        lin: The linearisation.
        rows: `(k, *output)` per output or `(k, *leaf)` per leaf (None: zero).
        many: k.
        create_graph: Keep the result differentiable.
        out: Where to write, if there is a place already.
        alone: Tangents come one by one.
    """

    question: str
    lin: Linearization
    rows: Sequence[Any]
    many: int
    create_graph: bool = False
    out: Rows | None = None
    alone: bool = False

    asked = None  # sweeps are never requested by the name of a route

    def __post_init__(self) -> None:
        lin = self.lin
        self.call, self.fallback, self.verdicts, self.routes = lin.call, lin.fallback, lin.proofs, lin.routes
        # proofs are per number of rows, and per tensors that move
        moving = tuple(i for i, rows in enumerate(self.rows) if rows is not None)
        self.shape = self.many if len(moving) == len(self.rows) else (self.many, moving)
