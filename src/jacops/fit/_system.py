r"""A linearised problem, $(J^\top J + \mathrm{diag}(\lambda)) p = -J^\top r$, and what a step leaves of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .._saving import Savable
from ..sparse._matrix import csr
from ._normal import NormalPattern
from ._row_blocks import RowBlocks

_LEAST_SQUARE = 1e-250  # squares below may have lost digits to underflow (smallest normal number: 2e-308)
_FEW = 10_000_000  # entries that are worth copying at once, 80 MB


def positive(sizes: np.ndarray) -> np.ndarray:
    """Return sizes with zeros, which nothing can be divided by, replaced by one."""
    return np.where(sizes > 0, sizes, 1.0)


class Singular(Exception):  # noqa: N818 - not an error for the caller: the loop answers it
    """The matrix could not be factorised or the answer is useless."""


@dataclass(eq=False)
class LinearizedFit(Savable):
    """A linearised problem: Jacobian (ndarray or CSR), residual, and what follows from them.

    Attributes:
        J: Jacobian, (rows, columns).
        r: Residual, (rows,).
        blocks: Number of the block of each column, for block-Jacobi.
        memory: What a strategy keeps for this point.
        lengths: Scales that lengths of steps and damping are measured with; by default those of the columns.
        unit: Factor that makes a damping in these scales one in units of the normal matrix.
        eps: Relative rounding error of the entries of `J` and `r`.
        terms: Returns the magnitude of the terms that each residual is a sum of, (rows,).
        structure: Of the normal matrix, where it was worked out before.
        samples: The block of each row that a kernel is applied to, (rows,); where a call ended.
        curvature: Of each such block along its residual, by that which `J` has, (blocks,).
    """

    J: Any
    r: np.ndarray
    blocks: np.ndarray
    memory: dict[str, Any] = field(default_factory=dict, metadata={"saved": False})
    lengths: np.ndarray | None = None
    unit: float = 1.0
    eps: float = float(np.finfo(np.float64).eps)
    terms: Callable[[], np.ndarray] | None = field(default=None, repr=False, metadata={"saved": False})
    structure: NormalPattern | None = field(default=None, repr=False, metadata={"saved": False})
    samples: np.ndarray | None = field(default=None, repr=False)
    curvature: np.ndarray | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of the problem; what was worked out of it is worked out again where it is needed."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return kept | {"memory": {}, "terms": None, "structure": None}

    @property
    def elimination(self) -> str:
        """How the normal equations were factorised, in a phrase; empty where they were not by dense fronts."""
        found = self.structure
        return "" if found is None or "analysis" not in vars(found) else found.analysis.description

    @property
    def is_sparse(self) -> bool:
        """Return whether the Jacobian is stored sparsely."""
        return not isinstance(self.J, np.ndarray)

    @property
    def dense(self) -> np.ndarray:
        """The Jacobian as an array."""
        return self.J.toarray() if self.is_sparse else self.J

    @cached_property
    def gradient(self) -> np.ndarray:
        """The gradient of half the squared residual."""
        return self.J.T @ self.r

    @cached_property
    def norms(self) -> np.ndarray:
        """Norms of the columns, safe from overflow and underflow; zero for a column of zeros."""
        if self.is_sparse:
            J = self.J
            squares = csr((J.data**2, J.indices, J.indptr), shape=J.shape).T @ np.ones(J.shape[0])
        else:
            squares = np.einsum("ij,ij->j", self.J, self.J)
        norms = np.sqrt(squares)
        unsafe = ~((squares > _LEAST_SQUARE) & (squares < 1 / _LEAST_SQUARE))
        if unsafe.any():
            norms[unsafe] = self._safe_norms(unsafe.nonzero()[0])
        return norms

    def _safe_norms(self, columns: np.ndarray) -> np.ndarray:
        J = self.J[:, columns]
        J = J.toarray() if self.is_sparse and len(columns) * self.J.shape[0] < _FEW else J
        if not isinstance(J, np.ndarray):
            return np.array([self._safe_norms(columns[[k]])[0] for k in range(len(columns))])
        largest = np.abs(J).max(axis=0, initial=0.0)
        return largest * np.linalg.norm(J / np.where(largest > 0, largest, 1.0), axis=0)

    @property
    def has_safe_squares(self) -> bool:
        """Whether squares of the columns' norms neither underflow nor overflow."""
        norms = positive(self.norms)
        return bool(norms.min(initial=1.0) > _LEAST_SQUARE**0.5 and norms.max(initial=1.0) < _LEAST_SQUARE**-0.5)

    def with_unit_columns(self) -> LinearizedFit:
        """Return the problem in unknowns `p * norms`."""
        norms = positive(self.norms)
        J = self.normal.blocks.matrix(self._unit_entries) if self.is_sparse else self.J / norms
        return LinearizedFit(J, self.r, self.blocks, eps=self.eps, structure=self.structure)

    @cached_property
    def scale(self) -> np.ndarray:
        """What a step is multiplied by to measure its length: `lengths`, or norms of the columns; positive."""
        return positive(self.norms if self.lengths is None else self.lengths)

    def equilibration(self, damping: np.ndarray | None) -> np.ndarray:
        """Return what columns are divided by so that those of the damped Jacobian have unit length."""
        return positive(self.norms if damping is None else np.hypot(self.norms, np.sqrt(damping)))

    @cached_property
    def normal(self) -> NormalPattern:
        """The structure of the normal matrix of a sparse Jacobian."""
        if self.structure is None:
            self.J.sum_duplicates()
            self.structure = NormalPattern.of(RowBlocks.of_matrix(self.J))
        return self.structure

    @property
    def _unit_entries(self) -> np.ndarray:
        self.normal  # noqa: B018 - sorts the entries of a Jacobian that came without structure
        return self.J.data / positive(self.norms)[self.J.indices]

    @cached_property
    def _cosines(self) -> np.ndarray:
        """The normal matrix of unit columns of a dense Jacobian."""
        J = torch.from_numpy(self.J / positive(self.norms))
        return (J.T @ J).numpy()

    @cached_property
    def _entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Entries of the normal matrix of a sparse Jacobian, as `normal` places them, and what columns were divided by.

        That is one, or where squares are not safe the norms.
        """
        if self.has_safe_squares:
            return self.normal.product(self.J.data), np.ones(self.J.shape[1])
        return self.normal.product(self._unit_entries), positive(self.norms)

    def unit_normal(self, damping: np.ndarray | None) -> Any:
        """Return the normal matrix plus a diagonal, rows and columns divided by `equilibration(damping)`."""
        if self.is_sparse:
            return self.normal.full(self.unit_entries(damping))
        if damping is None:
            return self._cosines
        unit = self.equilibration(damping)
        share = positive(self.norms) / unit
        total = self._cosines * np.outer(share, share)
        total[np.diag_indices_from(total)] += (np.sqrt(damping) / unit) ** 2
        return total

    def unit_entries(self, damping: np.ndarray | None) -> np.ndarray:
        """Return the entries of `unit_normal` of a sparse Jacobian, as `normal` places them."""
        (entries, divided), unit, normal = self._entries, self.equilibration(damping), self.normal
        share = divided / unit
        total = entries * share[normal.rows]
        total *= share[normal.cols]
        if damping is not None:
            total[normal.diagonal] += (np.sqrt(damping) / unit) ** 2
        return total

    def residual(self, p: np.ndarray, damping: np.ndarray | None) -> np.ndarray:
        """Return what a step leaves of the equations, by products with the Jacobian itself."""
        left = self.J.T @ (self.J @ p + self.r)
        return left if damping is None else left + damping * p

    def solved(self, p: np.ndarray, damping: np.ndarray | None, solver: str, steps: int = 0, note: str = "") -> Solved:
        """Return a step with its true residual.

        Raises:
            Singular: The step is not finite.
        """
        if not np.isfinite(p).all():
            raise Singular("the step is not finite")
        size = float(np.linalg.norm(self.gradient))
        left = float(np.linalg.norm(self.residual(p, damping)))
        return Solved(p, left / size if size else left, steps, solver, note)


@dataclass(frozen=True)
class Solved:
    """A step and how it was found.

    Attributes:
        step: The step.
        residual: The true relative residual of the normal equations, recomputed.
        steps: Inner iterations; 0 for direct solvers.
        solver: Which solver.
        note: Anything worth knowing.
        factor: How many undamped steps it is, where it is the sum of a geometric sequence of such, else 1.
    """

    step: np.ndarray
    residual: float
    steps: int
    solver: str
    note: str = ""
    factor: float = 1.0
