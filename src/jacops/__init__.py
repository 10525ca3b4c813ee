"""Any derivative of a model, as an operator: exact, checked, and within the memory you have."""

from .errors import JacopsError, JacopsWarning
from .jacobians import compute_jacobian, full_jacobian, modjac
from .products import batch_jvp, batch_vjp, jvp, model_jvp, model_vjp, vjp
