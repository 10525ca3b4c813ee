"""Whole Jacobians by sweeps: a pull per output entry or a push per input entry, written in place.

Complex numbers have one convention on every route: `df = J dz` for holomorphic outputs and `df = Re(J dz)` for real
ones, so `J` is the conjugate of what `autograd.grad` returns. A complex function of a complex parameter that is not
holomorphic has no such `J` and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..._ladder.names import Question, RouteName
from ..._ladder.plan import Cost
from ..._ladder.route import Route
from ..._progress import track
from ..._runtime.agreement import as_rows, size
from ..._runtime.chunks import Chunks
from ..._runtime.rows import Rows, basis
from ...errors import NotDifferentiableError
from ..sweeps.linearization import Linearization
from .whole_ask import Blocks, WholeAsk, WholeBlocks

Piece = tuple[int, int, slice, Tensor]


class ByRows:
    """A pull per output entry: plain `autograd.grad`, or batches of it that are proved."""

    name, claims, leaving, columns = "reverse", (), "never", False

    def refuses(self, ask: WholeAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: WholeAsk) -> Cost:
        """A sweep per output entry."""
        return Cost(ask.lin.codomain.dim, partial(ask.sweeping, self.columns))

    def describe(self, ask: WholeAsk) -> str:
        """Name the number of passes."""
        return f"row by row, {ask.lin.codomain.dim} backward passes"

    def value(self, ask: WholeAsk) -> WholeBlocks:
        """Return the blocks.

        Raises:
            MemoryBudgetError: They do not fit; nothing was allocated.
        """
        return WholeBlocks(_collected(ask, self.columns, fitted(ask, self)), by_rows=not self.columns)


class ByColumns(ByRows):
    """A push per input entry."""

    name, leaving, columns = "forward", "warned", True

    def refuses(self, ask: WholeAsk) -> str | None:
        """It is not taken where rows were requested, or pushes go row by row."""
        if ask.columns is False:
            return "not asked for by `strategy=`"
        known = ask.verdicts.refusal(Question.PUSH, RouteName.DOUBLE_BACKWARD)
        return None if known is None else known.reason or "no second derivative rule"

    def cost(self, ask: WholeAsk) -> Cost:
        """A sweep per input entry, and one to record."""
        return Cost(ask.lin.domain.dim + 1, partial(ask.sweeping, self.columns))

    def describe(self, ask: WholeAsk) -> str:
        """Name the number of passes."""
        return f"column by column, {ask.lin.domain.dim} pushes"


def fitted(ask: WholeAsk, route: Route) -> int | None:
    """Return how many vectors go into a pass, None for the linearization's own choice where all is small.

    Raises:
        MemoryBudgetError: The result and one vector do not fit.
    """
    memory = None if ask.is_small else route.cost(ask).memory
    if memory is None:
        return ask.chunk_size
    if memory.peak > ask.allowed:
        ask.refuse(memory)
    return memory.chunk


def _collected(ask: WholeAsk, columns: bool, chunk_size: int | None) -> Blocks:
    lin, create_graph = ask.lin, ask.create_graph
    fill = _fill_columns if columns else _fill_rows
    if create_graph:
        return _joined(lin, list(fill(lin, True, chunk_size)), columns)
    blocks = ask.into or [[_empty(o, leaf) for leaf in lin.leaves] for o in lin.outputs]
    for index, leaf, where, part in fill(lin, False, chunk_size):
        target = blocks[index][leaf]
        if part.dtype != target.dtype and part.is_complex():
            blocks[index][leaf] = target = target.to(part.dtype)
        if columns:
            as_rows(target)[:, where] = part
        else:
            target[where] = part
    return blocks


def _empty(output: Tensor, leaf: Tensor) -> Tensor:
    return torch.zeros(output.numel(), *leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _fill_rows(lin: Linearization, create_graph: bool, chunk_size: int | None) -> Iterator[Piece]:
    for index, where, rows, turned in lin.rows(create_graph, chunk_size):
        for leaf, part in enumerate(rows):
            if turned is not None and part.is_complex():
                _refuse_not_holomorphic(lin, index, leaf, part, -turned[leaf])
            elif turned is not None:
                part = torch.complex(part, -turned[leaf])
            yield index, leaf, where, part.conj().resolve_conj() if part.is_complex() else part


def _refuse_not_holomorphic(lin: Linearization, index: int, leaf: int, straight: Tensor, turned: Tensor) -> None:
    """Refuse a complex function whose derivative along `i v` is not `i` times that along `v`.

    Raises:
        NotDifferentiableError: It is not; the message names the output and the parameter.
    """
    # What is not holomorphic is off by a share of 1; 1e-6 leaves room for rounding in double precision.
    if size(turned + 1j * straight) > max(lin.tolerance, 1e-6) * (size(straight) + size(turned)):
        raise NotDifferentiableError(
            f"{lin.call}: {lin.codomain.names[index]} is not a holomorphic function of "
            f"{lin.domain.names[leaf]}, so it "
            "has no complex Jacobian. Use torch.view_as_real on both and compute the real one."
        )


def _fill_columns(lin: Linearization, create_graph: bool, chunk_size: int | None) -> Iterator[Piece]:
    for leaf, array in enumerate(lin.leaves):
        chunks = Chunks(array.numel(), chunk_size or lin.column_chunk(leaf, create_graph))
        for where in track(chunks, lin.call):
            with chunks.halving(where, lin.call):
                for index, part in enumerate(_columns(lin, leaf, where, create_graph)):
                    yield index, leaf, where, part


def _columns(lin: Linearization, leaf: int, where: slice, create_graph: bool) -> Rows:
    """Return `(output entries, columns)` per output."""
    pushed = _push_basis(lin, leaf, where, 1.0, create_graph)
    if not lin.leaves[leaf].is_complex():
        return [as_rows(p).T for p in pushed]
    turned = _push_basis(lin, leaf, where, 1j, create_graph)
    columns = []
    for index, (a, b) in enumerate(zip(pushed, turned, strict=True)):
        if a.is_complex():
            _refuse_not_holomorphic(lin, index, leaf, a, -b)
        columns.append(as_rows(a if a.is_complex() else torch.complex(a, -b)).T)
    return columns


def _push_basis(lin: Linearization, leaf: int, where: slice, unit: complex, create_graph: bool) -> Rows:
    own = basis(lin.leaves[leaf].detach(), where) * unit
    if not create_graph:
        return lin.push_columns(leaf, own)
    many = where.stop - where.start
    tangents = [
        own if j == leaf else torch.zeros(many, *array.shape, dtype=array.dtype, device=array.device)
        for j, array in enumerate(map(torch.Tensor.detach, lin.leaves))
    ]
    return lin.push_by_double_backward(tangents, create_graph)


def _joined(lin: Linearization, parts: list[Piece], columns: bool) -> Blocks:
    """Put chunks together without in-place writes, which a graph would have to remember one by one."""
    blocks = []
    for index, output in enumerate(lin.outputs):
        row = []
        for leaf, array in enumerate(lin.leaves):
            own = [part for i, j, _, part in parts if (i, j) == (index, leaf)]
            whole = torch.cat(own, 1 if columns else 0) if own else _empty(output, array)
            row.append(whole.reshape(output.numel(), *array.shape))
        blocks.append(row)
    return blocks
