r"""Influences of single tokens: of the terms that a sequence's loss is the mean of.

The loss of sequence i is $\ell_i = \sum_t d_{it} \ell_{it} / \sum_t d_{it}$ over its labels t, with $d$ what each adds
to the denominator. Token t has the gradient of its own term, $d_{it} \nabla \ell_{it} / \sum_s d_{is}$, so that the
tokens of a sequence add up to it. All of them come from one push of each test sample's solution to the outputs: a term
depends on the outputs of its own position, where the slope of the sequence's loss meets the changed output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from .._data import Batch, Batches
from .._operators import LinearizedMap
from .._operators._ranked_rows import RankedRows
from .._problem import BatchPoint, Problem
from .._runtime.agreement import worst_disagreement
from .._runtime.contexts import private_noise
from .._torch.protocol import row_cotangents
from ..errors import InputError, NotDifferentiableError

_FORMED = 2**24  # entries of solutions that are formed at a time: 64 MiB in float32
_ENTRIES = 2**25  # changes of outputs that are held at a time: 128 MiB in float32


def token_influences(problem: Problem, data: Batches, solutions: Tensor, held: RankedRows) -> Tensor:
    """Return `(m, n, T)`, solutions `(m, P)` in the form of `held`, times the gradients of the terms of all labels.

    T is the length of the longest row of labels; entries that are ignored or behind a shorter one are 0.

    Raises:
        InputError: The labels are no `(n, T)`, or the loss is no mean, or sum, over them.
        NotDifferentiableError: The terms do not add up to the gradient of a sample alone.
    """
    rows = _Solutions(solutions, held)
    parts = [_of_batch(problem.at(batch), rows) for batch in data.tracked("tokens", problem.progress) if batch.rows]
    widest = max((part.shape[2] for part in parts), default=0)
    return torch.cat([torch.nn.functional.pad(part, (0, widest - part.shape[2])) for part in parts], 1)


@final
class _Solutions:
    """Solutions `(m, P)`, some of which are formed at a time where they are held in low rank."""

    def __init__(self, rows: Tensor, held: RankedRows) -> None:
        self.rows, self.held = rows, held
        self.mix = private_noise(rows[:, 0])
        self.step = max(1, _FORMED // max(1, held.space.dim)) if not held.is_dense else max(1, len(rows))
        parts = zip(self.mix.split(self.step), rows.split(self.step), strict=True)
        self.mixed = sum((mix @ held.dense(some) for mix, some in parts), rows.new_zeros(held.space.dim))


def _of_batch(point: BatchPoint, factors: _Solutions) -> Tensor:
    """Return the influences of a batch's tokens, samples apart where they mix."""
    batch, mix = point.batch, factors.mix
    _check_labels(point)
    whole = point.gradients().apply(factors.mixed.unsqueeze(0))[0]
    allowed = point.objective.recorded(batch.x, "tokens").lin.tolerance
    found = _terms(point, factors)
    if not _agree(found, mix, whole, allowed):
        alone = [batch.part(slice(i, i + 1)) for i in range(batch.rows)]
        found = torch.cat([_terms(BatchPoint(one, point.objective.on(one.x)), factors) for one in alone], 1)
    if not _agree(found, mix, whole, allowed):
        came, needed = "with terms of labels that do not add up", "their sum must be the gradient of a sample alone"
        raise NotDifferentiableError.of("the loss", came, needed, "Take influences of samples (`'up'`).")
    return found


def _agree(found: Tensor, mix: Tensor, whole: Tensor, allowed: float) -> bool:
    return worst_disagreement([(torch.tensordot(mix, found, 1).sum(1), whole)]) <= allowed


def _check_labels(point: BatchPoint) -> None:
    y, losses = point.batch.y, point.objective.losses
    if point.objective.foreign:
        raise InputError.of("influence_type", "'token'", "it takes models of torch only")
    if not isinstance(y, Tensor) or y.ndim != 2 or y.is_floating_point():
        came = f"of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise InputError.of("y", came, "influences of tokens need whole numbers (n, T), one label for each token")
    if losses.reduction == "mean" and not losses.counts_targets(y):
        came, needed = "no mean over the labels that count", "influences of tokens need one, whose terms they are of"
        raise InputError.of("loss", came, needed, "Take the mean over all tokens of a batch.")


def _terms(point: BatchPoint, factors: _Solutions) -> Tensor:
    """Return `(m, n, T)` for samples that do not mix."""
    slopes = _Slopes(point)
    lin = slopes.found.lin
    J = LinearizedMap(lin, slopes.found.output)  # noqa: N806
    rows = factors.rows
    found = rows.new_empty(len(rows), *point.batch.y.shape)
    step = min(factors.step, max(1, _ENTRIES // max(1, lin.codomain.dim)))
    for some in torch.arange(len(rows)).split(step):
        moved = J._apply(factors.held.dense(rows[some]))
        found[some] = slopes.along(lin.codomain.split(moved)).to(found.dtype)
    return found


@final
class _Slopes:
    """What the terms of a batch's labels say at the output.

    Args:
        point: The batch.
    """

    def __init__(self, point: BatchPoint) -> None:
        self.batch: Batch = point.batch
        self.losses, self.found = point.objective.losses, point.objective.recorded(point.batch.x, "tokens")
        shares = self.losses.label_shares(self.batch.y)
        # A term's part of its sample's loss; in a sum all of it.
        self.parts = shares / shares.sum(1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
        if self.losses.reduction == "sum":
            self.parts = (shares > 0).to(shares)
        self.whole = self._slopes(shares > 0)
        self.axis = self._axis(shares > 0)

    def _slopes(self, kept: Tensor) -> list[Tensor | None]:
        """Return the slopes of the samples' losses, of which some labels are kept."""
        y = self.losses.with_labels(self.batch.y, kept)

        def build(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Any, Tensor]:
            return self.found.tree.build(outputs), targets[0]

        return row_cotangents(self.found.lin, self.losses.scalar, [y], build).gradients

    def _axis(self, counted: Tensor) -> int | None:
        """Return the axis of the output's positions, of which each belongs to one label; None where there is none.

        Where every second label is kept, the slope is that of the whole at their positions, and zero elsewhere.
        """
        used = [i for i, slope in enumerate(self.whole) if slope is not None]
        whole = self.whole[used[0]] if len(used) == 1 else None
        if whole is None or whole.ndim < 3:
            return None
        kept = counted & (private_noise(self.parts) > 0)
        half = self._slopes(kept)[used[0]]
        weight = (self.parts * kept).sum(1) if self.losses.reduction == "mean" else self.parts.new_ones(len(kept))
        found = whole * 0 if half is None else half * weight.to(half).view(-1, *[1] * (half.ndim - 1))
        for axis in dict.fromkeys((1, whole.ndim - 1)):
            if whole.shape[axis] == counted.shape[1]:
                at = self._spread(kept, axis, whole.ndim).expand_as(whole)
                near = worst_disagreement([(found, whole * at)]) <= self.found.lin.tolerance
                if near and not bool(found[~at].any()):
                    return axis
        return None

    def _spread(self, labels: Tensor, axis: int, axes: int) -> Tensor:
        """Return numbers of labels at the positions of the output that belong to them, broadcasting."""
        lag = self.losses.lag(self.batch.y)
        moved = torch.nn.functional.pad(labels[:, lag:], (0, lag))
        return moved.view(len(moved), *[1] * (axis - 1), -1, *[1] * (axes - axis - 1))

    def along(self, moved: Sequence[Tensor]) -> Tensor:
        """Return how the terms change, `(m, n, T)`, where outputs `(m, n, …)` do."""
        if self.axis is None:
            return self._one_by_one(moved)
        ((slope, change),) = [(s, c) for s, c in zip(self.whole, moved, strict=True) if s is not None]
        terms = (slope * change).movedim(self.axis + 1, 2).flatten(3).sum(3)
        lag = self.losses.lag(self.batch.y)
        return torch.nn.functional.pad(terms[:, :, : terms.shape[2] - lag], (lag, 0))

    def _one_by_one(self, moved: Sequence[Tensor]) -> Tensor:
        rows, width = self.batch.y.shape
        found = moved[0].new_zeros(moved[0].shape[0], rows, width)
        for t in range(width):
            if bool(self.parts[:, t].any()):
                kept = torch.zeros_like(self.parts, dtype=torch.bool)
                kept[:, t] = True
                for slope, change in zip(self._slopes(kept & (self.parts > 0)), moved, strict=True):
                    if slope is not None:
                        found[:, :, t] += (slope * change).flatten(2).sum(2)
                found[:, :, t] *= torch.where(self.parts[:, t] > 0, self.parts[:, t], 0.0).to(found)
        return found
