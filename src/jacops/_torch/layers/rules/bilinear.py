"""Bilinear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rule import Entry, RowLayout, Rule, last_axis, output_shape


class Trilinear(Rule):
    """`z_o = x^T W_o y`: the weight is multiplied by the outer product of both inputs."""

    kind = "outer"
    _AXES = ((1, 3), (0,), (1, 2), (2, 3))  # how torch's bilinear layer calls the general operation

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Refuse other sums than a bilinear layer's."""
        axes = (node._saved_expand1, node._saved_expand2, node._saved_expand3, node._saved_sumdim)
        if tuple(tuple(int(i) for i in own) for own in axes) != self._AXES or entry.turned or entry.copies > 1:
            return "it is not a bilinear layer"
        return None if isinstance(node._saved_i3, Tensor) else "an input was not kept"

    def source(self, node: Any) -> Tensor | None:
        """Return the first input."""
        return node._saved_i1

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return outer products of the inputs."""
        return torch.einsum("ri,rj->rij", node._saved_i1, node._saved_i3).flatten(1).unsqueeze(1)

    def layout(self, node: Any, entry: Entry) -> RowLayout:
        """Channels are last."""
        return last_axis(output_shape(node))
