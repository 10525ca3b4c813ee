"""Which tangent columns belong to which rows of a parameter, for what is asked of a fit afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from .._requirements import check_kind
from .._saving import Savable
from ..errors import InputError


@dataclass(frozen=True, eq=False)
class ParameterColumns(Savable):
    """The columns of one parameter.

    Attributes:
        name: Its name.
        lead: Axes of its elements; one number is an element where there is no chart.
        width: Tangent directions per element.
        kept: Positions of the directions that move, among all of its own; None for all.
        start: The first of its columns among those of all parameters.
    """

    name: str
    lead: tuple[int, ...]
    width: int
    kept: np.ndarray | None
    start: int

    @property
    def count(self) -> int:
        """Rows: places of the first axis, or one if there is none."""
        return self.lead[0] if self.lead else 1

    @property
    def numbers(self) -> np.ndarray:
        """The column of each direction, (rows, directions of a row); -1 for those that do not move."""
        size = prod(self.lead) * self.width
        kept = np.arange(size) if self.kept is None else self.kept
        found = np.full(size, -1)
        found[kept] = self.start + np.arange(len(kept))
        return found.reshape(self.count, size // self.count if self.count else 0)

    def rows(self, rows: Any) -> np.ndarray:
        """Return the columns of chosen rows, (rows, directions of a row); None for all.

        Raises:
            InputError: They are no rows of this parameter.
        """
        numbers = self.numbers
        if rows is None or rows is True:
            return numbers
        if isinstance(rows, Tensor):
            rows = rows.detach().cpu().numpy()
        try:
            index = np.arange(self.count)[rows if isinstance(rows, slice) else np.asarray(rows)]
        except (IndexError, TypeError, ValueError) as error:
            needed = f"rows of its {self.count} are needed, or a mask over them ({error})"
            raise InputError.of("rows", f"{rows!r} for '{self.name}'", needed) from None
        if index.ndim > 1:
            raise InputError.of("rows", f"of shape {index.shape} for '{self.name}'", "a list of rows is needed")
        return numbers[np.atleast_1d(index)]


@dataclass(frozen=True, eq=False)
class FitColumns(Savable):
    """The columns of all parameters, in their order.

    Attributes:
        parts: The parameters.
    """

    parts: tuple[ParameterColumns, ...]

    def of(self, name: Any) -> ParameterColumns:
        """Return the columns of a parameter; None means the only one.

        Raises:
            InputTypeError: The name is no text.
            InputError: There is no such parameter, or there are several to choose from.
        """
        names = [part.name for part in self.parts]
        if name is None:
            if len(names) > 1:
                raise InputError.of("name", "left out", f"the parameter is needed, one of {names}")
            return self.parts[0]
        check_kind("name", name, str, f"a parameter's name is needed, one of {names}")
        if name not in names:
            raise InputError.of("name", repr(name), f"the parameters that were fitted are {names}")
        return self.parts[names.index(name)]

    def chosen(self, columns: Any, rows: Any) -> np.ndarray:
        """Return columns one after the other, given by name, names, rows by name, or as numbers; -1 for fixed ones.

        Raises:
            InputError: They do not exist.
        """
        if isinstance(columns, str):
            return self.of(columns).rows(rows).reshape(-1)
        if rows is not None:
            raise InputError.of("rows", "given", "they belong to one parameter", "Pass its name before them.")
        if isinstance(columns, Mapping):
            return np.concatenate(
                [np.zeros(0, np.int64), *(self.of(n).rows(own).reshape(-1) for n, own in columns.items())]
            )
        return np.concatenate([self.of(name).numbers.reshape(-1) for name in columns])

    def home(self, column: int) -> tuple[str, tuple[int, ...]]:
        """Return which parameter a column belongs to, and the place of its element."""
        part = next(part for part in reversed(self.parts) if part.start <= column)
        own = column - part.start if part.kept is None else part.kept[column - part.start]
        return part.name, tuple(int(k) for k in np.unravel_index(own // part.width, part.lead)) if part.lead else ()
