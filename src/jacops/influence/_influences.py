r"""Influence functions by a direct solve (Koh and Liang, 2017): rows are samples, never batches.

The influence of training sample i on test sample t is $g_t^\top (A + \lambda I)^{-1} g_i$, with gradients $g$ of
single losses, the curvature $A$ of the training objective, and damping $\lambda$. The sign is `+ s_test · grad`:
positive where weighting sample i up lowers the loss of t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._backends._torch.agreement import size
from .._backends._torch.replica import bare, parameter_names
from .._backends._torch.surroundings import eager, seeded
from ..derivatives import ggn, hessian, record_loss
from ..errors import DataError, InputError, InputTypeError, SolveError, explain
from ..per_sample import Randomness, checked_seed, refuse_mixing_modules, sample_gradients
from ..trees import flatten
from ._data import Batches
from ._torch import TorchTwiceDifferentiable
from ._twice_differentiable import InverseHvpResult

Reduction = Literal["mean", "sum"]
Curvature = Literal["hessian", "ggn"]
SIGN = "+ s_test · grad: positive where weighting the training sample up lowers the test loss"


@dataclass(frozen=True)
class _Setting:
    """What a curvature stands for, checked."""

    model: TorchTwiceDifferentiable
    data: Batches
    damping: float
    curvature: Curvature
    reduction: Reduction
    on_failure: Literal["raise", "return"]
    progress: bool | None
    randomness: Randomness
    seed: int | None

    def gradients(self, data: Batches, what: str) -> Tensor:
        """Return the gradients of all rows of some data."""
        return _all_gradients(self.model, data, what, self.progress, self.randomness, self.seed)


@dataclass(frozen=True, eq=False, repr=False)
class InfluenceFactors(InverseHvpResult[Tensor]):  # pyright: ignore[reportInvalidTypeArguments]
    """Solutions `(A + damping I) x = g_test`, one row per test sample.

    Attributes:
        x: The solutions, `(n_test, P)`.
        info: What happened: status, true residual per row, damping, curvature, rows of data, parameters covered.
    """

    def __repr__(self) -> str:
        return f"InfluenceFactors({tuple(self.x.shape)}: {_told(self.info)})"


@dataclass(frozen=True, eq=False, repr=False)
class Influences:
    """Influences of training samples on test samples, and how they were made.

    Attributes:
        values: `(n_test, n_train)` for `"up"`, `(n_test, n_train, *x)` for `"perturbation"`.
        influence_type: Which of the two.
        sign: The convention, in words.
        units: What a number means.
        damping: Added to the curvature.
        info: As in `InfluenceFactors`.
    """

    values: Tensor
    influence_type: str
    sign: str
    units: str
    damping: float
    info: dict[str, Any]

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    def __getitem__(self, key: Any) -> Tensor:
        """Index the values."""
        return self.values[key]

    def to_numpy(self) -> Any:
        """Return the values as a NumPy array."""
        return self.values.cpu().numpy()

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the `k` training samples of largest influence for every test sample, `(values, indices)`.

        Raises:
            InputError: There are fewer training samples, or these are perturbation influences.
        """
        if self.values.ndim != 2 or not 0 < k <= self.values.shape[1]:
            raise InputError(
                explain(
                    "k", k, f"influences of shape {tuple(self.shape)} need 0 < k <= {self.values.shape[1]} and two axes"
                )
            )
        values, indices = self.values.topk(k, dim=1)
        return values, indices

    def __repr__(self) -> str:
        told = f"{_told(self.info)}; sign {self.sign}; in {self.units}"
        return f"Influences({self.influence_type}, {tuple(self.shape)}: {told})"


def _told(info: dict[str, Any]) -> str:
    return (
        f"{info['method']} with {info['curvature']}, damping {info['damping']:g}, {info['status']}, worst residual "
        f"{max(info['residual'], default=0.0):.1e}, {info['rows']} training rows, {info['covered']} of "
        f"{info['parameters']} parameters"
    )


@eager
def compute_influence_factors(
    differentiable_model: TorchTwiceDifferentiable,
    training_data: Any,
    test_data: Any,
    *,
    inversion_method: Literal["direct"] = "direct",
    damping: float = 0.0,
    curvature: Curvature = "hessian",
    reduction: Reduction | None = None,
    on_failure: Literal["raise", "return"] = "raise",
    randomness: Randomness = "error",
    seed: int | None = None,
    progress: bool | None = None,
) -> InfluenceFactors:
    r"""Return $(A + \lambda I)^{-1} g_t$ for every test sample.

    Args:
        differentiable_model: Model and loss; no module may mix or randomise samples in its mode.
        training_data: A loader of pairs `(x, y)` in a fixed order; its objective's curvature is $A$.
        test_data: A loader of pairs; one right-hand side per row.
        inversion_method: `"direct"`, a Cholesky factorisation of the dense matrix.
        damping: $\lambda \ge 0$, added to the curvature of the objective as it is reduced.
        curvature: `"hessian"`, or `"ggn"`, which is positive semi-definite for convex losses.
        reduction: How the loss reduces a batch; by default what `loss.reduction` says, else the mean. It is verified.
        on_failure: `"raise"`, or `"return"` to get the result with its status.
        randomness: As in `sample_gradients`.
        seed: As in `sample_gradients`.
        progress: Force progress bars on or off.

    Raises:
        SolveError: The damped curvature is not positive definite; the message names the damping that would make it so.
        DataError: A loader shuffles, runs dry, or gives something else than pairs.
        InputError: An argument is out of range, or the loss is not reduced as said.
        ModelStateError: Batch statistics or dropout are in train mode.
    """
    if inversion_method != "direct":
        raise InputError(explain("inversion_method", repr(inversion_method), "'direct' is needed"))
    reduced: Reduction = reduction or getattr(getattr(differentiable_model, "loss", None), "reduction", "mean")
    _check_arguments(differentiable_model, damping, curvature, reduced, on_failure)
    refuse_mixing_modules(differentiable_model.model, random=checked_seed(randomness, seed) is None)
    train = Batches.of(training_data, "training_data")
    setting = _Setting(
        differentiable_model, train, float(damping), curvature, reduced, on_failure, progress, randomness, seed
    )
    test = setting.data if test_data is training_data else Batches.of(test_data, "test_data")
    matrix, rows = _curvature(setting)
    return _solved(setting, matrix, rows, setting.gradients(test, "test gradients"))


@eager
def compute_influences(
    differentiable_model: TorchTwiceDifferentiable,
    training_data: Any,
    *,
    test_data: Any = None,
    input_data: Any = None,
    influence_type: Literal["up", "perturbation"] = "up",
    **options: Any,
) -> Influences:
    r"""Return influences of training samples on test samples.

    Args:
        differentiable_model: As in `compute_influence_factors`.
        training_data: As in `compute_influence_factors`.
        test_data: A loader of pairs; the training data where it is left out.
        input_data: The samples whose influence is asked; the training data where it is left out.
        influence_type: `"up"` weights a sample up, `(n_test, n_input)`; `"perturbation"` moves its input,
            `(n_test, n_input, *x)`.
        options: `damping=`, `curvature=`, … as in `compute_influence_factors`.

    Returns:
        Values with sign, units, damping and coverage. With $N$ samples in a mean-reduced objective, leaving one out
        changes the test loss by about its value / N.

    Raises:
        InputError: `influence_type` is unknown, or as in `compute_influence_factors`.
        SolveError: As in `compute_influence_factors`.
        DataError: As in `compute_influence_factors`.
    """
    if influence_type not in ("up", "perturbation"):
        raise InputError(explain("influence_type", repr(influence_type), "'up' or 'perturbation' is needed"))
    train = Batches.of(training_data, "training_data")
    test = train if test_data is None or test_data is training_data else Batches.of(test_data, "test_data")
    asked = train if input_data is None or input_data is training_data else Batches.of(input_data, "input_data")
    factors = compute_influence_factors(differentiable_model, train, test, **options)
    if influence_type == "up":
        gradients = _all_gradients(differentiable_model, asked, "training gradients", **_drawn(options))
        values = factors.x @ gradients.T
        units = "test loss per unit of weight of the training sample"
    else:
        values = _perturbations(differentiable_model, asked, factors.x, options.get("progress"))
        units = "test loss per unit of weight and unit of the training input"
    return Influences(values, influence_type, SIGN, units, factors.info["damping"], factors.info)


@eager
def self_influences(differentiable_model: TorchTwiceDifferentiable, training_data: Any, **options: Any) -> Tensor:
    r"""Return $g_i^\top (A + \lambda I)^{-1} g_i$ for every training sample, `(n_train,)`.

    Large values are samples that only themselves speak for: mislabelled ones come first.

    Args:
        differentiable_model: As in `compute_influence_factors`.
        training_data: As in `compute_influence_factors`.
        options: `damping=`, `curvature=`, … as in `compute_influence_factors`.
    """
    train = Batches.of(training_data, "training_data")
    factors = compute_influence_factors(differentiable_model, train, train, **options)
    gradients = _all_gradients(differentiable_model, train, "training gradients", **_drawn(options))
    return (factors.x * gradients).sum(1)


def _drawn(options: dict[str, Any]) -> dict[str, Any]:
    defaults = {"progress": None, "randomness": "error", "seed": None}
    return {name: options.get(name, value) for name, value in defaults.items()}


def _check_arguments(model: Any, damping: Any, curvature: Any, reduction: Any, on_failure: Any) -> None:
    if not isinstance(model, TorchTwiceDifferentiable):
        came = f"a {type(model).__name__}"
        raise InputTypeError(explain("differentiable_model", came, "a TorchTwiceDifferentiable is needed"))
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise InputError(explain("damping", repr(damping), "a finite number that is not negative is needed"))
    for name, value, known in (
        ("curvature", curvature, ("hessian", "ggn")),
        ("reduction", reduction, ("mean", "sum")),
        ("on_failure", on_failure, ("raise", "return")),
    ):
        if value not in known:
            raise InputError(explain(name, repr(value), f"one of {known} is needed"))


def _curvature(setting: _Setting) -> tuple[Tensor, int]:
    """Return the dense curvature of the whole objective and the number of rows: batches weigh by their rows."""
    build: Callable[..., Any] = hessian if setting.curvature == "hessian" else ggn
    model, loss = setting.model.model, setting.model.loss
    total: Tensor | None = None
    count = 0
    for (x, y), rows in setting.data.tracked("curvature", setting.progress):
        if rows == 0:
            continue
        if count == 0:
            _check_reduction(setting, x, y, rows)
        weight = rows if setting.reduction == "mean" else 1
        with seeded(setting.seed):
            part = build(model, loss, x, y).dense().mul_(weight)
        total = part if total is None else total.add_(part)
        count += rows
    if total is None or count == 0:
        raise DataError(explain("training_data", "without rows", "at least one is needed"))
    return total.div_(count if setting.reduction == "mean" else 1), count


def _check_reduction(setting: _Setting, x: Any, y: Any, rows: int) -> None:
    """Hold the loss of a batch against the losses of its rows alone."""
    values, tree = flatten((x, y), "batch")

    def value(where: slice) -> float:
        part_x, part_y = tree.build([v[where] for v in values])
        return float(
            record_loss(setting.model.model, setting.model.loss, part_x, part_y, "influence").tape.outputs[0].detach()
        )

    few = min(rows, 16)
    alone = [value(slice(i, i + 1)) for i in range(few)]
    together, expected = value(slice(0, few)), sum(alone) / (few if setting.reduction == "mean" else 1)
    scale = max(sum(map(abs, alone)) / few, 1e-30)
    if not abs(together - expected) <= 1e-3 * max(scale, abs(expected)):
        raise InputError(
            f"`reduction` is {setting.reduction!r}, but the loss of {few} rows together is {together:.6g} and "
            f"the {setting.reduction} of "
            f"their losses alone is {expected:.6g}. Say `reduction='sum'`, or take class weights and ignored "
            "targets out of the loss."
        )


def _all_gradients(
    model: TorchTwiceDifferentiable,
    data: Batches,
    what: str,
    progress: bool | None,
    randomness: Randomness = "error",
    seed: int | None = None,
) -> Tensor:
    options: dict[str, Any] = {"randomness": randomness, "seed": seed}
    batches = data.tracked(what, progress)
    return torch.cat([sample_gradients(model.model, model.loss, x, y, **options).matrix for (x, y), _ in batches])


def _perturbations(model: TorchTwiceDifferentiable, data: Batches, factors: Tensor, progress: bool | None) -> Tensor:
    columns = []
    for (x, y), rows in data.tracked("perturbations", progress):
        if not isinstance(x, Tensor):
            raise InputError(
                explain("input_data", f"giving x as a {type(x).__name__}", "perturbations need one tensor")
            )
        values, tree = flatten((x, y), "batch")
        for i in range(rows):
            one_x, one_y = tree.build([v[i : i + 1] for v in values])
            gradient = model.grad(one_x, one_y, create_graph=True)
            moved = model.mvp(gradient, factors, backprop_on=one_x)
            columns.append(moved.reshape(factors.shape[0], *x.shape[1:]))
    return torch.stack(columns, 1)


def _solved(setting: _Setting, matrix: Tensor, rows: int, right: Tensor) -> InfluenceFactors:
    damped = matrix.clone()
    damped.diagonal().add_(setting.damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    status, lowest = "converged", None
    if int(failed):
        lowest, highest = (float(e) for e in torch.linalg.eigvalsh(damped)[[0, -1]])
        level = damped.shape[0] * torch.finfo(damped.dtype).eps * max(abs(lowest), abs(highest))
        status = "singular" if abs(lowest) <= level else "negative_curvature"
        solution = torch.full_like(right, math.nan)
    else:
        solution = torch.cholesky_solve(right.T, factor).T
    condition = float("inf") if int(failed) else float((factor.diagonal().max() / factor.diagonal().min()) ** 2)
    tiny = torch.finfo(right.dtype).tiny
    residual = ((solution @ damped - right).norm(dim=1) / right.norm(dim=1).clamp_min(tiny)).tolist()
    if status == "converged":
        status = _judged(damped, solution, right, condition, max(residual, default=0.0))
    parameters = parameter_names(bare(setting.model.model)).values()
    info = {
        "method": "direct",
        "curvature": setting.curvature,
        "status": status,
        "converged": status == "converged",
        "residual": residual,
        "damping": setting.damping,
        "lowest_eigenvalue": lowest,
        "condition": condition,
        "rows": rows,
        "reduction": setting.reduction,
        "covered": setting.model.num_params,
        "parameters": sum(p.numel() for p in parameters),
    }
    result = InfluenceFactors(solution, info)
    if status != "converged" and setting.on_failure == "raise":
        raise SolveError(_advice(setting, status, lowest, residual), result)
    return result


def _judged(damped: Tensor, solution: Tensor, right: Tensor, condition: float, worst: float) -> str:
    """Return a status from a lower bound of the condition number and the true residual."""
    double = damped.dtype == torch.float64
    if condition > (1e14 if double else 1e6):
        return "singular"
    reach = [size(s) / max(size(b), 1e-300) for s, b in zip(solution, right, strict=True)]
    attainable = torch.finfo(damped.dtype).eps * size(damped) * max(reach, default=0.0)
    return "converged" if worst <= max(1e-8 if double else 1e-4, attainable) else "stagnated"


def _advice(setting: _Setting, status: str, lowest: float | None, residual: list[float]) -> str:
    if lowest is None and status == "singular":
        return f"{setting.curvature} plus damping {setting.damping:g} is singular to rounding. Raise `damping`."
    if lowest is None:
        worst = f"{max(residual):.1e} ({status})"
        return f"the direct solve left a relative residual of {worst}. Run the problem in float64 or raise `damping`."
    needed = setting.damping - 2 * min(lowest, 0.0) or 1e-6
    switch = "" if setting.curvature == "ggn" else ", or take `curvature='ggn'`"
    return (
        f"the {setting.curvature} plus damping {setting.damping:g} is not positive definite ({status}): its "
        f"lowest eigenvalue is {lowest:.3g}. "
        f"Raise `damping` to {needed:.1g} or more{switch}."
    )
