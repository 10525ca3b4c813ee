"""What influence calls are given beside model and data, and the passes that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._data import Batch, Batches
from .._finite import on_finite_rows
from .._operators import LayerFactors
from .._operators._finite_results import check_result
from .._operators._ranked_rows import RankedRows
from .._options import Model
from .._problem import Problem, ProblemOptions
from .._words import AutoDamping, Curvature, OnFailure, SolverName
from ..solvers import Solution, Solver
from ._run import InfluenceRun, Settings, recipe, run_of
from ._twice_differentiable import TwiceDifferentiable

Product = Callable[[LayerFactors, Tensor, RankedRows], Tensor]
Modelled = TwiceDifferentiable[Any] | Model


class InfluenceOptions(ProblemOptions, total=False):
    """Options of influence calls, as in `compute_influences`.

    Attributes:
        loss: `loss(output, y)` of a plain model.
        solver: A name or a recipe.
        damping: Added to the curvature, or `"auto"`.
        curvature: Its name.
        on_failure: What becomes of a solve that failed.
    """

    loss: Any
    solver: SolverName | Solver
    damping: float | AutoDamping
    curvature: Curvature
    on_failure: OnFailure


def solved_by(model: Any, train: Batches, options: InfluenceOptions) -> InfluenceRun:
    """Return the run that such options describe, prepared for solves.

    Raises:
        JacopsError: The data, the loss or an option is not supported, or a solve fails.
    """
    given: dict[str, Any] = dict(options)
    kept = {name: value for name, value in given.items() if name not in ("damping", "curvature", "on_failure")}
    again = recipe("compute_influences", ("model", "training_data"), kept)
    names = {"loss": None, "solver": "auto", "damping": "auto", "curvature": "ggn", "on_failure": "raise"}
    asked = Settings(**{name: given.pop(name, default) for name, default in names.items()})
    run = run_of(model, train, asked, given, again)  # pyright: ignore[reportArgumentType]
    _ = run.prepared
    return run


def data_of(data: Any, name: str, train: Batches) -> Batches:
    """Return data as batches, the training data where they are left out or the same."""
    return train if data is None or data is train.given else Batches.of(data, name, train.unpack)


def plain_product(factors: LayerFactors, solutions: Tensor, held: RankedRows) -> Tensor:
    """Return influences `(m, n)` of the samples of a batch on the test samples that were solved for."""

    def apply(rows: Tensor) -> Tensor:
        return check_result(factors, factors.times(held.parts(rows), rows), "a product")

    return on_finite_rows(apply, solutions)


def blocks_of(
    run: InfluenceRun, test: Batches, asked: Batches, known: list[Solution], product: Product = plain_product
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield what test samples and samples have in common, block by block, the samples' axis fastest.

    Args:
        run: The solver.
        test: The test samples.
        asked: The samples whose influence is asked.
        known: Takes what is known of the solves.
        product: Of a batch's gradients with solutions.
    """
    unchanged, row = run.problem.objective.unchanged(), 0
    for solutions, of_tiles in run.groups(test, run.held):
        known += of_tiles
        rows, column = slice(row, row + len(solutions)), 0
        for batch in asked.tracked("influences", run.problem.progress):
            if batch.rows:
                unchanged("influences")
                factors = run.problem.at(batch).objective.sample_gradients(batch.x, batch.y)
                columns = slice(column, column + batch.rows)
                yield rows, columns, product(factors, solutions, run.held)
                column = columns.stop
        row = rows.stop


def gradients_of(problem: Problem, parts: list[Batch]) -> Tensor:
    """Return the gradients `(n, P)` of the rows of some batches."""
    return torch.cat([problem.at(part).gradients().dense() for part in parts])


def unchecked(many: int) -> dict[str, Any]:
    """Return the entries of `info` for scores without a residual."""
    rows = {"statuses": ["unchecked"] * many, "residual": [math.nan] * many}
    return {"status": "unchecked", "converged": False, "success": True, **rows}
