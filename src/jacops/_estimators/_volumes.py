"""Volumes: log-determinants and singular values, by whichever Gram matrix is smaller."""

from __future__ import annotations

import torch
from torch import Tensor

from .._keywords import keywords
from .._operators import Diagonal, LayerFactors, Operator
from .._operators._eigen_blocks import EigenBlocks
from .._operators._finite_results import check_result
from .._operators._graphs import check_operator
from .._runtime.contexts import eager
from ..errors import InputError, InputTypeError


@keywords()
@eager
def logdet(operator: Operator, *, by_sample: bool = False) -> Tensor:
    r"""Return $\log |\det A|$; of m rows and n > m columns $\frac12 \log \det A A^\top$, the logarithm of their volume.

    Diagonal and Kronecker-factored operators add up logarithms, wide ones take the Gram matrix of their rows (without
    the rows themselves where the operator has a cheaper way), square ones the matrix.

    Args:
        operator: With no more rows than columns.
        by_sample: Of `sample_jacobians`: one for each sample's own rows, `(samples,)`.

    Returns:
        One number, or one per sample, in the operator's dtype; computed in float64. `-inf` where it is singular.

    Raises:
        InputError: There are more rows than columns.
        InputTypeError: `by_sample` with an operator whose rows are not by samples.
        NonFiniteError: An entry is NaN or Inf.

    Example:
        >>> import jacops
        >>> J = jacops.sample_jacobians(torch.nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> logdet(J, by_sample=True).exp()
        tensor([5., 1.])
    """
    check_operator(operator)
    (m, n), dtype = operator.shape, operator.codomain.dtype
    grams = _by_sample(operator) if by_sample else None
    rows = m if grams is None else grams.shape[1]
    if rows > n:
        todo = "Take the transpose, `A.T`."
        raise InputError.of("the operator", f"of shape {(rows, n)}", "it may not have more rows than columns", todo)
    if grams is not None:
        return (0.5 * torch.linalg.slogdet(grams.double())[1]).to(dtype)
    if isinstance(operator, EigenBlocks | Diagonal):
        values = operator.eigenvalues if isinstance(operator, EigenBlocks) else operator.entries
        return values.double().abs().log().sum().to(dtype)
    if m == n:
        return torch.linalg.slogdet(operator.dense().double())[1].to(dtype)
    return (0.5 * torch.linalg.slogdet(operator.gram().double())[1]).to(dtype)


@keywords()
@eager
def singular_values(operator: Operator, *, by_sample: bool = False) -> Tensor:
    r"""Return the singular values, in descending order.

    They are roots of the eigenvalues of the smaller Gram matrix where that has less than a quarter of the longer
    side, and of each sample's with `by_sample`; what is below $\sqrt{\epsilon}$ of the largest is rounding then (1e-8
    in float64). Else the matrix is decomposed.

    Args:
        operator: Any.
        by_sample: Of `sample_jacobians`: those of each sample's own rows, `(samples, k)`.

    Returns:
        `(min(m, n),)`, or `(samples, min(k, n))`, in the operator's dtype.

    Raises:
        InputTypeError: `by_sample` with an operator whose rows are not by samples.
        NonFiniteError: An entry is NaN or Inf.

    Example:
        >>> import jacops
        >>> J = jacops.sample_jacobians(torch.nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> singular_values(J, by_sample=True)
        tensor([[5.],
                [1.]])
    """
    check_operator(operator)
    (m, n), dtype = operator.shape, operator.codomain.dtype
    if by_sample:
        return _roots(_by_sample(operator), n).to(dtype)
    if 4 * min(m, n) < max(m, n):  # the Gram matrix costs a quarter of the decomposition's sweeps or less
        return _roots(operator.gram() if m <= n else operator.T.gram(), min(m, n)).to(dtype)
    return check_result(operator, torch.linalg.svdvals(operator.dense()), "the vector of singular values")


def _roots(gram: Tensor, most: int) -> Tensor:
    return torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt().flip(-1)[..., :most]


def _by_sample(operator: Operator) -> Tensor:
    if not isinstance(operator, LayerFactors):
        todo = "Pass what `sample_jacobians` or `sample_gradients` returns."
        raise InputTypeError.of("the operator", f"a {operator.name}", "rows by samples are needed", todo)
    return operator.sample_grams()
