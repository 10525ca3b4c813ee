"""Recording: run a function or a model once and keep the graph as a `Linearization`."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..._runtime.agreement import coarsest
from ..._runtime.contexts import arithmetic, recording, refuse_transforms
from ..._runtime.kernels import norms_written_out
from ..._runtime.restoring import restoring
from ..._runtime.side_effects import SideEffects, SideEffectWatch
from ..._space import Space
from ..._trees import Selector, Tree, output_leaves, select
from ...errors import InputTypeError, ModelStateError, NotDifferentiableError
from ..model.cut import At, Cut
from ..model.inputs import ForwardExplained, check_fallback, check_params, input_leaves, private_inputs, split_input
from ..model.loss_facts import torch_loss
from ..model.replica import Replica, replica_of
from ..model.structure import ModelStructure, PlainFunction, check_state, structure_by_inputs, structure_of
from .graph import next_hook, reaches
from .linearization import Linearization
from .proofs import KeptProofs, ProofStore, identity_key, store_for
from .watched import watched
from .weights import Weights, weights_of


@dataclass(frozen=True)
class Recording:
    """A linearization, and the shape of the output it was recorded from.

    Attributes:
        lin: The linearisation point.
        tree: The output's structure.
        output: The output itself, as the user's function gave it.
        inputs: For each input of the caller's that has derivatives, by identity: itself and the leaf that stood for it.
        before: What a model returned (the part that was picked) before anything such as a loss was made of it.
        by_inputs: The leaves are inputs or hidden values, not parameters.
    """

    lin: Linearization
    tree: Tree
    output: Any
    inputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    before: Any = None
    by_inputs: bool = False


@restoring
def record_closure(
    func: Callable[[], Any], params: Any, call: str, fallback: str = "warn", empty: bool = False
) -> Recording:
    """Call `func` once and record it over the caller's own tensors.

    Raises:
        InputTypeError: `func` or `params` is of the wrong kind.
        InputError: A parameter is repeated or does not require grad.
        NotDifferentiableError: A reentrant checkpoint uses a parameter and records nothing of it.
    """
    if not callable(func) or isinstance(func, nn.Module):
        came = f"a {type(func).__name__}"
        raise InputTypeError.of("func", came, "a callable without arguments is needed", "Write `lambda: model(x)`.")
    check_fallback(fallback)
    leaves = check_params(params, empty)
    with recording(lambda tensor: reaches(tensor, leaves), call, advance=True):
        output = func()
    tensors, tree = output_leaves(output, "func()")
    lin = Linearization(leaves, tensors, leaf_names="params", output_names=tree.names, call=call, fallback=fallback)
    return Recording(lin, tree, output)


def setting(structure: ModelStructure, inputs: Sequence[Tensor], *more: Any) -> tuple[Any, ...]:
    """Return a key under which proofs about a model hold: its structure, the inputs' shapes, torch's settings."""
    arrays = [(t.shape, t.dtype, t.device) for t in inputs]
    context = (
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
    )
    return (structure.key, tuple(arrays), context, *more)


@dataclass(eq=False, kw_only=True)
class ModelRun:
    """One run of a model, on private copies, that is recorded.

    Args:
        model: The caller's module.
        value: Its input: a tuple or a mapping is unpacked, None is no argument.
        call: The public call on whose behalf this is done.
        parameters: Which parameters are the leaves; None takes the floating-point inputs instead.
        outputs: Which part of the output.
        at: A cut at submodules.
        checks: How often routes are checked.
        fallback: What happens when a fast route is left.
        training: A mode for all modules, None for their own.
        finish: Applied to the output last (a loss).
        purpose: Distinguishes one `finish` from another in stored proofs.
        connected: Keep the result connected to the caller's trainable parameters, for derivatives of derivatives.
        shift: Added to the private copies of parameters, by name, for finite differences.
        kept: The recording is kept for later products, so the caller may write into the weights meanwhile.
        aside: Leaves of the output without a derivative are set aside instead of refused.
        pulled: Only pulls are taken of the graph, never their derivatives: attention keeps the caller's kernels.
        anew: A new graph is expected, so that it is observed in the first run.
        consists: What the module without wrappers consists of, where the call found that already.

    Attributes:
        structure: What the module without wrappers consists of when it is recorded.
        given: The leaves of the input, and its structure.
        chosen: The parameters that are differentiated, by name.
        weights: Notes the weights of a recording that is kept, so that a write into them shows.
        copies: Of the parameters of one that is kept, by the identity of the caller's.
        store: What is known of such a run.
    """

    model: Any = field(kw_only=False)
    value: Any = field(kw_only=False)
    call: str
    parameters: Callable[[str, Tensor], bool] | None
    outputs: Selector = None
    at: At = None
    checks: str = "first"
    fallback: str = "warn"
    training: bool | None = None
    finish: Callable[[Any], Any] | None = None
    purpose: Any = None
    connected: bool = False
    shift: Mapping[str, Tensor] | None = None
    kept: bool = False
    aside: bool = False
    pulled: bool = False
    anew: bool = False
    consists: ModelStructure | None = None
    structure: ModelStructure = field(init=False)
    given: tuple[list[Any], Tree] = field(init=False)
    chosen: dict[str, Tensor] = field(init=False)
    weights: Weights | None = field(init=False)
    copies: dict[int, Tensor] = field(init=False)
    store: ProofStore = field(init=False)

    @property
    def _pulled(self) -> bool:
        return self.pulled and not self.connected

    @property
    def owner(self) -> Any:
        """What proofs are kept with: a function itself, not the module that represents it in this run."""
        module = self.structure.model
        return module.function if isinstance(module, PlainFunction) else module

    def recorded(self) -> Recording:
        """Return the recording, watched where it is not known what the forward does besides arithmetic.

        Raises:
            ModelStateError: The model has no parameters to differentiate.
            InputError: An input does not fit, `outputs` or `at` pick nothing.
            NotDifferentiableError: Nothing among the inputs has a derivative.
        """
        refuse_transforms()  # before weights are copied: inside one, copies have no memory of their own
        find = structure_by_inputs if self.parameters is None else structure_of
        structure = self.consists or find(self.model)
        check_state(structure)
        check_fallback(self.fallback)
        given, _ = self.given = input_leaves(self.value)
        self.structure, self.chosen = structure, _chosen(structure, self.parameters)
        self.weights = weights = weights_of(structure) if self.kept else None
        self.copies = {} if weights is None else weights.copies(structure)
        tensors = [t for t in given if isinstance(t, Tensor)]
        others = [leaf for leaf in given if not isinstance(leaf, Tensor)]
        asked = identity_key(self.outputs), identity_key(self.purpose), identity_key(others)
        key = setting(structure, tensors, "whole", self._pulled, self.training, self.at, *asked)
        self.store = store = store_for(self.owner, key, self.checks, _rows(tensors))
        guarded = [*structure.parameters.values(), *self.copies.values()]
        found = watched(store, self._record, guarded, self.anew)
        if weights is not None:
            module = structure.model
            found.lin.proofs = KeptProofs(found.lin.proofs, lambda: weights.changed_in(ModelStructure(module)) is None)
        return found

    @restoring
    def _record(self, effects: SideEffects, watch: SideEffectWatch | None) -> tuple[Recording, Linearization]:
        # Its results are differentiated once more than fused norms have derivatives.
        written, watching = norms_written_out() if self.connected else nullcontext(), watch or nullcontext()
        # Inputs are recorded too: a reentrant checkpoint passes gradients on to weights only if its input requires one.
        # They are copied first: in the function mode of a recording every look at a tensor's shape is a call in Python.
        with arithmetic(True):
            replica = self._replica(effects.writes)
            with watching:
                copied, inputs = private_inputs(*self.given, self.connected)
        plain = effects.plain and not self.connected
        with recording(pulled=self._pulled, watch=watch, plain=plain), watching, written:
            before, hidden, first = self._forward(replica, copied)
            output = before if self.finish is None else self.finish(before)
            hooks = next_hook() - first
        leaves, names, aliased_leaves = self._leaves(replica, inputs, hidden)
        outputs, tree = output_leaves(output, aside=self.aside)
        named = {"leaf_names": names, "output_names": tree.names, "domain": self._domain(names)}
        lin = Linearization(leaves, outputs, **named, call=self.call, private=True, fallback=self.fallback)
        lin.weights, lin.hooks = self.weights, hooks
        lin.protected = self.structure.trainable
        self.store.domain = lin.domain if self.chosen else None
        # The caller's own parameter in the graph of a private copy: something outside the module holds it.
        inside = lin.graph_info.leaves if aliased_leaves else ()
        lin.aliased_leaves = tuple([(i, p) for i, p in aliased_leaves if id(p) in inside])
        values, input_tree = self.given
        given = dict(zip(input_tree.names, values, strict=True))
        own = {id(given[name]): (given[name], leaf) for name, leaf in inputs}
        return Recording(lin, tree, output, own, before, not self.chosen), lin

    def _replica(self, cloned: bool) -> Replica:
        wrt = set(self.chosen)
        if self.connected:
            wrt.update([name for name, p in self.structure.parameters.items() if p.requires_grad])
        copies = {} if cloned else self.copies  # clones are the forward's to write into, copies are not
        training, connected = self.training, self.connected
        return replica_of(self.structure, wrt, training=training, connected=connected, cloned=cloned, copies=copies)

    def _forward(self, replica: Replica, copied: Any) -> tuple[Any, list[Tensor], int]:
        """Return the output for a copy of the input, the leaves inside, and the number of the first hook it makes."""
        for name, change in (self.shift or {}).items():
            replica.parameters[name].data = replica.originals[name].detach() + change
        cut = Cut(replica.module, self.at, self.connected)
        args, kwargs = split_input(copied)
        tensors = [t for t in self.given[0] if isinstance(t, Tensor)]
        with cut.active(), ForwardExplained(self.structure.model, tensors):
            first = next_hook()
            output = cut.result(replica(args, kwargs))
        return select(output, self.outputs), cut.leaves, first

    def _domain(self, names: Sequence[str]) -> Space | None:
        """Return the space of the chosen parameters, where an earlier run had the same: the store's key has shapes."""
        known = self.store.domain if self.chosen else None
        return known if known is not None and known.names == tuple(names) else None

    def _leaves(
        self, replica: Replica, inputs: list[tuple[str, Tensor]], hidden: list[Tensor]
    ) -> tuple[list[Tensor], list[str], list[tuple[int, Tensor]]]:
        chosen, at = self.chosen, self.at
        if chosen:
            names = list(chosen)
            # A connected copy leads back to the caller's parameter, then the leaf for every use of it. One that is
            # computed may be so from another parameter, which is no use of that.
            own = {n for n in names if self.connected and _is_trainable_leaf(chosen[n])}
            leaves = [chosen[n] if n in own else replica.parameters[n] for n in names]
            return leaves, names, [(i, chosen[n]) for i, n in enumerate(names) if n not in own]
        if hidden:
            return hidden, [at if isinstance(at, str) else str(at and at[0])], []
        if not inputs:
            came = "without floating-point tensors"
            todo = "Differentiate by the embedding's output with `at='path.to.embedding'`."
            raise NotDifferentiableError.of("input", came, "integer inputs have no derivative", todo)
        return [leaf for _, leaf in inputs], [name for name, _ in inputs], []


def record_further(found: Recording, finish: Callable[[Any], Any], purpose: Any, call: str) -> Recording:
    """Record what `finish` makes of a recorded output, over the same graph; the model does not run again.

    Args:
        found: The model's output, by leaves that nothing wrote into since.
        finish: A loss, say.
        purpose: Distinguishes one `finish` from another in stored proofs.
        call: The public call on whose behalf this is done.
    """
    lin, store = found.lin, found.lin.store
    own = ProofStore(lin.proofs.checks)
    if store is not None:
        own = store.known.take(
            ("further", identity_key(purpose)), lambda: ProofStore(store.checks, store.function, store.many)
        )

    @restoring
    def record(effects: SideEffects, watch: SideEffectWatch | None) -> tuple[Recording, Linearization]:
        if effects.writes and watch is not None:  # seen now, of this part alone; what is known is of both parts
            raise ModelStateError.of("loss", "writing into the model's parameters", "it must leave them alone")
        first = next_hook()
        with recording(), watch or nullcontext():
            output = finish(found.tree.build([part.clone() for part in lin.outputs]))
        flat, tree = output_leaves(output)
        further = lin.to(flat, tree.names, call)
        further.hooks = lin.hooks + next_hook() - first
        return Recording(further, tree, output, found.inputs, found.before, found.by_inputs), further

    result = watched(own, record, lin.protected)
    result.lin.proofs.effects = _joined(lin.proofs.effects, result.lin.proofs.effects)
    if isinstance(lin.proofs, KeptProofs):
        result.lin.proofs = lin.proofs.beside(result.lin.proofs)
    return result


@restoring
def record_at_outputs(
    found: Recording, finish: Callable[[Any], Any], purpose: Any, call: str, connected: bool = False
) -> Recording:
    """Record `finish` by a recorded output, as a function of nothing before it; what is proved belongs to `purpose`.

    With `connected` its derivatives can be differentiated by what is before it.
    """
    lin, plain = found.lin, torch_loss(purpose) is not None  # torch's losses use no kernel that a recording replaces
    first = next_hook()
    with recording(plain=plain and not connected, advance=True):
        kept = [connected and output.requires_grad for output in lin.outputs]
        pairs = zip(lin.outputs, kept, strict=True)
        leaves = [output.view_as(output) if keep else output.detach().requires_grad_() for output, keep in pairs]
        value = finish(found.tree.build(leaves if plain else [leaf.clone() for leaf in leaves]))
    tensors, tree = output_leaves(value)
    inner, outer_names = found.tree.names, tree.names
    outer = Linearization(leaves, tensors, leaf_names=inner, output_names=outer_names, call=call, private=True)
    outer.hooks = next_hook() - first
    arrays = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
    outer.look_up(store_for(purpose, ("at outputs", arrays), lin.proofs.checks), SideEffects())
    return Recording(outer, tree, value)


def _joined(first: SideEffects | None, second: SideEffects | None) -> SideEffects | None:
    """Return what two parts of a computation do together; None where one of them was not watched."""
    if first is None or second is None:
        return None
    return SideEffects(
        tuple(dict.fromkeys((*first.reads, *second.reads))),
        tuple(dict.fromkeys((*first.draws, *second.draws))),
        first.writes or second.writes,
        first.packs or second.packs,
        coarsest([first.coarse, second.coarse]),
    )


def refuse_copies(lin: Linearization) -> NoReturn:
    """Refuse to copy or pickle what holds a graph, which torch can do neither of.

    Raises:
        InputTypeError: Always.
    """
    came = f"what holds the recorded graph of {lin.call}"
    todo = "Call `dense()` first, or make it again where it is needed."
    raise InputTypeError.of("the operator", came, "a graph can neither be copied nor pickled", todo)


copyreg.pickle(Linearization, refuse_copies)  # copies ask there too


def _chosen(structure: ModelStructure, picks: Callable[[str, Tensor], bool] | None) -> dict[str, Tensor]:
    """Return the parameters that are differentiated, by name; none where the inputs are.

    Raises:
        ModelStateError: There are none.
    """
    if picks is None:
        return {}
    chosen = {name: p for name, p in structure.differentiable.items() if picks(name, p)}
    if not chosen:
        came = f"a {type(structure.model).__name__} without parameters to differentiate"
        needed = "at least one must be a floating-point parameter that is asked for"
        raise ModelStateError.of("model", came, needed)
    return chosen


def _is_trainable_leaf(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.is_leaf and not parameter.is_inference()


def _rows(tensors: Sequence[Tensor]) -> int | None:
    """Return the length of the first axis that all inputs share; None where there is none."""
    lengths = {t.shape[0] if t.ndim else None for t in tensors}
    return lengths.pop() if len(lengths) == 1 else None
