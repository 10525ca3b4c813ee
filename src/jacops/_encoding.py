"""Values as JSON beside named tensors, and back: numbers, texts, containers, arrays, sparse matrices, dataclasses.

JSON's own types are stored as they are, lists too; anything else is an object with one entry, whose name states what it
is: `{"tensor": "info.leverage"}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._hooks import SUBCLASSES
from .errors import InputTypeError

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_Parts = Callable[[Any, str], tuple[str, dict[str, Any]] | None]


class Encoder:
    """Encodes values; tensors are collected by the path that leads to them.

    Attributes:
        tensors: Contiguous, on the CPU, real.
    """

    def __init__(self, parts: _Parts) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._parts = parts

    def encode(self, value: Any, where: str) -> Any:
        """Return what JSON holds of a value.

        Raises:
            InputTypeError: It is of a kind that no file holds.
        """
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, np.generic):
            return self.encode(value.item(), where)
        if isinstance(value, str):  # and members of a StrEnum, which are equal to their text
            return str(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        return self._object(value, where)

    def _object(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, list | tuple):
            entries = [self.encode(entry, f"{where}.{k}") for k, entry in enumerate(value)]
            return entries if isinstance(value, list) else {"tuple": entries}
        if isinstance(value, Mapping):
            return self._mapping(value, where)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": value.type}
        if isinstance(value, slice):
            return {"slice": [value.start, value.stop, value.step]}
        found = self._parts(value, where)
        if found is not None:
            name, fields = found
            return {"type": name, "fields": {key: self.encode(part, _join(where, key)) for key, part in fields.items()}}
        return self._array(value, where)

    def _mapping(self, value: Mapping[Any, Any], where: str) -> Any:
        if all(type(key) is str for key in value):
            return {"dict": {key: self.encode(entry, _join(where, key)) for key, entry in value.items()}}
        pairs = enumerate(value.items())
        return {"items": [[self.encode(k, where), self.encode(entry, f"{where}.{n}")] for n, (k, entry) in pairs]}

    def _tensor(self, value: Tensor, where: str) -> Any:
        if type(value) not in _PLAIN:
            for name, (describe, _) in SUBCLASSES.items():
                if kind := describe(value):
                    plain = value.detach().as_subclass(Tensor)
                    return {"subclass": name, "kind": kind, "of": self._tensor(plain, where)}
            raise InputTypeError.of(where, f"a {type(value).__name__}", "a plain tensor is needed to save it")
        value = value.detach()
        if value.layout is not torch.strided:
            return {"sparse": self._sparse(value, where)}
        complex_ = value.is_complex()
        real = torch.view_as_real(value.resolve_conj()) if complex_ else value
        self.tensors[where] = real.to("cpu", copy=True).resolve_neg().contiguous()
        return {"complex" if complex_ else "tensor": where}

    def _sparse(self, value: Tensor, where: str) -> Any:
        if value.layout is torch.sparse_coo:
            value = value.coalesce()
            layout, parts = "coo", (value.indices(), value.values())
        elif value.layout in (torch.sparse_csr, torch.sparse_bsr):
            layout, parts = str(value.layout)[-3:], (value.crow_indices(), value.col_indices(), value.values())
        else:
            raise InputTypeError.of(where, f"of layout {value.layout}", "coo, csr or bsr is needed to save it")
        return [layout, list(value.shape), [self._tensor(part, f"{where}.{k}") for k, part in enumerate(parts)]]

    def _array(self, value: Any, where: str) -> Any:
        if hasattr(value, "tocsr"):  # of SciPy
            found = value.tocsr()
            arrays = [self._array(part, f"{where}.{k}") for k, part in enumerate(_csr_parts(found))]
            return {"scipy": [list(found.shape), arrays]}
        if not isinstance(value, np.ndarray) and hasattr(value, "__array__") and hasattr(value, "shape"):
            value = np.asarray(value)  # of JAX
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
            came = f"of dtype {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__qualname__}"
            raise InputTypeError.of(where, came, "numbers, texts, tensors and containers of them can be saved")
        native = value.astype(value.dtype.newbyteorder("="), order="C")
        return {"array": self._tensor(torch.from_numpy(native), where)}


def _csr_parts(matrix: Any) -> tuple[Any, Any, Any]:
    return matrix.data, matrix.indices, matrix.indptr


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


class Decoder:
    """Decodes what `Encoder` encoded.

    Args:
        tensors: By name.
        device: Where they are put.
        made: Makes an object from the name of its type and its fields.
    """

    def __init__(
        self, tensors: dict[str, Tensor], device: torch.device, made: Callable[[str, dict[str, Any]], Any]
    ) -> None:
        self._tensors, self._place, self._made = tensors, device, made

    def decode(self, encoded: Any) -> Any:
        """Return the value.

        Raises:
            ValueError: There is no such kind of entry; other errors where an entry is malformed.
        """
        if isinstance(encoded, list):
            return [self.decode(entry) for entry in encoded]
        if not isinstance(encoded, dict):
            return encoded
        kind = next(iter(encoded), "")
        read = getattr(self, f"_{kind}", None) if kind in _KINDS else None
        if read is None:
            raise ValueError(f"there is no entry of kind {kind!r}")
        return read(encoded)

    def _float(self, encoded: Any) -> float:
        return float(encoded["float"])

    def _size(self, encoded: Any) -> torch.Size:
        return torch.Size(encoded["size"])

    def _tuple(self, encoded: Any) -> tuple[Any, ...]:
        return tuple(self.decode(entry) for entry in encoded["tuple"])

    def _dict(self, encoded: Any) -> dict[str, Any]:
        return {key: self.decode(entry) for key, entry in encoded["dict"].items()}

    def _items(self, encoded: Any) -> dict[Any, Any]:
        return {self.decode(key): self.decode(entry) for key, entry in encoded["items"]}

    def _dtype(self, encoded: Any) -> torch.dtype:
        found = getattr(torch, encoded["dtype"])
        if not isinstance(found, torch.dtype):
            raise ValueError(f"there is no dtype {encoded['dtype']!r}")
        return found

    def _device(self, encoded: Any) -> torch.device:
        return self._place

    def _slice(self, encoded: Any) -> slice:
        return slice(*encoded["slice"])

    def _type(self, encoded: Any) -> Any:
        return self._made(encoded["type"], {key: self.decode(entry) for key, entry in encoded["fields"].items()})

    def _tensor(self, encoded: Any) -> Tensor:
        return self._tensors[encoded["tensor"]].to(self._place)

    def _complex(self, encoded: Any) -> Tensor:
        return torch.view_as_complex(self._tensors[encoded["complex"]]).to(self._place)

    def _array(self, encoded: Any) -> np.ndarray:
        return self.decode(encoded["array"]).cpu().numpy()

    def _scipy(self, encoded: Any) -> Any:
        from scipy.sparse import csr_array

        shape, arrays = encoded["scipy"]
        return csr_array(tuple(self.decode(part) for part in arrays), shape=tuple(shape))

    def _sparse(self, encoded: Any) -> Tensor:
        layout, shape, parts = encoded["sparse"]
        made = {
            "coo": torch.sparse_coo_tensor,
            "csr": torch.sparse_csr_tensor,
            "bsr": torch.sparse_bsr_tensor,
        }[layout]
        options: dict[str, Any] = {"is_coalesced": True} if layout == "coo" else {}
        return made(*(self.decode(part) for part in parts), tuple(shape), check_invariants=True, **options)

    def _subclass(self, encoded: Any) -> Tensor:
        name = encoded["subclass"]
        if name not in SUBCLASSES:
            raise ValueError(f"a tensor of {name!r}, which is not known here")
        return SUBCLASSES[name][1](self.decode(encoded["of"]), encoded["kind"])


_KINDS = frozenset(
    [
        "float",
        "size",
        "tuple",
        "dict",
        "items",
        "dtype",
        "device",
        "slice",
        "type",
        "tensor",
        "complex",
        "array",
        "scipy",
        "sparse",
        "subclass",
    ]
)
