"""Intervals of paths taken apart between nodes, where a function is a line or two that meet at a kink."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slopes:
    """What is known at points of paths, in double precision; the last axis runs over outputs.

    Attributes:
        outputs: `F`.
        along: `F'`, the Jacobian times the step from baseline to sample.
        probed: The Jacobian times the step with random weights: what varies in it and cancels in `F'` shows here.
    """

    outputs: Tensor
    along: Tensor
    probed: Tensor

    def __getitem__(self, rows: Tensor) -> Slopes:
        return Slopes(*(getattr(self, f.name)[rows] for f in fields(self)))

    def in_units(self, scale: Tensor, many: int) -> Slopes:
        """Return them relative to a scale, `(intervals, nodes, outputs)` with `many` nodes in an interval."""
        parts = (getattr(self, f.name) for f in fields(self))
        return Slopes(*(part.unflatten(0, (-1, many)) / scale.unsqueeze(1) for part in parts))


def hidden_error(error: Tensor, change: Tensor, probed: Tensor, noise: Tensor) -> Tensor:
    """Return how far an integral may be off in directions that outputs do not tell of.

    Args:
        error: Of the integral of `Slopes.along`.
        change: How much these vary, by a measure that is zero where the integral is exact.
        probed: How much `Slopes.probed` vary by the same measure: they are taken to be off by the same share of it.
        noise: Errors and changes that rounding explains; a share of these is none.
    """
    return ((error + noise) / (change + noise)).clamp_max(1) * probed


@dataclass(frozen=True)
class Cells:
    """Intervals between neighbouring places of larger ones: their ends and the nodes between.

    All tensors are `(intervals, cells, ...)`. The first and the last cell of an interval have a node at one side only,
    whose slope stands for both.

    Attributes:
        start: Where they begin.
        length: How long they are.
        before: Outputs where they begin.
        after: Outputs where they end.
        left: Slopes at their left, as `Slopes.along`.
        right: Slopes at their right.
        left_probed: Slopes at their left, as `Slopes.probed`.
        right_probed: Slopes at their right.
        noise: Errors that rounding explains, one for all cells of an interval.
    """

    start: Tensor
    length: Tensor
    before: Tensor
    after: Tensor
    left: Tensor
    right: Tensor
    left_probed: Tensor
    right_probed: Tensor
    noise: Tensor

    @classmethod
    def of(cls, edges: Tensor, values: Tensor, slopes: Slopes, noise: Tensor) -> Cells:
        """Return the cells between edges, given outputs there and slopes at all but the first and the last."""
        parts = [edges[:, :-1], edges.diff(dim=1), values[:, :-1], values[:, 1:]]
        for slope in (slopes.along, slopes.probed):
            parts += [torch.cat([slope[:, :1], slope], 1), torch.cat([slope, slope[:, -1:]], 1)]
        return cls(*parts, noise.unsqueeze(1))

    def curved(self) -> Tensor:
        """Return how far the mean of the slopes at both ends is from that of each cell."""
        length = self.length.unsqueeze(2)
        parts = (self.gaps(self.length / 2), (self.right - self.left) * length, self.right_probed - self.left_probed)
        error, bend, probed = (part.abs().amax(2) for part in parts)
        error = torch.maximum(error, hidden_error(error, bend, probed * self.length, self.noise))
        for end in (0, -1):  # with slopes at one side only, nothing tells how they change
            error[:, end] = self._visible(error)[:, end]
        return error

    def kinks(self) -> tuple[Tensor, Tensor]:
        """Return how far from the start the lines through both ends meet, and how far they are from meeting at all.

        Lines in several outputs that meet in one point are unlikely to do so by chance; in one output they always do.
        """
        change, length = self.after - self.before, self.length.unsqueeze(2)
        bend = self.left - self.right
        place = (bend * (change - self.right * length)).sum(2) / bend.square().sum(2)
        inside = (place > 0) & (place < self.length)  # not so for NaN, where there is no bend
        place = torch.where(inside, place, 0.0)
        apart = self.left * place.unsqueeze(2) - change + self.right * (length - place.unsqueeze(2))
        return place, torch.where(inside, self._visible(apart.abs().amax(2)), torch.inf)

    def off(self, where: Tensor, place: Tensor, outputs: Tensor) -> Tensor:
        """Return how far outputs at some places in the cells `where` are from the lines through both ends."""
        at = place[where].unsqueeze(1)
        ahead = outputs - self.before[where] - self.left[where] * at
        behind = self.after[where] - outputs - self.right[where] * (self.length[where].unsqueeze(1) - at)
        return torch.stack([ahead, behind]).abs().amax((0, 2)) * self._hidden()[where]

    def gaps(self, place: Tensor) -> Tensor:
        """Return the completeness gaps if the left line holds up to a place, and the right one behind it."""
        at = place.unsqueeze(2)
        return self.after - self.before - self.left * at - self.right * (self.length.unsqueeze(2) - at)

    def weights(self, place: Tensor, taken: Tensor) -> Tensor:
        """Return the weights of the nodes, `(intervals, nodes)`, if so much of the cells taken is of their left one."""
        left, right = place * taken, (self.length - place) * taken
        found = left[:, 1:] + right[:, :-1]
        found[:, 0] += left[:, 0]
        found[:, -1] += right[:, -1]
        return found

    def _hidden(self) -> Tensor:
        """Return how many times as large the slopes of a random direction are, where outputs tell little of them."""
        pairs = (self.left, self.right), (self.left_probed, self.right_probed)
        along, probed = (torch.stack(pair).abs().amax((0, 3)) for pair in pairs)
        return torch.where(probed > 0, probed / along, 0.0).clamp_min(1)

    def _visible(self, errors: Tensor) -> Tensor:
        """Return errors as they may be in the Jacobian, given those in its product with the step."""
        return (errors + self.noise) * self._hidden()
