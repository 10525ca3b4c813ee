r"""A linearised problem, $(J^\top J + \mathrm{diag}(\lambda)) p = -J^\top r$, and what a step leaves of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch


class Singular(Exception):  # noqa: N818 - not an error for the caller: the loop answers it
    """The matrix could not be factorised or the answer is useless."""


@dataclass(eq=False)
class System:
    """A linearised problem: Jacobian (ndarray or CSR), residual, and what follows from them.

    Attributes:
        J: Jacobian, (rows, columns).
        r: Residual, (rows,).
        blocks: Number of the block of each column, for block-Jacobi.
        memory: What a strategy keeps for this point.
    """

    J: Any
    r: np.ndarray
    blocks: np.ndarray
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def is_sparse(self) -> bool:
        """Say whether the Jacobian is stored sparsely."""
        return not isinstance(self.J, np.ndarray)

    @cached_property
    def gradient(self) -> np.ndarray:
        """The gradient of half the squared residual."""
        return self.J.T @ self.r

    @cached_property
    def scale(self) -> np.ndarray:
        """Lengths of the columns, those that vanish replaced by something small."""
        if self.is_sparse:
            squares = np.bincount(self.J.indices, self.J.data**2, minlength=self.J.shape[1])
        else:
            squares = np.einsum("ij,ij->j", self.J, self.J)
        largest = float(squares.max(initial=0.0))
        return np.sqrt(np.maximum(squares, largest * 1e-12 if largest > 0 else 1.0))

    @cached_property
    def normal(self) -> Any:
        """The normal matrix, as an array or as CSC."""
        if self.is_sparse:
            return (self.J.T @ self.J).tocsc()
        J = torch.from_numpy(self.J)
        return (J.T @ J).numpy()

    def push(self, p: np.ndarray) -> np.ndarray:
        """Return the Jacobian times a step."""
        return self.J @ p

    def damped(self, damping: np.ndarray | None) -> Any:
        """Return the normal matrix plus a diagonal."""
        if damping is None:
            return self.normal
        if self.is_sparse:
            from scipy.sparse import diags_array

            return (self.normal + diags_array(damping)).tocsc()
        total = self.normal.copy()
        total[np.diag_indices_from(total)] += damping
        return total

    def residual(self, p: np.ndarray, damping: np.ndarray | None) -> np.ndarray:
        """Return what a step leaves of the equations, by products with the Jacobian itself."""
        left = self.J.T @ (self.push(p) + self.r)
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
    """

    step: np.ndarray
    residual: float
    steps: int
    solver: str
    note: str = ""

    @property
    def fields(self) -> tuple[np.ndarray, float, int, str, str]:
        """All five, in order."""
        return self.step, self.residual, self.steps, self.solver, self.note
