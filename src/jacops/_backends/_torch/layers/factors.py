"""Rows of a parameter Jacobian for every sample at once, from the places where parameters enter.

One sweep per output entry, shared by all samples, gives the cotangents at all uses of all parameters (`uses`); no
gradient of a weight is ever formed. That is right where samples do not mix, each use's rows belong to samples in a
known order, and every rule holds; exact zeros under a masked cotangent say the first, and a plain sweep over a random
cotangent the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..agreement import worst_disagreement
from ..ladder import RouteFailedError, attempt
from ..rows import plain
from ..surroundings import private_noise
from ..tape import Tape
from .parts import Lookup, Outer, Part, Rows
from .uses import Order, Use, by_sample, cotangents, find_orders, find_uses

Blocks = list[list[Tensor]]


@dataclass(frozen=True, eq=False)
class SampleUse:
    """A use whose rows are known to belong to samples.

    Attributes:
        use: Where a parameter enters.
        order: How its rows are laid out.
        samples: How many.
    """

    use: Use
    order: Order
    samples: int

    @property
    def _by_pixel(self) -> bool:
        """A convolution's first axis is the samples' own, so that nothing need be copied."""
        convolution = self.use.kind == "outer" and "Convolution" in self.use.node.name()
        return convolution and self.order == "sample first" and self.use.shape[0] == self.samples

    def operand(self) -> Tensor | None:
        """Return what multiplies the parameter, `(n, T, …)`."""
        if self._by_pixel:
            return self.use.patches()
        operand = None if self.use.kind == "vector" else self.use.operand
        return None if operand is None else by_sample(operand, self.samples, self.order)

    def delta(self, cotangent: Tensor) -> Tensor:
        """Return a cotangent at the use as `(n, T, …)`."""
        if self._by_pixel:
            return self.use.pixels(cotangent)
        return by_sample(self.use.rows(cotangent), self.samples, self.order)

    def part(self, operand: Tensor | None, delta: Tensor, shape: Sequence[int]) -> Part:
        """Return rows from cotangents `(n, k, T, …)`, the parameter seen as a matrix of this shape."""
        if self.use.kind == "vector":
            return Rows(delta.sum(2).view(*delta.shape[:2], *shape))
        if operand is None:
            raise ValueError("only vectors have no operand")
        return Outer(delta, operand, self.use.turned) if self.use.kind == "outer" else Lookup(delta, operand, shape[0])


class Layers:
    """The uses of a recorded model's parameters, sample by sample.

    Args:
        tape: A model's outputs, first axis samples, by its parameters; with one sample, anything of that sample.
        samples: How many.
        plainly: Take no parameter to be covered.

    Attributes:
        uses: All uses that were found.
        sites: Those of the leaves that are covered.
        missing: Leaves that enter in a way that has no rule, or whose rows could not be told apart.
    """

    def __init__(self, tape: Tape, samples: int, plainly: bool = False) -> None:
        self.tape, self.samples = tape, samples
        found = {} if plainly else find_uses(tape)
        self.uses = [use for leaf in sorted(found) for use in found[leaf]]
        orders = self._orders(self.uses)
        lost = {use.leaf for use, order in zip(self.uses, orders, strict=True) if order is None}
        # A parameter without entries has rows without entries, wherever it enters.
        self.missing = [j for j, t in enumerate(tape.leaves) if t.numel() and (j not in found or j in lost)]
        pairs = zip(self.uses, orders, strict=True)
        self.sites = [
            SampleUse(use, order, samples)
            for use, order in pairs
            if order and use.leaf not in lost and tape.leaves[use.leaf].numel()
        ]

    def _orders(self, uses: Sequence[Use]) -> Sequence[Order | None]:
        if self.samples == 1:
            alone: list[Order | None] = ["sample first"]  # any order is right
            return alone * len(uses)
        trust, key = self.tape.trust, f"orders of {len(uses)} uses of {self.tape.domain.names}"
        if key in trust.notes and not trust.needs(key):
            return trust.notes[key]
        found = attempt(lambda: find_orders(self.tape, uses)) if uses else []
        if None not in found:
            trust.notes[key] = found
            trust.remember(key)
        return found

    def sweep(self, seeds: Sequence[Tensor]) -> list[Tensor]:
        """Return `(n, T, …)` at every site by one sweep.

        Raises:
            RouteFailedError: Torch cannot take it.
        """
        self.tape.sweeps += bool(self.sites)
        found = attempt(lambda: cotangents(self.tape, [site.use for site in self.sites], seeds))
        return [site.delta(plain(delta)) for site, delta in zip(self.sites, found, strict=True)]

    def by_leaf(self) -> Iterator[tuple[int, list[int]]]:
        """Yield every covered leaf and which sites are its."""
        for leaf in range(len(self.tape.leaves)):
            if leaf not in self.missing:
                yield leaf, [i for i, site in enumerate(self.sites) if site.use.leaf == leaf]


def matrix_shape(leaf: Tensor) -> tuple[int, int]:
    """Return the parameter's first axis and the others laid end to end, as `Part` sees it."""
    long = leaf.shape[0] if leaf.ndim else 1
    return long, leaf.shape[1:].numel()


def add_rows(layers: Layers, operands: Sequence[Tensor | None], deltas: Sequence[Tensor], sites: Iterable[int],
             target: Tensor) -> None:  # fmt: skip
    """Write one leaf's rows for one output entry into `(n, 1, F, W)`."""
    add = False
    for i in sites:
        layers.sites[i].part(operands[i], deltas[i].unsqueeze(1), target.shape[2:]).into(target, add)
        add = True
    if not add:
        target.zero_()


# ---- whole matrices ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerBlocks:
    """Whole Jacobians by layers.

    Attributes:
        blocks: `J[0][leaf]`, `(n * k, *leaf)`.
        finite: The factors are so small that no entry can be NaN or Inf.
    """

    blocks: Blocks
    finite: bool


def by_layers(tape: Tape, into: Blocks | None = None) -> LayerBlocks | None:
    """Return the Jacobians where the route was or can be proved right; None elsewhere.

    Args:
        tape: A model's output, first axis samples, by its parameters.
        into: Where to write, `J[0][leaf]`; the result then is this very list.
    """
    if tape.trust.refused("pull", "by layers"):
        return None
    try:
        found = _whole(tape, into)
    except RouteFailedError:
        found = None
    if found is None or (tape.trust.needs("by layers", tape.domain.names) and not _confirmed(tape, found.blocks[0])):
        tape.trust.refuse("pull", "by layers")
        return None
    tape.trust.remember("by layers", tape.domain.names)
    tape.routes["pull"] = f"all {tape.outputs[0].shape[0]} samples to a sweep, by where parameters enter"
    return found


def _whole(tape: Tape, into: Blocks | None) -> LayerBlocks | None:
    if len(tape.outputs) != 1 or not tape.leaves:
        return None
    (output,) = tape.outputs
    if output.ndim < 1 or output.shape[0] < 2 or not output.requires_grad or output.is_complex():
        return None
    many, entries = output.shape[0], output.shape[1:].numel()
    layers = Layers(tape, many)
    if layers.missing or not layers.sites:
        return None
    blocks = into or [[leaf.detach().new_empty(many * entries, *leaf.shape) for leaf in tape.leaves]]
    pairs = zip(blocks[0], tape.leaves, strict=True)
    views = [block.view(many, entries, *matrix_shape(leaf)) for block, leaf in pairs]
    operands = [site.operand() for site in layers.sites]
    leaves, sizes = list(layers.by_leaf()), _sizes(operands)
    bound = torch.zeros((), dtype=torch.float64, device=output.device)
    for entry, seed in enumerate(unit_seeds(output)):
        deltas = layers.sweep([seed])
        # No entry is larger than the product of its factors' norms; a sum of T numbers not than T times their norm.
        bound += sum(d.shape[1] * a * b for d, a, b in zip(deltas, sizes, _sizes(deltas), strict=True))
        for leaf, sites in leaves:
            add_rows(layers, operands, deltas, sites, views[leaf][:, entry : entry + 1])
    smallest = min(torch.finfo(leaf.dtype).max for leaf in tape.leaves)
    return LayerBlocks(blocks, bool(bound < smallest))


def _sizes(tensors: Iterable[Tensor | None]) -> list[Tensor | float]:
    """Return norms; 1 where there is no factor, or it holds indices."""
    return [torch.linalg.vector_norm(t) if t is not None and t.is_floating_point() else 1.0 for t in tensors]


def unit_seeds(output: Tensor) -> Iterator[Tensor]:
    """Yield cotangents that pick one entry of every sample's output; each is good until the next."""
    many, entries = output.shape[0], output.shape[1:].numel()
    seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
    for entry in range(entries):
        seed[:, entry] = 1
        yield seed.view(output.shape)
        seed[:, entry] = 0  # only now: the cotangent at the last use may be this very tensor


def _confirmed(tape: Tape, blocks: Sequence[Tensor]) -> bool:
    """Hold the blocks against a plain sweep over a random cotangent."""
    (output,) = tape.outputs
    seed = private_noise(output)
    pairs = []
    for block, leaf, grad in zip(blocks, tape.leaves, tape.pull([seed]), strict=True):
        found = torch.tensordot(seed.reshape(-1).to(block.dtype), block, 1)
        pairs.append((found, torch.zeros_like(leaf) if grad is None else plain(grad)))
    return worst_disagreement(pairs) <= tape.tolerance
