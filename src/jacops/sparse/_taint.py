"""Which values of a forward pass depend on the point, and which are constants of the model's text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from .._runtime.side_effects import Light, tensors_in

_CONSTANT = {"zeros_like", "ones_like", "new_zeros", "new_ones", "empty_like", "new_empty"}  # whatever they are given
# Floating-point dtypes that NumPy has: it compares a few thousand numbers in a fraction of the time that torch takes.
_IN_NUMPY = (torch.float64, torch.float32, torch.float16, torch.complex128, torch.complex64)
_SCALED = {"mul", "full", "full_like", "new_full", "fill"}


class Taint(Light):
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
        if self.read_out:
            return True
        parts = parts_of(tensor)
        return not parts or any(self._is_data(storage_key(part)) for part in parts)

    def passes(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record the results of an operation, written arguments too; random results are not constant either."""
        data = self._gives_data(func, tensors_in(args) + tensors_in(kwargs))
        self.read_out = self.read_out or (data and traits_of(func).reads)
        self._note(out, data)
        if traits_of(func).written:
            self._note(written(func, args, kwargs), data)

    def _is_data(self, key: int) -> bool:
        return key in self._listed

    def _gives_data(self, func: Any, given: list[Tensor]) -> bool:
        return traits_of(func).is_random or any(self.holds(t) for t in given)

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
        return traits_of(func).base not in _CONSTANT and super()._gives_data(func, given)

    def _note(self, tree: Any, data: bool) -> None:
        super()._note(tree, not data)
        for tensor in _strided(tree) if data else ():
            self._listed.pop(storage_key(tensor), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if traits_of(func).base in _SCALED and any(
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


def zeros_in(tensor: Tensor) -> NDArray[np.bool_]:
    """Return where a tensor is zero."""
    with torch._C.DisableTorchFunction():  # the numbers do not escape: where they are zero is followed
        tensor = tensor.detach()
        if tensor.dtype not in _IN_NUMPY or tensor._is_zerotensor():
            return (tensor == 0).cpu().numpy()
        return tensor.cpu().resolve_conj().resolve_neg().numpy() == 0


class OperationTraits(NamedTuple):
    """What does not depend on the arguments of an operation.

    Attributes:
        base: Its name, without the mark of those that write in place.
        written: Names of the arguments that it writes into.
        is_view: It gives the storage that it was given.
        is_random: It draws random numbers.
        reads: It gives Python a value.
        resizes: It changes the shape of what it is given.
    """

    base: str
    written: frozenset[str]
    is_view: bool
    is_random: bool
    reads: bool
    resizes: bool


@cache
def traits_of(func: Any) -> OperationTraits:
    """Return what is known of an operation; worked out once, since a trace meets the same ones again and again."""
    schema, tags = func._schema, func.tags
    name = schema.name.partition("::")[2]
    info = schema.returns[0].alias_info if schema.returns else None
    return OperationTraits(
        base=name[:-1] if name.endswith("_") and not name.endswith("__") else name,
        written=frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write),
        is_view=info is not None and not info.is_write,
        is_random=torch.Tag.nondeterministic_seeded in tags,
        reads=torch.Tag.data_dependent_output in tags,
        resizes=torch.Tag.inplace_view in tags,
    )


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation writes into; it need not give them back."""
    marked = traits_of(func).written
    if not marked:
        return []
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return [t for name in marked for t in tensors_in(given.get(name))]
