"""Solving by a solver's name or recipe, and the inverse as an operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final, get_args

from torch import Tensor

from .._display import changed
from .._keywords import keywords
from .._operators import Operator
from .._operators._base import Backwards
from .._requirements import check_choice
from .._words import OnFailure, SolverName
from ..errors import InputTypeError, SolveError
from ._advice import advice
from ._base import Prepared, Solver
from ._names import NAMES
from ._solution import Solution
from ._system import System


@keywords()
def solve(
    operator: Operator,
    b: Tensor,
    solver: Solver | SolverName = "auto",
    *,
    damping: float = 0.0,
    on_failure: OnFailure = "raise",
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
        >>> A = jacops.linalg.Matrix(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), symmetric=True)
        >>> solve(A, torch.tensor([4.0, 16.0])).x
        tensor([[1., 1.]])
    """
    check_choice("on_failure", on_failure, OnFailure)
    rows = b.unsqueeze(0) if isinstance(b, Tensor) and b.ndim == 1 else b
    solution = solver_of(solver).solve(operator, rows, damping)
    if on_failure == "raise":
        require(solution)
    return solution


@keywords()
def require(solution: Solution) -> None:
    """Raise for a solution with rows that failed.

    Raises:
        SolveError: Some did; the message says what to do.
    """
    if not solution.success:
        raise SolveError(advice(solution), solution)


@keywords()
def inverse(
    operator: Operator,
    solver: Solver | SolverName = "auto",
    *,
    damping: float = 0.0,
    on_failure: OnFailure = "raise",
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
    check_choice("on_failure", on_failure, OnFailure)
    System(operator, damping)  # refuses what no solver takes
    return Inverse(operator, solver_of(solver), float(damping), on_failure)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Inverse(Backwards):
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
    on_failure: OnFailure = "raise"

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
    def _transposed(self) -> Inverse:
        return self if self.symmetric else Inverse(self.of.T, self.solver, self.damping, self.on_failure)

    def solve(self, rows: Tensor) -> Solution:
        """Return the solution for rows `(k, n)` with all that is known of it.

        Raises:
            SolveError: A row did not converge, unless failures are returned.
        """
        solution = self.prepared.solve(rows)
        if self.on_failure == "raise":
            require(solution)
        return solution

    def _apply(self, rows: Tensor) -> Tensor:
        return self.solve(rows).x

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        return self._transposed.solve(rows).x

    @property
    def name(self) -> str:
        """`"Inverse"`."""
        return "Inverse"

    def _formula(self) -> str:
        damped = f" + {self.damping:g} I" if self.damping else ""
        return f"({self.of._in_formula()}{damped})⁻¹"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "solver", changed(self.solver)
        yield from super()._facts()


@keywords()
def solver_of(solver: Any, argument: str = "solver") -> Solver:
    """Return the solver meant by a name or a recipe.

    Raises:
        InputError: The name is unknown.
        InputTypeError: It is neither a name nor a recipe.
    """
    if isinstance(solver, Solver):
        return solver
    known = f"one of {', '.join(map(repr, get_args(SolverName)))} or a Solver is needed"
    if isinstance(solver, type) and issubclass(solver, Solver):
        raise InputTypeError.of(argument, f"the class {solver.__name__}", known, f"Use `{solver.__name__}()`.")
    if not isinstance(solver, str):
        raise InputTypeError.of(argument, f"a {type(solver).__name__}", known)
    return NAMES[check_choice(argument, solver, SolverName, " or a Solver")]()
