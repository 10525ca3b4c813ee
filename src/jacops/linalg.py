"""Linear operators, and their traces, norms, diagonals, eigenpairs and spectral densities.

Less common operators of a model are created here, too: `empirical_fisher`.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy

if TYPE_CHECKING:
    from ._estimators import (
        DiagonalEstimate,
        Eigenpairs,
        Estimate,
        SpectralDensity,
        SpectralNorm,
        diagonal,
        effective_dimension,
        eigenpairs,
        logdet,
        norm,
        singular_values,
        spectral_density,
        spectral_norm,
        trace,
    )
    from ._operators import Diagonal, Identity, LayerFactors, Matrix, Operator, eye
    from ._per_sample import empirical_fisher
    from ._space import Space
    from .solvers import inverse_quadratic_bounds

# fmt: off
__all__ = [
    "Diagonal", "DiagonalEstimate", "Eigenpairs", "Estimate", "Identity", "LayerFactors", "Matrix", "Operator", "Space",
    "SpectralDensity", "SpectralNorm", "diagonal", "effective_dimension", "eigenpairs", "empirical_fisher", "eye",
    "inverse_quadratic_bounds", "logdet", "norm", "singular_values", "spectral_density", "spectral_norm", "trace",
]
# fmt: on

_HOMES = {  # as above
    "_estimators": (
        "DiagonalEstimate Eigenpairs Estimate SpectralDensity SpectralNorm diagonal effective_dimension "
        "eigenpairs logdet norm singular_values spectral_density spectral_norm trace"
    ),
    "_operators": "Diagonal Identity LayerFactors Matrix Operator eye",
    "_per_sample": "empirical_fisher",
    "_space": "Space",
    "solvers": "inverse_quadratic_bounds",
}

if not TYPE_CHECKING:  # which would take any name for one of these
    __getattr__, __dir__ = lazy(__name__, _HOMES)
