"""Shared by derivatives by the input: the samples, and the reference of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from .._finite import require_finite
from .._torch.protocol import ConnectedModel, SampleChanges, Samples
from .._trees import Tree
from ..errors import NotDifferentiableError

Blocks = list[list[list[Tensor]]]  # [output][input][input], each `(n, *out, *in, *in)`
FLOOR = 1e-2  # parts below this share of a typical one are measured by it: they may hold rounding of the rest only


def part_of(
    samples: Samples,
    where: slice | Tensor,
    shift: Sequence[Tensor] | None = None,
    create_graph: bool = False,
    **changes: Unpack[SampleChanges],
) -> Samples:
    """Return some of the samples, moved by `shift` if there is one; `changes` are as in `Samples.over`."""
    values = [v[where] for v in samples.values]
    for index, change in zip(samples.inputs, shift or (), strict=shift is not None):
        values[index] = values[index] + change
    return samples.over(values, create_graph, **changes)


def output_entries(samples: Samples) -> int:
    """Return how many numbers the model gives for one sample."""
    one = [v[:1] if samples.count else v.new_zeros(1, *v.shape[1:]) for v in samples.values]
    with samples.explained():
        return sum(output.numel() for output in samples.runner.run(one).lin.outputs)


def tree_of(forward: ConnectedModel) -> Tree:
    if forward.tree is None:
        raise NotDifferentiableError.of("model", "not evaluated", "at least one sample must run")
    return forward.tree


def check_finite(call: str, blocks: Sequence[Tensor]) -> None:
    for block in blocks:
        require_finite(block, f"{call}: in a derivative by the input", " (first axis: sample).")


def detached(blocks: Blocks) -> Blocks:
    """Return blocks without their graph."""
    return [[[block.detach() for block in row] for row in grid] for grid in blocks]


def flat(blocks: Blocks) -> list[Tensor]:
    """Return all blocks one after the other."""
    return [block for grid in blocks for row in grid for block in row]


def matrices(block: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return a block `(n, *out, *a, *b)` as matrices `(n, out, a, b)`."""
    a, b = left.shape[1:].numel(), right.shape[1:].numel()
    out = block.shape[1 : block.ndim - left.ndim - right.ndim + 2].numel()
    return block.reshape(block.shape[0], out, a, b)


def compared(ones: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return for each sample how far two answers are apart, and their size plus a hundredth of a typical one."""
    left, right = _flat(ones), _flat(others)
    distance, one, other = torch.linalg.vector_norm(torch.stack([left - right, left, right]), dim=2)
    own = torch.maximum(one, other)
    return distance, own + FLOOR * own.square().mean().sqrt() + torch.finfo(own.dtype).tiny


def typical(parts: Sequence[Tensor]) -> float:
    """Return the root mean square of a sample's size."""
    return float(torch.linalg.vector_norm(_flat(parts), dim=1).square().mean().sqrt()) if len(parts[0]) else 0.0


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors with a row per sample as one matrix, in double precision."""
    device = parts[0].device
    return torch.cat([p.detach().reshape(p.shape[0], -1).to(device, torch.float64) for p in parts], 1)
