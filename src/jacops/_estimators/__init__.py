"""Numbers that summarise an operator: exact by default, estimated with an error bar on request."""

from ._density import SpectralDensity, effective_dimension, spectral_density
from ._diagonal import DiagonalEstimate, diagonal
from ._eigenpairs import Eigenpairs, eigenpairs
from ._norms import SpectralNorm, norm, spectral_norm
from ._probes import Estimate
from ._trace import trace
from ._volumes import logdet, singular_values

__all__ = [
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "SpectralNorm",
    "diagonal",
    "effective_dimension",
    "eigenpairs",
    "logdet",
    "norm",
    "singular_values",
    "spectral_density",
    "spectral_norm",
    "trace",
]
