"""The rows of every sample alone, as factors: many samples to a sweep where that is right, else one at a time.

A row is defined by its sample alone, in a batch of one. A batch gives the same rows if samples do not mix, which is
accepted where these agree, at the very shape that is used: no value is read out of a tensor; a cotangent on half of
the samples leaves exact zeros at the others; the outputs of some samples are the same alone; the row of one sample is
the same alone; and a plain sweep over a random mix of all rows is what the factors say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError, RouteNotFiniteError, RouteUndecidedError, RouteWrongError, succeeds
from ..._ladder.names import Fact, Question, RouteName
from ..._ladder.route import Asked, Way, answer
from ..._runtime.agreement import size, worst_disagreement
from ..._runtime.contexts import private_noise
from ..._runtime.rows import plain
from ...errors import ModelStateError
from ..layers.collected import Collected, StructureChangedError, form_of
from ..layers.factors import LayerRows, unit_seeds
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import NOT_FINITE, differs, explain_alone, read_tolerance, rows_differ, with_reads
from ..sweeps.record import Recording
from .handed import Handed
from .sample_batches import Definition, RecordedSamples, habits, is_new, recorded, rows_of

Pairs = list[tuple[Tensor, Tensor]]

_WORKING = 2**24  # bytes of a recorded batch: larger ones were not faster
_MOST = 4096  # samples in it: tiny models have no better size, and what is recorded stays small
_STEP, _ALONE = "samples to a batch", "a sample alone"  # what is remembered: of a model, and of a graph
_ROUNDING_SHARE = 1e-4  # of a usual sample's gradient: a perfectly fitted sample has one of rounding alone


@dataclass(frozen=True)
class Covered:
    """What is left of a `LayerRows` whose graph was dropped.

    Attributes:
        sites: Some parameter enters by an operation with a rule.
        missing: Leaves that are not covered.
    """

    sites: bool
    missing: Sequence[int]


class SampleFactors:
    """All rows, collected.

    Args:
        what: The definition of a row.

    Attributes:
        connected: Rows keep their graph.
        collected: The rows.
        lin: Of some sample, for names and shapes.
        route: How they were computed, in words.
        computed: The model's outputs, and the losses where there is one.
    """

    connected = False

    def __init__(self, what: Definition) -> None:
        self.what = what
        self.count = what.values[0].shape[0]
        self.step = 0
        self.first: tuple[RecordedSamples, LayerRows] | None = None
        self.layers: LayerRows | Covered
        self.lin, self.output, self.layers = self._remembered() or self._prepared()
        self.route, self.computed = "", Handed(self.count)
        self.collected = self._collected()

    def _collected(self) -> Any:
        ask = RowsAsk("factors of rows", self.what.call, self.lin.proofs, rows=self)
        collected = answer(ask, _FORMS)
        if ask.routes[ask.question].startswith("without"):
            self.route += f", {ask.routes[ask.question]}"
        return collected

    def plain(self) -> Collected:
        """Return rows by plain sweeps."""
        self.layers = LayerRows(self.lin, 1, plainly=True)
        return self.all()

    # ---- all samples -----------------------------------------------------------------------------------------

    def _prepared(self) -> tuple[Linearization, Tensor, LayerRows]:
        """Record one sample alone: its errors are those of the definition, its size determines how many go together."""
        lin = self.what.sample(lambda: self._record_alone(self.count // 2)).lin
        return lin, lin.outputs[0], LayerRows(lin, 1)

    def _remembered(self) -> tuple[Linearization, Tensor, LayerRows] | None:
        """Return the same of the first batch, where samples of its graph were found to be what they are alone.

        Now and then a sample is recorded alone all the same.
        """
        step = None if self.connected else self.what.store.known.get(_STEP)
        if step is None:
            return None
        found: list[tuple[RecordedSamples, LayerRows]] = []

        def record() -> None:
            batch = recorded(self.what, slice(0, min(step, self.count)))
            found.append((batch, LayerRows(batch.lin, batch.many)))

        if not succeeds(record):
            return None  # it fails again where samples are taken as if nothing were known
        batch, layers = self.first = found[0]
        proofs = batch.lin.proofs
        output, form = proofs.known.get((_ALONE, self.what.call), (None, None))
        if form != form_of(layers) or is_new(batch.lin, self.what.call) or proofs.spot_due(_ALONE):
            return None
        self.step = step
        return batch.lin, output, layers

    def all(self, whole: bool = False) -> Collected:
        """Return the rows of all samples, batch by batch."""
        if isinstance(self.layers, Covered):  # another form was begun
            self.lin, self.output, self.layers = self._prepared()
        return self._filled(Collected(self.count, self.output.numel(), self.layers, whole))

    def _filled(self, collected: Any) -> Any:
        # A question of its own: that rules of layers fail for one sample alone is no refusal of plain sweeps.
        question = Question.SAMPLES if self.layers.sites else Question.SAMPLES_PLAINLY
        ask = RowsAsk(question, self.what.call, self.lin.proofs, rows=self, collected=collected)
        for ask.where in self._batches():
            answer(ask, _BATCHES)
        self.route = ask.routes[ask.question]
        return collected

    def forced(self, where: slice) -> str | None:
        """Return why samples are taken alone before anything is tried."""
        if where.stop - where.start == 1:
            return ""
        return self.what.forced or (None if self.layers.sites else "no parameter enters by an operation with a rule")

    def apart(self, ask: RowsAsk) -> None:
        """Fill in samples one by one; say why, once in every call, where that takes more sweeps than it seemed."""
        known = ask.verdicts.refusal(Question.SAMPLES, RouteName.TOGETHER)
        failed = ask.left is not None and not isinstance(ask.left, RouteUndecidedError)
        self.what.store.known.pop(_STEP, None)
        if (failed or known) and not (ask.warned or self.what.forced):
            ask.warned = True
            explain_alone(
                self.what.call, self.what.fallback, str(ask.left if failed or known is None else known.reason)
            )
        for i in range(ask.where.start, ask.where.stop):
            self._alone(ask.collected, i)

    def _batches(self) -> Iterator[slice]:
        """Yield even batches whose recorded values stay within a working size."""
        if not self.step and isinstance(self.layers, LayerRows):
            outputs = sum(use.shape.numel() for use in self.layers.sites) * self.output.element_size()
            each = self.lin.held_bytes + 2 * outputs
            most = max(1, min(_MOST, _WORKING // max(1, each)))
            self.step = math.ceil(self.count / math.ceil(self.count / most))
        for start in range(0, self.count, self.step):
            yield slice(start, min(start + self.step, self.count))

    # ---- one sample ------------------------------------------------------------------------------------------

    def _record_alone(self, i: int) -> Recording:
        return self.what.alone([v[i : i + 1] for v in self.what.values])

    def _taken_alone(self, i: int) -> Linearization:
        """Record one sample, and take in its output.

        Raises:
            ModelStateError: That has another shape than the first one's.
        """
        found = self._record_alone(i)
        (output,) = found.lin.outputs
        if output.numel() != self.output.numel():
            came = f"returning {tuple(output.shape)} after {tuple(self.output.shape)}"
            raise ModelStateError.of("model", came, "all samples must have outputs of one shape")
        losses = output.detach().reshape(1) if self.what.cotangents else None
        self.computed.take(slice(i, i + 1), found.before, losses)
        return found.lin

    def _alone(self, collected: Any, i: int) -> None:
        """Fill in the rows of one sample from a batch of one, which defines them."""
        lin, where = self._taken_alone(i), slice(i, i + 1)
        (output,), layers = lin.outputs, LayerRows(lin, 1, plainly=not self.layers.sites)
        operands = collected.open(layers)
        for entry, seed in enumerate(unit_seeds(output.unsqueeze(0))):
            collected.fill(where, entry, layers, operands, [seed.view(output.shape)])
        self._fill_missing(collected, i, lin)
        # A graph that depends on values is another one each time.
        if layers.sites and (habits(lin).reads or lin.proofs.needs(Fact.ROWS_BY_USES, lin.domain.names)):
            mix = private_noise(output)
            pairs = self._pairs(collected, where, lin, [mix], mix.reshape(1, -1))
            if not max(map(worst_disagreement, pairs)) <= lin.tolerance:
                raise StructureChangedError("a plain sweep disagrees with them")
            lin.proofs.remember(Fact.ROWS_BY_USES, lin.domain.names)

    def _fill_missing(self, collected: Any, i: int, lin: Linearization) -> None:
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
        self, collected: Any, where: slice, lin: Linearization, seeds: Sequence[Tensor], mix: Tensor
    ) -> list[Pairs]:
        """Return rows mixed by `mix`, `(n, k)`, beside a plain sweep over cotangents that say the same.

        Pairs of a list are compared by the size of all of them.
        """
        pulled, pairs = lin.pull(seeds, self.connected), list[tuple[Tensor, Tensor]]()
        for leaf, part in enumerate(collected.parts(where)):
            if leaf not in collected.missing:
                ours = part.transposed(mix.to(part.like.dtype).unsqueeze(0))
                given = pulled[leaf]
                pairs.append((ours, torch.zeros_like(ours) if given is None else plain(given).reshape(ours.shape)))
        return [pairs]

    # ---- many samples ----------------------------------------------------------------------------------------

    def together(self, ask: RowsAsk) -> None:
        """Fill in the rows of a batch by shared sweeps.

        Raises:
            RouteFailedError: Samples mix, or the batch cannot be swept at once.
        """
        known, self.first = self.first, None
        if known is not None and known[0].where == ask.where:
            batch, layers = known
        else:
            batch = recorded(self.what, ask.where)
            layers = LayerRows(batch.lin, batch.many)
        lin, where = batch.lin, batch.where
        self.computed.take(where, *batch.known)
        fresh = is_new(lin, self.what.call)
        if fresh:
            self._check_outputs(lin, batch.values, batch.many)
        self._fill_batch(ask.collected, batch, layers)
        if fresh:
            self._check_rows(ask.collected, where, lin, batch.seeds)
            if rows_differ(batch.values[: self.what.inputs]):  # targets tell apart no samples that the model mixes
                lin.proofs.remember(*rows_of(lin, self.what.call))
        for i in range(where.start, where.stop) if ask.collected.missing else ():
            self._fill_missing(ask.collected, i, self._record_alone(i).lin)
        if not (self.connected or ask.collected.whole):
            self.what.store.known[_STEP] = self.step
            like = self.output.detach()
            form = ask.collected.form
            lin.proofs.known.take((_ALONE, self.what.call), lambda: (like.new_empty(like.shape), form))
        if lin is self.lin and where.stop < self.count:  # its graph would be held while others are recorded
            self.lin, self.layers = lin.to((), ()), Covered(bool(layers.sites), layers.missing)

    def _fill_batch(self, collected: Any, batch: RecordedSamples, layers: LayerRows) -> None:
        """Fill in a batch by one sweep for each row of a sample."""
        lin = batch.lin
        lost = [lin.domain.names[j] for j in layers.missing if j not in collected.missing]
        if lost:
            raise RouteFailedError(f"samples mix where {', '.join(lost)} enter")
        operands = collected.open(layers)
        every = [batch.seeds] if batch.seeds else ([seed] for seed in unit_seeds(lin.outputs[0]))
        for entry, seeds in enumerate(every):
            collected.fill(batch.where, entry, layers, operands, seeds)

    def _check_outputs(self, lin: Linearization, values: Sequence[Tensor], many: int) -> None:
        """Compare outputs in the batch with outputs of one sample and of a random half, or of every one."""
        order = _order(many)
        reads = bool(habits(lin).reads)
        halves: Iterable[Tensor] = (order[:1], order[: max(1, many // 2)].sort().values)
        for picked in order.split(1) if reads else halves:
            part = self.what.together([v[picked.to(v.device)] for v in values]).lin
            if len(picked) == 1:
                lin.compare(part)
            outputs = dict(zip(part.codomain.names, part.outputs, strict=True))
            for name, whole in zip(lin.codomain.names, lin.outputs, strict=True):
                reason = differs(whole, outputs[name], picked, read_tolerance(lin) if reads else lin.tolerance)
                if reason is not None:
                    raise RouteWrongError(with_reads(reason, habits(lin)))

    def _check_rows(
        self, collected: Any, where: slice, lin: Linearization, cotangents: Sequence[Tensor] | None
    ) -> None:
        """Compare the rows of a batch with one plain sweep, and those of one sample with that sample alone."""
        many, entries = where.stop - where.start, self.output.numel()
        mix = private_noise(self.output.new_empty(many, entries))
        if cotangents is None:
            seeds = [mix.view(lin.outputs[0].shape).to(lin.outputs[0].dtype)]
        else:
            seeds = [c * mix.view(-1, *[1] * (c.ndim - 1)).to(c.dtype) for c in cotangents]
        of_all = self._pairs(collected, where, lin, seeds, mix)
        for pairs in of_all:
            _check_near("a plain sweep over all samples", worst_disagreement(pairs), lin)
        i = where.start + int(_order(many)[-1])
        lin = self._record_alone(i).lin
        (output,) = lin.outputs
        mix = private_noise(output)
        of_one = self._pairs(collected, slice(i, i + 1), lin, [mix], mix.reshape(1, -1))
        for pairs, others in zip(of_one, of_all, strict=True):
            # A sample that is fitted perfectly has a gradient of rounding alone, which is compared with the usual size.
            usual = [_ROUNDING_SHARE * max(size(a), size(b)) / math.sqrt(many) for a, b in others]
            scales = [max(size(a), size(b), least) for (a, b), least in zip(pairs, usual, strict=True)]
            _check_near("a sample alone", worst_disagreement(pairs, scales), lin)


def _order(many: int) -> Tensor:
    return torch.randperm(many, generator=torch.Generator().manual_seed(0))


def _check_near(what: str, error: float, lin: Linearization) -> None:
    if math.isnan(error):
        raise RouteNotFiniteError(NOT_FINITE)
    if not error <= lin.tolerance:
        raise RouteWrongError(f"samples mix: {what} and the rows of the batch differ by {error:.1e}")


@dataclass
class RowsAsk(Asked):
    """Rows of samples.

    Attributes:
        rows: What is known of them.
        collected: Where they go.
        where: Which samples.
        warned: The caller was warned why samples are taken alone.
    """

    rows: SampleFactors = None  # type: ignore[assignment]
    collected: Any = None
    where: slice = None  # type: ignore[assignment]
    warned: bool = False


_FORMS = (  # factors where all samples enter alike, else whole rows; by plain sweeps where rules give neither
    Way("factors", lambda ask: ask.rows.all(), leaving="never"),  # errors of the model are the caller's
    Way("whole rows", lambda ask: ask.rows.all(whole=True), leaving="never"),
    Way("without factors", lambda ask: ask.rows.plain(), leaving="never"),
)
_BATCHES = (
    Way(
        RouteName.TOGETHER,
        lambda ask: ask.rows.together(ask),
        refusal=lambda ask: ask.rows.forced(ask.where),
        words=lambda ask: f"{ask.where.stop - ask.where.start} samples to a sweep",
        leaving="never",
    ),
    Way(
        "alone",
        lambda ask: ask.rows.apart(ask),
        # Samples that enter a batch in another way than alone can share sweeps as whole rows, the next of the forms.
        refusal=lambda ask: str(ask.left) if isinstance(ask.left, StructureChangedError) else None,
        words=lambda ask: "1 samples to a sweep" if ask.where.stop - ask.where.start == 1 else "one sample at a time",
        leaving="never",
    ),
)
