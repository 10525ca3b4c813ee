"""What a batch's loss is made of: the losses of its rows, and what it divides by.

A mean over a batch is a sum over a denominator that need not be the number of rows: class weights and ignored targets
change it. Curvature over a data set adds numerators and denominators and divides once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from ..._runtime.contexts import random_state_kept
from ..._runtime.restoring import restoring
from ..._trees import flatten
from ..._words import Reduction
from .loss_facts import Reweighted, counts_targets, is_torch_module, torch_loss
from .losses import call_loss


class RowLosses:
    """The losses of single rows behind `loss(output, y)`.

    Args:
        loss: As the user wrote it.
        reduction: How it reduces a batch; by default what `loss.reduction` says, else the mean.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], reduction: Reduction | None = None) -> None:
        self.loss = loss
        declared = getattr(loss, "reduction", "mean")
        self.reduction: Reduction = reduction or ("sum" if declared == "sum" else "mean")
        self.scalar = _OfRows(self) if declared == "none" else loss
        self._counts: bool | None = None

    def denominators(self, y: Any, rows: int) -> Tensor:
        """Return what each row adds to the denominator of a mean, `(rows,)`: 1, or its targets' number or weights."""
        if not isinstance(y, Tensor):
            leaves = [leaf for leaf in flatten(y, "y")[0] if isinstance(leaf, Tensor)]
            return torch.ones(rows, dtype=torch.float64, device=leaves[0].device if leaves else None)
        if not self.counts_targets(y):
            return torch.ones(rows, dtype=torch.float64, device=y.device)
        weight, ignored = getattr(self.loss, "weight", None), getattr(self.loss, "ignore_index", -100)
        counted = y != ignored
        if weight is None:
            shares = counted.double()
        else:
            shares = weight.detach().double().to(y.device)[y.clamp(0, len(weight) - 1)] * counted
        return shares.reshape(rows, -1).sum(1)

    def counts_targets(self, y: Any) -> bool:
        """Return whether the loss divides by the number, or the weights, of labels that it counts."""
        if not isinstance(y, Tensor) or y.is_floating_point():
            return False
        # Until `settle` has computed it, a subclass is expected to divide as its parent does.
        descended = isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss)
        return counts_targets(self.loss, y) or (descended if self._counts is None else self._counts)

    def may_count(self, y: Any) -> bool:
        """Return whether it takes calls of the loss to find out by what it divides."""
        labels = isinstance(y, Tensor) and y.ndim > 0 and not y.is_floating_point() and not y.is_complex()
        return self.reduction == "mean" and torch_loss(self.loss) is None and labels and y.dtype != torch.bool

    def settle(self, output: Any, y: Any) -> None:
        """Compute how a loss that is none of torch's own divides: by rows, or by the labels that it counts.

        One label is ignored for that. A loss that does neither, or refuses such labels, stays what it was taken for.

        Args:
            output: The model's output for a few rows.
            y: Their labels.
        """
        leaves, tree = flatten((output, y.clone()), "loss")
        if y.shape[0] == 1:  # of one row, all means are the same
            leaves = [torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
        output, y = tree.build(leaves)
        first, ignored = y[0].reshape(-1), getattr(self.loss, "ignore_index", -100)
        first[(first != ignored).nonzero()[:1, 0]] = ignored
        y[0] = first.reshape(y.shape[1:])
        before, fits = self._counts, []
        for counts in (False, True):
            self._counts = counts
            try:
                fits.append(self._divides_so(output, y))
            except (ValueError, IndexError, RuntimeError):
                fits.append(False)
        self._counts = fits[1] if fits[0] != fits[1] else before

    @restoring
    def _divides_so(self, output: Any, y: Tensor) -> bool:
        rows = y.shape[0]
        shares = self.denominators(y, rows)
        with torch.no_grad(), random_state_kept():
            whole = float(call_loss(self.scalar, output, y)) * float(shares.sum())
            terms = self._one_by_one(output, y, shares)
        scale = max(float(terms.abs().sum()), 1e-30)
        return abs(whole - float(terms.sum())) <= 1e-4 * scale  # in float32; the share of one label is far more

    def reduced(self, output: Any, y: Any) -> Tensor:
        """Return the mean over rows, or the sum, of a loss that does not reduce them itself."""
        leaves = [leaf for leaf in flatten(y, "y")[0] if isinstance(leaf, Tensor)]
        rows = leaves[0].shape[0] if leaves else 0
        terms = self.terms(output, y, rows).sum()
        return terms / self.denominators(y, rows).sum().to(terms) if self.reduction == "mean" else terms

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
            one, target = tree.build(
                [leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
            )
            value = call_loss(self.loss, one, target)
            parts.append(value * float(shares[i]) if float(shares[i]) else torch.zeros_like(value))
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
