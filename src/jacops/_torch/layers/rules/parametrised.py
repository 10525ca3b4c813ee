"""Weights that are computed from parameters: views, repetitions, weight norm, orthogonal and other parametrisations.

A view that keeps the order of entries, a transposition and a repetition along the front are seen through. Whatever else
makes a weight of parameters alone is the same for all samples: rows by the weight are pulled back to the parameters by
one backward pass, many at once, over the few operations between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ...._ladder.failures import attempt
from ...._runtime.contexts import sweeping
from ...._runtime.restoring import restoring
from .rule import Entry, output_shape

_SAME_ORDER = {
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
_GROWTH = 4  # a weight with many times more entries than its parameters is hardly one: it may have some per sample


def passed_on(node: Any, entry: Entry) -> Entry | None:
    """Return how a leaf arrives behind an operation that is seen through; None for other operations."""
    name = node.name()
    if name in _SAME_ORDER:
        return _reshaped(entry, output_shape(node))
    if name in ("TBackward0", "TransposeBackward0", "TransposeBackward1", "PermuteBackward0"):
        return _permuted(entry, _axes(node, len(entry.shape)))
    if name in ("ExpandBackward0", "RepeatBackward0"):
        return _repeated(entry, output_shape(node), tuple(getattr(node, "_saved_repeats", ())))
    return None


def _reshaped(entry: Entry, shape: torch.Size) -> Entry | None:
    kept = not entry.turned or shape[-2:] == entry.shape[-2:]
    return replace(entry, shape=shape) if kept and shape.numel() == entry.shape.numel() else None


def _axes(node: Any, many: int) -> list[int]:
    """Return the order into which an operation brings axes."""
    name = node.name()
    if name == "TBackward0":
        return [1, 0] if many == 2 else [*range(many)]
    if name == "PermuteBackward0":
        return [_axis(i, many) for i in node._saved_dims]
    axes, a, b = list(range(many)), _axis(node._saved_dim0, many), _axis(node._saved_dim1, many)
    axes[a], axes[b] = axes[b], axes[a]
    return axes


def _axis(number: int, many: int) -> int:
    """Return an axis that is counted from the front: -1 comes back as an unsigned number."""
    return (int(number) - 2**64 if int(number) >= 2**63 else int(number)) % max(1, many)


def _permuted(entry: Entry, axes: list[int]) -> Entry | None:
    shape = torch.Size(entry.shape[i] for i in axes)
    last = len(axes) - 1
    if axes == [*range(last - 1), last, last - 1]:
        return replace(entry, shape=shape, turned=not entry.turned)
    moved = [i for i in axes if entry.shape[i] != 1]  # axes of length one keep the order of entries wherever they go
    return _reshaped(entry, shape) if moved == sorted(moved) else None


def _repeated(entry: Entry, shape: torch.Size, repeats: tuple[int, ...]) -> Entry | None:
    own, whole = list(entry.shape), list(shape)
    if repeats:
        along_front = all(int(times) == 1 for times in repeats[1:])
    else:
        while own and own[0] == 1:
            own.pop(0)
        along_front = whole[len(whole) - len(own) :] == own
    copies = shape.numel() // max(1, entry.shape.numel())
    if not along_front:
        return None
    return replace(entry, shape=shape, copies=entry.copies * copies, repeated=True)


def derived(node: Any, number: int, entry: Entry, entries: int) -> Entry | None:
    """Return a tensor that is computed from a leaf as something that enters by itself.

    Args:
        node: The operation that computes it.
        number: Which of its outputs.
        entry: The leaf.
        entries: How many entries all leaves have that it is computed from.
    """
    meta = node._input_metadata[number]
    shape = torch.Size(int(size) for size in meta.shape)
    if meta.dtype != entry.dtype or shape.numel() > _GROWTH * entries:
        return None
    return Entry(entry.leaf, shape, entry.dtype, shape, edge=GradientEdge(node, number))


@restoring
def pulled_back(edge: GradientEdge, leaf: Tensor, rows: Tensor) -> Tensor:
    """Return rows `(m, *leaf)` by a leaf from rows `(m, …)` by a tensor that is computed from it, with their graph.

    Raises:
        RouteFailedError: Torch cannot take many at once.
    """

    @restoring
    def swept() -> Tensor:
        with sweeping(leaf):
            options = {"retain_graph": True, "is_grads_batched": True, "create_graph": rows.requires_grad}
            (found,) = torch.autograd.grad([edge], [leaf], [rows], **options)  # type: ignore[arg-type]
        return found

    return attempt(swept)
