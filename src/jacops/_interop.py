"""What results share with NumPy and PyTorch: `np.asarray`, `torch.as_tensor` and `float` of their main field."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import InputTypeError


class ArrayLike:
    """A dataclass that converts to an array as one of its fields does.

    A type without such a field refuses to be converted and names the fields that can be: NumPy would otherwise make
    an array of one Python object from it.
    """

    _array: ClassVar[str] = ""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the field that the result converts to; bfloat16, which NumPy does not have, as float32.

        Raises:
            InputTypeError: No field stands for the whole result.
            ValueError: `copy=False`, and a copy is needed (NumPy's rule).
        """
        return as_array(self._converted("np.asarray"), dtype, copy)

    def __dlpack__(self, **options: Any) -> Any:
        """Return the field that the result converts to, without a copy: `torch.as_tensor` and `from_dlpack` ask."""
        return self._tensor().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        """Return the device of that field, as DLPack counts devices."""
        return self._tensor().__dlpack_device__()

    def __float__(self) -> float:
        """Return the field that the result converts to, where it is one number."""
        return float(self._converted("float"))

    def _tensor(self) -> Any:
        value = self._converted("torch.as_tensor")
        if isinstance(value, Tensor):
            return value.detach()
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value

    def _converted(self, call: str) -> Any:
        if self._array:
            return getattr(self, self._array)
        held = [f".{f.name}" for f in fields(self) if hasattr(getattr(self, f.name), "shape")]  # pyright: ignore
        todo = f"Convert one of its fields: {', '.join(held)}." if held else "Take one of its fields."
        raise InputTypeError.of(call, f"given a {type(self).__name__}", "it has no single array", todo)


class Unpacked:
    """A dataclass that unpacks into its fields, in order."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the fields."""
        return iter([getattr(self, f.name) for f in fields(self)])  # pyright: ignore[reportArgumentType]


def as_array(value: Any, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Return a tensor or a number as a NumPy array, detached; memory is shared where NumPy's `copy` rule allows.

    Raises:
        ValueError: `copy=False`, and a copy is needed.
    """
    if isinstance(value, Tensor):
        plain = value.detach().resolve_conj().resolve_neg().cpu()
        plain = plain.float() if plain.dtype == torch.bfloat16 else plain
        found, shared = plain.numpy(), plain.data_ptr() == value.data_ptr()
    else:
        found = np.asarray(value)
        shared = found is value
    if copy is False and not (shared and (dtype is None or np.dtype(dtype) == found.dtype)):
        raise ValueError("copy=False, but a copy is needed: of the device, the dtype or the layout.")
    return np.array(found, dtype=dtype, copy=True) if copy and shared else np.asarray(found, dtype=dtype)
