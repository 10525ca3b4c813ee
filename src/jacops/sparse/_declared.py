"""Verification of a pattern that the caller declares.

A probe that fails gives a column. Bisection over the rows finds the row with the largest error in about 2 log2(m)
backward passes, and one pass for that row decides: either it has an entry that the pattern lacks, or its rounding
errors are larger than the row, and rows of this size are then compared at the level of these errors.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import InputError
from ._compress import Compressed, Sweeper
from ._matrix import Csr
from ._pool import Array
from ._probe import Prober, draw, judged, merged, row_sizes

_ROWS = 8  # rows examined; one that is rounding raises the level for all smaller rows
_ROOM = 4.0  # margin on measured rounding errors: one sample of them may be the smaller one


def check_declared(sweeper: Sweeper, found: Compressed, prober: Prober, column_of: Array, todo: str = "") -> None:
    """Refuse a declared pattern that lacks entries.

    Args:
        sweeper: The products.
        found: The matrix in the declared pattern, with its verdict.
        prober: What the probes were judged by.
        column_of: Which column of the matrix each column of the sweeper copies.
        todo: What the caller can do.

    Raises:
        InputError: It lacks some; the message names one.
    """
    if found.verdict is None or found.verdict.excess <= prober.tolerance:
        return
    needed = "it must hold all that are not zero"
    if found.verdict.error > prober.whole:
        came = f"lacking entries (a random probe is off by {found.verdict.error:.1e})"
        raise InputError.of("pattern", came, needed, todo)
    place = _lacking(sweeper, found.matrix, prober, column_of)
    if place is not None:
        raise InputError.of("pattern", f"lacking entries, one at row {place[0]}, column {place[1]}", needed, todo)


def _lacking(sweeper: Sweeper, matrix: Csr, prober: Prober, column_of: Array) -> tuple[int, int] | None:
    """Return row and column of an entry that a pattern lacks, None where all errors are rounding."""
    prober.outdated(matrix, None, None)
    top = row_sizes(matrix).max(initial=0.0)
    divisors = np.ones(sweeper.shape[0]) if prober.divisors is None else prober.divisors
    for _ in range(_ROWS):
        probe = draw(sweeper.rows, sweeper.shape[0], 1, divisors, apart=True)
        verdict = judged(matrix, [probe], _pulled(sweeper, probe), column_of, prober.tolerance)
        if verdict.excess <= prober.tolerance:
            return None
        row = _worst_row(sweeper, matrix, probe, column_of, verdict.column)
        alone = torch.zeros_like(probe)
        alone[row] = 1
        given = merged(_pulled(sweeper, alone)[0], column_of, matrix.shape[1])
        off = np.abs(given - matrix[[row]].toarray()[0])
        where = int(off.argmax())
        own = np.abs(given).max()
        if not off[where] <= prober.tolerance * own and own >= prober.floor * top:
            return row, where
        raised = divisors[row] * _ROOM * verdict.excess / prober.tolerance
        divisors = np.maximum(divisors, min(raised, 1.0))
    return None


def _worst_row(sweeper: Sweeper, matrix: Csr, probe: torch.Tensor, column_of: Array, column: int) -> int:
    """Return the row with the largest error in one column, by bisection."""
    rows = np.arange(sweeper.shape[0])
    while len(rows) > 1:
        halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        errors = [_error(sweeper, matrix, probe, column_of, column, half) for half in halves]
        rows = halves[int(errors[1] > errors[0])]
    return int(rows[0])


def _error(sweeper: Sweeper, matrix: Csr, probe: torch.Tensor, column_of: Array, column: int, rows: Array) -> float:
    part = torch.zeros_like(probe)
    held = torch.from_numpy(rows).to(probe.device)
    part[held] = probe[held]
    given = merged(_pulled(sweeper, part)[0], column_of, matrix.shape[1])[column]
    return abs(float(given - (matrix[:, [column]].T @ part.double().cpu().numpy())[0]))


def _pulled(sweeper: Sweeper, probe: torch.Tensor) -> torch.Tensor:
    return sweeper.swept(probe[None], push=False)
