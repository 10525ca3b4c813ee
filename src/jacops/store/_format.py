"""The format of a stored run on disk: grids of tiles, the header that identifies the run, their bytes.

Metadata read from a disk is checked against what this module would have written and nothing else: zarr never reads
metadata that someone else may have made, so no codec, type or name in it is ever looked up.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._finite import where_first
from ..errors import InputError, InputTypeError, MissingExtraError, NonFiniteError, StoreDamagedError

Index = tuple[int, ...]

SCHEMA = 1
HEADER = "zarr.json"
_MARK = "jacops_store"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DTYPES = frozenset(
    ["float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_ADDRESSABLE = 2**62  # bytes


@final
@dataclass(frozen=True)
class Grid:
    """An array cut into tiles; the last tile of an axis may be smaller.

    Attributes:
        shape: Of the array, at least one axis.
        tile: Of one tile, clipped to the array.
        dtype: A NumPy name such as `"float64"`; a NumPy or torch dtype is taken too. Real, complex or whole numbers.
        finite: Whether NaN and Inf are refused. A tile that was not written reads as NaN (in whole numbers as the
            smallest value, unsigned as the largest), so allow them only together with an array of statuses.

    Raises:
        InputError: A side is out of range, or the dtype cannot be stored.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    dtype: str = "float64"
    finite: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        name = str(self.dtype).removeprefix("torch.") if not isinstance(self.dtype, type) else np.dtype(self.dtype).name
        if name not in _DTYPES:
            raise InputError.of("dtype", repr(name), f"one of {', '.join(sorted(_DTYPES))} is needed")
        shape, tile = _sides("shape", self.shape, 0), _sides("tile", self.tile, 1)
        if not shape or len(shape) != len(tile):
            came = f"{tile} for an array {shape}"
            raise InputError.of("tile", came, "one length per axis, and at least one axis, is needed")
        tile = tuple(min(part, max(side, 1)) for part, side in zip(tile, shape, strict=True))
        if math.prod(max(side, 1) for side in shape) * np.dtype(name).itemsize * 2 ** len(shape) > _ADDRESSABLE:
            raise InputError.of("shape", shape, "an array of less than 2**62 bytes is needed")
        for key, value in {"shape": shape, "tile": tile, "dtype": name}.items():
            object.__setattr__(self, key, value)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tiles along each axis."""
        return tuple(-(-side // part) for side, part in zip(self.shape, self.tile, strict=True))

    @property
    def total(self) -> int:
        """How many tiles altogether."""
        return math.prod(self.counts)

    @property
    def nbytes(self) -> int:
        """Size of the array in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def encoded(self) -> int:
        """Size of a tile's file: the tile, padded at the edges, and its checksum."""
        return math.prod(self.tile) * np.dtype(self.dtype).itemsize + 4

    @property
    def blank(self) -> Any:
        """The value of entries that were never written."""
        kind = np.dtype(self.dtype)
        if kind.kind in "iu":
            return int(np.iinfo(kind).min if kind.kind == "i" else np.iinfo(kind).max)
        return complex(math.nan, math.nan) if kind.kind == "c" else math.nan

    def indices(self) -> Iterator[Index]:
        """Iterate over the tiles, the last axis fastest."""
        for place in range(self.total):
            index: Index = ()
            for count in reversed(self.counts):
                place, i = divmod(place, count)
                index = (i, *index)
            yield index

    def selection(self, index: Index) -> tuple[slice, ...]:
        """Return the part of the array that a tile covers.

        Raises:
            InputError: There is no such tile.
        """
        inside = isinstance(index, tuple) and len(index) == len(self.counts)
        if not inside or not all(0 <= i < count for i, count in zip(index, self.counts, strict=True)):
            raise InputError.of("index", index, f"the grid has {self.counts} tiles")
        return tuple(
            slice(i * part, min((i + 1) * part, side))
            for i, part, side in zip(index, self.tile, self.shape, strict=True)
        )

    def tile_shape(self, index: Index) -> tuple[int, ...]:
        """Return the shape of a tile; at the edges it is smaller than `tile`.

        Raises:
            InputError: There is no such tile.
        """
        return tuple(part.stop - part.start for part in self.selection(index))

    def fitting(self, name: str, index: Index, block: Any) -> np.ndarray:
        """Return the values of a tile of the array of this name as a NumPy array.

        Raises:
            InputError: There is no such tile, or shape or dtype do not fit.
            InputTypeError: They are neither a tensor nor an array.
            NonFiniteError: They hold NaN or Inf, which are not allowed.
        """
        needed = self.tile_shape(index)
        if not isinstance(block, Tensor | np.ndarray):
            raise InputTypeError.of("block", f"a {type(block).__name__}", "a tensor or a NumPy array is needed")
        came = f"{tuple(block.shape)} of {str(block.dtype).removeprefix('torch.')}"
        if came != f"{needed} of {self.dtype}":
            raise InputError.of("block", came, f"tile {name}{list(index)} is {needed} of {self.dtype}")
        if isinstance(block, Tensor):
            block = block.detach().resolve_conj().resolve_neg().cpu().numpy()
        if self.finite and block.dtype.kind in "fc" and not np.isfinite(block).all():
            where = where_first(torch.from_numpy(np.ascontiguousarray(block)))
            raise NonFiniteError(f"in the block for tile {name}{list(index)}, {where}. It was not written.")
        return block

    def described(self) -> dict[str, Any]:
        """Return its description in the header."""
        return {"shape": list(self.shape), "tile": list(self.tile), "dtype": self.dtype}


def _sides(argument: str, sides: Any, least: int) -> tuple[int, ...]:
    sides = tuple(sides) if isinstance(sides, list | tuple) else sides
    if not isinstance(sides, tuple) or not all(type(side) is int and side >= least for side in sides):
        raise InputError.of(argument, repr(sides), f"a tuple of whole numbers from {least} up is needed")
    return sides


@final
@dataclass(frozen=True)
class Header:
    """The one piece of metadata that makes a store exist.

    Attributes:
        identity: What the numbers depend on, by name.
        surroundings: What may change without changing them, by name.
        arrays: The arrays, by name.
        complete: Whether every tile was finished and found right.
    """

    identity: Mapping[str, str]
    surroundings: Mapping[str, str]
    arrays: Mapping[str, Grid]
    complete: bool = False

    def __post_init__(self) -> None:
        for argument in ("identity", "surroundings"):
            parts = getattr(self, argument)
            if not isinstance(parts, Mapping) or not all(type(x) is str for pair in parts.items() for x in pair):
                raise InputTypeError.of(argument, f"{parts!r:.80}", "a mapping of names to strings is needed")
        if not self.identity:
            raise InputError.of("identity", "empty", "it must describe what the result depends on")
        if not isinstance(self.arrays, Mapping) or not self.arrays:
            raise InputError.of("arrays", f"{self.arrays!r:.80}", "a mapping of names to `Grid`s is needed")
        for name, grid in self.arrays.items():
            check_name("arrays", name)
            if not isinstance(grid, Grid):
                raise InputTypeError.of(f"arrays[{name!r}]", f"a {type(grid).__name__}", "a `Grid` is needed")

    @property
    def fields(self) -> dict[str, str]:
        """Everything in which two stores must agree to be the same, flat."""
        found = dict(self.identity)
        for name, grid in self.arrays.items():
            found |= {f"arrays.{name}.{key}": str(value) for key, value in grid.described().items()}
        return found

    @property
    def key(self) -> bytes:
        """A digest of all that, which keys the digests of the tiles."""
        return hashlib.blake2b(json.dumps([SCHEMA, self.fields], sort_keys=True).encode(), digest_size=32).digest()

    def dumped(self) -> bytes:
        """Return it as the metadata of a zarr group."""
        fields = {
            "schema": SCHEMA,
            "identity": dict(self.identity),
            "surroundings": dict(self.surroundings),
            "arrays": {name: grid.described() for name, grid in self.arrays.items()},
            "complete": self.complete,
        }
        return dumped_json({"zarr_format": 3, "node_type": "group", "attributes": {_MARK: fields}})

    @classmethod
    def loaded(cls, path: Path, raw: bytes) -> Header:
        """Return the header that these bytes hold.

        Raises:
            InputError: This is not one of our stores.
            StoreDamagedError: It was one, and holds what this version would not write.
        """
        try:
            group = loaded_json(raw)
        except ValueError as error:
            raise StoreDamagedError(path, f"{HEADER} is {error}") from None
        attributes = group.get("attributes")
        if not isinstance(attributes, dict) or not isinstance(fields := attributes.get(_MARK), dict):
            raise not_ours(path)
        found = {name: group.get(name) for name in ("zarr_format", "node_type")} | {"schema": fields.get("schema")}
        for name, needed in {"zarr_format": 3, "node_type": "group", "schema": SCHEMA}.items():
            if type(found[name]) is not type(needed) or found[name] != needed:
                raise StoreDamagedError(path, f"{name} is {found[name]!r:.80}, but {needed!r} is needed")
        try:
            arrays = {name: Grid(grid["shape"], grid["tile"], grid["dtype"]) for name, grid in fields["arrays"].items()}
            header = cls(fields["identity"], fields["surroundings"], arrays, fields["complete"])
        except (InputError, InputTypeError, KeyError, TypeError, AttributeError) as error:
            raise StoreDamagedError(path, f"{HEADER} holds what no run writes: {str(error)[:200]}") from None
        if type(header.complete) is not bool:
            raise StoreDamagedError(path, f"complete is {header.complete!r:.80}, but true or false is needed")
        return header


def check_name(argument: str, name: Any) -> None:
    """Refuse a name that is no safe name of a file.

    Raises:
        InputError: It is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError.of(argument, f"naming {name!r:.80}", "names are like 'influences', a-z 0-9 _")


def not_ours(path: Path) -> InputError:
    """Return the error for a folder with other things in it."""
    came = f"{str(path)!r}, which holds something that is no stored run"
    return InputError.of("path", came, "a new, an empty or a stored run's folder is needed")


def dumped_json(value: dict[str, Any]) -> bytes:
    """Return strict JSON."""
    return json.dumps(value, indent=1, allow_nan=False).encode()


def loaded_json(raw: bytes) -> dict[str, Any]:
    """Return the object in strict JSON.

    Raises:
        ValueError: It is something else; the message states what, to follow "is".
    """

    def refuse(name: str) -> None:
        raise ValueError(f"no JSON: {name}")

    try:
        value = json.loads(raw, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


class TileCodec:
    """Tiles to the bytes of zarr chunks and back: little-endian, in C order, with a CRC-32C behind them.

    It is a zarr array in memory that takes in one chunk at a time.

    Raises:
        MissingExtraError: zarr is not installed.
    """

    def __init__(self, grid: Grid) -> None:
        try:
            import zarr
            from zarr.codecs import BytesCodec, Crc32cCodec
            from zarr.storage import MemoryStore
        except ImportError:
            raise MissingExtraError("store", "zarr") from None
        self.grid = grid
        self._chunks: dict[str, Any] = {}
        self._array = zarr.create_array(
            MemoryStore(self._chunks),
            shape=grid.shape,
            chunks=grid.tile,
            dtype=grid.dtype,
            fill_value=grid.blank,
            filters=(),
            serializer=BytesCodec() if np.dtype(grid.dtype).itemsize > 1 else "auto",
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
            zarr_format=3,
        )
        self.metadata: bytes = self._chunks[HEADER].to_bytes()

    def encode(self, index: Index, block: np.ndarray) -> bytes:
        """Return the bytes of a chunk."""
        self._array[self.grid.selection(index)] = block
        return self._chunks.pop(_chunk_key(index)).to_bytes()

    def decode(self, index: Index, raw: bytes) -> np.ndarray:
        """Return the tile in the bytes of a chunk.

        Raises:
            ValueError: The checksum does not fit.
        """
        from zarr.buffer.cpu import Buffer

        self._chunks[_chunk_key(index)] = Buffer.from_bytes(raw)
        try:
            return np.asarray(self._array[self.grid.selection(index)])
        finally:
            del self._chunks[_chunk_key(index)]

    def difference(self, raw: bytes) -> str:
        """Return how an array's metadata differs from what this codec writes, empty where it does not."""
        try:
            found = loaded_json(raw)
        except ValueError as error:
            return f"{HEADER} is {error}"
        wanted = loaded_json(self.metadata)
        optional = {"attributes", "storage_transformers"}
        for name in sorted((set(wanted) | set(found)) - optional - {"dimension_names"}):
            if name not in found or name not in wanted or _plain(found[name]) != _plain(wanted[name]):
                return f"{name} is {found.get(name)!r:.120}, but {wanted.get(name)!r:.120} is needed"
        return "storage_transformers are set, but none are allowed" if found.get("storage_transformers") else ""


def _plain(value: Any) -> str:
    """Return a text in which 1, 1.0 and true differ, and an empty configuration is none."""
    if isinstance(value, dict):
        return str({key: _plain(part) for key, part in sorted(value.items()) if part != {}})
    return str(list(map(_plain, value))) if isinstance(value, list) else repr(value)


def _chunk_key(index: Index) -> str:
    return "/".join(["c", *map(str, index)])
