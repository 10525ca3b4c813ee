"""Intervals of paths taken apart between nodes, where a function is a line or two that meet at a kink."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edges:
    """What is known at the ends of intervals and at the nodes between them, in order, in double precision.

    Attributes:
        path: Which path each interval is of.
        places: Where on the path, `(intervals, places)`.
        outputs: `F` there, `(intervals, places, outputs)`.
        slopes: The Jacobian there, times the step from baseline to sample, which gives `F'`, and times the step with
            random weights, by which what cancels in `F'` shows; `(intervals, places, 2, outputs)`. NaN at ends where no
            Jacobian was taken.
    """

    path: Tensor
    places: Tensor
    outputs: Tensor
    slopes: Tensor

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows: Tensor | slice) -> Edges:
        return Edges(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def joined(parts: list[Edges]) -> Edges:
        """Return those of several."""
        return Edges(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Edges)))

    @property
    def length(self) -> Tensor:
        """How long intervals are."""
        return self.places[:, -1] - self.places[:, 0]

    @property
    def along(self) -> Tensor:
        """`F'` at the nodes."""
        return self.slopes[:, 1:-1, 0]

    def with_nodes(self, places: Tensor, outputs: Tensor, slopes: Tensor) -> Edges:
        """Return these with what is known at nodes between two ends."""
        given = ((self.places, places), (self.outputs, outputs), (self.slopes, slopes))
        return Edges(self.path, *(torch.cat([ends[:, :1], nodes, ends[:, 1:]], 1) for ends, nodes in given))

    def without_nodes(self) -> Edges:
        """Return these with both ends alone."""
        return Edges(self.path, *(part[:, [0, -1]] for part in (self.places, self.outputs, self.slopes)))

    def relative_to(self, scale: Tensor) -> Edges:
        """Return them with outputs and slopes relative to the scale of an interval's outputs."""
        outputs, slopes = self.outputs / scale[:, None], self.slopes / scale[:, None, None]
        return Edges(self.path, self.places, outputs, slopes)

    def between(self, row: Tensor, cell: Tensor) -> Edges:
        """Return intervals between neighbouring places, the one at `cell` and the next one."""
        pair = torch.stack([cell, cell + 1], 1)
        own = row.unsqueeze(1)
        return Edges(self.path[row], self.places[own, pair], self.outputs[own, pair], self.slopes[own, pair])

    def halves(self, outputs: Tensor) -> Edges:
        """Return both halves of intervals with no nodes, given outputs in the middle."""
        places = torch.stack([self.places[:, 0], self.places.mean(1), self.places[:, 1]], 1)
        unknown = torch.full_like(self.slopes[:, :1], torch.nan)
        whole = self.with_nodes(places[:, 1:2], outputs.unsqueeze(1), unknown)
        rows = torch.arange(len(self))
        return Edges.joined([whole.between(rows, torch.full_like(rows, half)) for half in (0, 1)])


def hidden_error(error: Tensor, change: Tensor, probed: Tensor, noise: Tensor) -> Tensor:
    """Return how far an integral may be off in directions that outputs do not show.

    Args:
        error: Of the integral along the step.
        change: How much slopes along it vary, by a measure that is zero where the integral is exact.
        probed: How much those with random weights do: they are taken to be off by the same share of it.
        noise: Errors and changes that rounding explains; a share of these is none.
    """
    return ((error + noise) / (change + noise)).clamp_max(1) * probed


@dataclass(frozen=True)
class Cells:
    """What intervals are made of between neighbouring places, `(intervals, cells, ...)`.

    The first and the last cell of an interval have a node at one side only, whose Jacobian is used for both.

    Attributes:
        start: Where they begin.
        length: How long they are.
        before: Outputs where they begin.
        after: Outputs where they end.
        left: Slopes on their left, along the step.
        right: Slopes on their right.
        bend: How much slopes change from end to end, along the step and with random weights, `(..., 2, outputs)`; 0
            where that is not known.
        hidden: How many times as large as along the step slopes are with random weights, but at least once.
        noise: Errors that rounding explains.
    """

    start: Tensor
    length: Tensor
    before: Tensor
    after: Tensor
    left: Tensor
    right: Tensor
    bend: Tensor
    hidden: Tensor
    noise: Tensor

    @classmethod
    def of(cls, edges: Edges, noise: Tensor) -> Cells:
        """Return the cells of intervals, given errors of each that rounding explains."""
        nodes = edges.slopes[:, 1:-1]
        left, right = torch.cat([nodes[:, :1], nodes], 1), torch.cat([nodes, nodes[:, -1:]], 1)
        sizes = torch.maximum(left.abs(), right.abs()).amax(3)
        hidden = torch.where(sizes[..., 1] > 0, sizes[..., 1] / sizes[..., 0], 0.0).clamp_min(1)
        places, outputs = edges.places, edges.outputs
        return cls(
            places[:, :-1],
            places.diff(dim=1),
            outputs[:, :-1],
            outputs[:, 1:],
            left[..., 0, :],
            right[..., 0, :],
            edges.slopes.diff(dim=1).nan_to_num(0.0),
            hidden,
            noise.unsqueeze(1),
        )

    def curved(self) -> Tensor:
        """Return how far the mean of the slopes at both ends is from that of each cell."""
        error = self.gaps(self.length / 2).abs().amax(2)
        along, probed = (self.bend.abs().amax(3) * self.length.unsqueeze(2)).unbind(2)
        error = torch.maximum(error, hidden_error(error, along, probed, self.noise))
        for end in (0, -1):  # with a node on one side only
            error[:, end] = ((error + self.noise) * self.hidden)[:, end]
        return error

    def kinks(self) -> tuple[Tensor, Tensor]:
        """Return how far from the start the lines through both ends meet, and how far they are from meeting at all.

        Lines in several outputs that meet in one point are unlikely to do so by chance; in one output they always do.
        """
        change, length, bend = self.after - self.before, self.length.unsqueeze(2), self.left - self.right
        place = (bend * (change - self.right * length)).sum(2) / bend.square().sum(2)
        inside = (place > 0) & (place < self.length)  # not so for NaN, where there is no bend
        place = torch.where(inside, place, 0.0)
        error = (self.gaps(place).abs().amax(2) + self.noise) * self.hidden
        return place, torch.where(inside, error, torch.inf)

    def around(self, where: tuple[Tensor, ...], place: Tensor, limit: Tensor) -> Tensor:
        """Return where the lines of the cells `where` meet, between a place before and one behind it, `(3, cells)`.

        Two kinks of opposite sign can lie on one side of where the lines of one output meet, which then is on both
        lines, and so is the function there. Beside it the function is on the wrong line: by four times the limit.
        """
        at, length = place[where], self.length[where]
        bend = (self.left - self.right)[where].abs().amax(1) * self.hidden[where]
        step = 4 * limit / bend
        return torch.stack([at - step.minimum(at / 2), at, at + step.minimum((length - at) / 2)])

    def off(self, where: tuple[Tensor, ...], around: Tensor, outputs: Tensor) -> Tensor:
        """Return how far outputs at the places `around` of the cells `where` are from the lines through both ends."""
        left, right = around[:2].unsqueeze(2), (self.length[where] - around[1:]).unsqueeze(2)
        ahead = outputs[:2] - self.before[where] - self.left[where] * left
        behind = self.after[where] - outputs[1:] - self.right[where] * right
        return torch.cat([ahead, behind]).abs().amax((0, 2)) * self.hidden[where]

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
