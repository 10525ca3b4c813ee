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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..agreement import worst_disagreement
from ..ladder import RouteFailedError, attempt
from ..surroundings import private_noise, sweeping
from ..tape import Tape
from .blocks import Chunk, Found, add_blocks, mirror
from .sites import Site, costly, find_sites, pays, settled, without
from .uses import Use, find_uses

_ENTRIES = 2**22
_ROWS = 64

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ByLayers:
    """A curvature matrix by layers, held against a product with a random direction before it is believed.

    Attributes:
        tape: What was recorded: the loss, or the model's output.
        name: Under which trust in this route is remembered.
        add: Adds a half, X with X + Xᵀ the curvature, times a weight to a matrix, and says how; None if it cannot.
        rows: Products with the same operator by ordinary sweeps.
        routes: Where to note how it was done.
    """

    tape: Tape
    name: str
    add: Callable[[Tensor, float], str | None]
    rows: Rows
    routes: dict[str, str]

    def write(self, matrix: Tensor) -> bool:
        """Fill a matrix; False, with nothing of use in it, where this does not apply or does not agree."""
        matrix.zero_()
        return self._added(matrix, 1.0) and mirror(matrix) is matrix

    def add_half(self, matrix: Tensor, weight: float = 1.0) -> bool:
        """Add X times `weight` in place; False, with the matrix as it was, where this does not apply."""
        if not self._is_fresh():
            return self._added(matrix, weight)
        first = torch.zeros_like(matrix)
        if not self._added(first, 1.0):
            return False
        matrix.add_(first, alpha=weight)
        return True

    def _is_fresh(self) -> bool:
        habits = self.tape.trust.notes.get("habits")
        return self.tape.trust.needs(self.name) or bool(habits is not None and habits.reads)

    def _added(self, matrix: Tensor, weight: float) -> bool:
        trust = self.tape.trust
        if trust.refused("dense", self.name):
            return False
        fresh, route = self._is_fresh(), None
        try:
            found: list[str | None] = []
            attempt(lambda: (found.append(self.add(matrix, weight)), ())[1])
            route = found[0]
        except RouteFailedError:
            if not fresh:
                raise
        error = self._error(matrix) if fresh and route is not None else 0.0
        if route is None or not error <= self.tape.tolerance:
            if math.isfinite(error):
                trust.refuse("dense", self.name)
            return False
        trust.remember(self.name)
        self.routes["dense"] = route
        return True

    def _error(self, half: Tensor) -> float:
        """Return how far the matrix is from ordinary sweeps along a random direction, parameter by parameter."""
        space = self.tape.domain
        direction = private_noise(half[0], seed=7)
        found, expected = half @ direction + direction @ half, self.rows(direction.unsqueeze(0))[0]
        return worst_disagreement([(found[where], expected[where]) for where in space.slices])


# ---- second derivatives at the outputs of layers -------------------------------------------------------------------


class Second:
    """Cotangents at sites, with a graph, and sweeps over them.

    Operands that move are paired with cotangents that are zero: the derivative of `delta` by such a cotangent is the
    derivative of the operand by the site's output, so one sweep gives both.
    """

    def __init__(self, tape: Tape, sites: Sequence[Site]) -> None:
        self.tape = tape
        with sweeping(tape.outputs[0]):
            moving = [use for site in sites for use in site.uses if _moves(use)]
            attached = [use.attached for use in moving if use.attached is not None]
            zeros = [torch.zeros_like(a).requires_grad_() for a in attached]
            found = torch.autograd.grad(
                [*tape.outputs, *attached],
                [site.edge for site in sites],
                [*map(torch.ones_like, tape.outputs), *zeros],
                create_graph=True,
                allow_unused=True,
            )
        tape.sweeps += 1
        self.deltas = {site.node: delta for site, delta in zip(sites, found, strict=True)}
        self.probes = {id(use): zero for use, zero in zip(moving, zeros, strict=True)}

    def delta(self, site: Site) -> Tensor | None:
        """Return the cotangent at a site where it moves with anything."""
        delta = self.deltas[site.node]
        return delta if delta is not None and delta.requires_grad else None

    def sweep(
        self, seeds: Sequence[tuple[Site, Tensor]], sites: Sequence[Site], uses: Sequence[Use]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the derivatives of seeded cotangents by the outputs of sites, and of operands of uses transposed."""
        live = [(delta, seed) for site, seed in seeds if (delta := self.delta(site)) is not None]
        if not live:
            return [None] * len(sites), [None] * len(uses)
        self.tape.sweeps += 1
        with sweeping(live[0][0]):
            edges = [site.edge for site in sites]
            edges += [get_gradient_edge(self.probes[id(use)]) for use in uses]
            outputs, cotangents = [delta for delta, _ in live], [seed for _, seed in live]
            found = torch.autograd.grad(outputs, edges, cotangents, retain_graph=True, allow_unused=True)
        return list(found[: len(sites)]), list(found[len(sites) :])

    def moving(self, sites: Sequence[Site]) -> list[Use]:
        """Return the uses whose operands move."""
        return [use for site in sites for use in site.uses if id(use) in self.probes]


def _moves(use: Use) -> bool:
    return use.kind != "lookup" and use.attached is not None and use.attached.requires_grad


def add_hessian(tape: Tape, lengths: Sequence[int], rows: Rows, matrix: Tensor, weight: float) -> str | None:
    """Add half of the Hessian of a recorded loss, times `weight`, to `matrix`.

    Args:
        tape: The loss by its parameters.
        lengths: How many samples there may be: what to try.
        rows: Products with the Hessian by ordinary sweeps.
        matrix: (P, P).
        weight: What to multiply by.

    Returns:
        How it was done, or None, with nothing added, if no parameter gains.
    """
    sites = describable(tape)
    if not sites:
        return None
    second, before = Second(tape, sites), tape.sweeps
    for count in dict.fromkeys((*lengths, 1)):
        found = _proved(second, sites, count) if count > 1 else settled(sites, tape.domain.slices)
        found = costly(found, tape.domain.sizes) if found else []
        if found:
            break
    else:
        return None
    if not pays(found, tape.domain.sizes, sum(site.entries for site in found)):
        return None
    for place, site in enumerate(found):
        if second.delta(site) is not None:
            _add_site(second, found[place:], matrix, weight)
    swept = tape.sweeps - before
    left = add_ordinary(tape, found, rows, matrix, weight)
    return f"through {len(found)} outputs of layers, {swept} sweeps{left}"


def describable(tape: Tape) -> list[Site]:
    """Return the sites of all leaves that are described everywhere, in the order in which they ran."""
    dtypes = {*tape.domain.dtypes, *tape.codomain.dtypes}
    uses = find_uses(tape) if dtypes in ({torch.float32}, {torch.float64}) else {}
    with sweeping(tape.outputs[0]):
        # An operand that is itself a leaf moves with it directly, not through the output of any layer.
        bare = {i for i, found in uses.items() for use in found if _moves(use) and _is_leaf(use.attached)}
    empty = {i for i, found in uses.items() if not all(use.shape.numel() for use in found)}
    empty |= {i for i, where in enumerate(tape.domain.slices) if where.stop == where.start}
    return find_sites({i: found for i, found in uses.items() if i not in bare | empty})


def _is_leaf(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_leaf


def _add_site(second: Second, sites: Sequence[Site], matrix: Tensor, weight: float) -> None:
    """Add the rows of the first site's parameters against its own and all later ones'."""
    site, moving = sites[0], second.moving(sites[1:])
    operands = sum(second.probes[id(use)].numel() for use in moving)
    for chunk in _chunks(sites, operands):
        seconds, moved = _swept(second, sites, moving, chunk)
        for later, k in zip(sites, seconds, strict=True):
            delta = second.deltas[later.node]
            mine = {id(use): moved[id(use)] for use in later.uses if id(use) in moved}
            spread = later.spread(delta.detach()) if mine and delta is not None else None
            add_blocks(matrix, site, chunk, later, Found(k, mine, spread), weight)


def _chunks(sites: Sequence[Site], operands: int) -> Iterator[Chunk]:
    """Yield the entries of the first site in rounds that fit in memory, with the blocks they lead to."""
    site = sites[0]
    swept = site.many * sum(s.entries for s in sites) + operands
    collapsed = site.many * max((p.size for s in sites if s.positions > 1 for p in s.panels), default=0)
    fit = max(1, _ENTRIES // max(1, swept, collapsed))
    positions = min(site.positions, fit)
    channels = min(site.channels, max(1, fit // positions))
    for t in range(0, site.positions, positions):
        for c in range(0, site.channels, channels):
            yield Chunk(slice(t, min(t + positions, site.positions)), slice(c, min(c + channels, site.channels)))


def _swept(
    second: Second, sites: Sequence[Site], moving: Sequence[Use], chunk: Chunk
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Sweep once per entry of the chunk, all samples at once."""
    site, like = sites[0], second.deltas[sites[0].node]
    if like is None:
        raise ValueError("a site without a cotangent has nothing to sweep")
    homes = {id(use): s for s in sites for use in s.uses}
    many = (site.many, chunk.positions.stop - chunk.positions.start, chunk.channels.stop - chunk.channels.start)
    seconds = [like.new_empty(*many, s.positions, s.channels) for s in sites]
    moved: dict[int, Tensor] = {}
    seed = torch.zeros(site.many, site.positions, site.channels, dtype=like.dtype, device=like.device)
    for i, t in enumerate(range(chunk.positions.start, chunk.positions.stop)):
        for j, c in enumerate(range(chunk.channels.start, chunk.channels.stop)):
            seed[:, t, c] = 1
            found, operands = second.sweep([(site, site.gathered(seed))], sites, moving)
            for s, into, grad in zip(sites, seconds, found, strict=True):
                _put(into[:, i, j], None if grad is None else s.spread(grad))
            for use, grad in zip(moving, operands, strict=True):
                if grad is not None:
                    moves = operand_by_sample(homes[id(use)], use, grad)
                    if id(use) not in moved:
                        moved[id(use)] = like.new_zeros(*many, *moves.shape[1:])
                    moved[id(use)][:, i, j] = moves
            seed[:, t, c] = 0  # only now: what came back may be this very tensor
    return seconds, moved


def _put(into: Tensor, value: Tensor | None) -> None:
    if value is None:
        into.zero_()
    else:
        into.copy_(value)


def operand_by_sample(site: Site, use: Use, operand: Tensor) -> Tensor:
    """Return what is shaped like a use's operand by samples."""
    return site.by_sample(operand) if use.kind == "outer" else site.spread(operand)


def add_ordinary(tape: Tape, sites: Sequence[Site], rows: Rows, matrix: Tensor, weight: float) -> str:
    """Add the rows of all parameters that no site describes, by ordinary sweeps; say how many."""
    space = tape.domain
    described = {use.leaf for site in sites for use in site.uses}
    lost = [where for i, where in enumerate(space.slices) if i not in described and where.stop > where.start]
    share = torch.full((space.dim,), weight, dtype=matrix.dtype, device=matrix.device)
    for where in lost:
        share[where] *= 0.5
    for where in lost:
        for start in range(where.start, where.stop, _ROWS):
            some = slice(start, min(start + _ROWS, where.stop))
            unit = torch.zeros(some.stop - start, space.dim, dtype=matrix.dtype, device=matrix.device)
            unit[:, some].fill_diagonal_(1)
            matrix[some] += rows(unit) * share
    many = sum(where.stop - where.start for where in lost)
    return f"; {many} of {space.dim} parameters by ordinary sweeps" if many else ""


# ---- do samples mix? -----------------------------------------------------------------------------------------------


def _proved(second: Second, sites: Sequence[Site], many: int) -> list[Site]:
    """Return the sites at which second derivatives keep samples apart, with the layouts in which they do."""
    trust, slices = second.tape.trust, second.tape.domain.slices
    known: dict[int, int] | None = trust.notes.get("apart") if trust.checks == "first" else None
    if known is not None and trust.notes.get("apart of") == (many, len(sites)):
        return settled(laid(sites, many, known), slices)
    kept = torch.randperm(many, generator=torch.Generator().manual_seed(0)) < (many + 1) // 2
    for ahead in (1, 0):
        found = _layouts(second, sites, many, kept, ahead)
        if found:
            placed = laid(sites, many, found)
            if _apart(second, placed, kept):
                trust.notes["apart"], trust.notes["apart of"] = found, (many, len(sites))
                return settled(placed, slices)
    return []


def laid(sites: Sequence[Site], many: int, layouts: dict[int, int]) -> list[Site]:
    lost = {use.leaf for i, site in enumerate(sites) for use in site.uses if i not in layouts}
    return without([Site(s.uses, many, layouts.get(i, 1)) for i, s in enumerate(sites)], lost)


def _layouts(second: Second, sites: Sequence[Site], many: int, kept: Tensor, which: int) -> dict[int, int]:
    """Return for each site how its entries belong to samples, as a sweep from one of them says."""
    options = [site.layouts(many) for site in sites]
    live = [i for i, site in enumerate(sites) if options[i] and second.delta(site) is not None]
    if not live:
        return {}
    anchor = max(live, key=lambda i: (len(options[i]) == 1, i))
    laid = Site(sites[anchor].uses, many, options[anchor][0 if which else -1])
    uses = second.moving(sites)
    found, operands = second.sweep([(laid, _masked(laid, second, kept))], sites, uses)
    moved = {id(use): grad for use, grad in zip(uses, operands, strict=True)}
    layouts: dict[int, int] = {}
    for i, (site, grad) in enumerate(zip(sites, found, strict=True)):
        for ahead in options[i]:
            if _is_apart(Site(site.uses, many, ahead), grad, moved, kept):
                layouts[i] = ahead
                break
    return layouts


def _apart(second: Second, sites: Sequence[Site], kept: Tensor) -> bool:
    uses = second.moving(sites)
    seeds = [(site, _masked(site, second, kept)) for site in sites if second.delta(site) is not None]
    found, operands = second.sweep(seeds, sites, uses)
    moved = {id(use): grad for use, grad in zip(uses, operands, strict=True)}
    return all(_is_apart(site, grad, moved, kept) for site, grad in zip(sites, found, strict=True))


def _masked(site: Site, second: Second, kept: Tensor) -> Tensor:
    """Return noise at a site's output on some of the samples, zero on the others."""
    delta = second.deltas[site.node]
    like = torch.empty(site.many, site.positions, site.channels, dtype=torch.float32 if delta is None else delta.dtype)
    noise = private_noise(like) * kept.to(like.dtype).view(-1, 1, 1)
    return site.gathered(noise.to(second.tape.domain.device))


def _is_apart(site: Site, grad: Tensor | None, moved: dict[int, Tensor | None], kept: Tensor) -> bool:
    """Say whether nothing arrived at the samples that were left out."""
    parts = [] if grad is None else [site.spread(grad)]
    parts += [operand_by_sample(site, u, g) for u in site.uses if (g := moved.get(id(u))) is not None]
    return not any(bool(part[~kept.to(part.device)].any()) for part in parts)
