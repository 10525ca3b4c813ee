"""Vectors that are added to features or multiply them: biases, gains, slopes of PReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .rule import Entry, RowLayout, Rule, last_axis, output_shape, second_axis

Read = Callable[[Any], Tensor | None]


def nothing(node: Any) -> None:
    """Return no operand: the vector is added."""


class Broadcast(Rule):
    """A vector that is broadcast along leading axes, and along its own axes of length one."""

    kind = "vector"

    def __init__(self, read: Read = nothing, factors: tuple[str, ...] = ()) -> None:
        self._read, self.factors = read, factors
        self.has_source = read is not nothing or type(self).source is not Broadcast.source

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Refuse a vector that is as large as the output: it may have an entry per sample."""
        shape = output_shape(node)
        if entry.turned or entry.copies > 1 or _leading(shape, entry.shape) == 0:
            return "the vector is not broadcast along samples"
        factor = self.source(node)
        return None if factor is None or factor.shape == shape else "what it multiplies is broadcast, too"

    def source(self, node: Any) -> Tensor | None:
        """Return what multiplies the vector."""
        return self._read(node)

    def rows(self, node: Any, delta: Tensor, entry: Entry, operand: Tensor | None) -> Tensor:
        """Return `(R, *vector)`."""
        leaf = entry.shape
        lead = _leading(delta.shape, leaf)
        flat = delta.flatten(0, lead - 1)
        flat = flat if operand is None else flat * operand.reshape(-1, *operand.shape[lead:])
        inner = leaf[len(leaf) - (delta.ndim - lead) :]
        summed = [i + 1 for i, size in enumerate(inner) if size == 1 != flat.shape[i + 1]]
        return (flat.sum(summed, keepdim=True) if summed else flat).reshape(-1, *leaf)

    def layout(self, node: Any, entry: Entry) -> RowLayout:
        """Channels are last."""
        return last_axis(output_shape(node))


class Slope(Broadcast):
    """A slope multiplies what is negative."""

    def source(self, node: Any) -> Tensor | None:
        """Return the input."""
        return node._saved_self

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return the input where it is negative, else zero."""
        return node._saved_self.clamp(max=0)


class ByChannel(Rule):
    """A vector with an entry for each channel of an output `(samples, channels, …)`."""

    kind = "vector"

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Refuse repeated vectors."""
        return "the vector is repeated" if entry.copies > 1 else None

    def rows(self, node: Any, delta: Tensor, entry: Entry, operand: Tensor | None) -> Tensor:
        """Return `(samples, channels)`."""
        value = delta if operand is None else delta * operand
        value = value.reshape(entry.copies * value.shape[0], -1, *value.shape[2:]) if entry.copies > 1 else value
        return value.flatten(2).sum(2) if value.ndim > 2 else value

    def layout(self, node: Any, entry: Entry) -> RowLayout:
        """Channels are second."""
        shape = output_shape(node)
        return second_axis(shape, shape[0] * entry.copies)

    def entries(self, node: Any, entry: Entry, numbers: Tensor) -> Tensor:
        """Return the channel's own number."""
        shape = output_shape(node)
        return numbers.repeat(entry.copies).view(-1, *[1] * (len(shape) - 2)).expand(shape)


def _leading(output: Sequence[int], leaf: Sequence[int]) -> int:
    """Return how many leading axes of an operation's output a vector does not have."""
    lead = len(output) - len(leaf)
    return lead if lead > 0 else int(lead == 0 and len(leaf) > 0 and leaf[0] == 1)
