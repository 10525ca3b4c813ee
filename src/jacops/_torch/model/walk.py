"""Modules of a model and their parameters, in torch's order, by one loop.

`Module.named_modules` is a generator for every level, which hands each module through all levels above it; walks by it
took a fifth of a small call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return `list(model.modules())`: a module and all below it, each once."""
    return [module for _, module in named_modules_of(model)]


def named_modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return `list(model.named_modules())`: a module and all below it with their paths, each once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) not in found:
            if type(module).named_modules is not _NAMED_MODULES:  # a class with a walk of its own
                return list(model.named_modules())
            found[id(module)] = path, module
            if module._modules:
                start = path and path + "."
                below = reversed(module._modules.items())
                stack += [(start + name, child) for name, child in below if child is not None]
    return list(found.values())


def named_parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return `dict(model.named_parameters())`: parameters by their first names."""
    if type(model).named_parameters is not _NAMED_PARAMETERS:  # FSDP has other names
        return dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in named_modules_of(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}" if path else name] = parameter
    return found


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers that modules hold themselves."""
    for module in modules:
        for held in (module._parameters, module._buffers):
            if held:
                yield from (tensor for tensor in held.values() if tensor is not None)


_NAMED_MODULES = nn.Module.named_modules
_NAMED_PARAMETERS = nn.Module.named_parameters
