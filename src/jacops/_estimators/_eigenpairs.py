"""Some eigenpairs of a symmetric operator, each with its residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from .._display import Described, Description, Table
from .._figures import canvas, eigenvalues
from .._interop import ArrayLike
from .._keywords import keywords
from .._lanczos import KrylovSpace, Ritz
from .._operators import Operator
from .._operators._graphs import without_graph
from .._progress import shows_progress
from .._requirements import check_choice, check_positive
from .._runtime.agreement import residual_tolerance
from .._runtime.contexts import eager, private_generator
from .._saving import Savable
from .._words import OnFailure, Which
from ..errors import SolveError
from ._probes import check_symmetric, product

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 8  # pairs in a repr: one screen
_BLOCK = 8  # vectors to a step: products share passes, and eigenvalues of multiplicity up to 8 are found at once


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(ArrayLike, Savable, Described):
    """Eigenvalues and eigenvectors with their certificates.

    For every pair an eigenvalue of the operator lies within `residuals` of `values` (Weyl); the error of the value
    itself is about the square of that over the gap to the next eigenvalue. That no eigenvalue in between is missing is
    almost certain with a random start, but not proved.

    Attributes:
        values: In order of `which`, (k,), in float64.
        vectors: Orthonormal, one to a row, (k, n).
        residuals: `|A v - θ v|`, recomputed, (k,).
        converged: All residuals are below the tolerance.
        tolerance: Relative to `norm`.
        norm: The largest absolute Ritz value.
        products: Number of products with a vector.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    tolerance: float
    norm: float
    products: int

    @overload
    def plot(self, *, ax: None = None) -> Figure: ...
    @overload
    def plot(self, *, ax: Axes) -> Axes: ...
    def plot(self, *, ax: Axes | None = None) -> Figure | Axes:
        """Draw the eigenvalues in their order, with their residuals as error bars.

        The axis is logarithmic where all are positive and span more than two decades.

        Args:
            ax: Matplotlib axes to draw into; a new figure otherwise, which `pyplot.show` does not show.

        Returns:
            The figure; the axes where they were given.

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        drawn, (panel,) = canvas(ax, (5.5, 3.5))
        eigenvalues(panel, *(part.detach().cpu().double().numpy() for part in (self.values, self.residuals)))
        panel.set_title(f"{len(self.values)} of {self.vectors.shape[1]:,} eigenvalues", fontsize=10)
        return drawn

    def _describe(self) -> Description:
        (count, n), shown = self.vectors.shape, zip(self.values[:_SHOWN], self.residuals[:_SHOWN], strict=True)
        state = "converged" if self.converged else "NOT converged"
        rows: list[tuple[str, ...]] = [(f"{k}", f"{float(v):.6g}", f"{float(r):.1e}") for k, (v, r) in enumerate(shown)]
        rows += [(f"… {count - _SHOWN} more",)] if count > _SHOWN else []
        worst = float(self.residuals.max()) if count else 0.0
        title = f"Eigenpairs({count} of {n:,}, {state}): worst residual {worst:.1e} at norm {self.norm:.3g}"
        facts = [("products", f"{self.products}"), ("tolerance", f"{self.tolerance:.1e} of the norm")]
        return Description(title, facts, [Table(("", "eigenvalue", "residual"), rows)] if rows else ())


@keywords()
@eager
@shows_progress("products")
def eigenpairs(
    operator: Operator,
    count: int = 1,
    which: Which = "largest",
    *,
    tolerance: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    on_failure: OnFailure = "raise",
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
        max_products: Maximum number of products with a vector; by default 40 per pair and 1000 more.
        seed: Seeds a private generator.
        on_failure: `"raise"`, or `"return"` the pairs found so far.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        Values in descending order for `"largest"`, ascending for `"smallest"`, by size for `"magnitude"`.

    Raises:
        InputError: The operator is not known to be symmetric, or an argument is out of range.
        SolveError: A residual stayed above the tolerance; `solution` holds the pairs.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> from jacops.linalg import Matrix
        >>> found = eigenpairs(Matrix(torch.diag(torch.tensor([1.0, 5.0, 3.0])), symmetric=True), 2)
        >>> [round(float(value), 4) for value in found.values]
        [5.0, 3.0]
    """
    operator = without_graph(operator)
    check_symmetric(operator)
    check_choice("which", which, Which)
    check_choice("on_failure", on_failure, OnFailure)
    count = min(check_positive("count", count), operator.shape[0])
    limit = 1000 + 40 * count if max_products is None else check_positive("max_products", max_products)
    tolerance = residual_tolerance(operator.domain.dtype) if tolerance is None else tolerance
    width = min(count, _BLOCK, operator.shape[0])
    # Room for twice what is wanted and eight blocks: what a restart does not keep is lost.
    room = max(2 * count + 8 * width, 40)
    run = krylov_space(operator, random_block(operator, width, seed), room, seed)
    ritz = _grown(run, count, which, tolerance, limit)
    found = _certified(operator, run, ritz, picked(ritz.values[0], count, which), tolerance)
    if not found.converged and on_failure == "raise":
        raise SolveError(
            f"eigenpairs: after {found.products} products a residual is {float(found.residuals.max()):.1e}, above "
            f"{tolerance:.1e} of the norm {found.norm:.2e}. Pass a larger `max_products` or `tolerance`, or "
            "`on_failure='return'`; the error's `solution` is the result so far.",
            found,
        )
    return found


def krylov_space(operator: Operator, start: Tensor, capacity: int, seed: int) -> KrylovSpace:
    """Return a Krylov space of an operator, whose basis has its dtype, float32 at least."""
    space, work = operator.domain, torch.promote_types(operator.domain.dtype, torch.float32)
    start = start.to(space.device, work)
    return KrylovSpace(lambda rows: operator.apply(rows.to(space.dtype)).to(work), start, capacity, seed)


def random_block(operator: Operator, width: int, seed: int) -> Tensor:
    """Return a random starting block `(1, width, n)`."""
    generator = private_generator(operator.domain.device, seed)
    shape = 1, width, operator.domain.dim
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


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
