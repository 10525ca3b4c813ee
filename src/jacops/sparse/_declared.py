"""Verification of a pattern that the caller declares.

A probe that fails gives a column. One product with it finds the row with the largest error, and one backward pass for
that row decides: either it has an entry that the pattern lacks, or its rounding errors are larger than the row, and
rows of this size are then compared at the level of these errors.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import InputError
from ._compress import Compressed, Compression
from ._matrix import Csr
from ._probe import draw, merged, row_sizes

_ROWS = 8  # rows examined; one that is rounding raises the level for all smaller rows
_ROOM = 4.0  # margin on measured rounding errors: one sample of them may be the smaller one
_SEED = 1  # apart from the probe whose verdict is examined, so that both have to fail


def check_declared(compression: Compression, found: Compressed, todo: str = "") -> None:
    """Refuse a declared pattern that lacks entries.

    Args:
        compression: What was evaluated.
        found: The matrix in the declared pattern, with its verdict.
        todo: What the caller can do.

    Raises:
        InputError: It lacks some; the message names one.
    """
    prober = compression.prober
    if found.verdict is None or found.verdict.excess <= prober.tolerance:
        return
    needed = "it must hold all that are not zero"
    if found.verdict.error > prober.whole:
        came = f"lacking entries (a random probe is off by {found.verdict.error:.1e})"
        raise InputError.of("pattern", came, needed, todo)
    place = _lacking(compression, found.matrix)
    if place is not None:
        raise InputError.of("pattern", f"lacking entries, one at row {place[0]}, column {place[1]}", needed, todo)


def _lacking(compression: Compression, matrix: Csr) -> tuple[int, int] | None:
    """Return row and column of an entry that a pattern lacks, None where all errors are rounding."""
    prober, space = compression.prober, compression.operator.codomain
    prober.outdated(matrix, None, None)
    top = row_sizes(matrix).max(initial=0.0)
    divisors = np.ones(space.dim) if prober.divisors is None else prober.divisors
    for _ in range(_ROWS):
        verdict = compression.probed(matrix, divisors, _SEED)
        if verdict.excess <= prober.tolerance:
            return None
        probe = draw(space, _SEED, divisors, apart=True).double().cpu().numpy()
        row = int(np.abs(probe * _error(compression, matrix, verdict.column)).argmax())
        alone = compression.pulled(space.units(slice(row, row + 1)))[0]
        given = merged(alone, compression.assembly.column_of, matrix.shape[1])
        off = np.abs(given - matrix[[row]].toarray()[0])
        where = int(off.argmax())
        own = np.abs(given).max()
        if not off[where] <= prober.tolerance * own and own >= prober.floor * top:
            return row, where
        raised = divisors[row] * _ROOM * verdict.excess / prober.tolerance
        divisors = np.maximum(divisors, min(raised, 1.0))
    return None


def _error(compression: Compression, matrix: Csr, column: int) -> np.ndarray:
    """Return how far each row is off in one column."""
    operator, copies = compression.operator, compression.assembly.column_of == column
    tangent = torch.from_numpy(copies).to(operator.domain.device, operator.domain.dtype)
    return operator._apply(tangent[None])[0].double().cpu().numpy() - matrix[:, [column]].toarray()[:, 0]
