"""Gains and biases of normalisations: by layer, group, instance, or kept statistics of batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import Entry
from .scale import Broadcast, ByChannel


class LayerGain(Broadcast):
    """The gain of a layer norm."""

    def source(self, node: Any) -> Tensor | None:
        """Return the input."""
        return node._saved_input

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return the input with the mean taken off and the spread divided out."""
        axes = len(node._saved_normalized_shape)
        return _normal(node._saved_input, node._saved_result1, node._saved_result2, axes)


class GroupGain(ByChannel):
    """The gain of a group norm."""

    def source(self, node: Any) -> Tensor | None:
        """Return the input."""
        return node._saved_input

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return the input, standardised by group."""
        a, group = node._saved_input, int(node._saved_group)
        grouped = a.reshape(a.shape[0], group, -1)
        return _normal(grouped, node._saved_result1.unsqueeze(2), node._saved_result2.unsqueeze(2), 1).reshape(a.shape)


class BatchOffset(ByChannel):
    """The bias of a batch norm by kept statistics, or of an instance norm.

    Torch records an instance norm as a batch norm in which all samples are one, with weights repeated for each.
    """

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Refuse statistics of a batch, which mix samples."""
        if entry.copies > 1 and node._saved_input.shape[0] != 1:
            return "the vector is repeated"
        own = _by_instance(node, entry)
        kept = not _by_batch(node) and node._saved_running_mean is not None
        return None if own or kept else "statistics of the batch mix samples"


class BatchGain(BatchOffset):
    """The gain of the same."""

    def source(self, node: Any) -> Tensor | None:
        """Return the input."""
        return node._saved_input

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return the input, standardised."""
        a = node._saved_input
        if _by_batch(node):
            axes = (1, -1, 1)
            flat = _normal(a.flatten(2), node._saved_result1.view(axes), node._saved_result2.view(axes), 1)
            return flat.reshape(a.shape)
        axes = (1, -1, *[1] * (a.ndim - 2))
        spread = (node._saved_running_var + node._saved_eps).rsqrt()
        return (a - node._saved_running_mean.view(axes)) * spread.view(axes)


def _by_instance(node: Any, entry: Entry) -> bool:
    """Return whether statistics are those of each sample and channel (as one sample, with copied weights, in torch)."""
    return _by_batch(node) and entry.repeated and node._saved_input.shape[0] == 1


def _by_batch(node: Any) -> bool:
    """Return whether statistics are those of the input; cuDNN's operation is used for nothing else."""
    return bool(getattr(node, "_saved_training", True))


def _normal(a: Tensor, mean: Tensor, spread: Tensor, axes: int) -> Tensor:
    """Return `(a - mean) * spread`; what was saved leads nowhere, so a graph goes by definitions."""
    mean, spread, over = mean.detach(), spread.detach(), tuple(range(-axes, 0))
    if torch.is_grad_enabled() and a.requires_grad:
        moving, variance = a.mean(over, keepdim=True), a.var(over, correction=0, keepdim=True)
        mean, spread = moving, (spread**-2 + (variance - variance.detach())) ** -0.5
    return (a - mean) * spread
