"""A model that is followed over samples as its Jacobians were taken, for bias parts and for slopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..._runtime.agreement import coarsest
from ..._runtime.chunks import Chunks
from ..._runtime.contexts import recording
from ..._runtime.restoring import restoring
from ..._runtime.side_effects import WritesState
from ..._trees import is_differentiable
from ...errors import ModelStateError
from ..bias.completeness import FEW
from ..bias.follow import Follow
from ..bias.homogeneous import AROUND, BiasParts, FollowedRun, Moved, joined
from ..model.inputs import private_inputs
from .plan import Beside
from .runs import Runner

if TYPE_CHECKING:
    from .batch import Samples

_SMALL = 4096  # numbers in all samples together: up to here one run costs less than a second one for fewer samples
_MOVED = 4  # times the memory of bias parts in single precision: three values in double precision, and the forward


@dataclass(frozen=True)
class FollowedModel:
    """How a model is followed.

    Attributes:
        runner: Runs it.
        batch_size: Most samples to a forward.
    """

    runner: Runner
    batch_size: int

    def parts(self, values: Sequence[Tensor], done: Sequence[FollowedRun] = (), slopes: bool = True) -> BiasParts:
        """Return the outputs for samples and their bias parts.

        Args:
            values: All tensors with a row per sample, as `Samples` has them.
            done: Runs over all samples that were followed already, if there were some.
            slopes: Slopes are compared.

        Raises:
            ModelStateError: The forward writes into tensors that are not its own.
        """
        count = values[0].shape[0]
        if not count:  # shapes are those of one sample
            return _without_rows(self.parts([v.new_zeros((1, *v.shape[1:])) for v in values]))
        runs = done or self._runs(values, True, _lengths(values) if slopes else ())
        bias, moved = joined(runs, True)
        outputs = [torch.cat(parts) for parts in zip(*(run.outputs for run in runs), strict=True)]
        points = [torch.cat(parts) for parts in zip(*(run.points for run in runs), strict=True)]
        curved, coarse = dict.fromkeys(n for run in runs for n in run.curved), coarsest(run.coarse for run in runs)
        return BiasParts(outputs, bias, points, tuple(curved), moved, coarse)

    def moved(self, values: Sequence[Tensor], rows: Tensor, seed: int) -> Moved | None:
        """Return the outputs around some of the samples, along a random direction."""
        some = [value[rows.to(value.device)] for value in values]
        fewer = replace(self, batch_size=max(1, self.batch_size // _MOVED))
        return joined(fewer._runs(some, False, AROUND, seed), False)[1]

    @classmethod
    def beside(cls, samples: Samples) -> Beside:
        """Return what contributions of samples hold beside Jacobians: themselves, and what following takes."""
        runner, values, lengths = samples.runner, samples.values, _lengths(samples.values)

        def run(rows: int) -> None:
            cls(runner, rows)._runs([value[:rows] for value in values], True, lengths)

        return Beside(1, run, "bias parts and slopes" if lengths else "bias parts")

    def _runs(self, values: Sequence[Tensor], bias: bool, lengths: Sequence[float], seed: int = 0) -> list[FollowedRun]:
        runs: list[FollowedRun] = []
        chunks = Chunks(values[0].shape[0], self.batch_size)
        for where in chunks:
            with chunks.halving(where, self.runner.call, "samples"):
                runs.append(self._run([value[where] for value in values], bias, lengths, seed))
        return runs

    @restoring
    def _run(self, values: Sequence[Tensor], bias: bool, lengths: Sequence[float], seed: int) -> FollowedRun:
        runner, model = self.runner, self.runner.model
        weights = list(model.parameters()) if isinstance(model, nn.Module) else []
        for cloned in (False, True):  # a second time on copies of the weights, if the forward writes into them
            with recording():
                replica = runner.replica(cloned)
                cut = runner.cut(replica)
                given, tree = runner.inputs_in(values), runner.input_tree
                inside = cut is not None and cut.source is not None
                copied = private_inputs(given, tree, fixed=inside)[0]
                starts = [] if inside else runner.starts(copied)
                leaves = cut.leaves if cut is not None and inside else starts
                follow = Follow(leaves, [] if cloned else weights, bias, lengths, seed)
                follow.start(starts)
                try:
                    with follow, follow.functions:
                        outputs = runner.called(copied, values, replica, cut)[0]
                    points = leaves if inside else [value for value in given if is_differentiable(value)]
                    return FollowedRun.of(outputs, follow, points)
                except WritesState:
                    continue
        came = "writing into tensors that are not its own"
        raise ModelStateError.of("model", came, "its forward must not modify such tensors")


def _lengths(values: Sequence[Tensor]) -> Sequence[float]:
    """Return what is followed together with bias parts: slopes, where there are few samples."""
    small = values[0].shape[0] <= FEW or sum(value.numel() for value in values) <= _SMALL
    return AROUND if small else ()


def _without_rows(parts: BiasParts) -> BiasParts:
    outputs, bias, points = ([tensor[:0] for tensor in of] for of in (parts.outputs, parts.bias, parts.points))
    return BiasParts(outputs, bias, points, (), None)
