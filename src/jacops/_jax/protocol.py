"""What the rest of the library uses of the JAX backend; nothing else of it is imported from outside."""

from __future__ import annotations

from .crossing import filled, is_floating, to_jax, to_numpy, to_torch
from .function import Apply, JaxFunction, JaxLoss, WeightedRows, check_rows
from .model import Model
from .parameters import Parameters, leaf_names
from .points import Point

__all__ = [
    "Apply",
    "JaxFunction",
    "JaxLoss",
    "Model",
    "Parameters",
    "Point",
    "WeightedRows",
    "check_rows",
    "filled",
    "is_floating",
    "leaf_names",
    "to_jax",
    "to_numpy",
    "to_torch",
]
