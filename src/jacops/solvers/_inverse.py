"""Solving by a solver's name or recipe, and the inverse as an operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final, get_args

from torch import Tensor

from .._display import changed
from .._keywords import keywords
from .._operators import Operator
from .._operators._graphs import without_graph
from .._operators._kinds import Backwards
from .._progress import shows_progress
from .._requirements import check_choice
from .._runtime.contexts import eager, keeping
from .._words import OnFailure, SolverName
from ..errors import InputError, InputTypeError, SolveError
from ._advice import advice
from ._base import Prepared, Solver
from ._implicit import connected
from ._names import NAMES
from ._precondition import NOT_LINEAR
from ._solution import Solution
from ._system import System


@keywords()
@shows_progress()
def solve(
    operator: Operator,
    b: Tensor,
    solver: Solver | SolverName = "auto",
    *,
    damping: float | Tensor = 0.0,
    on_failure: OnFailure = "raise",
    progress: bool | None = None,
    create_graph: bool = False,
) -> Solution:
    r"""Solve $(A + \lambda I) x = b$ for one right-hand side or many, with the true residual of each.

    A row is `converged` if its residual, recomputed from $A$, is at most the tolerance (1e-8 relative in float64, 1e-4
    in float32 unless the solver has one of its own), and `attainable` if it is at most the level that rounding allows,
    $\epsilon \lVert A \rVert \lVert x \rVert / \lVert b \rVert$, which is in `info["attainable"]`. Rows of methods
    without a tolerance are `approximate`, with the residual that was measured, or `unchecked` if none was computed.
    Every other status is a failure. Operator and right-hand sides may have any scale: both are scaled by powers of two.

    Args:
        operator: $A$, square.
        b: One right-hand side `(n,)` or rows `(k, n)`, with the operator's dtype and device.
        solver: A solver, such as `CG()`, or its name; by default `Auto`.
        damping: $\lambda \ge 0$, a number or a tensor of one.
        on_failure: `"raise"`, or `"return"` to get the solution with its statuses.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.
        create_graph: Keep `x` differentiable, once, by `b`, by a tensor as damping, and by what the operator receives
            gradients for (one made with `create_graph=True`, a matrix that requires grad): backward solves the
            transposed system once (implicit differentiation), for every solver.

    Returns:
        The solution; for one right-hand side `(n,)` it has one row.

    Raises:
        SolveError: A row failed; the error has the solution and states what to do.
        InputError: The operator, the right-hand side or an option does not fit.

    Example:
        >>> import jacops
        >>> import torch
        >>> A = jacops.linalg.Matrix(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), symmetric=True)
        >>> solve(A, torch.tensor([4.0, 16.0])).x
        tensor([[1., 1.]])
    """
    check_choice("on_failure", on_failure, OnFailure)
    with keeping(create_graph):
        rows = b.unsqueeze(0) if isinstance(b, Tensor) and b.ndim == 1 else b
    if create_graph:
        options: dict[str, Any] = {"damping": damping, "on_failure": on_failure, "progress": progress}
        return inverse(operator, solver, create_graph=True, **options).solve(rows)
    solution = solver_of(solver).solve(operator, rows, as_number(damping))
    if on_failure == "raise":
        require(solution)
    return solution


def as_number(damping: float | Tensor) -> Any:
    """Return a damping as a number, also one that is a tensor of one number; what is neither is judged elsewhere."""
    return float(damping.detach()) if isinstance(damping, Tensor) and damping.numel() == 1 else damping


@keywords()
def require(solution: Solution) -> None:
    """Raise for a solution with rows that failed.

    Args:
        solution: What `solve` returned with `on_failure="return"`.

    Raises:
        SolveError: A solve failed; the message states what to do.

    Example:
        >>> from jacops.linalg import Matrix
        >>> require(solve(Matrix(torch.eye(2)), torch.ones(2), on_failure="return"))
    """
    if not solution.success:
        raise SolveError(advice(solution), solution)


@keywords()
def inverse(
    operator: Operator,
    solver: Solver | SolverName = "auto",
    *,
    damping: float | Tensor = 0.0,
    on_failure: OnFailure = "raise",
    progress: bool | None = None,
    create_graph: bool = False,
) -> Inverse:
    r"""Return $(A + \lambda I)^{-1}$ as an operator; each product is a solve.

    Args:
        operator: $A$, square.
        solver: A solver's name, `"auto"`, or a solver with its options, such as `CG(tolerance=1e-8)`.
        damping: $\lambda \ge 0$, added to the operator.
        on_failure: `"raise"`, or `"return"` for products that return the last iterate of the solver.
        progress: Force the progress bar on or off, for each product.
        create_graph: Keep products differentiable, as in `solve`.

    Returns:
        An operator, symmetric and positive as $A$ is. What is costly and shared by all right-hand sides is done at the
        first product.

    Raises:
        InputError: The operator is not square, or an option does not fit. Its products raise `SolveError`.

    Example:
        >>> from jacops.linalg import Matrix
        >>> inverse(Matrix(torch.diag(torch.tensor([1.0, 3.0]))), damping=1.0) @ torch.ones(2)
        tensor([0.5000, 0.2500])
    """
    check_choice("on_failure", on_failure, OnFailure)
    number = as_number(damping)
    System(operator, number)  # refuses what no solver takes
    recipe = solver_of(solver)
    if not recipe.is_linear:
        raise InputError.of("solver", repr(recipe), *NOT_LINEAR)
    scale = damping.reshape(()) if isinstance(damping, Tensor) and damping.requires_grad else None
    return Inverse(operator, recipe, float(number), on_failure, create_graph, scale, progress)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Inverse(Backwards):
    r"""$(A + \lambda I)^{-1}$ by a solver.

    Attributes:
        of: $A$.
        solver: The recipe.
        damping: $\lambda$.
        on_failure: What a product does with a solve that failed.
        create_graph: Products are differentiable.
        scale: $\lambda$ as a tensor that receives gradients, if it is one.
        progress: Force the progress bar of products on or off.
    """

    of: Operator
    solver: Solver
    damping: float = 0.0
    on_failure: OnFailure = "raise"
    create_graph: bool = False
    scale: Tensor | None = None
    progress: bool | None = None

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
        return self.solver.prepare(without_graph(self.of), self.damping)

    @cached_property
    def _transposed(self) -> Inverse:
        options = (self.solver, self.damping, self.on_failure, self.create_graph, self.scale, self.progress)
        return Inverse(self.of.T, *options)

    @property
    def _adjoint(self) -> Inverse:
        return self if self.symmetric else self._transposed

    @eager
    def solve(self, rows: Tensor) -> Solution:
        """Return the solution for rows `(k, n)` with all that is known of it.

        Raises:
            SolveError: A row did not converge, unless failures are returned.
        """
        solution = self._solved(rows)
        if not self.create_graph:
            return solution
        damping = self.damping if self.scale is None else self.scale
        x = connected(self.of, rows, solution.x, damping, lambda grads: self._adjoint._solved(grads).x)
        return replace(solution, x=x)

    def _solved(self, rows: Tensor) -> Solution:
        solution = self._swept(rows, progress=self.progress)
        if self.on_failure == "raise":
            require(solution)
        return solution

    @shows_progress(call="inverse")
    def _swept(self, rows: Tensor, *, progress: bool | None) -> Solution:
        return self.prepared.solve(rows)

    def _apply(self, rows: Tensor) -> Tensor:
        return self.solve(rows).x

    def _apply_transpose(self, rows: Tensor) -> Tensor:
        return self._adjoint.solve(rows).x

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
    """Return the solver for a name or an object.

    Args:
        solver: A solver's name, or a solver with its options.
        argument: What the caller calls it, for errors.

    Returns:
        A solver.

    Raises:
        InputError: The name is unknown.
        InputTypeError: It is neither a name nor a solver.

    Example:
        >>> type(solver_of("minres")).__name__
        'MINRES'
    """
    if isinstance(solver, Solver):
        return solver
    known = f"one of {', '.join(map(repr, get_args(SolverName)))} or a Solver is needed"
    if isinstance(solver, type) and issubclass(solver, Solver):
        raise InputTypeError.of(argument, f"the class {solver.__name__}", known, f"Use `{solver.__name__}()`.")
    if not isinstance(solver, str):
        raise InputTypeError.of(argument, f"a {type(solver).__name__}", known)
    return NAMES[check_choice(argument, solver, SolverName, " or a Solver")]()
