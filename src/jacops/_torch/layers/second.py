"""Second derivatives at the outputs of layers: cotangents with a graph of their own, and sweeps over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..._runtime.contexts import sweeping
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring
from ..sweeps.batched import passed
from ..sweeps.linearization import Linearization
from .sites import LayerOutput
from .uses import ParameterUse


class Second:
    """Cotangents at sites, with a graph, and sweeps over them.

    Operands that move are paired with cotangents that are zero: the derivative of `delta` by such a cotangent is the
    derivative of the operand by the site's output, so one sweep gives both.
    """

    @restoring
    def __init__(self, lin: Linearization, sites: Sequence[LayerOutput]) -> None:
        self.lin = lin
        with sweeping(lin.outputs[0]):
            moving = [use for site in sites for use in site.uses if moves(use)]
            attached = [use.attached for use in moving if use.attached is not None]
            zeros = [torch.zeros_like(a).requires_grad_() for a in attached]
            edges = [site.edge for site in sites]
            ends = [*lin.outputs, *attached]
            found = swept(ends, edges, [*map(torch.ones_like, lin.outputs), *zeros], create_graph=True)
        lin.sweeps += 1
        self.deltas = {site.node: delta for site, delta in zip(sites, found, strict=True)}
        self.probes = {id(use): zero for use, zero in zip(moving, zeros, strict=True)}

    def delta(self, site: LayerOutput) -> Tensor | None:
        """Return the cotangent at a site where it moves with anything."""
        delta = self.deltas[site.node]
        return delta if delta is not None and delta.requires_grad else None

    def sweep(
        self, seeds: Sequence[tuple[LayerOutput, Tensor]], sites: Sequence[LayerOutput], uses: Sequence[ParameterUse]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return derivatives of seeded cotangents by the outputs of sites, and of operands of uses transposed.

        Seeds and what is returned have a row for each of m sweeps.
        """
        live = [(delta, seed) for site, seed in seeds if (delta := self.delta(site)) is not None]
        if not live:
            return [None] * len(sites), [None] * len(uses)
        edges = [site.edge for site in sites]
        edges += [get_gradient_edge(self.probes[id(use)]) for use in uses]
        found = passed(self.lin, [delta for delta, _ in live], edges, [seed for _, seed in live])
        return found[: len(sites)], found[len(sites) :]

    def once(
        self, seeds: Sequence[tuple[LayerOutput, Tensor]], sites: Sequence[LayerOutput]
    ) -> tuple[list[Tensor | None], dict[int, Tensor | None]]:
        """Return what one sweep finds at sites, and by use how operands move."""
        uses = self.moving(sites)
        found, operands = self.sweep([(site, seed.unsqueeze(0)) for site, seed in seeds], sites, uses)
        rows = [None if grad is None else grad[0] for grad in (*found, *operands)]
        return rows[: len(sites)], {id(use): grad for use, grad in zip(uses, rows[len(sites) :], strict=True)}

    def moving(self, sites: Sequence[LayerOutput]) -> list[ParameterUse]:
        """Return the uses whose operands move."""
        return [use for site in sites for use in site.uses if id(use) in self.probes]


def moves(use: ParameterUse) -> bool:
    """Return whether what multiplies a parameter depends on others."""
    return use.kind != "lookup" and use.attached is not None and use.attached.requires_grad
