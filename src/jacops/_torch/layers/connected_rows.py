"""Rows of all samples with their graph, so that they can be differentiated: as factors where these are smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from .collected import nowhere
from .factors import LayerRows
from .parts import Lookup, Outer, RowFactors, Rows, Several

Sweeps = Sequence[Sequence[Tensor]]  # one for each row of a sample: cotangents `(n, T, …)` at every use
Batch = Callable[[slice], list[RowFactors]]  # some of the samples of a batch -> a part for each leaf


class ConnectedRows:
    """Rows batch by batch: in the place of `Collected`, which writes them into arrays without a graph.

    Attributes:
        missing: Leaves whose rows are not by uses: where there are some, samples are taken alone.
    """

    missing = ()

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}  # by the first sample

    def add(self, start: int, layers: LayerRows, sweeps: Sweeps) -> None:
        """Take in samples whose parameters all enter by uses."""
        operands = [site.sample_operand(attached=True) for site in layers.sites]
        deltas = [torch.stack(list(found), 1) for found in zip(*sweeps, strict=True)]

        def of(some: slice) -> list[RowFactors]:
            triples = zip(layers.sites, operands, deltas, strict=True)
            by_use = [site.part(None if a is None else a[some], delta[some]) for site, a, delta in triples]
            samples = len(range(layers.samples)[some])
            by_leaf = [(leaf, [by_use[i] for i in uses]) for leaf, uses in layers.by_leaf]
            return [_summed(parts) or nowhere(layers.lin.leaves[leaf], samples, len(sweeps)) for leaf, parts in by_leaf]

        self._batches[start] = of

    def add_formed(self, start: int, rows: Sequence[Tensor]) -> None:
        """Take in rows of some samples by every leaf, `(n, k, F, W)` each."""
        self._batches[start] = lambda some: [Rows(own[some]) for own in rows]

    def parts(self, where: slice | None = None) -> list[RowFactors]:
        """Return one part per leaf, of all samples, or of some within one batch."""
        if where is not None:
            start = max(first for first in self._batches if first <= where.start)
            return self._batches[start](slice(where.start - start, where.stop - start))
        batches = [self._batches[start](slice(None)) for start in sorted(self._batches)]
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
    values = (getattr(part, field.name) for field in fields(part))  # type: ignore[arg-type]
    return [type(part), *(tuple(value.shape[1:]) if isinstance(value, Tensor) else value for value in values)]
