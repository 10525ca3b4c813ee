"""Convolutions and transposed convolutions over one, two or three axes, in groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .rule import Entry, RowLayout, Rule, output_shape, second_axis


class Convolution(Rule):
    """The weight is multiplied by patches of the input.

    A transposed convolution is seen from its input: every pixel of that multiplies the patch of the output over which
    it is spread, so that operand and cotangent change places.
    """

    kind = "outer"

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Refuse weights that were turned or repeated on the way."""
        return "the kernel was turned or repeated" if entry.turned or entry.copies > 1 else None

    def turned(self, node: Any, entry: Entry) -> bool:
        """A transposed convolution's kernel is stored inputs first."""
        return bool(node._saved_transposed)

    def source(self, node: Any) -> Tensor | None:
        """Return the input."""
        return node._saved_input

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return `(samples * positions, groups, in)`: patches under the kernel, or pixels."""
        a = node._saved_input
        found = a.flatten(2).transpose(1, 2) if node._saved_transposed else _patches(node, a)
        return _by_group(node, found)

    def rows(self, node: Any, delta: Tensor, entry: Entry, operand: Tensor | None) -> Tensor:
        """Return patches of a transposed convolution's cotangent, `(samples * positions, groups, out)`."""
        # Output padding may add patches that no pixel of the input belongs to.
        return _by_group(node, _patches(node, delta, node._saved_input.shape[2:]))

    def layout(self, node: Any, entry: Entry) -> RowLayout | None:
        """Channels are second; patches of an output overlap and are no channels of it."""
        shape = output_shape(node)
        return None if node._saved_transposed else second_axis(shape, shape[0], int(node._saved_groups))

    def patch_bytes(self, node: Any, entry: Entry) -> int:
        """Return the bytes of the operand's patches, before there are any."""
        if node._saved_transposed:
            return 0
        shape = output_shape(node)
        inner = int(node._saved_groups) * entry.shape[1:].numel()
        return shape[0] * shape[2:].numel() * inner * entry.dtype.itemsize


def _by_group(node: Any, values: Tensor) -> Tensor:
    return values.flatten(0, 1).unflatten(1, (int(node._saved_groups), -1))


def _patches(node: Any, a: Tensor, positions: torch.Size | None = None) -> Tensor:
    """Return `(samples, positions, in)` of the first positions along each axis, or of all."""
    kernel = tuple(node._saved_weight.shape[2:])
    dilation, padding, stride = (
        tuple(int(i) for i in s) for s in (node._saved_dilation, node._saved_padding, node._saved_stride)
    )
    if torch.is_grad_enabled() and a.requires_grad and len(kernel) < 3 and positions is None:
        if len(kernel) == 1:
            a, kernel = a.unsqueeze(2), (1, *kernel)
            dilation, padding, stride = (1, *dilation), (0, *padding), (1, *stride)
        return F.unfold(a, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
    return _windows(a, kernel, dilation, padding, stride, positions)


def _windows(
    a: Tensor,
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    stride: tuple[int, ...],
    positions: torch.Size | None,
) -> Tensor:
    """Return `(samples, positions, in)`, a view of `(in, samples, positions)`, which is copied in long runs."""
    axes = len(kernel)
    a = F.pad(a, [p for own in reversed(padding) for p in (own, own)]) if any(padding) else a
    for axis in range(axes):
        a = a.unfold(axis + 2, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
        a = a if positions is None else a.narrow(axis + 2, 0, positions[axis])
    a = a[(..., *(slice(None, None, step) for step in dilation))]
    a = a.permute(1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes))
    inner, samples, many = (a.shape[i:j].numel() for i, j in ((0, 1 + axes), (1 + axes, 2 + axes), (2 + axes, a.ndim)))
    return a.reshape(inner, samples, many).permute(1, 2, 0)
