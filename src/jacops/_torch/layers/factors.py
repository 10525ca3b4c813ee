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

from ..._ladder.failures import attempt
from ..._runtime.rows import plain
from ..sweeps.linearization import Linearization
from .orders import Order, by_sample, sample_uses
from .parts import Lookup, Outer, RowFactors, Rows, Several
from .uses import ParameterUse, cotangents


@dataclass(frozen=True, eq=False)
class SampleUse:
    """A use whose rows are known to belong to samples.

    Attributes:
        use: Where a parameter enters.
        order: How its rows are laid out.
        samples: How many.
    """

    use: ParameterUse
    order: Order
    samples: int

    @property
    def _apart(self) -> bool:
        """The operation's first axis is the samples' own, so that nothing need be copied."""
        return self.use.by_position and isinstance(self.order, str) and self.use.shape[0] == self.samples

    def operand(self) -> Tensor | None:
        """Return what multiplies the parameter, `(n, T, …)`."""
        if self._apart:
            return self.use.operand_positions()
        operand = None if self.use.kind == "vector" else self.use.operand
        return None if operand is None else by_sample(operand, self.samples, self.order)

    def ones(self, operand: Tensor) -> Tensor:
        """Return the operand of a bias beside a weight's, `(n, T, g, 1)`: zero where a sample has fewer positions."""
        ones = operand.new_ones(*operand.shape[:-1], 1)
        if not isinstance(self.order, Tensor):
            return ones
        known = self.order < self.use.shape[:-1].numel()
        return ones * known.to(ones.dtype).view(*known.shape, 1, 1)

    def delta(self, cotangent: Tensor) -> Tensor:
        """Return a cotangent at the use as `(n, T, …)`."""
        if self._apart:
            return self.use.positions(cotangent)
        return by_sample(self.use.rows(cotangent), self.samples, self.order)

    def part(self, operand: Tensor | None, delta: Tensor) -> RowFactors:
        """Return rows from cotangents `(n, k, T, …)`.

        Raises:
            RouteFailedError: Torch cannot pull rows back to the parameter.
        """
        many, (long, wide) = delta.shape[:2], matrix_shape(self.use.entry.weight)
        part = self._part(operand, delta, long, wide)
        if not self.use.derived:
            return part
        rows = self.use.pulled_back(part.block(slice(0, long)).flatten(0, 1))
        return Rows(rows.reshape(*many, *matrix_shape(rows.shape[1:])))

    def _part(self, operand: Tensor | None, delta: Tensor, long: int, wide: int) -> RowFactors:
        if self.use.kind == "vector":
            summed = delta.squeeze(2) if delta.shape[2] == 1 else delta.sum(2)
            return Rows(summed.reshape(*delta.shape[:2], long, wide))
        if operand is None:
            raise ValueError("only vectors have no operand")
        return (
            Outer(delta, operand, self.use.turned, long) if self.use.kind == "outer" else Lookup(delta, operand, long)
        )


class LayerRows:
    """The uses of a recorded model's parameters, sample by sample.

    Args:
        lin: A model's outputs, first axis samples, by its parameters; with one sample, anything of that sample.
        samples: How many.
        plainly: Take no parameter to be covered.

    Attributes:
        uses: All uses that were found.
        sites: Those of the leaves that are covered.
        missing: Leaves that enter in a way that has no rule, or whose rows could not be told apart.
    """

    def __init__(self, lin: Linearization, samples: int, plainly: bool = False) -> None:
        self.lin, self.samples = lin, samples
        found = {} if plainly else sample_uses(lin, samples)
        self.uses = [use for own in found.values() for use, _ in own]
        lost = {leaf for leaf, own in found.items() if any(order is None for _, order in own)}
        # A parameter without entries has rows without entries, wherever it enters.
        self.missing = [j for j, t in enumerate(lin.leaves) if t.numel() and (j not in found or j in lost)]
        self.sites = [
            SampleUse(use, order, samples)
            for leaf, own in found.items()
            if leaf not in lost and lin.leaves[leaf].numel()
            for use, order in own
            if order is not None
        ]

    def sweep(self, seeds: Sequence[Tensor], sites: Sequence[SampleUse] | None = None) -> list[Tensor]:
        """Return `(n, T, …)` at every site, or at some, by one sweep.

        Raises:
            RouteFailedError: Torch cannot take it.
        """
        sites = self.sites if sites is None else sites
        self.lin.sweeps += bool(sites)
        found = attempt(lambda: cotangents(self.lin, [site.use for site in sites], seeds))
        return [site.delta(plain(delta)) for site, delta in zip(sites, found, strict=True)]

    def sweep_batched(self, seeds: Sequence[Tensor], sites: Sequence[SampleUse]) -> list[Tensor]:
        """Return `(k, n, T, …)` at some sites for k cotangents, `(k, *output)` each, by one batched sweep.

        Raises:
            RouteFailedError: Torch cannot take it.
        """
        self.lin.sweeps += len(seeds[0])
        found = attempt(lambda: cotangents(self.lin, [site.use for site in sites], seeds, batched=True))
        pairs = zip(sites, found, strict=True)
        return [torch.stack([site.delta(plain(delta)) for delta in deltas]) for site, deltas in pairs]

    def by_leaf(self) -> Iterator[tuple[int, list[int]]]:
        """Yield every covered leaf and which sites are its."""
        for leaf in range(len(self.lin.leaves)):
            if leaf not in self.missing:
                yield leaf, [i for i, site in enumerate(self.sites) if site.use.leaf == leaf]

    def column_squares(
        self, operands: Sequence[Tensor | None], seeds: Iterable[Tensor], most: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield covered leaves with what to add to the sum of their squared gradients, over samples and seeds.

        Cotangents of several seeds are squared together, up to `most` numbers of them.
        """
        waiting: list[list[Tensor]] = []
        for seed in seeds:
            waiting.append(self.sweep([seed]))
            if (len(waiting) + 1) * sum(delta.numel() for delta in waiting[0]) > most:
                yield from self._squared(operands, waiting)
                waiting = []
        if waiting:
            yield from self._squared(operands, waiting)

    def _squared(
        self, operands: Sequence[Tensor | None], sweeps: Sequence[Sequence[Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        deltas = [torch.stack(found, 1) for found in zip(*sweeps, strict=True)]
        for leaf, sites in self.by_leaf():
            parts = [self.sites[i].part(operands[i], deltas[i]) for i in sites]
            if parts:
                yield leaf, (parts[0] if len(parts) == 1 else Several(parts)).column_squares()


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the lengths of a parameter's first axis and of the others laid end to end, as `RowFactors` sees it."""
    return shape[0] if shape else 1, shape[1:].numel()


def add_rows(layers: LayerRows, operands: Sequence[Tensor | None], deltas: Sequence[Tensor], sites: Iterable[int],
             target: Tensor) -> None:  # fmt: skip
    """Write one leaf's rows for k output entries, cotangents `(n, k, T, …)`, into `(n, k, F, W)`."""
    add = False
    for i in sites:
        layers.sites[i].part(operands[i], deltas[i]).into(target, add)
        add = True
    if not add:
        target.zero_()


def unit_seeds(output: Tensor) -> Iterator[Tensor]:
    """Yield cotangents that pick one entry of every sample's output; each is good until the next."""
    many, entries = output.shape[0], output.shape[1:].numel()
    seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
    for entry in range(entries):
        seed[:, entry] = 1
        yield seed.view(output.shape)
        seed[:, entry] = 0  # only now: the cotangent at the last use may be this very tensor
