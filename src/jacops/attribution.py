"""Attribution: what features, tokens and layers add to outputs, exactly or with parts of a model held constant."""

from ._attribution import contributions, project_jacobian, reduce_contributions, verify_jacobian
from ._lens import jacobian_lens, logit_difference
from ._projections import pca_projection

__all__ = [
    "contributions",
    "jacobian_lens",
    "logit_difference",
    "pca_projection",
    "project_jacobian",
    "reduce_contributions",
    "verify_jacobian",
]
