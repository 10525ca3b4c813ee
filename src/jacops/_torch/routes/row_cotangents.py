"""Derivatives of the loss of every row alone at the output, for all rows of a batch.

The loss of row i is `loss(output[i : i + 1], y[i : i + 1])`, whatever the loss divides a batch by: class weights and
ignored targets make a batch's loss no mean over rows. All rows go through the loss in one vectorised call where that
gives what single calls give, else one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._ladder.names import Fact, Question, RouteName
from ..._runtime.agreement import worst_disagreement
from ..._runtime.contexts import must_surface, out_of_inference, recording
from ..._runtime.restoring import restoring
from ..._runtime.rows import plain
from ..._runtime.side_effects import SideEffects
from ..model.losses import call_loss
from ..sweeps.linearization import Linearization
from ..sweeps.proofs import store_for


class RowSlopes(NamedTuple):
    """What the losses of the rows of a batch say at the output.

    Attributes:
        gradients: Of each row's loss by its own outputs, shaped like the outputs; None for one it leaves out.
        losses: The losses themselves, `(n,)`.
    """

    gradients: list[Tensor | None]
    losses: Tensor


Build = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Any, Any]]
_TRIED = 3  # random rows compared with rows alone: a loss that mixes rows changes every one of them


def row_cotangents(
    lin: Linearization,
    loss: Callable[[Any, Any], Tensor],
    targets: Sequence[Tensor],
    build: Build,
    create_graph: bool = False,
) -> RowSlopes:
    """Return the loss of each row, and its gradient by the row's own outputs.

    Args:
        lin: A model's outputs, first axis rows. One with another first axis goes into every loss as it is.
        loss: As the user wrote it.
        targets: The tensors that `y` is made of, first axis rows.
        build: Makes `(output, y)` of the outputs and targets of some rows.
        create_graph: The gradients keep their graph, through the outputs and the model.
    """
    outputs = list(lin.outputs) if create_graph else [o.detach() for o in lin.outputs]
    targets = [out_of_inference(t) for t in targets]
    many = targets[0].shape[0]

    def alone(rows: Iterable[int]) -> RowSlopes:
        parts = [_gradients(loss, build, outputs, targets, i, create_graph) for i in rows]
        columns = zip(zip(*(part.gradients for part in parts), strict=True), outputs, strict=True)
        return RowSlopes(
            [_joined(column, output, many) for column, output in columns], torch.cat([part.losses for part in parts])
        )

    recorded = _vectorised(loss, build, outputs, targets)
    if recorded is None:
        return alone(range(many))
    values, losses = recorded
    arrays = tuple((t.shape, t.dtype, t.device) for t in (*outputs, *targets))
    values.look_up(store_for(loss, ("losses of rows", arrays), lin.proofs.checks, many), SideEffects())
    if values.proofs.refused(Question.LOSSES, RouteName.TOGETHER):
        return alone(range(many))
    found = RowSlopes(_pulled(values, create_graph), losses)
    if values.proofs.needs(Fact.LOSSES_TOGETHER):
        picked = torch.randperm(many, generator=torch.Generator().manual_seed(0))[:_TRIED].tolist()
        if not _agree(found.gradients, alone(picked).gradients, picked, lin.tolerance):
            values.proofs.refuse(
                Question.LOSSES, RouteName.TOGETHER, "under vmap they differ from those of single rows"
            )
            return alone(range(many))
        values.proofs.remember(Fact.LOSSES_TOGETHER)
    return found


def _joined(column: Sequence[Tensor | None], output: Tensor, many: int) -> Tensor | None:
    """Return single rows as a batch; None if no row uses this output."""
    if all(part is None for part in column):
        return None
    if not _by_row(output, many):
        return output  # what the losses of several rows share is no row's own
    return torch.cat([torch.zeros_like(output[:1]) if part is None else part for part in column])


def _by_row(output: Tensor, many: int) -> bool:
    return output.ndim > 0 and output.shape[0] == many


def _agree(found: Sequence[Tensor | None], alone: Sequence[Tensor | None], picked: list[int], tolerance: float) -> bool:
    if any((a is None) != (b is None) for a, b in zip(found, alone, strict=True)):
        return False
    pairs = [(a[picked], b) for a, b in zip(found, alone, strict=True) if a is not None and b is not None]
    return all(a.shape == b.shape for a, b in pairs) and worst_disagreement(pairs) <= tolerance


@restoring
def _gradients(
    loss: Callable[[Any, Any], Tensor],
    build: Build,
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    row: int,
    create_graph: bool,
) -> RowSlopes:
    where, many = slice(row, row + 1), targets[0].shape[0]
    leaves = [(o[where] if _by_row(o, many) else o.detach()).requires_grad_() for o in outputs]
    with recording():
        value = call_loss(loss, *build([leaf.clone() for leaf in leaves], [t[where] for t in targets]))
    return RowSlopes(_pulled(_linearized(value, leaves), create_graph), value.detach().reshape(1))


@restoring
def _vectorised(
    loss: Callable[[Any, Any], Tensor], build: Build, outputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[Linearization, Tensor] | None:
    """Record the sum of the losses of all rows under vmap, and return it with the losses; None where it cannot be."""
    many = targets[0].shape[0]
    axes = [0 if _by_row(o, many) else None for o in outputs]

    def of_row(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        own = [o if axis is None else o.unsqueeze(0) for o, axis in zip(outputs, axes, strict=True)]
        return call_loss(loss, *build(own, [t.unsqueeze(0) for t in targets]))

    leaves = [o.clone().requires_grad_() for o in outputs]
    try:
        with recording():
            mapped = torch.func.vmap(of_row, in_dims=(axes, [0] * len(targets)))
            values = mapped([leaf.clone() for leaf in leaves], list(targets))
        return (_linearized(values.sum(), leaves), values.detach()) if values.shape == (many,) else None
    except Exception as error:
        if must_surface(error):
            raise
        return None  # what is wrong with the loss itself shows when it is called for a row alone


def _linearized(value: Tensor, leaves: Sequence[Tensor]) -> Linearization:
    options = {"call": "the loss of a row", "private": True}
    return Linearization(leaves, [value], leaf_names="output", output_names=["loss"], **options)


def _pulled(lin: Linearization, create_graph: bool) -> list[Tensor | None]:
    return [None if g is None else plain(g) for g in lin.pull([torch.ones_like(o) for o in lin.outputs], create_graph)]
