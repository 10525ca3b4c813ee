"""What all estimators share: products held to be finite, private random vectors, and means with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._operators import Operator
from .._progress import track
from .._runtime.chunks import rows_of
from .._runtime.contexts import private_generator
from .._space import Space
from ..errors import InputError
from ._estimate import Estimate


def mean_of(values: Tensor) -> Estimate:
    """Return the mean of independent values `(k,)` and its standard error."""
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(values.shape[0])))


def left_out_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the mean of leave-one-out estimates `(k, …)` and a standard error that is not too small.

    Each is unbiased given the other probes, but they share those: an error that comes from a pair of probes turns up
    in two of the estimates, so the variance of the mean is up to twice what independent ones would have. Hence the
    factor $\sqrt 2$ over the spread of the values, which the source takes as it is.
    """
    return values.mean(0), values.std(0) * math.sqrt(2 / values.shape[0])


def product(operator: Operator, rows: Tensor) -> Tensor:
    """Return the operator times rows, `(k, m)` from `(k, n)`, some rows at a time.

    Raises:
        NonFiniteError: The result holds NaN or Inf.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(0, operator.shape[0])
    many = chunk_of(operator)
    starts = track(range(0, rows.shape[0], many), "products")
    parts = [operator.apply(rows[start : start + many]) for start in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def units(space: Space, many: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield all unit vectors of a space, `many` rows at a time, and where their ones are."""
    for start in track(range(0, space.dim, many), "products"):
        where = slice(start, min(start + many, space.dim))
        yield where, space.units(where)


def chunk_of(operator: Operator) -> int:
    """Return how many rows go through an operator at once."""
    return rows_of(sum(operator.shape))


def signs(probes: int, space: Space, seed: int) -> Tensor:
    """Return random vectors of signs, `(probes, n)`."""
    generator = private_generator(space.device, seed)
    drawn = torch.randint(0, 2, (probes, space.dim), generator=generator, device=generator.device)
    return drawn.to(space.device, space.dtype) * 2 - 1


def check_probes(probes: int, least: int = 2) -> int:
    """Return `probes` if an error bar can be made of so many.

    Raises:
        InputError: They are too few.
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < least:
        raise InputError.of("probes", repr(probes), f"at least {least} are needed for an error bar")
    return probes


def check_square(operator: Operator) -> Operator:
    """Return the operator if it is square.

    Raises:
        InputError: It is not.
    """
    if operator.shape[0] != operator.shape[1]:
        raise InputError.of("operator", f"of shape {operator.shape}", "it must be square")
    return operator


def check_symmetric(operator: Operator) -> Operator:
    """Return the operator if it is known to be symmetric and is not empty.

    Raises:
        InputError: It is not.
    """
    check_square(operator)
    if not operator.symmetric:
        todo = "Take `A.T @ A` for singular values, or pass `Matrix(a, symmetric=True)` if the matrix is symmetric."
        raise InputError.of("operator", repr(operator).splitlines()[0], "it must be known to be symmetric", todo)
    if operator.shape[0] == 0:
        raise InputError.of("operator", "of shape (0, 0)", "a spectrum needs at least one dimension")
    return operator
