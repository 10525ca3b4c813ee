"""Input Jacobians sample by sample, in a few sweeps over whole batches where samples do not mix.

One backward pass from the i-th output of every sample at once gives row i of every sample's Jacobian, if and only if
no sample touches another. That is proved before it is believed (contract: three things together): no value is read
out of a tensor; outputs alone and in the batch agree; and the batched Jacobian is what plain `autograd.grad` gives
for a random cotangent, with exact zeros where the cotangent has them. Otherwise: one sample at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._progress import track
from ...errors import InputError, InputTypeError, JacopsError, ModelStateError, NotDifferentiableError, explain, warn
from ...trees import Selector, Tree, flatten, is_differentiable, output_leaves, select
from .cut import At, Cut
from .inputs import check_fallback, forward_explained, private_inputs, split_input
from .matrix import jacobian_blocks
from .mixing import coupled, differs, unbatchable
from .record import setting
from .replica import bare, check_state, replicate
from .sample_sweeps import sweep
from .surroundings import autocast_on, is_memory_error, random_state_kept, recording
from .tape import Tape
from .trust import Trust, told_apart, trust_in
from .watch import Habits, Watch, WritesState


@dataclass(frozen=True)
class SampleJacobians:
    """What came out.

    Attributes:
        blocks: `J[output][input]`, each `(n, *out, *in)`.
        output_tree: The structure of the output.
        input_tree: The structure of the input; None at inputs without derivatives.
        inputs: Which entries of the input tree the columns stand for.
        route: How it was computed and why.
        output: The outputs themselves, one tensor per leaf, `(n, *out)`.
    """

    blocks: list[list[Tensor]]
    output_tree: Tree
    input_tree: Tree
    inputs: list[int]
    route: str
    output: list[Tensor]


@dataclass
class _Run:
    """One recorded forward over some samples."""

    tape: Tape
    tree: Tree
    habits: Habits


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
    """

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
    ) -> None:
        if isinstance(model, type) or not callable(model) or isinstance(model, nn.Module):
            model = bare(model)
            check_state(model)
        self.model, self.call, self.outputs, self.at, self.checks = model, call, outputs, at, checks
        self.fallback = check_fallback(fallback)
        if at is not None and not isinstance(model, nn.Module):
            raise InputTypeError(
                explain("at", repr(at), "a plain function has no submodules", "Pass a torch.nn.Module.")
            )
        self.values, self.input_tree = flatten(x, "x")
        self.count = self._check_inputs(x)
        self.inputs = [i for i, v in enumerate(self.values) if is_differentiable(v)]
        if not self.inputs and (at is None or at[0] is None):
            raise NotDifferentiableError(
                explain(
                    "x",
                    "without floating-point tensors",
                    "integer inputs have no derivative",
                    "Differentiate by the embedding's output with `at='path.to.embedding'`.",
                )
            )

    def _check_inputs(self, x: Any) -> int:
        if not isinstance(x, Tensor | tuple | dict) or not self.values:
            raise InputTypeError(
                explain(
                    "x",
                    f"a {type(x).__name__}",
                    "a tensor is needed (or a tuple or dict of tensors)",
                    "Convert it with torch.as_tensor(x.copy()).",
                )
            )
        lengths = {}
        for name, value in zip(self.input_tree.names, self.values, strict=True):
            if not isinstance(value, Tensor):
                raise InputTypeError(
                    explain(
                        name,
                        f"a {type(value).__name__}",
                        "a tensor is needed",
                        "Convert it with torch.as_tensor(array.copy()).",
                    )
                )
            if value.is_complex():
                raise NotDifferentiableError(
                    explain(
                        name,
                        "complex",
                        "a Jacobian by samples is real",
                        "Pass torch.view_as_real(x) and rebuild it inside the model.",
                    )
                )
            if value.layout is not torch.strided:
                raise InputError(
                    explain(name, f"of layout {value.layout}", "it must be dense", "Call `.to_dense()` on it.")
                )
            if value.ndim == 0:
                raise InputError(explain(name, "a scalar", "its first axis must run over samples"))
            lengths[name] = value.shape[0]
        if len(set(lengths.values())) > 1:
            raise InputError(explain("x", f"of lengths {lengths}", "all inputs must have one row per sample"))
        return next(iter(lengths.values()))

    # ---- one forward -----------------------------------------------------------------------------------------

    def run(self, values: Sequence[Tensor]) -> _Run:
        """Record one forward over some samples, in eval mode, on private copies."""
        trust = self._trust(values)
        habits: Habits | None = trust.notes.get("habits") if self.checks != "always" else None
        if habits is not None and not habits.reads:
            return self._recorded(values, trust, habits, habits.writes)
        watch = Watch(self._guarded())
        try:
            with watch:
                done = self._recorded(values, trust, None, False)
        except WritesState:
            watch = Watch()
            with watch:
                done = self._recorded(values, trust, None, True)
            done.habits = Habits((), (), True)
        done.habits = trust.notes["habits"] = Habits(tuple(watch.reads), tuple(watch.draws), done.habits.writes)
        return done

    def _trust(self, values: Sequence[Tensor]) -> Trust:
        if isinstance(self.model, nn.Module):
            key = setting(self.model, values, "samples", self.at, told_apart(self.outputs))
        else:
            key = ("samples", tuple((v.shape, v.dtype, v.device) for v in values), told_apart(self.outputs))
        return trust_in(self.model, key, self.checks)

    def _guarded(self) -> list[Tensor]:
        return list(self.model.parameters()) if isinstance(self.model, nn.Module) else []

    def _recorded(self, values: Sequence[Tensor], trust: Trust, habits: Habits | None, cloned: bool) -> _Run:
        with recording(), random_state_kept():
            module = (
                replicate(self.model, training=False, cloned=cloned).module
                if isinstance(self.model, nn.Module)
                else None
            )
            copied, leaves = private_inputs(self.input_tree.build(values))
            args, kwargs = split_input(copied)
            with forward_explained(self.model, values):
                if module is None:
                    output, hidden = self.model(*args, **kwargs), []
                else:
                    hooked = Cut(module, self.at)
                    with hooked.active():
                        output = hooked.result(module(*args, **kwargs))
                    hidden = hooked.leaves
            tensors, tree = output_leaves(select(output, self.outputs))
        if any(t.is_complex() for t in tensors):
            raise NotDifferentiableError(
                explain(
                    "the model's output",
                    "complex",
                    "a Jacobian by samples is real",
                    "Return torch.view_as_real(output).",
                )
            )
        named = [(str(self.at), leaf) for leaf in hidden] or leaves
        tape = Tape(
            [leaf for _, leaf in named],
            tensors,
            leaf_names=[n for n, _ in named],
            output_names=tree.names,
            call=self.call,
            private=True,
            trust=trust,
            fallback=self.fallback,
            coarse=autocast_on(tensors),
        )
        tape.protected = [p for p in self._guarded() if p.requires_grad]
        return _Run(tape, tree, habits or Habits((), (), cloned))

    # ---- all samples -----------------------------------------------------------------------------------------

    def jacobians(self, batch_size: int, progress: bool | None = None) -> SampleJacobians:
        """Return the Jacobians of all samples, `batch_size` of them to a sweep."""
        result = _Result(self)
        if self.count == 0:
            result.prepare(_single_shapes(self.run([v.new_zeros((1, *v.shape[1:])) for v in self.values])))
            return result.finished("no samples")
        reason = "one sample" if self.count == 1 else None
        chunks = range(0, self.count, batch_size)
        for start in track(chunks, self.call, enabled=progress) if len(chunks) > 1 else chunks:
            where = slice(start, min(start + batch_size, self.count))
            if reason is None and where.stop - where.start > 1:
                reason = self._chunk(result, where)
                if reason is not None:
                    self._say(reason)
            if reason is not None or where.stop - where.start == 1:
                for i in range(where.start, where.stop):
                    self._alone(result, i)
        route = f"one sample at a time ({reason})" if reason else f"{batch_size} samples to a sweep, {result.direction}"
        return result.finished(route)

    def _say(self, reason: str) -> None:
        message = f"{self.call}: {reason}; so every sample was differentiated alone, in a batch of one."
        if self.fallback == "error":
            raise NotDifferentiableError(f"{self.call}: {reason}, and fallback='error' forbids one sample at a time.")
        if self.fallback == "warn":
            warn(message)

    def _alone(self, result: _Result, i: int) -> None:
        run = self.run([v[i : i + 1] for v in self.values])
        shapes = _single_shapes(run)
        result.prepare(shapes)
        blocks = jacobian_blocks(run.tape)
        for out, rows in enumerate(blocks):
            result.outputs[out][i] = run.tape.outputs[out].detach().reshape(shapes.outputs[out])
            for leaf, block in enumerate(rows):
                result.blocks[out][leaf][i] = block.reshape(*shapes.outputs[out], *shapes.inputs[leaf])

    def _chunk(self, result: _Result, where: slice) -> str | None:
        """Fill in one batch by shared sweeps; return why not if samples mix."""
        values = [v[where] for v in self.values]
        try:
            run = self.run(values)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, JacopsError) or is_memory_error(error):
                raise
            self.run([v[:1] for v in values])  # where it fails alone too, that is the error to see
            return (
                f"the forward takes no batch of {where.stop - where.start} ({type(error).__name__}: {str(error)[:100]})"
            )
        trust, many = run.tape.trust, where.stop - where.start
        reason = trust.notes.get("mixes") if self.checks != "always" else None
        reason = reason or unbatchable(run.tape, run.habits, many)
        fresh = trust.needs("samples apart", many)
        if reason is None and fresh:
            reason = self._differs_alone(run, values, many)
        if reason is not None:
            trust.notes["mixes"] = reason
            return reason
        result.prepare(_batch_shapes(run))
        result.direction = sweep(run.tape, result.blocks, where)
        if fresh:
            reason = coupled(run.tape, result.blocks, where)
            if reason is not None:
                trust.notes["mixes"] = reason
                return reason
            if any(bool((v != v[:1]).any()) for v in values):  # equal rows prove nothing: alone and together agree
                trust.remember("samples apart", many)
        for out, tensor in enumerate(run.tape.outputs):
            result.outputs[out][where] = tensor.detach()
        return None

    def _differs_alone(self, run: _Run, values: Sequence[Tensor], many: int) -> str | None:
        """Compare outputs in the batch with outputs of one sample and of a random half."""
        order = torch.randperm(many, generator=torch.Generator().manual_seed(0))
        for picked in (order[:1], order[: max(1, many // 2)].sort().values):
            part = self._recorded(
                [v[picked.to(v.device)] for v in values], Trust("never"), run.habits, run.habits.writes
            )
            for whole, alone in zip(run.tape.outputs, part.tape.outputs, strict=True):
                reason = differs(whole, alone, picked)
                if reason is not None:
                    return reason
        return None


@dataclass(frozen=True)
class _Shapes:
    outputs: list[torch.Size]
    inputs: list[torch.Size]
    run: _Run


def _single_shapes(run: _Run) -> _Shapes:
    """Shapes of one sample from a batch of one; an output that squeezed its batch axis away has none to remove."""
    outputs = [o.shape[1:] if o.ndim and o.shape[0] == 1 else o.shape for o in run.tape.outputs]
    return _Shapes(outputs, [leaf.shape[1:] for leaf in run.tape.leaves], run)


def _batch_shapes(run: _Run) -> _Shapes:
    return _Shapes([o.shape[1:] for o in run.tape.outputs], [leaf.shape[1:] for leaf in run.tape.leaves], run)


class _Result:
    """Preallocated Jacobians, filled in place."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.direction = samples, "reverse"
        self.blocks: list[list[Tensor]] = []
        self.outputs: list[Tensor] = []
        self.shapes: _Shapes | None = None

    def prepare(self, shapes: _Shapes) -> None:
        """Allocate at the first sight of the shapes; refuse shapes that change from sample to sample."""
        if self.shapes is not None:
            if self.shapes.outputs != shapes.outputs:
                raise ModelStateError(
                    explain(
                        "model",
                        f"returning {shapes.outputs} after {self.shapes.outputs}",
                        "all samples must have outputs of one shape",
                    )
                )
            return
        n, tape = self.samples.count, shapes.run.tape
        self.shapes = shapes
        kinds = [(o.dtype, o.device) for o in tape.outputs]
        self.blocks = [
            [torch.zeros(n, *out, *inp, dtype=dtype, device=device) for inp in shapes.inputs]
            for out, (dtype, device) in zip(shapes.outputs, kinds, strict=True)
        ]
        pairs = zip(shapes.outputs, kinds, strict=True)
        self.outputs = [torch.zeros(n, *out, dtype=dtype, device=device) for out, (dtype, device) in pairs]

    def finished(self, route: str) -> SampleJacobians:
        if self.shapes is None:
            raise ModelStateError(explain("model", "not evaluated", "at least one sample must run"))
        tree, inputs = self.samples.input_tree, self.samples.inputs
        if self.samples.at is not None and not (isinstance(self.samples.at, tuple) and self.samples.at[0] is None):
            tree, inputs = flatten(0, "at")[1], [0]
        return SampleJacobians(self.blocks, self.shapes.run.tree, tree, inputs, route, self.outputs)
