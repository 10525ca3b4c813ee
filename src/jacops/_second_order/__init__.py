"""Derivatives of second and higher order by the input, sample by sample: Hessians, Laplacians, directional ones.

All are of the model in eval mode on a batch of one, as in `compute_jacobian`, and are made by nesting: a Jacobian,
kept connected, is differentiated again.
"""

from ._directional import directional_derivative
from ._hessian import input_hessian
from ._laplacian import laplacian

__all__ = ["directional_derivative", "input_hessian", "laplacian"]
