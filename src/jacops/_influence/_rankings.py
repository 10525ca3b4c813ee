"""Results that hold less than the whole matrix of influences: the strongest, sums over groups; and more: by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from .._display import Described, Description, Table, listed
from .._interop import ArrayLike, as_array
from .._saving import Savable
from .._tables import Names, matrix_table, names_of, tidy_table
from .._words import Which

if TYPE_CHECKING:
    import pandas

_TESTS, _STRONGEST, _GROUPS = 5, 3, 6  # rows and columns of a repr


@dataclass(frozen=True, eq=False, repr=False)
class RankedInfluences(ArrayLike, Savable, Described):
    """The training samples of largest influence for every test sample; unpacks as `values, indices`.

    Attributes:
        values: `(n_test, k)`, the largest first; ties are broken by the index.
        indices: Which training samples, `(n_test, k)`.
        which: What counts as strong: `"largest"`, `"smallest"` or `"magnitude"`.
        rows: Training samples that they were chosen from.
        info: Solver, damping, curvature, rows, residuals and statuses.
    """

    values: Tensor
    indices: Tensor
    which: Which
    rows: int
    info: dict[str, Any] = field(default_factory=dict)
    _array: ClassVar[str] = "values"

    def __iter__(self) -> Iterator[Tensor]:
        """Yield values, then indices."""
        return iter((self.values, self.indices))

    def __len__(self) -> int:
        """Number of test samples."""
        return len(self.values)

    def to_pandas(self, *, test: Names = None, train: Names = None) -> pandas.DataFrame:
        """Return a table with a row per test sample and rank: `test`, `rank`, `train`, `influence`.

        Args:
            test: Names of the test samples; by default positions.
            train: Names of the training samples.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
            InputError: Names are too few or too many.
        """
        rows, columns = names_of("test", test, len(self)), names_of("train", train, self.rows)
        ranks = np.arange(1, self.values.shape[1] + 1)
        table = tidy_table(as_array(self.values), [("test", rows), ("rank", ranks)], "influence")
        table.insert(2, "train", np.asarray(columns)[as_array(self.indices).reshape(-1)])
        return table

    def _describe(self) -> Description:
        n, k = self.values.shape
        title = f"RankedInfluences({n:,} × {k:,} of {self.rows:,}, {_dtype(self.values)}): {self.which}"
        shown = range(min(k, _STRONGEST))
        lines = [
            (f"{i}", "  ".join(f"#{int(self.indices[i, j])} {float(self.values[i, j]):+.2g}" for j in shown))
            for i in range(min(n, _TESTS))
        ]
        more: list[tuple[str, ...]] = [(f"… {n - _TESTS} more",)] if n > _TESTS else []
        return Description(title, _solved(self.info), [Table(("test sample", self.which), [*lines, *more])])


@dataclass(frozen=True, eq=False, repr=False)
class GroupedInfluences(ArrayLike, Savable, Described):
    """Influences summed over groups of training samples.

    Attributes:
        values: `(n_test, n_groups)`: influences of the samples of a group, added up.
        names: The groups.
        counts: Training samples of each, `(n_groups,)`.
        weighted: The same sums with each sample times its weight in the objective.
        info: Solver, damping, curvature, rows, residuals and statuses.
    """

    values: Tensor
    names: list[Any]
    counts: Tensor
    weighted: Tensor
    info: dict[str, Any] = field(default_factory=dict)
    _array: ClassVar[str] = "values"

    def __len__(self) -> int:
        """Number of test samples."""
        return len(self.values)

    def leave_group_out(self) -> Tensor:
        """Return by how much each test loss would rise without each group, `(n_test, n_groups)`, to first order."""
        return self.weighted

    def to_pandas(self, *, test: Names = None) -> pandas.DataFrame:
        """Return a table with a row per test sample and a column per group.

        Args:
            test: Names of the test samples; by default positions.

        Raises:
            MissingExtraError: Pandas is not installed (extra `pandas`).
            InputError: Names are too few or too many.
        """
        return matrix_table(as_array(self), ("test", names_of("test", test, len(self))), ("group", self.names))

    def _describe(self) -> Description:
        n, groups = self.values.shape
        title = f"GroupedInfluences({n:,} × {groups:,} groups, {_dtype(self.values)})"
        counts = [f"{name} ({int(count)})" for name, count in zip(self.names, self.counts, strict=True)]
        header = ["test sample", *(f"{name}" for name in self.names[:_GROUPS])]
        lines = [[f"{i}", *(f"{float(v):+.2g}" for v in self.values[i, :_GROUPS])] for i in range(min(n, _TESTS))]
        return Description(title, [("groups", listed(counts)), *_solved(self.info)], [Table(header, lines)])


@dataclass(frozen=True, eq=False, repr=False)
class LayerInfluences(ArrayLike, Savable, Described):
    """Influences split by the parameters that they go through; they add up to the whole.

    Attributes:
        values: `(n_test, n_train, n_parameters)`.
        names: The parameters, or modules.
        info: Solver, damping, curvature, rows, residuals and statuses.
    """

    values: Tensor
    names: list[str]
    info: dict[str, Any] = field(default_factory=dict)
    _array: ClassVar[str] = "values"

    def __len__(self) -> int:
        """Number of test samples."""
        return len(self.values)

    def total(self) -> Tensor:
        """Return the influences themselves, `(n_test, n_train)`."""
        return self.values.sum(2)

    def by_module(self, depth: int | None = None) -> LayerInfluences:
        """Return influences added up over the parameters of every module.

        Args:
            depth: How many parts of a module's name count, such as 2 for `"transformer.h"`; by default all of them.
        """
        modules = [".".join(name.split(".")[:-1][:depth]) for name in self.names]
        names = list(dict.fromkeys(modules))
        values = self.values.new_zeros(*self.values.shape[:2], len(names))
        for i, module in enumerate(modules):
            values[:, :, names.index(module)] += self.values[:, :, i]
        return replace(self, values=values, names=names)

    def _describe(self) -> Description:
        n, m, parts = self.values.shape
        title = f"LayerInfluences({n:,} × {m:,} × {parts:,}, {_dtype(self.values)})"
        sizes = self.values.square().mean((0, 1)).sqrt()
        lines = [[name, f"{float(size):.2g}"] for name, size in zip(self.names, sizes, strict=True)]
        return Description(title, _solved(self.info), [Table(("parameter", "root mean square"), lines)])


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _solved(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what made the scores, in words."""
    if not info:
        return []
    damping = f", damping {info['damping']:g}" if isinstance(info.get("damping"), float) else ""
    return [("scores", f"{info['method']}: {info['status']}, {info['curvature']}{damping}")]
