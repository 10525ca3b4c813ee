"""The passes over a problem's data that make a Kronecker-factored curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from .._finite import is_finite
from .._framework import likelihood_at
from .._ladder.names import Fact, Question, RouteName
from .._operators import Operator
from .._operators._eigen_blocks import Block
from .._recorded_loss import LossOf
from .._requirements import check_precision
from .._runtime.counter import Draws
from .._sharing import PLACES, refuse_apart
from .._space import Space
from .._torch.protocol import Directions, Given, Gradients, Group, RecordedBatch, row_scale
from .._words import FisherSource
from ..errors import InputError, NotDifferentiableError
from ._kronecker_noise import Noise
from ._kronecker_sums import Basis, OuterSums, RowSums, not_finite
from ._output_loss import LossAtOutput

Summed = OuterSums | RowSums | Noise
_EXACT_UP_TO = 64  # outputs per sample that `auto` sweeps one by one: as many as share one pass
_FEW = 32  # samples recorded together where parameters need a sweep for each, which runs through all of them
_KEPT_ENTRIES = 2**23  # what is kept of the first pass for the second: 32 MiB in float32; more is recorded again
_SWEEP_ENTRIES = 2**23  # cotangents at all uses that are held at a time: 32 MiB in float32


@dataclass(frozen=True, eq=False)
class Piece:
    """Gradients of one batch under some cotangents.

    Attributes:
        gradients: By groups of parameters; they can be read once, where nothing was kept.
        factor: With which the batch enters the whole.
        share: 1 for the first cotangents of a batch, 0 for others, which multiply the same.
    """

    gradients: Iterable[Gradients]
    factor: float
    share: float


@final
class Passes:
    """Gradients of all samples of a problem under cotangents that make up a curvature, the same in every pass.

    Args:
        problem: A model, a loss and data.
        fisher: Which curvature.
        draws: Random cotangents per sample.
        seed: Of those; each depends on the sample's place in the data, too.
        call: The public call, for messages.
    """

    def __init__(self, problem: Any, fisher: FisherSource, draws: int, seed: int, call: str = "EKFAC") -> None:
        check_precision("model", problem.space.dtype, f"{call} needs")
        self.problem, self.call = problem, call
        self.fisher, self.draws, self.seed = fisher, draws, seed
        self.groups: tuple[Group, ...] = ()
        self.drawn = self._begun = False
        self._recorded = 0

    def pieces(self, outer_only: bool = False) -> Iterator[Piece]:
        """Yield batch by batch, some cotangents at a time.

        Args:
            outer_only: Leave out the parameters whose gradients come as rows.

        Raises:
            NonFiniteError: An output is NaN or Inf.
            NotDifferentiableError: A parameter enters batches in different ways.
        """
        self._recorded = 0
        for first, point, term, factor in self.problem.terms(self.call):
            yield from self._of_batch(point.batch, term, factor, first, outer_only)
            self.problem.keep(point, few=True)
            del point, term  # before the next batch is recorded

    def _of_batch(self, data: Any, term: Any, factor: float, first: int, outer_only: bool) -> Iterator[Piece]:
        found, model = term.recorded(data.x, self.call, pulled=True), term.model
        of = LossOf(term.loss, data.y, term.at_output)
        at = LossAtOutput(model, found, of, data.rows, self.call)
        batch: Any = model.layers(data.x, term.picks, self.call) if at.foreign else RecordedBatch(at.output())
        if not at.foreign and batch.lin.proofs.refused(Question.PULL, RouteName.BY_USES):
            batch.distrust()
        known, self.groups = self.groups, self.groups or batch.groups()
        if data.rows > _FEW and any(group.form == "swept" for group in self.groups):
            # A sweep for one sample runs through all that were recorded together.
            for start in range(0, data.rows, _FEW):
                part = data.part(slice(start, start + _FEW))
                _, own, share = self.problem.term(part)
                if share:  # a batch that only gives shapes has no factor, nor have its parts
                    yield from self._of_batch(part, own, share if factor else 0.0, first + start, outer_only)
            return
        self._recorded += 1
        if known:
            self._check_alike(batch)
        directions = self._directions(at, term, data, first)
        del at, found  # the loss's own graph is not needed for sweeps
        columns = directions.columns
        size = 1
        if columns > 1:
            size = max(1, min(columns, _SWEEP_ENTRIES // max(1, batch.entries(self.groups))))
        for start in range(0, columns, size):
            seeds = directions.chunk(start, min(start + size, columns))
            gradients = self._confirmed(batch, seeds, outer_only)
            self._begun = True
            yield Piece(gradients, factor, 1.0 if factor and not start else 0.0)

    def _directions(self, at: LossAtOutput, term: Any, data: Any, first: int) -> Directions:
        if self.fisher == "empirical":
            computed = partial(_of_own_labels, at, term, data)
            own = at.of_labels(term.losses, computed) if data.weights is None else computed()
            return Given(own.unsqueeze(0))
        hessian = at.hessian(term.losses if data.weights is None else None)
        if self.fisher == "exact" or (self.fisher == "auto" and hessian.columns <= _EXACT_UP_TO):
            return hessian
        refuse_apart(self.problem.data, self.problem.ranks, PLACES)
        self.drawn = True
        return Given(hessian.draw(Draws(self.seed, first), self.draws) / math.sqrt(self.draws))

    def _confirmed(self, batch: Any, seeds: Tensor, outer_only: bool) -> Iterable[Gradients]:
        """Return gradients that are compared with a plain sweep, once for each shape."""
        groups = [g for g in self.groups if not outer_only or g.form in ("outer", "lookup")]
        if not isinstance(batch, RecordedBatch):  # it compares them itself
            return batch.gradients(groups, seeds)
        proofs, route = batch.lin.proofs, (Fact.GRADIENTS_BY_USES, seeds.shape[0])
        if not proofs.needs(*route):
            return batch.gradients(groups, seeds)
        found = list(batch.gradients(groups, seeds))
        if not batch.confirmed(groups, seeds, found):
            _check_finite(groups, found, batch)
            proofs.refuse(Question.PULL, RouteName.BY_USES)
            batch.distrust()
            self.groups = self.groups if self._begun else batch.groups()
            self._check_alike(batch)
            return batch.gradients(self.groups, seeds)
        proofs.remember(*route)
        return found

    def _check_alike(self, batch: Any) -> None:
        misfit = batch.misfit(self.groups)
        if misfit is not None:
            raise NotDifferentiableError(
                f"{self.call}: {self.problem.space.names[misfit]} enters batch {self._recorded} in another way than "
                "the first one, so their statistics cannot be added up. Leave it out with `parameters=`, or use `CG()`."
            )


def _of_own_labels(at: LossAtOutput, term: Any, data: Any) -> Tensor:
    """Return gradients of the samples' terms by the output, scaled so that their squares make a batch's part."""
    losses, many, mean = term.losses, data.rows, term.losses.reduction == "mean"
    shares = term.denominators(data.y, many) if mean else torch.ones(many)
    found, own = partial(likelihood_at, at.model, at.found, losses, data.y), term.own(many)
    counted, total = row_scale(losses, data.y, many, found, shares if mean else None)
    if data.weights is None:
        return at.slopes(own, shares, mean, counted, total)
    # The batch enters by its numerator, in the units of its denominator; what is ignored has no loss to divide.
    slopes = at.gradient(own)
    counted = counted.to(slopes)
    units = counted / torch.where(shares > 0, shares, 1.0).to(slopes)
    return slopes * (counted * (data.weights.to(slopes) / torch.where(units > 0, units, 1.0)).sqrt()).unsqueeze(1)


def _check_finite(groups: Sequence[Group], found: Sequence[Gradients], batch: RecordedBatch) -> None:
    for group, own in zip(groups, found, strict=True):
        parts = [own] if isinstance(own, Tensor) else [side for use in own for side in (use.left, use.right)]
        if not all(is_finite(part) for part in parts):
            name = batch.lin.domain.names[group.leaves[0]]
            raise not_finite(name)


def check_source(operator: Operator) -> None:
    """Refuse an operator that does not lead to a model with a loss and data.

    Raises:
        InputError: It does not.
    """
    objective = getattr(getattr(operator, "problem", None), "objective", None)
    if not all(hasattr(objective, name) for name in ("model", "losses", "picks")):
        needed = "EKFAC needs the curvature of a Problem, of whose model it takes the layers"
        todo = "Build it with `Problem(model, loss, data).ggn()`, or use `CG()`, which takes any operator."
        raise InputError.of("operator", f"{operator!r}", needed, todo)


def summed(
    passes: Passes, space: Space, basis: Basis, exact_up_to: int, kept: list[Piece] | None = None
) -> tuple[tuple[OuterSums | RowSums, ...], Noise | None]:
    """Return the sums of one pass over the data, and the moments of what was drawn.

    Args:
        passes: The data.
        space: The parameters.
        basis: How the factors are made.
        exact_up_to: Largest parameter outside Kronecker form that is kept exactly.
        kept: Where gradients for a second pass are left, if they fit.
    """
    sums: list[OuterSums | RowSums] = []
    noise = Noise()

    def gather() -> list[Summed]:
        room = _KEPT_ENTRIES if kept is not None else -1
        for piece in passes.pieces():
            sums[:] = sums or [_sums(group, space, exact_up_to, basis) for group in passes.groups]
            slopes, outer = list[Tensor](), list[Gradients]()
            for number, (own, gradients) in enumerate(zip(sums, piece.gradients, strict=True)):
                slopes += noise.slopes(number, gradients) if passes.drawn else []
                own.add(gradients, piece.factor, piece.share)
                if room >= 0 and isinstance(gradients, list):
                    room -= sum(use.left.numel() + use.right.numel() for use in gradients)
                    outer.append(gradients)
            noise.add(slopes, piece.factor)
            if kept is not None:
                kept[:] = [*kept, Piece(outer, piece.factor, piece.share)] if room >= 0 else []
        return [*sums, noise]

    _added_up(passes, gather)
    return tuple(sums), noise if passes.drawn else None


def corrected(sums: Sequence[OuterSums | RowSums], passes: Passes, kept: Sequence[Piece]) -> tuple[Block, ...]:
    """Return blocks whose eigenvalues are found by a second pass over the data, or over what is kept of the first."""
    outer = [own for own in sums if isinstance(own, OuterSums)]
    for own in outer:  # the signs of eigenvectors are a processor's own choice
        own.settle(partial(passes.problem.ranks.leading, passes.call))

    def gather() -> list[Summed]:
        for piece in kept or (passes.pieces(outer_only=True) if outer else ()):
            for own, gradients in zip(outer, piece.gradients, strict=True):
                own.correct(gradients, piece.factor)
        return [*outer]

    _added_up(passes, gather)
    return tuple(own.block() for own in sums)


def _added_up(passes: Passes, gather: Callable[[], list[Summed]]) -> None:
    """Add up over ranks what each gathers in a pass."""
    found: list[Summed] = []

    def own() -> list[Tensor]:
        found[:] = gather()
        return [part for one in found for part in one.parts()] if passes.problem.ranks.shared else []

    totals = iter(passes.problem.sums(passes.call, own))
    for one in found if passes.problem.ranks.shared else ():
        one.take(totals)


def _sums(group: Group, space: Space, exact_up_to: int, basis: Basis) -> OuterSums | RowSums:
    where, names = tuple([space.slices[i] for i in group.leaves]), tuple([space.names[i] for i in group.leaves])
    shape = space.shapes[group.leaves[0]]
    if group.form in ("outer", "lookup"):
        return OuterSums(where, names, group.turned, shape[0] if group.form == "lookup" else None, basis)
    return RowSums(where, names, shape.numel() <= exact_up_to)
