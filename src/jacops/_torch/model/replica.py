"""A private copy of a model's structure: the same forward over its own parameters, buffers, modes and attributes.

Swapping parameters inside the caller's module (as `functional_call` does) is not safe between threads and lets
forwards write into the caller's buffers; a deep copy copies the weights and fails on locks and cached activations.
A replica copies the skeleton only: modules, the containers that hold them, and bound methods of them. Weights are
shared in memory, buffers are cloned, anything else is shared as it is.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Container, Mapping
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._runtime.contexts import arithmetic, out_of_inference
from ..._runtime.restoring import restoring
from ...errors import ModelStateError
from .structure import ModelStructure, is_managed, is_wrapped, parameter_names, structure_of


class Replica(NamedTuple):
    """A model one may call and change at will.

    Attributes:
        module: The copy.
        parameters: Its private parameters by the caller's first name for each, those asked to be differentiated
            requiring grad.
        originals: The caller's parameters behind them, by the same names.
    """

    module: nn.Module
    parameters: dict[str, Tensor]
    originals: dict[str, Tensor]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the forward."""
        return self.module(*args, **kwargs)


@restoring
def replicate(model: Any, wrt: Container[str] = (), cloned: bool = False) -> Replica:
    """Return a replica of a model in its own mode, whatever the caller's gradient mode is.

    Args:
        model: The caller's module, not changed.
        wrt: The names of the parameters that are differentiated.
        cloned: Copy the weights too, for forwards that write into them.
    """
    with arithmetic(True):
        return replica_of(structure_of(model), wrt, cloned=cloned)


def replica_of(
    structure: ModelStructure,
    wrt: Container[str] = (),
    *,
    training: bool | None = None,
    connected: bool = False,
    cloned: bool = False,
    copies: Mapping[int, Tensor] | None = None,
) -> Replica:
    """Return a replica of a model, where gradients are recorded and inference mode is off.

    Args:
        structure: Of the caller's module, which is not changed.
        wrt: The names of the parameters that are differentiated.
        training: Mode for every module; None keeps each one's own.
        connected: Keep the copies connected to the caller's parameters in the graph, instead of fresh leaves.
        cloned: Copy the weights too, for forwards that write into them.
        copies: Take these in place of the caller's parameters, by identity.
    """
    if isinstance(structure.model, torch.jit.ScriptModule):
        return _scripted(structure, wrt, training, connected)
    memo: dict[int, Any] = {}
    originals, copies = structure.differentiable, copies or {}
    for here, (name, own) in zip(structure.places, structure.parameters.items(), strict=True):
        values = copies.get(here, own)
        memo[here] = _copied(own, values, name in wrt and name in originals, connected, cloned)
    module = _Builder(memo, training, connected).whole(structure)
    named = zip(structure.places, structure.parameters, strict=True)  # after it: a script module inside has its own
    return Replica(module, {name: memo[here] for here, name in named if name in originals}, originals)


@restoring
def skeleton(model: nn.Module, stand_ins: Mapping[int, Tensor]) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Return a copy of a model with other tensors for its parameters, by identity, and the copies of its modules.

    FSDP's classes and hooks, which gather parameters, are left behind; the caller's own hooks are not.
    """
    memo: dict[int, Any] = dict(stand_ins)
    structure = ModelStructure(model)
    with arithmetic(True):
        twin = _Builder(memo, None, False).whole(structure)
    twins: dict[int, nn.Module] = {here: memo[here] for here in structure.modules}
    for module in twins.values():
        if is_wrapped(module):
            module.__class__ = next(
                kind for kind in type(module).__mro__[1:] if issubclass(kind, nn.Module) and not is_managed(kind)
            )
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if getattr(hook, "__module__", "").startswith(_FSDP)]:
                del hooks[number]
    return twin, twins


_FSDP = "torch.distributed.fsdp"


def _copied(parameter: Tensor, values: Tensor, differentiated: bool, connected: bool, cloned: bool) -> Tensor:
    if connected and differentiated and (kept := out_of_inference(parameter)).requires_grad:
        return kept.clone() if cloned else kept.view_as(kept)
    values = out_of_inference(values) if values.is_inference() else values
    private = values.detach().clone() if cloned else values
    if type(parameter) in _PLAIN and type(private) in _PLAIN:
        return _as_parameter(nn.Parameter, private, differentiated)
    return private.detach().requires_grad_(differentiated)


_PLAIN = (nn.Parameter, Tensor)
_as_parameter = Tensor._make_subclass  # what `nn.Parameter` calls once it has looked at its arguments; it detaches


@restoring
def _scripted(structure: ModelStructure, wrt: Container[str], training: bool | None, connected: bool) -> Replica:
    """TorchScript modules live outside Python: only their own deep copy copies them."""
    _refuse_scripted(structure.model, connected)
    with arithmetic(False):
        module = copy.deepcopy(structure.model)
    private = parameter_names(module)
    for name, parameter in private.items():
        parameter.requires_grad_(name in wrt)
    return Replica(_in_mode(module, training), private, structure.differentiable)


def _refuse_scripted(module: nn.Module, connected: bool) -> None:
    """Refuse a script module whose copy is to stay connected to the caller's parameters.

    Raises:
        ModelStateError: It is.
    """
    if connected and any(p.requires_grad for p in module.parameters()):
        came = f"a script module ({getattr(module, 'original_name', type(module).__name__)})"
        needed = "its copy has no graph to its parameters, which `create_graph=True` requires"
        raise ModelStateError.of("model", came, needed, "Pass the module that it was scripted from.")


def _in_mode(module: nn.Module, training: bool | None) -> nn.Module:
    """Return a script module in the mode that is requested; a frozen one has none."""
    return module if training is None or not hasattr(module, "training") else module.train(training)


def _is_special(kind: type) -> bool:
    """Return whether modules of a class are not copied as they are: what `torch.compile` or TorchScript makes."""
    return kind.__name__ == "OptimizedModule" or issubclass(kind, torch.jit.ScriptModule)


def _instance(kind: type[nn.Module]) -> nn.Module:
    """Return an instance of exactly this class: a `__new__` of its own may return another (torch.fx makes a class)."""
    try:
        return object.__new__(kind)
    except TypeError:  # a class with another base written in C
        return kind.__new__(kind)


_IMMUTABLE = frozenset({bool, int, float, str, type(None)})
_EMPTIED = frozenset({dict, OrderedDict, set})
_OWN = frozenset(nn.Module().__dict__)  # torch's own: hooks, mostly, of which a module holds a dozen empty ones
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONTAINERS = frozenset({list, tuple, set, dict, OrderedDict, defaultdict})


class _Builder:
    """Copies modules and whatever plain containers and methods lead to them, each object once."""

    def __init__(self, memo: dict[int, Any], training: bool | None, connected: bool) -> None:
        self.memo, self.training, self.connected = memo, training, connected

    def whole(self, structure: ModelStructure) -> nn.Module:
        """Return the copy of a model, of whose modules all are made before they are filled with each other."""
        special, made = set(filter(_is_special, set(structure.kinds))), []
        for kind, (here, module) in zip(structure.kinds, structure.modules.items(), strict=True):
            if kind not in special:
                self.memo[here] = twin = _instance(kind)
                made.append((module, twin))
        for module, twin in made:
            self._fill(twin, module)
        return self.build(structure.model)

    def build(self, value: Any) -> Any:
        kind = type(value)
        if kind in _IMMUTABLE:
            return value
        if (here := id(value)) in self.memo:
            return self.memo[here]
        if kind in _CONTAINERS:
            return self._container(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.build(value.__self__))
        if type(value) is partial:
            return partial(self.build(value.func), *self.build(value.args), **self.build(value.keywords))
        return value

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._scripted(module)
        if _is_special(type(module)):
            self.memo[id(module)] = twin = self.build(module._orig_mod)
            return twin
        self.memo[id(module)] = twin = _instance(type(module))
        self._fill(twin, module)
        return twin

    def _fill(self, twin: nn.Module, module: nn.Module) -> None:
        own, memo = module.__dict__, self.memo
        state = own.copy()
        object.__setattr__(twin, "__dict__", state)
        for key, value in own.items():
            kind = type(value)
            if kind in _IMMUTABLE:
                continue
            if kind in _EMPTIED and not value and key in _OWN:
                state[key] = kind()
            elif (here := id(value)) in memo:
                state[key] = memo[here]
            else:
                state[key] = self._container(value) if kind in _CONTAINERS else self.build(value)
        if self.training is not None:
            state["training"] = self.training
        if "sparse" in state and isinstance(module, _EMBEDDINGS):
            state["sparse"] = False  # the same function; sparse gradients have no second derivative

    @restoring
    def _scripted(self, module: nn.Module) -> nn.Module:
        _refuse_scripted(module, self.connected)
        with arithmetic(False):
            twin = copy.deepcopy(module)
        for own, other in zip(module.parameters(), twin.parameters(), strict=True):
            other.requires_grad_(self.memo[id(own)].requires_grad)
            self.memo[id(own)] = other
        self.memo[id(module)] = twin
        return _in_mode(twin, self.training)

    def _tensor(self, tensor: Tensor) -> Tensor:
        """Clone what a forward may write into; keep a recorded or shared graph tensor as it is."""
        if tensor.requires_grad:
            return tensor
        self.memo[id(tensor)] = twin = tensor.detach().clone()
        return twin

    def _container(self, value: Any) -> Any:
        kind, memo = type(value), self.memo
        if kind is tuple or kind is set:
            return kind([self.build(item) for item in value])
        memo[id(value)] = twin = value.copy()
        if kind is list:
            twin[:] = [self.build(item) for item in value]
        else:
            for key, item in value.items():
                twin[key] = memo[here] if (here := id(item)) in memo else self.build(item)
        return twin
