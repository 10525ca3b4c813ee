"""Plans on disk: NumPy's npz, read without pickle, everything compared with everything else before it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._trees import Selector
from ..errors import DataError, InputError
from ._archive import MOST, RATIO, read_arrays
from ._coloring import Coloring
from ._matrix import csr
from ._scheme import Scheme
from ._stored import checked_plan

if TYPE_CHECKING:
    from .plan import SparsePlan

VERSION = 1


def save(plan: SparsePlan, path: str | Path) -> None:
    """Write a plan; the file is there whole or not at all."""
    scheme, options = plan._scheme, plan._options
    about = {
        "version": VERSION,
        "shape": plan.shape,
        "wide": scheme.matrix.shape[1],
        "symmetric": scheme.coloring.symmetric,
        "wrt": options["by"] if isinstance(options["by"], str) else None,
        "names": plan._names,
        "outputs": _plain(options["outputs"]),
        "tangent": options["tangent"],
        "local": options["local"],
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
    text = np.array(json.dumps(about))
    size = sum(array.nbytes for array in arrays.values()) + text.nbytes
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, about=text, **arrays)
        if size > max(MOST, RATIO * partial.stat().st_size):  # more than the reader believes of a compressed file
            with partial.open("wb") as file:
                np.savez(file, about=text, **arrays)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _plain(outputs: Selector) -> Any:
    """Return `outputs` as JSON can hold it, or a mark that it has to be given again."""
    plain = outputs is None or isinstance(outputs, int | str)
    listed = isinstance(outputs, list | tuple) and all(isinstance(o, int | str) for o in outputs)
    return {"is": outputs} if plain or listed else {"again": repr(outputs)}


def load(path: str | Path, outputs: Selector) -> tuple[Any, ...]:
    """Return what a `SparsePlan` in a file is made of, in its order.

    Raises:
        DataError: The file is no plan, of another version, or damaged; the message says what of it.
        InputError: `outputs` was no name or index and has to be given again.
    """
    try:
        about, places = checked_plan(read_arrays(Path(path)), VERSION)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a plan of jacops, or damaged: {error}.") from error
    if "is" in about["outputs"]:
        outputs = about["outputs"]["is"]
    elif outputs is None:
        came = "missing"
        raise InputError.of("outputs", came, f"the plan was made with {about['outputs']['again']}; pass that again")
    inner, names = places["inner"], tuple(about["names"])
    matrix = csr((np.ones(len(inner), bool), inner, places["ends"]), shape=(about["shape"][0], about["wide"]))
    coloring = Coloring(places["rows"], places["columns"])
    options = {
        "by": about["wrt"] or (lambda name, parameter: name in names),
        "outputs": outputs,
        "tangent": about["tangent"],
        "local": about["local"],
    }
    scheme = Scheme(matrix, coloring, [tuple(pair) for pair in places["structure"].tolist()], places["copies"])
    return scheme, tuple(about["shape"]), places["final"], options, about["unknown"], names
