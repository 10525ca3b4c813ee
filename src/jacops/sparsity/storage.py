"""Plans on disk: NumPy's npz, read without pickle, everything compared with everything else before it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, InputError, NotDifferentiableError
from ..trees import Selector
from ._archive import MOST, RATIO, read_arrays
from ._coloring import Coloring
from ._matrix import csr
from ._stored import StoredPlan, stored_plan

if TYPE_CHECKING:
    from .plan import SparsePlan

VERSION = 1


def save(plan: SparsePlan, path: str | Path) -> None:
    """Write a plan; the file is there whole or not at all."""
    scheme = plan._scheme
    about = {
        "version": VERSION,
        "shape": plan.shape,
        "wide": scheme.matrix.shape[1],
        "symmetric": scheme.coloring.symmetric,
        "wrt": plan._wrt if isinstance(plan._wrt, str) else None,
        "names": plan._names,
        "outputs": _plain(plan._outputs),
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


def load(path: str | Path, outputs: Selector) -> SparsePlan:
    """Return the plan in a file.

    Raises:
        DataError: The file is no plan, of another version, or damaged; the message says what of it.
        InputError: `outputs` was no name or index and has to be given again.
    """
    try:
        found = stored_plan(read_arrays(Path(path)), VERSION)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a plan of jacops, or damaged: {error}.") from error
    if "again" in found.outputs and outputs is None:
        needed = f"the plan was made with {found.outputs['again']}; pass that again"
        raise InputError.of("outputs", "missing", needed)
    plan = _plan(found, outputs if "again" in found.outputs else found.outputs["is"])
    try:
        plan.assembly  # noqa: B018 - shows whether the colouring fits the pattern
    except NotDifferentiableError:
        raise DataError(f"{path}: damaged, its colours do not tell the entries of its pattern apart.") from None
    return plan


def _plan(found: StoredPlan, outputs: Selector) -> SparsePlan:
    from .plan import Scheme, SparsePlan

    m, wide = found.shape[0], len(found.copies)
    matrix = csr((np.ones(len(found.inner), bool), found.inner, found.ends), shape=(m, wide))
    return SparsePlan(
        Scheme(matrix, Coloring(found.rows, found.columns), found.structure, found.copies),
        found.shape,
        found.final,
        wrt=found.wrt or (lambda name, parameter: name in found.names),
        outputs=outputs,
        tangent=found.tangent,
        local=found.local,
        unknown=found.unknown,
        names=found.names,
    )
