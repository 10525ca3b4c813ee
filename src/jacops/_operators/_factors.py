"""Layer factors: rows of a parameter Jacobian, kept as what they are products of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from .._display import listed
from .._runtime.contexts import eager, keeping
from .._space import Space
from .._torch.protocol import Outer, RowFactors, Rows, Vectors, slices, times_vectors
from ._base import Operator
from ._dense import DenseAsk, put_products
from ._finite_results import check_result
from ._held import Held
from ._ranked_rows import RankedRows
from ._target import Target


@final
@dataclass(frozen=True, eq=False, repr=False)
class LayerFactors(Operator):
    r"""Rows of a Jacobian by parameters, one or several per sample, that are formed only on request.

    Where a weight enters by $z_{nt} = W a_{nt}$, a row is $\sum_t \delta_{nt} a_{nt}^\top$ with the cotangent
    $\delta$ at z (Goodfellow, 2015): cotangents and operands are kept, and products, Gram matrix, norms and diagonal
    contract them. Parameters that enter otherwise are kept as rows. Temporaries take some 64 MiB, or as much as is
    held.

    Attributes:
        parts: One for each parameter.
        parameters: What the columns mean.
        rows: What the rows mean.
        without_rule: Parameters that enter by operations without a rule: their rows came by plain sweeps.
        route: How the factors were computed.
        create_graph: Rows have their graph, and so has what is made of them.
    """

    parts: Sequence[RowFactors]
    parameters: Space
    rows: Space
    without_rule: Sequence[str] = ()
    route: str = ""
    create_graph: bool = False

    @property
    def domain(self) -> Space:
        """The parameters."""
        return self.parameters

    @property
    def codomain(self) -> Space:
        """The rows."""
        return self.rows

    @property
    def losses(self) -> Tensor | None:
        """The loss of every sample alone, `(n,)`, where the rows are gradients of losses."""
        return None if self.computed is None else self.computed.losses

    @property
    def nbytes(self) -> int:
        """Bytes held; memory shared by two parameters is counted once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for part in self.parts for t in part.tensors
        }
        return sum(storages.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the matrix would take."""
        return self.shape[0] * self.shape[1] * self.domain.dtype.itemsize

    @property
    def factored(self) -> list[str]:
        """Parameters whose rows are kept as factors."""
        return [n for n, part in zip(self.domain.names, self.parts, strict=True) if not isinstance(part, Rows)]

    @property
    def coverage(self) -> float:
        """The share of all parameter entries whose rows came by layers, without plain sweeps."""
        sizes = dict(zip(self.domain.names, self.domain.sizes, strict=True))
        return 1.0 - sum(sizes[name] for name in self.without_rule) / max(1, self.domain.dim)

    @property
    def matrix(self) -> Tensor:
        """The matrix itself, formed anew each time."""
        return self.dense()

    # ---- products --------------------------------------------------------------------------------------------

    def _apply(self, rows: Tensor) -> Tensor:
        rows = rows if self.create_graph else rows.detach()
        return self.times(RankedRows(self.domain).parts(rows), rows)

    def times(self, vectors: Sequence[Vectors], like: Tensor) -> Tensor:
        """Return products `(k, m)` of the rows with vectors, which are given parameter by parameter.

        Args:
            vectors: One for each parameter, seen as a matrix `(F, W)`: k of these, or of their factors of low rank.
            like: A row for each of the k vectors, in the dtype in which products are added up.
        """
        total = like.new_zeros(like.shape[0], self.codomain.dim)
        for part, own in zip(self.parts, vectors, strict=True):
            total += times_vectors(part, own).flatten(1)
        return total.to(self.codomain.dtype)

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        rows = rows if self.create_graph else rows.detach()
        found = rows.new_empty(rows.shape[0], self.domain.dim, dtype=self.domain.dtype)
        for part, where in zip(self.parts, self.domain.slices, strict=True):
            u = rows.to(part.like.dtype).view(rows.shape[0], *part.shape[:2])
            found[:, where] = part.transposed(u).flatten(1)
        return found

    def _formed_with_graph(self) -> Tensor:
        blocks = [part.block(slice(0, part.shape[2])) for part in self.parts]
        return torch.cat([block.reshape(self.shape[0], -1) for block in blocks], 1)

    _own = "layer by layer"

    def _largest(self) -> float:
        return sum(part.largest() for part in self.parts)  # a maximum could lose a NaN

    def _held(self, ask: DenseAsk) -> Held:
        return Held(max(map(_written, self.parts), default=0.0), unit="layer at a time")

    def _fill(self, target: Target, ask: DenseAsk) -> None:
        if target.adds:
            put_products(self, target, ask.by_products.chunk)
            return
        for part, where in zip(self.parts, self.domain.slices, strict=True):
            part.into(target.matrix[:, where].unflatten(0, part.shape[:2]).unflatten(2, part.shape[2:]))
        target.multiply()

    # ---- products and sums of rows ----------------------------------------------------------------------------

    @eager
    def gram(self) -> Tensor:
        r"""Return $J J^\top$, `(m, m)`: inner products of all rows; of outputs, the neural tangent kernel.

        With one position per sample it is a product of two small Gram matrices, entry by entry, for each weight;
        else pairs of positions or rows, some columns at a time, whichever is cheaper.
        """
        with keeping(self.create_graph):
            total = torch.zeros(self.shape[0], self.shape[0], dtype=self.domain.dtype, device=self.domain.device)
            for part in self.parts:
                total += part.gram()
            return check_result(self, total, "the Gram matrix")

    @eager
    def sample_grams(self) -> Tensor:
        r"""Return $J_i J_i^\top$ of every sample's own k rows, `(samples, k, k)`, the diagonal blocks of `gram()`.

        Positions are paired where that costs less than forming the rows, as for few outputs of wide layers.
        """
        with keeping(self.create_graph):
            grams = torch.stack([part.sample_grams() for part in self.parts]).sum(0)
            return check_result(self, grams, "the Gram matrix of a sample")

    @eager
    def squared_norms(self) -> Tensor:
        """Return the squared norm of each row, `(m,)`."""
        with keeping(self.create_graph):
            total = torch.zeros(self.shape[0], dtype=self.domain.dtype, device=self.domain.device)
            for part in self.parts:
                total += part.squares().flatten()
            return check_result(self, total, "the vector of squared norms")

    @eager
    def norms(self) -> Tensor:
        """Return the norm of each row, `(m,)`."""
        with keeping(self.create_graph):
            return self.squared_norms().sqrt()

    @eager
    def column_squares(self) -> Tensor:
        r"""Return the sum over rows of squared entries, the diagonal of $J^\top J$, `(n,)`."""
        with keeping(self.create_graph):
            squares = self.domain.join([part.column_squares().unsqueeze(0) for part in self.parts])[0]
            return check_result(self, squares, "the vector of sums of squares")

    def scaled(self, factors: Tensor) -> LayerFactors:
        """Return the operator with the rows of each sample times a number, `(samples,)`."""
        return replace(self, parts=[part.scaled(factors) for part in self.parts])

    @property
    def name(self) -> str:
        """`"LayerFactors"`, whatever they are of."""
        return "LayerFactors"

    def _routes(self) -> Mapping[str, str]:
        return {"route": self.route}

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield from super()._facts()
        yield "factored", f"{listed(self.factored)}; {len(self.parts) - len(self.factored)} others as rows"
        if self.without_rule:
            yield "without a rule", f"{listed(self.without_rule)} ({1 - self.coverage:.1%} of the entries)"


def _written(part: RowFactors) -> float:
    """Return the bytes of temporaries while a part writes its columns."""
    if isinstance(part, Rows) or (isinstance(part, Outer) and part.delta.shape[2] == part.delta.shape[3] == 1):
        return 0.0
    n, k, long, wide = part.shape
    each = n * k * wide * part.like.element_size()
    return 2.0 * each * max((some.stop - some.start for some in slices(long, each)), default=0)
