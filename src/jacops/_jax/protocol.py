"""What the rest of the library uses of the JAX backend; nothing else of it is imported from outside."""

from __future__ import annotations

from .adapted import Apply
from .crossing import filled, is_floating, to_jax, to_numpy, to_torch
from .function import JaxFunction, JaxLoss
from .model import Model
from .parameters import Parameters, leaf_names
from .points import Point
from .results import check_rows, finite_gradient

__all__ = [
    "Apply",
    "JaxFunction",
    "JaxLoss",
    "Model",
    "Parameters",
    "Point",
    "check_rows",
    "filled",
    "finite_gradient",
    "is_floating",
    "leaf_names",
    "to_jax",
    "to_numpy",
    "to_torch",
]
