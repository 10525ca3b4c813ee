"""Preconditioners of conjugate gradients: positive maps on rows that stand in for the inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from .._estimators import diagonal
from .._finite import is_finite, on_finite_rows
from .._operators import Matrix, Operator
from ..errors import InputError, InputTypeError, NonFiniteError
from ._base import Solver
from ._sketch import sketch
from ._structure import in_memory
from ._system import RowMap, System, check_symmetric, largest_entry, ordinary, shifted

_EXACT_DIAGONAL = 512  # unknowns: exact entries take up to eight times the products of an estimate by `_PROBES`
_PROBES = 64  # an entry's error is an eighth (64 ** -0.5) of the size of its row beside the diagonal


NOT_LINEAR = ("a linear map is needed, and truncation to a rank is none", "Leave `query_rank` out.")


@final
@dataclass(frozen=True, eq=False)
class Preconditioner:
    """A map on rows, and what to say of it.

    Attributes:
        apply: Rows to rows.
        info: Figures for the solution.
    """

    apply: RowMap
    info: dict[str, Any] = field(default_factory=dict)


def preconditioner_of(system: System, kind: Any, rank: int | None, max_rank: int, seed: int) -> Preconditioner:
    """Return the preconditioner meant by a name, an operator or a solver.

    Raises:
        InputError: The name is unknown, or the operator has another shape or is not symmetric.
        InputTypeError: It is something else.
    """
    if kind is None:
        return Preconditioner(lambda rows: rows)
    if kind == "jacobi":
        return _jacobi(system, seed)
    if kind == "nystrom":
        return nystrom(system, rank, max_rank, seed)
    if isinstance(kind, Solver):
        if not kind.is_linear:
            raise InputError.of("preconditioner", repr(kind), *NOT_LINEAR)
        prepared = kind.prepare(system.given, system.given_damping)
        return Preconditioner(_in_unit(lambda rows: prepared._solve(rows).x), {"preconditioner": prepared.method})
    needed = "None, 'jacobi', 'nystrom', an Operator or a Solver is needed"
    if isinstance(kind, str):
        raise InputError.of("preconditioner", repr(kind), needed)
    if not isinstance(kind, Operator):
        raise InputTypeError.of("preconditioner", f"a {type(kind).__name__}", needed)
    space, own = kind.domain, system.given.domain
    if kind.shape != system.given.shape or (space.dtype, space.device) != (own.dtype, own.device):
        came = f"of shape {kind.shape}, {space.dtype} on {space.device}"
        needed = f"shape {system.given.shape}, {own.dtype} on {own.device} is needed, like the operator's"
        raise InputError.of("preconditioner", came, needed)
    check_symmetric(System(kind, 0.0), "a preconditioner")
    return Preconditioner(_in_unit(kind._apply), {"preconditioner": repr(kind)})


def _in_unit(apply: RowMap) -> RowMap:
    """Return a map of finite rows divided by the power of two near its first images, which no solution depends on."""
    exponent: int | None = None

    def scaled(rows: Tensor) -> Tensor:
        nonlocal exponent
        image = on_finite_rows(apply, rows)
        size = largest_entry(image) / (largest_entry(rows) or 1.0) if exponent is None else math.nan
        if 0 < size < math.inf:
            exponent = 0 if ordinary(size) else math.frexp(size)[1]
        return shifted(image, -(exponent or 0))

    return scaled


def nystrom(system: System, rank: int | None, max_rank: int, seed: int = 0, give_up: bool = False) -> Preconditioner:
    """Return the preconditioner of a sketch, with `info["remainder"]` for its smallest value."""
    found = sketch(system, rank, max_rank, seed, give_up=give_up)
    if found.lowest is not None or not found.rank or not float(found.values[0] + system.damping) > 0:
        info = {"preconditioner": "none: the operator is zero or not positive", "sketch_curvature": found.lowest}
        return Preconditioner(lambda rows: rows, info)
    floor = found.values[-1] + system.damping
    floor = floor if float(floor) > 0 else found.values[0] * system.eps + torch.finfo(system.dtype).tiny
    factors = floor / (found.values + system.damping).clamp_min(float(floor)) - 1
    dimension = float((found.values / (found.values + max(system.damping, 1e-300))).sum())
    info = {"preconditioner": "nystrom", "rank": found.rank, "effective_dimension": dimension}
    info["remainder"] = float(found.values[-1]) if found.rank < system.n else 0.0
    return Preconditioner(lambda rows: rows + found.scaled(rows, factors), info)


def _exact(system: System) -> Tensor:
    system.products += system.n
    try:
        return shifted(diagonal(system.given), -system.exponent)
    except NonFiniteError:
        return system.zeros(system.n) + math.nan


def _jacobi(system: System, seed: int) -> Preconditioner:
    operator, n = system.given, system.n
    if isinstance(operator, Matrix):
        entries = shifted(operator.matrix.diagonal().clone(), -system.exponent)
    elif n <= _EXACT_DIAGONAL or in_memory(operator):
        entries = _exact(system)
    else:  # the estimator of Bekas, Kokiopoulou and Saad (2007)
        signs = system.noise(_PROBES, seed).sign()
        entries = (signs * system.undamped(signs)).mean(0)
    if not is_finite(entries):  # the products of the iteration are not finite either
        return Preconditioner(lambda rows: rows)
    entries = entries + system.damping
    typical = float(entries.abs().mean()) or 1.0
    # An estimate that is not positive is small; one tiny entry must not dominate the preconditioned norm.
    safe = torch.where(entries > 0, entries, 1e-3 * typical).clamp_min(1e-6 * typical)
    return Preconditioner(lambda rows: rows / safe, {"preconditioner": "jacobi"})
