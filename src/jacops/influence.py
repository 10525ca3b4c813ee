"""Further influence scores: largest values, groups, layers, projections, several checkpoints.

The everyday calls are `jacops.compute_influences`, `jacops.self_influences` and `jacops.compute_influence_factors`.
"""

from ._influence import compute_influence_factors, compute_influences, self_influences
from ._influence._checkpoints import ensemble_influences, tracin
from ._influence._index import projected_index
from ._influence._streamed import group_influences, grouped, layer_influences, ranked, top_influences

__all__ = [
    "compute_influence_factors",
    "compute_influences",
    "ensemble_influences",
    "group_influences",
    "grouped",
    "layer_influences",
    "projected_index",
    "ranked",
    "self_influences",
    "top_influences",
    "tracin",
]
