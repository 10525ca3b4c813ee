"""Integrals of slopes along paths, refined until every path is complete.

Along a path from `t = 0` to `t = 1` a function's outputs `F(t)` are known wherever they are asked for, so the error of
a quadrature of `F'` over any interval is known, too: it is its completeness gap `F(b) - F(a) - integral`. Intervals are
refined where that is large. A smooth function needs one interval of few Gauss-Legendre nodes, whose error falls
exponentially. A piecewise-linear one has kinks, at which errors of any such rule fall like one over the number of
nodes; there, an interval is taken apart between its nodes: where the lines through two neighbours are one line, or meet
at a kink between them, the integral is exact, and only other cells are refined. Sotoudeh and Thakur (2019) integrate
over the linear pieces of a known network; here outputs and slopes tell where pieces end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ._cells import Cells, Slopes, hidden_error

# Nodes of an interval that is taken to be smooth, and of one with kinks. With 8, perceptrons with GELU or tanh are
# complete to 1e-6 at once, LSTMs and transformer blocks after halving 2 or 3 times. Where there are kinks, 2 to 4 nodes
# took equally many Jacobians, and 3 tell a line from a curve.
SMOOTH, KINKED = 8, 3
_CONVERGING = 0.1  # gap over the last Legendre coefficient: below 1e-2 where a function is smooth, about 1 at a kink
_RETRY = 0.25  # of the tolerance, where the gaps of a path's intervals have one sign and add up


@dataclass(frozen=True)
class GaussLegendre:
    """A Gauss-Legendre rule on `[0, 1]`.

    Attributes:
        nodes: Where slopes are taken.
        weights: Their weights, which sum to 1.
        last: Weights that give the Legendre coefficient of the highest degree that the nodes resolve.
    """

    nodes: Tensor
    weights: Tensor
    last: Tensor


@cache
def rule(many: int) -> GaussLegendre:
    """Return the rule of so many nodes."""
    from scipy.special import roots_legendre

    nodes, weights = roots_legendre(many)
    degree = np.zeros(many)
    degree[-1] = (2 * many - 1) ** 0.5
    last = weights / 2 * np.polynomial.legendre.legval(nodes, degree)
    return GaussLegendre(*(torch.from_numpy(part) for part in ((nodes + 1) / 2, weights / 2, last)))


class Integrand(Protocol):
    """Jacobians along paths, which are summed in place.

    Attributes:
        most: How many points are taken at a time.
    """

    most: int

    def slopes(self, path: Tensor, t: Tensor) -> Slopes:
        """Return what is known at points, and keep their Jacobians until the next call."""
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


@dataclass(frozen=True)
class Intervals:
    """Intervals of paths.

    Attributes:
        path: Which path.
        low: Where it begins.
        high: Where it ends.
        first: Outputs there.
        final: Outputs at its end.
    """

    path: Tensor
    low: Tensor
    high: Tensor
    first: Tensor
    final: Tensor

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows: Tensor | slice) -> Intervals:
        return Intervals(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Intervals]) -> Intervals:
        """Return the intervals of several."""
        return Intervals(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Intervals)))

    def at(self, nodes: Tensor) -> Tensor:
        """Return points of every interval, `(intervals, nodes)`."""
        return self.low.unsqueeze(1) + (self.high - self.low).unsqueeze(1) * nodes


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
        """Learn where paths lead, given integrals of `Slopes.probed`.

        Errors of a path are relative to the largest change of an output along it or, where features cancel, to how
        much they contribute: a sum with random weights is as large as the root of a sum of squares. Each tensor of the
        output, `sizes` of which are given, has its own scale.
        """
        ends = (integrand.outputs(path, torch.full((len(path),), t, dtype=torch.float64)) for t in (0.0, 1.0))
        self.first[path], self.final[path] = ends
        own = torch.maximum((self.final - self.first)[path].abs(), probed.abs())
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
        path, node = where // many, where % many
        slopes = integrand.slopes(path, this.nodes[node])
        integrand.add(this.weights[node])
        for total, part in ((found.total, slopes.along), (probed, slopes.probed)):
            total.index_add_(0, path, part * this.weights[node].unsqueeze(1))
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
        zero, one = (torch.full((len(every),), t, dtype=torch.float64) for t in (0.0, 1.0))
        pending = {SMOOTH: Intervals(every, zero, one, self.found.first[every], self.found.final[every])}
        while pending:
            taken, count = torch.zeros_like(self._left), torch.zeros_like(self._left)
            for many, part in pending.items():
                taken += many * torch.bincount(part.path, minlength=len(taken))
                count += torch.bincount(part.path, minlength=len(count))
            self.found.steps += taken
            # Half of what is left goes to intervals at work. Gaps have either sign, so squares are what adds up.
            share = (1 - self._used).clamp_min(0) / (2 * count.clamp_min(1))
            self._limit = torch.maximum(self._target * share.sqrt(), self.floor)
            parts: dict[int, list[Intervals]] = {}
            for many, part in pending.items():
                for rows in torch.arange(len(part)).split(max(1, self.integrand.most // many)):
                    for number, more in self._step(part[rows], rule(many)).items():
                        parts.setdefault(number, []).append(more)
            pending = {many: Intervals.joined(own) for many, own in parts.items()}

    def _step(self, part: Intervals, this: GaussLegendre) -> dict[int, Intervals]:
        """Integrate over intervals where one rule does, or over cells of them; return the others, by nodes to take."""
        many, t = len(this.nodes), part.at(this.nodes)
        slopes = self.integrand.slopes(part.path.repeat_interleave(many), t.flatten())
        if not bool(self.found.scale[part.path[0]].any()):
            part = self._begin(part, slopes, this)
        scale, length = self.found.scale[part.path], part.high - part.low
        near = slopes.in_units(scale, many)
        gaps, weights = (part.final - part.first) / scale, this.weights * length.unsqueeze(1)
        gaps = gaps - (weights.unsqueeze(2) * near.along).sum(1)
        beyond, smooth = self._judged(part, this, near, gaps)
        stuck = beyond & (length <= self.shortest)  # at a jump: no Jacobian adds up to that
        halved, rough = beyond & ~stuck & smooth, (beyond & ~stuck & ~smooth).nonzero().squeeze(1)
        edges = torch.cat([part.low.unsqueeze(1), t, part.high.unsqueeze(1)], 1)
        values = torch.cat([part.first.unsqueeze(1), slopes.outputs.unflatten(0, t.shape), part.final.unsqueeze(1)], 1)
        cells = Cells.of(edges[rough], (values / scale.unsqueeze(1))[rough], near[rough], self.floor[part.path[rough]])
        place, taken = self._pieces(cells, part.path[rough])
        cost = torch.where(halved, 2 * SMOOTH, 0)
        cost[rough] = KINKED * (~taken).sum(1)
        granted = self._granted(part.path, cost)
        self.stopped[part.path[stuck | ~granted]] = True
        halved, apart = halved & granted, granted[rough]
        weights[halved], gaps[halved] = 0.0, 0.0
        weights[rough[apart]] = cells.weights(place, taken)[apart]
        gaps[rough[apart]] = (cells.gaps(place) * taken.unsqueeze(2)).sum(1)[apart]
        self._take(part, slopes, weights, torch.where(stuck.unsqueeze(1), 0.0, gaps))
        row, cell = (~taken & apart.unsqueeze(1)).nonzero(as_tuple=True)
        own, left, right = rough[row], (rough[row], cell), (rough[row], cell + 1)
        pieces = Intervals(part.path[own], edges[left], edges[right], values[left], values[right])
        found = {SMOOTH: self._halves(part[halved]), KINKED: pieces}
        return {nodes: more for nodes, more in found.items() if len(more)}

    def _begin(self, part: Intervals, slopes: Slopes, this: GaussLegendre) -> Intervals:
        """Learn where paths lead, and return the intervals with the outputs at their ends."""
        probed = (this.weights.unsqueeze(1) * slopes.probed.unflatten(0, (-1, len(this.nodes)))).sum(1)
        self.found.begin(self.integrand, part.path, probed, self.sizes)
        first, final = self.found.first[part.path], self.found.final[part.path]
        sizes = torch.maximum(first.abs(), final.abs()) / self.found.scale[part.path]
        self.floor[part.path] = self.rounding * sizes.amax(1).clamp_min(1)
        self._limit[part.path] = self._limit[part.path].maximum(self.floor[part.path])
        return replace(part, first=first, final=final)

    def _judged(self, part: Intervals, this: GaussLegendre, near: Slopes, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """Return in which intervals a rule is off by more than its limit, and in which the function is smooth.

        The gap is the error along the step. It vanishes with the last Legendre coefficient that the nodes resolve.
        """
        length = (part.high - part.low).unsqueeze(1)
        sizes = [(this.last.unsqueeze(1) * s).sum(1).abs().mul(length).amax(1) for s in (near.along, near.probed)]
        error = gaps.abs().amax(1)
        beyond = torch.maximum(error, hidden_error(error, *sizes, self.floor[part.path])) > self._limit[part.path]
        return beyond, error < _CONVERGING * sizes[0]

    def _pieces(self, cells: Cells, path: Tensor) -> tuple[Tensor, Tensor]:
        """Return up to where the left line holds in each cell, and for which cells two lines are all there is."""
        limit = (self._limit[path] / cells.length.shape[1] ** 0.5).unsqueeze(1)
        place, apart = cells.kinks()
        straight = cells.curved() <= limit
        kinked = ~straight & (apart <= limit)
        if bool(kinked.any()):
            where = kinked.nonzero(as_tuple=True)
            own = path[where[0]]
            outputs = self.integrand.outputs(own, cells.start[where] + place[where]) / self.found.scale[own]
            kinked[where] = cells.off(where, place, outputs) <= limit[where[0]].squeeze(1)
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

    def _take(self, part: Intervals, slopes: Slopes, weights: Tensor, gaps: Tensor) -> None:
        self.integrand.add(weights.flatten())
        weighted = slopes.along * weights.reshape(-1, 1)
        self.found.total.index_add_(0, part.path, weighted.unflatten(0, weights.shape).sum(1))
        self._used.index_add_(0, part.path, (gaps.abs().amax(1) / self._target).square())

    def _halves(self, part: Intervals) -> Intervals:
        if not len(part):
            return part
        middle = (part.low + part.high) / 2
        outputs = self.integrand.outputs(part.path, middle)
        return Intervals.joined([replace(part, high=middle, final=outputs), replace(part, low=middle, first=outputs)])
