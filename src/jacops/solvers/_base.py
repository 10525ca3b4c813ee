r"""Solver: a frozen recipe that turns an operator and a damping into an inverse, and says how each solve went."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor

from .._keywords import keywords
from .._runtime.contexts import eager
from ..errors import InputError, InputTypeError, SolveError, explain, warn
from ..operators import Operator
from ..space import Space
from ._advice import advice
from ._judge import Judge, Raw
from ._solution import Solution, Status
from ._system import System

_WORKING_ENTRIES = 2**26  # entries of right-hand sides, solutions, residuals and directions held at a time
_VECTORS = 8  # rows of working memory per right-hand side, at most


class Prepared(ABC):
    """A solver made ready for one operator and damping; it solves as often as asked.

    Attributes:
        system: The damped operator.
        method: The solver's name, for reports.
    """

    system: System
    method: str
    _has_warned = False

    @abstractmethod
    def _solve(self, rows: Tensor) -> Raw:
        """Solve for finite rows `(k, n)` of which none is zero, k ≥ 1, in the unit of the system."""

    @eager
    def solve(self, rows: Tensor) -> Solution:
        """Solve for right-hand sides, one per row; never raises for a solve that failed.

        Args:
            rows: `(k, n)`.

        Raises:
            InputError: The rows have another width, dtype or device than the operator.
        """
        check_rows(self.system.given.domain, rows)
        started, products = time.perf_counter(), self.system.products
        judge = Judge(self.system, rows.detach())
        step = max(1, _WORKING_ENTRIES // (_VECTORS * max(1, self.system.n)))
        for where in judge.solvable.split(step):
            if len(where):
                judge.take(where, self._attempted(judge.rows[where]))
        judge.info["products"] = self.system.products - products
        judge.info["seconds"] = time.perf_counter() - started
        solution = judge.verdict(self.method)
        self._warn_of_poor(solution)
        return solution

    def _attempted(self, rows: Tensor) -> Raw:
        """Solve; a decomposition that LAPACK gives up is a breakdown of these rows."""
        try:
            return self._solve(rows)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            k = rows.shape[0]
            failed = dict.fromkeys(range(k), Status.BREAKDOWN)
            return Raw(torch.full_like(rows, math.nan), [0] * k, failed, info={"reason": f"a decomposition: {error}"})

    def _warn_of_poor(self, solution: Solution) -> None:
        """Warn once of approximate solutions that are no better than zero, whose residual is 1."""
        judged = zip(solution.residual.tolist(), solution.status, strict=True)
        poor = sum(status == Status.APPROXIMATE and residual >= 1 for residual, status in judged)
        if poor and not self._has_warned:
            self._has_warned = True
            warn(
                f"{self.method}: {poor} of {len(solution.status)} approximate solutions have a relative residual of 1 "
                f"or more (at most {solution.worst:.1e}), which zero has too. Raise `damping`, allow a larger rank, "
                "or solve by `CG()` with this method as its `preconditioner`."
            )


class Solver(ABC):
    r"""A recipe for $(A + \lambda I) x = b$; concrete ones are frozen dataclasses."""

    @abstractmethod
    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Do what all right-hand sides share.

        Raises:
            InputError: The operator is not square or not one that this solver can take.
        """

    @eager
    def solve(self, operator: Operator, rows: Tensor, damping: float = 0.0) -> Solution:
        """Prepare, then solve for rows `(k, n)`; never raises for a solve that failed."""
        started = time.perf_counter()
        prepared = self.prepare(operator, damping)
        before = time.perf_counter() - started
        solution = prepared.solve(rows)
        solution.info["products"] = prepared.system.products
        solution.info["seconds"] += before
        return solution


@keywords()
def solve(
    operator: Operator,
    b: Tensor,
    solver: Solver | str = "auto",
    *,
    damping: float = 0.0,
    on_failure: Literal["raise", "return"] = "raise",
) -> Solution:
    r"""Solve $(A + \lambda I) x = b$ for one right-hand side or many, each judged by its true residual.

    A row is `converged` if its residual, recomputed from $A$, is at most the tolerance (1e-8 relative in float64, 1e-4
    in float32 unless the solver has one of its own), and `attainable` if it is at most the level that rounding allows,
    $\epsilon \lVert A \rVert \lVert x \rVert / \lVert b \rVert$, which is in `info["attainable"]`. Rows of methods
    that promise no residual are `approximate`, with the residual that was measured, or `unchecked` if none was
    computed. Every other status is a failure. Operator and right-hand sides may have any scale: both are scaled by
    powers of two.

    Args:
        operator: $A$, square.
        b: One right-hand side `(n,)` or rows `(k, n)`, with the operator's dtype and device.
        solver: A recipe, such as `CG()`, or the name of one; `Auto` chooses.
        damping: $\lambda \ge 0$.
        on_failure: `"raise"`, or `"return"` to get the solution with its statuses.

    Returns:
        The solution; for one right-hand side `(n,)` it has one row.

    Raises:
        SolveError: A row failed; the error carries the solution and says what to do.
        InputError: The operator, the right-hand side or an option does not fit.

    Example:
        >>> import jacops
        >>> import torch
        >>> A = jacops.Matrix(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), symmetric=True)
        >>> solve(A, torch.tensor([4.0, 16.0])).x
        tensor([[1., 1.]])
    """
    _check_choice(on_failure)
    rows = b.unsqueeze(0) if isinstance(b, Tensor) and b.ndim == 1 else b
    solution = solver_of(solver).solve(operator, rows, damping)
    if on_failure == "raise":
        require(solution, operator)
    return solution


def require(solution: Solution, operator: Operator) -> None:
    """Raise for a solution with rows that failed.

    Raises:
        SolveError: Some did; the message says what to do.
    """
    if not solution.success:
        raise SolveError(advice(solution, operator), solution)


@keywords()
def inverse(
    operator: Operator,
    solver: Solver | str = "auto",
    *,
    damping: float = 0.0,
    on_failure: Literal["raise", "return"] = "raise",
) -> Inverse:
    r"""Return $(A + \lambda I)^{-1}$ as an operator; each product is a solve.

    Args:
        operator: $A$, square.
        solver: As in `solve`.
        damping: $\lambda \ge 0$.
        on_failure: `"raise"`, or `"return"` for products that hand back what the solver had.

    Returns:
        An operator, symmetric and positive as $A$ is. What is costly and shared by all right-hand sides is done at the
        first product.

    Raises:
        InputError: The operator is not square, or an option does not fit. Its products raise `SolveError`.
    """
    _check_choice(on_failure)
    System(operator, damping)  # refuses what no solver takes
    return Inverse(operator, solver_of(solver), float(damping), on_failure)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Inverse(Operator):
    r"""$(A + \lambda I)^{-1}$ by a solver.

    Attributes:
        of: $A$.
        solver: The recipe.
        damping: $\lambda$.
        on_failure: What a product does with a solve that failed.
    """

    of: Operator
    solver: Solver
    damping: float = 0.0
    on_failure: Literal["raise", "return"] = "raise"

    @property
    def domain(self) -> Space:
        """The codomain of the operator."""
        return self.of.codomain

    @property
    def codomain(self) -> Space:
        """The domain of the operator."""
        return self.of.domain

    @property
    def symmetric(self) -> bool:
        """As the operator is."""
        return self.of.symmetric or self.of.positive

    @property
    def positive(self) -> bool:
        """As the operator is."""
        return self.of.positive

    @cached_property
    def prepared(self) -> Prepared:
        """The solver, ready for this operator."""
        return self.solver.prepare(self.of, self.damping)

    @cached_property
    def _prepared_transpose(self) -> Prepared:
        return self.prepared if self.symmetric else self.solver.prepare(self.of.T, self.damping)

    def solve(self, rows: Tensor) -> Solution:
        """Return the solution for rows `(k, n)` with all that is known of it.

        Raises:
            SolveError: A row did not converge, unless failures are returned.
        """
        return self._checked(self.prepared.solve(rows))

    def _checked(self, solution: Solution) -> Solution:
        if self.on_failure == "raise":
            require(solution, self.of)
        return solution

    def _apply(self, rows: Tensor) -> Tensor:
        return self.solve(rows).x

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        return self._checked(self._prepared_transpose.solve(rows)).x

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}, by {self.solver}, damping {self.damping:g})"


def solver_of(solver: Any, argument: str = "solver") -> Solver:
    """Return the solver meant by a name or a recipe.

    Raises:
        InputError: The name is unknown.
        InputTypeError: It is neither a name nor a recipe.
    """
    from ._names import NAMES

    if isinstance(solver, Solver):
        return solver
    known = f"one of {sorted(NAMES)} or a Solver is needed"
    if isinstance(solver, type) and issubclass(solver, Solver):
        raise InputTypeError(explain(argument, f"the class {solver.__name__}", known, f"Use `{solver.__name__}()`."))
    if not isinstance(solver, str):
        raise InputTypeError(explain(argument, f"a {type(solver).__name__}", known))
    if solver not in NAMES:
        raise InputError(explain(argument, repr(solver), known))
    return NAMES[solver]()


def _check_choice(on_failure: Any) -> None:
    if on_failure not in ("raise", "return"):
        raise InputError(explain("on_failure", repr(on_failure), "'raise' or 'return' is needed"))


def check_rows(space: Space, rows: Any) -> None:
    """Refuse right-hand sides that do not fit.

    Raises:
        InputError: They have another width, dtype or device than the operator.
        InputTypeError: They are no tensor.
    """
    if not isinstance(rows, Tensor):
        raise InputTypeError(explain("b", f"a {type(rows).__name__}", "a tensor is needed"))
    if rows.ndim != 2 or rows.shape[1] != space.dim or rows.dtype != space.dtype or rows.device != space.device:
        came = f"of shape {tuple(rows.shape)}, {rows.dtype} on {rows.device}"
        needed = f"rows of width {space.dim}, {space.dtype} on {space.device} are needed; nothing is cast"
        raise InputError(explain("b", came, needed, f"The axis is {space.layout}." if space.dim else ""))
