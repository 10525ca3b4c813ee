"""Results as pandas tables (extra `pandas`), with names for what their axes count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from .errors import InputError, MissingExtraError

Names = Sequence[Any] | None


def pandas() -> Any:
    """Return the module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import pandas as module
    except ImportError as error:
        raise MissingExtraError("pandas", "pandas") from error
    return module


def names_of(argument: str, names: Names, count: int) -> Any:
    """Return one name per entry of an axis; by default positions from 0.

    Raises:
        InputError: There are more or fewer names than entries.
    """
    if names is None:
        return np.arange(count)
    found = list(names)
    if len(found) != count:
        raise InputError.of(argument, f"{len(found)} names", f"{count} are needed, one for each")
    return found


def feature_axes(shape: Sequence[int], names: Names = None) -> list[tuple[str, Any]]:
    """Return the axes of features with their labels: `feature`, or `feature_0`, `feature_1`, … where there are more.

    Raises:
        InputError: Names are given, but are not one for each feature of one axis.
    """
    if len(shape) == 1:
        return [("feature", names_of("features", names, shape[0]))]
    if names is not None:
        raise InputError.of("features", "given", f"features have axes {tuple(shape)} and are named by positions")
    return [(f"feature_{axis}", np.arange(count)) for axis, count in enumerate(shape)]


def matrix_table(values: np.ndarray, rows: tuple[str, Any], columns: tuple[str, Any]) -> Any:
    """Return a matrix as a table; rows and columns have a label each, and names."""
    pd = pandas()
    index, across = pd.Index(rows[1], name=rows[0]), pd.Index(columns[1], name=columns[0])
    return pd.DataFrame(values, index=index, columns=across)


def tidy_table(values: np.ndarray, axes: Sequence[tuple[str, Any]], name: str) -> Any:
    """Return an array as a table of one row per entry: a column for every axis, and one of the values."""
    places = np.indices(values.shape).reshape(values.ndim, -1)
    columns = {label: pandas().Index(names).take(place) for (label, names), place in zip(axes, places, strict=True)}
    return pandas().DataFrame({**columns, name: values.reshape(-1)})


def record_table(records: Iterable[Any], kind: Any, index: str) -> Any:
    """Return dataclasses of a kind as a table of one row each."""
    columns = [field.name for field in fields(kind)]
    rows = [[getattr(record, name) for name in columns] for record in records]
    return pandas().DataFrame(rows, columns=columns).set_index(index)
