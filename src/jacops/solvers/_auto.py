"""Auto: chooses a solver by size, structure, damping and the number of right-hand sides, and reports the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from .._operators import Operator
from .._requirements import check_range
from ._base import Prepared, Solver
from ._cg import CG, prepared_cg
from ._direct import Direct
from ._judge import Raw, is_attainable
from ._minres import MINRES
from ._precondition import Preconditioner, nystrom
from ._solution import Status
from ._structure import MOST_ROWS, congruence, in_memory
from ._system import System, check_options

_MOST_UNKNOWNS = 8192  # 512 MiB in float64; with two working copies it fits `_BUDGET`, and is factorised in seconds
_BUDGET = 2**31  # 2 GiB: three matrices of `_MOST_UNKNOWNS` rows in float64
_TOO_FEW = 256  # unknowns: a factorisation costs milliseconds, less than a sketch and its checks
# Sketches start at 8; at condition 3e6 one of rank 512 left 50 steps, where 1,500 without it were not enough.
_LEAST_RANK, _MOST_RANK = 8, 512
_STEPS = 60  # products after a sketch, as measured (50 to 58 at condition 3e2 to 3e6); for k rows about sqrt(k) times


@final
@dataclass(frozen=True)
class Auto(Solver):
    """Direct where the matrix, or that in the space of rows, is small; else conjugate gradients, or MINRES.

    Costs are counted in products with one row, never timed, so that a choice can be repeated. For a positive operator
    under damping a Nyström sketch is begun first, and given up where eigenvalues fall too slowly for it to be cheaper
    than the direct solve; where it covers all of the spectrum above the damping, conjugate gradients follow. The choice
    and its reason are in `info["chosen"]`.

    Attributes:
        budget: Bytes for dense matrices; 2 GiB by default.
        indefinite: Take indefinite operators as they are, and do not fail for negative curvature.
        tolerance: On the relative residual; 1e-8 in float64, 1e-4 in float32.
        taken: The choice made by `decided`, and its reason; no other choice is made then.
    """

    budget: int | None = None
    indefinite: bool = True
    tolerance: float | None = None
    taken: tuple[Solver, str] | None = field(default=None, repr=False)

    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Choose a solver for the operator.

        Raises:
            InputError: An option is out of range.
        """
        check_options(self.tolerance, None)
        if self.budget is not None:
            check_range("budget", self.budget)
        return _PreparedAuto(self, System(operator, damping, self.tolerance))

    def decided(self, operator: Operator, damping: float, rows: Callable[[], Tensor]) -> Auto:
        r"""Return this recipe with its choice made, so that no solve depends on those before it.

        Args:
            operator: $A$, square.
            damping: $\lambda \ge 0$, added to it.
            rows: Gives right-hand sides `(k, n)`, to be solved for where the choice takes a trial.
        """
        prepared = _PreparedAuto(self, System(operator, damping, self.tolerance))
        if self.taken is None and prepared.direct is not None and prepared.may_try:
            prepared.solve(rows())
        return replace(self, taken=prepared.taken())


@final
class _PreparedAuto(Prepared):
    def __init__(self, recipe: Auto, system: System) -> None:
        self.recipe, self.system, self.method = recipe, system, "Auto"
        self.chosen: Prepared | None = None
        self.sketched: tuple[System, Preconditioner] | None = None
        self.spent = 0.0
        self.tried: tuple[Solver, str] | None = None  # what a trial found to do
        self.direct, self.cost, self.why = _direct(recipe, system)

    @property
    def may_try(self) -> bool:
        """Whether conjugate gradients might be cheaper than a direct solve."""
        return self.system.is_positive and self.system.n >= _TOO_FEW

    def taken(self) -> tuple[Solver, str]:
        """Return what was chosen, or is to be where nothing was tried, and why."""
        if self.recipe.taken is not None:
            return self.recipe.taken
        if self.chosen is None and self.tried is not None:
            return self.tried
        solver = self.direct if self.direct is not None else self._iterative()
        return solver, self.why

    def _solve(self, rows: Tensor) -> Raw:
        if self.chosen is None and self.recipe.taken is None and self.direct is not None:
            raw = self._attempt(rows)
            if raw is not None:
                return raw
        if self.chosen is None:
            solver, self.why = self.taken()
            self.chosen = self._prepared(solver)
        return self._run(self.chosen, rows, self.why)

    def _iterative(self) -> Solver:
        system, tolerance = self.system, self.recipe.tolerance
        if system.given.positive or not self.recipe.indefinite:
            sketched = system.is_positive
            self.why += "; " + ("positive under damping" if sketched else "indefinite ones are refused")
            return CG(preconditioner="nystrom" if sketched else None, tolerance=tolerance)
        self.why += "; not known to be positive"
        return MINRES(tolerance=tolerance)

    def _attempt(self, rows: Tensor) -> Raw | None:
        """Try conjugate gradients where a sketch shows that they are cheaper than a direct solve."""
        expected, self.tried = _STEPS * rows.shape[0] ** 0.5, None
        if not self.may_try or self.cost - expected < _LEAST_RANK:
            return None
        system, inner = self.sketched = self.sketched or self._sketch(int(self.cost - expected))
        # Twice the goal of the sketch (10): it gave up, and the condition number left over is above 20.
        if inner.info.get("remainder", math.inf) > 20 * system.damping or self.spent > self.cost:
            self.why += "; conjugate gradients would cost more"
            return None
        # After 1.5 times the cost of a factorisation it is made: 2.5 times its cost at worst.
        cg = prepared_cg(system, inner, max(1, int(1.5 * self.cost / rows.shape[0])))
        before = self.system.products
        why = f"about {expected:.0f} products were expected to do, where a factorisation costs {self.cost:.0f}"
        raw = self._run(cg, rows, why)
        self.spent += self.system.products - before
        if _is_solved(system, rows, raw) or Status.NEGATIVE_CURVATURE in raw.failed.values():
            rank = inner.info.get("rank")
            self.tried = CG(preconditioner="nystrom", tolerance=self.recipe.tolerance, rank=rank), why
            return raw
        self.why += "; conjugate gradients did not do"
        return None

    def _sketch(self, rank: int) -> tuple[System, Preconditioner]:
        system = System(self.system.given, self.system.given_damping, self.recipe.tolerance)
        inner = nystrom(system, None, min(_MOST_RANK, rank), give_up=True)
        self.spent = float(system.products)
        self._count(system)
        return system, inner

    def _prepared(self, solver: Solver) -> Prepared:
        prepared = solver.prepare(self.system.given, self.system.given_damping)
        self._count(prepared.system)
        return prepared

    def _count(self, system: System) -> None:
        """Count the products made by others as this solver's."""
        self.system.products += system.products
        system.products = 0

    def _run(self, prepared: Prepared, rows: Tensor, why: str) -> Raw:
        raw = prepared._solve(rows)
        self.system.exponent = prepared.system.fixed()  # the unit in which the answer is
        self._count(prepared.system)
        self.method = f"Auto: {prepared.method}"
        return replace(raw, info={**raw.info, "chosen": f"{prepared.method}: {why}"})


def _is_solved(system: System, rows: Tensor, raw: Raw) -> bool:
    """Return whether every row has the requested residual, or one at the rounding level of products.

    Of a matrix in memory residuals are exact, so that a factorisation gets below the rounding of products.
    """
    if raw.left is None:
        return False
    size, length = (torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in (rows, raw.x))
    residuals, norm = raw.left / size, max(raw.norm or system.norm, system.damping)
    pairs = zip(residuals.tolist(), (norm * length / size).tolist(), strict=True)
    by_products = not in_memory(system.given)
    return all(left <= system.tolerance or (by_products and is_attainable(system, left, k)) for left, k in pairs)


def _direct(recipe: Auto, system: System) -> tuple[Solver | None, float, str]:
    """Return the direct solver that fits, what it costs in products, and why."""
    operator, n, itemsize = system.given, system.n, system.dtype.itemsize
    budget = recipe.budget if recipe.budget is not None else _BUDGET
    plain = Direct(indefinite=recipe.indefinite, tolerance=recipe.tolerance, dual=False)
    options: list[tuple[float, Solver, str]] = []
    if n <= _MOST_UNKNOWNS and 3 * n * n * itemsize <= budget:
        # In products: n³ / 3 operations of Cholesky over 2 n² of a product, and n products to form the matrix.
        cost = n / 6 + (0 if in_memory(operator) else n)
        options.append((cost, plain, f"{n} unknowns fit as a matrix"))
    found = congruence(operator) if operator.positive else None
    if found is not None and system.given_damping + found.shift > 0:
        m = found.J.shape[0]
        if m < n and m <= MOST_ROWS and (3 * m * m + m * n) * itemsize <= budget:
            # In products with J and its transpose: the m × m factorisation, and rows that share sweeps.
            cost = (m / n) ** 2 * m / 3 + (0 if in_memory(found.J) else m / 3)
            options.append((cost, replace(plain, dual=True), f"{m} rows are fewer than {n} unknowns"))
    if not options:
        return None, float("inf"), f"{n} unknowns are too many for a matrix within {budget / 2**30:.3g} GiB"
    cost, solver, why = min(options, key=lambda option: option[0])
    return solver, cost, why
