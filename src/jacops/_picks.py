"""`parameters=`: which parameters of a model a derivative is by, for every public call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ._ladder.protocol import Picked, is_framework_model
from ._requirements import check_choice
from ._torch.protocol import bare, parameter_names
from ._words import Wrt
from .errors import InputError, InputTypeError

Picks = str | Tensor | Iterable[str | Tensor] | Picked | None
Variable = Wrt | Picked


def trainable(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter requires grad: the default set for curvature."""
    return getattr(parameter, "requires_grad", True)  # arrays of other frameworks have no such mark


def picked(model: Any, parameters: Picks, default: Picked = trainable) -> Picked:
    """Return a function of name and parameter that is true for those that `parameters` selects.

    Args:
        model: A module, or a model of another framework.
        parameters: None for the default, `"trainable"`, name patterns (`fnmatch`: `"head.*"`), tensors that are
            parameters of the model, or a function of name and parameter.
        default: What None means.

    Raises:
        InputError: A pattern fits no parameter, or a tensor is none; the message holds the nearest names.
        InputTypeError: `parameters` is of the wrong kind.
    """
    if parameters is None or isinstance(parameters, str) and parameters == "trainable":
        return default if parameters is None else trainable
    named = dict(_named(model))
    if isinstance(parameters, nn.Module):
        came = f"a {type(parameters).__name__} module"
        raise InputTypeError.of("parameters", came, _NEEDED, "Pass `module.parameters()`.")
    if callable(parameters) and not isinstance(parameters, Tensor):
        if named and not any(parameters(name, value) for name, value in named.items()):
            known = ", ".join(list(named)[:3])
            raise InputError.of("parameters", "a function that picks none", f"there are {len(named)}, such as {known}")
        return parameters
    first: dict[int, str] = {}
    for name, value in named.items():
        first.setdefault(id(value), name)
    names = {first[id(named[name])] for entry in _entries(parameters) for name in _fitting(entry, named)}
    return lambda name, _: name in names


def variable(model: Any, wrt: Wrt, parameters: Picks) -> Variable:
    """Return what a derivative is by: `wrt`, or a function that picks some of the parameters.

    Raises:
        InputError: `wrt` is none of the known, or picks the inputs where `parameters` are given.
        InputTypeError: `parameters` is of the wrong kind.
    """
    check_choice("wrt", wrt, Wrt, " (and `parameters=` for some of the parameters)")
    if parameters is None:
        return wrt
    if wrt == "inputs":
        raise InputError.of("parameters", repr(parameters), "with `wrt='inputs'` no parameter is differentiated by")
    return picked(model, parameters)


def differentiated(by: Variable) -> Picked | None:
    """Return which parameters a derivative is by, None for the inputs."""
    if callable(by):
        return by
    return trainable if by == "parameters" else None


def _named(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield parameters by name, tied ones by each of their names."""
    if is_framework_model(model):
        yield from model.named()
        return
    module = bare(model)
    known = {id(p) for p in parameter_names(module).values()}
    yield from ((name, p) for name, p in module.named_parameters(remove_duplicate=False) if id(p) in known)


def _entries(parameters: Any) -> list[Any]:
    if isinstance(parameters, str | Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable):
        raise InputTypeError.of("parameters", f"a {type(parameters).__name__}", _NEEDED)
    entries = list(parameters)
    if not entries:
        raise InputError.of("parameters", "empty", _NEEDED)
    return entries


def _fitting(entry: Any, named: dict[str, Any]) -> list[str]:
    """Return the names that match a pattern, or those of a tensor."""
    if isinstance(entry, str):
        found = [name for name in named if name == entry] or [name for name in named if fnmatchcase(name, entry)]
        if not found:
            near = get_close_matches(entry, named, 3, 0.4) or list(named)[:3]
            raise InputError.of("parameters", repr(entry), f"no parameter fits; the nearest are {', '.join(near)}")
        return found
    found = [name for name, value in named.items() if value is entry]
    if not found and not hasattr(entry, "shape"):
        raise InputTypeError.of("parameters", f"an entry of type {type(entry).__name__}", _NEEDED)
    if not found:
        alike = [name for name, value in named.items() if value.shape == entry.shape] or list(named)
        came, todo = (
            f"a tensor {tuple(entry.shape)} that is no parameter of the model",
            f"Alike: {', '.join(alike[:3])}.",
        )
        raise InputError.of("parameters", came, "the model's own tensors are needed, not copies", todo)
    return found


_NEEDED = "name patterns, parameters of the model, 'trainable' or a function of name and parameter are needed"
