"""Runs of a model over some samples, in eval mode, on private copies: whole, or cut at a narrow layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..._runtime.contexts import arithmetic, recording, refuse_transforms
from ..._runtime.kernels import norms_written_out
from ..._runtime.restoring import restoring
from ..._runtime.side_effects import SideEffects, SideEffectWatch
from ..._trees import Selector, Tree, flatten, is_differentiable, output_leaves, select
from ...errors import ModelStateError, NotDifferentiableError
from ..bias.follow import Follow
from ..bias.homogeneous import FollowedRun
from ..model.cut import At, Cut
from ..model.freeze import FrozenModules
from ..model.inputs import ForwardExplained, private_inputs, split_input
from ..model.replica import Replica, replica_of
from ..model.structure import ModelStructure
from ..model.targets import SampleTarget
from ..sweeps.graph import inspect_graph
from ..sweeps.linearization import Linearization
from ..sweeps.proofs import ProofStore, store_for
from ..sweeps.record import setting
from ..sweeps.watched import watched
from .bottleneck import separates, widths_noted


@dataclass
class Run:
    """One recorded forward over some samples.

    Attributes:
        lin: From the inputs (or the layer that was cut) to the outputs.
        tree: The structure of the output.
        head: From the inputs to the layer that was cut, if one was.
        widths: Numbers per sample that each submodule gives, where they were noted.
        followed: What was carried along with the forward, where it was followed.
    """

    lin: Linearization
    tree: Tree
    head: Linearization | None = None
    widths: dict[str, int | None] = field(default_factory=dict)
    followed: FollowedRun | None = None

    @cached_property
    def entries(self) -> tuple[int, int]:
        """Entries of a sample's outputs and of its inputs."""
        outputs, leaves = self.lin.outputs, (self.head or self.lin).leaves
        return sum(o.shape[1:].numel() for o in outputs), sum(leaf.shape[1:].numel() for leaf in leaves)

    @property
    def effects(self) -> SideEffects:
        """What the forward was seen to do besides arithmetic."""
        return self.lin.proofs.effects or SideEffects()


@dataclass
class _Private:
    """What one forward may change: copies of the model and of its input, and the leaves in that by name."""

    replica: Replica | None
    copied: Any
    leaves: list[tuple[str, Tensor]]


@dataclass
class _Forward:
    """What one forward gave, and what it was cut and followed by."""

    outputs: list[Tensor]
    tree: Tree
    cut: Cut | None
    widths: dict[str, int | None]
    followed: FollowedRun | None


@dataclass(eq=False)
class Runner:
    """How a model is run over samples.

    Attributes:
        model: A module, or a plain callable.
        structure: What the module consists of in this call; None for a plain callable.
        input_tree: The structure of its input.
        call: The public call on whose behalf this is done.
        outputs: Which part of the output.
        at: A cut that the user requested.
        checks: How often routes are checked.
        fallback: What happens when a fast route is left.
        connected: Keep outputs connected to inputs of the caller's that require grad, for derivatives of derivatives.
        create_graph: Keep them connected to the model's trainable parameters too, and Jacobians with their graph.
        owner: For a function that was made of a model: the model, with which verdicts are kept, and their key.
        target: One output per sample; its places are the last of the values that the model is run over.
        asked: The question to the model beside its samples, as a key; made outside of forwards that are watched.
        frozen: Modules that are frozen.
        following: Carry bias parts along with forwards that are not watched, so that these need no run of their own.
    """

    model: Any
    structure: ModelStructure | None
    input_tree: Tree
    call: str
    outputs: Selector
    at: At
    checks: str
    fallback: str
    connected: bool = False
    create_graph: bool = False
    owner: tuple[Any, Hashable] | None = None
    target: SampleTarget | None = None
    asked: tuple[Hashable, ...] = ()
    frozen: FrozenModules | None = None
    following: bool = False

    def run(self, values: Sequence[Tensor], store: ProofStore | None = None) -> Run:
        """Record one forward; the first one of a graph is watched."""
        guarded = () if self.structure is None else self.structure.parameters.values()
        done = watched(store or self.store(values), partial(self._watched, values), guarded)
        proofs = done.lin.proofs
        proofs.widths = done.widths = done.widths or proofs.widths
        return done

    def _watched(
        self, values: Sequence[Tensor], effects: SideEffects, watch: SideEffectWatch | None
    ) -> tuple[Run, Linearization]:
        done = self.record(values, effects, None, watch, plain=effects.plain and not self.create_graph)
        return done, done.lin

    def store(self, values: Sequence[Tensor]) -> ProofStore:
        """Return what is known of the model with inputs of these shapes."""
        many = values[0].shape[0] if values else None
        if self.owner is not None:
            owner, known = self.owner
            return store_for(owner, (known, tuple(v.shape for v in values)), self.checks, many)
        if self.structure is not None:
            key = setting(self.structure, values, "samples", self.at, *self.asked)
        else:
            arrays = tuple((v.shape, v.dtype, v.device) for v in values)
            key = ("samples", arrays, *self.asked, torch.get_default_dtype())
        return store_for(self.model, key, self.checks, many)

    def inputs_in(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return those of the values that the model is called with."""
        return values if self.target is None else values[:-1]

    def split(self, values: Sequence[Tensor], store: ProofStore, effects: SideEffects, path: str) -> Run | None:
        """Record one forward cut at a submodule; None where that is no separator."""
        try:
            run = self.record(values, effects, path)
        except ModelStateError:
            return None
        if run.head is None or not separates(run.lin, run.head.leaves):
            return None
        proofs = store.proofs(inspect_graph([*run.lin.outputs, *run.head.outputs]))  # of both parts
        proofs.effects = proofs.effects or effects
        for lin in (run.lin, run.head):
            lin.rely_on(proofs)
        return run

    def state(self) -> dict[str, Tensor]:
        """Return the model's parameters and copies of its buffers, by name."""
        if self.structure is None:
            return {}
        buffers = {name: buffer.clone() for name, buffer in self.structure.buffers.items()}
        return {name: p.detach() for name, p in self.structure.parameters.items()} | buffers

    def outputs_alone(self, values: Sequence[Tensor], effects: SideEffects) -> Iterator[list[Tensor]]:
        """Yield the outputs of every sample alone, without gradient."""
        replica = None
        for i in range(values[0].shape[0]):
            outputs, replica = self._outputs([v[i : i + 1] for v in values], replica, effects.writes)
            yield outputs

    @restoring
    def _outputs(
        self, values: Sequence[Tensor], replica: Replica | None, cloned: bool
    ) -> tuple[list[Tensor], Replica | None]:
        with arithmetic(False):
            replica = self.replica(cloned) if cloned or replica is None else replica
            return self._ran(values, self._private(values, replica)).outputs, replica

    def replica(self, cloned: bool) -> Replica | None:
        """Return a private copy of a module, where gradients are recorded or none is needed; None for a function.

        Args:
            cloned: Copy the weights too, for forwards that write into them.
        """
        if self.structure is None:
            return None
        kept = self.create_graph
        wrt = {name for name, p in self.structure.parameters.items() if p.requires_grad} if kept else ()
        return replica_of(self.structure, wrt, training=False, connected=kept, cloned=cloned)

    @restoring
    def record(
        self,
        values: Sequence[Tensor],
        effects: SideEffects,
        path: str | None = None,
        watch: SideEffectWatch | None = None,
        state: dict[str, Tensor] | None = None,
        plain: bool = False,
    ) -> Run:
        """Record one forward, cut at `path` if there is one; under a `watch` learn the widths of layers.

        Args:
            values: The samples.
            effects: What earlier forwards were seen to do.
            path: A submodule to cut at.
            watch: Notes what the forward does besides arithmetic.
            state: Take these parameters and buffers instead of the model's.
            plain: No kernel is replaced: whether that was right is seen from the graph.
        """
        refuse_transforms()  # before weights are copied
        # With a graph, results are differentiated once more than fused norms have derivatives.
        written, watching = norms_written_out() if self.create_graph else nullcontext(), watch or nullcontext()
        # In the function mode of a recording every look at a tensor's shape is a call in Python: copies come first.
        with arithmetic(True), watching:
            private = self._private(values, self.replica(effects.writes))
        with recording(watch=watch, plain=plain), watching, written:
            done = self._ran(values, private, path, watch is not None, state)
        return self._recorded(done, private, path)

    def _private(self, values: Sequence[Tensor], replica: Replica | None) -> _Private:
        connected = self.connected or self.create_graph
        return _Private(replica, *private_inputs(self.inputs_in(values), self.input_tree, connected))

    def _ran(
        self,
        values: Sequence[Tensor],
        private: _Private,
        path: str | None = None,
        noting: bool = False,
        state: dict[str, Tensor] | None = None,
    ) -> _Forward:
        widths: dict[str, int | None] = {}
        replica, copied, leaves = private.replica, private.copied, private.leaves
        cut = self.cut(replica, path, checked=noting)
        noted = nullcontext()
        if replica is not None and noting:
            noted = widths_noted(replica.module, values[0].shape[0], widths)
        follow = self._follow(cut, copied) if self.following and not noting else None
        with noted, follow or nullcontext(), follow.functions if follow is not None else nullcontext():
            tensors, tree = self.called(copied, values, replica, cut, state)
        followed = None if follow is None else FollowedRun.of(tensors, follow, [leaf for _, leaf in leaves])
        return _Forward(tensors, tree, cut, widths, followed)

    def _recorded(self, done: _Forward, private: _Private, path: str | None) -> Run:
        leaves, cut, head = private.leaves, done.cut, None
        protected = self.structure.trainable if self.structure is not None else []
        if path is not None and cut is not None:
            head = self._linearized(leaves, [path], [cut.before[0]], protected)
        if cut is not None and cut.leaves:
            leaves = [(str(path or self.at), leaf) for leaf in cut.leaves]
        lin = self._linearized(leaves, done.tree.names, done.outputs, protected)
        return Run(lin, done.tree, head, done.widths, done.followed)

    def _follow(self, cut: Cut | None, copied: Any) -> Follow | None:
        """Return what carries bias parts along from a copy of the input; None where they start at a layer."""
        if cut is not None and cut.source is not None:
            return None
        starts = self.starts(copied)
        follow = Follow(starts, (), bias=True, lengths=(), seed=0)
        follow.start(starts)
        return follow

    def starts(self, copied: Any) -> list[Tensor]:
        """Return the tensors with derivatives in a private copy of the input, which a model is followed from."""
        return list(filter(is_differentiable, self.input_tree.free(flatten(copied, "x")[0])))

    def cut(self, replica: Replica | None, path: str | None = None, checked: bool = False) -> Cut | None:
        """Return where a replica's forward is cut, at `path` if there is one; None for a plain function.

        Args:
            replica: Of the model.
            path: A submodule to cut at.
            checked: Frozen functions are compared with what they give otherwise.
        """
        connected = self.connected or self.create_graph
        return None if replica is None else Cut(replica.module, path or self.at, connected, self.frozen, checked)

    def called(
        self,
        copied: Any,
        values: Sequence[Tensor],
        replica: Replica | None,
        cut: Cut | None,
        state: dict[str, Tensor] | None = None,
    ) -> tuple[list[Tensor], Tree]:
        """Call the model once; return its outputs and their structure.

        Args:
            copied: Its input, private to this call.
            values: The samples that `copied` holds.
            replica: Of a module; None calls a plain function.
            cut: Where the replica's forward is cut.
            state: Take these parameters and buffers instead of the replica's.
        """
        args, kwargs = split_input(copied)
        with ForwardExplained(self.model, self.inputs_in(values)):
            if replica is None or cut is None:
                output = self.model(*args, **kwargs)
            else:
                with cut.active():
                    done = functional_call(replica.module, state, args, kwargs) if state else replica(args, kwargs)
                    output = cut.result(done)
        output = select(output, self.outputs)
        tensors, tree = output_leaves(output if self.target is None else self.target.pick(output, values[-1]))
        if any(t.is_complex() for t in tensors):
            todo = "Return torch.view_as_real(output)."
            raise NotDifferentiableError.of("the model's output", "complex", "a Jacobian by samples is real", todo)
        return tensors, tree

    def _linearized(
        self, leaves: list[tuple[str, Tensor]], names: Sequence[str], outputs: list[Tensor], protected: list[Tensor]
    ) -> Linearization:
        lin = Linearization(
            [leaf for _, leaf in leaves],
            outputs,
            leaf_names=[name for name, _ in leaves],
            output_names=names,
            call=self.call,
            private=True,
            fallback=self.fallback,
        )
        lin.protected = protected
        return lin
