"""Rows of a parameter Jacobian for every sample at once, from the places where parameters enter.

One sweep per output entry, shared by all samples, gives the cotangents at all uses of all parameters (`uses`); no
gradient of a weight is ever formed. That is right where samples do not mix, each use's rows belong to samples in a
known order, and every rule holds; exact zeros under a masked cotangent say the first, and a plain sweep over a random
cotangent the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..._cached import cached_property
from ..._runtime.rows import plain
from ..sweeps.batched import at_once, passed
from ..sweeps.linearization import Linearization
from .orders import sample_uses
from .part import RowFactors
from .parts import Outer, Several
from .uses import ParameterUse, cotangents


class LayerRows:
    """The uses of a recorded model's parameters, sample by sample.

    Args:
        lin: A model's outputs, first axis samples, by its parameters; with one sample, anything of that sample.
        samples: How many.
        plainly: Take no parameter to be covered.

    Attributes:
        sites: The uses of the leaves that are covered.
        uses: These by leaf.
        missing: Leaves that enter in a way that has no rule, or whose rows could not be distinguished.
        made: What was made of places, shapes and rules of the uses alone in earlier calls: it holds for this one too.
    """

    def __init__(self, lin: Linearization, samples: int, plainly: bool = False) -> None:
        self.lin, self.samples = lin, samples
        found, self.made = ({}, {}) if plainly else sample_uses(lin, samples)
        # A parameter without entries has rows without entries, wherever it enters.
        sizes = lin.domain.sizes
        self.missing = [j for j, size in enumerate(sizes) if size and j not in found]
        self.uses = {j: found[j] if size else [] for j, size in enumerate(sizes) if j in found or not size}
        self.sites = [use for own in self.uses.values() for use in own]

    def sweep(
        self, seeds: Sequence[Tensor], sites: Sequence[ParameterUse] | None = None, create_graph: bool = False
    ) -> list[Tensor]:
        """Return `(n, T, …)` at every site, or at some, by one sweep.

        Args:
            seeds: Cotangents, shaped as the outputs.
            sites: Where; everywhere if not given.
            create_graph: What is found keeps its graph.

        Raises:
            RouteFailedError: Torch cannot take it.
        """
        sites = self.sites if sites is None else sites
        self.lin.sweeps += bool(sites)
        pairs = zip(sites, cotangents(self.lin, sites, seeds, create_graph=create_graph), strict=True)
        return [site.delta(plain(delta), create_graph) for site, delta in pairs]

    def sweeps(self, seeds: Tensor, sites: Sequence[ParameterUse] | None = None) -> Iterator[list[Tensor]]:
        """Yield `(m, n, T, …)` at every site, or at some, for cotangents `(k, *output)`, m of them at a time.

        Raises:
            RouteFailedError: Torch cannot take them.
        """
        sites = self.sites if sites is None else sites
        if not sites:
            return
        edges, many = {use.node: use.edge for use in sites}, seeds.shape[0]  # a weight and its bias enter together
        step = at_once(sum({use.node: use.shape.numel() for use in sites}.values())) if many > 1 else 1
        for some in seeds.split(step) if many > step else (seeds,):
            found = passed(self.lin, self.lin.outputs, [*edges.values()], [some])
            by_node = dict(zip(edges, found, strict=True))
            yield [_deltas(use, by_node[use.node], some) for use in sites]

    @cached_property
    def operands(self) -> list[Tensor | None]:
        """What multiplies the parameters, by site."""
        return [site.sample_operand() for site in self.sites]

    @cached_property
    def by_leaf(self) -> list[tuple[int, list[int]]]:
        """Every covered leaf and which sites are its."""
        places: dict[int, list[int]] = {j: [] for j in range(len(self.lin.leaves)) if j not in self.missing}
        for i, site in enumerate(self.sites):
            places[site.entry.leaf].append(i)
        return [*places.items()]

    def column_squares(
        self, operands: Sequence[Tensor | None], seeds: Iterable[Tensor], most: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield covered leaves with what to add to the sum of their squared gradients, over samples and seeds.

        With one position a sample, cotangents of several seeds are squared together, up to `most` numbers of them.

        Args:
            operands: What multiplies the parameters, by site.
            seeds: Cotangents, `(k, *output)` each.
            most: Numbers that an array on the way may hold.
        """
        waiting: list[list[Tensor]] = []
        sites = [self.sites[i] for i in self._squared_sites]
        for deltas in (found for some in seeds for found in self.sweeps(some, sites)):
            waiting.append(deltas)
            held = sum(delta.numel() for own in waiting for delta in own)
            if not self._single or held + sum(delta.numel() for delta in deltas) > most:
                yield from self._squared(operands, waiting)
                waiting = []
        if waiting:
            yield from self._squared(operands, waiting)

    @property
    def _single(self) -> bool:
        """Whether samples have one position each: then squares of several seeds add up before they meet the operand."""
        return all(site.kind == "vector" or site.row_count <= self.samples for site in self.sites)

    @cached_property
    def _added_to(self) -> dict[int, int]:
        """Vectors that are added to a product by the same operation, one position a sample, by the weight's site."""
        weights = {
            use.node: i
            for i, use in enumerate(self.sites)
            if use.kind == "outer" and use.layout is not None and use.row_count == self.samples
        }
        found: dict[int, int] = {}
        for leaf, own in self.by_leaf:
            use = self.sites[own[0]] if len(own) == 1 else None
            if use is not None and use.kind == "vector" and not use.derived and use.node in weights:
                layout = self.sites[weights[use.node]].layout
                whole = layout is not None and layout.channels == self.lin.leaves[leaf].numel()
                if whole and use.operand is None:
                    found[leaf] = weights[use.node]
        return found

    @cached_property
    def _squared_sites(self) -> list[int]:
        """The sites at which cotangents are squared: of vectors that are added to a product the squares are its own."""
        return [i for i, site in enumerate(self.sites) if site.leaf not in self._added_to]

    def _squared(
        self, operands: Sequence[Tensor | None], sweeps: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        parts: dict[int, RowFactors] = {}
        for i, found in zip(self._squared_sites, zip(*sweeps, strict=True), strict=True):
            rows = [own.transpose(0, 1) for own in found]
            parts[i] = self.sites[i].part(operands[i], rows[0] if len(rows) == 1 else torch.cat(rows, 1))
        for leaf, sites in self.by_leaf:
            beside = parts[self._added_to[leaf]] if leaf in self._added_to else None
            if isinstance(beside, Outer):
                yield leaf, beside.delta_squares.sum(0)
            elif sites:
                own = [parts[i] for i in sites]
                yield leaf, (own[0] if len(own) == 1 else Several(own)).column_squares()


def _deltas(use: ParameterUse, found: Tensor | None, seeds: Tensor) -> Tensor:
    """Return cotangents `(m, *shape)` at a use's output as rows `(m, n, T, …)`; zero where nothing arrives."""
    cotangent = seeds.new_zeros(seeds.shape[0], *use.shape, dtype=use.dtype) if found is None else plain(found)
    return use.deltas(cotangent)


def add_rows(
    layers: LayerRows,
    operands: Sequence[Tensor | None],
    deltas: Mapping[int, Tensor] | Sequence[Tensor],
    sites: Iterable[int],
    target: Tensor,
) -> None:
    """Write one leaf's rows for k output entries, cotangents `(n, k, T, …)` by site, into `(n, k, F, W)`."""
    add = False
    for i in sites:
        layers.sites[i].part(operands[i], deltas[i]).into(target, add)
        add = True
    if not add:
        target.zero_()


def unit_seeds(output: Tensor, many: int | None = None) -> Iterator[Tensor]:
    """Yield cotangents that pick one entry of every sample's output; each is good until the next.

    Args:
        output: The output of some samples.
        many: How many; the length of its first axis by default.
    """
    entries = output.shape[1:].numel() if many is None else output.numel() // many
    seed = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
    flat = seed.view(output.shape[0] if many is None else many, entries)
    for entry in range(entries):
        flat[:, entry] = 1
        yield seed
        flat[:, entry] = 0  # only now: what is found may be this very tensor
