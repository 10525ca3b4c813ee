r"""Influence functions (Koh and Liang, 2017): rows are samples, never batches.

The influence of training sample i on test sample t is $g_t^\top (A + \lambda I)^{-1} g_i$, with gradients $g$ of
single losses, the curvature $A$ of the training objective, and damping $\lambda$. The sign is `+ s_test · grad`:
positive where weighting sample i up lowers the loss of t.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from .._data import Batches
from .._finite import on_finite_rows
from .._keywords import keywords
from .._operators._ranked_rows import RankedRows
from .._options import Model
from .._problem import Problem, ProblemOptions
from .._progress import shows_progress
from .._requirements import check_choice
from .._runtime.contexts import eager
from .._words import AutoDamping, Curvature, InfluenceType, OnFailure, SolverName
from ..errors import InputError
from ..solvers import Solver
from ._leverage import leveraged
from ._result import SIGN, UNITS, InfluenceFactors, Influences
from ._run import InfluenceRun, Settings, recipe, run_of
from ._settings import data_of
from ._stored import shares_of, stored
from ._tokens import token_influences
from ._twice_differentiable import TwiceDifferentiable

_DATA = ("model", "training_data")


@keywords(ProblemOptions)
@eager
@shows_progress()
def compute_influence_factors(
    model: TwiceDifferentiable[Any] | Model,
    training_data: Any,
    test_data: Any,
    *,
    loss: Any = None,
    solver: SolverName | Solver = "auto",
    damping: float | AutoDamping = "auto",
    curvature: Curvature = "ggn",
    on_failure: OnFailure = "raise",
    **options: Unpack[ProblemOptions],
) -> InfluenceFactors:
    r"""Return $(A + \lambda I)^{-1} g_t$ for every test sample.

    Args:
        model: A module, a `JaxFunction`, or model and loss in one: a `TorchTwiceDifferentiable` or a
            `JaxTwiceDifferentiable`. No module may mix or randomise samples in its mode.
        training_data: A loader of batches in a fixed order; its objective's curvature is $A$. A batch is a pair
            `(x, y)` or a mapping; see `Batches`.
        test_data: A loader of batches; one right-hand side per row.
        loss: `loss(output, y)` of a plain model, or `"model"`, the model's own; left out where `model` carries one.
        solver: A solver's name (`"direct"`, `"cg"`, `"lissa"`, `"arnoldi"`, `"nystrom"`, `"ekfac"`,
            `"minres"`), `"auto"`, or a solver with its options, such as `CG(preconditioner="nystrom")`.
        damping: $\lambda \ge 0$, added to the curvature of the objective as it is reduced; `"auto"` takes 0.02 of the
            curvature's spectral norm, which predicted retrained networks best (`benchmarks/datamodelling.py`).
        curvature: `"ggn"`, the Gauss-Newton matrix, which is positive semi-definite for convex losses wherever the
            parameters stand; `"hessian"`, which is so near an optimum; `"fisher"`, `"empirical_fisher"`,
            `"monte_carlo_fisher"`.
        on_failure: `"raise"`, or `"return"` to get the result with its statuses; rows that have no solution are NaN.
        options: Of the objective, as in `Problem`: `parameters=` (name patterns), `reduction=`, `l2=` (weight decay),
            `unpack=`, `randomness=`, `seed=`, `progress=`, `distributed=`, `timeout=`.

    Returns:
        `x` `(n_test, P)` in the space of parameters, with solver, damping, residuals and statuses in `info`.

    Raises:
        SolveError: A solve failed; the error has the `Solution` and states what to do.
        DataError: A loader shuffles, is empty, or does not yield batches.
        InputError: An argument is out of range, or the loss is not reduced as stated.
        ModelStateError: Batch statistics or dropout are in train mode.

    Example:
        >>> model, data = torch.nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
        >>> factors = compute_influence_factors(model, data, data, loss=torch.nn.functional.mse_loss, damping=1.0)
        >>> factors.x.shape
        torch.Size([2, 2])
    """
    train = Batches.of(training_data, "training_data", options.get("unpack"))
    test = data_of(test_data, "test_data", train)
    given = {"loss": loss, "solver": solver, **options}
    again = recipe("compute_influence_factors", ("model", "training_data", "test_data"), given)
    run = run_of(model, train, Settings(loss, solver, damping, curvature, on_failure), options, again)
    _ = run.prepared  # what the model or the curvature refuses comes before the test data
    solutions = [solution for _, solution in run.solved(test)]
    x = torch.cat([solution.x for solution in solutions])
    return InfluenceFactors(x, run.described(solutions))


@keywords(ProblemOptions)
@eager
@shows_progress()
def compute_influences(
    model: TwiceDifferentiable[Any] | Model,
    training_data: Any,
    *,
    loss: Any = None,
    test_data: Any = None,
    input_data: Any = None,
    influence_type: InfluenceType = "up",
    leverage: bool = False,
    solver: SolverName | Solver = "auto",
    damping: float | AutoDamping = "auto",
    curvature: Curvature = "ggn",
    on_failure: OnFailure = "raise",
    store: Any = None,
    **options: Unpack[ProblemOptions],
) -> Influences:
    r"""Return influences of training samples on test samples.

    Test samples are processed in tiles, with as many solutions as fit into half of the memory budget (a quarter of the
    free memory; `EKFAC(query_rank=...)` makes them smaller). Each tile takes one pass over the other samples, whose
    gradients are computed batch by batch, as factors where that is cheaper. Memory does not grow with the number of
    training samples times the number of parameters.

    Args:
        model: A module, a `JaxFunction`, or model and loss in one (`TorchTwiceDifferentiable`).
        training_data: A loader of batches `(x, y)` or mappings in a fixed order.
        loss: `loss(output, y)`, or `"model"`; left out where `model` carries one.
        test_data: A loader of batches; the training data where it is left out.
        input_data: The samples whose influence is computed; by default the training data.
        influence_type: `"up"` weights a sample up, `(n_test, n_input)`; `"perturbation"` changes its input,
            `(n_test, n_input, *x)`; `"token"` weights the terms up that a sequence's loss is the mean of, one for each
            label `(n_input, T)`: `(n_test, n_input, T)`, which adds up to `"up"`. Entry t is the term of label t (where
            each token predicts the next that of predicting token t, so entry 0 is 0); ignored labels have 0.
        leverage: Take the sample's own Gauss-Newton term out of the curvature too, which divides by $1 - h_i$ where
            there is one output: the leave-one-out step of a quadratic (Cook and Weisberg, 1982). Costs a solve per
            sample and output.
        solver: A solver's name, `"auto"`, or a solver with its options.
        damping: $\lambda \ge 0$, added to the curvature; `"auto"` takes 0.02 of its spectral norm.
        curvature: `"ggn"`, `"hessian"`, `"fisher"`, `"empirical_fisher"` or `"monte_carlo_fisher"`.
        on_failure: `"raise"`, or `"return"` to get the result with its statuses.
        store: A folder to which finished tiles are written (zarr v3). Processes that make the same call share the
            tiles, and each returns the whole result. Run again, the call continues a killed run, returns what a
            finished one computed without evaluating the model, and raises an error if anything that the result depends
            on differs. For influences of type `"up"` without leverage. Ranks of a process group share nothing else
            then.
        options: `parameters=`, `reduction=`, `l2=`, `unpack=`, `randomness=`, `seed=`, `progress=`, `distributed=`,
            `timeout=`; see `Problem`.

    Returns:
        Values with sign, units, damping and coverage; `.leave_one_out()` predicts the effect of leaving out a sample.

    Raises:
        InputError: `influence_type` is unknown, an argument is out of range, or the loss is not reduced as stated.
        SolveError: A solve failed; the error has the `Solution` and states what to do.
        DataError: A loader shuffles, is empty, or does not yield batches.

    Source: Koh and Liang (2017).

    Example:
        >>> model, data = torch.nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
        >>> found = compute_influences(model, data, loss=torch.nn.functional.mse_loss, damping=1.0)
        >>> found.values.shape, found.sign
        (torch.Size([2, 2]), '+ s_test · grad: positive where weighting the training sample up lowers the test loss')
    """
    check_choice("influence_type", influence_type, InfluenceType)
    if leverage and influence_type != "up":
        raise InputError.of("leverage", True, "it corrects influences of type 'up' only")
    train = Batches.of(training_data, "training_data", options.get("unpack"))
    test, asked = data_of(test_data, "test_data", train), data_of(input_data, "input_data", train)
    given = {"loss": loss, "test_data": test_data, "input_data": input_data, "influence_type": influence_type}
    again = recipe("compute_influences", _DATA, {**given, "leverage": leverage, "solver": solver, **options})
    if store is not None:  # which assigns tiles to processes
        options["distributed"] = False
    run = run_of(model, train, Settings(loss, solver, damping, curvature, on_failure), options, again)
    if store is not None:
        _check_storable(influence_type, leverage, on_failure)
        values, shares, info = stored(run, store, test, asked)
        return Influences(values, "up", SIGN, UNITS["up"], info["damping"], info, shares)
    _ = run.prepared
    solutions, tiles, found = [], [], None
    plain = leverage or influence_type == "perturbation"  # which take solutions as they are
    held = RankedRows(run.problem.space) if plain else run.held
    for x, known in run.groups(test, held):
        solutions += known
        if leverage:
            tile, found = leveraged(run.problem, asked, x, run.solve, on_failure == "raise")
        elif influence_type == "token":
            tile = on_finite_rows(lambda rows: token_influences(run.problem, asked, rows, held), x)
        elif influence_type == "up":
            tile = on_finite_rows(lambda rows: _met(run, asked, rows), x)
        else:
            tile = on_finite_rows(lambda factors: _perturbations(run.problem, asked, factors), x)
        tiles.append(tile)
    info = run.described(solutions)
    if found is not None:
        info["leverage"] = found
    shares = shares_of(run.problem, asked)
    return Influences(torch.cat(tiles), influence_type, SIGN, UNITS[influence_type], info["damping"], info, shares)


@keywords(ProblemOptions)
@eager
@shows_progress()
def self_influences(
    model: TwiceDifferentiable[Any] | Model,
    training_data: Any,
    *,
    loss: Any = None,
    solver: SolverName | Solver = "auto",
    damping: float | AutoDamping = "auto",
    curvature: Curvature = "ggn",
    on_failure: OnFailure = "raise",
    **options: Unpack[ProblemOptions],
) -> Tensor:
    r"""Return $s_i^2 g_i^\top (A + \lambda I)^{-1} g_i$ for every training sample, `(n_train,)`.

    Large values belong to samples whose loss depends on no other sample, such as mislabelled ones. With $g_i$ the
    gradient of a sample's own loss, in which its class weight cancels, $s_i$ is its share in the objective relative to
    an equal one: $n w_i d_i / \sum_j w_j d_j$ for a mean with sample weights $w$ and class weights or counted targets
    $d$, $w_i$ for a sum. Without weights and ignored targets it is 1.

    Args:
        model: A module, a `JaxFunction`, or model and loss in one (`TorchTwiceDifferentiable`).
        training_data: A loader of batches `(x, y)` or mappings in a fixed order.
        loss: `loss(output, y)`, or `"model"`; left out where `model` carries one.
        solver: A solver's name, `"auto"`, or a solver with its options.
        damping: $\lambda \ge 0$, added to the curvature; `"auto"` takes 0.02 of its spectral norm.
        curvature: `"ggn"`, `"hessian"`, `"fisher"`, `"empirical_fisher"` or `"monte_carlo_fisher"`.
        on_failure: `"raise"`, or `"return"` to get the result with its statuses.
        options: `parameters=`, `reduction=`, `l2=`, `unpack=`, `randomness=`, `seed=`, `progress=`, `distributed=`,
            `timeout=`; see `Problem`.

    Returns:
        One number per training sample, not negative for a positive curvature.

    Raises:
        SolveError: A solve failed; the error has the `Solution` and states what to do.
        DataError: A loader shuffles, is empty, or does not yield batches.
        InputError: An argument is out of range, or the loss is not reduced as stated.

    Example:
        >>> model, data = torch.nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.tensor([[0.0], [9.0]]))]
        >>> int(self_influences(model, data, loss=torch.nn.functional.mse_loss, damping=1.0).argmax())
        1
    """
    train = Batches.of(training_data, "training_data", options.get("unpack"))
    again = recipe("self_influences", _DATA, {"loss": loss, "solver": solver, **options})
    run = run_of(model, train, Settings(loss, solver, damping, curvature, on_failure), options, again)
    _ = run.prepared
    values = torch.cat([(solution.x * rows).sum(1) for rows, solution in run.solved(train)])
    shares = shares_of(run.problem, train) * (train.rows if run.problem.objective.reduction == "mean" else 1)
    return values * shares.to(values) ** 2


def _met(run: InfluenceRun, data: Batches, factors: Tensor) -> Tensor:
    """Return influences tile by tile, as a stored run has them, in one pass over the samples."""
    return torch.cat(run.problem.sample_gradients(data).apply_each(factors.split(run.step), run.held))


def _check_storable(influence_type: str, leverage: bool, on_failure: str) -> None:
    for name, value, only in (
        ("influence_type", influence_type, "up"),
        ("leverage", leverage, False),
        ("on_failure", on_failure, "raise"),
    ):
        if value != only:
            raise InputError.of(name, repr(value), f"a stored run needs {only!r}")


def _perturbations(problem: Problem, data: Batches, factors: Tensor) -> Tensor:
    batches = data.tracked("perturbations", problem.progress)
    points = map(problem.at, batches)
    return torch.cat([objective.mixed(batch.x, batch.y, factors) for batch, objective in points], 1)
