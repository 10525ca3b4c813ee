"""Whole curvature matrices through the outputs of layers: Hessian, Gauss-Newton and their kin.

A step V in a weight acts as `e = V a` at the output of its layer, so second derivatives by the (few) numbers at the
layers' outputs give those by the (many) parameters. With cotangents `delta = dL/dz`, one sweep over `delta` per number
of a sample, shared by all samples, gives how cotangents and operands move; blocks follow as products of matrices over
the samples (`blocks`). Nothing of the parameters' length is swept, any graph will do, and parameters that enter
in some other way take ordinary sweeps for their rows of the same matrix. That samples do not mix is proved by exact
zeros; where they do, the batch is one sample with many positions. A product with a random direction confirms the
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._cached import cached_property
from ..._ladder.names import Fact
from ..._runtime.contexts import private_noise, sweeping
from ..._runtime.memory import Meter
from ..._runtime.restoring import restoring
from ..layers.blocks import Chunk, Found, add_blocks
from ..layers.diagonals import add_pairs, pairable, together
from ..layers.second import Second, moves
from ..layers.sites import LayerOutput, costly, find_sites, leaves_of, pays, settled, shadows, without
from ..layers.uses import ParameterUse, find_uses
from ..sweeps.batched import at_once
from ..sweeps.linearization import Linearization
from .by_layers import Rehearsal, Rows
from .by_products import ByProducts


def hessian_layers(lin: Linearization, lengths: Sequence[int], rows: Rows) -> HessianLayers | None:
    """Return what the layers say of the Hessian of a recorded loss; None if no parameter gains.

    Args:
        lin: The loss by its parameters.
        lengths: How many samples there may be: what to try.
        rows: Products with the Hessian by ordinary sweeps.
    """
    sites = describable(lin)
    if not sites:
        return None
    second = Second(lin, sites)
    for count in dict.fromkeys((*lengths, 1)):
        found = _proved(second, sites, count) if count > 1 else settled(sites, lin.domain.slices)
        found = costly(found, lin.domain.sizes) if found else []
        if found:
            break
    else:
        return None
    described, at_layers = leaves_of(found), max(site.many * site.positions for site in found)
    if not pays(lin.domain.sizes, described, at_layers, sum(site.entries for site in found)):
        return None
    return HessianLayers(second, found, ByProducts.beside(lin, described, rows))


def hessian_diagonal(lin: Linearization, lengths: Sequence[int], rows: Rows, most: int) -> tuple[Tensor, str] | None:
    """Return the diagonal of the Hessian and how it was found; None if no parameter gains."""
    layers = hessian_layers(lin, lengths, rows)
    return None if layers is None else layers.diagonal(most)


@dataclass(eq=False)
class HessianLayers:
    """A Hessian by what sweeps find at the outputs of layers.

    Attributes:
        second: The cotangents that are swept.
        sites: The layers.
        ordinary: The parameters that no site describes.
    """

    second: Second
    sites: Sequence[LayerOutput]
    ordinary: ByProducts

    def add(self, matrix: Tensor, weight: float, most: int) -> str:
        """Add a half of it times a weight, and say how it was done."""
        lin = self.second.lin
        before = lin.sweeps
        for place, site in enumerate(self.sites):
            if self.second.delta(site) is not None:
                _add_site(self.second, self.sites[place:], matrix, weight, most)
        swept = lin.sweeps - before
        return f"through {len(self.sites)} outputs of layers, {swept} sweeps{self.ordinary.add(matrix, weight, most)}"

    def diagonal(self, most: int) -> tuple[Tensor, str]:
        """Return the diagonal and how it was found: each site is swept for itself and for others that share with it."""
        lin, second = self.second.lin, self.second
        before, sites = lin.sweeps, pairable(self.sites, lin.domain.slices)
        diagonal = torch.zeros(lin.domain.dim, dtype=lin.domain.dtype, device=lin.domain.device)
        for place, site in enumerate(sites):
            if second.delta(site) is not None:
                some = together(sites[place:])
                for chunk in _chunks(some, _operands(second, some), most):
                    for later, found in _found(second, some, *_swept(second, some, chunk)):
                        add_pairs(diagonal, site, chunk, later, found)
        swept = lin.sweeps - before
        beside = ByProducts.beside(lin, leaves_of(sites), self.ordinary.rows).add_diagonal(diagonal, most)
        return diagonal, f"through {len(sites)} outputs of layers, {swept} sweeps{beside}"

    def working(self, most: int) -> float:
        """Return the bytes that the largest round holds."""
        live = [i for i, site in enumerate(self.sites) if self.second.delta(site) is not None]
        if not live:
            return self.ordinary.working(most)
        place = max(live, key=lambda i: self._held(i, most))
        return max(self._round(place, most), self.ordinary.working(most))

    def _held(self, place: int, most: int) -> int:
        sites = self.sites[place:]
        chunk = next(_chunks(sites, _operands(self.second, sites), most))
        positions, channels = chunk.positions, chunk.channels
        entries = (positions.stop - positions.start) * (channels.stop - channels.start)
        return entries * (sites[0].many * sum(s.entries for s in sites) + _operands(self.second, sites))

    @restoring
    def _round(self, place: int, most: int) -> float:
        second, sites = self.second, self.sites[place:]
        chunk = next(_chunks(sites, _operands(second, sites), most))
        space, like = second.lin.domain, second.deltas[sites[0].node]
        if like is None:
            return 0.0
        nowhere = torch.empty(space.dim, space.dim, dtype=space.dtype, device="meta")
        with Rehearsal() as meter:
            seconds, moved = _places(second, sites, chunk, like.to("meta"))
            arrays = meter.live
            _add_found(second, shadows(sites), chunk, (seconds, moved), nowhere, 1.0)
        return max(meter.peak, arrays + self._sweep)

    @cached_property
    @restoring
    def _sweep(self) -> float:
        """Bytes that one sweep holds, measured."""
        first = next(i for i, site in enumerate(self.sites) if self.second.delta(site) is not None)
        sites = self.sites[first:]
        site, like = sites[0], self.second.deltas[sites[0].node]
        with Meter() as meter:
            seeds = site.picking([(0, 0)] * _at_once(self.second, sites), like)  # type: ignore[arg-type]
            self.second.sweep([(site, seeds)], sites, self.second.moving(sites[1:]))
        return float(meter.peak)


@restoring
def describable(lin: Linearization) -> list[LayerOutput]:
    """Return the sites of all leaves that are described everywhere, in the order in which they ran."""
    uses = find_uses(lin) if is_plain(lin) else {}
    with sweeping(lin.outputs[0]):
        # An operand that is itself a leaf moves with it directly, not through the output of any layer.
        bare = {i for i, found in uses.items() for use in found if moves(use) and _is_leaf(use.attached)}
    empty = {i for i, found in uses.items() if not all(use.shape.numel() for use in found)}
    empty |= {i for i, where in enumerate(lin.domain.slices) if where.stop == where.start}
    return find_sites({i: found for i, found in uses.items() if i not in bare | empty})


def is_plain(lin: Linearization) -> bool:
    """Return whether everything has one dtype, in which sums over samples keep their digits."""
    return {*lin.domain.dtypes, *lin.codomain.dtypes} in ({torch.float32}, {torch.float64})


def _is_leaf(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_leaf


def _add_site(second: Second, sites: Sequence[LayerOutput], matrix: Tensor, weight: float, most: int) -> None:
    """Add the rows of the first site's parameters against its own and all later ones'."""
    for chunk in _chunks(sites, _operands(second, sites), most):
        _add_found(second, sites, chunk, _swept(second, sites, chunk), matrix, weight)


def _operands(second: Second, sites: Sequence[LayerOutput]) -> int:
    return sum(second.probes[id(use)].numel() for use in second.moving(sites[1:]))


def _add_found(
    second: Second,
    sites: Sequence[LayerOutput],
    chunk: Chunk,
    swept: tuple[list[Tensor], dict[int, Tensor]],
    matrix: Tensor,
    weight: float,
) -> None:
    for later, found in _found(second, sites, *swept):
        add_blocks(matrix, sites[0], chunk, later, found, weight)


def _found(
    second: Second, sites: Sequence[LayerOutput], seconds: Sequence[Tensor], moved: dict[int, Tensor]
) -> Iterator[tuple[LayerOutput, Found]]:
    """Yield sites with what the sweeps of a chunk found there."""
    for later, k in zip(sites, seconds, strict=True):
        delta = second.deltas[later.node]
        own_moves = {id(use): moved[id(use)] for use in later.uses if id(use) in moved}
        spread = later.spread(delta.detach().to(k.device)) if own_moves and delta is not None else None
        yield later, Found(k, own_moves, spread)


def _chunks(sites: Sequence[LayerOutput], operands: int, most: int) -> Iterator[Chunk]:
    """Yield the entries of the first site in rounds that fit in memory, with the blocks they lead to."""
    site = sites[0]
    swept = site.many * sum(s.entries for s in sites) + operands
    collapsed = site.many * max((p.size for s in sites if s.positions > 1 for p in s.panels), default=0)
    fit = max(1, most // max(1, swept, collapsed))
    positions = min(site.positions, fit)
    channels = min(site.channels, max(1, fit // positions))
    for t in range(0, site.positions, positions):
        for c in range(0, site.channels, channels):
            where = slice(t, min(t + positions, site.positions)), slice(c, min(c + channels, site.channels))
            yield Chunk(*where, most)


def _places(
    second: Second, sites: Sequence[LayerOutput], chunk: Chunk, like: Tensor
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Return where a chunk's sweeps are written: by site, and by use for operands that move."""
    many = (sites[0].many, chunk.positions.stop - chunk.positions.start, chunk.channels.stop - chunk.channels.start)
    seconds = [like.new_empty(*many, s.positions, s.channels) for s in sites]
    homes = {id(use): s for s in sites for use in s.uses}
    moved: dict[int, Tensor] = {}
    for use in second.moving(sites[1:]):
        one = second.probes[id(use)].detach().to("meta").unsqueeze(0)
        moved[id(use)] = like.new_zeros(*many, *operand_by_sample(homes[id(use)], use, one).shape[2:])
    return seconds, moved


def _swept(second: Second, sites: Sequence[LayerOutput], chunk: Chunk) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Sweep for every entry of the chunk, all samples at once."""
    site, like = sites[0], second.deltas[sites[0].node]
    if like is None:
        raise ValueError("a site without a cotangent has nothing to sweep")
    homes, moving = {id(use): s for s in sites for use in s.uses}, second.moving(sites[1:])
    seconds, moved = _places(second, sites, chunk, like.detach())
    met: set[int] = set()
    positions, channels = (range(where.start, where.stop) for where in (chunk.positions, chunk.channels))
    entries, step = [(t, c) for t in positions for c in channels], _at_once(second, sites)
    for start in range(0, len(entries), step):
        some = entries[start : start + step]
        found, operands = second.sweep([(site, site.picking(some, like))], sites, moving)
        where = slice(start, start + len(some))
        for s, into, grad in zip(sites, seconds, found, strict=True):
            _put(into.flatten(1, 2)[:, where], None if grad is None else s.spread(grad).transpose(0, 1))
        for use, grad in zip(moving, operands, strict=True):
            if grad is not None:
                met.add(id(use))
                rows = operand_by_sample(homes[id(use)], use, grad)
                moved[id(use)].flatten(1, 2)[:, where] = rows.transpose(0, 1)
    return seconds, {use: moves for use, moves in moved.items() if use in met}


def _at_once(second: Second, sites: Sequence[LayerOutput]) -> int:
    """Return how many entries of the first site share a pass."""
    return at_once(sites[0].many * sum(s.entries for s in sites) + _operands(second, sites))


def _put(into: Tensor, value: Tensor | None) -> None:
    if value is None:
        into.zero_()
    else:
        into.copy_(value)


def operand_by_sample(site: LayerOutput, use: ParameterUse, operand: Tensor) -> Tensor:
    """Return what is shaped `(m, *as a use's operand)` as `(m, samples, …)`."""
    return site.by_sample(operand, 1) if use.kind == "outer" else site.spread(operand)


# ---- do samples mix? -----------------------------------------------------------------------------------------------


def _proved(second: Second, sites: Sequence[LayerOutput], many: int) -> list[LayerOutput]:
    """Return the sites at which second derivatives keep samples apart, with the layouts in which they do."""
    proofs, slices = second.lin.proofs, second.lin.domain.slices
    route = (Fact.LAYERS_APART, many, len(sites))
    known: dict[int, int] | None = None if proofs.needs(*route) else proofs.known.get(route)
    if known is not None:
        return settled(laid(sites, many, known), slices)
    kept = torch.randperm(many, generator=torch.Generator().manual_seed(0)) < (many + 1) // 2
    for ahead in (1, 0):
        found = _layouts(second, sites, many, kept, ahead)
        if found:
            placed = laid(sites, many, found)
            if _apart(second, placed, kept):
                proofs.known[route] = found
                proofs.remember(*route)
                return settled(placed, slices)
    return []


def laid(sites: Sequence[LayerOutput], many: int, layouts: dict[int, int]) -> list[LayerOutput]:
    lost = {use.leaf for i, site in enumerate(sites) for use in site.uses if i not in layouts}
    return without([LayerOutput(s.uses, many, layouts.get(i, 1)) for i, s in enumerate(sites)], lost)


def _layouts(second: Second, sites: Sequence[LayerOutput], many: int, kept: Tensor, which: int) -> dict[int, int]:
    """Return for each site how its entries belong to samples, by a sweep from one of them."""
    options = [site.layouts(many) for site in sites]
    live = [i for i, site in enumerate(sites) if options[i] and second.delta(site) is not None]
    if not live:
        return {}
    anchor = max(live, key=lambda i: (len(options[i]) == 1, i))
    laid = LayerOutput(sites[anchor].uses, many, options[anchor][0 if which else -1])
    found, moved = second.once([(laid, _masked(laid, second, kept))], sites)
    layouts: dict[int, int] = {}
    for i, (site, grad) in enumerate(zip(sites, found, strict=True)):
        for ahead in options[i]:
            if _is_apart(LayerOutput(site.uses, many, ahead), grad, moved, kept):
                layouts[i] = ahead
                break
    return layouts


def _apart(second: Second, sites: Sequence[LayerOutput], kept: Tensor) -> bool:
    seeds = [(site, _masked(site, second, kept)) for site in sites if second.delta(site) is not None]
    found, moved = second.once(seeds, sites)
    return all(_is_apart(site, grad, moved, kept) for site, grad in zip(sites, found, strict=True))


def _masked(site: LayerOutput, second: Second, kept: Tensor) -> Tensor:
    """Return noise at a site's output on some of the samples, zero on the others."""
    delta = second.deltas[site.node]
    like = torch.empty(site.many, site.positions, site.channels, dtype=torch.float32 if delta is None else delta.dtype)
    noise = private_noise(like) * kept.to(like.dtype).view(-1, 1, 1)
    return site.gathered(noise.to(second.lin.domain.device))


def _is_apart(site: LayerOutput, grad: Tensor | None, moved: dict[int, Tensor | None], kept: Tensor) -> bool:
    """Return whether nothing arrived at the samples that were left out."""
    parts = [] if grad is None else [site.spread(grad)]
    parts += [operand_by_sample(site, u, g[None])[0] for u in site.uses if (g := moved.get(id(u))) is not None]
    return not any(bool(part[~kept.to(part.device)].any()) for part in parts)
