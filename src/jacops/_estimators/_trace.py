"""The trace of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .._keywords import keywords
from .._operators import Operator
from .._operators._graphs import without_graph
from .._progress import shows_progress
from .._requirements import check_choice
from .._runtime.contexts import eager, private_generator
from .._words import TraceMethod
from ._diagonal import diagonal
from ._leave_one_out import sketched
from ._probes import Estimate, check_probes, check_square, left_out_mean, mean_of, product, signs


@keywords()
@eager
@shows_progress()
def trace(
    operator: Operator,
    probes: int | None = None,
    seed: int = 0,
    *,
    method: TraceMethod = "xtrace",
    progress: bool | None = None,
) -> Estimate:
    r"""Return the trace of a square operator, exact or estimated with a standard error.

    Without `probes` the exact diagonal is summed. With `probes`, by `method`:

    - `"xtrace"` (Epperly, Tropp and Webber, 2024): the trace of a low-rank part plus an estimate of the rest from
      random vectors, where every vector tests the part made from the others. Two products per probe, and the error
      falls much faster than by averaging where the spectrum decays. Where so many products would give the exact
      diagonal, that is returned.
    - `"hutchinson"` (Girard, 1989; Hutchinson, 1990): $\frac1k \sum z^\top A z$ over random sign vectors. One product
      per probe; the error falls as $1/\sqrt k$ whatever the spectrum.

    Args:
        operator: A square operator.
        probes: Number of random vectors, at least 2; None for the exact trace.
        seed: Seeds a private generator; the global one is not drawn from.
        method: `"xtrace"` or `"hutchinson"`.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        The trace and one standard error of it, 0 where it is exact.

    Raises:
        InputError: The operator is not square, `probes` is less than 2 or `method` unknown.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> from jacops.linalg import Matrix
        >>> trace(Matrix(torch.diag(torch.tensor([1.0, 2.0]))))
        3 (exact)
    """
    operator = without_graph(operator)
    check_square(operator)
    check_choice("method", method, TraceMethod)
    if probes is None:
        return _exact(operator)
    check_probes(probes)
    if method == "hutchinson":
        z = signs(probes, operator.domain, seed)
        return mean_of((z * product(operator, z)).sum(1, dtype=torch.float64))
    return _exact(operator) if 2 * probes >= operator.shape[0] else _xtrace(operator, probes, seed)


def _exact(operator: Operator) -> Estimate:
    return Estimate(float(diagonal(operator).double().sum()), 0.0)


def _xtrace(operator: Operator, probes: int, seed: int) -> Estimate:
    omega = _on_sphere(operator, probes, seed)
    sketch = sketched(operator, omega)
    basis, upper, left_out, floor = sketch
    image = product(operator, basis.mT.to(operator.domain.dtype)).double()  # rows A q_j
    inner = basis.mT @ image.mT  # H = Qᵀ A Q
    if left_out is None:
        return Estimate(float(inner.trace()), floor)
    n, omega = operator.shape[0], omega.double()
    low_rank = inner.trace() - (left_out * (inner @ left_out)).sum(0)
    within = basis.mT @ omega.mT
    x = within - left_out * (left_out * within).sum(0)  # Ω seen by the sketch without each one's own image
    # (ω - Q x)ᵀ A (ω - Q x), with A ω = Q r
    along = (within * upper).sum(0)
    rest = along - (x * (image @ omega.mT)).sum(0) - (x * upper).sum(0) + (x * (inner @ x)).sum(0)
    outside = n - (x**2).sum(0)  # |ω - Q x|²; its mean is the dimension that is left
    value, error = left_out_mean(low_rank + rest * (n - probes + 1) / outside)
    return Estimate(float(value), max(float(error), floor))


def _on_sphere(operator: Operator, probes: int, seed: int) -> Tensor:
    """Return random rows of length √n in uniform directions."""
    space, generator = operator.domain, private_generator(operator.domain.device, seed)
    rows = torch.randn(probes, space.dim, generator=generator, dtype=torch.float64, device=generator.device)
    rows *= space.dim**0.5 / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.to(space.device, space.dtype)
