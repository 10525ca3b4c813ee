"""How the blocks of a whole Jacobian are given out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._products import given
from ._torch.protocol import Blocks, Linearization, Recording, WholeAsk


def given_out(lin: Linearization, blocks: Blocks, ask: WholeAsk) -> Blocks:
    """Return blocks as they are given out; real ones that were swept forward have the output's dtype."""
    results = []
    for row, output in zip(blocks, lin.outputs, strict=True):
        kind = output.dtype if ask.columns else None
        row = [b if kind is None or b.is_complex() else b.to(kind) for b in row]
        results.append([given(b, ask.create_graph) for b in row])
    return results


def arranged(recorded: Recording, blocks: Blocks, flat: bool) -> Any:
    """Return blocks as the result of `modjac` is arranged."""
    if flat:
        rows = [torch.cat([_matrix(b, o) for b in row], 1) for row, o in zip(blocks, recorded.lin.outputs, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    if recorded.tree.single:
        return blocks[0][0] if len(blocks[0]) == 1 else tuple(blocks[0])
    return recorded.tree.build([tuple(row) for row in blocks])


def _matrix(block: Tensor, output: Tensor) -> Tensor:
    """Return a block as rows by columns, whatever its axes and however empty."""
    return block.reshape(block.shape[: output.ndim].numel(), block.shape[output.ndim :].numel())


def shaped(recorded: Recording, blocks: Blocks) -> Blocks:
    """Return blocks `(output entries, *parameter)` as `(*output, *parameter)`."""
    params, outputs = recorded.lin.leaves, recorded.lin.outputs
    return [
        [block.reshape(*output.shape, *param.shape) for block, param in zip(row, params, strict=True)]
        for row, output in zip(blocks, outputs, strict=True)
    ]


def lie_layout(recorded: Recording, tangent: bool, create_graph: bool) -> Callable[[Blocks], Blocks] | None:
    """Return how blocks of LieTensors are laid out; None where there are none, so that PyPose is not imported."""
    from ._extras.lie import layout

    return layout(recorded, tangent, create_graph)
