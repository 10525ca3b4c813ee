"""Attribution: what features, tokens and layers add to outputs, exactly or with parts of a model held constant."""

from typing import TYPE_CHECKING

from ._lazy import lazy

if TYPE_CHECKING:
    from ._attribution import project_jacobian, reduce_contributions, verify_jacobian
    from ._decomposition import contributions
    from ._integrated import integrated_jacobian
    from ._jacobians import compute_jacobian
    from ._lens import jacobian_lens, logit_difference
    from ._projections import projection

__all__ = [
    "compute_jacobian",
    "contributions",
    "integrated_jacobian",
    "jacobian_lens",
    "logit_difference",
    "project_jacobian",
    "projection",
    "reduce_contributions",
    "verify_jacobian",
]

_HOMES = {  # as above
    "_attribution": "project_jacobian reduce_contributions verify_jacobian",
    "_decomposition": "contributions",
    "_integrated": "integrated_jacobian",
    "_jacobians": "compute_jacobian",
    "_lens": "jacobian_lens logit_difference",
    "_projections": "projection",
}

if not TYPE_CHECKING:  # which would take any name for one of these
    __getattr__, __dir__ = lazy(__name__, _HOMES)
