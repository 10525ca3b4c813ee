"""Results on disk without pickle: one safetensors file, whose metadata holds the rest as JSON.

A type that can be saved is a dataclass derived from `Savable`; what it declares as fields is what a file holds of it,
apart from fields with `metadata={"saved": False}`, which must have a default. Any reader of safetensors opens the
files and finds the tensors under the names of the fields. Nothing in a file is executed: it names types of this
package and their fields.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ._encoding import Decoder, Encoder
from .errors import DataError, InputTypeError, JacopsError

if TYPE_CHECKING:
    from os import PathLike

    Place = str | PathLike[str]

FORMAT = 1  # raised where older versions of the package could not read a file right
_KEY, _SUM = "jacops", "jacops_crc32"


class Savable:
    """A dataclass that can be written to one file and read again."""

    _types: ClassVar[dict[str, type[Savable]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Register types of this package, by name; nothing else is made from a file."""
        super().__init_subclass__(**options)
        if cls.__module__.split(".")[0] == __name__.split(".")[0]:
            Savable._types[cls.__name__] = cls

    def save(self, path: Place) -> None:
        """Write this to a file in the safetensors format, to be read by `load` or `jacops.load`.

        The file appears whole or not at all. Tensors keep their dtypes and lose their graphs.

        Raises:
            InputTypeError: A part cannot be saved, such as a model; the message names it.
            OSError: The file cannot be written.
        """
        save(self, path)

    @classmethod
    def load(cls, path: Place, *, device: torch.device | str = "cpu") -> Self:
        """Return what `save` wrote to a file.

        Args:
            path: The file.
            device: Where its tensors are put.

        Raises:
            DataError: The file is of another type or program, of a newer version, or damaged.
            OSError: It cannot be read.
        """
        found = load(path, device=device)
        if not isinstance(found, cls):
            raise DataError(f"{path}: it holds {type(found).__name__}, not {cls.__name__}. Use `jacops.load(path)`.")
        return found


def saved_fields(kind: Any) -> list[Field[Any]]:
    """Return the fields of a type that files hold.

    Raises:
        InputTypeError: It is no dataclass, so that its parts are not known.
    """
    if not is_dataclass(kind):
        raise InputTypeError(f"a {kind.__name__} cannot be saved: it depends on a model, not on data alone.")
    return [f for f in fields(kind) if f.init and f.metadata.get("saved", True)]


def save(value: Savable, path: Place) -> None:
    """Write a value to a file, as `Savable.save`."""
    from safetensors.torch import save_file

    tensors, about = _encoded(value)
    with replacing(path) as partial:
        save_file(tensors, partial, about)


def to_bytes(value: Savable) -> bytes:
    """Return what `save` writes to a file.

    Raises:
        InputTypeError: A part cannot be saved.
    """
    from safetensors.torch import save as dumped

    return dumped(*_encoded(value))


def _encoded(value: Savable) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata that stand for a value."""
    encoder = Encoder(_parts)
    try:
        encoded = encoder.encode(value, "")
    except InputTypeError as error:
        if not hasattr(value, "dense"):
            raise
        raise InputTypeError(f"{error} The operator depends on a model or on data: save its `dense()`.") from error
    sums = {name: _checksum(tensor) for name, tensor in encoder.tensors.items()}
    text = json.dumps({"format": FORMAT, "value": encoded, "crc32": sums}, allow_nan=False, separators=(",", ":"))
    return encoder.tensors, {_KEY: text, _SUM: str(zlib.crc32(text.encode()))}


@contextlib.contextmanager
def replacing(path: Place) -> Iterator[Path]:
    """Give a path beside `path` to write a file at, which takes the place of `path` when the block ends.

    The file is flushed to the disk before it is renamed. If the block raises, what was at `path` stays as it was.

    Raises:
        OSError: The file cannot be flushed or renamed.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")  # two writers take two names
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load(path: Place, *, device: torch.device | str = "cpu") -> Any:
    """Return what the `save` of a result wrote to a file, as the type that was saved.

    Args:
        path: The file.
        device: Where its tensors are put.

    Raises:
        DataError: The file is of another program or a newer version, or it is damaged.
        OSError: It cannot be read.
    """
    with open(path, "rb"):  # what the system refuses is an OSError, before the format is looked at
        pass
    return _decoded(lambda: _read(path), str(path), torch.device(device))


def from_bytes(raw: bytes, what: str, *, device: torch.device | str = "cpu") -> Any:
    """Return the value that `to_bytes` made bytes of.

    Args:
        raw: The bytes.
        what: What they are, for the message.
        device: Where its tensors are put.

    Raises:
        DataError: They are something else, or damaged.
    """
    return _decoded(lambda: _parsed(raw), what, torch.device(device))


def _decoded(read: Callable[[], tuple[str, dict[str, Tensor]]], path: str, place: torch.device) -> Any:
    """Return the value that a JSON text and tensors stand for."""
    try:
        text, tensors = read()
        about = json.loads(text)
        if not isinstance(about, dict) or not isinstance(about.get("format"), int):
            raise ValueError("its header has no version")
        if about["format"] > FORMAT:
            raise ValueError(f"written by a newer version (format {about['format']}; this one reads {FORMAT})")
        if {name: _checksum(tensor) for name, tensor in tensors.items()} != about["crc32"]:
            raise ValueError("the numbers are not those that were written")
        found = Decoder(tensors, place, _made).decode(about["value"])
        if not isinstance(found, Savable):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except OSError:
        raise
    # The effects of a damaged header: missing entries, other kinds, too deep, or refused by a type.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, RuntimeError) as error:
        reason = str(error) if isinstance(error, ValueError | JacopsError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a saved result of jacops, or damaged: {reason.rstrip('.')}.") from error


def _read(path: Place) -> tuple[str, dict[str, Tensor]]:
    """Return the JSON text and the tensors of a file.

    Raises:
        ValueError: It is no safetensors file, not of this package, or its header is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            about = file.metadata() or {}
            # Copies: the reader's tensors are views of the file, which may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return _checked_text(about), tensors


def _parsed(raw: bytes) -> tuple[str, dict[str, Tensor]]:
    """Return the JSON text and the tensors of a file's bytes.

    Raises:
        ValueError: As `_read`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as loaded

    try:
        # Copies, in memory of the allocator's own alignment: sums over others may round otherwise.
        tensors = {name: tensor.clone() for name, tensor in loaded(raw).items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    # The reader of bytes gives no metadata; the format begins with the length of its header, which is JSON.
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return _checked_text(header.get("__metadata__") or {}), tensors


def _checked_text(about: Mapping[str, str]) -> str:
    if _KEY not in about:
        raise ValueError("a safetensors file of another program")
    if about.get(_SUM) != str(zlib.crc32(about[_KEY].encode())):
        raise ValueError("the header is not the one that was written")
    return about[_KEY]


def _checksum(tensor: Tensor) -> int:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return zlib.crc32(data)


def _parts(value: Any, where: str) -> tuple[str, dict[str, Any]] | None:
    """Return type and fields of a registered dataclass; None for anything else."""
    kind = type(value)
    if not isinstance(value, Savable):
        return None
    if Savable._types.get(kind.__name__) is not kind:
        todo = "Save its tensors, and build it from them."
        raise InputTypeError.of(
            where or "the result", f"a {kind.__qualname__}", "only types of this package are saved", todo
        )
    return kind.__name__, {f.name: getattr(value, f.name) for f in saved_fields(kind)}


def _made(name: str, values: dict[str, Any]) -> Any:
    """Return an object of a registered type.

    Raises:
        ValueError: There is no such type, or its fields are others.
    """
    kind = Savable._types.get(name)
    if kind is None or not is_dataclass(kind):
        raise ValueError(f"there is no type {name!r}")
    known = {f.name: f for f in saved_fields(kind)}
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    unknown, missing = sorted(set(values) - set(known)), sorted(set(needed) - set(values))
    if unknown or missing:
        raise ValueError(f"{name} of another version: unknown fields {unknown}, missing fields {missing}")
    return kind(**values)
