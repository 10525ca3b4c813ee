"""Which values of a forward pass depend on the point, and which are constants of the model's text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._runtime.side_effects import tensors_in

_CONSTANT = {"zeros_like", "ones_like", "new_zeros", "new_ones", "empty_like", "new_empty"}  # whatever they are given
_SCALED = {"mul", "full", "full_like", "new_full", "fill"}


class Taint(TorchDispatchMode):
    """Notes which storages hold values that depend on the point, so that their zeros are not taken for constants.

    Args:
        sources: The tensors that make up the point.

    Attributes:
        read_out: Whether a value that depends on the point was read into Python.
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()
        self._listed: dict[int, StorageWeakRef] = {}
        self.read_out = False
        self._note(list(sources), True)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on the point; everything may once a value was read into Python."""
        parts = parts_of(tensor)
        return self.read_out or not parts or any(self._is_data(storage_key(part)) for part in parts)

    def passes(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record the results of an operation, written arguments too; random results are not constant either."""
        data = self._gives_data(func, tensors_in((args, kwargs)))
        self.read_out = self.read_out or (data and torch.Tag.data_dependent_output in func.tags)
        self._note([out, written(func, args, kwargs)], data)

    def _is_data(self, key: int) -> bool:
        return key in self._listed

    def _gives_data(self, func: Any, given: list[Tensor]) -> bool:
        random = torch.Tag.nondeterministic_seeded in func.tags
        return random or any(self.holds(t) for t in given)

    def _note(self, tree: Any, data: bool) -> None:
        if data:
            for tensor in _strided(tree):
                self._listed.setdefault(storage_key(tensor), StorageWeakRef(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.passes(func, args, kwargs or {}, out)
        return out


class Outside(Taint):
    """The opposite: notes which storages a model fills by itself, from its own text; everything else is data.

    Inputs, parameters and buffers are data, and so are tensors that a model holds in other ways.
    """

    def __init__(self) -> None:
        super().__init__([])

    def _is_data(self, key: int) -> bool:
        return key not in self._listed

    def _gives_data(self, func: Any, given: list[Tensor]) -> bool:
        return base_name(func) not in _CONSTANT and super()._gives_data(func, given)

    def _note(self, tree: Any, data: bool) -> None:
        super()._note(tree, not data)
        for tensor in _strided(tree) if data else ():
            self._listed.pop(storage_key(tensor), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if base_name(func) in _SCALED and any(
            isinstance(v, int | float) and v == 0 for v in tree_leaves((args, kwargs))
        ):
            # A Python zero may be a flag: its product is not constant.
            self._note([out, written(func, args, kwargs or {})], True)
        return out


def _strided(tree: Any) -> Iterator[Tensor]:
    return (part for t in tensors_in(tree) for part in parts_of(t))


def parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that hold a tensor: itself, or indices and values of a sparse one; none of other layouts."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()


def storage_key(tensor: Tensor) -> int:
    """Return a key of a storage."""
    return tensor.untyped_storage()._cdata


def base_name(func: Any) -> str:
    """Return the name of an operation, without the mark of those that write in place."""
    name = func._schema.name.partition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation writes into; it need not give them back."""
    if not func._schema.is_mutable:
        return []
    arguments = func._schema.arguments
    marked = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    return [t for name in marked for t in tensors_in(given.get(name))]
