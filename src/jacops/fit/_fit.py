"""The two calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn

from .._keywords import keywords
from .._progress import shows_progress
from .._requirements import check_choice, check_flag
from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from .._torch.protocol import input_leaves
from .._words import Corrector, OnFailure, StepSolverName, StrategyName
from ..errors import InputError, SolveError
from ._familiar import FAMILIAR
from ._functions import FunctionModule, function_module
from ._loop import Outcome, run
from ._named_solvers import solver_of
from ._options import DampedFitOptions, FitOptions
from ._problem import FitProblem
from ._result import FitProgress, Found, LeastSquaresResult, as_given, in_form
from ._solvers import StepSolver
from ._stopping import Observer, StoppingCriteria
from ._strategies import Strategy, TrustRegion, name_of, strategy_of

_RULES = ("ftol", "xtol", "gtol", "max_steps", "max_nfev", "max_seconds")


@overload
def levenberg_marquardt(
    model: nn.Module, input: Any = None, target: Any = None, *, params: None = None, **options: Unpack[DampedFitOptions]
) -> LeastSquaresResult[dict[str, Tensor]]: ...
@overload
def levenberg_marquardt(
    model: Callable[..., Any],
    input: Any = None,
    target: Any = None,
    *,
    params: Tensor,
    **options: Unpack[DampedFitOptions],
) -> LeastSquaresResult[Tensor]: ...
@overload
def levenberg_marquardt(
    model: Callable[..., Any],
    input: Any = None,
    target: Any = None,
    *,
    params: Found,
    **options: Unpack[DampedFitOptions],
) -> LeastSquaresResult[Found]: ...
@keywords(instead=FAMILIAR)
@shows_progress()
def levenberg_marquardt(
    model: nn.Module | Callable[..., Any],
    input: Any = None,
    target: Any = None,
    *,
    params: Any = None,
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
    solver: StepSolverName | StepSolver = "auto",
    jacobian: Any = "auto",
    x_scale: Any = "jac",
    ftol: float | None = 1e-8,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-8,
    max_steps: int = 100,
    max_nfev: int | None = None,
    max_seconds: float | None = None,
    callback: Callable[[FitProgress[Any]], Any] | None = None,
    verbose: int = 0,
    inplace: bool | None = None,
    create_graph: bool = False,
    on_failure: OnFailure = "raise",
    progress: bool | None = None,
) -> LeastSquaresResult[Any]:
    r"""Minimise $\tfrac12 \sum_k \rho(\lVert S_k (f_k - y_k) \rVert^2)$, $f$ a model's output, $y$ the target.

    Every step solves $(J^\top J + \lambda D) p = -J^\top r$ for residual and Jacobian of one and the same run of the
    model: batch statistics, dropout masks and random draws are those of one fixed function during the whole call, and
    buffers and random states are restored afterwards.

    Args:
        model: A module, whose parameters that require grad are fitted; or a function `f(*params, *input)` (with a dict
            of `params`: `f(*input, **params)`).
        input: The model's input: a tuple is unpacked, a mapping gives keyword arguments, None is no argument.
        target: Subtracted from the output, with the same shape; a tree like that of the output.
        params: For a function: a tensor, or a list or dict of tensors, the initial values.
        manifolds: Charts by parameter name, such as `{"poses": SE3}`: that parameter's last axis holds elements, moved
            by `chart.retract`. LieTensors of PyPose move by their own retraction, $\exp(d) X$; all else by addition.
        fixed: Parameters held fixed: a parameter's name or a pattern of names, such as `"camera*"`, or a list of
            these; or by name or pattern True for the whole, an index, or a mask of elements: `{"poses": 0}`.
        bounds: A pair `(lower, upper)` of numbers or tensors like `params`, as in SciPy, or such pairs by parameter
            name; None, or Inf, leaves a side open. Iterates are feasible. Parameters at a bound with the gradient
            pointing outwards are left out of the step and of `optimality` (Bertsekas, 1982).
        weight: Factors of the squared residuals: a number; per entry or per block (blocks are the last axes of an
            output); or information matrices `(d, d)` or `(*blocks, d, d)`. A tree of these for several outputs; a
            prior is one more output, `(residual, x - mean)`, whose weight is the prior's precision.
        sqrt_weight: The same as square roots: residuals are multiplied by it from the left.
        kernel: A robust kernel of squared lengths: `"huber"`, `"soft_l1"`, `"cauchy"`, `"arctan"` with the scale
            `f_scale` as in SciPy, a `Kernel`, or a function of a tensor. It is applied to squared lengths of weighted
            blocks, or of entries for a vector. A list or dict for several outputs.
        f_scale: Scale of a kernel that is given by name.
        corrector: `"triggs"` takes the kernel's curvature into account, `"first_order"` its slope only.
        strategy: What limits a step: `"trust_region"` (dogleg; Powell, 1970), dampings `"nielsen"`, `"marquardt"`,
            `"adaptive"`, `"constant"`, or a `Strategy`. `"auto"` is the first, and `"nielsen"` where `damping` is
            given or the solver is `"pcg"`.
        damping: The first $\lambda$, in units of the diagonal of $J^\top J$ (with `x_scale` given, of its largest
            scaled entry); the only one with `"constant"`.
        solver: `"auto"`, `"qr"`, `"cholesky"`, `"lstsq"`, `"sparse_cholesky"`, `"splu"`, `"qdldl"`, `"rslab"`, `"pcg"`
            or a `StepSolver`.
        jacobian: `"auto"`, `"dense"`, `"sparse"`, or a plan, such as an earlier result's `plan`. A sparse plan is kept
            for the next call with the same model (or function) and shapes, certified there, and made again if that
            fails.
        x_scale: Scales of the parameters: steps, damping and radius are measured in `x / x_scale`. `"jac"`: one over
            the largest norm of each Jacobian column so far (Moré, 1978), which makes the call independent of units.
            Or a number; or a tensor like `params` (a list or dict of them where that is one), over the tangent
            directions for parameters on a chart.
        ftol: Stop when the objective changes by no more than this part of itself; None to switch off.
        xtol: Stop when a scaled step is no longer than this part of the scaled parameters.
        gtol: Stop when the scaled gradient is no larger: the largest cosine between residual and a Jacobian's column.
            A rule stops the call only if an undamped step predicts no further reduction (`success` of the
            result); where it does not, that step is tried. Rules looser than 1e-8 stop at their own tolerance.
        max_steps: How many steps may be tried.
        max_nfev: How many forward passes may be made.
        max_seconds: How long the call may take; it ends after the step that takes it past that.
        callback: Called with a `FitProgress` after each step that is taken. If it returns True or raises StopIteration
            the call ends there, and returns its result with the status `"callback"`.
        verbose: 1 prints a summary at the end, 2 a line per step too.
        inplace: Write the result into the tensors given. By default a module's parameters are written and tensors in
            `params` are not. An exception leaves everything untouched.
        create_graph: Return parameters that are differentiable by data, once: by tensors in `input`, `target`, `weight`
            and `sqrt_weight`, and by any that the function holds, where they require grad. By the implicit function
            theorem with the Hessian of the objective, second derivatives included; parameters at a bound with the
            gradient pointing outwards do not move.
        on_failure: `"raise"` a `SolveError` where no rule stopped the call (its `.solution` is the result), or
            `"return"`.
        progress: Force the progress bar on or off.

    Returns:
        A result: parameters, objective, why it stopped, one log record per step; `print` shows them.

    Raises:
        SolveError: No stop rule was met, and `on_failure="raise"`.
        InputError: An argument does not fit.
        InputTypeError: An argument is of the wrong kind.
        ModelStateError: No parameter requires grad.
        NonFiniteError: The residual at the start, or a Jacobian, is NaN or Inf.
        NotDifferentiableError: The residual has no derivative.
        MemoryBudgetError: A dense Jacobian would not fit into the machine's memory.

    Example:
        >>> t = torch.linspace(0, 2, 20).double()
        >>> decay = lambda x: x[0] * torch.exp(-x[1] * t)
        >>> fit = levenberg_marquardt(decay, target=3 * torch.exp(-1.5 * t), params=torch.ones(2).double())
        >>> fit.x
        tensor([3.0000, 1.5000], dtype=torch.float64)
        >>> fit.success
        True
    """
    recipe = strategy_of(strategy, damping, solver_of(solver))
    options = {k: v for k, v in locals().items() if k not in ("model", "strategy", "damping", "recipe")}
    return _fit(model, "levenberg_marquardt", recipe, options)


@overload
def gauss_newton(
    model: nn.Module, input: Any = None, target: Any = None, *, params: None = None, **options: Unpack[FitOptions]
) -> LeastSquaresResult[dict[str, Tensor]]: ...
@overload
def gauss_newton(
    model: Callable[..., Any], input: Any = None, target: Any = None, *, params: Tensor, **options: Unpack[FitOptions]
) -> LeastSquaresResult[Tensor]: ...
@overload
def gauss_newton(
    model: Callable[..., Any], input: Any = None, target: Any = None, *, params: Found, **options: Unpack[FitOptions]
) -> LeastSquaresResult[Found]: ...
@keywords(instead=FAMILIAR)
@shows_progress()
def gauss_newton(
    model: nn.Module | Callable[..., Any],
    input: Any = None,
    target: Any = None,
    *,
    params: Any = None,
    manifolds: Any = None,
    fixed: Any = None,
    bounds: Any = None,
    weight: Any = None,
    sqrt_weight: Any = None,
    kernel: Any = None,
    f_scale: float = 1.0,
    corrector: Corrector = "first_order",
    solver: StepSolverName | StepSolver = "auto",
    jacobian: Any = "auto",
    x_scale: Any = "jac",
    ftol: float | None = 1e-8,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-8,
    max_steps: int = 50,
    max_nfev: int | None = None,
    max_seconds: float | None = None,
    callback: Callable[[FitProgress[Any]], Any] | None = None,
    verbose: int = 0,
    inplace: bool | None = None,
    create_graph: bool = False,
    on_failure: OnFailure = "raise",
    progress: bool | None = None,
) -> LeastSquaresResult[Any]:
    r"""Minimise the objective of `levenberg_marquardt` by undamped Gauss-Newton steps, $J^\top J p = -J^\top r$.

    Fast near a solution; a step that increases the objective is not rejected. Where a dense Jacobian has no full rank,
    the shortest step is taken; a sparse one is refused then (hold something `fixed`). Kernels are corrected in the
    first order by default (iteratively reweighted least squares), which needs no damping.

    Args:
        model: A module whose parameters are fitted, or a function of `params` and `input`; see `levenberg_marquardt`.
        input: The model's input.
        target: Subtracted from the output, with the same shape.
        params: The initial values, for a function.
        manifolds: Charts by parameter name.
        fixed: Parameters held fixed, by name or pattern.
        bounds: A pair `(lower, upper)`, or such pairs by parameter name.
        weight: Weights or information matrices.
        sqrt_weight: Their square roots.
        kernel: A robust kernel.
        f_scale: Scale of a kernel that is given by name.
        corrector: `"first_order"` or `"triggs"`.
        solver: How the equations of a step are solved.
        jacobian: `"auto"`, `"dense"`, `"sparse"` or a plan.
        x_scale: Scales that `xtol` measures steps in.
        ftol: Stop by the objective.
        xtol: Stop by the length of a step.
        gtol: Stop by the scaled gradient.
        max_steps: How many steps may be taken.
        max_nfev: How many forward passes may be made.
        max_seconds: How long the call may take.
        callback: Called after each step that is taken.
        verbose: 0, 1 or 2.
        inplace: Write the result into the tensors given.
        create_graph: Return parameters that are differentiable by data.
        on_failure: `"raise"` or `"return"`.
        progress: Force the progress bar on or off.

    Returns:
        The fitted parameters `x`, `cost`, `success`, why it stopped, and a `log` of every step.

    Raises:
        SolveError: No stop rule was met, and `on_failure="raise"`.
        InputError: An argument does not fit.
        InputTypeError: An argument is of the wrong kind.
        ModelStateError: No parameter requires grad.
        NonFiniteError: The residual at the start, or a Jacobian, is NaN or Inf.
        NotDifferentiableError: The residual has no derivative.
        MemoryBudgetError: A dense Jacobian would not fit into the machine's memory.

    Example:
        >>> gauss_newton(lambda x: x * x, target=torch.tensor([9.0]).double(), params=torch.tensor([2.0]).double()).x
        tensor([3.], dtype=torch.float64)
    """
    options = {k: v for k, v in locals().items() if k != "model"}
    return _fit(model, "gauss_newton", None, options)


def _fit(model: Any, call: str, strategy: Strategy | None, options: dict[str, Any]) -> LeastSquaresResult[Any]:
    solver, params, on_failure = solver_of(options["solver"]), options["params"], options["on_failure"]
    check_choice("on_failure", on_failure, OnFailure)
    check_flag("create_graph", options["create_graph"])
    rules = StoppingCriteria(*(options[key] for key in _RULES))
    module: Any = model
    if not isinstance(model, nn.Module) and not isinstance(model, type):
        module = function_module(model, params)
        module.check_arguments(options["input"])
    elif params is not None:
        needed = "a module has its own parameters"
        raise InputError.of("params", "given", needed, "Freeze those that are to stay as they are.")
    else:
        input_leaves(options["input"])
    kind = type(params) if isinstance(module, FunctionModule) else None
    limited_by = "" if strategy is None else "radius" if isinstance(strategy, TrustRegion) else "damping"
    observer = Observer(options["callback"], options["verbose"], kind, limited_by)
    problem = FitProblem(module, options["input"], call, options)
    ended = run(problem, solver, strategy, rules, observer, progress=options["progress"])
    result = _result(problem, ended, observer, strategy)
    if observer.verbose:
        print(repr(result), flush=True)
    if not (result.rule_met or result.status == "callback") and on_failure == "raise":
        message = f"{call}: {result.message}. The error's `.solution` is the result so far.\n{result!r}"
        raise SolveError(message, result)
    if options["create_graph"]:
        connected = problem.minimum(module, ended.point.values, result.success).connected()
        result = replace(result, x=in_form({name: value[0] for name, value in connected.items()}, kind))
    inplace = options["inplace"]
    if inplace if inplace is not None else not isinstance(module, FunctionModule):
        _write(_originals(module, problem, params), ended.point.values)
    return result


def _originals(module: Any, problem: FitProblem, params: Any) -> dict[str, Tensor]:
    if not isinstance(module, FunctionModule):
        return problem.original
    tensors = [params] if isinstance(params, Tensor) else params.values() if isinstance(params, dict) else params
    return dict(zip(module.names, tensors, strict=True))


@restoring
def _write(originals: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Put values into the caller's tensors, which have the same shapes."""
    for name, value in values.items():
        target = originals[name].detach().as_subclass(Tensor)
        with arithmetic(False, inference=target.is_inference()):
            target.copy_(value.as_subclass(Tensor))


def _result(
    problem: FitProblem, ended: Outcome, observer: Observer, strategy: Strategy | None
) -> LeastSquaresResult[Any]:
    method = problem.call if strategy is None else f"{problem.call}, {name_of(strategy)}"
    point, stop = ended.point, ended.stop
    point.whole.terms = None  # holds the model's outputs
    point.whole.samples, point.whole.curvature = problem.residuals.samples(point.raw)
    return LeastSquaresResult(
        x=as_given(point.values, observer.kind),
        cost=point.cost,
        fun=torch.from_numpy(point.raw),
        optimality=point.optimality,
        status=stop.status,
        message=stop.message,
        certificate=stop.certificate.reason,
        predicted=stop.certificate.predicted,
        method=method,
        limited_by=observer.limited_by,
        log=ended.log,
        nfev=problem.evaluations,
        njev=problem.linearisations,
        route=problem.route,
        plan=problem.plan,
        equations=_equations(ended),
        active_mask=None if problem.bounds is None else as_given(problem.bounds.active(point.values), observer.kind),
        _system=point.whole,
        _columns=problem.layout.named,
    )


def _equations(ended: Outcome) -> str:
    """Return how the equations of the last step were solved."""
    solver = next((record.solver for record in reversed(ended.log) if np.isfinite(record.inner_residual)), "")
    elimination = ended.point.system.elimination if solver.startswith("sparse_cholesky") else ""
    return f"{solver}: {elimination}" if elimination else solver
