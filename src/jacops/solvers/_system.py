r"""The equations of a solver: $(A + \lambda I) x = b$, with products counted and residuals in double."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor

from .._finite import is_finite, on_finite_rows
from .._operators import Diagonal, Identity, Matrix, Operator, Product, Scaled, Sum, Transposed
from .._operators._data import SumOver
from .._operators._graphs import check_operator
from .._operators._precision import computed_in
from .._progress import tick
from .._requirements import check_positive, check_precision, check_range
from .._runtime.agreement import residual_tolerance
from .._runtime.contexts import private_noise
from ..errors import InputError

RowMap = Callable[[Tensor], Tensor]
# Entries of a matrix that are made double at a time. 8 MiB stay in caches: of a matrix of 4,810 rows, one product took
# 6 ms and 200 took 183, with 128 MiB 90 and 252.
CHUNK_ENTRIES = 2**20
# Norms from 6e-8 to 2e7 need no unit of their own: with condition numbers of 1e6, which is what single precision
# solves, squares of curvatures stay above 1e-27 and below 1e15.
_ORDINARY = 24
# Rows of order one are multiplied by 2 to half of it, which must stay inside the range of the dtype.
_MOST_EXPONENT = {torch.float32: 240, torch.float64: 1900}


@final
class System:
    r"""$A + \lambda I$ acting on rows, in a unit in which its norm is of order one.

    The unit is a power of two $2^e$: solvers work on $A / 2^e$ and $\lambda / 2^e$, so that no square of a norm or
    of a curvature overflows or underflows, and no digit changes. `exponent` is found from the first product that is
    made, at no cost, or from entries that are in memory (`measure`). It is 0 for operators of ordinary size.

    Attributes:
        given: $A$ as the caller has it, square.
        given_damping: $\lambda \ge 0$ as the caller has it.
        products: Rows that went through $A$ so far.
    """

    def __init__(self, operator: Operator, damping: float, tolerance: float | None = None) -> None:
        self.given = operator
        self.given_damping = check_range("damping", damping, zero=True)
        self._tolerance = tolerance
        self.products = 0
        self._exponent: int | None = None
        self._norm: tuple[int, float] | None = None
        _check_operator(operator)

    @property
    def n(self) -> int:
        """Number of unknowns."""
        return self.given.domain.dim

    @property
    def dtype(self) -> torch.dtype:
        """Of a row."""
        return self.given.domain.dtype

    @cached_property
    def eps(self) -> float:
        """Spacing of numbers around 1, in the coarsest precision that products are computed in."""
        return torch.finfo(computed_in(self.given) if self.dtype == torch.float64 else self.dtype).eps

    @cached_property
    def rounding(self) -> float:
        """As `eps`, half precision included: of a model in bfloat16 below adapters in float32, say."""
        return max(self.eps, torch.finfo(computed_in(self.given)).eps)

    @property
    def tolerance(self) -> float:
        """The relative residual to reach, by default 1e-8 in double and 1e-4 in single precision."""
        return self._tolerance or residual_tolerance(self.dtype)

    @property
    def is_positive(self) -> bool:
        """The damped operator is known to be positive definite."""
        return self.given.positive and self.given_damping > 0

    # ---- the unit --------------------------------------------------------------------------------------------------

    @property
    def exponent(self) -> int:
        """The binary exponent e of the unit; costs one product where none was made yet."""
        if self._exponent is None and self.n:
            self.undamped(self.noise(1, 29))
            self.measure(0.0)
        return self.fixed()

    @exponent.setter
    def exponent(self, value: int) -> None:
        self._exponent = value

    def measure(self, size: float) -> None:
        """Fix the unit by an estimate of the norm of $A$, unless it is fixed; a size of 0, NaN or Inf is ignored."""
        size = max(size, self.given_damping)
        if self._exponent is None and 0 < size < math.inf:
            found = math.frexp(size)[1]
            most = _MOST_EXPONENT[self.dtype]
            self._exponent = 0 if abs(found) <= _ORDINARY else min(max(found, -most), most)

    def fixed(self) -> int:
        """Return the exponent, from now on 0 if nothing has determined it."""
        self._exponent = self._exponent or 0
        return self._exponent

    def in_unit(self, value: float) -> float:
        """Return a size of the caller's, such as a damping, in the unit."""
        return ldexp(value, -self.exponent)

    def from_unit(self, value: float) -> float:
        """Return a size in the unit, such as a curvature, as the caller's."""
        return ldexp(value, self.fixed())

    @property
    def damping(self) -> float:
        r"""$\lambda$ in the unit."""
        if self._exponent == 0 or not self.given_damping:
            return self.given_damping
        return self.in_unit(self.given_damping)

    @property
    def operator(self) -> Operator:
        """$A$ in the unit."""
        return Scaled(self.given, ldexp(1.0, -self.exponent)) if self.exponent else self.given

    # ---- rows ------------------------------------------------------------------------------------------------------

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros on the operator's device."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.given.domain.device)

    def noise(self, rows: int, seed: int) -> Tensor:
        """Return normal rows from a private generator."""
        return private_noise(self.zeros(rows, self.n), seed)

    def undamped(self, rows: Tensor) -> Tensor:
        r"""Return $A$ times each row; a row with NaN or Inf is not multiplied, its image is NaN."""
        return self._guarded(self._image, rows)

    def apply(self, rows: Tensor, finite: bool = False) -> Tensor:
        r"""Return $A + \lambda I$ times each row, as `undamped` does; `finite` where all are known to be so."""
        image = self._scaled(self._image, rows) if finite else self.undamped(rows)
        return image.add(rows, alpha=self.damping) if self.given_damping else image

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        r"""Return $b - (A + \lambda I) x$ in double precision, exact products wherever the matrix is in memory.

        Rows of x with NaN or Inf are not multiplied; their residuals are NaN.
        """
        self.fixed()
        wide = x.double()
        image = self._guarded(lambda rows: in_double(self.given, rows).detach(), wide)
        return b.double() - image - self.damping * wide

    def residual_norms(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return norms of residuals `(k,)` for pairs of finite x and b, to the last bit those of `residual`.

        Products of a sum over data share one pass over them; x, b and a product are held for all pairs at once.
        """
        if not isinstance(self.given, SumOver):
            return [torch.linalg.vector_norm(self.residual(x, b), dim=1) for x, b in pairs]
        exponent = self.fixed()
        half, dtype = exponent // 2, self.dtype
        self.products += sum(x.shape[0] for x, _ in pairs)
        tick()
        scaled = [(x.double() * 2.0**-half).to(dtype) if exponent else x for x, _ in pairs]
        images, norms = self.given._apply_each(scaled), list[Tensor]()
        for (x, b), image in zip(pairs, images, strict=True):
            wide = image.detach().double()
            wide = wide * 2.0 ** (half - exponent) if exponent else wide
            norms.append(torch.linalg.vector_norm(b.double() - wide - self.damping * x.double(), dim=1))
        return norms

    @property
    def norm(self) -> float:
        r"""$\lVert A + \lambda I \rVert_2$ from below, by ten steps of the power method (within some per cent)."""
        if self._norm is None or self._norm[0] != self._exponent:
            # Ten steps give the norm within some per cent, from below; the first one fixes the unit.
            found = power_norm(self.apply, self.noise(1, 17), 10)
            self._norm = (self.fixed(), found)
        return self._norm[1]

    def _guarded(self, apply: RowMap, rows: Tensor) -> Tensor:
        """Return images in the unit of the rows that are finite, NaN for the others."""
        if is_finite(rows):
            return self._scaled(apply, rows)
        if not bool(rows.isfinite().all(1).any()):
            return torch.full_like(rows, math.nan)
        return on_finite_rows(partial(self._scaled, apply), rows)

    def _scaled(self, apply: RowMap, rows: Tensor) -> Tensor:
        """Return images in the unit: half of it before and half after, so that factors like J overflow neither."""
        self.products += rows.shape[0]
        tick()
        half, exponent = (self._exponent or 0) // 2, self._exponent or 0
        return apply(rows * 2.0**-half) * 2.0 ** (half - exponent) if exponent else apply(rows)

    def _image(self, rows: Tensor) -> Tensor:
        """Return products with $A$; the first ones fix the unit."""
        image = self.given._apply(rows).detach()
        if self._exponent is not None:
            return image
        size = _stretch(rows, image)
        if 0 < size < math.inf:
            self.measure(size)
            return shifted(image, -(self._exponent or 0))
        return self._from_afar(rows, image, size)

    def _from_afar(self, rows: Tensor, image: Tensor, size: float) -> Tensor:
        """Make products that overflowed or vanished again, from rows shifted by a quarter of the range of the dtype."""
        shift = (_MOST_EXPONENT[self.dtype] // 4) * (1 if size == 0 else -1)
        again = self.given._apply(shifted(rows, shift)).detach()
        self.products += rows.shape[0]
        size = _stretch(rows, again)
        if not 0 < size < math.inf:
            return image
        self.measure(ldexp(size, -shift))
        return shifted(again, -shift - (self._exponent or 0))


def power_norm(apply: RowMap, rows: Tensor, steps: int) -> float:
    """Return the norm of a symmetric map from below, by the power method from several starts at once."""
    found = 0.0
    for _ in range(steps if rows.numel() else 0):
        rows = apply(rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))
        reached = float(rows.double().norm(dim=1).max())
        if not 0 < reached < math.inf:
            return found if reached == 0 else math.inf
        found = max(found, reached)
    return found


def _stretch(rows: Tensor, image: Tensor) -> float:
    """Return the largest ratio of largest entries, which cannot overflow; NaN or Inf where an image is not finite."""
    if not rows.numel():
        return 0.0
    before, after = (part.abs().amax(1).double() for part in (rows, image))
    return float((after / before.clamp_min(torch.finfo(torch.float64).tiny)).max())


def shifted(rows: Tensor, shift: int, in_place: bool = False) -> Tensor:
    """Return rows times a power of two, in two halves, of which none leaves the range of the dtype."""
    if not shift:
        return rows
    halves = 2.0 ** (shift // 2), 2.0 ** (shift - shift // 2)
    return rows.mul_(halves[0]).mul_(halves[1]) if in_place else (rows * halves[0]).mul_(halves[1])


def largest_entry(matrix: Tensor) -> float:
    """Return the size of the largest entry, without a copy; 0 where there is none, NaN where one is NaN."""
    if not matrix.numel():
        return 0.0
    low, high = (float(part) for part in torch.aminmax(matrix))
    return max(-low, high)


def ordinary(size: float) -> bool:
    """Whether the squares of numbers of a size are far from the ends of the range of single precision, or it is 0."""
    return size == 0 or 2.0**-_ORDINARY <= size <= 2.0**_ORDINARY


def ldexp(value: float, shift: int) -> float:
    """Return a number times a power of two; Inf where that is too large."""
    try:
        return math.ldexp(value, shift)
    except OverflowError:
        return math.copysign(math.inf, value)


def in_double(operator: Operator, rows: Tensor) -> Tensor:
    """Return an operator times rows of double precision, computed in double as far as its entries are in memory."""
    if operator.domain.dtype == torch.float64:
        return operator._apply(rows)
    match operator:
        case Matrix():
            step = max(1, CHUNK_ENTRIES // max(1, operator.shape[1]))
            image = rows.new_empty(len(rows), operator.shape[0])
            for start, part in enumerate(operator.matrix.split(step)):
                image[:, start * step : start * step + len(part)] = rows @ part.double().T
            return image
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
            step = max(1, CHUNK_ENTRIES // max(1, of.shape[1]))
            pairs = zip(rows.split(step, 1), of.matrix.split(step), strict=True)
            return sum((part @ block.double() for part, block in pairs), rows.new_zeros(rows.shape[0], of.shape[1]))
    return operator._apply(rows.to(operator.domain.dtype)).double()


def symmetric_system(
    operator: Operator, damping: float, method: str, tolerance: float | None = None, max_steps: int | None = None
) -> System:
    """Return the equations for a method that needs a symmetric operator.

    Raises:
        InputError: The operator is not symmetric, or an option is out of range.
    """
    check_options(tolerance, max_steps)
    system = System(operator, damping, tolerance)
    check_symmetric(system, method)
    return system


def check_options(tolerance: float | None, max_steps: int | None) -> None:
    """Refuse options out of range.

    Raises:
        InputError: One is.
    """
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError.of("tolerance", repr(tolerance), "a number between 0 and 1 is needed")
    if max_steps is not None:
        check_positive("max_steps", max_steps)


def check_symmetric(system: System, method: str) -> None:
    """Check an operator that is not marked symmetric for symmetry, with two products.

    Raises:
        InputError: It is not symmetric.
    """
    if system.given.symmetric or system.given.positive or system.n == 0:
        return
    u, v = system.noise(2, 23)
    image_u, image_v = system.undamped(torch.stack([u, v]))
    gap = abs(float(image_u @ v) - float(u @ image_v))
    scale = max(float(image_u.norm() * v.norm()), float(image_v.norm() * u.norm()))
    # Rounding of n terms, or of sums over data inside; what is not symmetric is off by a share of 1.
    if gap > max(1e3, system.n) * system.eps * scale:
        came = f"not symmetric (<Au, v> and <u, Av> differ by {gap:.1e} at a scale of {scale:.1e})"
        raise InputError.of("operator", came, f"{method} needs a symmetric one", "Use `Direct()`.")


def _check_operator(operator: Any) -> None:
    check_operator(operator)
    if operator.shape[0] != operator.shape[1]:
        raise InputError.of("operator", f"of shape {operator.shape}", "a square one is needed")
    check_precision("operator", operator.domain.dtype, "solves need")
