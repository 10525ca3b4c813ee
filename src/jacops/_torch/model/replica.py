"""A private copy of a model's structure: the same forward over its own parameters, buffers, modes and attributes.

Swapping parameters inside the caller's module (as `functional_call` does) is not safe between threads and lets
forwards write into the caller's buffers; a deep copy copies the weights and fails on locks and cached activations.
A replica copies the skeleton only: modules, the containers that hold them, and bound methods of them. Weights are
shared in memory, buffers are cloned, anything else is shared as it is.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..._runtime.contexts import arithmetic, out_of_inference
from ..._runtime.restoring import restoring
from ..._trees import is_dtensor
from ...errors import InputTypeError, ModelStateError
from .walk import modules_of, named_parameters_of, tensors_of


@dataclass(frozen=True)
class Replica:
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


def bare(model: Any) -> nn.Module:
    """Return the module behind wrappers that do not change what it computes.

    Raises:
        InputTypeError: `model` is not a module.
        ModelStateError: Its parameters are sharded over processes.
    """
    module = unwrapped(model)
    if is_sharded(module):
        raise _sharded(module)
    return module


def unwrapped(model: Any) -> nn.Module:
    """Return the module behind wrappers; its parameters may be sharded.

    Raises:
        InputTypeError: `model` is not a module.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        came = f"the class {model.__name__}"
        raise InputTypeError.of("model", came, "a module is needed", f"Did you mean {model.__name__}()?")
    if not isinstance(model, nn.Module):
        todo = _FUNCTIONS if callable(model) else ""
        raise InputTypeError.of("model", f"a {type(model).__name__}", "a torch.nn.Module is needed", todo)
    kind = type(model).__name__
    if kind in ("DataParallel", "DistributedDataParallel"):
        return unwrapped(model.module)
    if kind == "OptimizedModule":
        return unwrapped(model._orig_mod)
    return model


def is_sharded(model: Any) -> bool:
    """Return whether a model's parameters are spread over processes: by FSDP of either kind, or as DTensors."""
    if not isinstance(model, nn.Module) or not any(name in sys.modules for name in _SPREADING):
        return False  # nobody has made such a thing: nothing is walked through
    modules = modules_of(model)
    return any(map(is_wrapped, modules)) or any(is_dtensor(tensor) for tensor in tensors_of(modules))


# Modules of torch without which nothing is sharded; `import torch` loads none of them.
_SPREADING = frozenset({"torch.distributed.tensor", "torch.distributed.fsdp"})


def is_wrapped(module: nn.Module) -> bool:
    """Return whether FSDP, of either kind, manages the parameters of this module."""
    return type(module).__name__ == "FullyShardedDataParallel" or _manages(type(module))


def _manages(kind: type) -> bool:
    return any(parent.__name__ == "FSDPModule" for parent in kind.__mro__)


_FUNCTIONS = (
    "Write `jacops.Function(f, params)` for a function `f(params, x)`; a plain `f(x)` is differentiated by its inputs, "
    "with `wrt='inputs'` where a call has that."
)


class PlainFunction(nn.Module):
    """A function `f(x)` as a model without parameters.

    Args:
        function: Any callable.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what it returns."""
        return self.function(*args, **kwargs)


def by_inputs(model: Any) -> nn.Module:
    """Return the module that is differentiated by its inputs: `bare`, or a plain function as one."""
    plain = callable(model) and not isinstance(model, type | nn.Module)
    return PlainFunction(model) if plain else bare(model)


def _sharded(module: nn.Module) -> ModelStateError:
    came = f"a {type(module).__name__}, whose parameters are sharded over processes (FSDP or DTensor)"
    needed = "this call needs whole parameters"
    todo = f"{SHARDED_CALLS} take sharded ones. Else load `full_state_dict`s into a module that is not sharded."
    return ModelStateError.of("model", came, needed, todo)


SHARDED_CALLS = "`jvp`, `vjp`, `model_jvp`, `model_vjp`, `hvp` and `ggnvp`"


def check_state(model: nn.Module) -> None:
    """Refuse parameters that have no values here.

    Raises:
        ModelStateError: A parameter or buffer is lazy or on the meta device.
    """
    if all(map(_has_values, tensors_of(modules_of(model)))):
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            owner = _owner(model, name)
            came = f"not initialised ({owner} is lazy)"
            raise ModelStateError.of(name, came, "a parameter needs its values", "Run one forward pass first.")
        if tensor.layout is not torch.strided:
            todo = "Make it dense with `.to_dense()`, or keep a sparse matrix as a plain attribute, not registered."
            raise ModelStateError.of(name, f"of layout {tensor.layout}", "parameters and buffers must be dense", todo)
        if tensor.is_meta:
            came = "on the meta device"
            raise ModelStateError.of(name, came, "a derivative needs values", "Load or initialise the weights first.")


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not torch.nn.parameter.is_lazy(tensor)


def _owner(model: nn.Module, name: str) -> str:
    path = name.rpartition(".")[0]
    return f"module '{path}' ({type(model.get_submodule(path)).__name__})"


def parameter_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that can be differentiated, tied ones once, by their first names."""
    return {n: p for n, p in named_parameters_of(model).items() if has_derivatives(p)}


def has_derivatives(parameter: Tensor) -> bool:
    """Return whether a parameter can be differentiated."""
    return parameter.is_floating_point() or parameter.is_complex()


@restoring
def replicate(
    model: nn.Module,
    *,
    wrt: Callable[[str, Tensor], bool] = lambda name, parameter: False,
    training: bool | None = None,
    connected: bool = False,
    cloned: bool = False,
    copies: Mapping[int, Tensor] | None = None,
) -> Replica:
    """Return a replica of `model`.

    Args:
        model: The caller's module, not changed.
        wrt: Which parameters are differentiated, by name and value.
        training: Mode for every module; None keeps each one's own.
        connected: Keep the copies connected to the caller's parameters in the graph, instead of fresh leaves.
        cloned: Copy the weights too, for forwards that write into them.
        copies: Take these in place of the caller's parameters, by identity.
    """
    model = bare(model)
    if isinstance(model, torch.jit.ScriptModule):
        return _scripted(model, wrt, training, connected)
    originals: dict[str, Tensor] = {}
    memo: dict[int, Any] = {}
    builder = _Builder(memo, training, connected)
    with arithmetic(True):
        for name, parameter in named_parameters_of(model).items():
            known = has_derivatives(parameter)
            if known:
                originals[name] = parameter
            values = (copies or {}).get(id(parameter), parameter)
            memo[id(parameter)] = _copied(parameter, values, known and wrt(name, parameter), connected, cloned)
        module = builder.build(model)
    return Replica(module, {n: memo[id(p)] for n, p in originals.items()}, originals)


@restoring
def skeleton(model: nn.Module, stand_ins: Mapping[int, Tensor]) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Return a copy of a model with other tensors for its parameters, by identity, and the copies of its modules.

    FSDP's classes and hooks, which gather parameters, are left behind; the caller's own hooks are not.
    """
    memo: dict[int, Any] = dict(stand_ins)
    with arithmetic(True):
        twin = _Builder(memo, None, False).build(model)
    twins: dict[int, nn.Module] = {id(module): memo[id(module)] for module in modules_of(model)}
    for module in twins.values():
        if is_wrapped(module):
            module.__class__ = next(
                kind for kind in type(module).__mro__[1:] if issubclass(kind, nn.Module) and not _manages(kind)
            )
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if getattr(hook, "__module__", "").startswith(_FSDP)]:
                del hooks[number]
    return twin, twins


_FSDP = "torch.distributed.fsdp"


def _copied(parameter: Tensor, values: Tensor, differentiated: bool, connected: bool, cloned: bool) -> Tensor:
    if connected and differentiated and (kept := out_of_inference(parameter)).requires_grad:
        return kept.clone() if cloned else kept.view_as(kept)
    values = out_of_inference(values)
    private = values.detach().clone() if cloned else values.detach()
    if type(parameter) in (nn.Parameter, Tensor):
        return nn.Parameter(private, requires_grad=differentiated)
    return private.requires_grad_(differentiated)


@restoring
def _scripted(model: nn.Module, wrt: Callable[[str, Tensor], bool], training: bool | None, connected: bool) -> Replica:
    """TorchScript modules live outside Python: only their own deep copy copies them."""
    _refuse_scripted(model, connected)
    with arithmetic(False):
        module, originals = copy.deepcopy(model), parameter_names(model)
    private = parameter_names(module)
    for name, parameter in private.items():
        parameter.requires_grad_(wrt(name, originals[name]))
    return Replica(_in_mode(module, training), private, originals)


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


def _instance(kind: type[nn.Module]) -> nn.Module:
    """Return an instance of exactly this class: a `__new__` of its own may return another (torch.fx makes a class)."""
    try:
        return object.__new__(kind)
    except TypeError:  # a class with another base written in C
        return kind.__new__(kind)


_IMMUTABLE = frozenset({bool, int, float, str, type(None)})
_EMPTIED = frozenset({dict, OrderedDict, set})
_OWN = frozenset(nn.Module().__dict__)  # torch's own: hooks, mostly, of which a module holds a dozen empty ones
_CONTAINERS = frozenset({list, tuple, set, dict, OrderedDict, defaultdict})


class _Builder:
    """Copies modules and whatever plain containers and methods lead to them, each object once."""

    def __init__(self, memo: dict[int, Any], training: bool | None, connected: bool) -> None:
        self.memo, self.training, self.connected = memo, training, connected

    def build(self, value: Any) -> Any:
        kind = type(value)
        if kind in _IMMUTABLE:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
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
        if type(module).__name__ == "OptimizedModule":
            return self.build(module._orig_mod)
        if isinstance(module, torch.jit.ScriptModule):
            return self._scripted(module)
        twin = _instance(module.__class__)
        self.memo[id(module)] = twin
        state = twin.__dict__
        for key, value in module.__dict__.items():
            kind = type(value)
            if kind in _IMMUTABLE:
                state[key] = value
            elif kind in _EMPTIED and not value and key in _OWN:
                state[key] = kind()
            else:
                state[key] = self.build(value)
        if self.training is not None:
            twin.__dict__["training"] = self.training
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            twin.__dict__["sparse"] = False  # the same function; sparse gradients have no second derivative
        return twin

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
        kind = type(value)
        if not value and kind is not defaultdict:  # copy.copy is slow
            self.memo[id(value)] = twin = kind()
            return twin
        if kind is tuple or kind is set:
            return kind(self.build(item) for item in value)
        self.memo[id(value)] = twin = value.copy()
        if isinstance(value, list):
            twin[:] = [self.build(item) for item in value]
        else:
            for key, item in value.items():
                twin[key] = self.build(item)
        return twin
