"""The layouts a sparse Jacobian comes in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._display import Described, Description
from .._interop import ArrayLike
from .._runtime.restoring import WarningsIgnored, restoring
from .._saving import Savable
from .._space import Space
from ._compress import Assembly, Compressed
from ._matrix import sp


@dataclass(frozen=True, eq=False, repr=False)
class SparseJacobian(ArrayLike, Savable, Described):
    """A sparse Jacobian, and the output at the same point.

    Attributes:
        matrix: In the requested layout.
        output: The model's output at the same point, detached.
        error_bound: With probability 99.9 % the Frobenius norm of what is missing or wrong is at most this, by
            random probes; NaN with `certify=0`.
        sweeps: Backward and forward sweeps taken, probes included.
    """

    matrix: Any
    output: Any
    error_bound: float
    sweeps: int

    def _describe(self) -> Description:
        matrix, (m, n) = self.matrix, self.matrix.shape
        is_torch = isinstance(matrix, torch.Tensor)
        count = matrix.values().numel() if is_torch else matrix.nnz
        layout = str(matrix.layout).removeprefix("torch.") if is_torch else f"scipy {matrix.format}"
        dtype = str(matrix.dtype).removeprefix("torch.")
        bound = "not probed" if math.isnan(self.error_bound) else f"{self.error_bound:.1e} in the Frobenius norm"
        facts = [("error bound", bound), ("sweeps", f"{self.sweeps}, probes included")]
        return Description(f"SparseJacobian({m:,} × {n:,}, {dtype}, {layout}): {count:,} entries", facts)


@restoring
def arranged(assembly: Assembly, found: Compressed, layout: str, block: tuple[int, int]) -> Any:
    """Return the matrix in a layout; BSR has blocks of the given shape."""
    if layout == "scipy":
        return found.matrix
    device = found.values.device

    def whole(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(device)

    ends, columns, shape = whole(assembly.ends), whole(assembly.columns), assembly.shape
    unchecked: Any = {"check_invariants": False}
    with WarningsIgnored("Sparse (CSR|BSR) tensor support", UserWarning):
        if layout == "csr":
            return torch.sparse_csr_tensor(ends, columns, found.values, shape, **unchecked)
        if layout == "coo":
            places = torch.stack([torch.repeat_interleave(ends.diff()), columns])
            return torch.sparse_coo_tensor(places, found.values, shape, is_coalesced=True, **unchecked)
        blocks = sp.bsr_array(found.matrix.tobsr(block))
        values = torch.from_numpy(blocks.data).to(device)
        return torch.sparse_bsr_tensor(whole(blocks.indptr), whole(blocks.indices), values, shape, **unchecked)


def block_of(space: Space) -> int:
    """Return the block that shapes suggest: the size of their last axes."""
    return math.gcd(*(shape[-1] if len(shape) > 1 else shape.numel() for shape in space.shapes)) or 1
