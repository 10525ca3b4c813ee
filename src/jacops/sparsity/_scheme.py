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
    found = color(matrix)
    if found is not None and found.pushes and not _can_push(lin):
        found = color(matrix, columns=False)
    return found or Coloring(np.full(matrix.shape[0], -1), np.full(matrix.shape[1], -1))


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
    coloring = color(merged, limit=limit)
    if coloring is not None and coloring.pushes and not _can_push(lin):
        coloring = color(merged, columns=False, limit=limit)
    return None if coloring is None else Scheme(merged, coloring, [], np.arange(width))


def _merged(matrix: Csr, columns: Array, width: int) -> Csr:
    entries = matrix.tocoo()
    merged = sp.coo_array((entries.data, (entries.row, columns[entries.col])), shape=(matrix.shape[0], width))
    return csr(merged).astype(bool)
