"""What a run's numbers depend on, as short digests: tensors, modules, functions, data in their order (BLAKE2b).

Digests are compared between processes, so nothing enters them that differs from one to the next: no addresses, no
order of sets, no hashes that Python salts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import types
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._keywords import keywords
from ._trees import flatten
from .errors import InputError, InputTypeError

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(...))


class DataDigest:
    """A digest of batches that is updated batch by batch during a pass.

    Batches are any trees of tensors, NumPy arrays, numbers and strings. Their order and their borders count.

    Example:
        >>> digest = DataDigest()
        >>> for batch in [(torch.ones(2, 3), torch.zeros(2))]:
        ...     digest.update(batch)
        >>> len(digest.hexdigest())
        32
    """

    def __init__(self) -> None:
        self._hash = _new()
        self.batches = 0

    def update(self, batch: Any) -> None:
        """Update the digest with the next batch.

        Raises:
            InputTypeError: A leaf is of a kind that has no digest.
            InputError: A leaf is a tensor without values (lazy, meta), or sparse.
        """
        name = f"batch {self.batches}"
        leaves, tree = flatten(batch, name)
        _update(self._hash, ["batch", [leaf.removeprefix(name) for leaf in tree.names]])
        for leaf, path in zip(leaves, tree.names, strict=True):
            if not isinstance(leaf, (Tensor, np.ndarray, *_PLAIN)):
                todo = "Give the data a name of your own: digest_data(..., data_id=...)."
                raise InputTypeError.of(path, f"a {type(leaf).__name__}", "tensors or plain values are needed", todo)
            _take(self._hash, leaf, path)
        self.batches += 1

    def hexdigest(self) -> str:
        """Return the digest of all batches so far, 32 hexadecimal digits."""
        return self._hash.hexdigest()


@keywords()
def digest_data(batches: Iterable[Any], data_id: str | None = None) -> str:
    """Return a digest of batches in their order; with `data_id`, that name instead, and nothing is read.

    Args:
        batches: Trees of tensors, NumPy arrays, numbers and strings.
        data_id: The caller's own name for data too large to read for this; it must change whenever the data do.

    Returns:
        Hexadecimal digits, or `id:` and the name.

    Raises:
        InputTypeError: A leaf is of a kind that has no digest.
        InputError: A leaf is a tensor without values (lazy, meta), or sparse.

    Example:
        >>> digest_data([torch.zeros(2)]) == digest_data([torch.zeros(2)]), digest_data([], "cells-2024")
        (True, 'id:cells-2024')
    """
    if data_id is not None:
        return f"id:{data_id}"
    digest = DataDigest()
    for batch in batches:
        digest.update(batch)
    return digest.hexdigest()


def byte_view(tensor: Tensor) -> Tensor:
    """Return a tensor's entries in row-major order as bytes, `(bytes,)` of uint8, whatever its strides."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    # One entry counts as contiguous whatever its stride is; as bytes its stride must be 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


@keywords()
def digest_tensors(named: Mapping[str, Tensor | np.ndarray]) -> str:
    """Return a digest of tensors by name: dtypes, shapes and bytes, in the order of the names.

    Args:
        named: Tensors or arrays by name.

    Returns:
        Hexadecimal digits.

    Raises:
        InputError: A tensor has no values of its own (lazy, meta), or is sparse.

    Example:
        >>> digest_tensors({"a": torch.zeros(2)}) == digest_tensors({"a": torch.zeros(2).double()})
        False
    """
    found = _new()
    for name in sorted(named):
        _update(found, name)
        _take(found, named[name], name)
    return found.hexdigest()


@keywords()
def digest_module(module: nn.Module) -> str:
    """Return a digest of a module: classes, plain settings and modes of all its parts, parameters, buffers.

    Not included are the code of its `forward` and objects that are neither modules nor plain values.

    Args:
        module: Any module.

    Returns:
        Hexadecimal digits.

    Raises:
        InputError: A parameter has no values yet.

    Example:
        >>> model = torch.nn.Dropout(0.1)
        >>> digest_module(model.train()) == digest_module(model.eval())
        False
    """
    found = _new()
    for name, part in module.named_modules(remove_duplicate=False):
        _update(found, [name, *_kind(part), _settings(part)])
    tensors = dict(module.named_parameters(remove_duplicate=False))
    _update(found, digest_tensors(tensors | dict(module.named_buffers(remove_duplicate=False))))
    return found.hexdigest()


@keywords()
def digest_function(function: Callable[..., Any]) -> str:
    """Return a digest of a function such as a loss: its name, bytecode, defaults and what it closes over.

    Modules are included by `digest_module`. What a function reads from its module's globals is not included, and other
    versions of Python compile to other bytecode.

    Args:
        function: A function, method, partial or callable object.

    Returns:
        Hexadecimal digits.

    Raises:
        InputError: It closes over a tensor without values.

    Example:
        >>> digest_function(lambda x: 2 * x) == digest_function(lambda x: 3 * x)
        False
    """
    found = _new()
    _take(found, function, "function")
    return found.hexdigest()


@keywords()
def surroundings(device: object = "cpu") -> dict[str, str]:
    """Return versions, threads and device, a change of which should alter results only by rounding.

    Args:
        device: The device of the run, as text or as `torch.device`.

    Returns:
        Python, threads, device, and the versions of jacops, torch and NumPy.

    Example:
        >>> sorted(surroundings())
        ['device', 'jacops', 'numpy', 'python', 'threads', 'torch']
    """
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads()), "device": str(device)}
    for package in ("jacops", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _new() -> Any:
    return hashlib.blake2b(digest_size=16)


def _update(found: Any, value: Any) -> None:
    """Take in something small, in a form whose end is known."""
    text = json.dumps(value).encode()
    found.update(len(text).to_bytes(8, "little") + text)


def _take(found: Any, value: Any, name: str, around: tuple[int, ...] = ()) -> None:
    """Take in a value by its kind; `around` holds the functions and containers it is inside of."""
    if id(value) in around:
        _update(found, "itself")
        return
    inside = (*around, id(value))
    if isinstance(value, Tensor | np.ndarray):
        _take_array(found, value, name)
    elif isinstance(value, _PLAIN):
        _update(found, [type(value).__name__, repr(value)])
    elif isinstance(value, nn.Module):
        _update(found, digest_module(value))
    elif isinstance(value, types.CodeType):
        _update(found, [value.co_name, value.co_code.hex(), list(value.co_names)])
        _take(found, value.co_consts, name, inside)
    elif isinstance(value, list | tuple):
        _update(found, [type(value).__name__, len(value)])
        for part in value:
            _take(found, part, name, inside)
    elif isinstance(value, dict):
        _take(found, list(value.items()), name, inside)
    elif isinstance(value, set | frozenset):
        _update(found, sorted(map(repr, value)))
    else:
        _take_callable(found, value, name, inside)


def _take_callable(found: Any, value: Any, name: str, inside: tuple[int, ...]) -> None:
    if isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        empty = types.CellType()  # of a name that has no value yet
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != empty]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    else:  # a built-in, a class, an object: its type and its plain values
        parts = []
    _update(found, [*_kind(value), _settings(value)])
    for part in parts:
        _take(found, part, name, inside)


def _take_array(found: Any, value: Tensor | np.ndarray, name: str) -> None:
    if isinstance(value, Tensor):
        if is_lazy(value) or value.is_meta or value.layout != torch.strided:
            came = "a lazy, meta or sparse tensor"
            raise InputError.of(name, came, "values are needed for its digest", "Load it, or `.to_dense()` it.")
        dtype, plain = str(value.dtype).removeprefix("torch."), value.detach().as_subclass(Tensor)
        raw = byte_view(plain.cpu()).numpy()
    else:
        if value.dtype.kind not in "biufc":
            raise InputTypeError.of(name, f"an array of {value.dtype}", "numbers are needed")
        dtype = value.dtype.name
        raw = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    _update(found, ["array", dtype, list(value.shape)])
    found.update(raw)


def _kind(value: Any) -> list[str]:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return [str(getattr(kind, "__module__", "")), kind.__qualname__]


def _settings(value: Any) -> list[list[str]]:
    """Return an object's plain attributes, such as the padding of a convolution or the reduction of a loss."""
    held = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else {}
    return sorted([name, repr(part)] for name, part in held.items() if not name.startswith("_") and _plain(part))


def _plain(part: Any) -> bool:
    return isinstance(part, _PLAIN) or (isinstance(part, list | tuple) and all(map(_plain, part)))
