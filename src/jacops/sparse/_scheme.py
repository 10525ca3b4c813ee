"""What a plan keeps of detection and colouring, and how it is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .._ladder.failures import RouteFailedError
from .._torch.protocol import Linearization
from ._coloring import Coloring, color, least_cost
from ._matrix import Csr, csr, sp
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


def colored(matrix: Csr, lin: Linearization) -> Coloring:
    """Return a colouring, by rows alone where the linearization has no pushes but row by row."""
    return _cheaper(matrix, lin, np.inf) or Coloring(np.full(matrix.shape[0], -1), np.full(matrix.shape[1], -1))


def _cheaper(matrix: Csr, lin: Linearization, limit: float) -> Coloring | None:
    found = color(matrix, limit=limit)
    by_rows = found is not None and found.pushes and not _can_push(lin)
    return color(matrix, columns=False, limit=limit) if by_rows else found


def _can_push(lin: Linearization) -> bool:
    tangents = [torch.zeros(1, *leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in lin.leaves]
    try:
        lin.push_by_double_backward(tangents)
    except RouteFailedError:
        return False
    return True


def unlifted(scheme: Scheme, lin: Linearization, width: int) -> Scheme | None:
    """Return a scheme without lifting where that takes no more sweeps."""
    limit = scheme.coloring.cost + 0.5
    copies = 1 + len(scheme.structure)  # so many entries at most fall onto one
    per_row = np.diff(scheme.matrix.indptr)
    per_column = np.bincount(scheme.columns[scheme.matrix.indices], minlength=width)
    if least_cost(-(-per_row // copies), -(-per_column // copies)) >= limit:
        return None
    merged = _merged(scheme.matrix, scheme.columns, width)
    coloring = _cheaper(merged, lin, limit)
    return None if coloring is None else Scheme(merged, coloring, [], np.arange(width))


def _merged(matrix: Csr, columns: Array, width: int) -> Csr:
    entries = matrix.tocoo()
    merged = sp.coo_array((entries.data, (entries.row, columns[entries.col])), shape=(matrix.shape[0], width))
    return csr(merged).astype(bool)
