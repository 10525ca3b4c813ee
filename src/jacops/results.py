"""Types of results, for annotations and `isinstance`; they are created by calls."""

from ._attribution_tables import TopFeatures
from ._checks import Check
from ._contributions import Contributions, JacobianVerification
from ._features import FeatureNames
from ._influence import InfluenceFactors, Influences, InverseHvpResult
from ._influence._index import GradientIndex
from ._influence._rankings import GroupedInfluences, LayerInfluences, RankedInfluences
from ._lens import JacobianLens
from ._planning import Plan, PlannedRoute
from ._projections import Projection
from .fit import LeastSquaresResult
from .linalg import DiagonalEstimate, Eigenpairs, Estimate, SpectralDensity, SpectralNorm
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
