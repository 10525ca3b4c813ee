"""How a stored run begins: whether it is the one that is there, and the facts that all of its tiles depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError, StoreMismatchError, warn
from ._files import Folder, is_partial
from ._format import Header, check_name, dumped_json, not_ours
from ._reading import explained, header_in

FACTS, ONLY = "facts", (0, 0)  # the array of facts, and its one tile
FACTS_BYTES = 4096  # of what is plain: some numbers and short texts


def agreed(folder: Folder, there: Header, header: Header) -> Header:
    """Return the header of the run that is there, after comparing it.

    Raises:
        StoreMismatchError: It is another run; each difference is named.
    """
    if differences := _differences(there.fields, header.fields):
        raise StoreMismatchError(folder.path, differences)
    changes = [
        f"{name}: {old} then, {new} now"
        for name, (old, new) in _differences(there.surroundings, header.surroundings).items()
    ]
    if changes:
        warn(f"store {str(folder.path)!r} was begun elsewhere, tiles may differ by rounding: {'; '.join(changes)}")
    return replace(header, surroundings=there.surroundings, complete=there.complete)


def _differences(there: Mapping[str, str], here: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    names = sorted({*there, *here})
    return {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}


def refuse_other_things(folder: Folder) -> None:
    """Refuse a folder that is neither new, nor empty, nor a store.

    Raises:
        InputError: It is such a folder.
    """
    if header_in(folder) is not None:
        return
    with explained(folder, ()):
        names = folder.names()
    if not all(map(is_partial, names)) and header_in(folder) is None:  # another process may begin it just now
        raise not_ours(folder.path)


def packed(folder: Folder, facts: Mapping[str, Any]) -> np.ndarray:
    """Return the tile that encodes facts, after writing bytes among them to files beside it.

    Raises:
        InputError: There are too many of them.
        StoreFileError: The file system refuses.
    """
    plain: dict[str, Any] = {}
    for name, value in facts.items():
        check_name("facts", name)
        plain[name] = value
        if isinstance(value, bytes):
            with explained(folder, _file(name), FACTS, ONLY):
                folder.write(_file(name), value)
            plain[name] = {"bytes": len(value), "blake2b": _digest(value)}
    text = dumped_json(plain)
    if len(text) > FACTS_BYTES:
        raise InputError.of("facts", f"{len(text)} bytes as JSON", f"at most {FACTS_BYTES} are kept")
    return np.frombuffer(text.ljust(FACTS_BYTES), np.uint8)[None]


def kept_bytes(folder: Folder, name: str, value: Mapping[str, Any]) -> bytes | None:
    """Return bytes that `packed` wrote to a file; None where they are others now.

    Raises:
        StoreFileError: The file system refuses.
    """
    size = value.get("bytes")
    with explained(folder, _file(name), FACTS, ONLY):
        raw = folder.read(_file(name), size) if type(size) is int and size >= 0 else None
    return raw if raw is not None and _digest(raw) == value.get("blake2b") else None


def _file(name: str) -> tuple[str, str]:
    return FACTS, f"{name}.bytes"


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=32).hexdigest()
