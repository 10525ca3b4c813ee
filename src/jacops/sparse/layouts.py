"""The layouts a sparse Jacobian comes in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .._interop import ArrayLike
from .._runtime.restoring import WarningsIgnored, restoring
from .._saving import Savable
from .._torch.protocol import Linearization
from ._compress import Assembly, Compressed
from ._matrix import sp
from ._point import lie_widths

Layout = Literal["scipy", "coo", "csr", "bsr"]
LAYOUTS = ("scipy", "coo", "csr", "bsr")


@dataclass(frozen=True, eq=False)
class SparseJacobian(ArrayLike, Savable):
    """A sparse Jacobian, and the output at the same point.

    Attributes:
        matrix: In the layout asked for.
        output: What the model gave, detached: the residual of the same linearisation.
        error_bound: With probability 99.9 % the Frobenius norm of what is missing or wrong is at most this, by
            random probes; NaN with `certify=0`.
        sweeps: Backward and forward sweeps taken, probes included.
    """

    matrix: Any
    output: Any
    error_bound: float
    sweeps: int


@restoring
def arranged(assembly: Assembly, found: Compressed, layout: str, block: tuple[int, int]) -> Any:
    """Return the matrix in a layout; BSR has blocks of the given shape."""
    if layout == "scipy":
        return found.matrix
    ends, columns = (
        torch.from_numpy(assembly.ends.astype(np.int64)),
        torch.from_numpy(assembly.columns.astype(np.int64)),
    )
    device = found.values.device
    unchecked: Any = {"check_invariants": False}
    with WarningsIgnored("Sparse (CSR|BSR) tensor support", UserWarning):
        if layout == "csr":
            return torch.sparse_csr_tensor(
                ends.to(device), columns.to(device), found.values, assembly.shape, **unchecked
            )
        if layout == "coo":
            rows = torch.repeat_interleave(torch.arange(assembly.shape[0]), ends.diff())
            places = torch.stack([rows, columns]).to(device)
            return torch.sparse_coo_tensor(places, found.values, assembly.shape, is_coalesced=True, **unchecked)
        blocks = sp.bsr_array(found.matrix.tobsr(block))
        return torch.sparse_bsr_tensor(
            torch.from_numpy(blocks.indptr.astype(np.int64)).to(device),
            torch.from_numpy(blocks.indices.astype(np.int64)).to(device),
            torch.from_numpy(blocks.data).to(device),
            assembly.shape,
            **unchecked,
        )


def block_shape(lin: Linearization, tangent: bool) -> tuple[int, int]:
    """Return the blocks that outputs and leaves suggest: the size of their last axes."""
    rows = [o.shape[-1] for o in lin.outputs if o.ndim > 1] + [o.numel() for o in lin.outputs if o.ndim < 2]
    columns = []
    for leaf in lin.leaves:
        stored, free = lie_widths(leaf)
        last = leaf.shape[-1] if leaf.ndim > 1 else leaf.numel()
        columns.append(free if tangent and free < stored else last)
    return math.gcd(*rows) or 1, math.gcd(*columns) or 1
