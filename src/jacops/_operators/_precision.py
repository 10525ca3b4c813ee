"""In which precision an operator's products are computed: a graph in float64 may hold parts in float32."""

from __future__ import annotations

from typing import Any

import torch

from .._runtime.agreement import coarsest
from ._algebra import Product, Scaled, Sum, Transposed
from ._base import Operator
from ._data import SumOver
from ._recorded import LinearizedMap


def computed_in(operator: Operator) -> torch.dtype:
    """Return the coarsest dtype in which an operator's products are computed, by the recorded graphs.

    Norms of some layers and losses of some models compute in float32 whatever the dtype of their input.
    """
    match operator:
        case SumOver():
            return operator.computed_in or operator.domain.dtype
        case LinearizedMap():
            return coarsest(_in_graph(operator.lin) | {operator.domain.dtype}) or operator.domain.dtype
        case Product() | Sum():
            return coarsest([computed_in(operator.left), computed_in(operator.right)]) or operator.domain.dtype
        case Scaled() | Transposed():
            return computed_in(operator.of)
    return operator.domain.dtype


def _in_graph(lin: Any) -> set[torch.dtype]:
    nodes = lin.graph_info.nodes if hasattr(lin, "graph_info") else ()  # other frameworks record no such graph
    return {made.dtype for node in nodes for made in node._input_metadata}
