"""Trace and diagonal of any operator: exact by default, estimated with an error bar where that is asked for."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError, explain
from .operators import Operator

_CHUNK = 64


class Estimate(NamedTuple):
    """A number and how far it may be off.

    Attributes:
        value: The estimate.
        standard_error: One standard error of it; 0 where it is exact.
    """

    value: float
    standard_error: float


def diagonal(operator: Operator) -> Tensor:
    """Return the diagonal `(n,)` of a square operator, by products with unit vectors.

    Raises:
        InputError: The operator is not square.
    """
    _square(operator)
    space = operator.domain
    result = torch.empty(space.dim, dtype=space.dtype, device=space.device)
    for start in range(0, space.dim, _CHUNK):
        where = slice(start, min(start + _CHUNK, space.dim))
        unit = torch.zeros(where.stop - start, space.dim, dtype=space.dtype, device=space.device)
        unit[:, where].fill_diagonal_(1)
        result[where] = operator.apply(unit)[:, where].diagonal()
    return result


def trace(operator: Operator, probes: int | None = None, seed: int = 0) -> Estimate:
    r"""Return the trace of a square operator, exact or by Hutchinson's estimator.

    With `probes` random sign vectors $z$, $\mathrm{tr} A \approx \frac1k \sum z^\top A z$ (Hutchinson, 1990), and the
    standard error of that mean.

    Args:
        operator: A square operator.
        probes: Number of random vectors, at least 2; None sums the exact diagonal.
        seed: Seeds a private generator; the global one is not drawn from.

    Raises:
        InputError: The operator is not square or `probes` is less than 2.
    """
    _square(operator)
    if probes is None:
        return Estimate(float(diagonal(operator).double().sum()), 0.0)
    if probes < 2:
        raise InputError(explain("probes", probes, "at least 2 are needed for an error bar"))
    space = operator.domain
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, space.dim), generator=generator).to(space.device, space.dtype) * 2 - 1
    values = (signs * operator.apply(signs)).sum(1, dtype=torch.float64)
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(probes)))


def _square(operator: Operator) -> None:
    if operator.shape[0] != operator.shape[1]:
        raise InputError(explain("operator", f"of shape {operator.shape}", "it must be square"))
