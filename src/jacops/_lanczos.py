"""Block Lanczos with full reorthogonalisation, several runs at once: the one kernel behind Ritz values and quadrature.

Pure tensor code. Rows are vectors: a map takes `(k, n)` to `(k, n)` and must be symmetric. Sources: Golub and Van Loan
(2013), chapter 10; restarts as in Wu and Simon (2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._finite import is_finite, where_first
from .errors import NonFiniteError

RowMap = Callable[[Tensor], Tensor]
_DRAWS = 5  # tries: a random direction is outside a space almost surely; only the start's own seed repeats it


class Ritz(NamedTuple):
    """What Krylov spaces say of a spectrum, run by run, in float64 and ascending order.

    Attributes:
        values: Ritz values, (runs, m).
        coefficients: Ritz vectors as combinations of the basis, (runs, m, m), one to a row.
        residuals: `|A y - θ y|` of each pair by the recurrence, (runs, m).
    """

    values: Tensor
    coefficients: Tensor
    residuals: Tensor


class KrylovSpace:
    """Krylov spaces of a symmetric map, growing by one block at a time.

    All runs share each product with the map. A run whose space is invariant goes on from fresh random directions with
    a coupling of zero: so multiple eigenvalues are met too, and quadrature gives those directions no weight.

    Args:
        apply: The map, rows to rows, in the dtype of `start`.
        start: Starting blocks, (runs, block, n), at least float32; they need not be orthonormal.
        capacity: How many basis vectors a run may hold; at most n are ever needed.
        seed: Of the private generator of fresh directions.

    Attributes:
        projected: The map in the basis, (runs, m, m), float64.
        products: Rows mapped so far.
        scale: The largest size of a mapped unit vector seen, a lower bound of the norm of the map.
    """

    def __init__(self, apply: RowMap, start: Tensor, capacity: int, seed: int = 0) -> None:
        runs, _, n = start.shape
        self.apply, self.capacity = apply, min(capacity, n)
        # On the processor: fresh directions are drawn only where a space is used up.
        self.generator = torch.Generator().manual_seed(seed)
        self._buffer = start.new_empty(runs, self.capacity, n)
        self.projected = torch.zeros(runs, 0, 0, dtype=torch.float64, device=start.device)
        self.products, self.scale = 0, 0.0
        self._block, _ = self._orthonormal(start, torch.finfo(start.dtype).tiny)
        self._coupling = self.projected.new_zeros(runs, 0, self._block.shape[1])

    @property
    def basis(self) -> Tensor:
        """Orthonormal rows, (runs, m, n)."""
        return self._buffer[:, : self.projected.shape[1]]

    @property
    def room(self) -> bool:
        """Whether another block can be added."""
        return 0 < self._block.shape[1] <= self.capacity - self.projected.shape[1]

    def step(self) -> None:
        """Add one block: one product with `runs * block` rows.

        Raises:
            NonFiniteError: The map gave NaN or Inf.
        """
        (runs, width, n), old = self._block.shape, self.projected.shape[1]
        self._buffer[:, old : old + width] = self._block
        image = self.apply(self._block.reshape(runs * width, n)).reshape(runs, width, n)
        self.products += runs * width
        if not is_finite(image):
            raise NonFiniteError(f"a product with the operator is not finite: {where_first(image)}")
        self.scale = max(self.scale, float(torch.linalg.vector_norm(image, dim=2).max()))
        basis = self._buffer[:, : old + width]
        row = image @ basis.mT
        image = image - row @ basis
        self.projected = _bordered(self.projected, row.double())
        # Some rounding errors of a product of that size: a smaller remainder is not a direction.
        floor = 10 * torch.finfo(image.dtype).eps * self.scale
        self._block, coupling = self._orthonormal(image, floor)
        self._coupling = torch.cat([self.projected.new_zeros(runs, old, coupling.shape[2]), coupling], 1)

    def fill(self) -> KrylovSpace:
        """Add blocks while there is room, and return the space."""
        while self.room:
            self.step()
        return self

    def _orthonormal(self, rows: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Return an orthonormal block outside the space and `rows` in terms of it; fresh directions for tiny rows."""
        runs, _, n = rows.shape
        width = min(rows.shape[1], n - self.projected.shape[1])
        left, sizes, right = _singular(self._outside(rows))
        small = sizes[:, :width] <= floor
        coupling = torch.where(small.unsqueeze(1), 0, left[:, :, :width] * sizes[:, None, :width])
        block = right[:, :width]
        if bool(small.any()):
            block = torch.where(small.unsqueeze(2), self._fresh(runs, width, n), block)
        # Rounding changed the small directions: orthogonalise against the space again, and among themselves.
        return _orthonormal_rows(self._outside(self._outside(block))), coupling.double()

    def _fresh(self, runs: int, width: int, n: int) -> Tensor:
        """Return random directions; those that the space holds already, as a start from the same seed, are redrawn."""
        drawn = torch.zeros(runs, width, n, dtype=self._buffer.dtype, device=self._buffer.device)
        lost = torch.ones(runs, width, dtype=torch.bool, device=drawn.device)
        for _ in range(_DRAWS):
            noise = torch.randn(runs, width, n, generator=self.generator, dtype=torch.float64).to(drawn)
            drawn = torch.where(lost.unsqueeze(2), noise, drawn)
            left, size = torch.linalg.vector_norm(self._outside(drawn), dim=2), torch.linalg.vector_norm(drawn, dim=2)
            lost = left <= math.sqrt(torch.finfo(drawn.dtype).eps) * size
            if not bool(lost.any()):
                break
        return drawn

    def _outside(self, rows: Tensor) -> Tensor:
        return rows - (rows @ self.basis.mT) @ self.basis

    def ritz(self) -> Ritz:
        """Return Ritz values, vectors and the residuals of the recurrence."""
        values, vectors = torch.linalg.eigh(self.projected)
        return Ritz(values, vectors.mT, torch.linalg.vector_norm(vectors.mT @ self._coupling, dim=2))

    def vectors(self, coefficients: Tensor) -> Tensor:
        """Return combinations of the basis, (runs, k, n) from (runs, k, m)."""
        return coefficients.to(self._buffer.dtype) @ self.basis

    def restart(self, kept: Tensor) -> None:
        """Keep only some Ritz vectors and the block to go on with, so that memory stays bounded.

        Args:
            kept: Their positions in `ritz()`, the same for every run.
        """
        values, coefficients, _ = self.ritz()
        vectors = self.vectors(coefficients[:, kept])
        self._coupling = coefficients[:, kept] @ self._coupling
        self.projected = torch.diag_embed(values[:, kept])
        self._buffer[:, : vectors.shape[1]] = vectors


def _bordered(projected: Tensor, row: Tensor) -> Tensor:
    """Return a symmetric matrix with one more block of rows, and with the same as columns."""
    old = projected.shape[1]
    side, corner = row[:, :, :old], row[:, :, old:]
    above = torch.cat([projected, side.mT], 2)
    return torch.cat([above, torch.cat([side, (corner + corner.mT) / 2], 2)], 1)


def _singular(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of short wide matrices; of one row without much ado."""
    if rows.shape[1] > 1:
        return torch.linalg.svd(rows, full_matrices=False)
    sizes = torch.linalg.vector_norm(rows, dim=2)
    return torch.ones_like(rows[:, :, :1]), sizes, rows / sizes.unsqueeze(2).clamp(min=torch.finfo(rows.dtype).tiny)


def _orthonormal_rows(rows: Tensor) -> Tensor:
    """Return rows made orthonormal, each turned as little as the ones before it allow."""
    if rows.shape[1] == 1:
        return rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    q, r = torch.linalg.qr(rows.mT)
    return (q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)).mT
