"""Where a Jacobian is a product of two thin ones: a layer through which everything passes and that is narrow.

With `w` numbers per sample in that layer, `J = J_tail J_head` takes about `w` sweeps over each part, where the whole
takes as many as it has outputs or inputs, whichever are fewer (elimination at a separator; Griewank and Walther, 2008,
§10). The layer is a separator if the graph behind it, once cut, does not reach the input: that is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._ladder.failures import RouteFailedError
from ..._ladder.names import Question, RouteName
from ..._ladder.plan import Cost, Memory
from ..._trees import is_differentiable
from ..sweeps.graph import inspect_graph
from ..sweeps.linearization import Linearization
from .independent import SamplesIndependent
from .sweeps import counts, sweep

if TYPE_CHECKING:
    from .ask import BatchAsk

GAIN = 1.5  # a cut records the model again and multiplies: it has to save a third of the sweeps to pay


@contextmanager
def widths_noted(module: nn.Module, many: int, found: dict[str, int | None]) -> Iterator[None]:
    """Note for every submodule how many numbers per sample it gives; None where it is no place to cut."""

    def note(path: str, output: Any) -> None:
        fits = is_differentiable(output) and output.requires_grad and output.ndim > 1 and not output.is_nested
        fits = fits and output.shape[0] == many
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
    """Return whether no path leads around the cut, from the input to the output."""
    return not any(id(leaf) in inspect_graph(tail.outputs).leaves for leaf in inputs)


class Split:
    """Sweeps over the two parts of a model, and the product of their Jacobians."""

    name, claims, leaving = "split", (SamplesIndependent(decisive=False),), "silent"

    def refuses(self, ask: BatchAsk) -> str | None:
        """Samples have to be apart, and a layer narrow."""
        if ask.apart is not None:
            return ask.apart
        return None if ask.place is not None else "no layer that everything passes is narrow enough to save sweeps"

    def cost(self, ask: BatchAsk) -> Cost:
        """About as many sweeps over each part as the layer is wide."""
        (rows, columns), (_, width) = ask.entries or (0, 0), ask.place or ("", 0)
        return Cost(2 * min(width + 1, rows, columns), lambda: ask.memory(self.name) or Memory(0, 0))

    def describe(self, ask: BatchAsk) -> str:
        """Name the layer and its width."""
        path, width = ask.place or ("", 0)
        return f"split at {path} ({width} numbers), {self.cost(ask).sweeps} sweeps over parts"

    def value(self, ask: BatchAsk) -> Linearization:
        """Fill in the batch; return the linearisation that was swept last.

        Raises:
            RouteFailedError: A path leads around the layer.
        """
        whole, (path, _) = ask.run, ask.place or ("", 0)
        split = whole
        if whole is not None and whole.head is None:
            split = ask.runner.split(ask.values, ask.store, whole.effects, path)
            ask.store.latest = whole.lin.proofs
        if split is None or split.head is None:
            raise RouteFailedError(f"a path leads around {path}")
        ask.result.proved = _fill(split.head, split.lin, ask.result.blocks, ask.where)
        ask.store.known["split"] = path
        return split.lin


def _fill(head: Linearization, tail: Linearization, blocks: list[list[Tensor]], where: slice) -> bool:
    """Fill `blocks[0][0][where]` with the product of the two parts' Jacobians.

    Returns:
        Whether the factors are so small that no entry of their product can be NaN or Inf.
    """
    (hidden,), (output,), (leaf,) = head.outputs, tail.outputs, head.leaves
    many = output.shape[0]
    options = {"dtype": output.dtype, "device": output.device}
    first = torch.empty(many, *hidden.shape[1:], *leaf.shape[1:], **options)
    last = torch.empty(many, *output.shape[1:], *hidden.shape[1:], **options)
    for part, target in ((head, first), (tail, last)):
        rows, columns = counts(part)
        pushes = columns + 1 < rows and not part.proofs.refused(Question.PUSH, RouteName.DOUBLE_BACKWARD)
        sweep(part, [[target]], slice(0, many), "forward" if pushes else "reverse")
    rows, width, columns = (t.shape[1:].numel() for t in (output, hidden, leaf))
    target = blocks[0][0][where].view(many, rows, columns)
    torch.bmm(last.view(many, rows, width), first.view(many, width, columns), out=target)
    sizes = [float(torch.linalg.vector_norm(part, ord=torch.inf)) for part in (first, last)]
    return width * sizes[0] * sizes[1] < torch.finfo(output.dtype).max / 2
