"""Some eigenpairs of a symmetric operator, each with its residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._interop import ArrayLike
from .._keywords import keywords
from .._lanczos import KrylovSpace, Ritz
from .._operators import Operator
from .._progress import shows_progress
from .._requirements import check_choice, check_positive
from .._runtime.contexts import eager
from .._saving import Savable
from ..errors import SolveError
from ._probes import check_symmetric, product

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative residuals, the defaults of the solvers
_BLOCK = 8  # vectors to a step: products share passes, and eigenvalues of multiplicity up to 8 are found at once


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(ArrayLike, Savable):
    """Eigenvalues and eigenvectors with their certificates.

    For every pair an eigenvalue of the operator lies within `residuals` of `values` (Weyl); to first order in the gap
    to the next one the value is off by the square of it only. That no eigenvalue was left out in between is all but
    certain from a random start, not proved.

    Attributes:
        values: In order of `which`, (k,), in float64.
        vectors: Orthonormal, one to a row, (k, n).
        residuals: `|A v - θ v|`, recomputed, (k,).
        converged: All residuals are below the tolerance.
        tolerance: What that is, relative to `norm`.
        norm: The largest size of an eigenvalue met.
        products: How many vectors were mapped.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    tolerance: float
    norm: float
    products: int

    def __repr__(self) -> str:
        state = "converged" if self.converged else "NOT converged"
        shown = ", ".join(f"{float(value):.4g}" for value in self.values[:5])
        more = ", …" if len(self.values) > 5 else ""
        return (
            f"Eigenpairs({shown}{more}: {state}, worst residual {float(self.residuals.max()):.1e} at norm "
            f"{self.norm:.2g}, {self.products} products)"
        )


@keywords()
@eager
@shows_progress("products")
def eigenpairs(
    operator: Operator,
    count: int = 1,
    which: str = "largest",
    *,
    tolerance: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    on_failure: str = "raise",
    progress: bool | None = None,
) -> Eigenpairs:
    """Return some extreme eigenpairs of a symmetric operator, by restarted block Lanczos.

    Source: Wu and Simon (2000), thick restarts, with full reorthogonalisation. Blocks of up to 8 vectors share each
    product and find eigenvalues of that multiplicity.

    Args:
        operator: A symmetric operator.
        count: How many; at most n are returned.
        which: `"largest"`, `"smallest"` or `"magnitude"` (largest absolute values).
        tolerance: On residuals, relative to the norm; by default 1e-8 in float64, 1e-4 in lower precision.
        max_products: How many vectors may be mapped; by default 40 per pair and 1000 more.
        seed: Seeds a private generator.
        on_failure: `"raise"`, or `"return"` what there is.
        progress: Force the progress bar on or off; by default it is shown after 2 s, where someone looks.

    Returns:
        Values in descending order for `"largest"`, ascending for `"smallest"`, by size for `"magnitude"`.

    Raises:
        InputError: The operator is not known to be symmetric, or an argument is out of range.
        SolveError: A residual stayed above the tolerance; `solution` holds the pairs.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> from jacops import Matrix
        >>> found = eigenpairs(Matrix(torch.diag(torch.tensor([1.0, 5.0, 3.0])), symmetric=True), 2)
        >>> [round(float(value), 4) for value in found.values]
        [5.0, 3.0]
    """
    check_symmetric(operator)
    check_choice("which", which, ("largest", "smallest", "magnitude"))
    check_choice("on_failure", on_failure, ("raise", "return"))
    count = min(check_positive("count", count), operator.shape[0])
    limit = 1000 + 40 * count if max_products is None else check_positive("max_products", max_products)
    tolerance = _TOLERANCE.get(operator.domain.dtype, 1e-4) if tolerance is None else tolerance
    run = _run(operator, count, seed)
    ritz = _grown(run, count, which, tolerance, limit)
    found = _certified(operator, run, ritz, picked(ritz.values[0], count, which), tolerance)
    if not found.converged and on_failure == "raise":
        raise SolveError(
            f"eigenpairs: after {found.products} products a residual is {float(found.residuals.max()):.1e}, above "
            f"{tolerance:.1e} of the norm {found.norm:.2e}. Pass a larger `max_products` or `tolerance`, or "
            "`on_failure='return'`; the error's `solution` holds what there is.",
            found,
        )
    return found


def working_dtype(operator: Operator) -> torch.dtype:
    """Return the dtype of Krylov bases: the operator's, float32 at least."""
    return torch.promote_types(operator.domain.dtype, torch.float32)


def _run(operator: Operator, count: int, seed: int) -> KrylovSpace:
    space, work = operator.domain, working_dtype(operator)
    width = min(count, _BLOCK, space.dim)
    start = torch.randn(1, width, space.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return KrylovSpace(
        lambda rows: operator.apply(rows.to(space.dtype)).to(work),
        start.to(space.device, work),
        # Room for twice what is wanted and eight blocks: a space that restarts forgets what it has not kept.
        capacity=max(2 * count + 8 * width, 40),
        seed=seed,
    )


def _grown(run: KrylovSpace, count: int, which: str, tolerance: float, limit: int) -> Ritz:
    """Return the Ritz pairs of a space grown, and restarted, until the wanted ones settle or products run out."""
    while True:
        run.step()
        ritz = run.ritz()
        values = ritz.values[0]
        settled = len(values) >= count and bool(
            (ritz.residuals[0, picked(values, count, which)] <= 0.5 * tolerance * values.abs().max()).all()
        )
        if settled or run.products >= limit or run.basis.shape[1] == run.basis.shape[2]:
            return ritz
        if not run.room:
            run.restart(picked(values, count + (len(values) - count) // 2, which).sort().values)


def picked(values: Tensor, count: int, which: str) -> Tensor:
    """Return the positions of the wanted ones among ascending values, best first."""
    if which == "smallest":
        return torch.arange(min(count, len(values)), device=values.device)
    size = values.abs() if which == "magnitude" else values
    return size.argsort(descending=True)[:count]


def _certified(operator: Operator, run: KrylovSpace, ritz: Ritz, where: Tensor, tolerance: float) -> Eigenpairs:
    """Recompute the residuals from the operator itself, with the Rayleigh quotients of the vectors."""
    vectors = run.vectors(ritz.coefficients[:, where])[0].to(operator.domain.dtype)
    image, wide = product(operator, vectors).double(), vectors.double()
    values = (wide * image).sum(1) / (wide**2).sum(1)
    residuals = torch.linalg.vector_norm(image - values.unsqueeze(1) * wide, dim=1)
    norm = float(ritz.values[0].abs().max())
    return Eigenpairs(
        values,
        vectors,
        residuals,
        bool((residuals <= tolerance * norm).all()),
        tolerance,
        norm,
        run.products + len(vectors),
    )
