"""Whole Jacobians from a linearization: rows or columns, whichever are fewer, written in place.

Complex numbers have one convention on every route: `df = J dz` for holomorphic outputs and `df = Re(J dz)` for real
ones, so `J` is the conjugate of what `autograd.grad` returns. A complex function of a complex parameter that is not
holomorphic has no such `J` and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError
from ..._runtime.agreement import as_rows, size
from ..._runtime.chunks import Chunks
from ..._runtime.memory import Budget, startup_bytes
from ..._runtime.rows import Rows, basis
from ...errors import NotDifferentiableError
from ..sweeps.linearization import Linearization
from .matrix_plan import by_columns, fitted_chunk, fitted_layers
from .whole import LayerBlocks, layer_route

Blocks = list[list[Tensor]]
Piece = tuple[int, int, slice, Tensor]


class WholeJacobian:
    """A way to a model's Jacobian that keeps to a budget: by layers where that is right and fits, else by sweeps.

    Args:
        lin: Where the function was linearised.
        budget: Bytes that result and working memory may take.
        columns: A push per input entry was asked for.
        out: The result is given a place by the caller.
        create_graph: Keep the result differentiable.
        layers: The route by layers may be taken.

    Raises:
        MemoryBudgetError: The result does not fit; it was not allocated.
    """

    def __init__(
        self,
        lin: Linearization,
        budget: Budget,
        columns: bool,
        out: bool,
        create_graph: bool = False,
        layers: bool = True,
    ) -> None:
        self._tape, self._columns, self._create_graph = lin, columns, create_graph
        startup = startup_bytes(lin.domain.device)  # now, since looking for layers takes a derivative already
        self._fitted = partial(fitted_chunk, lin, budget, columns, out=out, startup=startup)
        self._layers = None if columns or create_graph or not layers else layer_route(lin)
        self._together = fitted_layers(self._layers, budget, out, startup) if self._layers else 0
        if not self._together:
            self._layers = None  # with what it holds
        self._chunk = None if self._together else self._fitted()

    def form(self, into: Blocks | None = None) -> LayerBlocks:
        """Return the Jacobians, and whether it is certain that they are finite.

        Args:
            into: Where to write blocks, if they have places already; not with `create_graph`.
        """
        found = self._layers.blocks(self._together, into) if self._layers else None
        if found is not None:
            return found
        chunk = self._fitted() if self._together else self._chunk  # a route that was given up was not planned for
        return LayerBlocks(jacobian_blocks(self._tape, self._create_graph, self._columns, chunk, into), False)


def jacobian_blocks(
    lin: Linearization,
    create_graph: bool = False,
    columns: bool | None = None,
    chunk_size: int | None = None,
    into: Blocks | None = None,
) -> Blocks:
    """Return `J[output][leaf]`, each `(output entries, *leaf)`.

    Args:
        lin: Where the function was linearised.
        create_graph: Keep the result differentiable.
        columns: True for a push per input entry, False for a pull per output entry, None for the fewer.
        chunk_size: Rows or columns per batched pass; by default by size.
        into: Where to write blocks, if they have places already; not with `create_graph`.
    """
    if columns is None:
        columns = by_columns(lin)
    if columns:
        try:
            return _collected(lin, create_graph, True, chunk_size, into)
        except RouteFailedError as reason:
            lin.leave("push", f"row by row, {lin.codomain.dim} backward passes", reason)
    return _collected(lin, create_graph, False, chunk_size, into)


def _collected(
    lin: Linearization, create_graph: bool, columns: bool, chunk_size: int | None, into: Blocks | None
) -> Blocks:
    fill = _fill_columns if columns else _fill_rows
    if create_graph:
        return _joined(lin, list(fill(lin, True, chunk_size)), columns)
    blocks = into or [[_empty(o, leaf) for leaf in lin.leaves] for o in lin.outputs]
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
    if size(turned + 1j * straight) > max(lin.tolerance, 1e-6) * (size(straight) + size(turned)):
        raise NotDifferentiableError(
            f"{lin.call}: {lin.codomain.names[index]} is not a holomorphic function of "
            f"{lin.domain.names[leaf]}, so it "
            "has no complex Jacobian. Use torch.view_as_real on both and ask for the real one."
        )


def _fill_columns(lin: Linearization, create_graph: bool, chunk_size: int | None) -> Iterator[Piece]:
    for leaf, array in enumerate(lin.leaves):
        chunks = Chunks(array.numel(), chunk_size or lin.chunk(array.numel()))
        for where in chunks:
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
    many = where.stop - where.start
    tangents = [
        basis(array, where) * unit
        if j == leaf
        else torch.zeros(many, *array.shape, dtype=array.dtype, device=array.device)
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
