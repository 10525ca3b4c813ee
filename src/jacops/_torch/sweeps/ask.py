"""What is asked of a linearisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..._runtime.rows import Rows
from .proofs import Proofs

if TYPE_CHECKING:
    from .linearization import Linearization


@dataclass(frozen=True)
class SweepAsk:
    """Rows to be swept through a linearisation, at once or one by one.

    Attributes:
        question: `"pull"` or `"push"`.
        lin: The linearisation.
        rows: `(k, *output)` per output (None: zero) or `(k, *leaf)` per leaf.
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

    asked = None  # sweeps are never asked for by the name of a route

    @property
    def call(self) -> str:
        """The public call."""
        return self.lin.call

    @property
    def fallback(self) -> str:
        """What happens when a route is left."""
        return self.lin.fallback

    @property
    def shape(self) -> int:
        """Proofs are per number of rows."""
        return self.many

    @property
    def verdicts(self) -> Proofs:
        """What is known of the graph."""
        return self.lin.trust

    @property
    def routes(self) -> dict[str, str]:
        """Descriptions, printed by operators."""
        return self.lin.routes
