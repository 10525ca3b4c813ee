"""Pattern: where a Jacobian may hold something other than zero, and a small picture of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from torch import Tensor

from .._display import Described, Description
from .._figures import canvas, spy
from ..errors import InputError, InputTypeError
from ._matrix import Csr, csr, sp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS = 48  # at most so many dots each way; a braille character holds two by four
_BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


@dataclass(frozen=True, eq=False, repr=False)
class Pattern(Described):
    """The positions where a Jacobian may be nonzero.

    It never lacks an entry that is not zero; it may hold some that are. Indices that depend on values (of sorting, of
    pooling by maxima) are those of the point it was made at; `where` may take either branch, unless it is local.

    Attributes:
        matrix: True where an entry may be nonzero, (m, n), scipy CSR.
        local: It holds at this point only, entries that are zero here left out; otherwise zeros that depend on the
            point are kept, and it can be used again at others.
        unknown: Operations without a rule, treated as dense, and how often each occurs.
    """

    matrix: Csr
    local: bool = False
    unknown: Mapping[str, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, `(m, n)`."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def nnz(self) -> int:
        """Number of entries that may be nonzero."""
        return int(self.matrix.nnz)

    def spy(self) -> str:
        """Return a picture of at most 12 lines, a dot where there is an entry."""
        coordinates = self.matrix.tocoo()
        return picture(coordinates.row, coordinates.col, self.shape)

    @overload
    def plot(self, *, ax: None = None) -> Figure: ...
    @overload
    def plot(self, *, ax: Axes) -> Axes: ...
    def plot(self, *, ax: Axes | None = None) -> Figure | Axes:
        """Draw where there are entries, up to 256 × 256 cells; a cell that stands for several is filled if one is.

        Args:
            ax: Matplotlib axes to draw into; a new figure otherwise, which `pyplot.show` does not show.

        Returns:
            The figure; the axes where they were given.

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        drawn, (panel,) = canvas(ax, (4.5, 4.5))
        coordinates = self.matrix.tocoo()
        spy(panel, coordinates.row, coordinates.col, self.shape)
        m, n = self.shape
        panel.set_title(f"{m:,} × {n:,}, {self.nnz:,} entries", fontsize=10)
        return drawn

    def _describe(self) -> Description:
        (m, n), kind = self.shape, "local" if self.local else "reusable"
        share = self.nnz / max(m * n, 1)
        title = f"Pattern({m:,} × {n:,}, {self.nnz:,} entries, {kind}): {share:.2g} of all"
        unknown = [("unknown operations", ", ".join(self.unknown))] if self.unknown else []
        return Description(title, unknown, picture=self.spy())


def picture(rows: Any, columns: Any, shape: tuple[int, int]) -> str:
    """Return entries of a matrix as braille dots, several to a dot where the matrix is large."""
    m, n = shape
    if not m or not n:
        return ""
    high, wide = min(m, _DOTS), min(n, _DOTS)
    dots = np.zeros((-(-high // 4) * 4, -(-wide // 2) * 2), bool)
    dots[np.asarray(rows, np.int64) * high // m, np.asarray(columns, np.int64) * wide // n] = True
    cells = dots.reshape(dots.shape[0] // 4, 4, dots.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    codes = 0x2800 + (cells * _BRAILLE).sum((2, 3))
    return "\n".join("".join(map(chr, line)) for line in codes)


def declared(value: Any, shape: tuple[int, int]) -> Pattern:
    """Return a pattern from what a user declares: a `Pattern`, or a scipy, torch or NumPy matrix.

    Raises:
        InputTypeError: It is none of these.
        InputError: It has another shape than the Jacobian.
    """
    if isinstance(value, Pattern):
        matrix = value.matrix
    elif sp.issparse(value):
        matrix = _stored(value.tocoo())
    elif isinstance(value, Tensor):
        matrix = _from_torch(value)
    elif isinstance(value, np.ndarray):
        matrix = csr(value != 0)
    else:
        came = f"a {type(value).__name__}"
        raise InputTypeError.of("pattern", came, "a scipy or torch sparse matrix or a Pattern is needed")
    if tuple(matrix.shape) != shape:
        raise InputError.of("pattern", f"of shape {tuple(matrix.shape)}", f"the Jacobian has shape {shape}")
    return value if isinstance(value, Pattern) else Pattern(matrix)


def _stored(entries: Any) -> Csr:
    """Return every stored entry as True, explicit zeros too: they are declared as well."""
    ones = np.ones(len(entries.row), bool)
    return csr(sp.coo_array((ones, (entries.row, entries.col)), shape=entries.shape))


def _from_torch(value: Tensor) -> Csr:
    if value.ndim != 2:
        raise InputError.of("pattern", f"of shape {tuple(value.shape)}", "two axes are needed")
    value = value.detach().cpu()
    entries = (value if value.is_sparse else value.to_sparse(2)).coalesce()
    row, column = entries.indices().numpy()
    return csr(sp.coo_array((np.ones(len(row), bool), (row, column)), shape=tuple(value.shape)))
