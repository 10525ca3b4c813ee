"""The Hessian of cross-entropy by the output, read off its labels where that was proved for the loss's graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._finite import is_finite
from ..._ladder.names import Fact
from ..model.loss_facts import LabelSettings, counts_targets, torch_loss
from ..model.output_curvature import ProbedHessian, Softmax
from ..model.row_losses import RowLosses
from ..sweeps.proofs import Proofs


@dataclass(frozen=True, eq=False)
class KnownSoftmax:
    """The Hessian that a loss with these labels and weights is expected to have.

    Attributes:
        form: The Hessian.
        reduction: How the loss is taken to reduce rows.
        proofs: Of the loss's graph, recorded at the output; or of the model's.
        lasting: It depends on nothing but scores, labels and weights, so that what was proved once holds.
        settings: Of torch's own cross-entropy, whose slopes and Hessian depend on nothing else.
    """

    form: Softmax
    reduction: str
    proofs: Proofs
    lasting: bool
    settings: LabelSettings | None = None

    def is_due(self, what: Fact = Fact.SOFTMAX_OF_LABELS) -> bool:
        """Return whether it has to be compared with products: it is not proved for this graph, or does not last.

        A loss of the user's may add a prior to the scores, or leave out labels, by values that no graph keeps.
        """
        return not self.lasting or self.proofs.needs(what, self.reduction, self.settings)

    def proved(self, what: Fact = Fact.SOFTMAX_OF_LABELS) -> None:
        """Remember that it was compared."""
        self.proofs.remember(what, self.reduction, self.settings)

    def agrees(self, probed: ProbedHessian) -> bool:
        """Return whether products are what it gives, and remember that."""
        if not probed.agrees(self.form):
            return False
        self.proved()
        return True


def softmax_of_labels(
    losses: RowLosses,
    y: Any,
    outputs: Sequence[Tensor],
    proofs: Proofs,
    counted: Tensor | None = None,
    settings: LabelSettings | None = None,
) -> KnownSoftmax | None:
    """Return the Hessian of cross-entropy with these labels and weights; None where they do not fit the output.

    Nothing is expected where something is not finite or weights are negative: that is found from products.

    Args:
        losses: Of the rows.
        y: The labels.
        outputs: The model's output.
        proofs: Of the loss's graph.
        counted: Which labels count, where that is known.
        settings: Of torch's own cross-entropy.
    """
    output = outputs[0].detach()
    if len(outputs) != 1 or not isinstance(y, Tensor) or not losses.counts_targets(y) or losses.lag(y):
        return None
    axes = {axis for axis in (1, output.ndim - 1) if y.shape == output.shape[:axis] + output.shape[axis + 1 :]}
    if output.ndim < 2 or len(axes) != 1:
        return None
    (axis,) = axes
    shape = output.shape
    folded = (shape[0], shape[1:axis].numel(), shape[axis], shape[axis + 1 :].numel())
    p, places = output.softmax(axis).reshape(folded), (folded[0], folded[1], 1, folded[3])
    if not is_finite(p):
        return None
    if settings is not None:
        real = (y != settings.ignored).reshape(places).to(output.device)
        root = real.to(output)
        if losses.reduction == "mean":
            root *= root.sum(dtype=torch.float64).clamp_(min=1).rsqrt_()
        return KnownSoftmax(Softmax(p, root, real), losses.reduction, proofs, True, settings)
    shares = losses.label_shares(y).reshape(places)
    factor = shares / shares.sum() if losses.reduction == "mean" else shares
    real = shares > 0 if counted is None else counted.reshape(shares.shape)
    root = factor.sqrt().to(output)
    if not is_finite(root):  # weights below zero have no roots
        return None
    own = torch_loss(losses.loss) == "cross_entropy" and not getattr(losses.loss, "label_smoothing", 0)
    return KnownSoftmax(Softmax(p, root, real.to(output.device)), losses.reduction, proofs, own)


class RecordedLabels:
    """Labels of a loss that is recorded at an output, for as long as the loss stays what it was then.

    Args:
        loss: The loss.
        y: The labels that were recorded.
        outputs: The model's output.
        proofs: Of the loss's graph.
    """

    def __init__(self, loss: Any, y: Any, outputs: Sequence[Tensor], proofs: Proofs) -> None:
        self._loss, self._y, self._outputs, self._proofs = loss, y, outputs, proofs
        self._weight, self._noted = _settings(loss)

    def softmax(self) -> KnownSoftmax | None:
        """Return the Hessian that it is expected to have; None unless it is torch's own cross-entropy."""
        if not counts_targets(self._loss, self._y) or torch_loss(self._loss) != "cross_entropy":
            return None
        weight, settings = _settings(self._loss)
        if weight is not self._weight or settings != self._noted:  # what was recorded has the old ones
            return None
        return softmax_of_labels(RowLosses(self._loss), self._y, self._outputs, self._proofs)


def _settings(loss: Any) -> tuple[Tensor | None, tuple[Any, ...]]:
    """Return what a loss module weighs labels by, and its other settings; functions have none."""
    if not isinstance(loss, nn.Module):
        return None, ()
    weight: Any = getattr(loss, "weight", None)
    version = weight._version if isinstance(weight, Tensor) and not weight.is_inference() else None
    return weight, (version, getattr(loss, "ignore_index", None), getattr(loss, "reduction", None))
