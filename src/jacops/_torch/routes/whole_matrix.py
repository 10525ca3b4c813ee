"""Whole Jacobians: the routes there are, and how they are requested."""

from __future__ import annotations

from ..._ladder.route import answer, candidates
from ..sweeps.linearization import Linearization
from .whole import WholeByLayers
from .whole_ask import Blocks, WholeAsk, WholeBlocks
from .whole_sweeps import ByColumns, ByRows, fitted

BY_LAYERS = WholeByLayers()
WHOLE = (BY_LAYERS, ByRows(), ByColumns())


def whole_jacobian(ask: WholeAsk) -> WholeBlocks:
    """Return `J[output][leaf]`, each `(output entries, *leaf)`, refused before it is allocated if it does not fit.

    Raises:
        MemoryBudgetError: They do not fit; nothing was allocated.
    """
    return answer(ask, WHOLE)


def jacobian_blocks(
    lin: Linearization, create_graph: bool = False, chunk_size: int | None = None, into: Blocks | None = None
) -> Blocks:
    """Return the same by sweeps, whatever memory they take."""
    ask = WholeAsk(lin, create_graph=create_graph, layers=False, chunk_size=chunk_size, into=into)
    return answer(ask, WHOLE).blocks


def ensure_whole_fits(ask: WholeAsk) -> None:
    """Refuse a result that does not fit, before places for it are allocated.

    Raises:
        MemoryBudgetError: It does not.
    """
    fitted(ask, candidates(ask, WHOLE)[0][0])
