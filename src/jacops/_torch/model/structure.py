"""What a model consists of: its modules and the tensors that they hold, in torch's order, found by one walk.

`Module.named_modules` is a generator for every level, which hands each module through all levels above it; a few walks
by it took a fifth of a small call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..._cached import cached_property
from ..._trees import is_dtensor
from ...errors import InputTypeError, ModelStateError

Held = TypeVar("Held", bound=Tensor)
_KIND = attrgetter("shape", "dtype", "device")


class ModelStructure:
    """The modules of a model and the tensors that they hold, as they are when this is made.

    A call makes one and reads from it whatever it asks of the model. None is kept for another call: modules, tensors,
    modes and hooks may be replaced meanwhile, and nothing would tell.

    Args:
        model: A module.

    Attributes:
        named_modules: `[*model.named_modules()]`.
        modules: `model.modules()`, by identity.
        kinds: Their classes.
        parameters: `dict(model.named_parameters())`.
        places: The identities of these, in the same order.
        buffers: `dict(model.named_buffers())`.
        tensors: All parameters and buffers, each once, also where the model gives other ones by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = _named_modules(model)
        self.named_modules = [*named.values()]
        self.modules = {here: module for here, (_, module) in named.items()}
        self.kinds = tuple(map(type, self.modules.values()))
        parameters = _by_first_names([(path, m._parameters) for path, m in named.values() if m._parameters])
        buffers = _by_first_names([(path, m._buffers) for path, m in named.values() if m._buffers])
        self.tensors = [tensor for _, tensor in (*parameters.values(), *buffers.values())]
        self.buffers = dict(buffers.values())
        self.parameters, self.places = dict(parameters.values()), tuple(parameters)
        kind = type(model)
        if kind.named_parameters is not _NAMED_PARAMETERS:  # FSDP has other names
            self.parameters = dict(model.named_parameters())
            self.places = tuple(map(id, self.parameters.values()))
        if kind.named_buffers is not _NAMED_BUFFERS:
            self.buffers = dict(model.named_buffers())

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """The part of the model in the key of proofs: modules, their modes and numbers of hooks, names and shapes."""
        if isinstance(self.model, PlainFunction):
            return ()
        hooked = [m for m in self.modules.values() if m._forward_hooks or m._forward_pre_hooks]
        hooks = [(id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hooked]
        names, weights = tuple(self.parameters), tuple(map(_KIND, self.parameters.values()))
        return tuple(self.modules), self.kinds, self.modes, tuple(hooks), names, weights

    @property
    def modes(self) -> tuple[bool, ...]:
        """Which modules are in train mode; a script module that is frozen has no mode."""
        try:
            return tuple([module.training for module in self.modules.values()])
        except AttributeError:
            return tuple([getattr(module, "training", False) for module in self.modules.values()])

    @property
    def settings(self) -> tuple[Any, ...]:
        """What a forward depends on besides tensors, as far as it shows here: modules, hooks, and plain attributes."""
        modules = self.modules.values()
        plain = [[(name, v) for name, v in vars(module).items() if type(v) in _WORDS] for module in modules]
        # By the numbers of their handles, which torch gives once in a process.
        hooks = [(*module._forward_hooks, *module._forward_pre_hooks) for module in modules]
        return tuple(self.modules), self.kinds, hooks, plain

    @property
    def is_spread(self) -> bool:
        """Whether parameters are spread over processes, by FSDP of either kind or as DTensors."""
        return _may_be_spread() and (any(map(_is_wrapper, self.kinds)) or any(map(is_dtensor, self.tensors)))

    @cached_property
    def differentiable(self) -> dict[str, Tensor]:
        """The parameters that can be differentiated."""
        return {name: p for name, p in self.parameters.items() if p.dtype.is_floating_point or p.dtype.is_complex}

    @property
    def trainable(self) -> list[Tensor]:
        """The parameters that require grad."""
        return [p for p in self.parameters.values() if p.requires_grad]


def _named_modules(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return `model.named_modules()`, a module and all below it with their paths, by identity."""
    found: dict[int, tuple[str, nn.Module]] = {}
    stack = [("", model)]
    while stack:
        named = stack.pop()
        path, module = named
        if (here := id(module)) not in found:
            if type(module).named_modules is not _NAMED_MODULES:  # a class with a walk of its own
                return {id(module): (path, module) for path, module in model.named_modules()}
            found[here] = named
            if module._modules:
                start = path and path + "."
                below = reversed(module._modules.items())
                stack += [(start + name, child) for name, child in below if child is not None]
    return found


def _by_first_names(held: Iterable[tuple[str, Mapping[str, Held | None]]]) -> dict[int, tuple[str, Held]]:
    """Return tensors with the first name of each, by identity, from the paths of modules and what they hold."""
    found: dict[int, tuple[str, Held]] = {}
    for path, own in held:
        start = path and path + "."
        for name, tensor in own.items():
            if tensor is not None and (here := id(tensor)) not in found:
                found[here] = start + name, tensor
    return found


_WORDS = frozenset({bool, int, float, str, type(None)})
_NAMED_MODULES = nn.Module.named_modules
_NAMED_PARAMETERS = nn.Module.named_parameters
_NAMED_BUFFERS = nn.Module.named_buffers


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


def structure_of(model: Any) -> ModelStructure:
    """Return the structure of the module behind wrappers.

    Raises:
        InputTypeError: `model` is not a module.
        ModelStateError: Its parameters are sharded over processes.
    """
    structure = ModelStructure(unwrapped(model))
    if structure.is_spread:
        raise _sharded(structure.model)
    return structure


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
    return isinstance(model, nn.Module) and _may_be_spread() and ModelStructure(model).is_spread


def _may_be_spread() -> bool:
    """Return whether what spreads parameters was loaded; `import torch` does not load it."""
    return "torch.distributed.tensor" in sys.modules or "torch.distributed.fsdp" in sys.modules


def is_wrapped(module: nn.Module) -> bool:
    """Return whether FSDP, of either kind, manages the parameters of this module."""
    return _is_wrapper(type(module))


def _is_wrapper(kind: type) -> bool:
    return kind.__name__ == "FullyShardedDataParallel" or is_managed(kind)


def is_managed(kind: type) -> bool:
    """Return whether a class is one that FSDP of the second kind made of another one."""
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


def structure_by_inputs(model: Any) -> ModelStructure:
    """Return the structure of what is differentiated by its inputs: of a module, or of a plain function as one."""
    plain = callable(model) and not isinstance(model, type | nn.Module)
    return ModelStructure(PlainFunction(model)) if plain else structure_of(model)


def _sharded(module: nn.Module) -> ModelStateError:
    came = f"a {type(module).__name__}, whose parameters are sharded over processes (FSDP or DTensor)"
    needed = "this call needs whole parameters"
    todo = f"{SHARDED_CALLS} take sharded ones. Else load `full_state_dict`s into a module that is not sharded."
    return ModelStateError.of("model", came, needed, todo)


SHARDED_CALLS = "`jvp`, `vjp`, `model_jvp`, `model_vjp`, `hvp` and `ggnvp`"


def check_state(structure: ModelStructure) -> None:
    """Refuse parameters that have no values here.

    Raises:
        ModelStateError: A parameter or buffer is lazy or on the meta device.
    """
    for tensor in structure.tensors:
        if tensor.layout is not torch.strided or tensor.is_meta or (type(tensor) not in _PLAIN and _is_lazy(tensor)):
            break
    else:
        return
    model = structure.model
    for name, tensor in [*structure.parameters.items(), *structure.buffers.items()]:
        if _is_lazy(tensor):
            owner = _owner(model, name)
            came = f"not initialised ({owner} is lazy)"
            raise ModelStateError.of(name, came, "a parameter needs its values", "Run one forward pass first.")
        if tensor.layout is not torch.strided:
            todo = "Make it dense with `.to_dense()`, or keep a sparse matrix as a plain attribute, not registered."
            raise ModelStateError.of(name, f"of layout {tensor.layout}", "parameters and buffers must be dense", todo)
        if tensor.is_meta:
            came = "on the meta device"
            raise ModelStateError.of(name, came, "a derivative needs values", "Load or initialise the weights first.")


_is_lazy = torch.nn.parameter.is_lazy
_PLAIN = (nn.Parameter, Tensor)


def _owner(model: nn.Module, name: str) -> str:
    path = name.rpartition(".")[0]
    return f"module '{path}' ({type(model.get_submodule(path)).__name__})"


def parameter_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that can be differentiated, tied ones once, by their first names."""
    return ModelStructure(model).differentiable
