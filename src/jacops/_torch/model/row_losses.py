"""What a batch's loss is made of: the losses of its rows, and what it divides by.

A mean over a batch is a sum over a denominator that need not be the number of rows: class weights and ignored targets
change it. Curvature over a data set adds numerators and denominators and divides once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ..._runtime.contexts import private_noise, random_state_kept
from ..._runtime.restoring import restoring
from ..._trees import Tree, flatten, is_differentiable
from ..._words import Reduction
from .loss_facts import Reweighted, counts_targets, is_torch_module, torch_loss
from .losses import call_loss

Divisor = Literal["rows", "labels", "later labels"]
"""What a mean divides by: the rows, the labels that count, or those of them that come after a row's first one."""
_DIVISORS: list[Divisor] = ["rows", "labels", "later labels"]


class RowLosses:
    """The losses of single rows behind `loss(output, y)`.

    Args:
        loss: As the user wrote it.
        reduction: How it reduces a batch; by default `loss.reduction`, else the mean.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], reduction: Reduction | None = None) -> None:
        self.loss = loss
        declared = getattr(loss, "reduction", "mean")
        self.reduction: Reduction = reduction or ("sum" if declared == "sum" else "mean")
        self.scalar = _OfRows(self) if declared == "none" else loss
        self._by: Divisor | None = None
        self._ignored: int = getattr(loss, "ignore_index", -100)

    def denominators(self, y: Any, rows: int) -> Tensor:
        """Return what each row adds to the denominator of a mean, `(rows,)`: 1, or its targets' number or weights."""
        if not isinstance(y, Tensor):
            leaves = [leaf for leaf in flatten(y, "y")[0] if isinstance(leaf, Tensor)]
            return torch.ones(rows, dtype=torch.float64, device=leaves[0].device if leaves else None)
        return self._shares(self._divisor(y), y)

    def _shares(self, by: Divisor, y: Tensor) -> Tensor:
        if by == "rows":
            return torch.ones(y.shape[0], dtype=torch.float64, device=y.device)
        return self._label_shares(by, y).reshape(y.shape[0], -1).sum(1)

    def label_shares(self, y: Tensor) -> Tensor:
        """Return what each label adds to the denominator of a mean over labels, shaped like them."""
        return self._label_shares(self._divisor(y), y)

    def with_labels(self, y: Tensor, kept: Tensor) -> Tensor:
        """Return labels of which all but some are ignored."""
        return torch.where(kept, y, self._ignored)

    def lag(self, y: Tensor) -> int:
        """Return how many positions before a label the output is that predicts it."""
        return int(self._divisor(y) == "later labels")

    def _label_shares(self, by: Divisor, y: Tensor) -> Tensor:
        weight, counted = getattr(self.loss, "weight", None), y != self._ignored
        if by == "later labels" and y.ndim == 2:
            counted[:, :1] = False
        if weight is None:
            return counted.double()
        return weight.detach().double().to(y.device)[y.clamp(0, len(weight) - 1)] * counted

    def _divisor(self, y: Tensor) -> Divisor:
        """Return by what the loss of these targets divides."""
        if y.is_floating_point() or y.is_complex():
            return "rows"
        if counts_targets(self.loss, y):
            return "labels"
        # Until `settle` has computed it, a subclass is expected to divide as its parent does.
        return self._by or ("labels" if isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss) else "rows")

    def counts_targets(self, y: Any) -> bool:
        """Return whether the loss divides by the number, or the weights, of labels that it counts."""
        return isinstance(y, Tensor) and self._divisor(y) != "rows"

    def may_count(self, y: Any) -> bool:
        """Return whether it takes calls of the loss to find out by what it divides."""
        labels = isinstance(y, Tensor) and y.ndim > 0 and not y.is_floating_point() and not y.is_complex()
        own = self.scalar is not self.loss or torch_loss(self.loss) is not None
        return self.reduction == "mean" and not own and labels and y.dtype != torch.bool

    def ignores(self, y: Any) -> bool:
        """Return whether no label is one that a loss may count, so that nothing can be computed of how it divides."""
        return self.may_count(y) and not bool((y != self._ignored).any())

    def few_rows(self, y: Any, most: int) -> slice | Tensor:
        """Return which rows to take for a few: the first ones, of those with labels that a loss may count."""
        if not self.may_count(y) or self.ignores(y):
            return slice(0, most)
        return (y != self._ignored).reshape(y.shape[0], -1).any(1).nonzero()[:most, 0]

    def settle(self, output: Any, y: Tensor) -> None:
        """Compute how a loss that is none of torch's own divides: by rows, or by the labels that it counts.

        Some labels are ignored for that, by the number that the loss ignores, which is computed too. A loss that
        divides otherwise, or refuses such labels, stays what it was taken for.

        Args:
            output: The model's output for a few rows.
            y: Their labels.
        """
        if not self.may_count(y):
            return
        leaves, tree = flatten(output, "output")
        if y.shape[0] == 1:  # of one row, all means are the same
            leaves = [torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
            y = torch.cat([y, y])
        before = self._by, self._ignored
        for reach in (0.0, 1.0):  # rows of one and the same loss show only beside the output how they are weighed
            moved = [leaf + reach * private_noise(leaf) if is_differentiable(leaf) else leaf for leaf in leaves]
            near = tree.build(moved)
            by_rows = False
            for self._ignored in _ends(before[1], y):
                fitting = self._fitting(near, y)
                if len(fitting) == 1 and fitting != ["rows"]:
                    self._by = fitting[0]
                    return
                by_rows = by_rows or fitting == ["rows"]
            self._by, self._ignored = "rows" if by_rows else before[0], before[1]
            if by_rows:
                return

    def _fitting(self, output: Any, y: Tensor) -> list[Divisor]:
        """Return by what a loss may divide, judging by the losses of a few rows."""
        measured = [(labels, self._measured(output, labels)) for labels in self._probes(y)]
        known = _DIVISORS if y.ndim == 2 else _DIVISORS[:2]
        return [by for by in known if measured and all(self._fits(by, *one) for one in measured)]

    def _probes(self, y: Tensor) -> list[Tensor]:
        """Return labels of which the first row counts fewer than others."""
        ignored = self._ignored
        if y.ndim != 2 or y.shape[1] == 1:
            y = y.clone()
            first = y[0].reshape(-1)
            first[(first != ignored).nonzero()[:1, 0]] = ignored
            y[0] = first.reshape(y.shape[1:])
            return [y]
        counted, probes = y[y != ignored], []
        if counted.numel():
            y = torch.where(y == ignored, counted[0], y)
            for kept in ([0, -1], [0]):  # two labels, one after the first; then one, none after the first
                few = torch.zeros_like(y, dtype=torch.bool)
                few[1:, -3:] = few[0, kept] = True  # of long rows a few labels: a first one more shows in their number
                probes.append(torch.where(few, y, ignored))
        return probes

    @restoring
    def _measured(self, output: Any, y: Tensor) -> tuple[float, list[float]]:
        """Return the loss of some rows together, and of each alone; NaN where it refuses them."""
        leaves, tree = flatten((output, y), "loss")
        try:
            with torch.no_grad(), random_state_kept():
                whole = float(call_loss(self.scalar, output, y))
                return whole, [float(call_loss(self.loss, *_row(leaves, tree, i))) for i in range(y.shape[0])]
        except (ValueError, IndexError, RuntimeError, TypeError):
            return math.nan, [math.nan] * y.shape[0]

    def _fits(self, by: Divisor, y: Tensor, measured: tuple[float, list[float]]) -> bool:
        whole, alone = measured
        shares = self._shares(by, y).tolist()
        terms = [share * own for share, own in zip(shares, alone, strict=True) if share]
        scale = max(sum(map(abs, terms)), 1e-30)
        return abs(whole * sum(shares) - sum(terms)) <= 1e-4 * scale  # in float32; the share of one label is far more

    def reduced(self, output: Any, y: Any) -> Tensor:
        """Return the mean over rows, or the sum, of a loss that does not reduce them itself."""
        leaves = [leaf for leaf in flatten(y, "y")[0] if isinstance(leaf, Tensor)]
        rows = leaves[0].shape[0] if leaves else 0
        terms = self.terms(output, y, rows).sum()
        return terms / self.denominators(y, rows).sum().to(terms) if self.reduction == "mean" else terms

    def own(self, many: int) -> Callable[[Any, Any], Tensor]:
        """Return a loss of `many` rows that is the sum of their own losses; a row that is ignored has none."""

        def own(output: Any, y: Any) -> Tensor:
            shares = self.denominators(y, many) if self.reduction == "mean" else torch.ones(many)
            terms = self.terms(output, y, many)
            return (terms / torch.where(shares > 0, shares, 1.0).to(terms)).sum()

        return own

    def terms(self, output: Any, y: Any, rows: int) -> Tensor:
        """Return the numerators `(rows,)` of a batch's loss: a row's own loss times its denominator."""
        alone = self._unreduced()
        if alone is not None and isinstance(output, Tensor):
            entries = call_loss(alone, output, y)
            if entries.ndim and entries.shape[0] == rows:
                by_row = entries.reshape(rows, -1)
                counted = self.reduction == "sum" or self.counts_targets(y)
                return by_row.sum(1) if counted else by_row.mean(1)
        shares = self.denominators(y, rows) if self.reduction == "mean" else torch.ones(rows)
        return self._one_by_one(output, y, shares)

    def _one_by_one(self, output: Any, y: Any, shares: Tensor) -> Tensor:
        """Return each row's own loss, from a call of its own, times its share."""
        leaves, tree = flatten((output, y), "loss")
        parts: list[Tensor] = []
        for i in range(len(shares)):
            one, target = _row(leaves, tree, i)
            value = call_loss(self.loss, one, target)
            parts.append(value * float(shares[i]) if float(shares[i]) else _nothing(leaves, value))
        return torch.stack([part.reshape(()) for part in parts])

    def _unreduced(self) -> Callable[[Any, Any], Tensor] | None:
        """Return the loss without its reduction; None where that is not known."""
        if is_torch_module(self.loss) and getattr(self.loss, "reduction", None) in ("mean", "sum", "none"):
            bare = copy.copy(self.loss)
            vars(bare)["reduction"] = "none"
            return bare
        if torch_loss(self.loss) is not None and not isinstance(self.loss, nn.Module):
            return partial(self.loss, reduction="none")  # pyright: ignore[reportCallIssue]
        return None


def _ends(ignored: int, y: Tensor) -> list[int]:
    """Return labels that a loss may ignore: the usual one, 0 for padding, and what rows mostly begin and end with."""
    if y.ndim != 2 or not y.numel():
        return [ignored]
    return list(dict.fromkeys([ignored, 0, *y[:, [0, -1]].mode(0).values.tolist()]))


def _nothing(leaves: Sequence[Any], like: Tensor) -> Tensor:
    """Return zero that depends on all the output, as the losses of other rows do; a loss of no label is 0 / 0."""
    live = (leaf.reshape(-1)[:0].sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)
    return sum(live, like.new_zeros(())).to(like.dtype)


def _row(leaves: Sequence[Any], tree: Tree, i: int) -> tuple[Any, Any]:
    """Return the output and the target of one row."""
    return tree.build([leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves])


@final
class _OfRows(Reweighted):
    """The mean or the sum of a loss that does not reduce rows itself."""

    def __init__(self, losses: RowLosses) -> None:
        self.losses, self.rows_of = losses, losses.loss

    def __call__(self, output: Any, y: Any) -> Tensor:
        """Return the loss of some rows."""
        return self.losses.reduced(output, y)


@final
class Weighted(Reweighted):
    """The sum of rows' numerators times weights that are not negative.

    Args:
        losses: Of the rows.
        weights: One for each row.
    """

    def __init__(self, losses: RowLosses, weights: Tensor) -> None:
        self.losses, self.weights, self.rows_of = losses, weights, losses.loss

    def __call__(self, output: Any, y: Any) -> Tensor:
        """Return the loss of the rows."""
        terms = self.losses.terms(output, y, self.weights.shape[0])
        return (terms * self.weights.to(terms)).sum()
