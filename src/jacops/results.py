"""Types of results, for annotations and `isinstance`; they are created by calls."""

from typing import TYPE_CHECKING

from ._lazy import lazy

if TYPE_CHECKING:
    from ._attribution_tables import TopFeatures
    from ._checks import Check
    from ._contributions import Contributions, JacobianVerification
    from ._estimators import DiagonalEstimate, Eigenpairs, Estimate, SpectralDensity, SpectralNorm
    from ._features import FeatureNames
    from ._influence import InfluenceFactors, Influences, InverseHvpResult
    from ._influence._index import GradientIndex
    from ._influence._rankings import GroupedInfluences, LayerInfluences, RankedInfluences
    from ._lens import JacobianLens
    from ._planning import Plan, PlannedRoute
    from ._projections import Projection
    from .fit import LeastSquaresResult
    from .solvers import Solution
    from .solvers._kronecker_factors import KroneckerFactors
    from .sparse import SparseJacobian

# fmt: off
__all__ = [
    "Check", "Contributions", "DiagonalEstimate", "Eigenpairs", "Estimate", "FeatureNames", "GradientIndex",
    "GroupedInfluences", "InfluenceFactors", "Influences", "InverseHvpResult", "JacobianLens", "JacobianVerification",
    "KroneckerFactors", "LayerInfluences", "LeastSquaresResult", "Plan", "PlannedRoute", "Projection",
    "RankedInfluences", "Solution", "SparseJacobian", "SpectralDensity", "SpectralNorm", "TopFeatures",
]
# fmt: on

_HOMES = {  # as above
    "_attribution_tables": "TopFeatures",
    "_checks": "Check",
    "_contributions": "Contributions JacobianVerification",
    "_estimators": "DiagonalEstimate Eigenpairs Estimate SpectralDensity SpectralNorm",
    "_features": "FeatureNames",
    "_influence": "InfluenceFactors Influences InverseHvpResult",
    "_influence._index": "GradientIndex",
    "_influence._rankings": "GroupedInfluences LayerInfluences RankedInfluences",
    "_lens": "JacobianLens",
    "_planning": "Plan PlannedRoute",
    "_projections": "Projection",
    "fit": "LeastSquaresResult",
    "solvers": "Solution",
    "solvers._kronecker_factors": "KroneckerFactors",
    "sparse": "SparseJacobian",
}

if not TYPE_CHECKING:  # which would take any name for one of these
    __getattr__, __dir__ = lazy(__name__, _HOMES)
