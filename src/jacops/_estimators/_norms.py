"""Norms of an operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import finfo

from .._interop import ArrayLike, Unpacked
from .._keywords import keywords
from .._operators import Operator
from .._operators._graphs import without_graph
from .._progress import shows_progress
from .._requirements import check_positive
from .._runtime.contexts import eager
from .._saving import Savable
from ._eigenpairs import krylov_space, random_block
from ._probes import Estimate, check_probes, chunk_of, mean_of, product, signs, units

_FAILURE = 1e-3  # probability over the start that the upper bound fails, as `_upper_bound` says


@dataclass(frozen=True, eq=False)
class SpectralNorm(ArrayLike, Unpacked, Savable):
    """A spectral norm with bounds.

    Attributes:
        value: The largest norm of the image of a unit vector: never above the norm, up to rounding.
        error: A singular value lies within this of `value`.
        upper: The norm is at most this, with a probability of 99.9 % over the random start.
        converged: `error` is below the tolerance; the bounds hold in any case.
        products: Number of products with a vector.
    """

    value: float
    error: float
    upper: float
    converged: bool
    products: int
    _array: ClassVar[str] = "value"

    def __repr__(self) -> str:
        state = "" if self.converged else ", NOT converged"
        return f"{self.value:.6g} (within {self.error:.1e}, at most {self.upper:.6g}{state})"


@keywords()
@eager
@shows_progress()
def norm(operator: Operator, probes: int | None = None, seed: int = 0, *, progress: bool | None = None) -> Estimate:
    r"""Return the Frobenius norm $\lVert A \rVert_F$, exact or estimated with a standard error.

    The exact one is computed from the rows or the columns, whichever are fewer. With `probes` it is the root of the
    mean of $\lVert A z \rVert^2$ over random sign vectors, one product each, and the standard error is that of the mean
    to first order. For the norm of a difference of operators this is a check that needs no matrix.

    Args:
        operator: Any operator.
        probes: Number of random vectors, at least 2; None for the exact norm.
        seed: Seeds a private generator.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        An `Estimate`: `value` in the units of an entry, and its `standard_error`, 0 where exact.

    Raises:
        InputError: `probes` is less than 2.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> from jacops.linalg import Matrix
        >>> norm(Matrix(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])))
        5 (exact)
    """
    operator = without_graph(operator)
    if probes is None:
        narrow = operator if operator.shape[1] <= operator.shape[0] else operator.T
        rows = (product(narrow, rows) for _, rows in units(narrow.domain, chunk_of(narrow)))
        return Estimate(math.sqrt(sum(float((row.double() ** 2).sum()) for row in rows)), 0.0)
    image = product(operator, signs(check_probes(probes), operator.domain, seed))
    square = mean_of((image.double() ** 2).sum(1))
    value = math.sqrt(square.value)
    return Estimate(value, square.standard_error / (2 * value) if value else 0.0)


@keywords()
@eager
@shows_progress("products")
def spectral_norm(
    operator: Operator, *, tolerance: float = 1e-4, max_steps: int = 100, seed: int = 0, progress: bool | None = None
) -> SpectralNorm:
    r"""Return the spectral norm $\lVert A \rVert_2$, the largest singular value, by Lanczos on $A^\top A$.

    For a positive operator Lanczos runs on $A$ itself, with one product per step instead of two. The residual bounds
    the distance to a singular value; that no other one is larger holds with a probability only (Kuczynski and
    Wozniakowski, 1992, theorem 4.1).

    Args:
        operator: Any operator.
        tolerance: On `error`, relative to `value`.
        max_steps: Maximum number of Lanczos steps.
        seed: Seeds a private generator.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        A `SpectralNorm`: `value`, a lower bound; `upper`, which holds with a probability of 99.9 %; `converged`.

    Raises:
        InputError: `max_steps` is not a positive whole number.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> from jacops.linalg import Matrix
        >>> round(spectral_norm(Matrix(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))).value, 4)
        2.0
    """
    operator = without_graph(operator)
    check_positive("max_steps", max_steps)
    if 0 in operator.shape:
        return SpectralNorm(0.0, 0.0, 0.0, True, 0)
    squared = not operator.positive
    narrow = operator if operator.shape[1] <= operator.shape[0] else operator.T
    gram = narrow.T @ narrow if squared else operator
    run = krylov_space(gram, random_block(gram, 1, seed), max_steps, seed)
    value, error, upper, settled = 0.0, math.inf, math.inf, False
    rounding = finfo(gram.domain.dtype).eps * gram.shape[1] ** 0.5  # of a product, which a residual cannot show
    # The bound that holds with probability 0.999 converges slowly; within 10 % it is useful.
    while run.room and not (settled and upper <= 1.1 * value):
        run.step()
        ritz = run.ritz()
        value, error = _singular(float(ritz.values[0, -1]), float(ritz.residuals[0, -1]), squared)
        error = max(error, rounding * value)
        upper = _upper_bound(value, run.projected.shape[1], gram.shape[0], squared)
        settled = error <= tolerance * value
    return SpectralNorm(value, error, upper, settled, run.products * (2 if squared else 1))


def _singular(ritz: float, residual: float, squared: bool) -> tuple[float, float]:
    """Return a singular value and its error from an eigenvalue of the operator or of its square."""
    ritz = max(ritz, 0.0)
    if not squared:
        return ritz, residual
    value = math.sqrt(ritz)
    # |σ² - s²| <= ρ gives |σ - s| <= ρ / (σ + s) <= ρ / σ, and <= √ρ
    return value, min(residual / value, math.sqrt(residual)) if value else math.sqrt(residual)


def _upper_bound(value: float, steps: int, dim: int, squared: bool) -> float:
    """Return what the norm does not exceed but with probability 1e-3 over the start."""
    if steps >= dim:
        return value
    gap = (math.log(1.648 * math.sqrt(dim) / _FAILURE) / (2 * steps - 1)) ** 2
    if gap >= 1:
        return math.inf
    return value / (math.sqrt(1 - gap) if squared else 1 - gap)
