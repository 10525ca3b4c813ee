r"""The randomised Nyström sketch of a positive operator (Frangella, Tropp and Udell, 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ._system import System

_FIRST_RANK = 8  # it doubles from here and keeps all products, so a small start loses nothing


@final
@dataclass(frozen=True, eq=False)
class Sketch:
    r"""$A \approx U \mathrm{diag}(s) U^\top$ with orthonormal columns in U.

    Attributes:
        basis: U, transposed, `(r, n)`.
        values: s, descending, `(r,)`.
        lowest: The lowest curvature of $A$ on the sketched subspace, where that shows it not to be positive.
    """

    basis: Tensor
    values: Tensor
    lowest: float | None = None

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.values.shape[0]

    def scaled(self, rows: Tensor, factors: Tensor) -> Tensor:
        r"""Return $U\,\mathrm{diag}(f)\,U^\top$ times each row."""
        return ((rows @ self.basis.T) * factors) @ self.basis


def sketch(
    system: System, rank: int | None, max_rank: int, seed: int, ratio: float = 10.0, give_up: bool = False
) -> Sketch:
    r"""Sketch the undamped operator.

    Without `rank` it doubles until the smallest value is at most `ratio` times the damping, so that what is left out
    hardly matters, or until `max_rank`; products are never thrown away. With `give_up` it stops where the values fall
    too slowly for that.
    """
    n = system.n
    wanted = min(n, rank if rank is not None else min(_FIRST_RANK, max_rank))
    test, image = system.zeros(0, n), system.zeros(0, n)
    while True:
        fresh = system.noise(wanted - test.shape[0], seed + test.shape[0])
        for _ in range(2):
            fresh = _orthonormal(fresh - (fresh @ test.T) @ test)
        test, image = torch.cat([test, fresh]), torch.cat([image, system.undamped(fresh)])
        found = _nystrom(test, image, system)
        if rank is not None or found.lowest is not None or wanted >= min(n, max_rank):
            return found
        if found.rank < wanted or float(found.values[-1]) <= ratio * system.damping:
            return found
        if give_up and _rank_expected(found.values, ratio * system.damping) > min(n, max_rank):
            return found
        wanted = min(2 * wanted, n, max_rank)


def _rank_expected(values: Tensor, goal: float) -> float:
    """Return at which rank the values reach a goal if they fall on as they did over the last half."""
    last, middle, rank = float(values[-1]), float(values[len(values) // 2]), len(values)
    fall = math.log(middle / last) / (rank - 1 - rank // 2) if rank > _FIRST_RANK and 0 < last < middle else math.inf
    return rank + (math.log(last / goal) / fall if last > 0 else 0.0)


def _nystrom(test: Tensor, image: Tensor, system: System) -> Sketch:
    """Return the stable, shifted Nyström approximation from an orthonormal test matrix and its image."""
    core = image @ test.T
    core = (core + core.T) / 2
    size = float(torch.linalg.matrix_norm(image.double()))
    if size == 0.0:
        return Sketch(test, image.new_zeros(test.shape[0]))
    shift = system.eps * size * system.n**0.5
    lowest = float(torch.linalg.eigvalsh(core)[0]) if bool(core.isfinite().all()) else float("nan")
    if not lowest >= -shift:
        return Sketch(test[:0], image.new_zeros(0), lowest)
    shift = max(shift, -2 * lowest, torch.finfo(core.dtype).tiny)
    core.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(core)
    if int(failed):
        return Sketch(test[:0], image.new_zeros(0), lowest)
    root = torch.linalg.solve_triangular(factor, image.add(test, alpha=shift), upper=False)
    # eigenvalues are squares of singular values: those of the Gram matrix are as exact as the sketch
    values, turn = torch.linalg.eigh(root @ root.T)
    values, turn = values.flip(0), turn.flip(1)
    # Rounding of a Gram matrix of that many rows, with a margin of four.
    sure = values > 4 * len(values) * system.eps * values[0]
    values, turn = values[sure], turn[:, sure]
    return Sketch((turn / values.sqrt()).T @ root, (values - shift).clamp_min(0))


def _orthonormal(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of random rows, which are few enough to be far from dependent, or by QR."""
    # Gaussian rows of a quarter of the width have condition 3 (Marchenko and Pastur), 9 in their Gram matrix.
    if 4 * rows.shape[0] <= rows.shape[1]:
        factor, failed = torch.linalg.cholesky_ex(rows @ rows.T)
        if not int(failed):
            return torch.linalg.solve_triangular(factor, rows, upper=False)
    return torch.linalg.qr(rows.T)[0].T
