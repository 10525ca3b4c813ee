"""The claim that samples of a batch do not mix, and its evidence for one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..._ladder.failures import RouteNotFiniteError, RouteWrongError
from ..._ladder.names import Question, RouteName
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import NOT_FINITE, UNDECIDED, coupled, differs, disagrees

if TYPE_CHECKING:
    from .ask import BatchAsk


@dataclass(frozen=True)
class SamplesIndependent:
    """The filled blocks are what plain sweeps over the batch give, with zeros between samples.

    Where that was proved before, one sample is compared with a run of it alone from time to time.

    Attributes:
        decisive: Where it is refuted, samples mix; else the route itself may be wrong.
    """

    decisive: bool = True
    name: str = "samples independent"
    always: bool = True  # what is remembered depends on the samples' values: the caller does that

    def evidence(self, route: Any, ask: BatchAsk, found: Linearization) -> bool:
        """Return True where no check fails.

        Raises:
            RouteWrongError: It is refuted.
            RouteNotFiniteError: Values are not finite.
        """
        if ask.fresh:
            reason = coupled(ask.lin, ask.result.blocks, ask.where, ask.strict)
            ask.undecided |= reason == UNDECIDED
        else:
            reason = _spot(ask) if ask.verdicts.spot_due() else None
        if not reason:
            return True
        if reason == NOT_FINITE:
            ask.apart = reason
            raise RouteNotFiniteError(reason)
        if self.decisive:
            ask.apart = reason
            ask.verdicts.refuse(Question.SAMPLES, RouteName.TOGETHER, reason)
        raise RouteWrongError(reason)


def _spot(ask: BatchAsk) -> str | None:
    """Compare one sample of a batch with a run of it alone; return how they differ."""
    if ask.run is None:
        return None
    picked = ask.verdicts.pick(ask.many)
    alone = ask.runner.run([v[picked : picked + 1] for v in ask.values]).lin
    for whole, one in zip(ask.run.lin.outputs, alone.outputs, strict=True):
        reason = differs(whole, one, torch.tensor([picked]), ask.run.lin.tolerance)
        if reason is not None:
            return reason
    return disagrees(alone, ask.result.blocks, ask.where.start + picked)
