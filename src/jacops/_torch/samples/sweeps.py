"""Sweeps shared by all samples of a batch, written in place: a pull per output entry, or a push per input entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._ladder.names import Question
from ..._ladder.plan import Cost, Memory
from ..._ladder.route import answer
from ..._runtime.chunks import ROWS
from ..._runtime.contexts import sweeping
from ..._runtime.engine import swept
from ..._runtime.restoring import restoring
from ..._runtime.rows import dense, plain
from ..layers.factors import unit_seeds
from ..sweeps.ask import SweepAsk
from ..sweeps.graph import passed_bytes
from ..sweeps.linearization import Linearization
from ..sweeps.nodewise import pushes_are_large
from ..sweeps.pulls import PULLS
from .independent import SamplesIndependent

if TYPE_CHECKING:
    from .ask import BatchAsk

Blocks = list[list[Tensor]]

_BLOCK = 2**16  # numbers copied at a time while transposing: they stay in a near cache

# Calls by batched passes of five cotangents and more, each of at most so many bytes, took 0.55 to 0.98 of the time of
# those by pulls one by one, for perceptrons of three activations and convolutions over 8 to 256 samples, and 1.1 in one
# of 15 cases; those of two to four took 0.9 to 1.1, and those of larger ones 1.0 to 1.5.
_FEWEST, _EACH, _AT_ONCE = 5, 2**19, 2**22


def counts(lin: Linearization) -> tuple[int, int]:
    """Return how many entries a sample has in the outputs and in the inputs."""
    return sum(o.shape[1:].numel() for o in lin.outputs), sum(leaf.shape[1:].numel() for leaf in lin.leaves)


@restoring
def sweep(lin: Linearization, blocks: Blocks, where: slice, direction: str, limit: int | None = None) -> None:
    """Fill `blocks[output][leaf][where]`.

    Args:
        lin: A run over the samples `where`.
        blocks: Where Jacobians are written.
        where: Which samples.
        direction: `"reverse"` takes a pull per output entry, `"forward"` a push per input entry.
        limit: Stop after so many sweeps, to see what they take.

    Raises:
        RouteFailedError: Pushes do not work for this model.
    """
    if direction == "reverse":
        sweeps = _rows(lin, blocks, where, 1 if limit is not None else _to_a_pass(lin))
    else:
        sweeps = _columns(lin, blocks, where, limit is None and _small(lin))
    for done, _ in enumerate(sweeps, 1):
        if limit is not None and done >= limit:
            return


def _pull_of(lin: Linearization, out: int) -> Callable[[Tensor], Sequence[Tensor | None]]:
    """Return what pulls a cotangent of one output.

    `Linearization.pull` looks in every pass at what is the same in all of a graph. Where that is nothing, a pass of the
    engine alone gives the same: 20 calls in Python instead of 45, for each entry of the output.
    """
    output, leaves, state = lin.outputs[out], tuple(lin.leaves), sweeping(lin.outputs[out])

    def pull(seed: Tensor) -> Sequence[Tensor | None]:
        return lin.pull([seed if i == out else None for i in range(len(lin.outputs))])

    def pull_alone(seed: Tensor) -> Sequence[Tensor | None]:
        lin.sweeps += 1
        try:
            with state:
                return [dense(grad) for grad in swept((output,), leaves, (seed,))]
        except RuntimeError:
            return pull(seed)  # says what is wrong

    plainly = output.requires_grad and leaves and not lin.aliased_leaves and not lin.graph_info.reentrant
    return pull_alone if plainly else pull


def unit_pushes(
    lin: Linearization, leaf: int, push: Callable[[list[Tensor]], list[Tensor]]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield an entry of a leaf, and how all samples' outputs change with it."""
    tangents = [torch.zeros((1, *other.shape), dtype=other.dtype, device=other.device) for other in lin.leaves]
    flat = tangents[leaf].view(len(lin.leaves[leaf]), lin.leaves[leaf].shape[1:].numel())
    for entry in range(flat.shape[1]):
        flat[:, entry] = 1
        yield entry, [change[0] for change in push(tangents)]
        flat[:, entry] = 0  # only now: a push may be the tangent itself


def _to_a_pass(lin: Linearization) -> int:
    """Return how many output entries of every sample are pulled in one batched pass; 1 where that is no faster."""
    entries = max((o.shape[1:].numel() for o in lin.outputs), default=0)
    if entries < _FEWEST or lin.domain.device.type != "cpu":
        return 1
    known = lin.proofs.known
    passed = known.get("bytes of a pass")
    if passed is None:
        passed = known["bytes of a pass"] = passed_bytes(lin.graph_info.nodes)
    if passed > _EACH:
        return 1
    most = min(entries, ROWS, _AT_ONCE // max(1, passed))
    return math.ceil(entries / math.ceil(entries / most))  # passes are even


def _small(lin: Linearization) -> bool:
    """Return whether tangents are small enough to be faster in one batched pass."""
    return lin.domain.device.type == "cpu" and not pushes_are_large(lin)


def _rows(lin: Linearization, blocks: Blocks, where: slice, together: int) -> Iterator[None]:
    many = where.stop - where.start
    targets = [
        [
            block[where].view(many, output.numel() // many, *leaf.shape[1:])
            for block, leaf in zip(row, lin.leaves, strict=True)
        ]
        for row, output in zip(blocks, lin.outputs, strict=True)
    ]
    if together > 1:
        yield from _batched(lin, targets, together)
        return
    for out, output in enumerate(lin.outputs):
        pull = _pull_of(lin, out)
        for entry, seed in enumerate(unit_seeds(output, many)):
            for target, grad in zip(targets[out], pull(seed), strict=True):
                target[:, entry] = 0 if grad is None else plain(grad)
            yield


def _batched(lin: Linearization, targets: Blocks, together: int) -> Iterator[None]:
    for out, output in enumerate(lin.outputs):
        entries, many = output.shape[1:].numel(), output.shape[0]
        for start in range(0, entries, together):
            stop = min(start + together, entries)
            seeds = torch.zeros(stop - start, many, entries, dtype=output.dtype, device=output.device)
            seeds[:, :, start:stop].diagonal(dim1=0, dim2=2).fill_(1)
            cotangents = [seeds.view(-1, *output.shape) if i == out else None for i in range(len(lin.outputs))]
            ask = SweepAsk(Question.PULL, lin, cotangents, stop - start)  # as many as go into one pass, by `_to_a_pass`
            for target, rows in zip(targets[out], answer(ask, PULLS), strict=True):
                target[:, start:stop] = plain(rows).detach().transpose(0, 1)
            yield


def _columns(lin: Linearization, blocks: Blocks, where: slice, together: bool) -> Iterator[None]:
    for j, leaf in enumerate(lin.leaves):
        # Columns lie side by side until all are there: written one by one, each would touch every cache line.
        kinds = [(o.numel(), row[j].dtype, o.device) for o, row in zip(lin.outputs, blocks, strict=True)]
        entries = leaf.shape[1:].numel()
        staged = [torch.empty(entries, size, dtype=dtype, device=device) for size, dtype, device in kinds]
        if together and entries > 1:
            step = lin.column_chunk(j)
            for start in range(0, entries, step):
                stop = min(start + step, entries)
                tangents = torch.zeros(stop - start, len(leaf), entries, dtype=leaf.dtype, device=leaf.device)
                tangents[:, :, start:stop].diagonal(dim1=0, dim2=2).fill_(1)
                for columns, changes in zip(staged, lin.push_columns(j, tangents.view(-1, *leaf.shape)), strict=True):
                    columns[start:stop] = changes.reshape(stop - start, -1)
                yield
        else:
            for entry, changes in unit_pushes(lin, j, lin.push_alone):
                for columns, change in zip(staged, changes, strict=True):
                    columns[entry] = change.reshape(-1)
                yield
        for columns, row in zip(staged, blocks, strict=True):
            _write_transposed(row[j][where].view(columns.shape[1], columns.shape[0]), columns)


def _write_transposed(target: Tensor, columns: Tensor) -> None:
    for start in range(0, target.shape[0], _BLOCK):
        target[start : start + _BLOCK].copy_(columns[:, start : start + _BLOCK].T)


def pulled_slopes(lin: Linearization, many: int) -> Blocks:
    """Return `(n, out entries, *in)` for every output and leaf, with their graph, by one pull per output entry."""
    lines: list[list[list[Tensor]]] = [[[] for _ in lin.leaves] for _ in lin.outputs]
    for out, output in enumerate(lin.outputs):
        for seed in unit_seeds(output, many):
            # The graph keeps it. If it requires grad, once_differentiable backwards leave a mark instead of dropping
            # their part.
            own = seed.clone().requires_grad_(bool(lin.graph_info.functions))
            grads = lin.pull([own if i == out else None for i in range(len(lin.outputs))], create_graph=True)
            for line, leaf, grad in zip(lines[out], lin.leaves, grads, strict=True):
                line.append(torch.zeros_like(leaf) if grad is None else plain(grad))
    return [
        [torch.stack(line, 1) if line else leaf.new_zeros(many, 0) for line, leaf in zip(row, lin.leaves, strict=True)]
        for row in lines
    ]


def pushed_slopes(lin: Linearization, many: int) -> Blocks:
    """Return `(n, *out, in entries)` for every output and leaf, with their graph, by one push per input entry."""

    def push(tangents: list[Tensor]) -> list[Tensor]:
        return lin.push_by_double_backward([t.clone() for t in tangents], create_graph=True)  # a graph keeps them

    columns: list[list[list[Tensor]]] = [[[] for _ in lin.leaves] for _ in lin.outputs]
    for index in range(len(lin.leaves)):
        for _, changes in unit_pushes(lin, index, push):
            for line, change in zip(columns, changes, strict=True):
                line[index].append(change)
    return [[torch.stack(column, -1) for column in line] for line in columns]


SLOPES_BY = {"reverse": pulled_slopes, "forward": pushed_slopes}


class Reverse:
    """A pull per output entry, shared by all samples."""

    name, claims, leaving = "reverse", (SamplesIndependent(),), "silent"

    def refuses(self, ask: BatchAsk) -> str | None:
        """Samples have to be apart."""
        return ask.apart

    def cost(self, ask: BatchAsk) -> Cost:
        """A pull per output entry."""
        entries = ask.entries
        return Cost(entries[0] if entries else math.inf, lambda: ask.memory(self.name) or Memory(0, 0))

    def describe(self, ask: BatchAsk) -> str:
        """Name the number of pulls."""
        return f"reverse, {self.cost(ask).sweeps} pulls"

    def value(self, ask: BatchAsk) -> Linearization:
        """Fill in the batch; return the linearisation that was swept."""
        ask.result.proved = False
        if ask.runner.create_graph:
            ask.result.keep(ask.where, SLOPES_BY[self.name](ask.lin, ask.many))
        else:
            sweep(ask.lin, ask.result.blocks, ask.where, self.name)
        return ask.lin


class Forward(Reverse):
    """A push per input entry, shared by all samples."""

    name = "forward"

    def refuses(self, ask: BatchAsk) -> str | None:
        """Samples have to be apart, and pushes not to go row by row."""
        return ask.apart if ask.apart is not None else ask.unpushable

    def cost(self, ask: BatchAsk) -> Cost:
        """A push per input entry, and one sweep to record or to check."""
        entries = ask.entries
        return Cost(entries[1] + 1 if entries else math.inf, lambda: ask.memory(self.name) or Memory(0, 0))

    def describe(self, ask: BatchAsk) -> str:
        """Name the number of pushes."""
        return f"forward, {self.cost(ask).sweeps - 1} pushes"
