"""Reader for untrusted npz files: sizes are checked before anything is decompressed."""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path

import numpy as np

MOST = 2**24  # bytes that a file of any size may describe
RATIO = 64  # limit on described bytes over file size beyond that; measured: plans compress by a factor of about 10
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '(<i4|<i8|<U[0-9]{1,9})', 'fortran_order': False, 'shape': \(([0-9, ]{0,60})\), \} *\n?"
)
_LONGEST = 4096  # bytes of a header


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of an npz file of whole numbers and texts.

    Raises:
        ValueError: The file is damaged, holds something else, or describes far more than its size.
        OSError: The system cannot read it.
    """
    with path.open("rb") as raw:
        size = raw.seek(0, 2)
        try:
            with zipfile.ZipFile(raw) as file:
                entries = file.infolist()
                _check_entries(entries, size)
                return {entry.filename.removesuffix(".npy"): _array(file, entry) for entry in entries}
        except (OSError, ValueError):
            raise
        except Exception as error:  # noqa: BLE001 - zipfile raises errors of a dozen kinds for damaged files
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse entries that could not come from NumPy, or describe far more than the size of the file."""
    described = sum(entry.file_size for entry in entries)
    if described > max(MOST, RATIO * size):
        raise ValueError(f"its {size:,} bytes describe {described:,}")
    names = {entry.filename for entry in entries}
    if len(names) < len(entries):
        raise ValueError("two arrays of one name")
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename!r} is packed in a way that is not read")


def _array(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with file.open(entry) as packed:
        start = packed.read(len(_MAGIC) + 2)
        length = int.from_bytes(start[len(_MAGIC) :], "little")
        header = packed.read(min(length, _LONGEST))
        fields = _HEADER.fullmatch(header)
        if not start.startswith(_MAGIC) or fields is None:
            raise ValueError(f"{entry.filename!r} has no header of whole numbers or text")
        dtype = np.dtype(fields[1].decode())
        shape = tuple(int(n) for n in fields[2].decode().replace(" ", "").split(",") if n)
        needed = dtype.itemsize * math.prod(shape)
        if len(start) + len(header) + needed != entry.file_size:
            raise ValueError(f"{entry.filename!r} has another length than its header describes")
        data = packed.read()  # to the end, so that the checksum is compared
    if len(data) != needed:
        raise ValueError(f"{entry.filename!r} ends early")
    return np.frombuffer(data, dtype).reshape(shape) if needed else np.zeros(shape, dtype)
