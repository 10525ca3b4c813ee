"""Plans on disk: NumPy's npz, read without pickle, everything compared with everything else before it is used."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from .._saving import replacing
from .._trees import Selector
from ..errors import DataError, InputError
from ._coloring import Coloring, most_colors
from ._matrix import csr
from ._scheme import Scheme

if TYPE_CHECKING:
    from .plan import SparsePlan

VERSION = 2
_MOST = 2**24  # bytes that a file of any size may describe
_RATIO = 64  # limit on described bytes over file size beyond that; measured: plans compress by a factor of about 10
_ARRAYS = {"ends": 1, "inner": 1, "rows": 1, "columns": 1, "copies": 1, "final": 1, "structure": 2}  # and their axes


def save(plan: SparsePlan, path: str | Path) -> None:
    """Write a plan; the file is there whole or not at all."""
    scheme, options = plan._scheme, plan._options
    about = {
        "version": VERSION,
        "shape": plan.shape,
        "wrt": options["by"] if isinstance(options["by"], str) else None,
        "names": plan._names,
        "outputs": _plain(options["outputs"]),
        "tangent": options["tangent"],
        "local": options["local"],
        "unknown": plan._unknown,
    }
    arrays = {
        "about": np.array(json.dumps(about)),
        "ends": scheme.matrix.indptr,
        "inner": scheme.matrix.indices,
        "rows": scheme.coloring.rows,
        "columns": scheme.coloring.columns,
        "copies": scheme.columns,
        "final": plan._final,
        "structure": np.asarray(scheme.structure, np.int64).reshape(-1, 2),
    }
    size = sum(array.nbytes for array in arrays.values())
    with replacing(path) as partial:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        if size > max(_MOST, _RATIO * partial.stat().st_size):  # more than the reader accepts of a compressed file
            with partial.open("wb") as file:
                np.savez(file, **arrays)


def _plain(outputs: Selector) -> Any:
    """Return `outputs` as JSON can hold it, or a mark that it has to be given again."""
    plain = outputs is None or isinstance(outputs, int | str)
    listed = isinstance(outputs, list | tuple) and all(isinstance(o, int | str) for o in outputs)
    return {"is": outputs} if plain or listed else {"again": repr(outputs)}


def load(path: str | Path, outputs: Selector) -> tuple[Any, ...]:
    """Return what a `SparsePlan` in a file is made of, in its order.

    Raises:
        DataError: The file is no plan, of another version, or damaged; the message states which.
        InputError: `outputs` was no name or index and has to be given again.
    """
    try:
        arrays = _read(Path(path))
        _require(set(arrays) == {"about", *_ARRAYS}, f"its arrays are not about, {', '.join(_ARRAYS)}")
        about = _about(arrays.pop("about"))
        scheme, final = _checked(about["shape"], arrays)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # zipfile and NumPy raise errors of a dozen kinds for damaged files
        raise DataError(f"{path}: not a plan of jacops, or damaged: {error}.") from error
    if "is" in about["outputs"]:
        outputs = about["outputs"]["is"]
    elif outputs is None:
        came = "missing"
        raise InputError.of("outputs", came, f"the plan was made with {about['outputs']['again']}; pass that again")
    names = tuple(about["names"])
    by = about["wrt"] or (lambda name, parameter: name in names)
    options = {"by": by, "outputs": outputs, "tangent": about["tangent"], "local": about["local"]}
    return scheme, tuple(about["shape"]), final, options, about["unknown"], names


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of an npz file; it may not describe far more than its size, nor hold two of one name."""
    with path.open("rb") as raw, zipfile.ZipFile(raw) as file:
        entries, size = file.infolist(), raw.seek(0, 2)
        described = sum(entry.file_size for entry in entries)
        _require(described <= max(_MOST, _RATIO * size), f"its {size:,} bytes describe {described:,}")
        _require(len({entry.filename for entry in entries}) == len(entries), "two arrays of one name")
        return {entry.filename.removesuffix(".npy"): _array(file, entry) for entry in entries}


def _array(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    packed_as_known = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not entry.flag_bits & 1
    _require(packed_as_known, f"{entry.filename!r} is packed in a way that is not read")
    with file.open(entry) as packed:
        _require(npy.read_magic(packed) == (1, 0), f"{entry.filename!r} is of another version of NumPy's format")
        shape, by_columns, dtype = npy.read_array_header_1_0(packed)
        _require(dtype.kind in "iU" and not by_columns, f"{entry.filename!r} is not of whole numbers or text")
        data = packed.read()  # to the end, so that the checksum is compared
    array = np.ndarray(shape, dtype, data)
    _require(array.nbytes == len(data), f"{entry.filename!r} has another length than its header describes")
    return array


def _about(text: np.ndarray) -> dict[str, Any]:
    """Return the fields that are not arrays, each of the kind that `save` writes."""
    about = json.loads(str(text))
    _require(isinstance(about, dict) and "version" in about, "'about' is no description of a plan")
    came = about["version"]
    _require(came == VERSION, f"a plan of version {came!r}, and this jacops reads version {VERSION}")
    json.dumps(about, ensure_ascii=False).encode()  # fails for text that cannot be printed
    (kind, given), *more = about["outputs"].items()
    right = {
        "shape": len(about["shape"]) == 2 and all(map(_is_count, about["shape"])),
        "wrt": about["wrt"] in (None, "parameters", "inputs"),
        "names": isinstance(about["names"], list) and all(isinstance(name, str) for name in about["names"]),
        "outputs": not more and (isinstance(given, str) if kind == "again" else kind == "is" and _are_outputs(given)),
        "tangent": isinstance(about["tangent"], bool),
        "local": isinstance(about["local"], bool),
        "unknown": isinstance(about["unknown"], dict) and all(map(_is_count, about["unknown"].values())),
    }
    _require(set(about) == {"version", *right}, "'about' lacks fields or has others")
    for name, holds in right.items():
        _require(holds, f"{name!r} is not what a plan has there")
    return about


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _are_outputs(given: Any) -> bool:
    listed = given if isinstance(given, list) else [] if given is None else [given]
    return all(isinstance(o, str) or (type(o) is int and abs(o) < 2**31) for o in listed)


def _checked(shape: tuple[int, int], arrays: dict[str, np.ndarray]) -> tuple[Scheme, np.ndarray]:
    """Return scheme and final columns from arrays, all of which fit each other and the shape."""
    for name, array in arrays.items():
        kind = f"{name!r} is not of whole numbers in {_ARRAYS[name]} axes"
        _require(array.dtype.kind == "i" and array.ndim == _ARRAYS[name], kind)
        arrays[name] = array.astype(np.int64)
    copies, final, structure, ends, inner = (arrays[k] for k in ("copies", "final", "structure", "ends", "inner"))
    (m, n), wide = shape, len(copies)
    _require(len(ends) == m + 1 and ends[0] == 0 and ends[-1] == len(inner), "row pointers do not fit")
    _require(_within(ends, 0, len(inner) + 1) and bool((np.diff(ends) >= 0).all()), "row pointers do not rise")
    _require(_within(inner, 0, wide), "column indices do not fit")
    matrix = csr((np.ones(len(inner), bool), inner, ends), shape=(m, wide))
    _require(np.array_equal(final[final != n], np.arange(n)), "columns do not count what is free")
    _require(_within(copies, 0, len(final)), "copies do not fit")
    _require(structure.shape[1] == 2 and _within(structure, 0, wide + 1), "selections do not fit")
    _require(len(final) + int(structure[:, 1].sum()) == wide, "selections do not add up")
    _require(not (final == n)[copies[inner]].any(), "there are entries in columns of padding")
    for name, lines in (("rows", matrix), ("columns", csr(matrix.T))):
        colors = arrays[name]
        _require(len(colors) == lines.shape[0], f"colours of {name} do not fit")
        _require(_within(colors, -1, most_colors(lines)), f"there are more colours of {name} than any colouring takes")
        _require(bool(np.bincount(colors[colors >= 0]).all()), f"colours of {name} have gaps")
    coloring = Coloring(arrays["rows"], arrays["columns"])
    return Scheme(matrix, coloring, [tuple(pair) for pair in structure.tolist()], copies), final


def _within(places: np.ndarray, low: int, end: int) -> bool:
    return not places.size or (int(places.min()) >= low and int(places.max()) < end)


def _require(holds: bool, trouble: str) -> None:
    if not holds:
        raise ValueError(trouble)
