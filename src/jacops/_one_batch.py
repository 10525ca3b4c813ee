"""A problem that is one batch: it is read, recorded and used once, within one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ._data import Batch, only_batch
from ._finite import InBatch
from ._objective import Objective
from ._picks import Picks
from ._problem_parts import BatchPoint, check_dimension, objective_of
from ._runtime.contexts import refuse_transforms
from ._runtime.ranks import ALONE
from ._sharing import check_counted
from ._space import Space


class OneBatch:
    """What passes over data take of a `Problem`, for a batch that is a call's own.

    A problem compares its passes, keeps recordings between them while the caller may write into the weights, and
    divides by sums over all batches. None of that has an object here: there is one pass, the batch is the whole, and
    the recording is dropped with the call.

    Args:
        model: A model.
        loss: `loss(output, y)`.
        x: The model's input.
        y: The target.
        parameters: Which parameters.

    Raises:
        DataError: No row counts, or there is not one row per sample.
        ModelStateError: Batch statistics or dropout are in train mode, or there is nothing to differentiate.
    """

    ranks, data = ALONE, None

    def __init__(self, model: Any, loss: Any, x: Any, y: Any, parameters: Picks = None) -> None:
        objective = objective_of(model, loss, {"parameters": parameters})
        refuse_transforms()
        self._batch = only_batch(x, y, "data")
        self._objective = own = objective.on(self._batch.x, once=True)
        own.check_state()
        self.space: Space = own.space
        check_dimension(own)

    def terms(self, call: str) -> Iterator[tuple[int, BatchPoint, Objective, float]]:
        """Yield the batch, if it counts: no rows before it, its objective and its factor.

        Raises:
            InputError: The loss does not reduce batches as said.
        """
        batch, own = self._batch, self._objective
        found = batch.rows > 0 and not own.losses.ignores(batch.y)
        if found:
            with InBatch(0):
                own.check_reduction(batch)
        check_counted("data", batch.rows, found and self._weight(batch) > 0)
        yield 0, BatchPoint(batch, own), own, 1.0

    def _weight(self, batch: Batch) -> float:
        """Return what the batch's loss is divided by, 1 for a sum."""
        mean = self._objective.reduction == "mean"
        return float(self._objective.denominators(batch.y, batch.rows).sum()) if mean else 1.0

    def term(self, batch: Batch) -> tuple[BatchPoint, Objective, float]:
        """Return a part of the batch, its objective, and the factor with which it enters the whole."""
        return BatchPoint(batch, self._objective), self._objective, self._weight(batch) / self._weight(self._batch)

    def keep(self, point: BatchPoint, few: bool = False) -> int:
        """Keep nothing: there is no second pass."""
        return 0

    def sums(self, call: str, compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Return what is computed here, since ranks have no part in a call on tensors."""
        return list(compute())
