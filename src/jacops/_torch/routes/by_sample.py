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

from ..._finite import is_finite
from ..._ladder.failures import RouteFailedError
from ..._runtime.agreement import size, worst_disagreement
from ..._runtime.contexts import must_surface, private_noise
from ..._runtime.rows import plain
from ..._runtime.side_effects import SideEffects
from ...errors import JacopsError, ModelStateError, NotDifferentiableError, warn
from ..layers.collected import Collected, StructureChangedError
from ..layers.factors import LayerRows, unit_seeds
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import NOT_FINITE, differs, read_tolerance, with_reads
from ..sweeps.proofs import Refusal
from ..sweeps.record import Recording

_WORKING = 2**24  # bytes of a recorded batch: larger ones were not faster
_MOST = 4096  # samples in it: tiny models have no better size, and what is recorded stays small
_ROUNDING_SHARE = 1e-4  # of a usual sample's gradient: a perfectly fitted sample has one of rounding alone


@dataclass(frozen=True)
class Definition:
    """What a row is.

    Attributes:
        values: The tensors of all samples, first axis samples.
        alone: Records one sample alone: its values -> a linearization with one output, whose entries are the rows.
        together: Records the model's outputs for several samples: their values -> a linearization.
        cotangents: A loss's cotangents of a batch, row by row; None where rows are the outputs themselves.
        call: The public call on whose behalf this is done.
        fallback: What happens when samples mix.
        forced: Samples are taken alone for this reason.
    """

    values: Sequence[Tensor]
    alone: Callable[[Sequence[Tensor]], Recording]
    together: Callable[[Sequence[Tensor]], Recording]
    cotangents: Callable[[Recording, Sequence[Tensor]], list[Tensor | None]] | None
    call: str
    fallback: str
    forced: str | None = None


class SampleFactors:
    """All rows, collected.

    Args:
        what: The definition of a row.

    Attributes:
        collected: The rows.
        lin: Of some sample, for names and shapes.
        route: How they were computed, in words.
    """

    def __init__(self, what: Definition) -> None:
        self.what = what
        self.count = what.values[0].shape[0]
        self.lin, self.output = self._prepared()
        self.layers = LayerRows(self.lin, 1)
        self.route = ""
        self.collected = self._rows_or_factors()

    def _rows_or_factors(self) -> Collected:
        """Return factors where all samples enter alike, else whole rows; by plain sweeps where rules give neither."""
        try:
            return self._all()
        except RouteFailedError as reason:
            return self._plain(reason)
        except StructureChangedError:
            try:
                return self._all(whole=True)
            except (StructureChangedError, RouteFailedError) as reason:
                return self._plain(reason)

    def _plain(self, reason: Exception) -> Collected:
        self.layers = LayerRows(self.lin, 1, plainly=True)
        collected = self._all()
        self.route += f", without factors ({reason})"
        return collected

    # ---- all samples -----------------------------------------------------------------------------------------

    def _prepared(self) -> tuple[Linearization, Tensor]:
        """Record one sample alone: its errors are those of the definition, its size says how many go together."""
        lin = self._record_alone(self.count // 2).lin
        return lin, lin.outputs[0]

    def _all(self, whole: bool = False) -> Collected:
        collected = Collected(self.count, self.output.numel(), self.layers, whole)
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
        known = self.lin.trust.refusal("samples", "together")
        if known is not None:
            self._say(known)
        return known

    def _note(self, refusal: Refusal | None) -> None:
        if refusal is None:
            return
        if refusal.lasting:
            self.lin.trust.refuse("samples", "together", refusal)
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
        outputs = sum(use.shape.numel() for use in self.layers.sites) * self.output.element_size()
        each = self.lin.held_bytes + 2 * outputs
        most = max(1, min(_MOST, _WORKING // max(1, each)))
        step = math.ceil(self.count / math.ceil(self.count / most))
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    # ---- one sample ------------------------------------------------------------------------------------------

    def _record_alone(self, i: int) -> Recording:
        return self.what.alone([v[i : i + 1] for v in self.what.values])

    def _alone(self, collected: Collected, i: int) -> None:
        """Fill in the rows of one sample from a batch of one, which defines them."""
        lin = self._record_alone(i).lin
        (output,) = lin.outputs
        if output.numel() != self.output.numel():
            came = f"returning {tuple(output.shape)} after {tuple(self.output.shape)}"
            raise ModelStateError.of("model", came, "all samples must have outputs of one shape")
        layers, where = LayerRows(lin, 1, plainly=not self.layers.sites), slice(i, i + 1)
        operands = collected.open(layers)
        for entry, seed in enumerate(unit_seeds(output.unsqueeze(0))):
            collected.fill(where, entry, layers, operands, layers.sweep([seed.view(output.shape)]))
        self._fill_missing(collected, i, lin)
        # A graph that depends on values is another one each time.
        if layers.sites and (_habits(lin).reads or lin.trust.needs("rows by uses", lin.domain.names)):
            mix = private_noise(output)
            pairs = self._pairs(collected, where, lin, [mix], mix.reshape(1, -1))
            if not worst_disagreement(pairs) <= lin.tolerance:
                raise StructureChangedError("a plain sweep disagrees with them")
            lin.trust.remember("rows by uses", lin.domain.names)

    def _fill_missing(self, collected: Collected, i: int, lin: Linearization) -> None:
        """Fill in the rows of parameters without a rule, by plain sweeps over one sample's graph."""
        if not collected.missing:
            return
        (output,) = lin.outputs
        for entry, seed in enumerate(unit_seeds(output.unsqueeze(0))):
            rows = lin.pull([seed.view(output.shape)])
            for leaf in collected.missing:
                row = rows[leaf]
                collected.fill_leaf(i, entry, leaf, None if row is None else plain(row))

    def _pairs(
        self, collected: Collected, where: slice, lin: Linearization, seeds: Sequence[Tensor], mix: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Return rows mixed by `mix`, `(n, k)`, beside a plain sweep over cotangents that say the same."""
        pulled, pairs = lin.pull(seeds), []
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
        lin, seeds = _that_count(batch.lin, seeds)
        refusal = self._unbatchable(lin, many)
        if refusal is not None:
            return refusal
        route = ("samples apart", self.what.call, lin.domain.names, lin.codomain.names)
        fresh = lin.trust.needs(*route)
        fresh = fresh or bool(_habits(lin).reads)
        reason = self._differs(lin, values, many) if fresh else None
        reason = reason or self._filled(collected, where, lin, seeds)
        reason = reason or (self._disagrees(collected, where, lin, seeds) if fresh else None)
        if reason is not None:
            return Refusal(reason, loud=reason != NOT_FINITE, lasting=reason != NOT_FINITE)
        if fresh and any(bool((v != v[:1]).any()) for v in values):  # equal rows prove nothing: they agree anyway
            lin.trust.remember(*route)
        for i in range(where.start, where.stop) if collected.missing else ():
            self._fill_missing(collected, i, self._record_alone(i).lin)
        return None

    def _filled(
        self, collected: Collected, where: slice, lin: Linearization, cotangents: Sequence[Tensor] | None
    ) -> str | None:
        """Fill in a batch by one sweep for each row of a sample; return why not if samples mix."""
        try:
            layers = LayerRows(lin, where.stop - where.start)
            lost = [lin.domain.names[j] for j in layers.missing if j not in collected.missing]
            if lost:
                return f"samples mix where {', '.join(lost)} enter"
            operands = collected.open(layers)
            every = [cotangents] if cotangents else ([seed] for seed in unit_seeds(lin.outputs[0]))
            for entry, seeds in enumerate(every):
                collected.fill(where, entry, layers, operands, layers.sweep(seeds))
        except RouteFailedError as reason:
            return f"a batch cannot be swept at once ({reason})"
        return None

    def _unbatchable(self, lin: Linearization, many: int) -> Refusal | None:
        if not lin.outputs:
            return Refusal("the loss of no row depends on its output", loud=False, lasting=False)
        effects = _habits(lin)
        if effects.reads and effects.coarse in (torch.bfloat16, torch.float16):
            return Refusal(with_reads("in half precision outputs alone cannot tell whether samples mix", effects))
        if effects.draws:
            return Refusal(f"the forward is random ({', '.join(effects.draws)})")
        for name, output in zip(lin.codomain.names, lin.outputs, strict=True):
            if output.ndim == 0 or output.shape[0] != many:
                return Refusal(f"{name} has shape {tuple(output.shape)} and no axis of {many} samples first")
        if not all(is_finite(output) for output in lin.outputs):  # NaN would look like samples that mix
            return Refusal(NOT_FINITE, loud=False, lasting=False)
        return None

    def _differs(self, lin: Linearization, values: Sequence[Tensor], many: int) -> str | None:
        """Compare outputs in the batch with outputs of one sample and of a random half, or of every one."""
        order = _order(many)
        reads = bool(_habits(lin).reads)
        halves: Iterable[Tensor] = (order[:1], order[: max(1, many // 2)].sort().values)
        for picked in order.split(1) if reads else halves:
            part = self.what.together([v[picked.to(v.device)] for v in values]).lin
            if len(picked) == 1:
                lin.compare(part)
            outputs = dict(zip(part.codomain.names, part.outputs, strict=True))
            for name, whole in zip(lin.codomain.names, lin.outputs, strict=True):
                alone = outputs[name]
                reason = differs(whole, alone, picked, read_tolerance(lin) if reads else lin.tolerance)
                if reason is not None:
                    return with_reads(reason, _habits(lin))
        return None

    def _disagrees(
        self, collected: Collected, where: slice, lin: Linearization, cotangents: Sequence[Tensor] | None
    ) -> str | None:
        """Hold the rows of a batch against one plain sweep, and those of one sample against that sample alone."""
        many, entries = where.stop - where.start, self.output.numel()
        mix = private_noise(self.output.new_empty(many, entries))
        if cotangents is None:
            seeds = [mix.view(lin.outputs[0].shape).to(lin.outputs[0].dtype)]
        else:
            seeds = [c * mix.view(-1, *[1] * (c.ndim - 1)).to(c.dtype) for c in cotangents]
        pairs = self._pairs(collected, where, lin, seeds, mix)
        error = worst_disagreement(pairs)
        if not error <= lin.tolerance:
            return _off("a plain sweep over all samples", error)
        i = where.start + int(_order(many)[-1])
        # A sample that is fitted perfectly has a gradient of rounding alone, which is compared with the usual size.
        usual = [_ROUNDING_SHARE * max(size(a), size(b)) / math.sqrt(many) for a, b in pairs]
        lin = self._record_alone(i).lin
        (output,) = lin.outputs
        mix = private_noise(output)
        pairs = self._pairs(collected, slice(i, i + 1), lin, [mix], mix.reshape(1, -1))
        scales = [max(size(a), size(b), least) for (a, b), least in zip(pairs, usual, strict=True)]
        error = worst_disagreement(pairs, scales)
        return None if error <= lin.tolerance else _off("a sample alone", error)


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
    part = Linearization(
        lin.leaves,
        [lin.outputs[i] for i in keep],
        leaf_names=lin.domain.names,
        output_names=[lin.codomain.names[i] for i in keep],
        call=lin.call,
        aliased_leaves=lin.aliased_leaves,
        private=lin.private,
        trust=lin.trust,
        fallback=lin.fallback,
    )
    part.protected, part.tolerance = lin.protected, lin.tolerance
    return part, seeds


def _habits(lin: Linearization) -> SideEffects:
    return lin.trust.effects or SideEffects()


def _order(many: int) -> Tensor:
    return torch.randperm(many, generator=torch.Generator().manual_seed(0))


def _off(what: str, error: float) -> str:
    finite = math.isfinite(error)
    return f"samples mix: {what} and the rows of the batch differ by {error:.1e}" if finite else NOT_FINITE
