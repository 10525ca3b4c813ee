r"""The part of an output that no input feature carries, and where an output is not piecewise linear.

A forward is followed operation by operation (`follow`). An operation that is affine in what depends on the input is
applied to bias parts as it is applied to values. Any other operation `g` that is linear around its point `z`
(`local_linear`) passes bias parts on by its derivative and adds its own constant `g(z) - Dg z`, which is zero for one
that is homogeneous. Neither the model's output nor its Jacobian is used, so that comparing `f(x)` with `J x + b` can
fail. Where an operation is curved there is no such constant; it is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .follow import Follow

AROUND = (0.0, 1.0, -1.0)  # at the point, ahead and behind: a central difference, and a second one that shows kinks


@dataclass(frozen=True)
class Moved:
    """Outputs around a point, in double precision, with what is detached held fixed.

    Attributes:
        base: At `x`, one tensor per output.
        ahead: At `x + d`.
        behind: At `x - d`.
        move: `d`, one tensor per leaf.
    """

    base: list[Tensor]
    ahead: list[Tensor]
    behind: list[Tensor]
    move: list[Tensor]


@dataclass(frozen=True)
class BiasParts:
    """Outputs and their bias parts, for all samples.

    Attributes:
        outputs: The model's outputs, `(n, *out)` each.
        bias: Their bias parts, in at least single precision.
        points: What was followed from: the inputs, or the output of the layer that the forward is cut at.
        curved: Names of operations that are not piecewise linear, or could not be examined.
        moved: The outputs around the point, where there are few samples: to follow both at once takes less time.
        coarse: The coarsest dtype of what was followed on the way; None where nothing was.
    """

    outputs: list[Tensor]
    bias: list[Tensor]
    points: list[Tensor]
    curved: tuple[str, ...]
    moved: Moved | None
    coarse: torch.dtype | None = None


@dataclass(frozen=True)
class FollowedRun:
    """One forward that was followed.

    Attributes:
        outputs: Its outputs.
        carried: What was carried along to each of them.
        points: Where it was followed from.
        moves: `d` by leaf, where values were moved.
        curved: Names of what is not piecewise linear.
        coarse: The coarsest dtype of what was followed; None where nothing was.
    """

    outputs: list[Tensor]
    carried: list[list[Tensor]]
    points: list[Tensor]
    moves: list[Tensor]
    curved: list[str]
    coarse: torch.dtype | None

    @classmethod
    def of(cls, outputs: Sequence[Tensor], follow: Follow, points: Sequence[Tensor]) -> FollowedRun:
        """Return what a forward over `points` gave, which ran while it was followed."""
        found = [follow.read(output) for output in outputs]
        carried, curved = [parts for parts, _ in found], [name for _, names in found for name in names]
        made = [output.detach() for output in outputs]
        if points and points[0].shape[0] == 1:  # the forward may drop the axis of a single sample
            bare = [not (output.ndim and output.shape[0] == 1) for output in made]
            made = [o.unsqueeze(0) if b else o for o, b in zip(made, bare, strict=True)]
            carried = [[c.unsqueeze(0) for c in row] if b else row for row, b in zip(carried, bare, strict=True)]
        return cls(made, carried, [point.detach() for point in points], follow.moves, curved, follow.coarse)


def joined(runs: Sequence[FollowedRun], bias: bool) -> tuple[list[Tensor], Moved | None]:
    """Return bias parts by output, and outputs around the point, of runs over consecutive samples.

    Args:
        runs: Of the same forward.
        bias: Bias parts were followed, before what else was.
    """
    outputs = zip(*(run.carried for run in runs), strict=True)
    carried = [[torch.cat(parts) for parts in zip(*rows, strict=True)] for rows in outputs]
    moves = [torch.cat(parts) for parts in zip(*(run.moves for run in runs), strict=True)]
    first = [row[0] for row in carried] if bias else []
    if not moves:
        return first, None
    base, ahead, behind = zip(*(row[bias:] for row in carried), strict=True)
    return first, Moved(list(base), list(ahead), list(behind), moves)
