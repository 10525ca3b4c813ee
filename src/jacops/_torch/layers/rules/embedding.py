"""Tables in which rows are looked up: embeddings, of tokens or of positions that all samples share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .rule import Entry, RowLayout, Rule, last_axis, output_shape


class Embedding(Rule):
    """Cotangents are added to the rows that were looked up, apart from that of padding."""

    kind = "lookup"

    def refuses(self, node: Any, entry: Entry) -> str | None:
        """Refuse gradients that are divided by how often a row was looked up."""
        if node._saved_scale_grad_by_freq:
            return "gradients are scaled by frequency"
        return "the table was turned or repeated" if entry.turned or entry.copies > 1 else None

    def source(self, node: Any) -> Tensor | None:
        """Return the indices."""
        return node._saved_indices

    def operand(self, node: Any, entry: Entry) -> Tensor:
        """Return the indices, one for each row."""
        return node._saved_indices.flatten()

    def rows(self, node: Any, delta: Tensor, entry: Entry, operand: Tensor | None) -> Tensor:
        """Return `(R, width)`, zero where the entry of padding was looked up."""
        padding = int(node._saved_padding_idx)
        padding = padding if padding < 2**63 else -1  # "none" comes back as an unsigned number
        rows, indices = delta.flatten(0, -2), node._saved_indices.flatten()
        kept = (indices != padding).to(delta.dtype).repeat(rows.shape[0] // max(1, indices.numel()))
        return rows * kept.unsqueeze(1)

    def layout(self, node: Any, entry: Entry) -> RowLayout:
        """Channels are last."""
        return last_axis(output_shape(node))


def repeating_sums(lookups: Iterable[Any], nodes: Iterable[Any], ends: Iterable[Any]) -> dict[Any, Any]:
    """Return the sum that repeats each lookup along a first axis, where it leads into nothing else.

    Args:
        lookups: Operations that look up.
        nodes: All operations.
        ends: Those whose outputs are requested.
    """
    ends = set(ends)
    into: dict[Any, list[Any]] = {node: [] for node in lookups if node not in ends}
    for node in nodes if into else ():
        for parent, _ in node.next_functions:
            if parent in into:
                into[parent].append(node)
    return {node: after[0] for node, after in into.items() if len(after) == 1 and _repeats(node, after[0])}


def _repeats(node: Any, after: Any) -> bool:
    if after.name() != "AddBackward0" or int(after._saved_alpha) != 1:
        return False
    own, whole = output_shape(node), output_shape(after)
    return len(whole) > 0 and whole[0] > 1 and own in (whole[1:], torch.Size((1, *whole[1:])))
