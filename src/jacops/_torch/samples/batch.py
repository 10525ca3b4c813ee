"""Input Jacobians sample by sample, in a few sweeps over whole batches where samples do not mix.

One backward pass from the i-th output of every sample at once gives row i of every sample's Jacobian, if and only if
no sample touches another. That is proved before it is used (contract: three things together): no value is read
out of a tensor; outputs alone and in the batch agree; and the batched Jacobian is what plain `autograd.grad` gives
for a random cotangent, with exact zeros where the cotangent has them. Otherwise: one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ..._finite import is_finite
from ..._ladder.names import Fact, Question, RouteName
from ..._ladder.route import answer, answered
from ..._progress import track
from ..._requirements import check_dense, check_positive
from ..._runtime.chunks import Chunks
from ..._runtime.memory import Budget, given_tensors
from ..._trees import Selector, hint_at_labels, is_differentiable
from ...errors import InputError, InputTypeError, NotDifferentiableError
from ..model.cut import At
from ..model.freeze import Freeze, FrozenModules
from ..model.inputs import advice_for, check_fallback
from ..model.rows import AxisExplained, Shared, rows_apart
from ..model.structure import ModelStructure, check_state, structure_of
from ..model.targets import SampleTarget
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import NOT_FINITE, batched, differs, read_tolerance, rows_differ, unbatchable, with_reads
from ..sweeps.proofs import ProofStore, held_key, identity_key
from .ask import ONE_SAMPLE, BatchAsk
from .compiled import COMPILED, GraphAsk
from .plan import Beside, is_small, remembered_plan
from .results import ALONE, SampleJacobians
from .routes import BY_SAMPLES
from .runs import Run, Runner

MODES = ("auto", "reverse", "forward", "split")
Parts = Iterable[tuple[Tensor, list[Tensor]]]  # which samples, and their outputs without the others
_NO_LAYER = "no layer was found that everything passes through"
_SHARED_TODO = "Name those that have no axis of samples with `shared=`."


class SampleChanges(TypedDict, total=False):
    """Attributes of `Samples` in which the same question about other samples may differ."""

    checks: str
    fallback: str
    batch_size: int


def _checked(model: Any, at: At) -> tuple[Any, ModelStructure | None]:
    """Return a module without wrappers and its structure, or a plain function as it is.

    Raises:
        InputTypeError: It is neither, or a function, which has nothing to cut `at`.
        ModelStateError: Parameters of the module have no values here.
    """
    if isinstance(model, type) or not callable(model) or isinstance(model, nn.Module):
        structure = structure_of(model)
        check_state(structure)
        return structure.model, structure
    if at is not None:
        raise InputTypeError.of("at", repr(at), "a plain function has no submodules", "Pass a torch.nn.Module.")
    return model, None


class Samples:
    """A model and a batch to be differentiated sample by sample.

    Args:
        model: A module, evaluated in eval mode, or a plain callable.
        x: The batch: a tensor, or a tuple (positional) or dict (keyword) of tensors with one leading axis.
        call: The public call on whose behalf this is done.
        outputs: Which part of the output.
        at: A cut at submodules.
        checks: How often the batched route is checked.
        fallback: What happens when it is left.
        compile: Trace and compile sweeps by outputs where that proves right and faster.
        target: One output per sample.
        shared: Which inputs have no axis of samples.
        create_graph: Keep Jacobians differentiable.
        batch_size: Most samples to a sweep.
        freeze: Which modules are frozen.

    Raises:
        InputTypeError: The model or its input is of the wrong kind.
        InputError: An input or `batch_size` does not fit.
        NotDifferentiableError: An input is complex, or none is of floating point.

    Attributes:
        values: All tensors with a row per sample, those of `target` last.
        input_tree: The structure of `x`, which holds what has no such rows.
        inputs: Which of the values are differentiated by.
        count: How many samples.
        beside: What the call holds beside Jacobians.
        follows: Carry bias parts along with batches of which all is known.
    """

    beside = Beside()
    follows = False

    def __init__(
        self,
        model: Any,
        x: Any,
        *,
        call: str,
        outputs: Selector = None,
        at: At = None,
        checks: str = "first",
        fallback: str = "warn",
        compile: bool = False,
        target: Any = None,
        shared: Shared = None,
        create_graph: bool = False,
        batch_size: int = 1024,
        freeze: Freeze | FrozenModules = None,
    ) -> None:
        self.batch_size = check_positive("batch_size", batch_size)
        model, structure = _checked(model, at)
        self.call, self.at, self.checks, self.fallback = call, at, checks, check_fallback(fallback)
        self.values, self.input_tree = rows_apart(x, "x", shared)
        self.compile = compile and checks in ("first", "never")
        self.count = self._check_inputs(x)
        picks = SampleTarget.of(target, self.count, self.values[0].device)
        frozen = freeze if isinstance(freeze, FrozenModules) else FrozenModules.of(freeze, model)
        asked = identity_key(outputs), picks is not None, held_key(self.input_tree), frozen and frozen.key
        more = {"target": picks, "asked": asked, "create_graph": create_graph, "frozen": frozen}
        self.runner = Runner(model, structure, self.input_tree, call, outputs, at, checks, fallback, **more)
        hint_at_labels(call, outputs, self.values, "pass `target=labels`")
        self.inputs = [i for i, v in enumerate(self.values) if is_differentiable(v)]
        if not self.inputs and (at is None or at[0] is None):
            came = "without floating-point tensors"
            todo = "Differentiate by the embedding's output with `at='path.to.embedding'`."
            raise NotDifferentiableError.of("x", came, "integer inputs have no derivative", todo)
        self.values = self.values if picks is None else [*self.values, picks.places]

    def over(self, values: Sequence[Tensor], create_graph: bool = False, **changes: Unpack[SampleChanges]) -> Samples:
        """Return the same question about other samples.

        Args:
            values: These, in the order of `self.values`.
            create_graph: Keep Jacobians differentiable.
            changes: Attributes that are others.
        """
        other = copy(self)
        other.values, other.count = list(values), values[0].shape[0]
        vars(other).update(changes)
        other.runner = replace(self.runner, checks=other.checks, fallback=other.fallback, create_graph=create_graph)
        return other

    def arranged(self, blocks: Sequence[Any]) -> Any:
        """Return one thing for every input that is differentiated by in the structure of `x`, None elsewhere."""
        found = dict(zip(self.inputs, blocks, strict=True))
        tree = self.input_tree.map_held(lambda _: None)
        return tree.build([found.get(i) for i in range(len(tree.names))])

    def _check_inputs(self, x: Any) -> int:
        if not isinstance(x, Tensor | tuple | Mapping) or not self.values:
            needed = "a tensor is needed (or a tuple or mapping with tensors that have a row per sample)"
            raise InputTypeError.of("x", f"a {type(x).__name__}", needed, advice_for(x))
        lengths = {}
        for name, value in zip(self.input_tree.names, self.values, strict=True):
            if not isinstance(value, Tensor):
                raise InputTypeError.of(name, f"a {type(value).__name__}", "a tensor is needed", advice_for(value))
            if value.is_complex():
                todo = "Pass torch.view_as_real(x) and rebuild it inside the model."
                raise NotDifferentiableError.of(name, "complex", "a Jacobian by samples is real", todo)
            check_dense(name, value)
            if value.ndim == 0:
                todo = "" if self.input_tree.single else _SHARED_TODO
                raise InputError.of(name, "a scalar", "its first axis must run over samples", todo)
            lengths[name] = value.shape[0]
        if len(set(lengths.values())) > 1:
            raise InputError.of("x", f"of lengths {lengths}", "all inputs must have one row per sample", _SHARED_TODO)
        return next(iter(lengths.values()))

    # ---- all samples -----------------------------------------------------------------------------------------

    def jacobians(
        self, progress: bool | None = None, budget: Budget = None, out: Any = None, mode: str = "auto"
    ) -> SampleJacobians:
        """Return the Jacobians of all samples, at most `batch_size` of them to a sweep.

        Args:
            progress: Force the progress bar on or off.
            budget: Bytes that result and working memory may take.
            out: Where to write, one tensor or array per Jacobian.
            mode: One of `MODES`.
        """
        if mode not in MODES:
            raise InputError.of("mode", repr(mode), f"one of {MODES} is needed")
        with self.explained():
            return self._jacobians(progress, budget=budget, out=out, mode=mode)

    def explained(self) -> AbstractContextManager[None]:
        """Return a context in which a model that fails on samples, but not on all as one, is said to miss an axis."""
        return AxisExplained(self.runner.inputs_in(self.values), self._whole)

    def _whole(self, values: Sequence[Tensor]) -> Run:
        """Return a run over samples, with all outputs."""
        return replace(self.runner, target=None).run(values)

    def _jacobians(self, progress: bool | None, *, budget: Budget, out: Any, mode: str) -> SampleJacobians:
        result = SampleJacobians(self.call, self.count, budget, given_tensors(out))
        if self.at is None or (isinstance(self.at, tuple) and self.at[0] is None):
            result.input_tree, result.inputs = self.input_tree.map_held(lambda _: None), self.inputs
        if self.count == 0:
            result.prepare(self.runner.run([v.new_zeros((1, *v.shape[1:])) for v in self.values]), alone=True)
            result.route = "no samples"
            return result
        result.followed = batch_size = self.batch_size
        if budget is not None or not is_small(self):
            plan = remembered_plan(self, budget, mode, out is None)
            batch_size, result.followed = plan.chunk, plan.followed
        chunks, reason = Chunks(self.count, batch_size), ONE_SAMPLE if self.count == 1 else None
        for where in track(chunks, self.call, enabled=progress) if len(chunks) > 1 else chunks:
            if self.compile and where.stop >= chunks.rows:  # a graph takes one number of samples
                where = slice(where.stop - max(where.stop - where.start, chunks.rows), where.stop)
            with chunks.halving(where, self.call, "samples"):
                reason = self._swept(result, where, mode, reason)
        if self.runner.create_graph:
            result.connect()
        result.followed = 1 if reason else result.followed
        result.route = f"{ALONE} ({reason})" if reason else f"{chunks.rows} samples to a sweep, {result.route}"
        return result

    def _swept(self, result: SampleJacobians, where: slice, mode: str, reason: str | None) -> str | None:
        """Fill in some samples; return why they had to be taken one at a time, if they had."""
        values = [v[where] for v in self.values]
        store = self.runner.store(values)
        known = reason or (ONE_SAMPLE if where.stop - where.start == 1 else None)
        strict = self.checks == "strict"
        runner = replace(self.runner, following=True) if self.follows else self.runner
        ask = BatchAsk(runner, result, where, values, mode, self.fallback, store, known, strict=strict)
        if known is None and self.compile:
            return answer(GraphAsk(ask, lambda: self._filled(ask, reason)), COMPILED)
        return self._filled(ask, reason)

    def _filled(self, ask: BatchAsk, reason: str | None) -> str | None:
        result, where, mode, known = ask.result, ask.where, ask.mode, ask.known
        if known is None:
            self._record(ask)
        swept, route = answered(ask, BY_SAMPLES)
        if route.leaving == "never":
            reason = known if known is not None and reason is None else ask.apart
        else:
            self._keep(ask, swept)
            result.route = ask.routes[ask.question]
        if mode == "split" and ask.apart is None and route.name != "split":
            todo = "Use mode='auto', or cut the model yourself with `at=`."
            raise InputError.of("mode", "'split'", _NO_LAYER, todo)
        if not result.proved:  # now, while they are in the cache
            result.sure &= all(is_finite(block[where]) for row in result.blocks for block in row)
        return None if reason == ONE_SAMPLE and self.count > 1 else reason

    def _keep(self, ask: BatchAsk, swept: Linearization) -> None:
        """Take a batch's outputs, and remember what was proved about it."""
        lin, values = ask.run.lin if ask.run is not None else ask.lin, ask.values
        if ask.fresh and not ask.undecided and rows_differ(ask.runner.inputs_in(values)):
            for proofs in (lin.proofs, swept.proofs):
                proofs.remember(Fact.SAMPLES_APART, ask.many)
        ask.result.batches.append((ask.many, lin.proofs, ask.run.followed if ask.run is not None else None))
        for out, tensor in enumerate(lin.outputs):
            ask.result.output[out][ask.where] = tensor.detach()

    def _record(self, ask: BatchAsk) -> None:
        """Record a batch, and note why its samples are taken one at a time, where that is known before any sweep."""
        found = batched(lambda: self._run(ask), ask.many)
        if isinstance(found, str):
            self.runner.run([v[:1] for v in self.values])  # where it fails alone too, that is the error to see
            ask.apart = found
            return
        ask.run, parts = found
        known, ask.fresh = ask.verdicts.refusal(Question.SAMPLES, RouteName.TOGETHER), parts is not None
        ask.apart = self._mixing(ask.run, ask.values, parts) if known is None else known.reason
        if ask.apart is None:
            ask.result.prepare(ask.run)
        elif known is None and ask.apart != NOT_FINITE:
            ask.verdicts.refuse(Question.SAMPLES, RouteName.TOGETHER, ask.apart)

    def _run(self, ask: BatchAsk) -> tuple[Run, Parts | None]:
        """Record a batch, and runs of its parts to compare it with where its proofs require it."""
        values, store, many = ask.values, ask.store, ask.many
        if store.assumed is not None or self.checks == "never":
            run = self._known_split(values, store, ask.mode) or ask.runner.run(values, store)
            proofs = run.lin.proofs
            if proofs.refusal(Question.SAMPLES, RouteName.TOGETHER) is not None or not proofs.needs(
                Fact.SAMPLES_APART, many
            ):
                return run, None
            del run, proofs  # its graph would stand beside those of the parts
        alone, parts = self._parts(values, many, store)
        run = self.runner.run(values, store)
        if alone is not None:
            run.lin.compare(alone)
        return run, parts

    def _known_split(self, values: Sequence[Tensor], store: ProofStore, mode: str) -> Run | None:
        """Record the run cut where earlier calls found that this is faster; None where the whole is to be recorded."""
        effects, path = store.assumed, store.known.get("split")
        if mode not in ("auto", "split") or path is None or effects is None or self.runner.create_graph:
            return None
        run = self.runner.split(values, store, effects, path)
        return None if run is None or run.lin.proofs.needs(Fact.SAMPLES_APART, values[0].shape[0]) else run

    def outputs(self, batch_size: int, alone: bool) -> list[Tensor]:
        """Return the outputs of all samples, a tensor `(n, *out)` for each leaf of the output.

        Args:
            batch_size: Most samples to a run.
            alone: Run every sample in a batch of one, as their Jacobians were taken.
        """
        parts, chunks = [], Chunks(self.count, 1 if alone else batch_size)
        with self.explained():
            for where in chunks:
                with chunks.halving(where, self.call, "samples"):
                    parts.append(self._outputs([v[where] for v in self.values]))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def _outputs(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of some samples, of each alone where the forward reads values, which may be of others."""
        run, many = self.runner.run(values), values[0].shape[0]
        if many == 1:
            return [(o if o.ndim and o.shape[0] == 1 else o.unsqueeze(0)).detach() for o in run.lin.outputs]
        if not run.effects.reads:
            return [o.detach() for o in run.lin.outputs]
        alone = [self._outputs([v[i : i + 1] for v in values]) for i in range(many)]
        return [torch.cat(column) for column in zip(*alone, strict=True)]

    # ---- do samples mix? -------------------------------------------------------------------------------------

    def _parts(self, values: Sequence[Tensor], many: int, store: ProofStore) -> tuple[Linearization | None, Parts]:
        """Return one sample's run, and outputs of that and of a random half, each run without the others."""
        if store.latest is not None and store.latest.effects is not None and store.latest.effects.reads:
            return None, []  # every sample will be run alone
        order = torch.randperm(many, generator=torch.Generator().manual_seed(0))
        alone, parts = None, []
        for picked in (order[:1], order[: max(1, many // 2)].sort().values):
            run = self.runner.run([v[picked.to(v.device)] for v in values])
            alone = alone or run.lin
            parts.append((picked, [o.detach() for o in run.lin.outputs]))
        return alone, parts

    def _mixing(self, run: Run, values: Sequence[Tensor], parts: Parts | None) -> str | None:
        """Return why sweeps cannot be shared, before any is made; None where they may be."""
        many = values[0].shape[0]
        reason = unbatchable(run.lin if run.head is None else run.head, run.effects, many)
        if reason is not None or (parts is None and not run.effects.reads):
            return reason
        pieces, most = parts or [], run.lin.tolerance
        if run.effects.reads:  # other samples may take other paths: only outputs of every one alone show it
            pieces = zip(torch.arange(many).split(1), self.runner.outputs_alone(values, run.effects), strict=True)
            most = read_tolerance(run.lin)
        for picked, outputs in pieces:
            for whole, alone in zip(run.lin.outputs, outputs, strict=True):
                reason = differs(whole, alone, picked, most)
                if reason is not None:
                    return with_reads(reason, run.effects)
        return None
