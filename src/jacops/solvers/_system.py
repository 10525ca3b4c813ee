r"""The equations a solver sees: $(A + \lambda I) x = b$, with products counted and residuals in double."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from .._backends._torch.surroundings import private_noise
from ..errors import InputError, InputTypeError, explain
from ..operators import Diagonal, Identity, Matrix, Operator, Product, Scaled, Sum, Transposed

_CHUNK_ENTRIES = 2**24  # entries of a matrix that are made double at a time


@final
class System:
    r"""$A + \lambda I$ acting on rows.

    Attributes:
        operator: $A$, square.
        damping: $\lambda \ge 0$.
        products: Rows that went through $A$ so far.
    """

    def __init__(self, operator: Operator, damping: float) -> None:
        self.operator = operator
        self.damping = _checked_damping(damping)
        self.products = 0
        _check_operator(operator)

    @property
    def n(self) -> int:
        """Number of unknowns."""
        return self.operator.domain.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of a row."""
        return self.operator.domain.dtype

    @property
    def eps(self) -> float:
        """Spacing of numbers around 1."""
        return torch.finfo(self.dtype).eps

    @property
    def tolerance(self) -> float:
        """The default relative residual: 1e-8 in double, 1e-4 in single precision."""
        return 1e-8 if self.dtype == torch.float64 else 1e-4

    @property
    def is_positive(self) -> bool:
        """The damped operator is known to be positive definite."""
        return self.operator.positive and self.damping > 0

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros where the operator lives."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.operator.domain.device)

    def noise(self, rows: int, seed: int) -> Tensor:
        """Return normal rows from a private generator."""
        return private_noise(self.zeros(rows, self.n), seed)

    def undamped(self, rows: Tensor) -> Tensor:
        r"""Return $A$ times each row."""
        self.products += rows.shape[0]
        return self.operator._apply(rows).detach()

    def apply(self, rows: Tensor) -> Tensor:
        r"""Return $A + \lambda I$ times each row."""
        image = self.undamped(rows)
        return image.add(rows, alpha=self.damping) if self.damping else image

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        r"""Return $b - (A + \lambda I) x$ in double precision, exact products wherever the matrix is in memory."""
        self.products += x.shape[0]
        wide = x.double()
        return b.double() - in_double(self.operator, wide).detach() - self.damping * wide

    @cached_property
    def norm(self) -> float:
        r"""$\lVert A + \lambda I \rVert_2$ from below, by ten steps of the power method (within some per cent)."""
        row, found = self.noise(1, 17), 0.0
        for _ in range(10):
            row = row / row.norm().clamp_min(torch.finfo(self.dtype).tiny)
            row = self.apply(row)
            size = float(row.double().norm())
            if not math.isfinite(size) or size == 0.0:
                return found if size == 0.0 else math.inf
            found = max(found, size)
        return found


def in_double(operator: Operator, rows: Tensor) -> Tensor:
    """Return an operator times rows of double precision, computed in double as far as its entries are in memory."""
    if operator.domain.dtype == torch.float64:
        return operator._apply(rows)
    match operator:
        case Matrix():
            step = max(1, _CHUNK_ENTRIES // max(1, operator.shape[1]))
            parts = [rows @ part.double().T for part in operator.matrix.split(step)]
            return torch.cat(parts, 1) if parts else operator._apply(rows.to(operator.domain.dtype)).double()
        case Diagonal():
            return rows * operator.entries.double()
        case Identity():
            return rows
        case Scaled():
            return operator.factor * in_double(operator.of, rows)
        case Sum():
            return in_double(operator.left, rows) + in_double(operator.right, rows)
        case Product():
            return in_double(operator.left, in_double(operator.right, rows))
        case Transposed(of=Matrix() as of):
            step = max(1, _CHUNK_ENTRIES // max(1, of.shape[1]))
            pairs = zip(rows.split(step, 1), of.matrix.split(step), strict=True)
            return sum((part @ block.double() for part, block in pairs), rows.new_zeros(rows.shape[0], of.shape[1]))
    return operator._apply(rows.to(operator.domain.dtype)).double()


def check_symmetric(system: System, method: str) -> None:
    """Hold an operator that is not marked symmetric to symmetry, with two products.

    Raises:
        InputError: It is not symmetric.
    """
    operator = system.operator
    if operator.symmetric or operator.positive or system.n == 0:
        return
    u, v = system.noise(2, 23)
    image_u, image_v = system.undamped(torch.stack([u, v]))
    gap = abs(float(image_u @ v) - float(u @ image_v))
    scale = max(float(image_u.norm() * v.norm()), float(image_v.norm() * u.norm()))
    if gap > max(1e3, system.n) * system.eps * scale:
        came = f"not symmetric (<Au, v> and <u, Av> differ by {gap:.1e} at a scale of {scale:.1e})"
        raise InputError(explain("operator", came, f"{method} needs a symmetric one", "Use `Direct()`."))


def _check_operator(operator: Any) -> None:
    if not isinstance(operator, Operator):
        came = f"a {type(operator).__name__}"
        raise InputTypeError(explain("operator", came, "an Operator is needed", "Wrap a tensor: `Matrix(tensor)`."))
    if operator.shape[0] != operator.shape[1]:
        raise InputError(explain("operator", f"of shape {operator.shape}", "a square one is needed"))
    if operator.domain.dtype not in (torch.float32, torch.float64):
        came = f"of {operator.domain.dtype}"
        raise InputError(explain("operator", came, "solves need float32 or float64", "Convert the model first."))


def _checked_damping(damping: Any) -> float:
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise InputError(explain("damping", repr(damping), "a finite number that is not negative is needed"))
    return float(damping)
