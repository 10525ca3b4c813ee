"""Companions: for every tensor of a running forward, other tensors of the same layout that are carried along.

They are kept by storage and not by tensor. Whatever the forward does to views (writes through a slice, reads through a
transpose) then holds for companions too, because they are addressed by the same sizes, strides and offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..._runtime.side_effects import storage_of

Precision = Callable[[Tensor], torch.dtype]  # that the companions of a tensor are computed in

_PURGE = 64  # new storages between two searches for freed ones: often enough to free memory, too rare to cost time


@dataclass
class Companion:
    """What is carried along with one storage.

    Attributes:
        alive: A weak reference to the storage, which also keeps its address from being used again.
        parts: One tensor of one axis per companion, an entry for every entry of the storage.
        marks: A set of bits, for whoever writes them; what is written later adds to it.
        attached: The storage holds the result of an operation that autograd recorded.
    """

    alive: StorageWeakRef
    parts: list[Tensor]
    marks: int = 0
    attached: bool = False


@dataclass
class Companions:
    """Companion tensors by storage.

    Attributes:
        precisions: One per companion that every tensor has.
    """

    precisions: Sequence[Precision]
    _entries: dict[int, Companion] = field(default_factory=dict)
    _fresh: int = 0

    def entry(self, tensor: Tensor) -> Companion | None:
        """Return what is carried along with a tensor; None for constants."""
        return self._entries.get(storage_of(tensor))

    def marks(self, tensor: Tensor) -> int:
        """Return the marks of a tensor, 0 for constants."""
        found = self.entry(tensor)
        return 0 if found is None else found.marks

    def read(self, tensor: Tensor) -> list[Tensor]:
        """Return the companions of a tensor that has some, as views."""
        found = self._entries[storage_of(tensor)]
        return [_addressed(part, tensor) for part in found.parts]

    def write(self, tensor: Tensor, values: Sequence[Tensor], marks: int, attached: bool) -> None:
        """Set the companions of a tensor; those of entries of its storage outside it stay as they are."""
        found = self.entry(tensor)
        if found is None:
            found = self._adopted(tensor, values)
        else:
            for part, value in zip(found.parts, values, strict=True):
                _addressed(part, tensor).copy_(value)
        found.marks |= marks
        found.attached |= attached

    def prepare(self, tensor: Tensor) -> None:
        """Give a constant companions equal to its value, before it is written into."""
        if self.entry(tensor) is None:
            self._add(tensor, self.constant(_whole(tensor)))

    def constant(self, tensor: Tensor) -> list[Tensor]:
        """Return the companions of a constant: copies of its value."""
        return [tensor.detach().to(precision(tensor), copy=True) for precision in self.precisions]

    def _adopted(self, tensor: Tensor, values: Sequence[Tensor]) -> Companion:
        size = _entries_of(tensor)
        parts = []
        for precision, value in zip(self.precisions, values, strict=True):
            kind = precision(tensor)
            if _same_layout(value, tensor, size) and value.dtype is kind:
                parts.append(value.as_strided((size,), (1,), 0))
                continue
            part = torch.zeros(size, dtype=kind, device=tensor.device)
            _addressed(part, tensor).copy_(value)
            parts.append(part)
        return self._add(tensor, parts)

    def _add(self, tensor: Tensor, parts: list[Tensor]) -> Companion:
        self._fresh += 1
        if self._fresh >= _PURGE:
            self._fresh = 0
            for key in [k for k, e in self._entries.items() if e.alive.expired()]:
                del self._entries[key]
        made = self._entries[storage_of(tensor)] = Companion(StorageWeakRef(tensor.untyped_storage()), parts)
        return made


def working(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor, or single precision for a lower one."""
    low = tensor.dtype.itemsize < (8 if tensor.is_complex() else 4)
    return tensor.dtype if not low else torch.complex64 if tensor.is_complex() else torch.float32


def wide(tensor: Tensor) -> torch.dtype:
    """Return double precision, where the device of a tensor has it."""
    if tensor.device.type == "mps":
        return torch.complex64 if tensor.is_complex() else torch.float32
    return torch.complex128 if tensor.is_complex() else torch.float64


def _entries_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((_entries_of(tensor),), (1,), 0)


def _same_layout(value: Tensor, tensor: Tensor, size: int) -> bool:
    return (
        value.stride() == tensor.stride()
        and tensor.storage_offset() == value.storage_offset() == 0
        and value.untyped_storage().nbytes() == size * value.element_size()
    )


def _addressed(part: Tensor, tensor: Tensor) -> Tensor:
    """Return the entries of a storage's companion that belong to a tensor."""
    if part.is_complex() and not tensor.is_complex():
        part = torch.view_as_real(part).reshape(-1)
    elif tensor.is_complex() and not part.is_complex():
        part = torch.view_as_complex(part.reshape(-1, 2))
    view = part.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    if tensor.is_conj():
        view = view.conj()
    return view._neg_view() if tensor.is_neg() else view
