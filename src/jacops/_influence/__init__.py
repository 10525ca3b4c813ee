"""Influence: "which training point moved this prediction?" and the twice-differentiable interface it depends on."""

from ._influences import compute_influence_factors, compute_influences, self_influences
from ._result import InfluenceFactors, Influences
from ._torch import TorchTensorUtilities, TorchTwiceDifferentiable
from ._twice_differentiable import (
    DataLoaderType,
    InverseHvpResult,
    ModelType,
    TensorType,
    TensorUtilities,
    TwiceDifferentiable,
)

__all__ = [
    "DataLoaderType",
    "InfluenceFactors",
    "Influences",
    "InverseHvpResult",
    "ModelType",
    "TensorType",
    "TensorUtilities",
    "TorchTensorUtilities",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "compute_influence_factors",
    "compute_influences",
    "self_influences",
]
