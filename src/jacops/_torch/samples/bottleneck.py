"""Where a Jacobian is a product of two thin ones: a layer through which everything passes and that is narrow.

With `w` numbers per sample in that layer, `J = J_tail J_head` takes about `w` sweeps over each part, where the whole
takes as many as it has outputs or inputs, whichever are fewer (elimination at a separator; Griewank and Walther, 2008,
§10). The layer is a separator if the graph behind it, once cut, does not reach the input: that is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...trees import is_differentiable
from ..sweeps.graph import inspect_graph
from ..sweeps.linearization import Linearization
from .sweeps import sweep

GAIN = 1.5


@contextmanager
def widths_noted(module: nn.Module, many: int, found: dict[str, int | None]) -> Iterator[None]:
    """Note for every submodule how many numbers per sample it gives; None where it is no place to cut."""

    def note(path: str, output: Any) -> None:
        fits = is_differentiable(output) and output.ndim > 1 and output.shape[0] == many and output.requires_grad
        found[path] = output.shape[1:].numel() if fits and path not in found else None

    handles = [
        part.register_forward_hook(lambda _m, _a, output, path=path: note(path, output))
        for path, part in module.named_modules()
        if path and not isinstance(part, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def narrowest(widths: dict[str, int | None], rows: int, columns: int, gain: float = GAIN) -> str | None:
    """Return the submodule at which a cut saves sweeps by a factor `gain`, None where none does."""
    places = [(width, path) for path, width in widths.items() if width]
    if not places:
        return None
    width, path = min(places)
    return path if 2 * (width + 1) * gain < min(rows, columns) else None


def separates(tail: Linearization, inputs: list[Tensor]) -> bool:
    """Say whether no path leads around the cut, from the input to the output."""
    return not any(id(leaf) in inspect_graph(tail.outputs).leaves for leaf in inputs)


def sweep_split(
    head: Linearization, tail: Linearization, blocks: list[list[Tensor]], where: slice, limit: int | None = None
) -> tuple[str, bool]:
    """Fill `blocks[0][0][where]` with the product of the two parts' Jacobians.

    Returns:
        How, and whether the factors are so small that no entry of their product can be NaN or Inf.
    """
    (hidden,), (output,), (leaf,) = head.outputs, tail.outputs, head.leaves
    many = output.shape[0]
    options = {"dtype": output.dtype, "device": output.device}
    first = torch.empty(many, *hidden.shape[1:], *leaf.shape[1:], **options)
    last = torch.empty(many, *output.shape[1:], *hidden.shape[1:], **options)
    everything = slice(0, many)
    # Each part has its own prices, and the trust in the whole is no place for them.
    ways = [sweep(part, [[target]], everything, "by number", limit) for part, target in ((head, first), (tail, last))]
    rows, width, columns = (t.shape[1:].numel() for t in (output, hidden, leaf))
    if limit is None:
        target = blocks[0][0][where].view(many, rows, columns)
        torch.bmm(last.view(many, rows, width), first.view(many, width, columns), out=target)
    sizes = [float(torch.linalg.vector_norm(part, ord=torch.inf)) if limit is None else 0.0 for part in (first, last)]
    sure = width * sizes[0] * sizes[1] < torch.finfo(output.dtype).max / 2
    return f"split at {head.codomain.names[0]} ({width} numbers): {ways[0]}, then {ways[1]}", sure
