"""Attribution: what features, tokens and layers add to outputs, exactly or with parts of a model held constant."""

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
