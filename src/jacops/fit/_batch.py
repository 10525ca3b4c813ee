"""The call for many problems of one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn

from .._keywords import keywords
from .._progress import shows_progress
from .._requirements import check_choice, check_flag
from .._torch.protocol import Shared
from .._words import BatchFailure, Corrector, StrategyName
from ..errors import InputError, SolveError, warn
from ._batch_loop import MET, Ended, run_batch
from ._batch_model import problems_of
from ._batch_problem import CALL, BatchProblem, batch_problem
from ._batch_result import BatchFitResult
from ._familiar import FAMILIAR
from ._result import Found, in_form
from ._solvers import AutoStepSolver
from ._stopping import StoppingCriteria
from ._strategies import BUILT_IN, Strategy, name_of, strategy_of

_ENTRIES = 2**24  # of Jacobians that are held at once, 128 MiB; more problems are solved some after others
_RULES = ("ftol", "xtol", "gtol", "max_steps", "max_nfev", "max_seconds")


class BatchFitOptions(TypedDict, total=False):
    """Options of `least_squares_batch`, `params` left out, on which the type of the result depends."""

    shared: Shared
    vectorized: bool
    manifolds: Any
    fixed: Any
    bounds: Any
    weight: Any
    sqrt_weight: Any
    kernel: Any
    f_scale: float
    corrector: Corrector
    strategy: StrategyName | Strategy
    damping: float | None
    x_scale: Any
    ftol: float | None
    xtol: float | None
    gtol: float | None
    max_steps: int
    max_nfev: int | None
    max_seconds: float | None
    create_graph: bool
    on_failure: BatchFailure
    progress: bool | None


@overload
def least_squares_batch(
    model: nn.Module | Callable[..., Any],
    input: Any = None,
    target: Any = None,
    *,
    params: Tensor,
    **options: Unpack[BatchFitOptions],
) -> BatchFitResult[Tensor]: ...
@overload
def least_squares_batch(
    model: nn.Module | Callable[..., Any],
    input: Any = None,
    target: Any = None,
    *,
    params: Found,
    **options: Unpack[BatchFitOptions],
) -> BatchFitResult[Found]: ...
@keywords(
    instead={
        **FAMILIAR,
        "solver": "Steps are solved for by QR or Cholesky factors, as each problem needs.",
        "jacobian": "Jacobians are dense, one for each problem.",
        "callback": "Pass `max_steps=`, or fit some problems at a time.",
        "inplace": "Nothing is written; take the result's `x`.",
        "verbose": "Print the result.",
    }
)
@shows_progress()
def least_squares_batch(
    model: nn.Module | Callable[..., Any],
    input: Any = None,
    target: Any = None,
    *,
    params: Any,
    shared: Shared = None,
    vectorized: bool = False,
    manifolds: Any = None,
    fixed: Any = None,
    bounds: Any = None,
    weight: Any = None,
    sqrt_weight: Any = None,
    kernel: Any = None,
    f_scale: float = 1.0,
    corrector: Corrector = "triggs",
    strategy: StrategyName | Strategy = "auto",
    damping: float | None = None,
    x_scale: Any = "jac",
    ftol: float | None = 1e-8,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-8,
    max_steps: int = 100,
    max_nfev: int | None = None,
    max_seconds: float | None = None,
    create_graph: bool = False,
    on_failure: BatchFailure = "warn",
    progress: bool | None = None,
) -> BatchFitResult[Any]:
    r"""Minimise the objective of `levenberg_marquardt` for many problems of one shape at once.

    The function is written for one problem, and vectorised by `torch.func.vmap`; where that gives other values for
    some of the problems than the function alone, or fails, it is run for one after another, with a warning. Every
    problem has its own damping or radius, its own scales, and stops by itself; one that is NaN, or does not converge,
    changes nothing for the others. Jacobians are compared with plain backward passes.

    Args:
        model: A function `f(*params, *input)` of one problem (with a dict of `params`: `f(*input, **params)`); or a
            module that is called with parameters of its own that are named in `params`.
        input: Its input: a tuple is unpacked, a mapping gives keyword arguments, None is no argument. First axes of
            tensors count the problems; the function is given one row.
        target: Subtracted from the outputs of all problems, (n, ...), with the same shape.
        params: The initial values: a tensor (n, ...), or a list or dict of tensors whose first axis counts the
            problems, as `torch.func.stack_module_state` gives them.
        shared: Names or positions of inputs that all problems have in common.
        vectorized: The function takes all problems at once, with first axes that count them; that these do not mix is
            checked in every pass.
        manifolds: Charts by parameter name, as in `levenberg_marquardt`.
        fixed: Parameters held fixed, by name and index of one problem's parameters.
        bounds: Bounds of the parameters, as in `levenberg_marquardt`; tensors of the shape of one problem's parameters,
            or of all problems'.
        weight: Factors of the squared residuals, as in `levenberg_marquardt`, for one problem's output, or with a first
            axis for all. Zeros exclude entries, such as the padding of data of different lengths; padded numbers must
            be finite.
        sqrt_weight: The same as square roots.
        kernel: A robust kernel.
        f_scale: Scale of a kernel that is given by name.
        corrector: `"triggs"` or `"first_order"`.
        strategy: `"trust_region"` (`"auto"`), `"nielsen"`, `"marquardt"`, `"adaptive"`, `"constant"`, or one of these
            of `jacops.fit` with options.
        damping: The first damping, of strategies that have one.
        x_scale: Scales of one problem's parameters, or `"jac"`.
        ftol: Stop a problem by its objective.
        xtol: Stop a problem by the length of a step.
        gtol: Stop a problem by its scaled gradient.
        max_steps: How many steps each problem may try.
        max_nfev: How many forward passes may be made.
        max_seconds: How long the call may take.
        create_graph: Return parameters that are differentiable by data: by tensors in `input`, `target`, `weight` and
            `sqrt_weight`, and by any that the function holds, where they require grad (implicit differentiation of the
            minimum; see `levenberg_marquardt`).
        on_failure: `"warn"` where a problem met no stop rule, `"raise"` a `SolveError` (its `.solution` is the
            result), or `"return"`.
        progress: Force the progress bar on or off.

    Returns:
        A result: for each problem its parameters, objective, status and success; `print` counts them.

    Raises:
        SolveError: A problem met no stop rule, and `on_failure="raise"`.
        InputError: An argument does not fit, or the function mixes problems.
        InputTypeError: An argument is of the wrong kind.
        NotDifferentiableError: The residual has no derivative.

    Example:
        >>> t = torch.linspace(0, 2, 20).double()
        >>> rates = torch.tensor([0.5, 1.0, 1.5]).double()
        >>> signals = 3 * torch.exp(-rates[:, None] * t)
        >>> decay = lambda x: x[0] * torch.exp(-x[1] * t)
        >>> fit = least_squares_batch(decay, target=signals, params=torch.ones(3, 2).double())
        >>> fit.x[:, 1]
        tensor([0.5000, 1.0000, 1.5000], dtype=torch.float64)
        >>> fit.success.all()
        tensor(True)
    """
    return _fitted(model, {k: v for k, v in locals().items() if k != "model"})


def _fitted(model: Any, options: dict[str, Any]) -> BatchFitResult[Any]:
    check_choice("on_failure", options["on_failure"], BatchFailure)
    check_flag("create_graph", options["create_graph"])
    recipe = _recipe(options["strategy"], options["damping"])
    rules = StoppingCriteria(*(options[key] for key in _RULES))
    shared, vectorized = options["shared"], options["vectorized"]
    problems, values, kind = problems_of(model, options["params"], options["input"], shared, vectorized, CALL)
    problem = batch_problem(problems, values, options)
    ended = _in_parts(problem, values, recipe, rules, options["progress"])
    result = _result(problem, ended, kind, f"{CALL}, {name_of(recipe)}")
    _report(result, options["on_failure"])
    if not options["create_graph"]:
        return result
    return replace(result, x=in_form(problem.minima(ended.values, result.success.numpy()).connected(), kind))


def _recipe(strategy: Any, damping: float | None) -> Strategy:
    recipe = strategy_of(strategy, damping, AutoStepSolver())
    if not isinstance(recipe, BUILT_IN):
        needed = "a strategy of jacops.fit is needed, whose rules hold for many problems at once"
        raise InputError.of("strategy", f"a {type(recipe).__name__}", needed)
    return recipe


def _in_parts(
    problem: BatchProblem, values: dict[str, Tensor], recipe: Strategy, rules: StoppingCriteria, progress: bool | None
) -> Ended:
    """Solve the problems, as many at a time as fit."""
    rows = sum(t.rows for t in problem.terms)
    parts = -(-rows * problem.layout.columns // _ENTRIES)
    if parts <= 1:
        return run_batch(problem, values, recipe, rules, progress)
    found = []
    for which in np.array_split(np.arange(problem.many), min(parts, problem.many)):
        picked = torch.from_numpy(which)
        own = {name: value[picked.to(value.device)] for name, value in values.items()}
        found.append(run_batch(problem.some(which), own, recipe, rules, progress))
    return Ended.joined(found)


def _result(problem: BatchProblem, ended: Ended, kind: type, method: str) -> BatchFitResult[Any]:
    met = np.isin(ended.status, MET)
    active = None if problem.bounds is None else in_form(problem.bounds.active(ended.values), kind)
    return BatchFitResult(
        x=in_form(ended.values, kind),
        cost=torch.from_numpy(ended.cost),
        fun=torch.from_numpy(ended.raw),
        optimality=torch.from_numpy(ended.optimality),
        success=torch.from_numpy(met & (ended.reason > 0)),
        status=[str(word) for word in ended.status],
        predicted=torch.from_numpy(ended.predicted),
        steps=torch.from_numpy(ended.steps),
        nfev=ended.evaluations,
        njev=ended.linearisations,
        route=ended.route,
        method=method,
        reasons=torch.from_numpy(ended.reason),
        active_mask=active,
    )


def _report(result: BatchFitResult[Any], on_failure: str) -> None:
    """Report the problems that met no stop rule.

    Raises:
        SolveError: There is one, and the caller requested an error.
    """
    unmet = [i for i, word in enumerate(result.status) if word not in MET]
    if not unmet or on_failure == "return":
        return
    first = f"the first is problem {unmet[0]}: {result.status[unmet[0]]}"
    message = f"{CALL}: {len(unmet):,} of {len(result.status):,} problems met no stop rule ({first})"
    if on_failure == "raise":
        raise SolveError(f"{message}. The error's `.solution` is the result.\n{result!r}", result)
    warn(f"{message}. See `success` and `status` of the result.")
