"""The places where parameters enter, sample by sample: what a curvature matrix by layers is put together from.

A `LayerOutput` is the output of an operation that parameters enter, seen as `(samples, positions, channels)`. A
`ParameterBlock` is a set of parameters there whose gradient, for a cotangent `delta` at the output, is either the outer
product of `delta` with an operand (weights, with their biases as an operand of ones) or `delta` times factors, summed
(gains, biases).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..._cached import cached_property
from .rules import RowLayout, by_sample
from .uses import ParameterUse


@dataclass(eq=False)
class LayerOutput:
    """One operation that parameters enter.

    Attributes:
        uses: What enters it.
        many: How many samples there are.
        ahead: Positions along axes in front of the samples' axis; 1 where samples come first.
        panels: Its parameters, set up by `Site.prepare`.
    """

    uses: list[ParameterUse]
    many: int = 1
    ahead: int = 1
    panels: list[ParameterBlock] = field(default_factory=list)

    @property
    def node(self) -> Any:
        """The operation."""
        return self.uses[0].node

    @property
    def shape(self) -> torch.Size:
        """Of its output."""
        return self.uses[0].shape

    @property
    def edge(self) -> GradientEdge:
        """Its output, where cotangents are requested."""
        return GradientEdge(self.node, 0)

    @cached_property
    def layout(self) -> RowLayout:
        """How the output is seen.

        Raises:
            ValueError: It is not seen as rows.
        """
        layout = self.uses[0].layout
        if layout is None:
            raise ValueError("the output is not seen as rows of channels")
        return layout

    @property
    def channels(self) -> int:
        """Numbers per position."""
        return self.layout.channels

    @property
    def positions(self) -> int:
        """Positions per sample."""
        return self.shape.numel() // max(1, self.many * self.channels)

    @property
    def entries(self) -> int:
        """Numbers per sample."""
        return self.positions * self.channels

    def layouts(self, many: int) -> list[int]:
        """Return how many positions may stand in front of the samples' axis."""
        first, *rest = self.layout.row_sizes
        found = [1] if first % many == 0 else []
        if many > 1 and not self.layout.samples_first:
            if not rest and first % many == 0 and first > many:
                found.append(first // many)
            elif rest and rest[0] == many:
                found.append(first)
        return found

    def by_sample(self, rows: Tensor, axis: int = 0) -> Tensor:
        """Return rows `(samples * positions, …)` as `(samples, positions, …)`, axes ahead of them left alone."""
        return by_sample(rows, self.many, self.ahead, axis)

    def spread(self, raw: Tensor) -> Tensor:
        """Return tensors shaped as the output, `(…, *shape)`, as `(…, samples, positions, channels)`."""
        return self.layout.spread(raw, self.many, self.ahead)

    def gathered(self, spread: Tensor) -> Tensor:
        """Undo `spread`."""
        lead, inner = spread.shape[:-3], self.positions // self.ahead
        rows = spread.reshape(*lead, self.many, self.ahead, inner, self.channels).transpose(-4, -3)
        return self.layout.gathered(rows.reshape(*lead, self.many * self.positions, self.channels))

    def picking(self, entries: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
        """Return cotangents `(m, *shape)` that pick one position and channel of every sample."""
        seeds = like.new_zeros(len(entries), self.many, self.positions, self.channels)
        positions, channels = zip(*entries, strict=True)
        seeds[range(len(entries)), :, positions, channels] = 1
        return self.gathered(seeds)

    def describes(self, use: ParameterUse) -> bool:
        """Return whether a use is the same for all samples: a parameter may have an entry per sample."""
        if use.kind != "vector":
            return use.operand is not None and use.operand.shape[0] == self.many * self.positions
        index = self.spread(use.entries())
        return not bool((index != index[:1]).any())

    def prepare(self, slices: Sequence[slice]) -> None:
        """Set up the panels of all uses."""
        self.panels = [p for use in self.uses if use.kind != "vector" for p in _outer_panels(self, use, slices)]
        for use in self.uses:
            if use.kind == "vector":
                index = self.spread(use.entries())[0]
                if not self._joined(use, index, slices):
                    factor = None if use.operand is None else self.spread(use.operand)
                    part = BlockPart(slices[use.leaf], 1, slice(0, 1))
                    self.panels.append(ParameterBlock(self, [part], factor=factor, index=index, use=use))

    def _joined(self, use: ParameterUse, index: Tensor, slices: Sequence[slice]) -> bool:
        """Take a bias into the panel of its weight, as an operand of ones, if it is one number per channel."""
        panel = next((p for p in self.panels if p.channels == slice(0, self.channels)), None)
        numbers = torch.arange(self.channels, device=index.device)
        if panel is None or panel.operand is None or use.operand is not None or not bool((index == numbers).all()):
            return False
        ones = panel.operand.new_ones(*panel.operand.shape[:2], 1)
        columns = slice(panel.operand.shape[2], panel.operand.shape[2] + 1)
        panel.operand = torch.cat([panel.operand, ones], 2)
        panel.parts.append(BlockPart(slices[use.leaf], 1, columns))
        return True


@dataclass(frozen=True)
class BlockPart:
    """One parameter of a panel, or a group's share of it.

    Attributes:
        where: Its entries in the flat vector of parameters.
        inputs: How many columns of the operand multiply it.
        columns: Which.
        turned: It is stored inputs first.
    """

    where: slice
    inputs: int
    columns: slice
    turned: bool = False

    def split(self, matrix: Tensor, axis: int) -> Tensor:
        """Return a view of the matrix's rows (or columns) of this part as two axes, channels and inputs."""
        part = matrix.narrow(axis, self.where.start, self.where.stop - self.where.start)
        if self.turned:
            return part.unflatten(axis, (self.inputs, -1)).transpose(axis, axis + 1)
        return part.unflatten(axis, (-1, self.inputs))


@dataclass(eq=False)
class ParameterBlock:
    """Parameters at a site whose gradients are made in one way.

    Attributes:
        site: Where.
        parts: The parameters.
        operand: `(samples, positions, inputs)`: the gradient is the sum over positions of channels ⊗ operand.
        factor: `(samples, positions, channels)`: the gradient is the cotangent times this; None for ones.
        index: `(positions, channels)`: which entry of the parameter each product is added to.
        use: The use whose operand or factor may move with other parameters.
        channels: Those of the site that are about these parameters.
        group: Which of the operand's groups.
    """

    site: LayerOutput
    parts: list[BlockPart]
    operand: Tensor | None = None
    factor: Tensor | None = None
    index: Tensor | None = None
    use: ParameterUse | None = None
    channels: slice = field(default_factory=lambda: slice(0, 0))
    group: int = 0

    @property
    def numbers(self) -> Tensor:
        """The index.

        Raises:
            ValueError: The panel has an operand instead.
        """
        if self.index is None:
            raise ValueError("a panel with an operand has no index")
        return self.index

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(part.where.stop - part.where.start for part in self.parts)

    def reduced(self, values: Tensor) -> Tensor:
        """Return `(…, positions, channels)` added up to `(…, entries of the parameter)`."""
        index, total = self.numbers, self.size
        numbers = torch.arange(total, device=index.device)
        if index.shape[1] % total == 0 and bool((index.reshape(-1, total) == numbers).all()):
            return (
                values.reshape(*values.shape[:-2], -1, total).sum(-2) if index.numel() > total else values.flatten(-2)
            )
        zeros = values.new_zeros(*values.shape[:-2], total)
        return zeros.index_add_(-1, index.flatten().to(values.device), values.flatten(-2))


def _outer_panels(site: LayerOutput, use: ParameterUse, slices: Sequence[slice]) -> list[ParameterBlock]:
    where, operand = slices[use.leaf], use.operand
    if operand is None:
        raise ValueError("an outer product needs an operand")
    if use.kind == "lookup":
        table = (where.stop - where.start) // site.channels
        ones = use.delta(torch.ones(site.shape, dtype=use.dtype, device=operand.device)).flatten(0, 2)
        hot = (operand.unsqueeze(1) == torch.arange(table, device=operand.device)) & (ones[:, :1] != 0)
        part = BlockPart(where, table, slice(0, table), turned=True)
        return [ParameterBlock(site, [part], site.by_sample(hot.to(use.dtype)), channels=slice(0, site.channels))]
    rows = site.by_sample(operand)
    groups, inputs = rows.shape[2:]
    width, each = site.channels // groups, (where.stop - where.start) // groups
    return [
        ParameterBlock(
            site,
            [
                BlockPart(
                    slice(where.start + g * each, where.start + (g + 1) * each), inputs, slice(0, inputs), use.turned
                )
            ],
            rows[:, :, g],
            use=use,
            channels=slice(g * width, (g + 1) * width),
            group=g,
        )
        for g in range(groups)
    ]


def find_sites(uses: dict[int, list[ParameterUse]]) -> list[LayerOutput]:
    """Return the operations that parameters enter, in the order in which they ran.

    Parameters that enter where an output is not seen as rows of channels are left out.
    """
    lost = {leaf for leaf, found in uses.items() if any(use.layout is None for use in found)}
    by_node: dict[Any, list[ParameterUse]] = {}
    for leaf, found in uses.items():
        for use in found if leaf not in lost else ():
            by_node.setdefault(use.node, []).append(use)
    return sorted((LayerOutput(found) for found in by_node.values()), key=lambda site: site.node._sequence_nr())


def shadows(sites: Sequence[LayerOutput]) -> list[LayerOutput]:
    """Return the sites with panels that have shapes and no entries."""
    found = [LayerOutput(site.uses, site.many, site.ahead) for site in sites]
    for shadow, site in zip(found, sites, strict=True):
        shadow.panels = [
            replace(panel, site=shadow, operand=_shadow(panel.operand), factor=_shadow(panel.factor))
            for panel in site.panels
        ]
    return found


def _shadow(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("meta")


def without(sites: Sequence[LayerOutput], lost: set[int]) -> list[LayerOutput]:
    """Return what enters the sites apart from some leaves."""
    kept = [LayerOutput([use for use in s.uses if use.leaf not in lost], s.many, s.ahead, s.panels) for s in sites]
    return [site for site in kept if site.uses]


def settled(sites: Sequence[LayerOutput], slices: Sequence[slice]) -> list[LayerOutput]:
    """Return the sites with their panels, apart from leaves that separate samples."""
    lost = {use.leaf for site in sites for use in site.uses if not site.describes(use)}
    found = without(sites, lost)
    for site in found:
        site.prepare(slices)
    return found


def costly(sites: Sequence[LayerOutput], sizes: Sequence[int]) -> list[LayerOutput]:
    """Return the sites that cost fewer sweeps than their parameters do one by one.

    Parameters and sites that hang together are judged together.
    """
    groups: list[tuple[set[int], list[LayerOutput]]] = []
    for site in sites:
        leaves, members = {use.leaf for use in site.uses}, [site]
        for group in [g for g in groups if g[0] & leaves]:
            leaves, members = leaves | group[0], members + group[1]
            groups.remove(group)
        groups.append((leaves, members))
    lost: set[int] = set()
    for leaves, members in groups:
        share = 1.0 if all(site.positions == 1 for site in members) else 0.5
        if sum(site.entries for site in members) > share * sum(sizes[leaf] for leaf in leaves):
            lost |= leaves
    return [site for site in sites if not {use.leaf for use in site.uses} & lost]


def leaves_of(sites: Sequence[LayerOutput]) -> set[int]:
    """Return the parameters that enter at some sites."""
    return {use.leaf for site in sites for use in site.uses}


def pays(sizes: Sequence[int], described: Set[int], rows: int, sweeps: int) -> bool:
    """Return whether a matrix by layers should beat the same one by products, many to a sweep.

    Both take time per sweep and per number multiplied; the seconds are what a processor was measured to take. Small
    matrices are products' own.

    Args:
        sizes: Of the parameters.
        described: Which of them have rules.
        rows: Samples times positions at the layer that has most.
        sweeps: How many it takes by layers.
    """
    size = sum(sizes)
    # Seconds as a processor was measured to take: 1 ms for each pass of 64 products, and the arithmetic.
    products = 1e-3 * -(-size // 64) + 3e-10 * rows * size**2
    left = 1 - sum(sizes[leaf] for leaf in described) / size
    # 3 ms to set up, 0.2 ms a sweep, and products of matrices, 7 times faster per number than sweeps; measured.
    return 3e-3 + 2e-4 * sweeps + 4e-11 * rows * size**2 + left * products < products
