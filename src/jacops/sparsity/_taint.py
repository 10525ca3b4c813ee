"""Which values of a forward pass depend on the point, and which are constants of the model's text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONSTANT = {"zeros_like", "ones_like", "new_zeros", "new_ones", "empty_like", "new_empty"}  # whatever they are given
_SCALED = {"mul", "full", "full_like", "new_full", "fill"}


class Taint(TorchDispatchMode):
    """Notes which storages hold values that depend on the point, so that their zeros are not taken for constants.

    Args:
        sources: The tensors that make up the point.
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()
        self._held: dict[int, StorageWeakRef] = {}
        self._read_out = False
        for tensor in sources:
            self._mark(tensor)

    @property
    def read_out(self) -> bool:
        """Whether a value that depends on the point was read into Python."""
        return self._read_out

    def holds(self, tensor: Tensor) -> bool:
        """Say whether a tensor depends on the point; everything may once a value was read into Python."""
        return self._read_out or tensor.layout is not torch.strided or storage_key(tensor) in self._held

    def passes(self, func: Any, tensors: Iterable[Tensor], out: Any) -> None:
        """Note what came of an operation, written arguments too; what it draws at random is no constant either."""
        tensors = list(tensors)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random or any(self.holds(t) for t in tensors):
            self._read_out = self._read_out or torch.Tag.data_dependent_output in func.tags
            self._mark_all(out)

    def _mark_all(self, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                self._mark(tensor)

    def _mark(self, tensor: Tensor) -> None:
        if tensor.layout is torch.strided:
            self._held.setdefault(storage_key(tensor), StorageWeakRef(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.passes(func, tensors, [out, written(func, args, kwargs or {})])
        return out


class Outside(Taint):
    """The opposite: notes which storages a model fills by itself, from its own text; everything else is data.

    Inputs, parameters and buffers are data, and so are tensors that a model holds in other ways.
    """

    def __init__(self) -> None:
        super().__init__([])
        self._made: dict[int, StorageWeakRef] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Say whether a tensor holds anything but what the text of the model makes."""
        return self._read_out or tensor.layout is not torch.strided or storage_key(tensor) not in self._made

    def passes(self, func: Any, tensors: Iterable[Tensor], out: Any) -> None:
        """Note what came of an operation."""
        tensors, base = list(tensors), base_name(func)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if base in _CONSTANT or not (random or any(self.holds(t) for t in tensors)):
            self._make(out)
            return
        self._read_out = self._read_out or torch.Tag.data_dependent_output in func.tags
        self._mark_all(out)

    def _make(self, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._made.setdefault(storage_key(tensor), StorageWeakRef(tensor.untyped_storage()))

    def _mark(self, tensor: Tensor) -> None:
        if tensor.layout is torch.strided:
            self._made.pop(storage_key(tensor), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        tensors = [t for t in given if isinstance(t, Tensor)]
        if base_name(func) in _SCALED and any(isinstance(v, int | float) and v == 0 for v in given):
            # A zero of Python's may be a flag that is off: its product is no constant.
            self._mark_all([out, written(func, args, kwargs or {})])
        else:
            self.passes(func, tensors, [out, written(func, args, kwargs or {})])
        return out


def storage_key(tensor: Tensor) -> int:
    """Return what tells storages apart."""
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
    return [t for name in marked for t in tree_leaves(given.get(name)) if isinstance(t, Tensor)]
