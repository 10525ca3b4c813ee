"""Plans on disk: NumPy's npz, read without pickle, everything held against everything else before it is used."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, InputError, NotDifferentiableError, explain
from ..trees import Selector
from ._coloring import Coloring
from ._matrix import csr

if TYPE_CHECKING:
    from .plan import SparsePlan

VERSION = 1
_TOLD = {"version", "shape", "wide", "symmetric", "wrt", "names", "outputs", "tangent", "local", "unknown"}
_ARRAYS = ("ends", "inner", "rows", "columns", "copies", "final", "structure")


def save(plan: SparsePlan, path: str | Path) -> None:
    """Write a plan; the file is there whole or not at all."""
    scheme = plan._scheme
    told = {
        "version": VERSION,
        "shape": plan.shape,
        "wide": scheme.matrix.shape[1],
        "symmetric": scheme.coloring.symmetric,
        "wrt": plan._wrt if isinstance(plan._wrt, str) else None,
        "names": plan._names,
        "outputs": _told(plan._outputs),
        "tangent": plan._tangent,
        "local": plan._local,
        "unknown": plan._unknown,
    }
    arrays = {
        "ends": scheme.matrix.indptr,
        "inner": scheme.matrix.indices,
        "rows": scheme.coloring.rows,
        "columns": scheme.coloring.columns,
        "copies": scheme.columns,
        "final": plan._final,
        "structure": np.asarray(scheme.structure, np.int64).reshape(-1, 2),
    }
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(told)), **arrays)
    os.replace(partial, target)


def _told(outputs: Selector) -> Any:
    """Return `outputs` as JSON can hold it, or a mark that it has to be given again."""
    plain = outputs is None or isinstance(outputs, int | str)
    listed = isinstance(outputs, list | tuple) and all(isinstance(o, int | str) for o in outputs)
    return {"is": outputs} if plain or listed else {"again": repr(outputs)}


def load(path: str | Path, outputs: Selector) -> SparsePlan:
    """Return the plan in a file.

    Raises:
        DataError: The file is no plan, of another version, or damaged; the message says what of it.
        InputError: `outputs` was no name or index and has to be given again.
    """
    from .plan import Scheme, SparsePlan

    about, arrays = _read(Path(path))
    if about.get("version") != VERSION:
        raise DataError(f"{path}: a plan of version {about.get('version')}, and this jacops reads version {VERSION}.")
    kept = about["outputs"]
    if "again" in kept and outputs is None:
        raise InputError(explain("outputs", "missing", f"the plan was made with {kept['again']}; pass that again"))
    m, n = about["shape"]
    _check(path, about, arrays)
    ones = np.ones(len(arrays["inner"]), bool)
    matrix = csr((ones, arrays["inner"], arrays["ends"]), shape=(m, about["wide"]))
    coloring = Coloring(arrays["rows"], arrays["columns"], bool(about["symmetric"]))
    structure = [(int(source), int(size)) for source, size in arrays["structure"]]
    names = tuple(about["names"])
    plan = SparsePlan(
        Scheme(matrix, coloring, structure, arrays["copies"]),
        (m, n),
        arrays["final"],
        wrt=about["wrt"] or (lambda name, parameter: name in names),
        outputs=outputs if "again" in kept else kept["is"],
        tangent=about["tangent"],
        local=about["local"],
        unknown=about["unknown"],
        names=names,
    )
    try:
        plan.assembly  # noqa: B018 - says whether the colouring fits the pattern
    except NotDifferentiableError:
        raise DataError(f"{path}: damaged, its colours do not tell the entries of its pattern apart.") from None
    return plan


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            missing = _TOLD - set(about)
            if missing:
                raise KeyError(f"without {', '.join(sorted(missing))}")
            return about, {name: file[name] for name in _ARRAYS}
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a plan of jacops, or damaged ({error}).") from error


def _check(path: str | Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Hold the arrays of a file against each other.

    Raises:
        DataError: Something does not fit.
    """
    (m, n), wide = about["shape"], about["wide"]
    ends, inner, final, copies = (arrays[k] for k in ("ends", "inner", "final", "copies"))
    rules = {
        "an array is not of whole numbers in one axis": all(
            a.dtype.kind == "i" and a.ndim == (2 if name == "structure" else 1) for name, a in arrays.items()
        ),
        "row pointers do not fit": len(ends) == m + 1 and ends[0] == 0 and ends[-1] == len(inner) and _grows(ends),
        "column indices do not fit": _within(inner, wide),
        "colours do not fit": len(arrays["rows"]) == m and len(arrays["columns"]) == wide,
        "columns do not fit": len(copies) == wide and _within(copies, len(final)) and _within(final, n + 1),
        "selections do not fit": len(final) + int(arrays["structure"][:, 1:].sum()) == wide,
    }
    for trouble, holds in rules.items():
        if not holds:
            raise DataError(f"{path}: damaged, {trouble}.")


def _grows(ends: np.ndarray) -> bool:
    return bool((np.diff(ends) >= 0).all())


def _within(places: np.ndarray, count: int) -> bool:
    return not len(places) or (int(places.min()) >= 0 and int(places.max()) < count)
