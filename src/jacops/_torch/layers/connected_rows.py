"""Rows of all samples with their graph, so that they can be differentiated: as factors where these are smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..._cached import cached_property
from .collected import nowhere
from .factors import LayerRows
from .part import RowFactors, Rows
from .parts import Lookup, Outer, Several


@dataclass
class _Swept:
    """Samples whose parameters all enter by uses.

    Attributes:
        layers: The uses.
        operands: What multiplies the parameters there.
        sweeps: Cotangents `(n, T, …)` at every use, for each row of a sample.
    """

    layers: LayerRows
    operands: Sequence[Tensor | None]
    sweeps: list[list[Tensor]] = field(default_factory=list)

    @cached_property
    def deltas(self) -> list[Tensor]:
        """Cotangents `(n, k, T, …)` of all rows."""
        return [torch.stack(list(found), 1) for found in zip(*self.sweeps, strict=True)]

    def parts(self, some: slice) -> list[RowFactors]:
        """Return a part for each leaf, of some of the samples."""
        triples = zip(self.layers.sites, self.operands, self.deltas, strict=True)
        by_use = [site.part(None if a is None else a[some], delta[some]) for site, a, delta in triples]
        samples, entries = len(range(self.layers.samples)[some]), len(self.sweeps)
        by_leaf = [(self.layers.lin.leaves[leaf], [by_use[i] for i in uses]) for leaf, uses in self.layers.by_leaf]
        return [_summed(parts) or nowhere(leaf, samples, entries) for leaf, parts in by_leaf]


@dataclass
class _Formed:
    """Samples whose rows were formed by plain sweeps, `(n, k, F, W)` for each leaf."""

    rows: Sequence[Tensor]

    def parts(self, some: slice) -> list[RowFactors]:
        """Return a part for each leaf, of some of the samples."""
        return [Rows(own[some]) for own in self.rows]


class ConnectedRows:
    """Rows batch by batch: in the place of `Collected`, which writes them into arrays without a graph.

    Attributes:
        missing: Leaves whose rows are not by uses: where there are some, samples are taken alone.
    """

    missing = ()

    def __init__(self) -> None:
        self._batches: dict[int, _Swept | _Formed] = {}  # by the first sample

    def open(self, layers: LayerRows) -> list[Tensor | None]:
        """Return what multiplies the parameters for some samples."""
        return [site.sample_operand(attached=True) for site in layers.sites]

    def fill(
        self, where: slice, entry: int, layers: LayerRows, operands: Sequence[Tensor | None], seeds: Sequence[Tensor]
    ) -> None:
        """Take in one sweep, over cotangents of the outputs: one row of some samples."""
        batch = _Swept(layers, operands) if entry == 0 else self._batches[where.start]
        self._batches[where.start] = batch
        if isinstance(batch, _Swept):  # seeds may be written into again, and a graph keeps them
            batch.sweeps.append(layers.sweep([seed.clone() for seed in seeds], create_graph=True))

    def fill_formed(self, start: int, rows: Sequence[Tensor]) -> None:
        """Take in the rows of some samples by every leaf, `(n, k, F, W)` each."""
        self._batches[start] = _Formed(rows)

    def parts(self, where: slice | None = None) -> list[RowFactors]:
        """Return one part per leaf, of all samples, or of some within one batch."""
        if where is not None:
            start = max(first for first in self._batches if first <= where.start)
            return self._batches[start].parts(slice(where.start - start, where.stop - start))
        batches = [self._batches[start].parts(slice(None)) for start in sorted(self._batches)]
        return [_joined(column) for column in zip(*batches, strict=True)]


def _summed(parts: Sequence[RowFactors]) -> RowFactors | None:
    """Return the rows by a leaf from those of its uses, formed where that is smaller; None where it has none."""
    if not parts:
        return None
    part = parts[0] if len(parts) == 1 else Several(parts)
    held = sum(tensor.numel() for tensor in part.tensors)
    return part if held < torch.Size(part.shape).numel() else _formed(part)


def _joined(parts: Sequence[RowFactors]) -> RowFactors:
    """Return the rows of all batches: factors where these are alike in all of them."""
    first, *others = parts
    if not others:
        return first
    if isinstance(first, Outer | Lookup) and all(_form(other) == _form(first) for other in others):
        alike = [part for part in parts if isinstance(part, Outer | Lookup)]
        delta, operand = (torch.cat(column) for column in zip(*(part.tensors for part in alike), strict=True))
        return replace(first, delta=delta, operand=operand)
    return Rows(torch.cat([_formed(part).rows for part in parts]))


def _formed(part: RowFactors) -> Rows:
    return part if isinstance(part, Rows) else Rows(part.block(slice(0, part.shape[2])))


def _form(part: RowFactors) -> list[object]:
    """Return what parts have in common that differ in their samples alone."""
    values = (getattr(part, own.name) for own in fields(part))  # type: ignore[arg-type]
    return [type(part), *(tuple(value.shape[1:]) if isinstance(value, Tensor) else value for value in values)]
