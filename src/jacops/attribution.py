"""Attribution: which features an output rests on, exact for piecewise-linear models, and always checked."""

from ._attribution import contributions, project_jacobian, reduce_contributions, verify_jacobian
from ._contributions import Contributions, JacobianVerification
from ._jacobians import compute_jacobian

# fmt: off
__all__ = [
    "Contributions", "JacobianVerification", "compute_jacobian", "contributions", "project_jacobian",
    "reduce_contributions", "verify_jacobian",
]
# fmt: on
