"""The rows of every sample alone, as factors: many samples to a sweep where that is right, else one at a time.

A row is defined by its sample alone, in a batch of one. A batch gives the same rows if samples do not mix, which is
believed where these agree, at the very shape that is used: no value is read out of a tensor; a cotangent on half of
the samples leaves exact zeros at the others; the outputs of some samples are the same alone; the row of one sample is
the same alone; and a plain sweep over a random mix of all rows is what the factors say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...._finite import is_finite
from ....errors import JacopsError, ModelStateError, NotDifferentiableError, explain, warn
from ..agreement import size, worst_disagreement
from ..ladder import RouteFailedError
from ..proofs import Refusal
from ..record import Recorded
from ..rows import plain
from ..samples.mixing import NOT_FINITE, differs, read_tolerance, with_reads
from ..surroundings import must_surface, private_noise
from ..tape import Tape
from ..watch import Habits
from .collected import Collected, StructureChangedError
from .factors import Layers, unit_seeds

_WORKING = 2**24  # bytes of a recorded batch: larger ones were not faster
_MOST = 4096  # samples in it
_ROUNDING_SHARE = 1e-4


@dataclass(frozen=True)
class Definition:
    """What a row is.

    Attributes:
        values: The tensors of all samples, first axis samples.
        alone: Records one sample alone: its values -> a tape with one output, whose entries are the rows.
        together: Records the model's outputs for several samples: their values -> a tape.
        cotangents: A loss's cotangents of a batch, row by row; None where rows are the outputs themselves.
        call: The public call on whose behalf this is done.
        fallback: What happens when samples mix.
        forced: Samples are taken alone for this reason.
    """

    values: Sequence[Tensor]
    alone: Callable[[Sequence[Tensor]], Recorded]
    together: Callable[[Sequence[Tensor]], Recorded]
    cotangents: Callable[[Recorded, Sequence[Tensor]], list[Tensor | None]] | None
    call: str
    fallback: str
    forced: str | None = None


class SampleFactors:
    """All rows, collected.

    Args:
        what: The definition of a row.

    Attributes:
        collected: The rows.
        tape: Of some sample, for names and shapes.
        route: How they were computed, in words.
    """

    def __init__(self, what: Definition) -> None:
        self.what = what
        self.count = what.values[0].shape[0]
        self.tape, self.output = self._prepared()
        self.layers = Layers(self.tape, 1)
        self.route = ""
        try:
            self.collected = self._all()
        except (StructureChangedError, RouteFailedError) as reason:
            self.layers = Layers(self.tape, 1, plainly=True)
            self.collected = self._all()
            self.route += f", without factors ({reason})"

    # ---- all samples -----------------------------------------------------------------------------------------

    def _prepared(self) -> tuple[Tape, Tensor]:
        """Record one sample alone: its errors are those of the definition, its size says how many go together."""
        tape = self._record_alone(self.count // 2).tape
        return tape, tape.outputs[0]

    def _all(self) -> Collected:
        collected = Collected(self.count, self.output.numel(), self.layers)
        refusal = self._refusal()
        size = 1
        for where in self._batches():
            size = where.stop - where.start
            if refusal is None and size > 1:
                refusal = self._together(collected, where)
                self._note(refusal)
            if refusal is not None or size == 1:
                for i in range(where.start, where.stop):
                    self._alone(collected, i)
        self.route = f"{size} samples to a sweep" if refusal is None else f"one sample at a time ({refusal.reason})"
        return collected

    def _refusal(self) -> Refusal | None:
        if self.what.forced is not None or not self.layers.sites:
            return Refusal(self.what.forced or "no parameter enters by an operation with a rule", loud=False)
        known = self.tape.trust.refusal("samples", "together")
        if known is not None:
            self._say(known)
        return known

    def _note(self, refusal: Refusal | None) -> None:
        if refusal is None:
            return
        if refusal.lasting:
            self.tape.trust.refuse("samples", "together", refusal)
        self._say(refusal)

    def _say(self, refusal: Refusal) -> None:
        if not refusal.loud:
            return
        if self.what.fallback == "error":
            raise NotDifferentiableError(
                f"{self.what.call}: {refusal.reason}, and fallback='error' forbids one sample at a time."
            )
        if self.what.fallback == "warn":
            warn(f"{self.what.call}: {refusal.reason}; so every sample was differentiated alone, in a batch of one.")

    def _batches(self) -> Iterator[slice]:
        """Yield even batches whose recorded values stay within a working size."""
        outputs = sum(use.shape.numel() for use in self.layers.uses) * self.output.element_size()
        each = self.tape.held_bytes + 2 * outputs
        most = max(1, min(_MOST, _WORKING // max(1, each)))
        step = math.ceil(self.count / math.ceil(self.count / most))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    # ---- one sample ------------------------------------------------------------------------------------------

    def _record_alone(self, i: int) -> Recorded:
        return self.what.alone([v[i : i + 1] for v in self.what.values])

    def _alone(self, collected: Collected, i: int) -> None:
        """Fill in the rows of one sample from a batch of one, which defines them."""
        tape = self._record_alone(i).tape
        (output,) = tape.outputs
        if output.numel() != self.output.numel():
            raise ModelStateError(
                explain(
                    "model",
                    f"returning {tuple(output.shape)} after {tuple(self.output.shape)}",
                    "all samples must have outputs of one shape",
                )
            )
        layers, where = Layers(tape, 1, plainly=not self.layers.sites), slice(i, i + 1)
        operands = collected.open(where, layers)
        for entry, seed in enumerate(unit_seeds(output.unsqueeze(0))):
            collected.fill(where, entry, layers, operands, layers.sweep([seed.view(output.shape)]))
        self._fill_missing(collected, i, tape)
        # A graph that depends on values is another one each time.
        if layers.sites and (_habits(tape).reads or tape.trust.needs("rows by uses", tape.domain.names)):
            mix = private_noise(output)
            pairs = self._pairs(collected, where, tape, [mix], mix.reshape(1, -1))
            if not worst_disagreement(pairs) <= tape.tolerance:
                raise StructureChangedError("a plain sweep disagrees with them")
            tape.trust.remember("rows by uses", tape.domain.names)

    def _fill_missing(self, collected: Collected, i: int, tape: Tape) -> None:
        """Fill in the rows of parameters without a rule, by plain sweeps over one sample's graph."""
        if not collected.missing:
            return
        (output,) = tape.outputs
        for entry, seed in enumerate(unit_seeds(output.unsqueeze(0))):
            rows = tape.pull([seed.view(output.shape)])
            for leaf in collected.missing:
                row = rows[leaf]
                collected.fill_leaf(i, entry, leaf, None if row is None else plain(row))

    def _pairs(
        self, collected: Collected, where: slice, tape: Tape, seeds: Sequence[Tensor], mix: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Return rows mixed by `mix`, `(n, k)`, beside a plain sweep over cotangents that say the same."""
        pulled, pairs = tape.pull(seeds), []
        for leaf, part in enumerate(collected.parts(where)):
            if leaf not in collected.missing:
                ours = part.transposed(mix.to(part.like.dtype).unsqueeze(0))
                theirs = pulled[leaf]
                pairs.append((ours, torch.zeros_like(ours) if theirs is None else plain(theirs).reshape(ours.shape)))
        return pairs

    # ---- many samples ----------------------------------------------------------------------------------------

    def _together(self, collected: Collected, where: slice) -> Refusal | None:
        """Fill in the rows of a batch by shared sweeps; return why not where samples mix."""
        values = [v[where] for v in self.what.values]
        try:
            batch = self.what.together(values)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, JacopsError) or must_surface(error):
                raise
            what = f"{type(error).__name__}: {str(error)[:100]}"
            return Refusal(f"the forward takes no batch of {where.stop - where.start} ({what})")
        many = where.stop - where.start
        seeds = self.what.cotangents(batch, values) if self.what.cotangents else None
        tape, seeds = _that_count(batch.tape, seeds)
        refusal = self._unbatchable(tape, many)
        if refusal is not None:
            return refusal
        route = ("samples apart", self.what.call, tape.domain.names, tape.codomain.names)
        fresh = tape.trust.needs(*route)
        fresh = fresh or bool(_habits(tape).reads)
        reason = self._differs(tape, values, many) if fresh else None
        reason = reason or self._filled(collected, where, tape, seeds)
        reason = reason or (self._disagrees(collected, where, tape, seeds) if fresh else None)
        if reason is not None:
            return Refusal(reason, loud=reason != NOT_FINITE, lasting=reason != NOT_FINITE)
        if fresh and any(bool((v != v[:1]).any()) for v in values):  # equal rows prove nothing: they agree anyway
            tape.trust.remember(*route)
        for i in range(where.start, where.stop) if collected.missing else ():
            self._fill_missing(collected, i, self._record_alone(i).tape)
        return None

    def _filled(
        self, collected: Collected, where: slice, tape: Tape, cotangents: Sequence[Tensor] | None
    ) -> str | None:
        """Fill in a batch by one sweep for each row of a sample; return why not if samples mix."""
        try:
            layers = Layers(tape, where.stop - where.start)
            lost = [tape.domain.names[j] for j in layers.missing if j not in collected.missing]
            if lost:
                return f"samples mix where {', '.join(lost)} enter"
            operands = collected.open(where, layers)
            every = [cotangents] if cotangents else ([seed] for seed in unit_seeds(tape.outputs[0]))
            for entry, seeds in enumerate(every):
                collected.fill(where, entry, layers, operands, layers.sweep(seeds))
        except (StructureChangedError, RouteFailedError) as reason:
            return f"a batch cannot be swept at once ({reason})"
        return None

    def _unbatchable(self, tape: Tape, many: int) -> Refusal | None:
        if not tape.outputs:
            return Refusal("the loss of no row depends on its output", loud=False, lasting=False)
        habits = _habits(tape)
        if habits.reads and habits.coarse in (torch.bfloat16, torch.float16):
            return Refusal(with_reads("in half precision outputs alone cannot tell whether samples mix", habits))
        if habits.draws:
            return Refusal(f"the forward is random ({', '.join(habits.draws)})")
        for name, output in zip(tape.codomain.names, tape.outputs, strict=True):
            if output.ndim == 0 or output.shape[0] != many:
                return Refusal(f"{name} has shape {tuple(output.shape)} and no axis of {many} samples first")
        if not all(is_finite(output) for output in tape.outputs):  # NaN would look like samples that mix
            return Refusal(NOT_FINITE, loud=False, lasting=False)
        return None

    def _differs(self, tape: Tape, values: Sequence[Tensor], many: int) -> str | None:
        """Compare outputs in the batch with outputs of one sample and of a random half, or of every one."""
        order = _order(many)
        reads = bool(_habits(tape).reads)
        halves: Iterable[Tensor] = (order[:1], order[: max(1, many // 2)].sort().values)
        for picked in order.split(1) if reads else halves:
            part = self.what.together([v[picked.to(v.device)] for v in values]).tape
            if len(picked) == 1:
                tape.compare(part)
            outputs = dict(zip(part.codomain.names, part.outputs, strict=True))
            for name, whole in zip(tape.codomain.names, tape.outputs, strict=True):
                alone = outputs[name]
                reason = differs(whole, alone, picked, read_tolerance(tape) if reads else tape.tolerance)
                if reason is not None:
                    return with_reads(reason, _habits(tape))
        return None

    def _disagrees(
        self, collected: Collected, where: slice, tape: Tape, cotangents: Sequence[Tensor] | None
    ) -> str | None:
        """Hold the rows of a batch against one plain sweep, and those of one sample against that sample alone."""
        many, entries = where.stop - where.start, self.output.numel()
        mix = private_noise(self.output.new_empty(many, entries))
        if cotangents is None:
            seeds = [mix.view(tape.outputs[0].shape).to(tape.outputs[0].dtype)]
        else:
            seeds = [c * mix.view(-1, *[1] * (c.ndim - 1)).to(c.dtype) for c in cotangents]
        pairs = self._pairs(collected, where, tape, seeds, mix)
        error = worst_disagreement(pairs)
        if not error <= tape.tolerance:
            return _off("a plain sweep over all samples", error)
        i = where.start + int(_order(many)[-1])
        # A sample that is fitted perfectly has a gradient of rounding alone, which is compared with the usual size.
        usual = [_ROUNDING_SHARE * max(size(a), size(b)) / math.sqrt(many) for a, b in pairs]
        tape = self._record_alone(i).tape
        (output,) = tape.outputs
        mix = private_noise(output)
        pairs = self._pairs(collected, slice(i, i + 1), tape, [mix], mix.reshape(1, -1))
        scales = [max(size(a), size(b), least) for (a, b), least in zip(pairs, usual, strict=True)]
        error = worst_disagreement(pairs, scales)
        return None if error <= tape.tolerance else _off("a sample alone", error)


def _that_count(tape: Tape, cotangents: Sequence[Tensor | None] | None) -> tuple[Tape, list[Tensor] | None]:
    """Return a tape over the outputs that have cotangents, which a loss may leave out, and those."""
    if cotangents is None:
        return tape, None
    seeds = [c for c in cotangents if c is not None]
    if len(seeds) == len(tape.outputs):
        return tape, seeds
    keep = [i for i, c in enumerate(cotangents) if c is not None]
    part = Tape(
        tape.leaves,
        [tape.outputs[i] for i in keep],
        leaf_names=tape.domain.names,
        output_names=[tape.codomain.names[i] for i in keep],
        call=tape.call,
        twins=tape.twins,
        private=tape.private,
        trust=tape.trust,
        fallback=tape.fallback,
    )
    part.protected, part.tolerance = tape.protected, tape.tolerance
    return part, seeds


def _habits(tape: Tape) -> Habits:
    return tape.trust.habits or Habits()


def _order(many: int) -> Tensor:
    return torch.randperm(many, generator=torch.Generator().manual_seed(0))


def _off(what: str, error: float) -> str:
    finite = math.isfinite(error)
    return f"samples mix: {what} and the rows of the batch differ by {error:.1e}" if finite else NOT_FINITE
