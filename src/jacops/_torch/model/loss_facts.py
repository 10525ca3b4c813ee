"""Facts about torch's own losses, known by their exact type or identity and by nothing else.

A subclass, a function that shares a name, a loss with a replaced `nodewise` or with hooks may compute anything: what
such a loss is has to be read off its values and derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules import module as _modules

Loss = Callable[..., Any]

_NAMES: dict[type[nn.Module], str] = {
    nn.MSELoss: "mse_loss",
    nn.L1Loss: "l1_loss",
    nn.SmoothL1Loss: "smooth_l1_loss",
    nn.HuberLoss: "huber_loss",
    nn.NLLLoss: "nll_loss",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCELoss: "binary_cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
    nn.SoftMarginLoss: "soft_margin_loss",
    nn.PoissonNLLLoss: "poisson_nll_loss",
    nn.KLDivLoss: "kl_div",
    nn.HingeEmbeddingLoss: "hinge_embedding_loss",
}
_FUNCTIONS: dict[str, Loss] = {name: getattr(F, name) for name in _NAMES.values()}  # as torch defines them
_CLASSES = {
    kind: kind.forward
    for kind in vars(nn.modules.loss).values()
    if isinstance(kind, type) and issubclass(kind, nn.modules.loss._Loss)
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Convex in the output whatever their options and targets are: torch refuses options for which they would not be.
_CONVEX = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "nll_loss", "soft_margin_loss")


class Reweighted:
    """A loss that sums the losses of rows times weights that are not negative.

    Attributes:
        rows_of: The loss of the rows.
    """

    rows_of: Loss


def is_torch_module(loss: Any) -> bool:
    """Return whether this is one of torch's loss modules as torch defines it: no subclass, nothing replaced."""
    kind = type(loss)
    if kind not in _CLASSES or kind.forward is not _CLASSES[kind] or vars(loss).keys() & {"forward", "_call_impl"}:
        return False
    return not any(vars(loss).get(name) or getattr(_modules, f"_global{name}", None) for name in _HOOKS)


def torch_loss(loss: Any) -> str | None:
    """Return which function of `torch.nn.functional` a loss is or calls; None where that is not known for certain."""
    for name, function in _FUNCTIONS.items():
        if loss is function:
            return name
    name = _NAMES.get(type(loss))
    if name is None or not is_torch_module(loss) or getattr(F, name) is not _FUNCTIONS[name]:
        return None
    return name


def counts_targets(loss: Any, y: Any) -> bool:
    """Return whether a loss is torch's cross-entropy or NLL with labels, whose mean divides by their weights."""
    return isinstance(y, Tensor) and not y.is_floating_point() and torch_loss(loss) in ("cross_entropy", "nll_loss")


class LabelSettings(NamedTuple):
    """All that torch's own cross-entropy depends on besides finite scores and their labels, where it has no weights."""

    reduction: str
    ignored: int


def label_settings(loss: Any, y: Any, output: Any) -> LabelSettings | None:
    """Return the settings of torch's own cross-entropy of scores by labels.

    None for any other loss, also where labels are weighted or smoothed, or scores are coarser than float32: what such a
    loss is has to be read off its graph.
    """
    if not counts_targets(loss, y) or torch_loss(loss) != "cross_entropy" or type(output) is not Tensor:
        return None
    shape, exact = output.shape, output.dtype in (torch.float32, torch.float64)
    if not exact or y.dtype is not torch.int64 or len(shape) < 2 or y.shape != shape[:1] + shape[2:] or not y.numel():
        return None
    if isinstance(loss, nn.Module) and (loss.weight is not None or loss.label_smoothing):
        return None
    return LabelSettings(reduction_of(loss), getattr(loss, "ignore_index", -100))


def are_classes(y: Tensor, classes: int, ignored: int) -> bool:
    """Return whether labels are those of so many classes, or are ignored: torch refuses others."""
    low, high = torch.stack(torch.aminmax(y)).tolist()  # one look at a device
    return (low >= 0 and high < classes) or bool((((y >= 0) & (y < classes)) | (y == ignored)).all())


def reduction_of(loss: Any) -> str:
    """Return how a loss of torch reduces what it computes; its functions take the mean."""
    return getattr(loss, "reduction", "mean") if isinstance(loss, nn.Module) else "mean"


def counted(loss: Any, y: Tensor) -> Tensor:
    """Return which labels a loss with `ignore_index` counts."""
    return y != getattr(loss, "ignore_index", -100)


def counted_labels(loss: Any, y: Any) -> Tensor | None:
    """Return which labels count in one of torch's losses, or in a sum of its rows; None where that is not known."""
    loss = loss.rows_of if isinstance(loss, Reweighted) else loss
    return counted(loss, y) if counts_targets(loss, y) else None


def terms_per_row(loss: Any, y: Any) -> int | None:
    """Return of how many terms torch's own mean over a row's entries is taken; None where that is not known."""
    name = torch_loss(loss)
    if name is None or reduction_of(loss) not in ("mean", "none") or not isinstance(y, Tensor) or not y.ndim:
        return None
    if name in ("cross_entropy", "nll_loss"):  # targets that are probabilities of classes
        return y[0].numel() // y.shape[1] if y.is_floating_point() and y.numel() and y.ndim > 1 else None
    return y[0].numel() if y.shape[0] else 1


def is_convex(loss: Any, y: Any) -> bool:
    """Return whether a loss is known to be convex in the model's output; False where that is to be computed."""
    if isinstance(loss, Reweighted):
        return is_convex(loss.rows_of, y)
    name = torch_loss(loss)
    if name == "cross_entropy":
        return counts_targets(loss, y) and _no_negative(loss, "weight")
    if name == "binary_cross_entropy_with_logits":
        labels = isinstance(y, Tensor) and bool(((y >= 0) & (y <= 1)).all())
        return _no_negative(loss, "weight") and (
            getattr(loss, "pos_weight", None) is None or (labels and _no_negative(loss, "pos_weight"))
        )
    if name == "poisson_nll_loss":
        return getattr(loss, "log_input", True) is True
    return name in _CONVEX


def _no_negative(loss: Any, name: str) -> bool:
    weights = getattr(loss, name, None)
    return weights is None or (isinstance(weights, torch.Tensor) and bool((weights >= 0).all()))
