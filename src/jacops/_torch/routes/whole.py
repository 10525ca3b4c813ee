"""Whole parameter Jacobians by where parameters enter, written in place: a sweep per entry of one sample's output.

Cotangents of some sweeps are kept until their rows are written together. How many fit is known from the bytes that the
first sweep takes, whose cotangents are rows already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..._cached import cached_property
from ..._ladder.failures import RouteFailedError, RouteNotFiniteError, RouteWrongError
from ..._ladder.names import RouteName
from ..._ladder.plan import Cost, Memory
from ..._progress import track
from ..._runtime.agreement import as_rows, worst_disagreement
from ..._runtime.contexts import private_noise
from ..._runtime.memory import Meter, size_of
from ..._runtime.restoring import restoring
from ..._runtime.rows import plain
from ..layers.factors import LayerRows, add_rows, unit_seeds
from ..layers.part import WRITTEN, matrix_shape
from ..sweeps.linearization import Linearization
from .whole_ask import Blocks, WholeAsk, WholeBlocks

_NOT_COVERED = "samples mix, or a parameter enters by an operation without a rule"
_KEPT = 2**21  # bytes of cotangents that wait: more are not faster


@dataclass(frozen=True)
class LayerNeeds:
    """Bytes of tensors that are alive beside the graph and the result.

    Attributes:
        operands: What multiplies the parameters, where it is not in the graph already.
        sweep: Most in a sweep, its cotangents included.
        each: Cotangents of a sweep.
        formed: Rows of a sweep that are formed elsewhere before they are written, at most.
        check: Most in the plain sweep that proves the route where it is new, else 0.
    """

    operands: int
    sweep: int
    each: int
    formed: int
    check: int

    def live(self, sweeps: int) -> int:
        """Return the bytes alive at once when so many sweeps are written together."""
        kept = self.each * sweeps if sweeps > 1 else 0
        return self.operands + max(self.check, kept + max(self.sweep, self.each + min(WRITTEN, self.formed * sweeps)))

    def most(self, sweeps: int, room: float) -> int:
        """Return how many sweeps, of so many wanted, can be written together within `room` bytes; 0 if not one."""
        return next((many for many in range(sweeps, 0, -1) if self.live(many) <= room), 0)


class LayerRoute:
    """A way to whole Jacobians, for a model's output by its parameters.

    Args:
        lin: Output, first axis samples, by parameters.
        layers: Its uses, every parameter covered.

    Attributes:
        sweeps: How many there are.
    """

    def __init__(self, lin: Linearization, layers: LayerRows) -> None:
        self.lin, self._layers = lin, layers
        self._output = lin.outputs[0]
        self.sweeps = self._output.shape[1:].numel()
        self._leaves = list(layers.by_leaf)
        self._first: list[Tensor] | None = None
        self._sizes: dict[int, Tensor] = {}  # norms of operands, where they are requested

    @cached_property
    def _operands(self) -> list[Tensor | None]:
        return [site.sample_operand() for site in self._layers.sites]

    @cached_property
    @restoring
    def needs(self) -> LayerNeeds:
        """What it takes, measured with the first sweep.

        Raises:
            RouteFailedError: Torch cannot take it.
        """
        with Meter() as meter:
            _ = self._operands
            operands, meter.peak = meter.live, meter.live
            self._first = self._layers.sweep([next(unit_seeds(self._output))])
        check = 0
        if self._is_new():
            with Meter() as plainly:
                self.lin.pull([torch.zeros_like(self._output)])
            check = plainly.peak
        many = self._output.shape[0]
        formed = [
            many * size_of(self.lin.leaves[site.leaf])
            for site, delta in zip(self._layers.sites, self._first, strict=True)
            if delta.shape[1] > 1 and site.kind != "lookup"
        ]
        each = sum(size_of(delta) for delta in self._first)
        return LayerNeeds(operands, meter.peak - operands, each, max(formed, default=0), check)

    def together(self, room: float | None) -> int:
        """Return how many sweeps to write together within `room` bytes beside the graph; 0 if not even one fits."""
        each = sum(size.numel() for size in (site.shape for site in self._layers.sites))
        wanted = max(1, min(self.sweeps, _KEPT // max(1, each * self._output.dtype.itemsize)))
        if room is None:
            return wanted
        return self.needs.most(wanted, room) if self._least < room else 0

    @property
    def _least(self) -> int:
        """Bytes that it takes for certain: cotangents at all sites, and patches under kernels."""
        uses = self._layers.sites
        at_sites = {use.node: use.shape.numel() * use.dtype.itemsize for use in uses}
        return sum(at_sites.values()) + sum(use.patch_bytes for use in uses)

    def _is_new(self) -> bool:
        return self.lin.proofs.needs(RouteName.BY_LAYERS, BlocksMatchPlain.name, self.lin.domain.names)

    # ---- running it --------------------------------------------------------------------------------------------

    def filled(self, together: int, into: Blocks | None) -> WholeBlocks:
        """Return the Jacobians.

        Args:
            together: Sweeps that are written together.
            into: Where to write, `J[0][leaf]`; the result then is this very list.
        """
        lin, many = self.lin, self._output.shape[0]
        blocks = into or [[leaf.detach().new_empty(many * self.sweeps, *leaf.shape) for leaf in lin.leaves]]
        pairs = zip(blocks[0], lin.leaves, strict=True)
        views = [block.view(many, self.sweeps, *matrix_shape(leaf.shape)) for block, leaf in pairs]
        bounds: list[Tensor] = []
        start = 0
        for deltas in self._swept(together):
            where = slice(start, start + together)
            for leaf, sites in self._leaves:
                target = views[leaf][:, where]
                add_rows(self._layers, self._operands, deltas, sites, target)
                bounds += self._bounds(sites, deltas, target)
            start = where.stop
            del deltas  # before the next sweep, not after it
        smallest = min(torch.finfo(leaf.dtype).max for leaf in lin.leaves)
        return WholeBlocks(blocks, bool(torch.stack(bounds).sum() < smallest))

    def _swept(self, together: int) -> Iterator[list[Tensor]]:
        """Yield cotangents of some sweeps at all sites, `(n, k, T, …)`."""
        seeds, total = unit_seeds(self._output), self.sweeps
        for start in track(range(0, total, together), self.lin.call):
            many = min(together, total - start)
            if many == 1:
                yield [delta.unsqueeze(1) for delta in self._sweep(next(seeds))]
                continue
            kept: list[Tensor] = []
            for entry, seed in enumerate(islice(seeds, many)):
                deltas = self._sweep(seed)
                kept = kept or [_room(delta, many) for delta in deltas]
                for place, delta in zip(kept, deltas, strict=True):
                    place[:, entry] = delta
            yield kept

    def _sweep(self, seed: Tensor) -> list[Tensor]:
        found, self._first = self._first, None
        return found or self._layers.sweep([seed])

    def _bounds(self, sites: Sequence[int], deltas: Sequence[Tensor], target: Tensor) -> Iterator[Tensor]:
        """Yield numbers of which one is beyond all bounds if an entry is, from factors or rows: which are fewer."""
        derived = any(self._layers.sites[i].derived for i in sites)
        if derived or 2 * sum(deltas[i].numel() for i in sites) > target.numel():
            yield target.sum().abs().double()
            return
        # No entry is larger than the product of its factors' norms; a sum of T numbers not than T times their norm.
        for i in sites:
            yield (deltas[i].shape[2] * torch.linalg.vector_norm(deltas[i]) * self._size(i)).double()

    def _size(self, i: int) -> Tensor | float:
        """Return the norm of what multiplies a parameter; 1 where there is nothing, or indices."""
        operand = self._operands[i]
        if operand is None or not operand.is_floating_point():
            return 1.0
        if i not in self._sizes:
            self._sizes[i] = torch.linalg.vector_norm(operand)
        return self._sizes[i]


def _room(delta: Tensor, many: int) -> Tensor:
    """Return room for cotangents `(n, T, …)` of many sweeps, `(n, many, T, …)`, positions innermost where they are."""
    n, positions, *rest = delta.shape
    if len(rest) == 2 and positions > 1 and delta.stride(1) == 1:
        return delta.new_empty(n, many, *rest, positions).permute(0, 1, 4, 2, 3)
    return delta.new_empty(n, many, positions, *rest)


class BlocksMatchPlain:
    """The rows, mixed at random, are what one plain sweep gives."""

    name, always = "matches plain", False

    def evidence(self, route: Any, ask: WholeAsk, found: WholeBlocks) -> bool:
        """Return whether they are.

        Raises:
            RouteWrongError: They are not.
            RouteNotFiniteError: Values are not finite.
        """
        error = _disagreement(ask.lin, found.blocks[0])
        if math.isnan(error):
            raise RouteNotFiniteError("values are not finite")
        if not error <= ask.lin.tolerance:
            raise RouteWrongError(f"the blocks disagree with a plain sweep by {error:.1e}")
        return True


class WholeByLayers:
    """All samples to a sweep, where every parameter enters by operations with a rule."""

    name, claims, leaving, unit = RouteName.BY_LAYERS, (BlocksMatchPlain(),), "silent", "sweeps to a write"

    def refuses(self, ask: WholeAsk) -> str | None:
        """It takes an output with samples first, all parameters covered, and memory for one sweep."""
        if ask.create_graph or not ask.layers:
            return ""
        return None if self._together(ask) else "more than the budget"

    def _route(self, ask: WholeAsk) -> LayerRoute:
        return ask.kept("layers", lambda: LayerRoute(ask.lin, _covering(ask.lin)))

    def _together(self, ask: WholeAsk) -> int:
        """Return how many sweeps are written together; 0 where not even one fits."""
        return ask.kept("together", lambda: self._route(ask).together(None if ask.is_small else ask.room))

    def cost(self, ask: WholeAsk) -> Cost:
        """A sweep per entry of one sample's output."""
        route = ask.known("layers")
        memory = partial(self._memory, ask) if ask.known("together") else None
        return Cost(route.sweeps if route else math.inf, memory)

    def _memory(self, ask: WholeAsk) -> Memory:
        together, held = self.held(ask)
        return Memory(together, ask.peak(held))

    def held(self, ask: WholeAsk) -> tuple[int, int]:
        """Return how many sweeps are written together, and the bytes held meanwhile beside the graph."""
        together = self._together(ask)
        return together, self._route(ask).needs.live(together)

    def describe(self, ask: WholeAsk) -> str:
        """Name the number of samples."""
        return f"all {ask.lin.outputs[0].shape[0]} samples to a sweep, by where parameters enter"

    def value(self, ask: WholeAsk) -> WholeBlocks:
        """Return the blocks, and whether it is certain that they are finite.

        Raises:
            RouteFailedError: Torch cannot take the sweeps.
        """
        return self._route(ask).filled(self._together(ask), ask.into)


def _covering(lin: Linearization) -> LayerRows:
    """Return the uses of all parameters.

    Raises:
        RouteFailedError: One enters by an operation without a rule, or samples mix, or there is only one.
    """
    output = lin.outputs[0] if len(lin.outputs) == 1 and lin.leaves else torch.empty(())
    if output.ndim and output.shape[0] > 1 and output.numel() and output.requires_grad and not output.is_complex():
        layers = LayerRows(lin, output.shape[0])
        if layers.sites and not layers.missing:
            return layers
    raise RouteFailedError(_NOT_COVERED)


def _disagreement(lin: Linearization, blocks: Sequence[Tensor]) -> float:
    """Return how far the blocks are from a plain sweep over a random cotangent."""
    (output,) = lin.outputs
    seed = private_noise(output)
    pairs = []
    for block, leaf, grad in zip(blocks, lin.leaves, lin.pull([seed]), strict=True):
        found = (seed.reshape(1, -1).to(block.dtype) @ as_rows(block)).view(leaf.shape)
        pairs.append((found, torch.zeros_like(leaf) if grad is None else plain(grad)))
    return worst_disagreement(pairs)
