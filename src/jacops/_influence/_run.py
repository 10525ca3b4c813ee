"""One influence computation: problem, curvature and solver, and the tiles in which test samples are solved for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._data import Batch, Batches
from .._finite import on_finite_rows
from .._ladder.protocol import is_framework_model
from .._operators._data import SumOver
from .._operators._ranked_rows import RankedRows
from .._problem import BatchPoint, Problem, ProblemOptions
from .._requirements import check_choice
from .._runtime.memory import budget_bytes
from .._words import AutoDamping, Curvature, OnFailure, SolverName
from ..errors import InputError, InputTypeError, SolveError
from ..solvers import EKFAC, Auto, Prepared, Solution, Solver, Status, require, solver_of
from ._damping import Damping, checked_damping, settled
from ._result import described

_TILE_BYTES = 2**26  # 64 MiB of right-hand sides solved for together; a solver holds up to eight times as many
_GROUP_SHARE = 0.5  # of the budget, for solutions that share a pass; the rest is for a batch's gradients and solves
_SOLVE_SHARE = 0.25  # of the budget, for tiles whose residuals share a pass


@dataclass(frozen=True)
class InfluenceRun:
    """A problem, its curvature, and the solver; both are made when they are first needed.

    Attributes:
        problem: The training objective.
        kind: Which curvature.
        solver: The recipe.
        asked: What is added to the curvature, or `"auto"`.
        on_failure: What becomes of a solve that failed.
        recipe: The call, written with curvature that is never negative.
        known: The damping, where a stored run has chosen it.
    """

    problem: Problem
    kind: Curvature
    solver: Solver
    asked: float | AutoDamping
    on_failure: OnFailure
    recipe: str
    known: Damping | None = None

    @cached_property
    def curvature(self) -> SumOver:
        """The operator; the first batch is linearised."""
        return self.problem.curvature(self.kind)

    @cached_property
    def _settled(self) -> tuple[Damping, Solver]:
        if self.known is not None:
            return self.known, self.solver
        return settled(self.asked, self.curvature, self.solver)

    @property
    def damping(self) -> Damping:
        """What is added to the curvature, and how it was chosen; `"auto"` takes some products with the operator."""
        return self._settled[0]

    @cached_property
    def prepared(self) -> Prepared:
        """The solver, ready for the operator and the damping: where all is spent that right-hand sides share."""
        damping, solver = self._settled
        return solver.prepare(self.curvature, damping.value)

    @cached_property
    def held(self) -> RankedRows:
        """How solutions are held while they meet samples."""
        return RankedRows(self.problem.space, self.solver.query_rank if isinstance(self.solver, EKFAC) else None)

    def solve(self, rows: Tensor) -> Solution:
        """Return solutions for right-hand sides `(k, P)`.

        Raises:
            SolveError: One failed, unless failures are returned.
        """
        return self.solve_each([rows])[0]

    def solve_each(self, tiles: Sequence[Tensor]) -> list[Solution]:
        """Return solutions for tiles of right-hand sides, whose residuals share passes over the data.

        Raises:
            SolveError: One failed, unless failures are returned.
        """
        solutions = self.prepared.solve_each(tiles)
        for solution in solutions if self.on_failure == "raise" else ():
            try:
                require(solution)
            except SolveError as error:
                where = f"influence with the {self.kind.replace('_', ' ')} of {self.problem.rows:,} rows"
                raise SolveError(f"{where}: {error}{self._way_out(solution)}", solution) from None
        return solutions

    def _way_out(self, solution: Solution) -> str:
        """Return a call that meets no negative curvature, where the Hessian has some."""
        if self.kind != "hessian" or Status.NEGATIVE_CURVATURE not in solution.status:
            return ""
        return (
            "\nAway from an optimum a Hessian has negative eigenvalues, a Gauss-Newton matrix of a convex loss none. "
            f"This call uses it:\n    {self.recipe}"
        )

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

    @property
    def together(self) -> int:
        """Tiles that are solved for together: as many as fit where EK-FAC is compared with the curvature itself."""
        if not (isinstance(self.solver, EKFAC) and self.solver.report_residual):
            return 1
        return self._tiles_within(_SOLVE_SHARE, 3 * self.problem.space.dim)  # gradients, solutions and products

    def group(self, rows: int, held: RankedRows) -> int:
        """Return how many of so many solutions are held at once, to share a pass over the samples that they meet."""
        if rows <= self.step:
            return max(1, rows)
        return min(-(-rows // self.step), self._tiles_within(_GROUP_SHARE, held.dim)) * self.step

    def _tiles_within(self, share: float, entries: int) -> int:
        """Return how many tiles of rows that take so many entries each fit into a share of the budget."""
        space = self.problem.space
        each = max(1, entries * space.dtype.itemsize * self.step)
        free = self.problem.ranks.least("the memory for influences", budget_bytes(None, space.device))
        return max(1, int(share * free) // each)

    def groups(self, data: Batches, held: RankedRows) -> Iterator[tuple[Tensor, list[Solution]]]:
        """Yield solutions of a group of rows, in the form of `held`, and what is known of them tile by tile."""
        left, solved, space = data.rows, self.solved(data), self.problem.space
        most = self.group(left, held)
        while left:
            many, known, filled = min(most, left), list[Solution](), 0
            x = torch.empty(0, held.dim, dtype=space.dtype, device=space.device)
            while filled < many:
                _, solution = next(solved)
                rows = on_finite_rows(held.packed, solution.x)
                if len(rows) == many:
                    x = rows
                else:
                    x = x if filled else x.new_empty(many, held.dim)
                    x[filled : filled + len(rows)] = rows
                filled += len(rows)
                known.append(replace(solution, x=solution.x[:, :0].clone()))
            left -= filled
            yield x, known

    def solved(self, data: Batches) -> Iterator[tuple[Tensor, Solution]]:
        """Yield the gradients of each tile of rows, and the solutions for them."""
        tiles, together = self.tiles(data), self.together
        while some := [tile() for tile in islice(tiles, together)]:
            found = self.solve_each(some)
            while some:
                yield some.pop(0), found.pop(0)

    def tiles(self, data: Batches) -> Iterator[Callable[[], Tensor]]:
        """Yield for each tile of `step` rows, across batches, a function that returns their gradients."""
        data = self.problem.rows_of(data, "gradients of test samples")
        for parts in in_tiles(data.tracked("solving", self.problem.progress), self.step):
            yield _gradients(self.problem, parts)


def in_tiles(batches: Iterable[Batch], step: int) -> Iterator[list[Batch]]:
    """Yield the rows of batches, `step` at a time, as parts of batches."""
    parts: list[Batch] = []
    filled = 0
    for batch in batches:
        at = 0
        while at < batch.rows:
            take = min(step - filled, batch.rows - at)
            parts.append(batch if take == batch.rows else batch.part(slice(at, at + take)))
            at, filled = at + take, filled + take
            if filled == step:
                yield parts
                parts, filled = [], 0
    if parts:
        yield parts


def _gradients(problem: Problem, parts: list[Batch]) -> Callable[[], Tensor]:
    def rows(point: BatchPoint) -> Tensor:
        dense = point.gradients().dense()
        problem.keep(point)
        return dense

    return lambda: joined([rows(problem.at(part)) for part in parts])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return rows one below the other; a single part as it is, since a copy of it costs its memory once more."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Settings(NamedTuple):
    """The settings of all influence calls, besides data.

    Attributes:
        loss: `loss(output, y)` of a plain model.
        solver: A name or a recipe.
        damping: A number or `"auto"`.
        curvature: Its name.
        on_failure: What becomes of a solve that failed.
    """

    loss: Any
    solver: SolverName | Solver
    damping: float | AutoDamping
    curvature: Curvature
    on_failure: OnFailure


def run_of(model: Any, train: Batches, asked: Settings, options: ProblemOptions, recipe: str) -> InfluenceRun:
    """Check the arguments; the model is not evaluated.

    Raises:
        InputTypeError: `model` is no model, or plain without a loss.
        InputError: An argument is out of range, or `model` carries a loss and another one is given.
    """
    own = hasattr(model, "objective")
    if own and asked.loss is not None:
        came, needed = "given", f"a {type(model).__name__} carries its own"
        raise InputError.of("loss", came, needed, "Leave it out, or pass the plain model with it.")
    if not own and asked.loss is None and (isinstance(model, nn.Module) or is_framework_model(model)):
        todo = "Pass it, or wrap model and loss in a TorchTwiceDifferentiable."
        raise InputTypeError.of("loss", "left out", f"a plain {type(model).__name__} needs `loss(output, y)`", todo)
    damping = checked_damping(asked.damping)
    check_choice("curvature", asked.curvature, Curvature)
    check_choice("on_failure", asked.on_failure, OnFailure)
    # Negative curvature is reported, and no other solver is tried.
    solver = Auto(indefinite=False) if asked.solver == "auto" else solver_of(asked.solver, "solver")
    problem = Problem(model, asked.loss, train, **options)
    return InfluenceRun(problem, asked.curvature, solver, damping, asked.on_failure, recipe)


def recipe(call: str, data: Sequence[str], given: Mapping[str, Any]) -> str:
    """Return a call that takes the Gauss-Newton matrix, to be pasted: words and numbers as they are, else names.

    Args:
        call: The public call.
        data: Names of its arguments by place.
        given: Its other arguments; what is None, False or `"auto"` is left out.
    """
    words = [*data]
    for name, value in given.items():
        if value is not None and value is not False and value not in ("auto", "up"):
            words.append(f"{name}={value!r}" if isinstance(value, str | int | float) else f"{name}={name}")
    words += ["curvature='ggn'", "damping='auto'"]
    return f"jacops.{call}({', '.join(words)})"
