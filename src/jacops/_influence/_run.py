"""One influence computation: problem, curvature and solver, and the tiles in which test samples are solved for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._data import Batch, Batches
from .._operators._data import SumOver
from .._problem import BatchPoint, Problem, ProblemOptions
from .._requirements import check_choice, check_range
from .._runtime.memory import budget_bytes
from .._words import Curvature, OnFailure, SolverName
from ..errors import InputTypeError, SolveError
from ..solvers import Auto, Prepared, Solution, Solver, require, solver_of
from ._result import described

_TILE_BYTES = 2**26  # 64 MiB of right-hand sides solved for together; a solver holds up to eight times as many
_GROUP_SHARE = 0.5  # of the budget, for solutions that share a pass; the rest is for a batch's gradients and a solve


@dataclass(frozen=True)
class InfluenceRun:
    """A problem, its curvature, and the solver; both are made when they are first needed.

    Attributes:
        problem: The training objective.
        kind: Which curvature.
        solver: The recipe.
        damping: Added to the curvature.
        on_failure: What becomes of a solve that failed.
    """

    problem: Problem
    kind: Curvature
    solver: Solver
    damping: float
    on_failure: OnFailure

    @cached_property
    def curvature(self) -> SumOver:
        """The operator; the first batch is linearised."""
        return self.problem.curvature(self.kind)

    @cached_property
    def prepared(self) -> Prepared:
        """The solver, ready for the operator and the damping: where all is spent that right-hand sides share."""
        return self.solver.prepare(self.curvature, self.damping)

    def solve(self, rows: Tensor) -> Solution:
        """Return solutions for right-hand sides `(k, P)`.

        Raises:
            SolveError: One failed, unless failures are returned.
        """
        solution = self.prepared.solve(rows)
        if self.on_failure == "raise":
            try:
                require(solution)
            except SolveError as error:
                kind = self.kind.replace("_", " ")
                raise SolveError(
                    f"influence with the {kind} of {self.problem.rows:,} rows: {error}", solution
                ) from None
        return solution

    def described(self, solutions: Sequence[Solution]) -> dict[str, Any]:
        """Return what is known of some solves, and the noise of a curvature that was estimated from draws."""
        info = described(self.problem, self.kind, solutions, self.damping)
        if self.kind == "monte_carlo_fisher" and "noise" not in info:
            info["noise"] = self.curvature.noise
        return info

    @property
    def step(self) -> int:
        """Rows that are solved for together."""
        return max(1, _TILE_BYTES // max(1, self.problem.space.dim * self.problem.space.dtype.itemsize))

    def group(self, rows: int) -> int:
        """Return how many of so many solutions are held at once, to share a pass over the samples that they meet."""
        each, step = self.problem.space.dim * self.problem.space.dtype.itemsize, self.step
        if rows <= step:
            return max(1, rows)
        room = int(_GROUP_SHARE * budget_bytes(None, self.problem.space.device))
        return max(1, min(-(-rows // step), room // max(1, each * step))) * step

    def groups(self, data: Batches) -> Iterator[tuple[Tensor, list[Solution]]]:
        """Yield solutions `(k, P)` of a group of rows, which are used up, and what is known of them tile by tile."""
        left, tiles = data.rows, self.tiles(data)
        most = self.group(left)
        while left:
            space = self.problem.space
            x, known, filled = torch.empty(min(most, left), space.dim, dtype=space.dtype, device=space.device), [], 0
            while filled < len(x):
                solution = self.solve(next(tiles)())
                x[filled : filled + len(solution.x)] = solution.x
                filled += len(solution.x)
                known.append(replace(solution, x=solution.x[:, :0].clone()))
            left -= filled
            yield x, known

    def tiles(self, data: Batches) -> Iterator[Callable[[], Tensor]]:
        """Yield for each tile of `step` rows, across batches, a function that returns their gradients."""
        parts: list[Batch] = []
        filled = 0
        for batch in data.tracked("solving", self.problem.progress):
            at = 0
            while at < batch.rows:
                take = min(self.step - filled, batch.rows - at)
                parts.append(batch if take == batch.rows else batch.part(slice(at, at + take)))
                at, filled = at + take, filled + take
                if filled == self.step:
                    yield _gradients(self.problem, parts)
                    parts, filled = [], 0
        if parts:
            yield _gradients(self.problem, parts)


def _gradients(problem: Problem, parts: list[Batch]) -> Callable[[], Tensor]:
    def rows(point: BatchPoint) -> Tensor:
        dense = point.gradients().dense()
        problem.keep(point)
        return dense

    return lambda: torch.cat([rows(problem.at(part)) for part in parts])


def run_of(
    model: Any,
    train: Batches,
    method: SolverName | Solver,
    damping: float,
    kind: Curvature,
    on_failure: OnFailure,
    options: ProblemOptions,
) -> InfluenceRun:
    """Check the arguments; the model is not evaluated.

    Raises:
        InputTypeError: `model` carries no objective.
        InputError: An argument is out of range.
    """
    if not hasattr(model, "objective"):
        came, todo = f"a {type(model).__name__}", "Wrap model and loss in one."
        raise InputTypeError.of("model", came, "a TorchTwiceDifferentiable is needed", todo)
    damping = check_range("damping", damping, zero=True)
    check_choice("curvature", kind, Curvature)
    check_choice("on_failure", on_failure, OnFailure)
    # At an optimum curvature is positive: negative curvature is a finding, not a case for another solver.
    solver = Auto(indefinite=False) if method == "auto" else solver_of(method, "solver")
    return InfluenceRun(Problem(model, data=train, **options), kind, solver, damping, on_failure)
