"""Operators: lazy linear maps between named spaces, and the algebra that makes code read as the formula."""

from ._algebra import Diagonal, Identity, Matrix, Product, Scaled, Sum, Transposed
from ._arithmetic import ScalarIdentity, eye
from ._base import Operator
from ._factors import LayerFactors
from ._recorded import LinearizedMap

__all__ = [
    "Diagonal",
    "Identity",
    "LayerFactors",
    "Matrix",
    "Operator",
    "Product",
    "LinearizedMap",
    "ScalarIdentity",
    "Scaled",
    "Sum",
    "Transposed",
    "eye",
]
