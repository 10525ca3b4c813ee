"""A point to plan at or to evaluate at: the model recorded with its selections lifted, and what its columns mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._picks import Variable, differentiated
from .._recorded_loss import check_usable
from .._runtime.contexts import must_surface, private_noise
from .._runtime.restoring import restoring
from .._runtime.rows import plain
from .._torch.protocol import Linearization, Proofs, Recording, bare, parameter_names, record_model
from .._trees import Selector, flatten
from ._lift import Lift, Selection
from ._pool import Array
from ._taint import Taint

_EMPTY = 1e-2  # a column is judged by no less than this share of the tolerance of the largest column

inspectors: list[Callable[[Recording], None]] = []
"""Called with every recording before it is swept: an extra may refuse or mend what it knows better (LieTensors)."""


@dataclass(frozen=True, eq=False)
class RecordedPoint:
    """A recorded model, ready to be swept.

    Attributes:
        recording: What was recorded.
        lin: The linearization to sweep: its leaves are the parameters, then the selections that were lifted.
        selections: Those.
        taint: What depends on the point, where that was asked for.
    """

    recording: Recording
    lin: Linearization
    selections: list[Selection]
    taint: Taint | None

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
        kept = []
        for leaf in self.recording.lin.leaves:
            stored, free = lie_widths(leaf)
            held = np.ones(leaf.numel(), bool)
            if tangent and free < stored:
                held = np.arange(leaf.numel()) % stored < free
            kept.append(held)
        held = np.concatenate(kept)
        many = int(held.sum())
        return np.where(held, np.cumsum(held) - 1, many), many


def lie_widths(tensor: Tensor) -> tuple[int, int]:
    """Return how many numbers an element of a LieTensor is stored in, and how many it can move in."""
    kind: Any = getattr(tensor, "ltype", None)
    if kind is None:
        return 1, 1
    return int(kind.dimension[0]), int(kind.manifold[0])


@restoring
def record_point(
    model: nn.Module,
    inputs: Any,
    call: str,
    by: Variable,
    outputs: Selector,
    *,
    lift: bool = True,
    watch: bool = False,
) -> RecordedPoint:
    """Record a model with its selections lifted where that is sound.

    Args:
        model: A module.
        inputs: Its input.
        call: The public call on whose behalf this is done.
        by: What to differentiate by.
        outputs: Part of the output.
        lift: Whether to lift.
        watch: Note which constants depend on the point.
    """
    parameters = differentiated(by)
    module = bare(model)
    given = [t for t in flatten(inputs, "input")[0] if isinstance(t, Tensor)]
    named = parameter_names(module)
    chosen = [p for n, p in named.items() if parameters(n, p)] if parameters else [
        t for t in given if t.is_floating_point()
    ]  # fmt: skip
    options = {"call": call, "parameters": parameters, "outputs": outputs}
    taint = Taint([*given, *chosen]) if watch else None
    selections: list[Selection] = []
    recording = None
    if lift and not any(t.is_inference() for t in chosen):
        mode = Lift(chosen)
        try:
            with mode:
                recording = _recorded(model, inputs, taint, options)
            selections = _sound(mode.selections, recording.lin)
        except (RuntimeError, _LiftFailedError) as error:
            if must_surface(error):
                raise
            recording = None  # it writes into what it selected: the plain forward says whether that is an error
    if recording is None:
        selections = []
        recording = _recorded(model, inputs, taint, options)
    lin = _lifted_tape(recording.lin, selections)
    for inspect in inspectors:
        inspect(replace(recording, lin=lin))
    return RecordedPoint(recording, lin, selections, taint)


class _LiftFailedError(Exception):
    """A lifted selection was written into."""


@restoring
def _recorded(model: nn.Module, inputs: Any, taint: Taint | None, options: dict[str, Any]) -> Recording:
    if taint is None:
        return record_model(model, inputs, **options)
    with taint:
        return record_model(model, inputs, **options)


def _sound(selections: list[Selection], lin: Linearization) -> list[Selection]:
    """Return the selections that the output depends on.

    Raises:
        _LiftFailedError: Someone wrote into one, so copies no longer agree with each other.
    """
    if not all(s.untouched for s in selections):
        raise _LiftFailedError
    return [s for s in selections if id(s.leaf) in lin.graph_info.leaves]


def _lifted_tape(lin: Linearization, selections: list[Selection]) -> Linearization:
    names = lin.domain.names
    leaves = {f"{names[s.source]} (selection {i})": s.leaf for i, s in enumerate(selections)}
    lifted = lin.to(lin.outputs, lin.codomain.names, lin.call, leaves)
    lifted.trust, lifted.fallback = Proofs(), "silent"
    check_usable(lifted)
    return lifted


def gradients_agree(point: RecordedPoint, plain_point: RecordedPoint) -> bool:
    """Say whether a backward pass through lifted selections gives what one without lifting gives, in every column."""
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
    grads = point.lin.pull(list(seeds))
    flat = [
        torch.zeros(leaf.numel()).double() if g is None else plain(g).detach().reshape(-1).double().cpu()
        for g, leaf in zip(grads, point.lin.leaves, strict=True)
    ]
    total = torch.zeros(point.recording.lin.domain.dim, dtype=torch.float64)
    where, terms = torch.from_numpy(point.storage_columns()), torch.cat(flat)
    return total.index_add(0, where, terms), total.index_add(0, where, terms.abs())
