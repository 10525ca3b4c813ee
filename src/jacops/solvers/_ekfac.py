r"""EK-FAC: curvature layer by layer, as Kronecker products of small factors with exact eigenvalues in their basis."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from .._operators import Operator
from .._operators._eigen_blocks import EigenBlocks, covered, ridge_values
from .._operators._ranked_rows import RankedRows
from .._requirements import check_choice, check_positive
from .._runtime.contexts import eager
from .._space import Space
from .._words import FisherSource
from ..errors import InputError
from ._base import Prepared, Solver
from ._judge import Raw
from ._kronecker_factors import KroneckerFactors
from ._kronecker_passes import Passes, Piece, check_source, corrected, summed
from ._kronecker_sums import Basis
from ._solution import Status
from ._system import System, shifted

_SAID: dict[str, FisherSource] = {
    "empirical_fisher": "empirical",
    "monte_carlo_fisher": "monte_carlo",
    "fisher": "exact",
}

_REFIT = (
    "Fit them again, by `EKFAC().approximate(operator)`; or take them unchecked, as "
    "`dataclasses.replace(factors, model='')`."
)


@final
@dataclass(frozen=True)
class EKFAC(Solver):
    r"""Eigenvalue-corrected Kronecker-factored curvature of a `Problem`, inverted under any damping.

    For a layer $z = W a$ with cotangents $\delta$ at $z$, the block of $W$ is approximated by
    $(U_S \otimes U_A)\,\mathrm{diag}(e)\,(U_S \otimes U_A)^\top$. The columns of $U_S$ and $U_A$ are eigenvectors of
    $S = E[\lVert a \rVert^2 \delta \delta^\top]$ and $A = E[\lVert \delta \rVert^2 a a^\top]$; $e$ are the second
    moments of the samples' gradients in that basis, so that the diagonal there, and with it the trace, is that of the
    exact matrix. The weights make $S \otimes A$ the better approximation, one step towards the nearest Kronecker
    product; `weighted=False` leaves them out as the sources do. A bias is one more entry of $a$.

    Convolutions, embeddings, attention's projections and weights used several times have such a form. Parameters
    that enter otherwise are kept exactly where there are few of them, else by their diagonal; `info["coverage"]`
    counts them. Of a JAX model one that enters otherwise than by a product, a convolution or entry by entry is
    refused by name. Blocks of different layers are taken as independent. Damping is added to the eigenvalues.

    Sources: Martens and Grosse (2015); Grosse and Martens (2016) for convolutions; George et al. (2018) for the
    eigenvalues; Grosse et al. (2023) for influence; Van Loan and Pitsianis (1993) for the weights.

    Args:
        fisher: Which curvature: `"exact"`, the generalised Gauss-Newton matrix (the Fisher matrix of cross-entropy,
            squared error and logistic losses), by one sweep per output; `"monte_carlo"`, the same by `draws` random
            sweeps (labels drawn from the predictive distribution); `"empirical"`, from the data's own labels, in the
            scale of `fisher(kind="empirical")`;
            `"auto"`, as the operator states, exact up to 64 outputs per sample.
        corrected: False stops at the factors (K-FAC), at half the sweeps.
        weighted: False makes S and A plain averages, as in K-FAC: over all positions, those of padding too.
        draws: Random sweeps per batch. `info["noise"]` is the relative standard error that they leave, estimated from
            above; four times as many halve it.
        seed: Of the draws, each of which depends on the sample's place in the data and the target's place among those
            that count: padding and batch sizes change nothing. The global random state is not touched.
        exact_up_to: Parameters outside Kronecker form are kept exactly up to this many in one tensor.
        widest: Sides of a weight longer than this keep their own axes as eigenbasis.
        report_residual: Compute the residuals of solutions, by a pass over the data, which in influence as many
            solutions share as fit into memory; else they are NaN, and the status `unchecked`.
        query_rank: Truncate the part of each weight in a solution, seen as a matrix `(p, q)`, to this rank, by a
            singular value decomposition, where `rank * (p + q)` numbers are fewer; biases, norms and smaller weights
            stay as they are. Influence then holds solutions as these factors, so that many more of them share a pass
            over the training data, and multiplies gradients of layers with factors. `info["truncation"]` is the
            relative change of each solution (Frobenius norm); residuals are those of truncated solutions. None
            truncates nothing.
        factors: What `approximate` returned for the same model with the same weights, such as that of an earlier run,
            loaded from a file. Nothing is estimated then.

    Raises:
        InputError: `fisher` is unknown, or `draws` or `query_rank` is less than 1.

    Example:
        >>> import jacops
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> A = jacops.Problem(model, torch.nn.functional.mse_loss, data).ggn()
        >>> EKFAC().solve(A, torch.tensor([[1.0, 2.0]]), damping=1.0).x
        tensor([[0.5000, 1.0000]])
    """

    fisher: FisherSource = "auto"
    corrected: bool = True
    weighted: bool = True
    draws: int = 1
    seed: int = 0
    exact_up_to: int = 512
    widest: int = 4096
    report_residual: bool = True
    query_rank: int | None = None
    factors: EigenBlocks | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        check_choice("fisher", self.fisher, FisherSource)
        check_positive("draws", self.draws)
        if self.query_rank is not None:
            check_positive("query_rank", self.query_rank)

    @property
    def is_linear(self) -> bool:
        """Whether nothing is truncated."""
        return self.query_rank is None

    @eager
    def approximate(self, operator: Operator, factors: KroneckerFactors | None = None) -> EigenBlocks:
        """Return the approximation to a curvature operator, its quadratic term included.

        Args:
            operator: Of a `Problem`, such as `problem.ggn()` or `problem.hessian()`.
            factors: From `kronecker_factors`; the first pass over the data is left out, and the eigenvectors are theirs
                (biases are taken jointly).

        Returns:
            A positive operator with `inverse(damping)`, `eigenvalues` and `coverage`.

        Raises:
            InputError: The operator is of something else, the loss has no positive curvature by samples, or the factors
                are of other parameters.
            NonFiniteError: An output or a gradient is NaN or Inf.
            ModelStateError: The model changed since the operator was made.
        """
        if self.factors is not None:
            return _fitted(self.factors, operator)
        check_source(operator)
        operator.parts.check()  # pyright: ignore[reportAttributeAccessIssue]
        operator.parts.release()  # pyright: ignore[reportAttributeAccessIssue]
        fisher = self.fisher if self.fisher != "auto" else _asked(operator)
        passes = Passes(operator.problem, fisher, self.draws, self.seed)  # pyright: ignore[reportAttributeAccessIssue]
        space, kept = operator.domain, list[Piece]()
        if factors is None:
            basis = Basis(self.weighted, self.widest)
            sums, noise = summed(passes, space, basis, self.exact_up_to, kept if self.corrected else None)
        else:
            _check_space(factors, space)
            sums, noise = tuple(own.times(1.0) for own in factors.sums), factors.drawn
        blocks = corrected(sums, passes, kept) if self.corrected else tuple(own.block() for own in sums)
        of = operator.problem.fingerprint()["model"]  # pyright: ignore[reportAttributeAccessIssue]
        found = EigenBlocks(space, blocks, None if noise is None else noise.value, of)
        return _with_ridge(found, getattr(operator, "ridge", None))

    def prepare(self, operator: Operator, damping: float = 0.0) -> PreparedEKFAC:
        """Estimate the curvature, by one or two passes over the data."""
        system = System(operator, damping)
        return PreparedEKFAC(system, self.approximate(operator), self)


@final
class PreparedEKFAC(Prepared):
    """EK-FAC ready to solve.

    Attributes:
        curvature: The approximation, without damping.
        held: How solutions are truncated.
    """

    method = "ekfac"

    def __init__(self, system: System, curvature: EigenBlocks, recipe: EKFAC) -> None:
        self.system, self.curvature, self.recipe = system, curvature, recipe
        self.held = RankedRows(curvature.space, recipe.query_rank)
        system.measure(curvature.largest)
        damping, exponent = system.damping, system.exponent
        self.lowest, self.largest = (system.in_unit(e) + damping for e in (curvature.lowest, curvature.largest))
        floor = system.eps * self.largest
        self.singular = self.lowest <= floor

        def inverted(values: Tensor) -> Tensor:
            damped = shifted(values, -exponent) + damping
            # Directions without curvature are zero without damping.
            return torch.where(damped > floor, 1.0 / damped.clamp_min(floor or 1.0), 0.0)

        self._inverse = curvature.map(inverted)

    @cached_property
    def preconditioner(self) -> EigenBlocks:
        """The inverse of the damped approximation, in the units of the caller."""
        return self._inverse.map(lambda values: shifted(values, -self.system.exponent))

    def _solve(self, rows: Tensor) -> Raw:
        many, largest, lowest = rows.shape[0], self.largest, self.lowest
        info: dict[str, Any] = {
            "coverage": self.curvature.coverage,
            "condition": largest / lowest if lowest > 0 else float("inf"),
        }
        if self.curvature.noise is not None:
            info["noise"] = self.curvature.noise
        failed = dict.fromkeys(range(many), Status.SINGULAR) if self.singular else {}
        x, unchecked = self._inverse._apply(rows), not self.recipe.report_residual
        if self.recipe.query_rank is not None:
            x, info["truncation"] = self.held.truncated(x)
            info["query_rank"] = self.recipe.query_rank
        return Raw(x, [0] * many, failed, largest, info, approximate=True, unchecked=unchecked)

    def __repr__(self) -> str:
        return f"PreparedEKFAC({covered(self.curvature.coverage)}, damping {self.system.damping:g})"


def _fitted(factors: EigenBlocks, operator: Operator) -> EigenBlocks:
    """Return factors if they are of an operator's model.

    Raises:
        InputError: They are of another one, or of other weights.
    """
    if not isinstance(factors, EigenBlocks) or factors.space != operator.domain:
        came = repr(factors.space) if isinstance(factors, EigenBlocks) else f"a {type(factors).__name__}"
        raise InputError.of("factors", came, f"those of {operator.domain} on {operator.device} are needed")
    problem = getattr(operator, "problem", None)
    if factors.model and problem is not None and problem.fingerprint()["model"] != factors.model:
        came, needed = "of another model, or of other weights or another loss", "they must be of the operator's own"
        raise InputError.of("factors", came, needed, _REFIT)
    return factors


def _asked(operator: Operator) -> FisherSource:
    """Return which curvature an operator itself is."""
    return _SAID.get(getattr(getattr(operator, "parts", None), "kind", ""), "auto")


def _check_space(factors: KroneckerFactors, space: Space) -> None:
    if (factors.space.names, factors.space.shapes) != (space.names, space.shapes):
        raise InputError.of("factors", f"of {factors.space.layout}", f"they must be of {space.layout}")


def _with_ridge(found: EigenBlocks, ridge: Tensor | None) -> EigenBlocks:
    if ridge is None:
        return found
    blocks = (replace(b, values=b.values + ridge_values(b, ridge.to(b.values))) for b in found.blocks)
    return replace(found, blocks=tuple(blocks))
