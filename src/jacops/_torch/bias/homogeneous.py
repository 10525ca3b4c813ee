r"""The part of an output that no input feature carries, and where an output is not piecewise linear.

A forward is followed operation by operation (`follow`). An operation that is affine in what depends on the input is
applied to bias parts as it is applied to values. Any other operation `g` that is linear around its point `z`
(`local_linear`) passes bias parts on by its derivative and adds its own constant `g(z) - Dg z`, which is zero for one
that is homogeneous. Neither the model's output nor its Jacobian is used, so that comparing `f(x)` with `J x + b` can
fail. Where an operation is curved there is no such constant; it is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._runtime.chunks import Chunks
from ..._runtime.contexts import out_of_inference, random_state_kept, recording
from ..._runtime.restoring import restoring
from ..._runtime.side_effects import WritesState
from ..._trees import Selector, select
from ...errors import InputError, ModelStateError
from ..model.cut import At, Cut
from ..model.freeze import FrozenModules
from ..model.inputs import forward_explained
from ..model.replica import replicate
from ..model.targets import SampleTarget
from .follow import Follow

FEW = 16  # samples whose slopes are compared: a wrong derivative of an operation shows in any of them
_SMALL = 4096  # numbers in all samples together: up to here one run costs less than a second one for fewer samples
_AROUND = (0.0, 1.0, -1.0)  # at the point, ahead and behind: a central difference, and a second one that shows kinks


@dataclass(frozen=True)
class Moved:
    """An output around a point, in double precision, with what is detached held fixed.

    Attributes:
        base: At `x`.
        ahead: At `x + d`.
        behind: At `x - d`.
        move: `d`.
    """

    base: Tensor
    ahead: Tensor
    behind: Tensor
    move: Tensor


@dataclass(frozen=True)
class BiasParts:
    """An output and its bias part, for all samples.

    Attributes:
        output: The model's output, `(n, *out)`.
        bias: Its bias part, in double precision.
        point: What it was followed from: the input, or the output of the layer that the forward is cut at.
        curved: Names of operations that are not piecewise linear, or could not be examined.
        moved: The output around the point, where there are few samples: to follow both at once takes less time.
    """

    output: Tensor
    bias: Tensor
    point: Tensor
    curved: tuple[str, ...]
    moved: Moved | None


@dataclass(frozen=True)
class FollowedModel:
    """How a model is followed.

    Attributes:
        model: A module, evaluated in eval mode.
        outputs: Which part of the output.
        at: A cut at submodules.
        batch_size: Most samples to a forward.
        target: One output per sample.
        frozen: Modules that are frozen.
    """

    model: nn.Module
    outputs: Selector
    at: At
    batch_size: int
    target: SampleTarget | None = None
    frozen: FrozenModules | None = None

    def parts(self, x: Tensor) -> BiasParts:
        """Return the output for samples `x` and its bias part.

        Raises:
            InputError: `at` or `outputs` picks nothing, or several tensors.
            ModelStateError: The forward writes into tensors that are not its own.
        """
        lengths = _AROUND if x.shape[0] <= FEW or x.numel() <= _SMALL else ()
        runs = self._runs(x, slice(None), True, lengths)
        bias, *moved = self._joined(runs)
        output, point = torch.cat([r.output for r in runs]), torch.cat([r.point for r in runs])
        curved = tuple(dict.fromkeys(name for r in runs for name in r.curved))
        return BiasParts(output, bias, point, curved, Moved(*moved) if lengths else None)

    def moved(self, x: Tensor, rows: Tensor, seed: int) -> Moved:
        """Return the output around some of the samples `x`, along a random direction."""
        return Moved(*self._joined(self._runs(x, rows, False, _AROUND, seed)))

    def _joined(self, runs: Sequence[_Run]) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*((*r.carried, *r.moves) for r in runs), strict=True)]

    def _runs(self, x: Tensor, rows: slice | Tensor, bias: bool, lengths: Sequence[float], seed: int = 0) -> list[_Run]:
        runs: list[_Run] = []
        x, places = x[rows], None if self.target is None else self.target.places[rows]
        chunks = Chunks(x.shape[0], self.batch_size)
        for where in chunks:
            with chunks.halving(where, "contributions", "samples"):
                some = None if places is None else places[where]
                runs.append(self._run(x[where], some, bias, lengths, seed))
        return runs

    @restoring
    def _run(self, x: Tensor, places: Tensor | None, bias: bool, lengths: Sequence[float], seed: int) -> _Run:
        for cloned in (False, True):  # a second time on copies of the weights, if the forward writes into them
            with recording(), random_state_kept():
                module = replicate(self.model, training=False, cloned=cloned).module
                given, cut = out_of_inference(x).detach(), Cut(module, self.at, frozen=self.frozen)
                leaves = cut.leaves if cut.source is not None else [given.requires_grad_()]
                follow = Follow(leaves, [] if cloned else self.model.parameters(), bias, lengths, seed)
                try:
                    with follow, follow.functions, cut.active(), forward_explained(self.model, [x]):
                        output = select(cut.result(module(given.clone())), self.outputs)
                        if self.target is not None and places is not None:
                            output = self.target.pick(output, places)
                    return _Run.of(output, follow, x.shape[0] == 1)
                except WritesState:
                    continue
        came = "writing into tensors that are not its own"
        raise ModelStateError.of("model", came, "its forward must leave such tensors alone")


@dataclass(frozen=True)
class _Run:
    """One forward.

    Attributes:
        output: Its output.
        carried: What was carried along to it.
        point: Where it was followed from.
        moves: `d`, where values were moved.
        curved: Names of what is not piecewise linear.
    """

    output: Tensor
    carried: list[Tensor]
    point: Tensor
    moves: list[Tensor]
    curved: list[str]

    @classmethod
    def of(cls, output: Any, follow: Follow, alone: bool) -> _Run:
        if not isinstance(output, Tensor):
            todo = "Pick one with `outputs=`."
            raise InputError.of("model", f"returning a {type(output).__name__}", "one tensor is needed", todo)
        carried, curved = follow.read(output)
        run = cls(output.detach(), carried, follow.leaves[0].detach(), follow.moves, curved)
        if not alone or (output.ndim and output.shape[0] == 1):
            return run
        # The forward drops the axis of a single sample.
        return replace(run, output=run.output.unsqueeze(0), carried=[c.unsqueeze(0) for c in carried])
