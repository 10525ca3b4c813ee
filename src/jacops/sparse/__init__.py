"""Sparse Jacobians: detect, lift, colour, compress, certify."""

from ._point import inspectors
from .detect import detect_pattern
from .layouts import SparseJacobian
from .pattern import Pattern
from .plan import SparsePlan, sparse_plan
from .separable import Separation, samples_apart
from .sparse import sparse

# fmt: off
__all__ = [
    "Pattern", "Separation", "SparseJacobian", "SparsePlan", "detect_pattern", "inspectors", "samples_apart", "sparse",
    "sparse_plan",
]
# fmt: on
