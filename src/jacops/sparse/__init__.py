"""Sparse Jacobians: patterns are detected, coloured and tested."""

from .._lazy import eager
from ._jacobian import jacobian
from ._point import inspectors
from .detect import detect_pattern
from .layouts import SparseJacobian
from .pattern import Pattern
from .plan import SparsePlan, sparse_plan
from .separable import Separation, samples_independent

# fmt: off
__all__ = [
    "Pattern", "Separation", "SparseJacobian", "SparsePlan", "detect_pattern", "inspectors", "jacobian",
    "samples_independent", "sparse_plan",
]
# fmt: on

eager(__name__)
