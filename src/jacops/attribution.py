"""Attribution: what every feature adds to every output, exact and checked, and back to the features behind a PCA."""

from ._attribution import contributions, project_jacobian, reduce_contributions, verify_jacobian
from ._projections import projection

__all__ = ["contributions", "project_jacobian", "projection", "reduce_contributions", "verify_jacobian"]
