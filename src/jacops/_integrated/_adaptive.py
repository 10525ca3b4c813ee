"""Integrals of slopes along paths, refined until every path is complete.

Along a path from `t = 0` to `t = 1` a function's outputs `F(t)` are known wherever they are requested, so the error of
a quadrature of `F'` over any interval is known, too: it is its completeness gap `F(b) - F(a) - integral`. Intervals are
refined where that is large. A smooth function needs one interval of few Gauss-Legendre nodes, whose error falls
exponentially. A piecewise-linear one has kinks, at which errors of any such rule fall like one over the number of
nodes; there, an interval is taken apart between its nodes: where the lines through two neighbours are one line, or meet
at a kink between them, the integral is exact, and only other cells are refined. Sotoudeh and Thakur (2019) integrate
over the linear pieces of a known network; here outputs and slopes determine where pieces end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ._cells import Cells, Edges, hidden_error

# Nodes of an interval that is taken to be smooth, and of one with kinks. With 8, perceptrons with GELU or tanh are
# complete to 1e-6 at once, LSTMs and transformer blocks after halving 2 or 3 times. Where there are kinks, 2 to 4 nodes
# took equally many Jacobians, and 3 distinguish a line from a curve.
SMOOTH, KINKED = 8, 3
_CONVERGING = (
    0.1  # gap over the last coefficient, or that over the middle one: below 0.05 if smooth, above 0.3 at kinks
)
_CANCELLED = 0.1  # outputs that change by less of what features contribute are no measure of it
_RETRY = 0.25  # of the tolerance, where the gaps of a path's intervals have one sign and add up


@dataclass(frozen=True)
class GaussLegendre:
    """A Gauss-Legendre rule on `[0, 1]`.

    Attributes:
        nodes: Where slopes are taken.
        weights: Their weights, which sum to 1.
        last: Weights that give the Legendre coefficient of the highest degree that the nodes resolve.
        middle: Those of half that degree.
        ends: Weights that give the values at 0 and 1 of the polynomial through all nodes, `(2, nodes)`.
    """

    nodes: Tensor
    weights: Tensor
    last: Tensor
    middle: Tensor
    ends: Tensor


@cache
def rule(many: int) -> GaussLegendre:
    """Return the rule of so many nodes."""
    from scipy.special import roots_legendre

    nodes, weights = roots_legendre(many)
    # Legendre polynomials of norm 1 on [0, 1], at the nodes and at both ends.
    norms = np.sqrt(2 * np.arange(many) + 1)
    inside, ends = (np.polynomial.legendre.legvander(x, many - 1) * norms for x in (nodes, np.array([-1.0, 1.0])))
    coefficients = (inside * weights[:, None] / 2).T
    parts = (nodes + 1) / 2, weights / 2, coefficients[-1], coefficients[many // 2], ends @ coefficients
    return GaussLegendre(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


class Integrand(Protocol):
    """Jacobians along paths, which are summed in place.

    Attributes:
        most: How many points are taken at a time.
    """

    most: int

    def slopes(self, path: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and slopes at points, as in `Edges`, and keep their Jacobians until the next call."""
        ...

    def outputs(self, path: Tensor, t: Tensor) -> Tensor:
        """Return outputs at points, taken as slopes were before."""
        ...

    def add(self, weights: Tensor) -> None:
        """Add the Jacobians of the last points to those of their samples."""
        ...

    def drop(self, path: Tensor) -> Tensor:
        """Take back what was added for paths and for others to the same samples, and return all of these paths."""
        ...


@dataclass
class PathIntegrals:
    """Integrals along paths, one row per path and one column per output.

    Attributes:
        first: Outputs where paths begin.
        final: Outputs where they end.
        scale: What errors are relative to.
        total: Integrals of slopes so far.
        steps: Jacobians taken, one number per path.
    """

    first: Tensor
    final: Tensor
    scale: Tensor
    total: Tensor
    steps: Tensor

    @classmethod
    def none(cls, paths: int, outputs: int) -> PathIntegrals:
        """Return integrals of which nothing is known yet."""
        first, final, scale, total = (torch.zeros(paths, outputs, dtype=torch.float64) for _ in range(4))
        return cls(first, final, scale, total, torch.zeros(paths, dtype=torch.long))

    def begin(self, integrand: Integrand, path: Tensor, probed: Tensor, sizes: Sequence[int]) -> None:
        """Determine where paths lead, from integrals of slopes with random weights.

        Errors of a path are relative to the largest change of an output along it or, where features cancel, to a tenth
        of how much they contribute: a sum with random weights is as large as the root of a sum of squares. Each tensor
        of the output, `sizes` of which are given, has its own scale.
        """
        ends = (integrand.outputs(path, torch.full((len(path),), t, dtype=torch.float64)) for t in (0.0, 1.0))
        self.first[path], self.final[path] = ends
        own = torch.maximum((self.final - self.first)[path].abs(), _CANCELLED * probed.abs())
        parts = own.split(list(sizes), 1)
        scale = torch.cat([p.amax(1, keepdim=True).expand_as(p) if p.shape[1] else p for p in parts], 1)
        self.scale[path] = torch.where(scale > 0, scale, 1.0)

    def gaps(self) -> Tensor:
        """Return the completeness gaps, relative."""
        return (self.final - self.first - self.total) / self.scale


def fixed(integrand: Integrand, paths: int, many: int, sizes: Sequence[int]) -> PathIntegrals:
    """Integrate along all paths by one Gauss-Legendre rule of `many` nodes; `sizes` are entries of output tensors."""
    this, found = rule(many), PathIntegrals.none(paths, sum(sizes))
    probed = torch.zeros_like(found.total)
    for where in torch.arange(paths * many).split(integrand.most):
        path, weights = where // many, this.weights[where % many]
        _, slopes = integrand.slopes(path, this.nodes[where % many])
        integrand.add(weights)
        for kind, total in enumerate((found.total, probed)):
            total.index_add_(0, path, slopes[:, kind] * weights.unsqueeze(1))
    found.begin(integrand, torch.arange(paths), probed, sizes)
    found.steps += many
    return found


@dataclass
class AdaptiveIntegration:
    """Integration along paths by rules that are refined.

    Attributes:
        integrand: Jacobians along the paths.
        sizes: Entries of each output tensor.
        tolerance: The largest gap of a path, relative to its scale.
        rounding: How far outputs are off by rounding, relative to their size.
        shortest: The length of intervals that are not taken apart, since points in them are the same but for rounding.
        max_steps: Most Jacobians of a path.
        found: The integrals so far.
        floor: Relative gaps that rounding explains, per path.
        stopped: Which paths are not refined any more: they would take more Jacobians than allowed, or outputs jump.
    """

    integrand: Integrand
    sizes: Sequence[int]
    tolerance: float
    rounding: float
    shortest: float
    max_steps: int
    found: PathIntegrals = field(init=False)
    floor: Tensor = field(init=False)
    stopped: Tensor = field(init=False)
    _target: float = field(init=False)  # what gaps of a path may add up to, of either sign
    _used: Tensor = field(init=False)  # the sum of their squares so far, in units of the target's
    _limit: Tensor = field(init=False)  # gaps of intervals at work
    _left: Tensor = field(init=False)  # Jacobians that may still be taken

    def integrate(self, paths: int) -> PathIntegrals:
        """Integrate along all paths."""
        self.found, self._target = PathIntegrals.none(paths, sum(self.sizes)), self.tolerance
        self.floor, self._used, self._limit = (torch.zeros(paths, dtype=torch.float64) for _ in range(3))
        self.stopped, self._left = torch.zeros(paths, dtype=torch.bool), torch.full((paths,), self.max_steps)
        every = torch.arange(paths)
        while len(every):
            self._refine(every)
            missed = self.found.gaps().abs().amax(1) > self.floor.clamp_min(self.tolerance)
            every = (missed & ~self.stopped).nonzero().squeeze(1)
            if len(every):
                every, self._target = self.integrand.drop(every), self._target * _RETRY
                self.found.total[every], self._used[every] = 0.0, 0.0
        return self.found

    def _refine(self, every: Tensor) -> None:
        """Integrate along some paths."""
        self._left[every] -= SMOOTH  # others are counted where they are granted
        outputs = torch.stack([self.found.first[every], self.found.final[every]], 1)
        unknown = outputs.new_full((*outputs.shape[:2], 2, outputs.shape[2]), torch.nan)
        pending = {SMOOTH: Edges(every, torch.tensor([[0.0, 1.0]]).double().repeat(len(every), 1), outputs, unknown)}
        while pending:
            taken, count = torch.zeros_like(self._left), torch.zeros_like(self._left)
            for many, part in pending.items():
                taken += many * torch.bincount(part.path, minlength=len(taken))
                count += torch.bincount(part.path, minlength=len(count))
            self.found.steps += taken
            # Half of what is left goes to intervals at work. Gaps have either sign, so squares are what adds up.
            share = (1 - self._used).clamp_min(0) / (2 * count.clamp_min(1))
            self._limit = torch.maximum(self._target * share.sqrt(), self.floor)
            parts: dict[int, list[Edges]] = {}
            for many, part in pending.items():
                for rows in torch.arange(len(part)).split(max(1, self.integrand.most // many)):
                    for number, more in self._step(part[rows], rule(many)).items():
                        parts.setdefault(number, []).append(more)
            pending = {many: Edges.joined(own) for many, own in parts.items()}

    def _step(self, part: Edges, this: GaussLegendre) -> dict[int, Edges]:
        """Integrate over intervals where one rule does, or over cells of them; return the others, by nodes to take."""
        edges = self._taken(part, this)
        scale, length = self.found.scale[edges.path], edges.length
        near, weights = edges.relative_to(scale), this.weights * length.unsqueeze(1)
        gaps = near.outputs[:, -1] - near.outputs[:, 0] - (weights.unsqueeze(2) * near.along).sum(1)
        beyond, smooth = self._judged(near, this, gaps)
        stuck = beyond & (length <= self.shortest)  # at a jump: no Jacobian adds up to that
        halved, rough = beyond & ~stuck & smooth, (beyond & ~stuck & ~smooth).nonzero().squeeze(1)
        cells = Cells.of(near[rough], self.floor[edges.path[rough]])
        place, taken = self._pieces(cells, edges.path[rough])
        cost = torch.where(halved, 2 * SMOOTH, 0)
        cost[rough] = KINKED * (~taken).sum(1)
        granted = self._granted(edges.path, cost)
        self.stopped[edges.path[stuck | ~granted]] = True
        halved, apart = halved & granted, granted[rough]
        weights[halved], gaps[halved] = 0.0, 0.0
        weights[rough[apart]] = cells.weights(place, taken)[apart]
        gaps[rough[apart]] = (cells.gaps(place) * taken.unsqueeze(2)).sum(1)[apart]
        self._add(edges, weights, torch.where(stuck.unsqueeze(1), 0.0, gaps))
        row, cell = (~taken & apart.unsqueeze(1)).nonzero(as_tuple=True)
        found = {KINKED: edges.between(rough[row], cell)}
        if bool(halved.any()):
            whole = edges[halved].without_nodes()
            found[SMOOTH] = whole.halves(self.integrand.outputs(whole.path, whole.places.mean(1)))
        return {nodes: more for nodes, more in found.items() if len(more)}

    def _taken(self, part: Edges, this: GaussLegendre) -> Edges:
        """Take outputs and slopes at the nodes of intervals."""
        places = part.places[:, :1] + part.length.unsqueeze(1) * this.nodes
        path = part.path.repeat_interleave(len(this.nodes))
        outputs, slopes = (x.unflatten(0, places.shape) for x in self.integrand.slopes(path, places.flatten()))
        if not bool(self.found.scale[part.path[0]].any()):  # its paths are new
            path = part.path
            self.found.begin(self.integrand, path, (this.weights[:, None] * slopes[:, :, 1]).sum(1), self.sizes)
            part = replace(part, outputs=torch.stack([self.found.first[path], self.found.final[path]], 1))
            sizes = (part.outputs.abs().amax(1) / self.found.scale[path]).amax(1)
            self.floor[path] = self.rounding * sizes.clamp_min(1)
            self._limit[path] = self._limit[path].maximum(self.floor[path])
        return part.with_nodes(places, outputs, slopes)

    def _judged(self, edges: Edges, this: GaussLegendre, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """Return in which intervals a rule is off by more than its limit, and in which the function is smooth.

        The gap is the error along the step. The variation of slopes is measured by the last coefficient that the nodes
        resolve and, at ends where slopes are known, how far these are from the polynomial through the nodes. Where a
        function is smooth, the gap is far below that, or coefficients fall; between kinks that is not asked.
        """
        nodes, length = edges.slopes[:, 1:-1].flatten(2), edges.length[:, None]
        last, middle = (torch.einsum("q,nqk->nk", c, nodes).abs() for c in (this.last, this.middle))
        missed = torch.einsum("eq,nqk->nek", this.ends, nodes) - edges.slopes[:, [0, -1]].flatten(2)
        missed = missed.nan_to_num(0.0).abs().amax(1) * this.nodes[0]
        along, probed = (torch.maximum(last, missed) * length).unflatten(1, (2, -1)).amax(2).unbind(1)
        error, falls = gaps.abs().amax(1), last.amax(1) < _CONVERGING * middle.amax(1)
        hidden = hidden_error(error, along, probed, self.floor[edges.path])
        hidden = torch.where(falls, hidden * last.amax(1) / middle.amax(1), hidden)
        smooth = (error < _CONVERGING * along) | (falls & (error <= along))
        return torch.maximum(error, hidden) > self._limit[edges.path], smooth & (len(this.nodes) == SMOOTH)

    def _pieces(self, cells: Cells, path: Tensor) -> tuple[Tensor, Tensor]:
        """Return up to where the left line holds in each cell, and for which cells two lines are all there is."""
        limit = (self._limit[path] / cells.length.shape[1] ** 0.5).unsqueeze(1)
        place, apart = cells.kinks()
        straight = cells.curved() <= limit
        kinked = ~straight & (apart <= limit)
        if bool(kinked.any()):
            where = kinked.nonzero(as_tuple=True)
            own = path[where[0]]
            allowed = limit[where[0]].squeeze(1)
            around = cells.around(where, place, allowed)
            outputs = self.integrand.outputs(own.repeat(3), (cells.start[where] + around).flatten())
            outputs = outputs.unflatten(0, around.shape) / self.found.scale[own]
            kinked[where] = cells.off(where, around, outputs) <= allowed
        return torch.where(straight, cells.length / 2, place), straight | kinked

    def _granted(self, path: Tensor, cost: Tensor) -> Tensor:
        """Return which intervals may be refined at so many Jacobians, and count these."""
        order = path.argsort(stable=True)
        total = cost[order].cumsum(0)
        starts = torch.cat([torch.ones(1, dtype=torch.bool), path[order].diff() != 0]).nonzero().squeeze(1)
        before = (total - cost[order])[starts].repeat_interleave(torch.cat([starts, torch.tensor([len(path)])]).diff())
        granted = torch.empty_like(path, dtype=torch.bool)
        granted[order] = total - before <= self._left[path[order]]
        self._left.index_add_(0, path, -cost * granted)
        return granted

    def _add(self, edges: Edges, weights: Tensor, gaps: Tensor) -> None:
        self.integrand.add(weights.flatten())
        self.found.total.index_add_(0, edges.path, (edges.along * weights.unsqueeze(2)).sum(1))
        self._used.index_add_(0, edges.path, (gaps.abs().amax(1) / self._target).square())
