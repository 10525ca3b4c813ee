"""What rows of samples are defined by, and batches of samples that are recorded for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._cached import cached_property
from ..._finite import is_finite
from ..._ladder.failures import RouteFailedError, RouteNotFiniteError, RouteUndecidedError, attempt
from ..._ladder.names import Fact
from ..._runtime.side_effects import SideEffects
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import NOT_FINITE, with_reads
from ..sweeps.proofs import ProofStore, store_for
from ..sweeps.record import Recording
from .row_cotangents import RowSlopes


@dataclass(frozen=True)
class Definition:
    """What a row is.

    Attributes:
        values: The tensors of all samples, first axis samples.
        inputs: How many of them, from the first, the model is given; the others are targets.
        alone: Records one sample alone: its values -> a linearization with one output, whose entries are the rows.
        together: Records the model's outputs for several samples: their values -> a linearization.
        cotangents: A loss's cotangents of a batch, row by row, and the losses; None where rows are the outputs
            themselves.
        call: The public call on whose behalf this is done.
        fallback: What happens when samples mix.
        forced: Samples are taken alone for this reason.
        model: The module behind it, without what wraps it.
        checks: How often routes are checked.
        sample: Gives the recording of a sample that was kept, or keeps the one that it is passed a function for.
    """

    values: Sequence[Tensor]
    inputs: int
    alone: Callable[[Sequence[Tensor]], Recording]
    together: Callable[[Sequence[Tensor]], Recording]
    cotangents: Callable[[Recording, Sequence[Tensor]], RowSlopes] | None
    call: str
    fallback: str
    checks: str
    model: Any
    forced: str | None = None
    sample: Callable[[Callable[[], Recording]], Recording] = lambda record: record()

    @cached_property
    def store(self) -> ProofStore:
        """What is known of the model for samples of these shapes."""
        kinds = tuple((value.shape, value.dtype, value.device) for value in self.values)
        return store_for(self.model, ("rows", self.call, kinds), self.checks)


@dataclass(frozen=True)
class RecordedSamples:
    """Recorded samples.

    Attributes:
        where: Which.
        values: Their tensors.
        lin: Their outputs, as far as rows depend on them.
        seeds: Cotangents of these, where there is a loss.
        known: The model's whole output, and the losses where there is one.
    """

    where: slice
    values: Sequence[Tensor]
    lin: Linearization
    seeds: list[Tensor] | None
    known: tuple[Any, Tensor | None]

    @property
    def many(self) -> int:
        """How many samples."""
        return self.where.stop - self.where.start


def recorded(what: Definition, where: slice) -> RecordedSamples:
    """Record some samples together.

    Raises:
        RouteFailedError: They cannot be swept at once.
    """
    values = [v[where] for v in what.values]
    batch = attempt(lambda: what.together(values))
    slopes = what.cotangents(batch, values) if what.cotangents else None
    lin, seeds = _that_count(batch.lin, None if slopes is None else slopes.gradients)
    _check_batchable(lin, where.stop - where.start)
    return RecordedSamples(where, values, lin, seeds, (batch.before, None if slopes is None else slopes.losses))


def _that_count(
    lin: Linearization, cotangents: Sequence[Tensor | None] | None
) -> tuple[Linearization, list[Tensor] | None]:
    """Return a linearization over the outputs that have cotangents, which a loss may leave out, and those."""
    if cotangents is None:
        return lin, None
    seeds = [c for c in cotangents if c is not None]
    if len(seeds) == len(lin.outputs):
        return lin, seeds
    keep = [i for i, c in enumerate(cotangents) if c is not None]
    return lin.to([lin.outputs[i] for i in keep], [lin.codomain.names[i] for i in keep]), seeds


def rows_of(lin: Linearization, call: str) -> tuple[Hashable, ...]:
    """Return under what it is kept that rows of such a batch are those of samples alone."""
    return Fact.SAMPLES_APART, call, lin.domain.names, lin.codomain.names


def is_new(lin: Linearization, call: str) -> bool:
    """Return whether the rows of such a batch are still to be compared with those of samples alone."""
    return lin.proofs.needs(*rows_of(lin, call)) or bool(habits(lin).reads)


def habits(lin: Linearization) -> SideEffects:
    """Return what the forward does besides arithmetic."""
    return lin.proofs.effects or SideEffects()


def _check_batchable(lin: Linearization, many: int) -> None:
    if not lin.outputs:
        raise RouteUndecidedError("the loss of no row depends on its output")
    effects = habits(lin)
    if effects.reads and effects.coarse in (torch.bfloat16, torch.float16):
        raise RouteFailedError(with_reads("in half precision outputs alone do not show whether samples mix", effects))
    if effects.draws:
        raise RouteFailedError(f"the forward is random ({', '.join(effects.draws)})")
    for name, output in zip(lin.codomain.names, lin.outputs, strict=True):
        if output.ndim == 0 or output.shape[0] != many:
            raise RouteFailedError(f"{name} has shape {tuple(output.shape)} and no axis of {many} samples first")
    if not all(is_finite(output) for output in lin.outputs):  # NaN would look like samples that mix
        raise RouteNotFiniteError(NOT_FINITE)
