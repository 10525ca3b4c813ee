"""What a batch's loss is made of: the losses of its rows, and what it divides by.

A mean over a batch is a sum over a denominator that need not be the number of rows: class weights and ignored targets
change it. Curvature over a data set adds numerators and denominators and divides once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...trees import flatten
from .losses import call_loss

Reduction = Literal["mean", "sum"]
_BY_TARGET = (nn.CrossEntropyLoss, nn.NLLLoss)
_BY_TARGET_FUNCTIONS = (F.cross_entropy, F.nll_loss)
_FUNCTIONS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    *_BY_TARGET_FUNCTIONS,
)
_CONVEX = (nn.MSELoss, nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.SmoothL1Loss)
_CONVEX_FUNCTIONS = (
    F.mse_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy_with_logits,
    *_BY_TARGET_FUNCTIONS,
)


class RowLosses:
    """The losses of single rows behind `loss(output, y)`.

    Args:
        loss: As the user wrote it.
        reduction: How it reduces a batch; by default what `loss.reduction` says, else the mean.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], reduction: Reduction | None = None) -> None:
        self.loss = loss
        said = getattr(loss, "reduction", "mean")
        self.reduction: Reduction = reduction or ("sum" if said == "sum" else "mean")
        self.convex = isinstance(loss, _CONVEX) or loss in _CONVEX_FUNCTIONS
        self.scalar = self._mean_of_rows if said == "none" else loss

    def denominators(self, y: Any, rows: int) -> Tensor:
        """Return what each row adds to the denominator of a mean, `(rows,)`: 1, or the weights of its targets."""
        if not isinstance(y, Tensor):
            leaves = [leaf for leaf in flatten(y, "y")[0] if isinstance(leaf, Tensor)]
            return torch.ones(rows, dtype=torch.float64, device=leaves[0].device if leaves else None)
        if not self._counts_targets(y):
            return torch.ones(rows, dtype=torch.float64, device=y.device)
        weight, ignored = getattr(self.loss, "weight", None), getattr(self.loss, "ignore_index", -100)
        counted = y != ignored
        if weight is None:
            shares = counted.double()
        else:
            shares = weight.detach().double().to(y.device)[y.clamp(0, len(weight) - 1)] * counted
        shares = shares.reshape(rows, -1)
        # Without weights and ignored targets every row counts alike, as one.
        return shares.sum(1) / (shares.shape[1] if weight is None else 1)

    def _mean_of_rows(self, output: Any, y: Any) -> Tensor:
        """Return the mean over rows, or the sum, of a loss that does not reduce them itself."""
        leaves = [leaf for leaf in flatten(y, "y")[0] if isinstance(leaf, Tensor)]
        rows = leaves[0].shape[0] if leaves else 0
        terms = self.terms(output, y, rows).sum()
        return terms / self.denominators(y, rows).sum().to(terms) if self.reduction == "mean" else terms

    def _counts_targets(self, y: Tensor) -> bool:
        return (isinstance(self.loss, _BY_TARGET) or self.loss in _BY_TARGET_FUNCTIONS) and not y.is_floating_point()

    def terms(self, output: Any, y: Any, rows: int) -> Tensor:
        """Return the numerators `(rows,)` of a batch's loss: a row's own loss times its denominator."""
        alone = self._unreduced()
        if alone is not None and isinstance(output, Tensor):
            entries = call_loss(alone, output, y)
            if entries.ndim and entries.shape[0] == rows:
                by_row = entries.reshape(rows, -1)
                shared = by_row.shape[1] if self.reduction == "mean" and not self._weighs(y) else 1
                return by_row.sum(1) / shared
        shares = self.denominators(y, rows) if self.reduction == "mean" else torch.ones(rows)
        leaves, tree = flatten((output, y), "loss")
        parts: list[Tensor] = []
        for i in range(rows):
            one, target = tree.build(
                [leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
            )
            value = call_loss(self.loss, one, target)
            parts.append(value * float(shares[i]) if float(shares[i]) else torch.zeros_like(value))
        return torch.stack([part.reshape(()) for part in parts])

    def _weighs(self, y: Any) -> bool:
        return isinstance(y, Tensor) and self._counts_targets(y) and getattr(self.loss, "weight", None) is not None

    def _unreduced(self) -> Callable[[Any, Any], Tensor] | None:
        """Return the loss without its reduction; None where there is no telling."""
        if self.loss in _FUNCTIONS:
            return partial(self.loss, reduction="none")  # pyright: ignore[reportCallIssue]
        module = self.loss
        known = isinstance(module, nn.Module) and type(module).__module__ == "torch.nn.modules.loss"
        if known and getattr(module, "reduction", None) in ("mean", "sum", "none"):
            bare = copy.copy(module)
            vars(bare)["reduction"] = "none"
            return bare
        return None


def weighted(losses: RowLosses, weights: Tensor) -> Callable[[Any, Any], Tensor]:
    """Return `loss(output, y)`, the sum of the rows' numerators times their weights."""

    def loss(output: Any, y: Any) -> Tensor:
        terms = losses.terms(output, y, weights.shape[0])
        return (terms * weights.to(terms)).sum()

    return loss
