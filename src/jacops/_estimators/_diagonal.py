"""The diagonal of an operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, overload

import torch
from torch import Tensor

from .._interop import ArrayLike, Unpacked
from .._keywords import keywords
from .._operators import Diagonal, Identity, LayerFactors, Matrix, Operator
from .._operators._algebra import Product, Scaled, Sum, Transposed
from .._operators._data import BlockDiagonal, SumOver
from .._operators._finite_results import check_result
from .._operators._graphs import check_operator, keeps_graph, without_graph
from .._progress import shows_progress
from .._requirements import check_choice
from .._runtime.contexts import eager
from .._saving import Savable
from .._words import DiagonalMethod
from ._leave_one_out import ProbeSketch, sketched
from ._probes import check_probes, check_square, chunk_of, left_out_mean, product, signs, units


@dataclass(frozen=True, eq=False)
class DiagonalEstimate(ArrayLike, Unpacked, Savable):
    """A diagonal, with a standard error per entry.

    Attributes:
        value: The estimate, (n,).
        standard_error: One standard error of each entry, (n,); 0 where they are exact.
    """

    value: Tensor
    standard_error: Tensor
    _array: ClassVar[str] = "value"

    def __repr__(self) -> str:
        worst = float(self.standard_error.max()) if len(self.standard_error) else 0.0
        return f"DiagonalEstimate({len(self.value):,} entries, standard errors up to {worst:.1e})"


@overload
def diagonal(operator: Operator, *, progress: bool | None = None) -> Tensor: ...
@overload
def diagonal(
    operator: Operator, probes: None, seed: int = 0, *, method: DiagonalMethod = "xdiag", progress: bool | None = None
) -> Tensor: ...
@overload
def diagonal(
    operator: Operator, probes: int, seed: int = 0, *, method: DiagonalMethod = "xdiag", progress: bool | None = None
) -> DiagonalEstimate: ...
@keywords()
@eager
@shows_progress()
def diagonal(
    operator: Operator,
    probes: int | None = None,
    seed: int = 0,
    *,
    method: DiagonalMethod = "xdiag",
    progress: bool | None = None,
) -> Tensor | DiagonalEstimate:
    r"""Return the diagonal `(n,)` of a square operator, exact or estimated with a standard error per entry.

    Without `probes` it is exact. For Hessians and Gauss-Newton matrices it is computed at the outputs of layers, batch
    by batch: one sweep per number there for a Hessian, one per output of a sample for a Gauss-Newton matrix (Dangel,
    Kunstner and Hennig, 2020), compared with products at two entries of every parameter the first time. Empirical
    Fisher matrices square their factors, a product `B @ C` goes through the inner space where that is smaller,
    everything else takes unit vectors. With `probes`, by `method`:

    - `"xdiag"` (Epperly, Tropp and Webber, 2024): the diagonal of a low-rank part plus an estimate of the rest from
      random sign vectors, every vector testing the part made from the others. One product and one with the transpose
      for each probe. Where so many would give the exact diagonal, that is returned.
    - `"hutchinson"` (Bekas, Kokiopoulou and Saad, 2007): the mean of $z \odot A z$ over random sign vectors.

    Args:
        operator: A square operator.
        probes: Number of random vectors, at least 2; None for the exact diagonal.
        seed: Seeds a private generator.
        method: `"xdiag"` or `"hutchinson"`.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        A tensor without `probes`, a `DiagonalEstimate` with them.

    Raises:
        InputError: The operator is not square, `probes` is less than 2 or `method` unknown.
        NonFiniteError: A product holds NaN or Inf.

    Example:
        >>> diagonal(Matrix(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        tensor([1., 4.])
    """
    check_operator(operator)
    if probes is not None or operator.formed is None or keeps_graph(operator):
        operator = without_graph(operator)  # what is formed has no graph, and no use for a copy of the operator
    check_square(operator)
    check_choice("method", method, DiagonalMethod)
    if probes is None:
        return check_result(operator, _exact(operator).detach(), "the diagonal")
    check_probes(probes)
    z = signs(probes, operator.domain, seed)
    if method == "hutchinson":
        samples = z * product(operator, z)
        return DiagonalEstimate(samples.mean(0), samples.std(0) / math.sqrt(probes))
    if 2 * probes >= operator.shape[0]:
        value = check_result(operator, _exact(operator), "the diagonal")
        return DiagonalEstimate(value, torch.zeros_like(value))
    return _xdiag(operator, z, sketched(operator, z))


def _exact(operator: Operator) -> Tensor:
    """Return the diagonal, taking the operator's algebra apart where that is cheaper."""
    match operator:
        case Scaled():
            return operator.factor * _exact(operator.of)
        case Sum():
            return _exact(operator.left) + _exact(operator.right)
        case Diagonal():
            return operator.entries.clone()
        case Matrix():
            return operator.matrix.diagonal().clone()
        case Identity(space):
            return torch.ones(space.dim, dtype=space.dtype, device=space.device)
        case BlockDiagonal():
            return torch.cat([_exact(block) for block in operator.blocks])
        case SumOver():
            return operator.diagonal(_exact)
        case Product(left=Transposed(of=LayerFactors() as factors), right=right) if factors is right:
            return factors.column_squares()
        case _:
            return (
                _by_products(operator)
                if operator.formed is None
                else operator.formed.diagonal(partial(_by_products, operator))
            )


def _by_products(operator: Operator) -> Tensor:
    if isinstance(operator, Product) and 2 * operator.right.shape[0] < operator.shape[0]:
        return _through(operator.left, operator.right)
    return _by_units(operator)


def _through(left: Operator, right: Operator) -> Tensor:
    """Return the diagonal of a product as a sum over its inner space."""
    space, outer = right.codomain, right.domain
    result = torch.zeros(outer.dim, dtype=outer.dtype, device=outer.device)
    for _, rows in units(space, chunk_of(right)):
        result += (right.T.apply(rows) * left.apply(rows)).sum(0)
    return result


def _by_units(operator: Operator) -> Tensor:
    space = operator.domain
    result = torch.empty(space.dim, dtype=space.dtype, device=space.device)
    for where, rows in units(space, chunk_of(operator)):
        result[where] = operator.apply(rows)[:, where].diagonal()
    return result


def _xdiag(operator: Operator, omega: Tensor, sketch: ProbeSketch) -> DiagonalEstimate:
    basis, upper, left_out, floor = sketch
    image = product(operator.T, basis.mT.to(operator.codomain.dtype)).double().mT  # Z = Aᵀ Q
    dtype = operator.domain.dtype
    low_rank = (basis * image).sum(1)  # the diagonal of Q Qᵀ A
    if left_out is None:
        return DiagonalEstimate(low_rank.to(dtype), torch.full_like(low_rank, floor).to(dtype))
    taken = basis @ left_out  # what the sketch loses without probe i
    # diag(Q_i Q_iᵀ A) and ω ⊙ (I - Q_i Q_iᵀ) A ω, with A ω = Q r: only Q s (s·r) is outside
    rest = omega.double().mT * taken * (left_out * upper).sum(0)
    value, error = left_out_mean((low_rank.unsqueeze(1) - taken * (image @ left_out) + rest).mT)
    return DiagonalEstimate(value.to(dtype), error.to(dtype))
