"""Sweeps shared by all samples of a batch, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .ladder import RouteFailedError
from .rows import plain
from .tape import Tape


def sweep(tape: Tape, blocks: list[list[Tensor]], where: slice) -> str:
    """Fill `blocks[output][leaf][where]` and say how: a pull per output entry, or a push per input entry if fewer."""
    rows = sum(o.shape[1:].numel() for o in tape.outputs)
    columns = sum(leaf.shape[1:].numel() for leaf in tape.leaves)
    if columns + 1 < rows and not tape.trust.refused("push", "dual"):
        try:
            _columns(tape, blocks, where)
            return f"forward, {columns} pushes"
        except RouteFailedError:
            tape.trust.refuse("push", "dual")
    _rows(tape, blocks, where)
    return f"reverse, {rows} pulls"


def _rows(tape: Tape, blocks: list[list[Tensor]], where: slice) -> None:
    for out, output in enumerate(tape.outputs):
        many, entries = output.shape[0], output.shape[1:].numel()
        seed = torch.zeros(many, entries, dtype=output.dtype, device=output.device)
        pairs = zip(blocks[out], tape.leaves, strict=True)
        targets = [block[where].view(many, entries, *leaf.shape[1:]) for block, leaf in pairs]
        for entry in range(entries):
            seed[:, entry] = 1
            grads = tape.pull([seed.view(output.shape) if i == out else None for i in range(len(tape.outputs))])
            for target, grad in zip(targets, grads, strict=True):
                target[:, entry] = 0 if grad is None else plain(grad)
            seed[:, entry] = 0  # only now: a gradient may be the cotangent itself


def _columns(tape: Tape, blocks: list[list[Tensor]], where: slice) -> None:
    for j, leaf in enumerate(tape.leaves):
        tangents = [torch.zeros((1, *other.shape), dtype=other.dtype, device=other.device) for other in tape.leaves]
        flat = tangents[j].view(leaf.shape[0], leaf.shape[1:].numel())
        for entry in range(flat.shape[1]):
            flat[:, entry] = 1
            pushed = tape.push_dual(tangents)
            for out, change in enumerate(pushed):
                target = blocks[out][j][where]
                target.view(*change.shape[1:], flat.shape[1])[..., entry] = change[0]
            flat[:, entry] = 0  # only now: a push may be the tangent itself
