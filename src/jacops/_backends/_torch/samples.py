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
from ...trees import Selector, Tree, flatten, is_differentiable
from .bottleneck import narrowest, sweep_split
from .cut import At
from .inputs import check_fallback
from .matrix import jacobian_blocks
from .mixing import coupled, differs, unbatchable
from .replica import bare, check_state
from .sample_runs import Run, Runner
from .sample_sweeps import sweep
from .surroundings import is_memory_error
from .trust import Trust


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
        self.call, self.at, self.checks, self.fallback = call, at, checks, check_fallback(fallback)
        if at is not None and not isinstance(model, nn.Module):
            raise InputTypeError(
                explain("at", repr(at), "a plain function has no submodules", "Pass a torch.nn.Module.")
            )
        self.values, self.input_tree = flatten(x, "x")
        self.runner = Runner(model, self.input_tree, call, outputs, at, checks, fallback)
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

    # ---- all samples -----------------------------------------------------------------------------------------

    def jacobians(self, batch_size: int, progress: bool | None = None) -> SampleJacobians:
        """Return the Jacobians of all samples, `batch_size` of them to a sweep."""
        result = _Result(self)
        if self.count == 0:
            result.prepare(_single_shapes(self.runner.run([v.new_zeros((1, *v.shape[1:])) for v in self.values])))
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
        run = self.runner.run([v[i : i + 1] for v in self.values])
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
            run = self.runner.run(values)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, JacopsError) or is_memory_error(error):
                raise
            self.runner.run([v[:1] for v in values])  # where it fails alone too, that is the error to see
            return (
                f"the forward takes no batch of {where.stop - where.start} ({type(error).__name__}: {str(error)[:100]})"
            )
        trust, many = run.tape.trust, where.stop - where.start
        reason = trust.notes.get("mixes") if self.checks not in ("always", "strict") else None
        reason = reason or unbatchable(run.tape, run.habits, many)
        fresh = trust.needs("samples apart", many)
        if reason is None and fresh:
            reason = self._differs_alone(run, values, many)
        if reason is None:
            result.prepare(_batch_shapes(run))
            reason = self._filled(result, where, run, values, fresh)
        if reason is not None:
            trust.notes["mixes"] = reason
            return reason
        if fresh and any(bool((v != v[:1]).any()) for v in values):  # equal rows prove nothing: they agree anyway
            trust.remember("samples apart", many)
        for out, tensor in enumerate(run.tape.outputs):
            result.outputs[out][where] = tensor.detach()
        return None

    def _filled(self, result: _Result, where: slice, run: Run, values: Sequence[Tensor], fresh: bool) -> str | None:
        """Fill in one batch, split at a narrow layer where that saves sweeps; return why not if samples mix."""
        split = self._split(run, values)
        if split is not None and split.head is not None:
            result.direction = sweep_split(split.head, split.tape, result.blocks, where)
            if not fresh or coupled(run.tape, result.blocks, where, self.checks == "strict") is None:
                return None
            run.tape.trust.notes["split"] = None
        result.direction = sweep(run.tape, result.blocks, where)
        return coupled(run.tape, result.blocks, where, self.checks == "strict") if fresh else None

    def _split(self, run: Run, values: Sequence[Tensor]) -> Run | None:
        """Return the run cut at the narrowest layer that saves sweeps; None where there is none."""
        tape, notes = run.tape, run.tape.trust.notes
        if "split" not in notes:
            simple = self.at is None and len(tape.outputs) == len(tape.leaves) == 1 and bool(run.widths)
            rows, columns = tape.outputs[0].shape[1:].numel(), tape.leaves[0].shape[1:].numel()
            notes["split"] = narrowest(run.widths, rows, columns) if simple else None
        if notes["split"] is None:
            return None
        split = self.runner.split(values, tape.trust, run.habits, notes["split"])
        if split is None:
            notes["split"] = None
        return split

    def _differs_alone(self, run: Run, values: Sequence[Tensor], many: int) -> str | None:
        """Compare outputs in the batch with outputs of one sample and of a random half."""
        order = torch.randperm(many, generator=torch.Generator().manual_seed(0))
        for picked in (order[:1], order[: max(1, many // 2)].sort().values):
            part = self.runner.record([v[picked.to(v.device)] for v in values], Trust("never"), run.habits)
            for whole, alone in zip(run.tape.outputs, part.tape.outputs, strict=True):
                reason = differs(whole, alone, picked)
                if reason is not None:
                    return reason
        return None


@dataclass(frozen=True)
class _Shapes:
    outputs: list[torch.Size]
    inputs: list[torch.Size]
    run: Run


def _single_shapes(run: Run) -> _Shapes:
    """Shapes of one sample from a batch of one; an output that squeezed its batch axis away has none to remove."""
    outputs = [o.shape[1:] if o.ndim and o.shape[0] == 1 else o.shape for o in run.tape.outputs]
    return _Shapes(outputs, [leaf.shape[1:] for leaf in run.tape.leaves], run)


def _batch_shapes(run: Run) -> _Shapes:
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
            [torch.empty(n, *out, *inp, dtype=dtype, device=device) for inp in shapes.inputs]
            for out, (dtype, device) in zip(shapes.outputs, kinds, strict=True)
        ]
        pairs = zip(shapes.outputs, kinds, strict=True)
        self.outputs = [torch.empty(n, *out, dtype=dtype, device=device) for out, (dtype, device) in pairs]

    def finished(self, route: str) -> SampleJacobians:
        if self.shapes is None:
            raise ModelStateError(explain("model", "not evaluated", "at least one sample must run"))
        tree, inputs = self.samples.input_tree, self.samples.inputs
        if self.samples.at is not None and not (isinstance(self.samples.at, tuple) and self.samples.at[0] is None):
            tree, inputs = flatten(0, "at")[1], [0]
        return SampleJacobians(self.blocks, self.shapes.run.tree, tree, inputs, route, self.outputs)
