"""EigenBlocks: a positive operator on parameters, known block by block in an eigenbasis of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from .._cached import cached_property
from .._saving import Savable
from .._space import Space
from ._kinds import OnSpace

# Entries of rows that are multiplied together: each has four copies on the way, which stay in caches, in memory that
# was just freed. Of 200 rows of 4,810, products took 6 ms in two pieces and 15 at once.
_TOGETHER = 2**19

Form = Literal["kronecker", "exact", "diagonal"]
FORMS: tuple[Form, ...] = ("kronecker", "exact", "diagonal")


@final
@dataclass(frozen=True, eq=False)
class Block(Savable):
    r"""A weight `(g * p, q)` in g groups, each with the eigenvectors $U \otimes V$; a bias is its last column.

    With g = p = 1 these are any q parameters with the eigenvectors $V$.

    Attributes:
        where: Entries of the weight, and of its bias, in a flat vector.
        left: Eigenvectors U as columns, `(g, p, p)`; None means the identity.
        right: Eigenvectors V as columns, `(g, q, q)`; None means the identity.
        values: Eigenvalues, `(g, p, q)`.
        turned: The weight is stored as `(q, p)`.
        form: What is known of it: a Kronecker product, all, or the diagonal.
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
        matrix = matrix.mT if self.turned else matrix
        rows[:, weight].unflatten(1, matrix.shape[1:]).copy_(matrix)


def _both_sides(matrices: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return `left' M right` for matrices `(k, g, p, q)`."""
    if right is not None:  # of one group all matrices are one tall one; sums of another layout round otherwise
        matrices = matrices @ (right[0].contiguous() if len(right) == 1 else right)
    return matrices if left is None else left.mT @ matrices


@final
@dataclass(frozen=True, eq=False, repr=False)
class EigenBlocks(OnSpace):
    r"""$\sum_b Q_b\, \mathrm{diag}(e_b)\, Q_b^\top$ over blocks of parameters, with orthogonal $Q_b$.

    Products, inverses and roots under any damping cost a few small matrix products per row.

    Attributes:
        space: The parameters.
        blocks: Every parameter is in exactly one.
        drawn: The relative standard error of eigenvalues that were estimated from draws; None where none were.
        model: Digest of the model, its loss and its weights, that they are of; empty where that is not known.
    """

    space: Space
    blocks: tuple[Block, ...]
    drawn: float | None = None
    model: str = ""
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
        step = max(1, _TOGETHER // max(1, self.space.dim))
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

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield from super()._facts()
        yield "form", covered(self.coverage)
        if self.drawn is not None:
            yield "relative standard error", f"up to {self.drawn:.2g}"


def covered(coverage: dict[str, int]) -> str:
    """Return a coverage in words."""
    total = max(1, sum(coverage.values()))
    words = {"kronecker": "in Kronecker form", "exact": "exact", "diagonal": "diagonal"}
    parts = [f"{100 * n / total:.1f} % {words[form]}" for form, n in coverage.items() if n]
    return f"{', '.join(parts) or 'no parameters'} of {sum(coverage.values())} parameters"


def ridge_values(block: Block, ridge: Tensor) -> Tensor:
    """Return what a diagonal matrix `(n,)` adds to a block's eigenvalues: its own diagonal in their basis."""
    plain = replace(block, left=_squared(block.left), right=_squared(block.right))
    return plain.coordinates(ridge.unsqueeze(0))[0]


def _squared(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.square()
