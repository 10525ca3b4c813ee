"""A point to plan at or to evaluate at: the model recorded with its selections lifted, and what its columns mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._hooks import inspectors
from .._picks import Variable, differentiated
from .._recorded_loss import check_usable
from .._runtime.contexts import must_surface, private_noise
from .._runtime.restoring import restoring
from .._runtime.rows import plain
from .._torch.protocol import Linearization, ModelRun, Proofs, Recording, bare, parameter_names
from .._trees import Selector, flatten
from ._lift import Lift, Selection
from ._pool import Array
from ._taint import Taint

_EMPTY = 1e-2  # a column is judged by no less than this share of the tolerance of the largest column


@dataclass(frozen=True, eq=False)
class RecordedPoint:
    """A recorded model, ready to be swept.

    Attributes:
        recording: What was recorded.
        lin: The linearization to sweep: its leaves are the parameters, then the selections that were lifted.
        selections: Those.
        taint: What depends on the point, where that was requested.
        replayed: Whether some selections are rows of what is computed from parameters.
    """

    recording: Recording
    lin: Linearization
    selections: list[Selection]
    taint: Taint | None
    replayed: bool = False

    @property
    def output(self) -> Any:
        """What the model gave, detached."""
        return self.recording.tree.build([o.detach() for o in self.recording.lin.outputs])

    def structure(self) -> list[tuple[int, int]]:
        """Return source and size of every lifted selection."""
        return [(s.source, s.positions.numel()) for s in self.selections]

    def storage_columns(self) -> Array:
        """Return, for each entry of the linearization's leaves, which stored entry of a parameter it is."""
        offsets = [where.start for where in self.recording.lin.domain.slices]
        direct = np.arange(self.recording.lin.domain.dim)
        lifted = [s.positions.cpu().numpy() + offsets[s.source] for s in self.selections]
        return np.concatenate([direct, *lifted])

    def widths(self, tangent: bool) -> tuple[Array, int]:
        """Return the final column of each stored entry, and their number; padding comes last, beyond that number.

        A LieTensor of a group stores one number more than it can move; autograd pads its gradient with a zero.
        """
        lie = [_lie_widths(leaf, tangent) for leaf in self.recording.lin.leaves]
        sizes = self.recording.lin.domain.sizes
        held = np.concatenate([np.arange(n) % stored < free for n, (stored, free) in zip(sizes, lie, strict=True)])
        many = int(held.sum())
        return np.where(held, np.cumsum(held) - 1, many), many

    def block(self, tangent: bool) -> int:
        """Return how many neighbouring columns the last axes of leaves suggest for a block."""
        lie = [_lie_widths(leaf, tangent) for leaf in self.recording.lin.leaves]
        shapes = self.recording.lin.domain.shapes
        last = [shape[-1] if len(shape) > 1 else shape.numel() for shape in shapes]
        return math.gcd(*(free if free < stored else n for n, (stored, free) in zip(last, lie, strict=True))) or 1


def _lie_widths(tensor: Tensor, tangent: bool) -> tuple[int, int]:
    """Return how many numbers an element of a LieTensor is stored in, and how many of them are columns."""
    kind: Any = getattr(tensor, "ltype", None)
    if kind is None:
        return 1, 1
    stored, free = int(kind.dimension[0]), int(kind.manifold[0])
    return stored, min(free, stored) if tangent else stored


@restoring
def record_point(
    model: Any,
    inputs: Any,
    call: str,
    by: Variable,
    outputs: Selector,
    *,
    lift: bool = True,
    replay: bool = True,
    watch: bool = False,
) -> RecordedPoint:
    """Record a model with its selections lifted where that is sound.

    Args:
        model: A module, or a function that is differentiated by its inputs.
        inputs: Its input.
        call: The public call on whose behalf this is done.
        by: What to differentiate by.
        outputs: Part of the output.
        lift: Whether to lift.
        replay: Whether to lift rows of what is computed from parameters, which takes notes of the whole forward pass.
        watch: Note which constants depend on the point.
    """
    parameters = differentiated(by)
    given = [t for t in flatten(inputs, "input")[0] if isinstance(t, Tensor)]
    if parameters is None:
        chosen = [t for t in given if t.is_floating_point()]
    else:
        chosen = [p for n, p in parameter_names(bare(model)).items() if parameters(n, p)]
    taint = Taint([*given, *chosen]) if watch else None

    def record() -> Recording:
        with taint or nullcontext():
            run = ModelRun(model, inputs, call=call, parameters=parameters, outputs=outputs, anew=watch and lift)
            return run.recorded()

    mode = Lift(chosen, replay)
    lifted = _lifted(record, mode) if lift and not any(t.is_inference() for t in chosen) else None
    recording, selections = lifted or (record(), [])
    return replace(point_of(recording, call, selections, taint), replayed=bool(selections) and mode.replayed)


def point_of(
    recording: Recording, call: str, selections: list[Selection] | None = None, taint: Taint | None = None
) -> RecordedPoint:
    """Return a recording as a point.

    Args:
        recording: The recorded model.
        call: The public call on whose behalf this is done.
        selections: What was lifted.
        taint: What was watched.
    """
    lin, selections = recording.lin, selections or []
    names = lin.domain.names
    leaves = {f"{names[s.source]} (selection {i})": s.leaf for i, s in enumerate(selections)}
    lin = lin.to(lin.outputs, lin.codomain.names, call, more=leaves)
    lin.proofs, lin.fallback = Proofs(), "silent"
    check_usable(lin)
    for inspect in inspectors:
        inspect(replace(recording, lin=lin))
    return RecordedPoint(recording, lin, selections, taint)


@restoring
def _lifted(record: Callable[[], Recording], mode: Lift) -> tuple[Recording, list[Selection]] | None:
    """Return a recording with the selections that its output depends on as leaves.

    None is returned where the model writes into one, so that copies no longer agree with each other, or the forward
    fails: the plain one then decides whether that is an error.
    """
    try:
        with mode:
            recording = record()
    except RuntimeError as error:
        if must_surface(error):
            raise
        return None
    if not all(s.untouched for s in mode.selections):
        return None
    return recording, [s for s in mode.selections if id(s.leaf) in recording.lin.graph_info.leaves]


def gradients_agree(point: RecordedPoint, plain_point: RecordedPoint) -> bool:
    """Return whether backward passes with and without lifted selections agree in every column."""
    seeds = [private_noise(plain(o.detach()), 31 + i) for i, o in enumerate(point.lin.outputs)]
    found, sizes = _summed(point, seeds)
    right, others = _summed(plain_point, seeds)
    if found.shape != right.shape:
        return False
    sizes = torch.maximum(sizes, others)
    least = _EMPTY * sizes.max() if sizes.numel() else 0.0
    return bool(((found - right).abs() <= point.lin.tolerance * (sizes + least)).all())


def _summed(point: RecordedPoint, seeds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return gradients by what is stored, selections added to what they copy, and the sums of their sizes."""
    lin, where = point.lin, torch.from_numpy(point.storage_columns())
    terms = lin.domain.join(lin.pull_rows([s.unsqueeze(0) for s in seeds]))[0].detach().double().cpu()
    total = torch.zeros(point.recording.lin.domain.dim, dtype=torch.float64)
    return total.index_add(0, where, terms), total.index_add(0, where, terms.abs())
