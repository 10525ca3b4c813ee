"""Runs of a model over some samples, in eval mode, on private copies: whole, or cut at a narrow layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ....errors import ModelStateError, NotDifferentiableError, explain
from ....trees import Selector, Tree, output_leaves, select
from ..cut import At, Cut
from ..inputs import forward_explained, private_inputs, split_input
from ..record import setting
from ..replica import replicate
from ..restoring import restoring
from ..surroundings import autocast_on, random_state_kept, recording
from ..tape import Tape
from ..trust import Trust, told_apart, trust_in
from ..watch import Habits, Watch, WritesState
from .bottleneck import separates, widths_noted


@dataclass
class Run:
    """One recorded forward over some samples.

    Attributes:
        tape: From the inputs (or the layer that was cut) to the outputs.
        tree: The structure of the output.
        habits: What the forward was seen to do.
        head: From the inputs to the layer that was cut, if one was.
        widths: Numbers per sample that each submodule gives, where they were noted.
    """

    tape: Tape
    tree: Tree
    habits: Habits
    head: Tape | None = None
    widths: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Runner:
    """How a model is run over samples.

    Attributes:
        model: A module, or a plain callable.
        input_tree: The structure of its input.
        call: The public call on whose behalf this is done.
        outputs: Which part of the output.
        at: A cut that the user asked for.
        checks: How often routes are checked.
        fallback: What happens when a fast route is left.
        connected: Keep outputs connected to inputs of the caller's that require grad, for derivatives of derivatives.
    """

    model: Any
    input_tree: Tree
    call: str
    outputs: Selector
    at: At
    checks: str
    fallback: str
    connected: bool = False

    @restoring
    def run(self, values: Sequence[Tensor], trust: Trust | None = None) -> Run:
        """Record one forward; the first one in its setting is watched."""
        trust = trust or self.trust(values)
        habits: Habits | None = trust.notes.get("habits") if self.checks not in ("always", "strict") else None
        if habits is not None and not habits.reads:
            done = self.record(values, trust, habits)
            done.widths = trust.notes.get("widths", {})
            return done
        for cloned in (False, True):
            watch = Watch([] if cloned else self._parameters())
            try:
                with watch:
                    done = self.record(values, trust, Habits((), (), cloned), noting=True)
            except WritesState:
                continue
            done.habits = trust.notes["habits"] = Habits(tuple(watch.reads), tuple(watch.draws), cloned)
            trust.notes["widths"] = done.widths
            return done
        raise ModelStateError(
            explain("model", "writing into tensors that are not its own", "its forward must leave such tensors alone")
        )

    def trust(self, values: Sequence[Tensor]) -> Trust:
        """Return what is known of the model with inputs of these shapes."""
        if isinstance(self.model, nn.Module):
            key = setting(self.model, values, "samples", self.at, told_apart(self.outputs))
        else:
            key = ("samples", tuple((v.shape, v.dtype, v.device) for v in values), told_apart(self.outputs))
        return trust_in(self.model, key, self.checks)

    def split(self, values: Sequence[Tensor], run_trust: Trust, habits: Habits, path: str) -> Run | None:
        """Record one forward cut at a submodule; None where that is no separator."""
        try:
            run = self.record(values, run_trust, habits, path)
        except ModelStateError:
            return None
        return run if run.head is not None and separates(run.tape, run.head.leaves) else None

    def state(self) -> dict[str, Tensor]:
        """Return the model's parameters and copies of its buffers, by name."""
        if not isinstance(self.model, nn.Module):
            return {}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return {name: p.detach() for name, p in self.model.named_parameters()} | buffers

    def _parameters(self) -> list[Tensor]:
        return list(self.model.parameters()) if isinstance(self.model, nn.Module) else []

    @restoring
    def record(
        self,
        values: Sequence[Tensor],
        trust: Trust,
        habits: Habits,
        path: str | None = None,
        noting: bool = False,
        state: dict[str, Tensor] | None = None,
    ) -> Run:
        """Record one forward, cut at `path` if there is one; with `noting` learn the widths of layers.

        Args:
            values: The samples.
            trust: Where verdicts go.
            habits: What earlier forwards were seen to do.
            path: A submodule to cut at.
            noting: Learn the widths of layers.
            state: Take these parameters and buffers instead of the model's.
        """
        widths: dict[str, int | None] = {}
        module, given = None, None
        if isinstance(self.model, nn.Module):
            replica = replicate(self.model, training=False, cloned=habits.writes)
            module, given = replica.module, replica.originals
        with recording(), random_state_kept():
            copied, leaves = private_inputs(self.input_tree.build(values), self.connected)
            args, kwargs = split_input(copied)
            with forward_explained(self.model, values):
                if module is not None:
                    cut = Cut(module, path or self.at)
                    look = widths_noted(module, values[0].shape[0], widths) if noting else nullcontext()
                    with cut.active(), look:
                        done = functional_call(module, state, args, kwargs) if state else module(*args, **kwargs)
                        output = cut.result(done)
                    hidden, before = cut.leaves, cut.before
                else:
                    output, hidden, before = self.model(*args, **kwargs), [], []
            tensors, tree = output_leaves(select(output, self.outputs))
        if any(t.is_complex() for t in tensors):
            todo = "Return torch.view_as_real(output)."
            raise NotDifferentiableError(
                explain("the model's output", "complex", "a Jacobian by samples is real", todo)
            )
        named = [(str(path or self.at), leaf) for leaf in hidden] or leaves
        protected = [p for p in (given or {}).values() if p.requires_grad]
        tape = self._tape(named, dict(zip(tree.names, tensors, strict=True)), trust, protected)
        head = self._tape(leaves, {path: before[0]}, trust, protected) if path is not None else None
        return Run(tape, tree, habits, head, widths)

    def _tape(
        self, leaves: list[tuple[str, Tensor]], outputs: dict[str, Tensor], trust: Trust, protected: list[Tensor]
    ) -> Tape:
        tape = Tape(
            [leaf for _, leaf in leaves],
            list(outputs.values()),
            leaf_names=[name for name, _ in leaves],
            output_names=list(outputs),
            call=self.call,
            private=True,
            trust=trust,
            fallback=self.fallback,
            coarse=autocast_on(list(outputs.values())),
        )
        tape.protected = protected
        return tape
