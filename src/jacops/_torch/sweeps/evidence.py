"""What a remembered proof depends on: the recorded graph, and the entries whose value can hide a path through it.

A proof made where a weight was nonzero survives training; only a value that removes a path can hide one. So a proof
holds while the wiring and the sizes of the graph are the same, and while entries of parameters, buffers and small
constants that were neutral (0, 1 or -1: `g * h`, `(1 - g) * h`, `(1 + g) * h`) still are. Integers and masks count by
value.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..._runtime.restoring import modes_at_work
from .graph import is_dense, saved_tensors

Places = tuple[tuple[int, str], ...]
"""Nodes of a graph by their places in its walk, and which saved tensor of each."""

# Larger tensors take longer to read than a small model's sweep; 2**16 entries take about 20 microseconds.
_MOST = 2**16
_CONTAINERS, _LONGEST = 2, 256  # lists in lists are looked into, and those of so many entries at the most
_MODULES = ("_parameters", "_buffers", "_modules")  # looked at by themselves
_DEPTH = 3  # partial(...), bound methods and closures of one another: users nest a decorator and a partial at most


@contextmanager
def _unseen() -> Iterator[None]:
    """Read tensors without a graph, and past modes that watch a forward this may happen in."""
    modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad(), torch._C.DisableTorchFunction(), modes:  # pyright: ignore[reportAttributeAccessIssue]
        yield


# ---- constants in the graph ----------------------------------------------------------------------------------------


def constants(
    nodes: Mapping[Any, int], function: Any, many: int | None = None, others: Mapping[Any, int] | None = None
) -> Places:
    """Return where the graph keeps small tensors that do not vary with the number of samples.

    Args:
        nodes: A graph, as `graph_info` numbers it.
        function: What was recorded; its own tensors are left out, `Stored` is about them.
        many: Samples in it, which the shapes of tensors are compared with; None where that is not known.
        others: A graph of the same wiring for another number of samples: what has the same shape there is constant.
    """
    with _unseen():
        own = {_storage(tensor) for _, tensor in _tensors(function)}
        own |= {_storage(node.variable) for node in nodes if hasattr(node, "variable")}
        there = {} if others is None else {(place, name): tensor.shape for place, name, tensor in _saved(others)}
        return tuple(
            (place, name)
            for place, name, tensor in _saved(nodes)
            if _storage(tensor) not in own
            and (there.get((place, name)) == tensor.shape if others is not None else not _by_sample(tensor, many))
        )


def _saved(nodes: Mapping[Any, int]) -> Iterator[tuple[int, str, Tensor]]:
    for node, place in nodes.items():
        for name, tensor in saved_tensors(node):
            seen = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested)
            if seen and 0 < tensor.numel() <= _MOST and name not in _DIVISORS:
                yield place, name, tensor


# The sum of weights in a cross-entropy: gradients are divided by it, so that no value of it hides a path. It would be
# read in every recording of such a loss, in all as long as a layer's pass.
_DIVISORS = frozenset({"_saved_total_weight"})


def pattern(nodes: Sequence[Any], places: Places) -> bytes:
    """Return which entries of some saved tensors are neutral; integers and masks by value."""
    if not modes_at_work():  # what is read has no graph, and the context takes longer
        return _pattern(nodes, places)
    with _unseen():
        return _pattern(nodes, places)


def _pattern(nodes: Sequence[Any], places: Places) -> bytes:
    found: list[bytes] = []
    away: list[Tensor] = []  # fetched together: each transfer waits for the device
    for place, name in places:
        tensor = _read(nodes[place], name)
        if tensor is None or not (size := tensor.numel()):
            continue
        here = tensor.device.type == "cpu" and type(tensor) is Tensor
        if here and size == 1 and tensor.is_floating_point():  # the usual case: a factor, a sum of weights
            found.append(bytes(_marks(tensor.item())))
        elif here and tensor.dtype in _OF_NUMPY:
            array: Any = tensor.detach().resolve_neg().numpy()  # small as these are, torch takes ten times as long
            found += [array.tobytes()] if array.dtype.kind != "f" else [part.tobytes() for part in _marks(array)]
        else:
            exact = not (tensor.is_floating_point() or tensor.is_complex())
            away += [tensor] if exact else _marks(tensor.detach())
    flat = [part.reshape(-1).contiguous().view(torch.uint8) for part in away]
    return b"".join([*found, torch.cat(flat).cpu().numpy().tobytes()] if flat else found)


_OF_NUMPY = frozenset({torch.float32, torch.float64, torch.bool, torch.int64, torch.int32, torch.uint8})


def _marks(values: Any) -> list[Any]:
    return [values == 0, values == 1]


def _read(node: Any, name: str) -> Tensor | None:
    name, _, number = name.partition(".")
    try:
        value = getattr(node, name)
    except RuntimeError:  # freed, or written into since
        return None
    value = value[int(number)] if number and value is not None and int(number) < len(value) else value
    if not isinstance(value, Tensor) or value.is_nested:
        return None
    return value.clone() if value._is_zerotensor() else value  # implicit zeros count as the zeros they are


def _by_sample(tensor: Tensor, many: int | None) -> bool:
    if many is None or many < 2 or tensor.ndim == 0:
        return tensor.ndim > 0
    first = tensor.shape[0]
    return many in tensor.shape[:2] or (first > many and first % many == 0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if is_dense(tensor) else id(tensor)


# ---- tensors that a model or function holds -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor is held: in which entries of which object, and under which name."""

    owner: weakref.ref[Any]
    kind: str
    name: Any


@dataclass(frozen=True, eq=False)
class NeutralEntries:
    """Entries of one tensor that were neutral when a proof was made.

    Attributes:
        place: Where it is held.
        where: Which entries of it, laid end to end.
        values: Their values.
        like: Shape and dtype.
    """

    place: Place
    where: Tensor | slice
    values: Tensor
    like: tuple[torch.Size, torch.dtype]

    def holds(self, tensor: Tensor | None) -> bool:
        """Return whether these entries of a tensor are unchanged; None means a tensor that no longer exists."""
        if tensor is None or (tensor.shape, tensor.dtype) != self.like:
            return False
        return torch.equal(_flat(tensor)[self.where], self.values)


def neutral(function: Any) -> list[NeutralEntries]:
    """Return the neutral entries of all tensors that a model holds, or that a function reads from outside."""
    found = []
    with _unseen():
        for place, tensor in _tensors(function):
            kept = _stored(place, tensor)
            if kept is not None:
                found.append(kept)
    return found


def hold(found: Sequence[NeutralEntries]) -> bool:
    """Return whether all of these entries are what they were."""
    if not found:
        return True
    looked_up: dict[tuple[int, str], Mapping[Any, Any]] = {}
    with _unseen():
        for kept in found:
            owner, kind, name = kept.place.owner(), kept.place.kind, kept.place.name
            if owner is None:
                return False
            key = (id(owner), kind)
            entries = looked_up.get(key)
            if entries is None:
                entries = looked_up[key] = _ENTRIES[kind](owner)
            tensor = entries[name] if name in entries else None  # noqa: SIM401 - a ScriptModule's mapping has no `get`
            if not kept.holds(tensor) and not _is_log(name, kept, tensor):
                return False
    return True


def _is_log(name: Any, kept: NeutralEntries, tensor: Tensor | None) -> bool:
    """Return whether a list of numbers has another length: what grows with every call is no table of indices."""
    listed = isinstance(name, tuple) and name[-1] is list
    return listed and (tensor is None or tensor.shape != kept.like[0])


def _stored(place: Place, tensor: Tensor) -> NeutralEntries | None:
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return None
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    if whole and tensor.dtype is not torch.bool and tensor.ndim == 0:
        return None  # a counter, such as BatchNorm's, which every training step changes
    flat, like = _flat(tensor), (tensor.shape, tensor.dtype)
    is_neutral = None if whole else (flat == 0) | (flat == 1) | (flat == -1)
    if is_neutral is None or bool(is_neutral.all()):
        where: Tensor | slice = slice(None, None, max(1, len(flat) // _MOST))
    else:
        where = is_neutral.nonzero().view(-1)
        where = where[:: max(1, len(where) // _MOST)]
        if not len(where):
            return None
    return NeutralEntries(place, where, flat[where].clone(), like)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).reshape(-1)


def _tensors(function: Any) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors that are read from outside, each with the place where it is held."""
    seen: set[int] = set()
    for owner, kind in _owners(function, _DEPTH):
        for name, value in list(_ENTRIES[kind](owner).items()):
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield Place(weakref.ref(owner), kind, name), value


def _held(entries: Mapping[Any, Any], depth: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    """Yield the tensors in a mapping, and in the lists, tuples and mappings in it; numbers and tables as tensors."""
    for name, value in list(entries.items()):
        tensor = _as_tensor(value)
        if tensor is not None:
            yield (*path, name, list) if type(value) is list else (*path, name), tensor
        elif depth and type(value) in (list, tuple, dict) and len(value) <= _LONGEST and name not in _MODULES:
            inner = value if isinstance(value, dict) else dict(enumerate(value))
            yield from _held(inner, depth - 1, (*path, name))


def captured(function: Any) -> dict[str, Any]:
    """Return what a Python function reads from its closure, its defaults and the module it was written in."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    known = getattr(function, "__globals__", {})
    found = {name: known[name] for name in code.co_names if name in known}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    found |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    return found | {f"default {name}": value for name, value in (function.__kwdefaults__ or {}).items()}


# The places of an object in which tensors are kept, each as a mapping.
_ENTRIES: dict[str, Callable[[Any], Mapping[Any, Any]]] = {
    "parameters": lambda owner: owner._parameters,
    "buffers": lambda owner: owner._buffers,
    "attributes": lambda owner: dict(_held(vars(owner), _CONTAINERS)),
    "captured": lambda owner: dict(_held(captured(owner), _CONTAINERS)),
}


def _as_tensor(value: Any) -> Tensor | None:
    """Return a tensor, an array, a factor or a list of indices as a tensor; None for anything else.

    Single whole numbers and flags are left out: they are counters, or they show in the graph.
    """
    if isinstance(value, Tensor):
        return value
    if type(value) is float:
        return torch.tensor(value, dtype=torch.float64)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype != np.uint64:
        return torch.tensor(value) if value.size <= _MOST else None
    indices = type(value) in (list, tuple) and 1 < len(value) <= _LONGEST and all(type(v) is int for v in value)
    return torch.tensor(value) if indices else None


def _is_of_torch(defined: Any) -> bool:
    return str(defined.__module__).partition(".")[0] == "torch"


def _methods(module: nn.Module) -> Iterator[Any]:
    """Yield the functions that a module of the user's runs: its methods, and those among its attributes."""
    for kind in type(module).__mro__:
        if not _is_of_torch(kind):
            yield from (value for value in vars(kind).values() if inspect.isfunction(value))
    for value in vars(module).values():
        value = value.__func__ if inspect.ismethod(value) else value
        if inspect.isfunction(value):
            yield value


def _owners(function: Any, depth: int) -> Iterator[tuple[Any, str]]:
    if isinstance(function, nn.Module):
        for module in function.modules():
            yield module, "parameters"
            yield module, "buffers"
            if depth and not isinstance(module, torch.jit.ScriptModule) and not _is_of_torch(type(module)):
                yield module, "attributes"  # those of torch's own modules show in the graph
                for method in _methods(module):
                    yield method, "captured"
    elif depth and isinstance(function, partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield from _owners(part, depth - 1)
    elif depth and inspect.ismethod(function):
        yield from _owners(function.__self__, depth - 1)
        yield from _owners(function.__func__, depth - 1)
    elif depth and inspect.isfunction(function):
        if _is_of_torch(function) and function.__closure__ is None:
            return  # what torch's own functions read besides their arguments shows in the graph
        yield function, "captured"
        for value in captured(function).values():
            if isinstance(value, nn.Module | partial) or inspect.isfunction(value) or inspect.ismethod(value):
                yield from _owners(value, depth - 1)
    elif depth and hasattr(function, "__dict__") and not isinstance(function, type):
        yield function, "attributes"
