"""Rows of all samples, collected batch by batch and sweep by sweep into what takes the least memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._ladder.failures import RouteUndecidedError
from .factors import LayerRows, SampleUse, add_rows, matrix_shape
from .parts import Lookup, Outer, RowFactors, Rows, Several


class StructureChangedError(RouteUndecidedError):
    """Samples do not all enter in the same way: their factors cannot stand in one array."""


class Collected:
    """Factors, or whole rows where those are smaller, of n samples with k rows each.

    Args:
        samples: How many altogether.
        entries: Rows of each.
        layers: The uses of the first batch; those of others must be alike.
        whole: Keep rows of all parameters, so that samples may enter in ways of their own.

    Attributes:
        missing: Leaves whose rows are not by uses.
    """

    def __init__(self, samples: int, entries: int, layers: LayerRows, whole: bool = False) -> None:
        self.samples, self.entries, self.missing, self._whole = samples, entries, tuple(layers.missing), whole
        self.leaves = layers.lin.leaves
        self._by_leaf = list(layers.by_leaf())
        operands = [site.operand() for site in layers.sites]
        self._form = _form(layers, operands)
        self._like = [self.leaves[site.use.leaf] for site in layers.sites]
        self._operands: list[Tensor | None] = [None] * len(operands)
        self._deltas: list[Tensor | None] = [None] * len(operands)
        as_rows = range(len(self.leaves)) if whole else self.missing
        self._rows: dict[int, Tensor] = {leaf: self._empty(leaf) for leaf in as_rows}
        self._shared: dict[int, int] = {}
        if not whole:
            self._share_out(layers, operands)

    def _share_out(self, layers: LayerRows, operands: Sequence[Tensor | None]) -> None:
        """Make room for factors, or for rows where those are smaller."""
        for leaf, sites in self._by_leaf:
            held = sum(_factor_entries(layers.sites[i], operands[i], self.entries) for i in sites)
            if held >= self.entries * self.leaves[leaf].numel() and sites:
                self._rows[leaf] = self._empty(leaf)
                continue
            for i in sites:
                self._make_room(i, layers.sites[i], operands[i])
        self._shared = {leaf: i for leaf, sites in self._by_leaf for i in self._twin(layers, leaf, sites)}
        for leaf in self._shared:
            del self._rows[leaf]

    def _empty(self, leaf: int) -> Tensor:
        like = self.leaves[leaf].detach()
        return like.new_empty(self.samples, self.entries, *matrix_shape(like.shape))

    def _make_room(self, i: int, site: SampleUse, operand: Tensor | None) -> None:
        if operand is None:
            raise ValueError("vectors are rows")
        n, k, like = self.samples, self.entries, self._like[i].detach()
        self._operands[i] = operand.new_empty(n, *operand.shape[1:])
        positions, lookup = operand.shape[1], site.use.kind == "lookup"
        tail = (like.shape[-1],) if lookup else (operand.shape[2], _outputs(operand, site.use.entry.weight))
        self._deltas[i] = like.new_empty(n, k, positions, *tail)

    def _twin(self, layers: LayerRows, leaf: int, sites: list[int]) -> list[int]:
        """Return the weight whose cotangents are the rows of a bias: added by the same operation, at one position."""
        if leaf not in self._rows or len(sites) != 1 or layers.sites[sites[0]].use.kind != "vector":
            return []
        bias = layers.sites[sites[0]].use
        if bias.operand is not None or bias.derived:
            return []
        twins = [i for i, site in enumerate(layers.sites) if site.use.node is bias.node and site.use.layout is not None]
        return [i for i in twins if self._is_row(i, leaf)]

    def _is_row(self, i: int, leaf: int) -> bool:
        delta = self._deltas[i]
        return delta is not None and delta.ndim == 5 and delta.shape[2:] == (1, 1, self.leaves[leaf].numel())

    # ---- filling in ------------------------------------------------------------------------------------------

    def open(self, where: slice, layers: LayerRows) -> list[Tensor | None]:
        """Take in what multiplies the parameters for some samples, and return it.

        Raises:
            StructureChangedError: These samples enter in another way than the first ones.
        """
        operands = [site.operand() for site in layers.sites]
        changed = not self._whole and _form(layers, operands) != self._form
        if tuple(layers.missing) != self.missing or changed:
            raise StructureChangedError("samples enter in different ways")
        if self._whole:
            return operands
        for kept, operand in zip(self._operands, operands, strict=True):
            if kept is not None and operand is not None:
                kept[where] = operand
        return operands

    def fill(
        self, where: slice, entry: int, layers: LayerRows, operands: Sequence[Tensor | None], deltas: Sequence[Tensor]
    ) -> None:
        """Take in one sweep: one row of some samples."""
        for kept, delta in () if self._whole else zip(self._deltas, deltas, strict=True):
            if kept is not None:
                kept[where, entry] = delta
        single = [delta.unsqueeze(1) for delta in deltas]
        for leaf, sites in layers.by_leaf():
            if leaf in self._rows:
                add_rows(layers, operands, single, sites, self._rows[leaf][where, entry : entry + 1])

    def fill_leaf(self, sample: int, entry: int, leaf: int, row: Tensor | None) -> None:
        """Take in one row of a leaf that is missing; None is zeros."""
        target = self._rows[leaf][sample, entry]
        target.zero_() if row is None else target.copy_(row.reshape(target.shape))

    def parts(self, where: slice = slice(None)) -> list[RowFactors]:
        """Return one part per leaf, of all samples or some."""
        return [self._part(leaf, where) for leaf in range(len(self.leaves))]

    def _part(self, leaf: int, where: slice) -> RowFactors:
        if leaf in self._rows:
            return Rows(self._rows[leaf][where])
        if leaf in self._shared:
            delta = self._deltas[self._shared[leaf]]
            return Rows(_kept(delta)[where, :, 0, 0].unsqueeze(3))
        parts: list[RowFactors] = []
        long, wide = matrix_shape(self.leaves[leaf].shape)
        for i in dict(self._by_leaf)[leaf]:
            operand, delta = _kept(self._operands[i])[where], _kept(self._deltas[i])[where]
            turned, lookup = self._form[i][1:3]
            parts.append(Lookup(delta, operand, long) if lookup else Outer(delta, operand, turned, long))
        if not parts:  # it enters nowhere: a sum over no positions
            like = self.leaves[leaf].detach()
            many = len(range(self.samples)[where])
            parts = [Outer(like.new_empty(many, self.entries, 0, 1, long), like.new_empty(many, 0, 1, wide))]
        return parts[0] if len(parts) == 1 else Several(parts)


def _kept(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("nothing was kept")
    return tensor


def _form(layers: LayerRows, operands: Sequence[Tensor | None]) -> list[tuple[int, bool, bool, tuple[int, ...]]]:
    """Return what must be alike between batches."""
    return [
        (site.use.leaf, site.use.turned, site.use.kind == "lookup", () if a is None else tuple(a.shape[1:]))
        for site, a in zip(layers.sites, operands, strict=True)
    ]


def _outputs(operand: Tensor, weight: torch.Size) -> int:
    """Return the numbers per position and group of a cotangent of outer products."""
    return weight.numel() // max(1, operand.shape[2] * operand.shape[3])


def _factor_entries(site: SampleUse, operand: Tensor | None, entries: int) -> float:
    """Return how many numbers a sample's factors take; infinitely many where rows are not made of any."""
    weight = site.use.entry.weight
    if operand is None or site.use.derived or not weight.numel():
        return torch.inf
    if site.use.kind == "lookup":
        return operand.shape[1] * (1 + entries * weight[-1])
    return operand.shape[1] * operand.shape[2] * (operand.shape[3] + entries * _outputs(operand, weight))
