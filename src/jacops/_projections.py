"""The step from original features to a model's reduced input: what a fitted PCA does, as a matrix and a mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ._display import Described, Description
from ._interop import ArrayLike
from ._keywords import keywords
from ._saving import Savable
from .errors import InputTypeError


@dataclass(frozen=True, eq=False, repr=False)
class Projection(ArrayLike, Savable, Described):
    """A linear map from original features to the model's input: `input = matrix @ (features - mean)`.

    Attributes:
        matrix: `(inputs, features)`.
        mean: What is taken off the features first, `(features,)`.
    """

    matrix: Tensor
    mean: Tensor
    _array: ClassVar[str] = "matrix"

    def __call__(self, features: Tensor) -> Tensor:
        """Return the model's input for rows of features."""
        return (features - self.mean) @ self.matrix.T

    def _describe(self) -> Description:
        (m, n), dtype = self.matrix.shape, str(self.matrix.dtype).removeprefix("torch.")
        return Description(f"Projection({n:,} features to {m:,} inputs, {dtype})")


@keywords()
def pca_projection(pca: Any, dtype: torch.dtype = torch.float64) -> Projection:
    r"""Return what a fitted scikit-learn `PCA` does to features, whitened or not.

    Without whitening the matrix is `components_`, with it $C / \sqrt{\lambda}$ row by row: the derivative of the
    reduced input by the original features, which is what the chain rule needs.

    Args:
        pca: A fitted `sklearn.decomposition.PCA`.
        dtype: Of the result.

    Raises:
        InputTypeError: `pca` is not a fitted PCA.
    """
    if not hasattr(pca, "components_") or not hasattr(pca, "mean_"):
        came = f"a {type(pca).__name__} without components_"
        raise InputTypeError.of("pca", came, "a fitted scikit-learn PCA is needed", "Call `.fit(features)` first.")
    matrix = np.asarray(pca.components_)
    if getattr(pca, "whiten", False):
        # scikit-learn never divides by less than the precision of the data.
        scale = np.sqrt(np.asarray(pca.explained_variance_))[:, None]
        scale = np.maximum(scale, np.finfo(scale.dtype).eps)
        matrix = matrix / scale
    return Projection(torch.as_tensor(matrix).to(dtype), torch.as_tensor(np.asarray(pca.mean_)).to(dtype))
