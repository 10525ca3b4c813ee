"""EigenBlocks: a positive operator on parameters, known block by block in an eigenbasis of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from .._saving import Savable
from .._space import Space
from ._base import OnSpace

_CHUNK_ENTRIES = 2**22  # rows are taken so many entries at a time: 32 MiB in float64
Form = Literal["kronecker", "exact", "diagonal"]
FORMS: tuple[Form, ...] = ("kronecker", "exact", "diagonal")


@final
@dataclass(frozen=True, eq=False)
class KroneckerBlock(Savable):
    r"""A weight `(g * p, q)` in g groups, each with the eigenvectors $U \otimes V$; a bias is its last column.

    Attributes:
        where: Entries of the weight, and of its bias, in a flat vector.
        left: Eigenvectors U as columns, `(g, p, p)`; None stands for the identity.
        right: Eigenvectors V as columns, `(g, q, q)`; None stands for the identity.
        values: Eigenvalues, `(g, p, q)`.
        turned: The weight is stored as `(q, p)`.
    """

    where: tuple[slice, ...]
    left: Tensor | None
    right: Tensor | None
    values: Tensor
    turned: bool = False
    form: Form = "kronecker"

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return `(k, g, p, q)`, rows of a flat vector in the eigenbasis."""
        (weight, *bias), (g, p, q) = (rows[:, where] for where in self.where), self.values.shape
        inner = q - len(bias)
        matrix = weight.reshape(-1, g, inner, p).mT if self.turned else weight.reshape(-1, g, p, inner)
        matrix = torch.cat([matrix, *(b.reshape(-1, g, p, 1) for b in bias)], -1) if bias else matrix
        return _both_sides(matrix, self.left, self.right)

    def write(self, coordinates: Tensor, rows: Tensor) -> None:
        """Write what has these coordinates into rows of a flat vector."""
        turned = (None if basis is None else basis.mT for basis in (self.left, self.right))
        matrix = _both_sides(coordinates, *turned)
        weight, *bias = self.where
        if bias:
            rows[:, bias[0]] = matrix[..., -1].flatten(1)
            matrix = matrix[..., :-1]
        rows[:, weight] = (matrix.mT if self.turned else matrix).flatten(1)


def _both_sides(matrices: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return `left' M right` for matrices `(k, g, p, q)`."""
    matrices = matrices if right is None else matrices @ right
    return matrices if left is None else left.mT @ matrices


@final
@dataclass(frozen=True, eq=False)
class DenseBlock(Savable):
    """Some parameters with all of their curvature.

    Attributes:
        where: Their entries in a flat vector.
        basis: Eigenvectors as columns, `(n, n)`.
        values: Eigenvalues, `(n,)`.
    """

    where: tuple[slice, ...]
    basis: Tensor
    values: Tensor
    form: Form = "exact"

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return `(k, n)`, rows of a flat vector in the eigenbasis."""
        return rows[:, self.where[0]] @ self.basis

    def write(self, coordinates: Tensor, rows: Tensor) -> None:
        """Write what has these coordinates into rows of a flat vector."""
        rows[:, self.where[0]] = coordinates @ self.basis.T


@final
@dataclass(frozen=True, eq=False)
class DiagonalBlock(Savable):
    """Parameters of whose curvature only the diagonal is kept.

    Attributes:
        where: Their entries in a flat vector.
        values: The diagonal, `(n,)`.
    """

    where: tuple[slice, ...]
    values: Tensor
    form: Form = "diagonal"

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return the rows' entries, `(k, n)`."""
        return rows[:, self.where[0]]

    def write(self, coordinates: Tensor, rows: Tensor) -> None:
        """Write entries into rows of a flat vector."""
        rows[:, self.where[0]] = coordinates


Block = KroneckerBlock | DenseBlock | DiagonalBlock


@final
@dataclass(frozen=True, eq=False, repr=False)
class EigenBlocks(OnSpace):
    r"""$\sum_b Q_b\, \mathrm{diag}(e_b)\, Q_b^\top$ over blocks of parameters, with orthogonal $Q_b$.

    Products, inverses and roots under any damping cost a few small matrix products per row.

    Attributes:
        space: The parameters.
        blocks: Every parameter stands in exactly one.
        drawn: The relative standard error of eigenvalues that were estimated from draws; None where none were.
    """

    space: Space
    blocks: tuple[Block, ...]
    drawn: float | None = None
    symmetric = True

    @property
    def noise(self) -> float | None:
        """As `drawn`."""
        return self.drawn

    @cached_property
    def positive(self) -> bool:
        """Whether no eigenvalue is negative."""
        return self.lowest >= 0

    def _apply(self, rows: Tensor) -> Tensor:
        result = torch.empty_like(rows)
        step = max(1, _CHUNK_ENTRIES // max(1, self.space.dim))
        for few, written in zip(rows.split(step), result.split(step), strict=True):
            for block in self.blocks:
                block.write(block.coordinates(few) * block.values, written)
        return result

    _apply_transpose = _apply

    def map(self, function: Callable[[Tensor], Tensor]) -> EigenBlocks:
        """Return the operator with a function applied to its eigenvalues."""
        return EigenBlocks(self.space, tuple(replace(b, values=function(b.values)) for b in self.blocks))

    def inverse(self, damping: float = 0.0) -> EigenBlocks:
        r"""Return $(A + \lambda I)^{-1}$."""
        return self.map(lambda values: 1.0 / (values + damping))

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return rows `(k, n)` in the eigenbasis, `(k, n)`, in the order of `eigenvalues`."""
        return torch.cat([block.coordinates(rows).flatten(1) for block in self.blocks], 1)

    @property
    def eigenvalues(self) -> Tensor:
        """All of them, `(n,)`, block by block."""
        return torch.cat([block.values.flatten() for block in self.blocks])

    @property
    def lowest(self) -> float:
        """The smallest eigenvalue."""
        return min((float(b.values.min()) for b in self.blocks if b.values.numel()), default=0.0)

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return max((float(b.values.max()) for b in self.blocks if b.values.numel()), default=0.0)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        held = [t for b in self.blocks for t in vars(b).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def coverage(self) -> dict[str, int]:
        """How many parameters are in Kronecker form, exact, or known by their diagonal."""
        return {form: sum(b.values.numel() for b in self.blocks if b.form == form) for form in FORMS}

    def __repr__(self) -> str:
        noise = "" if self.drawn is None else f", relative standard error up to {self.drawn:.2g}"
        return f"{super().__repr__().removesuffix(')')}: {covered(self.coverage)}{noise})"


def covered(coverage: dict[str, int]) -> str:
    """Return a coverage in words."""
    total = max(1, sum(coverage.values()))
    words = {"kronecker": "in Kronecker form", "exact": "exact", "diagonal": "diagonal"}
    parts = [f"{100 * n / total:.1f} % {words[form]}" for form, n in coverage.items() if n]
    return f"{', '.join(parts) or 'no parameters'} of {sum(coverage.values())} parameters"


def ridge_values(block: Block, ridge: Tensor) -> Tensor:
    """Return what a diagonal matrix `(n,)` adds to a block's eigenvalues: its own diagonal in their basis."""
    if isinstance(block, DiagonalBlock):
        return ridge[block.where[0]]
    if isinstance(block, DenseBlock):
        return ridge[block.where[0]] @ block.basis.square()
    plain = replace(block, left=_squared(block.left), right=_squared(block.right))
    return plain.coordinates(ridge.unsqueeze(0))[0]


def _squared(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.square()
