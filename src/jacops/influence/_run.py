"""One influence computation: problem, curvature and solver, and the tiles in which test samples are solved for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import Batch, Batches
from ..errors import InputError, InputTypeError, SolveError, explain
from ..operators._data import SumOver
from ..problem import CURVATURES, Problem, ProblemOptions
from ..solvers import Auto, Prepared, Solution, Solver, require, solver_of
from ._result import described

_TILE_BYTES = 2**26  # of right-hand sides that are solved for together


@dataclass(frozen=True)
class Run:
    """A problem, its curvature, and the solver made ready.

    Attributes:
        problem: The training objective.
        kind: Which curvature.
        curvature: The operator.
        solver: The recipe.
        prepared: It, ready for the operator and the damping.
        damping: Added to the curvature.
        on_failure: What becomes of a solve that failed.
    """

    problem: Problem
    kind: str
    curvature: SumOver
    solver: Solver
    prepared: Prepared
    damping: float
    on_failure: Literal["raise", "return"]

    def solve(self, rows: Tensor) -> Solution:
        """Return solutions for right-hand sides `(k, P)`.

        Raises:
            SolveError: One did not converge, unless failures are returned.
        """
        solution = self.prepared.solve(rows)
        if self.on_failure == "raise":
            try:
                require(solution, self.curvature)
            except SolveError as error:
                raise SolveError(f"influence with {self.curvature.told}: {error}", solution) from None
        return solution

    @property
    def step(self) -> int:
        """Rows that are solved for together."""
        return max(1, _TILE_BYTES // max(1, self.problem.space.dim * self.problem.space.dtype.itemsize))

    def tiles(self, data: Batches) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Yield tiles of `step` rows across batches: their number, and a function that gives their gradients."""
        parts: list[Batch] = []
        start = 0
        for batch in data.tracked("solving", self.problem.progress):
            at = 0
            while at < batch.rows:
                number, inside = divmod(start + at, self.step)
                take = min(self.step - inside, batch.rows - at)
                parts.append(batch if take == batch.rows else batch.part(slice(at, at + take)))
                at += take
                if inside + take == self.step:
                    yield number, _gradients(self.problem, parts)
                    parts = []
            start += batch.rows
        if parts:
            yield start // self.step, _gradients(self.problem, parts)


def _gradients(problem: Problem, parts: list[Batch]) -> Callable[[], Tensor]:
    return lambda: torch.cat([problem.objective.sample_gradients(part.x, part.y).dense() for part in parts])


def ready(
    model: Any, train: Batches, method: str | Solver, damping: Any, kind: str, on_failure: Any, options: ProblemOptions
) -> Run:
    """Check the arguments and prepare the solver.

    Raises:
        InputTypeError: `model` carries no objective.
        InputError: An argument is out of range.
    """
    if not hasattr(model, "objective"):
        came, todo = f"a {type(model).__name__}", "Wrap model and loss in one."
        raise InputTypeError(explain("differentiable_model", came, "a TorchTwiceDifferentiable is needed", todo))
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise InputError(explain("damping", repr(damping), "a finite number that is not negative is needed"))
    for name, value, known in (("curvature", kind, CURVATURES), ("on_failure", on_failure, ("raise", "return"))):
        if value not in known:
            raise InputError(explain(name, repr(value), f"one of {known} is needed"))
    # At an optimum curvature is positive: negative curvature is a finding, not a case for another solver.
    solver = Auto(indefinite=False) if method == "auto" else solver_of(method, "inversion_method")
    problem = Problem(model, data=train, **options)
    operator = problem.curvature(kind)
    return Run(problem, kind, operator, solver, solver.prepare(operator, float(damping)), float(damping), on_failure)


def stored(run: Run, path: Any, test: Batches, asked: Batches) -> tuple[Tensor, dict[str, Any]]:
    """Return influences `(n_test, n_asked)` and what is known of them, by way of a store that outlives a crash.

    Factors are kept beside influences, so that a crash never repeats a solve.

    Raises:
        StoreMismatchError: The store was made with something else; the message names what.
        StoreBusyError: Another process writes to it.
        MissingExtraError: zarr is not installed.
    """
    from ..extras.store import Grid, StoredRun, digest_data, surroundings

    problem, step = run.problem, run.step
    kind = str(problem.space.dtype).removeprefix("torch.")
    rows, columns = test.rows, asked.rows
    tile = min(step, rows)
    grids = {
        "factors": Grid((rows, problem.space.dim), tile=(tile, problem.space.dim), dtype=kind),
        "residual": Grid((rows,), tile=(tile,), dtype="float64"),
        "influences": Grid((rows, columns), tile=(tile, columns), dtype=kind),
    }
    sources = {"training data": problem.data, "test data": test, "input data": asked}
    identity = {
        **problem.fingerprint(),
        **{name: digest_data((b.x, b.y, b.weights) for b in data) for name, data in sources.items()},
        "curvature": run.kind,
        "damping": repr(run.damping),
        "solver": repr(run.solver),
        "dtype": kind,
    }
    with StoredRun.open(path, identity, grids, surroundings=surroundings()) as kept:
        lacking = {name: set(kept.missing(name)) for name in grids}
        for number, gradients in run.tiles(test):
            place = (number, 0)
            if place in lacking["factors"] or (number,) in lacking["residual"]:
                solution = run.solve(gradients())
                kept.write("factors", place, solution.x)
                kept.write("residual", (number,), solution.residual)
            if place in lacking["influences"]:
                factors = torch.from_numpy(kept.tile("factors", place)).to(problem.space.device)
                kept.write("influences", place, problem.sample_gradients(asked).apply(factors))
        kept.complete()
        values = torch.from_numpy(kept.read("influences")).to(problem.space.device)
        residual = kept.read("residual").tolist()
    info = described(problem, run.kind, [], run.damping)
    return values, {**info, "method": run.prepared.method, "residual": residual, "store": str(path)}
