r"""Direct: factorise the dense matrix, or, for a congruence with few rows, the one in the space of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from .._finite import is_finite, on_finite_rows
from .._lanczos import KrylovSpace
from .._operators import Identity, LayerFactors, Matrix, Operator
from .._runtime.contexts import in_own_dtype, private_noise
from .._runtime.restoring import restoring
from ..errors import InputError, NonFiniteError
from ._base import Prepared, Raw, Solver
from ._cholesky import by_cholesky, cholesky, symmetric_map
from ._judge import condition_limit
from ._refine import IterationResult, refined
from ._solution import Status
from ._structure import Congruence, congruence, dense_of, in_memory, is_symmetric
from ._system import RowMap, System, in_double, largest_entry, ldexp, shifted

_EXACT_SPECTRUM = 2048  # up to so many unknowns all eigenvalues explain a failure, in seconds
_STEPS = 120  # of Lanczos, beyond that: extreme Ritz values settle first, and a message needs one digit
# Of Lanczos, for norms of a matrix and its inverse: of n unknowns, they err by 0.1 (log n / 7)^2 on average at the
# most, 0.19 for a million (Kuczynski and Wozniakowski, 1992).
_NORM_STEPS = 8
_DENSE_FACTOR = 2**26  # entries of a factor J that are kept in memory: 512 MiB in float64


@final
@dataclass(frozen=True)
class Direct(Solver):
    r"""Factorise once, then solve for any number of right-hand sides; refined where the residual is too large.

    A symmetric matrix takes Cholesky's factorisation, which fails, and reports on the lowest eigenvalue, where the
    matrix is not positive definite; a general one takes LU. A positive operator written $s J^\top S J$ with fewer rows
    in $J$ than unknowns, under damping, is solved in the space of rows (Woodbury): $(A + \lambda I)^{-1} =
    \frac1\lambda (I - J^\top (\lambda I + s S J J^\top)^{-1} s S J)$.

    Attributes:
        indefinite: Take indefinite matrices too, by a symmetric indefinite factorisation (Bunch and Kaufman, 1977).
        max_condition: From which condition number on the matrix counts as singular; 1e14 in float64, 1e6 in float32.
        tolerance: On the relative residual.
        dual: Solve in the space of rows; by default where that is possible and smaller.
    """

    indefinite: bool = False
    max_condition: float | None = None
    tolerance: float | None = None
    dual: bool | None = None

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Factorise.

        Raises:
            InputError: `dual=True`, but the operator is not a positive congruence under damping.
        """
        system = System(operator, damping, self.tolerance)
        found = congruence(operator) if operator.positive and self.dual is not False else None
        found = found if found is not None and system.given_damping + found.shift > 0 else None
        if self.dual and found is None:
            needed = "`dual=True` needs a positive `J.T @ S @ J` and damping"
            raise InputError.of("operator", repr(operator), needed)
        if found is not None and (self.dual or found.J.shape[0] < system.n):
            return _Dual(self, system, found)
        return _Primal(self, system)


class _Factorised(Prepared):
    """What both ways share: refinement, and failing every row where the matrix is singular."""

    method = "direct"
    norm: float
    recipe: Direct
    once: RowMap
    image: RowMap | None = None  # the damped operator in double, where its entries are in memory
    # Of the tolerance: a step costs as much as the first one.
    share = 0.1

    def __init__(self, recipe: Direct, system: System) -> None:
        self.recipe, self.system = recipe, system
        self.failed: Status | None = None
        self.info: dict[str, Any] = {}

    def _judge_condition(self, condition: float) -> None:
        self.info["condition"] = condition
        if not condition <= (self.recipe.max_condition or condition_limit(self.system.dtype)):
            self.failed = self.failed or Status.SINGULAR

    def _solve(self, rows: Tensor) -> Raw:
        k = rows.shape[0]
        if self.failed:
            return Raw(self.once(rows), [0] * k, dict.fromkeys(range(k), self.failed), self.norm, self.info)

        def run(rows: Tensor, goals: Tensor, most: int) -> IterationResult:
            return IterationResult(self.once(rows), [0] * rows.shape[0])  # no norm: steps below rounding pay too

        last: list[tuple[Tensor, Tensor]] = []

        def residual(x: Tensor, rows: Tensor) -> Tensor:
            last[:] = [(x, self._left(x, rows))]
            return last[0][1]

        raw = refined(self.system, rows, 1, run, residual, share=self.share)
        known = last[0][1] if last and last[0][0] is raw.x else None
        left = raw.left if self._stands_for_operator(raw.x, rows, known) else None
        return replace(raw, norm=self.norm, info=self.info, left=left)

    def _stands_for_operator(self, x: Tensor, rows: Tensor, left: Tensor | None) -> bool:
        """Compare residuals from the matrix with those from the operator, along a random mixture of all rows.

        Args:
            x: Solutions.
            rows: Right-hand sides.
            left: Residuals from the matrix, where they are known: a mixture of these takes no product.
        """
        if self.image is None or not is_finite(x):
            return True  # they come from the operator, or there are none
        mix = private_noise(x.new_empty(1, x.shape[0], dtype=torch.float64), 19)
        mixed_x, mixed_b = (mix @ x.double()).to(x.dtype), (mix @ rows.double()).to(x.dtype)
        mixed = self._left(mixed_x, mixed_b) if left is None else mix @ left
        off = float((self.system.residual(mixed_x, mixed_b) - mixed).norm())
        # The norm is known from below, within some per cent, and the product rounds more than once.
        rounding = 8 * self.system.eps * (self.norm * float(mixed_x.norm()) + float(mixed_b.norm()))
        return off <= max(rounding, 0.1 * self.system.tolerance * float(mixed_b.norm()))

    def _left(self, x: Tensor, rows: Tensor) -> Tensor:
        if self.image is None:
            return self.system.residual(x, rows)
        return self.image(x.double()).neg_().add_(rows)


@final
class _Primal(_Factorised):
    """The factorised matrix itself."""

    share = 0.01  # a step costs next to nothing beside the factorisation

    def __init__(self, recipe: Direct, system: System) -> None:
        super().__init__(recipe, system)
        matrix = _in_unit(system.given.dense(check_finite=False), system)
        matrix.diagonal().add_(system.damping)
        system.products += 0 if in_memory(system.given) else system.n
        known = system.given.symmetric or system.given.positive
        self.norm = _norm(matrix, symmetric_map(matrix) if known else lambda rows: rows @ matrix.T)
        self._factorise(matrix)

    def _factorise(self, matrix: Tensor) -> None:
        self.image = partial(in_double, Matrix(matrix))
        if not is_finite(matrix):
            self.failed, self.info["reason"] = Status.BREAKDOWN, "the matrix holds NaN or Inf"
            self.once = lambda rows: torch.full_like(rows, math.nan)
            return
        operator = self.system.given
        if not (operator.symmetric or operator.positive or is_symmetric(matrix)):
            self._lu(matrix)
            return
        definite = cholesky(matrix)
        if definite is None:
            self._not_definite(matrix)
            return
        self.info["factorisation"] = "Cholesky"
        self.once, self.image = definite.solve, definite.image
        self._judge_condition(self.norm * _norm(matrix, self.once))

    def _lu(self, matrix: Tensor) -> None:
        factor, pivots, failed = torch.linalg.lu_factor_ex(matrix)
        self.info["factorisation"] = "LU"
        self.once = lambda rows: torch.linalg.lu_solve(factor, pivots, rows.T).T
        if int(failed):
            self.failed, self.info["condition"] = Status.SINGULAR, math.inf
            return

        def both(rows: Tensor) -> Tensor:
            return torch.linalg.lu_solve(factor, pivots, self.once(rows).T, adjoint=True).T

        gram = _norm(matrix, lambda rows: (rows @ matrix.T) @ matrix)
        self.norm = math.sqrt(gram)
        self._judge_condition(self.norm * math.sqrt(_norm(matrix, both)))

    def _not_definite(self, matrix: Tensor) -> None:
        """Take a symmetric matrix that Cholesky's factorisation refused, or say what is wrong with it."""
        factor, pivots, _ = torch.linalg.ldl_factor_ex(matrix)
        self.once = lambda rows: torch.linalg.ldl_solve(factor, pivots, rows.T.contiguous()).T
        self._judge_condition(self.norm * _norm(matrix, self.once))
        lowest = self.info["lowest_curvature"] = _lowest(matrix)
        if self.failed is None and self.recipe.indefinite:
            self.info["factorisation"] = "LDL"
            single = pivots > 0  # a block of two has one eigenvalue of either sign
            self.info["negative_eigenvalues"] = int((factor.diagonal()[single] < 0).sum() + (~single).sum() // 2)
            return
        # Well-conditioned and yet without a Cholesky factor: there must be negative eigenvalues.
        negative = self.failed is None or lowest < -self.system.n * self.system.eps * self.norm
        if negative and not self.recipe.indefinite:
            self.failed = Status.NEGATIVE_CURVATURE
        self.once = lambda rows: torch.full_like(rows, math.nan)


@final
class _Dual(_Factorised):
    """The factorised matrix in the space of the rows of J."""

    method = "direct, in the space of rows"

    def __init__(self, recipe: Direct, system: System, parts: Congruence) -> None:
        super().__init__(recipe, system)
        m, n = parts.J.shape
        system.products += 0 if in_memory(parts.J) else m
        self.norm = system.norm
        self.shift = system.damping + system.in_unit(parts.shift)
        self.S, self.J, doubled, gram = _balanced(parts)
        self.scale = ldexp(parts.scale, doubled - system.exponent)
        if isinstance(self.J, Matrix):
            inner = self.J if self.S is None else self.S @ self.J
            entries = self.scale * (self.J.T @ inner) + self.shift * Identity(system.given.domain)
            self.image = partial(in_double, entries)
        self.info.update(rows=m, factorisation="Woodbury")
        inner = self.scale * (gram if self.S is None else self.S._apply(gram).T)
        inner.diagonal().add_(self.shift)
        self._factorise(inner)
        self._judge_condition(self.norm / self.shift if m < n else self.info.get("condition", 1.0))

    def _factorise(self, inner: Tensor) -> None:
        if self.S is None:
            factor, failed = torch.linalg.cholesky_ex(inner)
            solve: RowMap = partial(by_cholesky, factor)
        else:
            lu, pivots, failed = torch.linalg.lu_factor_ex(inner)
            solve = lambda rows: torch.linalg.lu_solve(lu, pivots, rows.T).T  # noqa: E731
        self.once = partial(_woodbury, self.J, self.S, self.scale, self.shift, solve)  # no method: that were a cycle
        if int(failed):
            self.failed = Status.SINGULAR if is_finite(inner) else Status.BREAKDOWN
            self.once = lambda rows: torch.full_like(rows, math.nan)


def _woodbury(
    J: Operator,
    S: Operator | None,
    scale: Tensor | float,
    shift: Tensor | float,
    solve: RowMap,
    rows: Tensor,  # noqa: N803
) -> Tensor:
    """Return $(scale · JᵀSJ + shift)^{-1}$ times rows, by a solve in the space of the rows of J."""
    image = J._apply(rows)
    image = scale * (image if S is None else S._apply(image))
    return (rows - on_finite_rows(J._apply_transpose, solve(image))) / shift


@restoring
def _balanced(parts: Congruence) -> tuple[Operator | None, Operator, int, Tensor]:
    r"""Return S, $2^{-j} J$, 2 j and the Gram matrix of $2^{-j} J$; j is 0 unless squares leave the range."""
    m, n = parts.J.shape
    structured = isinstance(parts.J, LayerFactors)  # its products and inner products are cheaper than rows
    if m * n > _DENSE_FACTOR or structured:
        gram = parts.J.gram()
        if _fits(largest_entry(gram), gram.dtype):
            return parts.S, parts.J, 0, gram
        image = parts.J._apply(private_noise(gram.new_empty(1, n), 31))
        j = math.frexp(largest_entry(image) or 1.0)[1]
        J = math.ldexp(1.0, -j) * parts.J
        return parts.S, J, 2 * j, J.gram()
    rows = dense_of(parts.J)
    size = largest_entry(rows)
    j = 0 if _fits(size**2, rows.dtype) else math.frexp(size)[1]
    rows = shifted(rows, -j)
    with in_own_dtype(rows):
        gram = rows @ rows.T
    return parts.S, Matrix(rows, parts.J.domain, parts.J.codomain), 2 * j, gram


def _fits(square: float, dtype: torch.dtype) -> bool:
    """Whether sums of squares that come to a size keep their digits in a dtype; zero and what is not finite stay."""
    limits = torch.finfo(dtype)
    return square == 0 or not square < math.inf or limits.tiny / limits.eps <= square <= limits.max * limits.eps


def _in_unit(matrix: Tensor, system: System) -> Tensor:
    """Return a matrix of the caller's in the unit, changed in place."""
    system.measure(largest_entry(matrix))
    return shifted(matrix, -system.fixed(), in_place=True)


def _norm(like: Tensor, apply: RowMap) -> float:
    """Return the norm of a symmetric map from below; infinite where a product is not finite."""
    if not like.numel():
        return 0.0
    krylov = KrylovSpace(apply, private_noise(like[None, :1], 11), _NORM_STEPS)
    try:
        krylov.fill()
    except NonFiniteError:
        return math.inf
    return float(krylov.ritz().values.abs().max()) if is_finite(krylov.projected) else math.inf


def _lowest(matrix: Tensor) -> float:
    """Return the lowest eigenvalue, of a large matrix a Ritz value near it, which is never below it."""
    if matrix.shape[0] <= _EXACT_SPECTRUM:
        return float(torch.linalg.eigvalsh(matrix)[0])
    krylov = KrylovSpace(lambda rows: rows @ matrix, private_noise(matrix[None, :1], 13), _STEPS)
    return float(krylov.fill().ritz().values.min())
