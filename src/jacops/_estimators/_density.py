"""The spectral density of a symmetric operator, and traces of functions of it, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .._display import Described, Description
from .._figures import canvas, density
from .._interop import ArrayLike
from .._keywords import keywords
from .._operators import Operator
from .._operators._graphs import without_graph
from .._progress import shows_progress
from .._requirements import check_positive, check_range
from .._runtime.contexts import eager
from .._saving import Savable
from ..errors import InputError, MemoryBudgetError, explain
from ._eigenpairs import krylov_space
from ._probes import Estimate, check_probes, check_symmetric, chunk_of, mean_of, signs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BASIS_ENTRIES = 2**27  # 1 GiB of Krylov bases in float64
_DENSE_ENTRIES = 2**27  # 1 GiB in float64: 11,585 rows, beside what the decomposition takes


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(ArrayLike, Savable, Described):
    r"""A spectral density, estimated from random vectors, with standard errors.

    Every probe gives a quadrature rule, eigenvalues (`nodes`) and shares (`weights`), whose mean over probes
    approximates the spectrum; `density` is that mean, smoothed by a Gaussian of width `width`. It integrates to 1 over
    all real numbers: an eigenvalue of multiplicity $m$ weighs $m / n$.

    Attributes:
        grid: Where the density is given, (g,).
        density: The share of eigenvalues per unit, (g,).
        standard_error: One standard error of `density` over the probes, (g,).
        nodes: Ritz values, (probes, steps), ascending.
        weights: Their shares, (probes, steps); each row sums to 1.
        smallest: The smallest Ritz value that has a share: never below the smallest eigenvalue, up to rounding.
        largest: The largest one: never above the largest eigenvalue, up to rounding.
        width: The standard deviation of the Gaussian.
        dim: Number of eigenvalues.
        products: Number of products with a vector.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    nodes: Tensor
    weights: Tensor
    smallest: float
    largest: float
    width: float
    dim: int
    products: int

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        r"""Return $\mathrm{tr} f(A)$ with its standard error over the probes (Ubaru, Chen and Saad, 2017).

        Args:
            function: Maps a tensor of eigenvalues to a tensor of the same shape, such as `torch.log1p`.

        Raises:
            InputError: `function` gives NaN or Inf at a Ritz value that has a share, or another shape.
        """
        values = function(self.nodes)
        if not isinstance(values, Tensor) or values.shape != self.nodes.shape:
            came = f"returning {tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}"
            raise InputError.of("function", came, f"a tensor of shape {tuple(self.nodes.shape)} is needed")
        parts = torch.where(self.weights > 0, self.weights * values, 0)
        if not bool(torch.isfinite(parts).all()):
            came = f"not finite between {self.smallest:.3g} and {self.largest:.3g}"
            todo = "Add damping inside it, e.g. `lambda x: (x + damping).log()`."
            raise InputError.of("function", came, "it must be finite at every eigenvalue", todo)
        return mean_of(self.dim * parts.sum(1))

    def share(self, low: float, high: float) -> Estimate:
        """Return the share of the eigenvalues in `[low, high]`, between 0 and 1."""
        found = self.trace_of(lambda x: ((x >= low) & (x <= high)).to(x.dtype))
        return Estimate(found.value / self.dim, found.standard_error / self.dim)

    @overload
    def plot(
        self, *, floor: float | None = None, color: Any = None, label: str | None = None, ax: None = None
    ) -> Figure: ...
    @overload
    def plot(self, *, floor: float | None = None, color: Any = None, label: str | None = None, ax: Axes) -> Axes: ...
    def plot(
        self, *, floor: float | None = None, color: Any = None, label: str | None = None, ax: Axes | None = None
    ) -> Figure | Axes:
        """Draw the density on a logarithmic scale, with a band of two standard errors and the extreme Ritz values.

        Args:
            floor: The lowest density shown; by default a tenth of one eigenvalue spread over `width`.
            color: Of line and band; by default the next one of the axes.
            label: In the legend; by default the number of probes.
            ax: Matplotlib axes to draw into; a new figure otherwise, which `pyplot.show` does not show.

        Returns:
            The figure; the axes where they were given.

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        drawn, (panel,) = canvas(ax, (6.0, 3.5))
        lowest = floor or 0.1 / (self.dim * self.width * math.sqrt(2 * math.pi))
        x, y, band = (part.cpu().numpy() for part in (self.grid, self.density, 2 * self.standard_error))
        word = f"mean of {self.nodes.shape[0]} probes" if label is None else label
        density(panel, x, y, band, (self.smallest, self.largest), lowest, color, word)
        return drawn

    def _describe(self) -> Description:
        probes, steps = self.nodes.shape
        title = f"SpectralDensity({self.dim:,} eigenvalues in about [{self.smallest:.3g}, {self.largest:.3g}])"
        facts = [("probes", f"{probes} of {steps} steps, {self.products} products"), ("width", f"{self.width:.2g}")]
        return Description(title, facts)


@keywords()
@eager
@shows_progress("products")
def spectral_density(
    operator: Operator,
    probes: int = 10,
    steps: int = 80,
    *,
    width: float | None = None,
    grid: int | Tensor = 512,
    seed: int = 0,
    progress: bool | None = None,
) -> SpectralDensity:
    r"""Estimate the spectral density of a symmetric operator, with error bars over probes.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017; for networks Ghorbani, Krishnan and Xiao, 2019): each
    random sign vector $z$ gives by `steps` Lanczos steps, fully reorthogonalised, a Gauss rule for
    $z^\top f(A) z / n$, exact for polynomials of degree $2 \cdot$`steps`$ - 1$. Error bars show the spread between
    probes; they do not include the smoothing by `steps` and `width`.

    Args:
        operator: A symmetric operator.
        probes: Number of random vectors, at least 2.
        steps: Lanczos steps of each, at most n.
        width: Standard deviation of the Gaussian that smooths the density; by default a hundredth of the range.
        grid: Number of points over the range, or the points themselves.
        seed: Seeds a private generator.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        A `SpectralDensity`: `grid` and `density` `(g,)`, per unit of eigenvalue; Ritz values and their weights.

    Raises:
        InputError: The operator is not known to be symmetric, or an argument is out of range.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> from jacops.linalg import Matrix
        >>> found = spectral_density(Matrix(torch.diag(torch.arange(4.0)), symmetric=True), probes=2)
        >>> round(found.largest, 4)
        3.0
    """
    operator = without_graph(operator)
    check_symmetric(operator)
    check_probes(probes)
    steps = min(check_positive("steps", steps), operator.shape[0])
    if width is not None:
        check_range("width", width)
    nodes, weights = _quadrature(operator, probes, steps, seed)
    # Ritz values of no weight are copies made by rounding.
    met = nodes[weights > 1e-12]
    low, high = float(met.min()), float(met.max())
    # A hundredth of the range shows shapes; equal eigenvalues get a peak that a grid can hold.
    width = float(width or max((high - low) / 100, 1e-6 * max(abs(low), abs(high)), 1e-30))
    points = _points(grid, low - 4 * width, high + 4 * width, nodes)
    kernel = torch.exp(-(((points - nodes.unsqueeze(2)) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    densities = (weights.unsqueeze(2) * kernel).sum(1)
    return SpectralDensity(
        grid=points,
        density=densities.mean(0),
        standard_error=densities.std(0) / math.sqrt(probes),
        nodes=nodes,
        weights=weights,
        smallest=low,
        largest=high,
        width=width,
        dim=operator.shape[0],
        products=probes * steps,
    )


def _points(grid: int | Tensor, low: float, high: float, like: Tensor) -> Tensor:
    if isinstance(grid, Tensor):
        if grid.ndim != 1:
            raise InputError.of("grid", f"of shape {tuple(grid.shape)}", "one axis is needed")
        return grid.to(like)
    return torch.linspace(low, high, check_positive("grid", grid), dtype=like.dtype, device=like.device)


def _quadrature(operator: Operator, probes: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, `(probes, steps)`, as many probes at a time as the bases may fill."""
    space = operator.domain
    starts = signs(probes, space, seed).unsqueeze(1)
    together = max(1, min(chunk_of(operator), _BASIS_ENTRIES // (steps * space.dim)))
    found = []
    for first in range(0, probes, together):
        run = krylov_space(operator, starts[first : first + together], steps, seed).fill()
        values, coefficients, _ = run.ritz()
        found.append((values, coefficients[:, :, 0] ** 2))
    return torch.cat([values for values, _ in found]), torch.cat([weights for _, weights in found])


@keywords()
@eager
@shows_progress("products")
def effective_dimension(
    operator: Operator,
    damping: float,
    probes: int | None = None,
    steps: int = 80,
    seed: int = 0,
    *,
    progress: bool | None = None,
) -> Estimate:
    r"""Return $\mathrm{tr} A (A + \lambda I)^{-1}$, the effective number of eigenvalues above $\lambda$.

    Exact from all eigenvalues, or with `probes` by stochastic Lanczos quadrature.

    Args:
        operator: A positive operator, such as a Gauss-Newton or Fisher matrix.
        damping: $\lambda > 0$.
        probes: Number of random vectors, at least 2; None for the exact number.
        steps: Lanczos steps of each probe.
        seed: Seeds a private generator.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        An `Estimate`: `value` between 0 and the number of columns, and its `standard_error`.

    Raises:
        InputError: The operator is not known to be positive, or `damping` is not.
        MemoryBudgetError: The exact number would need too large a matrix.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> from jacops.linalg import Matrix
        >>> effective_dimension(Matrix(torch.diag(torch.tensor([1.0, 3.0])), symmetric=True, positive=True), 1.0)
        1.25 (exact)
    """
    operator = without_graph(operator)
    check_symmetric(operator)
    if not operator.positive:
        todo = "Take the Gauss-Newton or Fisher matrix."
        raise InputError.of("operator", repr(operator).splitlines()[0], "it must be known to be positive", todo)
    check_range("damping", damping)
    if probes is not None:
        found = spectral_density(operator, probes, steps, seed=seed)
        return found.trace_of(lambda x: x.clamp(min=0) / (x.clamp(min=0) + damping))
    n = operator.shape[0]
    if n * n > _DENSE_ENTRIES:
        raise MemoryBudgetError(
            explain("operator", f"of {n} dimensions", "all eigenvalues need its matrix", "Pass `probes=` to estimate.")
        )
    values = torch.linalg.eigvalsh(operator.dense().double()).clamp(min=0)
    return Estimate(float((values / (values + damping)).sum()), 0.0)
