"""The contents of a plan file, validated field by field before a plan is built from them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ._coloring import most_colors
from ._matrix import csr
from ._pool import Array

_ABOUT = {"version", "shape", "wide", "symmetric", "wrt", "names", "outputs", "tangent", "local", "unknown"}
_ARRAYS = {"about", "ends", "inner", "rows", "columns", "copies", "final", "structure"}


def checked_plan(arrays: dict[str, np.ndarray], version: int) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return what these arrays describe a plan by, all of whose parts fit each other, and the arrays of its numbers.

    Raises:
        ValueError: They describe none of this version.
    """
    _require(set(arrays) == _ARRAYS, f"its arrays are not {', '.join(sorted(_ARRAYS))}")
    about = _about(arrays["about"], version)
    whole = {k: v for k, v in arrays.items() if k != "about"}
    for name, array in whole.items():
        rank = 2 if name == "structure" else 1
        _require(array.dtype.kind == "i" and array.ndim == rank, f"{name!r} is not of whole numbers in {rank} axes")
    shape, wide = tuple(about["shape"]), about["wide"]
    _check_places(shape, wide, whole)
    _check_colors(shape, wide, whole)
    return about, {name: array.astype(np.int64) for name, array in whole.items()}


def _about(text: np.ndarray, version: int) -> dict[str, Any]:
    """Return the fields that are not arrays, each of the kind that `save` writes."""
    _require(text.dtype.kind == "U" and text.ndim == 0, "'about' is not a text")
    try:
        about = json.loads(str(text))
    except RecursionError:
        raise ValueError("'about' is nested too deeply") from None
    _require(isinstance(about, dict) and set(about) >= {"version"}, "'about' is no description of a plan")
    if about["version"] != version:
        raise ValueError(f"a plan of version {about['version']!r}, and this jacops reads version {version}")
    _require(set(about) == _ABOUT, "'about' lacks fields or has others")
    shape, outputs, unknown = about["shape"], about["outputs"], about["unknown"]
    right = {
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape)),
        "wide": _is_count(about["wide"]),
        "symmetric": about["symmetric"] is False,
        "wrt": about["wrt"] in (None, "parameters", "inputs"),
        "names": _are(about["names"], _is_text),
        "outputs": isinstance(outputs, dict) and len(outputs) == 1 and _are_outputs(outputs),
        "tangent": isinstance(about["tangent"], bool),
        "local": isinstance(about["local"], bool),
        "unknown": isinstance(unknown, dict) and all(_is_text(k) and _is_count(v) for k, v in unknown.items()),
    }
    for name, holds in right.items():
        _require(holds, f"{name!r} is not what a plan has there")
    return about


def _are_outputs(outputs: dict[str, Any]) -> bool:
    if "again" in outputs:
        return _is_text(outputs["again"])
    if "is" not in outputs:
        return False
    given = outputs["is"]
    return given is None or _is_output(given) or _are(given, _is_output)


def _is_output(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value)  # which cannot be printed


def _are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(map(kind, values))


def _check_places(shape: tuple[int, int], wide: int, arrays: dict[str, np.ndarray]) -> None:
    """Refuse arrays that point beyond each other."""
    (m, n), (ends, inner, final, copies) = shape, (arrays[k] for k in ("ends", "inner", "final", "copies"))
    structure = arrays["structure"]
    _require(len(ends) == m + 1 and ends[0] == 0 and ends[-1] == len(inner), "row pointers do not fit")
    _require(_within(ends, 0, len(inner) + 1) and bool((np.diff(ends) >= 0).all()), "row pointers do not rise")
    _require(_within(inner, 0, wide), "column indices do not fit")
    free = final[final != n]
    _require(np.array_equal(free, np.arange(n)), "columns do not count what is free")
    _require(len(copies) == wide and _within(copies, 0, len(final)), "copies do not fit")
    _require(structure.shape[1] == 2 and _within(structure, 0, wide + 1), "selections do not fit")
    _require(len(final) + sum(map(int, structure[:, 1])) == wide, "selections do not add up")
    padded = (final == n)[copies]
    _require(not (padded.any() and padded[inner].any()), "there are entries in columns of padding")


def _check_colors(shape: tuple[int, int], wide: int, arrays: dict[str, np.ndarray]) -> None:
    """Refuse colours with gaps, or more of them than any colouring of the pattern takes."""
    rows, columns, inner = arrays["rows"], arrays["columns"], arrays["inner"]
    _require(len(rows) == shape[0] and len(columns) == wide, "colours do not fit")
    matrix = csr((np.ones(len(inner), bool), inner, arrays["ends"]), shape=(shape[0], wide))
    for name, colors, most in (("rows", rows, most_colors(matrix)), ("columns", columns, most_colors(csr(matrix.T)))):
        _require(_within(colors, -1, most), f"there are more colours of {name} than any colouring takes")
        _require(bool(np.bincount(colors[colors >= 0]).all()), f"colours of {name} have gaps")


def _within(places: np.ndarray, low: int, end: int) -> bool:
    return not places.size or (int(places.min()) >= low and int(places.max()) < end)


def _require(holds: bool, trouble: str) -> None:
    if not holds:
        raise ValueError(trouble)
