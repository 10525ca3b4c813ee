"""Words that arguments take: each set is written once, as a type, and `check_choice` reads the words from that type."""

from __future__ import annotations

from typing import Literal

# Derivatives.
Wrt = Literal["parameters", "inputs"]
Checks = Literal["first", "always", "strict", "never"]
Fallback = Literal["warn", "silent", "error"]
Mode = Literal["auto", "reverse", "forward", "split"]
Sweeps = Literal["reverse-mode", "forward-mode"]
Randomness = Literal["error", "same"]
Layout = Literal["scipy", "coo", "csr", "bsr"]

# Contributions, and figures of results.
Magnitude = Literal["l2", "l1", "max"]
ContributionFigure = Literal["auto", "bars", "waterfall", "summary", "image", "sequence"]
FitFigure = Literal["convergence", "residuals"]

# Curvature and influence.
Curvature = Literal["hessian", "ggn", "fisher", "empirical_fisher", "monte_carlo_fisher"]
FisherKind = Literal["exact", "monte_carlo", "empirical"]
FisherSource = Literal["auto", "exact", "monte_carlo", "empirical"]
FactorKind = Literal["ggn", "exact", "monte_carlo", "empirical"]
FactorBias = Literal["joint", "separate"]
Sharing = Literal["expand", "reduce"]
IndexCurvature = Literal["empirical_fisher", "monte_carlo_fisher", "ggn"]
Reduction = Literal["mean", "sum"]
InfluenceType = Literal["up", "perturbation", "token"]
AutoDamping = Literal["auto"]

# Solvers and estimators.
OnFailure = Literal["raise", "return"]
SolverName = Literal["arnoldi", "auto", "cg", "direct", "ekfac", "lanczos", "lissa", "minres", "nystrom"]
TraceMethod = Literal["xtrace", "hutchinson"]
DiagonalMethod = Literal["xdiag", "hutchinson"]
Which = Literal["largest", "smallest", "magnitude"]

# Least squares.
StepSolverName = Literal["auto", "qr", "cholesky", "lstsq", "sparse_cholesky", "splu", "qdldl", "rslab", "pcg"]
StrategyName = Literal["auto", "constant", "adaptive", "marquardt", "nielsen", "trust_region"]
KernelName = Literal["linear", "huber", "soft_l1", "cauchy", "arctan"]
Corrector = Literal["triggs", "first_order"]
JacobianForm = Literal["auto", "dense", "sparse"]
ScaleRule = Literal["jac"]
BatchFailure = Literal["warn", "raise", "return"]
