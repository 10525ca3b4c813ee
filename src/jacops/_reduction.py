"""How a loss reduces a batch, verified on a few rows, and what a loss that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ._data import Batch
from ._finite import is_finite, row_in_data, where_first
from ._ladder.names import Fact
from ._recorded_loss import Loss, check_loss
from ._requirements import check_choice
from ._runtime.agreement import coarsest, size
from ._runtime.contexts import private_noise
from ._torch.protocol import (
    LabelSettings,
    ModelLoss,
    Recording,
    RowLosses,
    are_classes,
    bare,
    call_loss,
    label_settings,
    one_row,
)
from ._trees import flatten
from ._words import Reduction
from .errors import InputError, InputTypeError, JacopsError, NonFiniteError, NotDifferentiableError

FEW_ROWS = 8
_SPOT_ROWS = 2  # where a proof is only looked at again: the fewest that can be together
_DIVIDED = 3  # rows by which it is computed how a loss divides: one that counts fewer labels, and two that do not
# A sum taken for a mean is off by a factor of the rows, and weights of classes by any amount; the order of summation by
# some rounding. In double precision part of it may still be that of single precision, of a loss that casts.
_TOLERANCE, _IN_DOUBLE = 1e-3, 1e-5
_ROUNDINGS = 16  # of low precisions, where rounding exceeds that


def check_reduction(objective: Any, batch: Batch, rows: int = FEW_ROWS) -> None:
    """Compare the loss of some rows together with the losses of the rows alone.

    Where the model fits its data, losses are zero or hold rounding errors, which no comparison can use:
    then it is made nearby, with parameters a little off and each row's target given to the next one.

    Raises:
        InputError: The loss does not reduce a batch as the objective states, or does not accept a single row.
        NonFiniteError: A loss is NaN or Inf.
    """
    some = batch.part(objective.losses.few_rows(batch.y, rows))
    allowed = _allowed(objective)
    found = _compared(objective, some, objective.value)
    seeded = objective.seed is not None  # rows alone are other functions than in a batch, nearby as well
    if (found.scale or seeded) and found.gap <= allowed * found.scale:
        return
    near_enough = found.scale and found.gap <= max(allowed, _TOLERANCE) * found.scale
    if near_enough and not (seeded or objective.foreign) and _is_mixed(objective, some, found):
        return
    near = found if seeded else _nearby(objective, some)
    if near.gap > allowed * near.scale:
        shown = near if found.gap <= allowed * found.scale else found
        labels = isinstance(some.y, Tensor) and not some.y.is_floating_point() and some.y.ndim > 1
        hint = " Labels that do not count must be -100, or the loss's `ignore_index`." if labels else ""
        raise InputError(
            f"`reduction` is {objective.reduction!r}, but the loss of {some.rows} rows together is "
            f"{shown.together:.6g} and the {objective.reduction} of their losses alone is {shown.expected:.6g}. Say "
            "`reduction='sum'`, or pass a loss with `reduction='none'`, whose mean is then taken over the rows."
            f"{hint}"
        )


def prove_reduction(objective: Any, batch: Batch) -> None:
    """Check the reduction of a loss of a torch model's output where it was not proved, or again from time to time.

    A proof belongs to the model's graph and to the loss's, which is recorded at the output.

    Raises:
        InputError: As `check_reduction`.
        NonFiniteError: A loss is NaN or Inf.
    """
    own = objective.losses.loss if isinstance(objective.losses.loss, ModelLoss) else None
    if own or objective.losses.may_count(batch.y):
        output, few = _first_rows(objective, batch)
        if own:
            own.check(objective.model, few.x, few.y, output)
        objective.losses.settle(output, few.y)
    found = _recorded_output(objective, batch)
    settings = None if found is None else _label_settings(objective, batch.y, found)
    if found is not None and settings is not None:  # no more would show in the loss's graph
        proofs, claim, finite = [found.lin.proofs], (Fact.REDUCTION, objective.reduction, settings), found.lin.outputs
    else:
        at = _recorded_loss(objective, batch, found)
        proofs = [recording.lin.proofs for recording in (found, at) if recording is not None]
        claim, finite = (Fact.REDUCTION, objective.reduction, at.lin.graph_info.wiring), at.lin.outputs
    new = any(one.needs(*claim) for one in proofs)
    due = any([one.spot_due(Fact.REDUCTION) for one in proofs])  # both count, so that both come due at once
    if due and not new and found is not None and settings is not None:
        due = not _row_is_alike(objective, batch, found, settings)
    if new or due or not is_finite(finite[0]):
        check_reduction(objective, batch, FEW_ROWS if new else _SPOT_ROWS)
        for one in proofs:
            one.remember(*claim)


def _label_settings(objective: Any, y: Any, found: Recording) -> LabelSettings | None:
    """Return the settings of torch's own cross-entropy by labels that it takes; None for any other loss."""
    settings = label_settings(objective.loss, y, found.output)
    fits = settings is not None and are_classes(y, found.output.shape[1], settings.ignored)
    return settings if fits else None


def _recorded_output(objective: Any, batch: Batch) -> Recording | None:
    """Return the recorded output; None where it is no tensor."""
    try:
        return objective.recorded(batch.x, "loss", pulled=True)
    except (InputTypeError, NotDifferentiableError):
        return None


def _recorded_loss(objective: Any, batch: Batch, found: Recording | None) -> Recording:
    """Return the loss recorded at the output, or by the parameters of an output that is no tensor."""
    if found is None:
        return objective.recorded_loss(batch.x, batch.y, "loss", kept=True, pulled=True)
    return objective.at_output(found, batch.y, "loss", kept=True)


def _row_is_alike(objective: Any, batch: Batch, found: Recording, settings: LabelSettings) -> bool:
    """Return whether one row alone has the loss that it has in the batch; False where that has to be asked otherwise.

    Of torch's own loss the rows' terms are known, so that the model runs once more for this and not three times.
    """
    i = found.lin.proofs.pick(batch.rows)
    row = batch.part(slice(i, i + 1))
    with one_row("Problem"):
        alone = objective.recorded(row.x, "loss", pulled=True).lin.outputs[0]
    outputs = [output.detach() for output in (found.lin.outputs[0][i : i + 1], alone)]
    if outputs[0].shape != outputs[1].shape:
        return False
    options = {"reduction": "sum", "ignore_index": settings.ignored}
    term, other = (float(cross_entropy(output, row.y, **options)) for output in outputs)
    return term > 0 and abs(term - other) <= _allowed(objective) * term


def _first_rows(objective: Any, batch: Batch) -> tuple[Any, Batch]:
    """Return the recorded output for a few rows, and those rows; for all where outputs have no such axis."""
    found = objective.recorded(batch.x, "loss", pulled=True)
    outputs, few = found.lin.outputs, objective.losses.few_rows(batch.y, _DIVIDED)
    if all(leaf.ndim and leaf.shape[0] == batch.rows for leaf in outputs):
        outputs, batch = [leaf[few] for leaf in outputs], batch.part(few)
    return found.tree.build(outputs), batch


def _allowed(objective: Any) -> float:
    dtype = _computed_in(objective)
    return _IN_DOUBLE if dtype is torch.float64 else max(_TOLERANCE, _ROUNDINGS * torch.finfo(dtype).eps)


def _computed_in(objective: Any) -> torch.dtype:
    """Return the coarsest dtype of a model's parameters: of adapters in single precision the model below is in half."""
    held = [] if objective.foreign else bare(objective.model).parameters()
    return coarsest([objective.space.dtype, *(p.dtype for p in held)]) or objective.space.dtype


def _nearby(objective: Any, some: Batch) -> _Compared:
    order = torch.arange(some.rows).roll(1)
    try:
        leaves, tree = flatten(some.y, "y")
        rows = [leaf[order.to(leaf.device) if isinstance(leaf, Tensor) else order.numpy()] for leaf in leaves]
        return _compared(objective, replace(some, y=tree.build(rows)), objective.value_near)
    except (JacopsError, RuntimeError, ValueError, IndexError, TypeError):  # targets that fit their own row only
        return _compared(objective, some, objective.value_near)


class _Compared(NamedTuple):
    """The loss of rows together, what the losses of the rows alone make of it, and the size of those."""

    together: float
    expected: float
    scale: float

    @property
    def gap(self) -> float:
        """How far the two are apart."""
        return abs(self.together - self.expected)


def _compared(objective: Any, some: Batch, value: Callable[[Any, Any], float]) -> _Compared:
    shares = objective.denominators(some.y, some.rows).tolist()
    rows = [(some.part(slice(i, i + 1)), share) for i, share in enumerate(shares) if share]
    if not rows:
        return _Compared(0.0, 0.0, 0.0)
    mean = objective.reduction == "mean"
    together = value(some.x, some.y) if objective.seed is None else _of_outputs_alone(objective, some)
    with one_row("Problem"):
        alone = [value(row.x, row.y) * (share if mean else 1.0) for row, share in rows]
    total = sum(shares) if mean else 1.0
    return _Compared(together, sum(alone) / total, sum(map(abs, alone)) / total)


def _is_mixed(objective: Any, some: Batch, found: _Compared) -> bool:
    """Return whether rows together differ from rows alone by the model, which mixes them a little, not by the loss."""
    try:
        gap = abs(_of_outputs_alone(objective, some) - found.expected)
    except (JacopsError, RuntimeError, ValueError, IndexError, TypeError):  # outputs with no axis of rows
        return False
    return gap <= _allowed(objective) * found.scale


def _of_outputs_alone(objective: Any, some: Batch) -> float:
    """Return the loss of rows together whose outputs are computed alone, with the same random numbers for each."""
    found = [objective.recorded(some.part(slice(i, i + 1)).x, "loss", pulled=True) for i in range(some.rows)]
    outputs = [torch.cat(parts).detach() for parts in zip(*(one.lin.outputs for one in found), strict=True)]
    return float(call_loss(objective.losses.scalar, found[0].tree.build(outputs), some.y))


def offset(parameter: Tensor, seed: int) -> Tensor:
    """Return a random change of a parameter, a tenth of its size."""
    # Parameters that are all zero are moved too, as if they were of size 0.1.
    typical = max(size(parameter) / max(1, parameter.numel()) ** 0.5, 0.1)
    return 0.1 * typical * private_noise(parameter, seed)


def not_finite(call: str, value: float, module: nn.Module, x: Any, y: Any) -> NonFiniteError:
    """Return the error for a loss that is NaN or Inf: it names the first thing that is not finite, in order of use."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in held.items():
        if not is_finite(tensor):
            return NonFiniteError(f"{call}: in the model's '{name}', {where_first(tensor)}; the loss is {value}.")
    row = row_in_data({"x": x, "y": y})
    if row is not None:
        return NonFiniteError(f"{call}: {row}; the loss is {value}.")
    return NonFiniteError(
        f"{call}: the loss is {value}, with finite weights and data: a value overflows, or leaves a domain."
    )


def checked_loss(loss: Loss, reduction: Reduction | None) -> RowLosses:
    """Return the losses of rows behind a loss.

    Raises:
        InputTypeError: It is not callable.
        InputError: There is no such reduction.
    """
    check_loss(loss)
    if reduction is not None:
        check_choice("reduction", reduction, Reduction)
    return RowLosses(loss, reduction)
