"""Space: what one axis of an operator means, as named arrays laid end to end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ._cached import cached_property
from ._requirements import check_dense
from ._saving import Savable
from ._trees import is_dtensor
from .errors import InputError, InputTypeError


@dataclass(frozen=True)
class Space(Savable):
    """Named arrays laid end to end: the meaning of one axis of an `Operator`.

    Attributes:
        names: One name per array, in order.
        shapes: Their shapes.
        dtypes: Their dtypes; a flat vector has the promoted one.
        device: Their device.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(cls, tensors: Iterable[Tensor], names: Iterable[str], device: torch.device | None = None) -> Space:
        """Return the space of these tensors."""
        tensors = list(tensors)
        where = tensors[0].device if tensors else device or torch.device("cpu")
        return cls(tuple(names), tuple([t.shape for t in tensors]), tuple([t.dtype for t in tensors]), where)

    @classmethod
    def flat(cls, size: int, name: str, like: Tensor) -> Space:
        """Return the space of one vector with `size` entries."""
        return cls((name,), (torch.Size([size]),), (like.dtype,), like.device)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each array."""
        return tuple([shape.numel() for shape in self.shapes])

    @cached_property
    def dim(self) -> int:
        """Number of entries altogether."""
        return sum(self.sizes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of a flat vector: the promotion of all dtypes."""
        return reduce(torch.promote_types, dict.fromkeys(self.dtypes)) if self.dtypes else torch.get_default_dtype()

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The position of each array in a flat vector."""
        ends = list(accumulate(self.sizes, initial=0))
        return tuple(slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True))

    def flatten(self, tree: Sequence[Tensor] | Mapping[str, Tensor] | Tensor, argument: str = "v") -> Tensor:
        """Return one flat vector `(dim,)` from one tensor per array (a list, or a dict by name).

        Raises:
            InputError: An array is missing, or has another shape, dtype or device than the space's.
        """
        return self.join_row(self.check(tree, argument))[0]

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Return one tensor per array from a flat vector `(dim,)`, each in its own dtype."""
        parts = flat.split_with_sizes(self.sizes) if len(self.sizes) > 1 else (flat,)
        if self.is_uniform:
            return [part.reshape(shape) for part, shape in zip(parts, self._layouts, strict=True)]
        kinds = zip(parts, self._layouts, self.dtypes, strict=True)
        return [part.reshape(shape).to(dtype) for part, shape, dtype in kinds]

    @cached_property
    def _layouts(self) -> tuple[tuple[int, ...], ...]:
        """The shapes as torch reads them soonest: to read a `Size` takes longer than to make the view."""
        return tuple([tuple(shape) for shape in self.shapes])

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all arrays have one dtype."""
        return len(set(self.dtypes)) <= 1

    def join(self, arrays: Sequence[Tensor]) -> Tensor:
        """Return rows `(k, dim)` from one `(k, *shape)` tensor per array."""
        if len(arrays) == 1:
            return arrays[0].reshape(arrays[0].shape[0], self.dim)
        rows = [a.reshape(a.shape[0], size).to(self.dtype) for a, size in zip(arrays, self.sizes, strict=True)]
        return torch.cat(rows, 1)

    def join_row(self, arrays: Sequence[Tensor]) -> Tensor:
        """Return one row `(1, dim)` from one tensor per array."""
        flat = [array.reshape(-1) for array in arrays]
        if not self.is_uniform:
            flat = [array.to(self.dtype) for array in flat]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).unsqueeze(0)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Return one `(k, *shape)` tensor per array from rows `(k, dim)`."""
        many, wide = rows.shape[0], rows.dtype
        if len(self.shapes) == 1:
            parts: Sequence[Tensor] = (rows,)
        else:
            parts = rows.split_with_sizes(self.sizes, 1)
        return [
            part.reshape(many, *shape) if dtype == wide else part.reshape(many, *shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]

    def units(self, where: slice) -> Tensor:
        """Return the unit vectors of some entries as rows `(k, dim)`."""
        rows = torch.zeros(where.stop - where.start, self.dim, dtype=self.dtype, device=self.device)
        rows[:, where].fill_diagonal_(1)
        return rows

    def check(self, tree: Any, argument: str, batch: bool = False, spread: bool = False) -> list[Tensor]:
        """Return `tree` as one tensor per array, with every shape, dtype and device compared with the space.

        Args:
            tree: A tensor where there is one array, else a list or tuple in order, or a dict by name.
            argument: Its name in error messages.
            batch: True where every tensor has one more leading axis, the same for all.
            spread: Tensors may be DTensors, of the whole shape.

        Raises:
            InputTypeError: `tree` or an entry is of the wrong kind.
            InputError: Count, shape, dtype, device or leading axis do not match. Nothing is broadcast or cast.
        """
        tensors = self._listed(tree, argument)
        many = None
        for tensor, name, shape, dtype in zip(tensors, self.names, self.shapes, self.dtypes, strict=True):
            label = f"{argument} for {name}" if len(self.names) > 1 else argument
            if is_dtensor(tensor) and not spread:
                todo = "Pass its `full_tensor()`."
                raise InputError.of(
                    label, "a DTensor", "the parameters are not sharded, so plain ones are needed", todo
                )
            self._check_one(tensor, label, shape, dtype, batch)
            if batch and many is not None and tensor.shape[0] != many:
                raise InputError.of(label, f"a batch of {tensor.shape[0]}", f"the first tensor is a batch of {many}")
            many = tensor.shape[0] if batch else None
        return tensors

    def check_rows(self, argument: str, rows: Any) -> None:
        """Raise unless these are rows `(k, dim)` of flat vectors.

        Raises:
            InputTypeError: It is no tensor.
            InputError: It has another width, dtype or device.
        """
        if not isinstance(rows, Tensor):
            raise InputTypeError.of(argument, f"a {type(rows).__name__}", "a tensor is needed")
        check_dense(argument, rows)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            single = rows.ndim == 2 and len(rows) == 1  # a vector `(n,)` is one row here
            came = f"one vector of {rows.shape[1]} entries" if single else f"of shape {tuple(rows.shape)}"
            needed = f"{'' if single else 'rows of '}{self.dim} entries are needed"
            raise InputError.of(argument, came, needed, "" if self.is_plain else f"They are those of {self.layout}.")
        if (rows.dtype, rows.device) != (self.dtype, self.device):
            needed = f"{self.dtype} on {self.device} is needed; nothing is cast"
            raise InputError.of(argument, f"of {rows.dtype} on {rows.device}", needed)

    def _listed(self, tree: Any, argument: str) -> list[Tensor]:
        if isinstance(tree, Tensor):
            tree = [tree]
        if isinstance(tree, Mapping):
            unknown, missing = [k for k in tree if k not in self.names], [n for n in self.names if n not in tree]
            if unknown or missing:
                parts = f"with unknown names {unknown}" if unknown else "", f"without {missing}" if missing else ""
                came = f"a dict {' and '.join(filter(None, parts))}"
                raise InputError.of(argument, came, f"one tensor per name is needed: {self.layout}")
            tree = [tree[name] for name in self.names]
        if not isinstance(tree, list | tuple):
            raise InputTypeError.of(argument, f"a {type(tree).__name__}", "a tensor or a list of tensors is needed")
        if len(tree) != len(self.names):
            missing = f"; the first one missing is {self.names[len(tree)]}" if len(tree) < len(self.names) else ""
            needed = f"{len(self.names)} are needed: {self.layout}"
            raise InputError.of(argument, f"{len(tree)} tensor(s){missing}", needed, "Pass one tensor for each.")
        return list(tree)

    def _check_one(self, tensor: Any, label: str, shape: torch.Size, dtype: torch.dtype, batch: bool) -> None:
        if not isinstance(tensor, Tensor):
            raise InputTypeError.of(label, f"a {type(tensor).__name__}", f"a tensor of shape {tuple(shape)} is needed")
        check_dense(label, tensor)
        wanted = f"(batch, {', '.join(map(str, shape))})" if batch else str(tuple(shape))
        came = tensor.shape[1:] if batch and tensor.ndim else tensor.shape
        if came != shape or (batch and not tensor.ndim):
            todo = f"The layout is {self.layout}; nothing is broadcast or reshaped."
            raise InputError.of(label, f"of shape {tuple(tensor.shape)}", f"shape {wanted} is needed", todo)
        if tensor.dtype != dtype:
            came = f"of dtype {tensor.dtype}"
            raise InputError.of(label, came, f"dtype {dtype} is needed", f"Call `.to({dtype})` on it.")
        if tensor.device != self.device:
            raise InputError.of(label, f"on device {tensor.device}", f"device {self.device} is needed")

    @property
    def is_plain(self) -> bool:
        """Whether it is a single array with one axis."""
        return len(self.shapes) == 1 and len(self.shapes[0]) == 1

    @property
    def layout(self) -> str:
        """Names and shapes in one line."""
        parts = [f"{name} {tuple(shape)}" for name, shape in zip(self.names, self.shapes, strict=True)]
        return ", ".join(parts if len(parts) <= 6 else [*parts[:3], f"… {len(parts) - 4} more …", parts[-1]])

    def __repr__(self) -> str:
        return f"Space({self.dim}: {self.layout})"
