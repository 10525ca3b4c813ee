"""Rows of all samples, collected batch by batch and sweep by sweep into what takes the least memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..._ladder.failures import RouteUndecidedError
from .factors import LayerRows, add_rows
from .part import RowFactors, Rows, matrix_shape
from .parts import Lookup, Outer, Several


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
        whole: As given.
        form: What must be alike between batches.
    """

    def __init__(self, samples: int, entries: int, layers: LayerRows, whole: bool = False) -> None:
        self.samples, self.entries, self.missing, self.whole = samples, entries, tuple(layers.missing), whole
        self.leaves = layers.lin.leaves
        self.form = form_of(layers)
        self._rows: dict[int, Tensor] = {leaf: self._empty(leaf) for leaf in self.missing}
        self._factors: dict[int, Outer | Lookup] = {}  # by use
        self._places: dict[int, list[int]] = {}  # of leaves that are kept by factors: their uses
        self._twins: dict[int, int] = {}  # of a bias: the use of its weight, whose cotangents are its rows
        self._idle: set[int] = set()  # uses of such biases
        self._ready = False

    def _empty(self, leaf: int) -> Tensor:
        like = self.leaves[leaf].detach()
        return like.new_empty(self.samples, self.entries, *matrix_shape(like.shape))

    # ---- filling in ------------------------------------------------------------------------------------------

    def open(self, layers: LayerRows) -> list[Tensor | None]:
        """Return what multiplies the parameters for some samples.

        Raises:
            StructureChangedError: These samples enter in another way than the first ones.
        """
        if tuple(layers.missing) != self.missing or (not self.whole and form_of(layers) != self.form):
            raise StructureChangedError("samples enter in different ways")
        return layers.operands

    def fill(
        self, where: slice, entry: int, layers: LayerRows, operands: Sequence[Tensor | None], seeds: Sequence[Tensor]
    ) -> None:
        """Take in one sweep, over cotangents of the outputs: one row of some samples."""
        sites = [i for i in range(len(layers.sites)) if i not in self._idle]
        deltas = dict(zip(sites, layers.sweep(seeds, [layers.sites[i] for i in sites]), strict=True))
        single = {i: delta.unsqueeze(1) for i, delta in deltas.items()}
        if not self._ready:
            given = enumerate(zip(layers.sites, operands, strict=True))
            self._make_room(layers, [None if site.derived else site.part(a, single[i]) for i, (site, a) in given])
        for i, kept in self._factors.items():
            kept.delta[where, entry], operand = deltas[i], operands[i]
            if entry == 0 and operand is not None:
                kept.operand[where] = operand
        for leaf, sites in layers.by_leaf:
            if leaf in self._rows:
                add_rows(layers, operands, single, sites, self._rows[leaf][where, entry : entry + 1])

    def _make_room(self, layers: LayerRows, parts: Sequence[RowFactors | None]) -> None:
        """Allocate factors, or rows where those are smaller, for what one sweep gave of some samples."""
        self._ready = True
        for leaf, sites in layers.by_leaf:
            own = {i: part for i in sites if isinstance(part := parts[i], Outer | Lookup)}
            held = sum(p.operand[0].numel() + self.entries * p.delta[0].numel() for p in own.values())
            if self.whole or len(own) < len(sites) or (own and held >= self.entries * self.leaves[leaf].numel()):
                self._rows[leaf] = self._empty(leaf)
                continue
            self._places[leaf] = sites
            for i, part in own.items():
                delta = part.delta.new_empty(self.samples, self.entries, *part.delta.shape[2:])
                operand = part.operand.new_empty(self.samples, *part.operand.shape[1:])
                self._factors[i] = replace(part, delta=delta, operand=operand)
        self._twins = {leaf: i for leaf in self._rows for i in self._twin(layers, leaf)}
        for leaf in self._twins:
            del self._rows[leaf]
        self._idle = {i for leaf, own in layers.by_leaf if leaf in self._twins for i in own}

    def _twin(self, layers: LayerRows, leaf: int) -> list[int]:
        """Return the weight whose cotangents are the rows of a bias: added by the same operation, at one position."""
        uses = [use for use in layers.sites if use.leaf == leaf]
        if len(uses) != 1 or uses[0].kind != "vector" or uses[0].operand is not None or uses[0].derived:
            return []
        shape = (1, 1, self.leaves[leaf].numel())
        alike = (i for i, kept in self._factors.items() if isinstance(kept, Outer) and kept.delta.shape[2:] == shape)
        return [i for i in alike if layers.sites[i].node is uses[0].node and layers.sites[i].layout is not None]

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
        if leaf in self._twins:
            return Rows(self._factors[self._twins[leaf]].delta[where, :, 0, 0].unsqueeze(3))
        kept = [self._factors[i] for i in self._places.get(leaf, ())]
        parts = [replace(part, delta=part.delta[where], operand=part.operand[where]) for part in kept]
        if not parts:
            return nowhere(self.leaves[leaf], len(range(self.samples)[where]), self.entries)
        return parts[0] if len(parts) == 1 else Several(parts)


def nowhere(leaf: Tensor, samples: int, entries: int) -> Outer:
    """Return the rows of a parameter that enters nowhere: a sum over no positions."""
    like, (long, wide) = leaf.detach(), matrix_shape(leaf.shape)
    return Outer(like.new_empty(samples, entries, 0, 1, long), like.new_empty(samples, 0, 1, wide))


def form_of(layers: LayerRows) -> list[tuple[int, bool, bool, tuple[int, ...]]]:
    """Return what must be alike between batches."""
    return [
        (site.leaf, site.turned, site.kind == "lookup", () if a is None else tuple(a.shape[1:]))
        for site, a in zip(layers.sites, layers.operands, strict=True)
    ]
