"""What a plan keeps of detection and colouring, and how it is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .._ladder.failures import succeeds
from .._torch.protocol import Linearization
from ._coloring import Coloring, color
from ._matrix import Csr, csr
from ._pool import Array


@dataclass(frozen=True, eq=False)
class Scheme:
    """What is kept of detection and colouring.

    Attributes:
        matrix: Pattern over the leaves that are swept: parameters, then lifted selections.
        coloring: Its colouring.
        structure: Source and size of each lifted selection.
        columns: For each column, which stored entry of all parameters it is or copies.
    """

    matrix: Csr
    coloring: Coloring
    structure: list[tuple[int, int]]
    columns: Array


def colored(matrix: Csr, lin: Linearization, limit: float = np.inf) -> Coloring:
    """Return a colouring, by rows alone where the linearization has no pushes but row by row."""
    found = color(matrix, limit=limit)
    return color(matrix, columns=False, limit=limit) if found.pushes and not _can_push(lin) else found


def _can_push(lin: Linearization) -> bool:
    zeros = lin.domain.split(torch.zeros_like(lin.domain.units(slice(0, 1))))
    return succeeds(lambda: lin.push_by_double_backward(zeros))


def unlifted(scheme: Scheme, lin: Linearization, width: int) -> Scheme:
    """Return a scheme without lifting where that takes no more sweeps."""
    merged = placed(scheme.matrix, scheme.columns, width)
    limit = scheme.coloring.cost + 0.5
    coloring = colored(merged, lin, limit)
    return Scheme(merged, coloring, [], np.arange(width)) if coloring.cost < limit else scheme


def placed(matrix: Csr, columns: Array, width: int) -> Csr:
    """Return a pattern with each column moved to another one, of `width`; several may fall onto one."""
    moved = csr((matrix.data, columns[matrix.indices], matrix.indptr), shape=(matrix.shape[0], width), copy=True)
    moved.sum_duplicates()
    return moved.astype(bool)
