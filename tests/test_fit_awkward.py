"""Where a Jacobian says little or nothing, residuals that write where they should not, and awkward batches of fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jacops.errors import ModelStateError, NotDifferentiableError
from jacops.fit import LeastSquaresResult, gauss_newton, least_squares_batch, levenberg_marquardt
from jacops.fit._sequences import Sequences, sum_of_steps

F64 = torch.float64
QUIET: dict[str, Any] = {"progress": False, "on_failure": "return"}


def at(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


# ---- minima that are not zero, where the Jacobian is singular ----------------------------------------------------

MINIMA: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "at the start": (lambda x: x**2 + 1, [0.0], [0.0]),
    "one step off": (lambda x: x**2 + 1, [1.0], [0.0]),
    "near": (lambda x: x**2 + 1, [0.5], [0.0]),
    "nearer than rounding": (lambda x: x**2 + 1, [1e-9], [0.0]),
    "far": (lambda x: x**2 + 1, [-30.0], [0.0]),
    "large numbers": (lambda x: (1e-6 * x) ** 2 + 1e3, [2e7], [0.0]),
    "beside a regular one": (lambda x: torch.stack([x[0] ** 2 + 1, x[1] - 3]), [0.7, 0.0], [0.0, 3.0]),
    "turned": (
        lambda x: torch.stack([(x[0] + 2 * x[1]) ** 2 + 1, (x[0] - x[1] - 1) ** 2 + 2]),
        [1.0, 1.0],
        [2 / 3, -1 / 3],
    ),
    "of a cosine": (lambda x: torch.cos(x) + 2, [1.0], [np.pi]),
}


@pytest.mark.parametrize("way", ["dense", "sparse", "batch"])
@pytest.mark.parametrize("name", MINIMA)
def test_a_minimum_that_only_second_derivatives_show_is_a_success(name: str, way: str) -> None:
    model, start, minimum = MINIMA[name]
    size = max(map(abs, start)) + max(map(abs, minimum))
    if way == "batch":
        many = least_squares_batch(model, params=at(*start).repeat(3, 1), **QUIET)
        assert bool(many.success.all()), many
        assert "Hessian" in many.certificate(1) or "undamped" in many.certificate(1)
        x, steps = many.x[1], int(many.steps[1])
    else:
        fit = levenberg_marquardt(model, params=at(*start), jacobian=way, **QUIET)  # type: ignore[arg-type]
        assert fit.success, fit
        x, steps = fit.x, len(fit.log)
    torch.testing.assert_close(x, at(*minimum), rtol=0, atol=max(1e-4 * size, 1e-8))
    assert steps <= 40


STUCK: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "a maximum": (lambda x: x**2 - 1, [0.0]),
    "a saddle": (lambda x: torch.stack([x[0] ** 2 - 1, x[1] - 3]), [0.0, 0.0]),
    "a saddle of a product": (lambda x: (x[0] * x[1] + 1).reshape(1), [0.0, 0.0]),
    "a maximum of a cosine": (lambda x: torch.cos(x) + 2, [0.0]),
    "an inflection": (lambda x: x**3 + 1, [0.0]),
}


@pytest.mark.parametrize("way", ["dense", "sparse", "batch"])
@pytest.mark.parametrize("name", STUCK)
def test_a_point_that_is_no_minimum_is_no_success(name: str, way: str) -> None:
    model, start = STUCK[name]
    if way == "batch":
        many = least_squares_batch(model, params=at(*start).repeat(3, 1), **QUIET)
        assert many.status == ["stalled"] * 3
        assert not many.success.any()
        assert not many.certificate(0)
        return
    fit = levenberg_marquardt(model, params=at(*start), jacobian=way, **QUIET)  # type: ignore[arg-type]
    assert (fit.status, fit.success) == ("stalled", False)
    assert ("saddle or a maximum" in fit.message) == (name != "an inflection")


@pytest.mark.parametrize("way", ["dense", "sparse", "batch"])
def test_parameters_that_change_nothing_stay_a_success(way: str) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x[0] + x[1] - 1, x[0] + x[1] - 2, 0 * x[2]])

    if way == "batch":
        assert bool(least_squares_batch(model, params=torch.zeros(2, 3, dtype=F64), **QUIET).success.all())
    else:
        assert levenberg_marquardt(model, params=at(0, 0, 0), jacobian=way, **QUIET).success  # type: ignore[arg-type]


def test_second_derivatives_follow_bounds_kernels_and_weights() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x[0] ** 2 - 1, (x[0] - x[1]) ** 2 + 0.5])

    held = levenberg_marquardt(model, params=at(0.0, 0.0), fixed={"x": 0}, **QUIET)
    assert held.success, held  # the maximum is along what is held
    robust = levenberg_marquardt(lambda x: x**2 + 1, params=at(0.3, 0.2), kernel="huber", weight=4.0, **QUIET)
    assert robust.success, robust


# ---- steps that form a geometric sequence ------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.9, 0.5, -0.4, -0.9, -1.2])
def test_the_sum_of_a_geometric_sequence_is_its_limit(ratio: float) -> None:
    step = np.array([[1.0, -2.0], [0.3, 0.1]])
    np.testing.assert_allclose(sum_of_steps(step, ratio * step), 1 / (1 - ratio))


@pytest.mark.parametrize("ratio", [0.99, 0.2, 0.0, -0.1, -2.0, np.nan])
def test_what_is_no_such_sequence_is_left_alone(ratio: float) -> None:
    step = np.array([1.0, -2.0])
    assert sum_of_steps(step, ratio * step) == 1
    assert sum_of_steps(step, np.array([2.0, 1.0])) == 1
    assert sum_of_steps(0 * step, step) == 1


def test_a_rejected_sum_waits_twice_as_long_each_time() -> None:
    known = Sequences.begin((1, 2))
    step, waits = np.array([[1.0, 1.0]]), []
    for _ in range(3):
        known.note(step, np.ones(1), np.array([True]))
        known.waits[:] = 0
        assert known.factor(0.5 * step, np.ones((1, 2)), np.zeros(1), np.array([True])) == pytest.approx(2)
        known.note(step, np.array([2.0]), np.array([False]))
        waits.append(int(known.waits[0]))
        assert known.factor(0.5 * step, np.ones((1, 2)), np.zeros(1), np.array([True])) == 1
    assert waits == [1, 2, 4]


def test_large_residuals_take_few_steps() -> None:
    """A minimum where Gauss-Newton leaves 0.9 of the distance at each step, or overshoots by as much."""
    for curvature in (-0.9, 0.9):
        bend = lambda x, c=curvature: torch.stack([x[0], 1 + c * x[0] ** 2 / 2, x[1] - 1])  # noqa: E731
        for found in (
            levenberg_marquardt(bend, params=at(0.3, 0.0), **QUIET),
            least_squares_batch(bend, params=at(0.3, 0.0).repeat(2, 1), **QUIET),
        ):
            steps = len(found.log) if isinstance(found, LeastSquaresResult) else int(found.steps[0])
            x = found.x if isinstance(found, LeastSquaresResult) else found.x[0]
            assert steps <= 14, found
            torch.testing.assert_close(x, at(0.0, 1.0), rtol=0, atol=1e-3)


# ---- residuals that write into parameters ------------------------------------------------------------------------


def scaled(x: Tensor) -> Tensor:
    x.mul_(1.0)
    return x**2 - 2


def part_set(x: Tensor) -> Tensor:
    x[0] = 1.0
    return torch.stack([x[0] - 1, x[1] - 2])


def unseen(x: Tensor) -> Tensor:
    x.data.mul_(1.5)
    return x - 2


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(at(1.5, 0.5))

    def forward(self) -> Tensor:
        with torch.no_grad():
            self.w.clamp_(0, 1)
        return self.w - 2


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("call", [levenberg_marquardt, gauss_newton])
@pytest.mark.parametrize("function", [scaled, part_set, unseen])
def test_a_function_that_writes_into_its_parameters_is_refused(function: Any, call: Any, jacobian: str) -> None:
    start = torch.ones(2, dtype=F64)
    with pytest.raises(ModelStateError, match=rf"`model` .* in place, but {call.__name__} moves .* `x = x.clone\(\)`"):
        call(function, params=start, jacobian=jacobian, progress=False)
    assert torch.equal(start, torch.ones(2, dtype=F64))


def test_a_module_that_writes_into_its_parameters_is_refused_and_unchanged() -> None:
    model = Clamped()
    with pytest.raises(ModelStateError, match="writes into its parameter w in place"):
        levenberg_marquardt(model, progress=False)
    assert torch.equal(model.w, at(1.5, 0.5))


def test_a_function_may_write_into_a_copy() -> None:
    def copied(x: Tensor) -> Tensor:
        x = x.clone()
        x.mul_(2.0)
        return x - 2

    assert levenberg_marquardt(copied, params=torch.zeros(2, dtype=F64), **QUIET).success


# ---- awkward batches ---------------------------------------------------------------------------------------------

T = torch.linspace(0, 2, 12).double()
SOLVED, WRONG, SLOW, FAR, NEGATIVE = range(5)


def decay(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T) + x[2]


def awkward(many: int) -> tuple[Tensor, Tensor]:
    """Return starts and data of problems of all kinds in turn: solved at the start, NaN, far away, with bounds met."""
    generator = torch.Generator().manual_seed(0)
    true = 0.5 + torch.rand(many, 3, generator=generator).double()
    data = torch.stack([decay(x) for x in true]) + 0.05 * torch.randn(many, 12, generator=generator).double()
    start = torch.ones(many, 3).double()
    kind = torch.arange(many) % 5
    data[kind == SOLVED] = torch.stack([decay(x) for x in start[kind == SOLVED]])
    data[kind == WRONG, 3] = torch.nan
    start[kind == FAR] = torch.tensor([-4.0, 4.0, 9.0]).double()
    data[kind == NEGATIVE] -= 3
    return start, data


@pytest.mark.parametrize("many", [5, 150])
@pytest.mark.parametrize("max_steps", [3, 100])
@pytest.mark.parametrize(
    "bounds", [None, (-5.0, 1.2), (at(0.0, 0.0, -1.0), at(9.0, 1.3, 9.5))], ids=["free", "all", "each"]
)
@pytest.mark.parametrize("strategy", ["trust_region", "nielsen"])
def test_each_problem_of_an_awkward_batch_is_as_alone(strategy: Any, bounds: Any, max_steps: int, many: int) -> None:
    start, data = awkward(many)
    start = start if bounds is None else start.clamp(bounds[0], bounds[1])
    options: dict[str, Any] = {"strategy": strategy, "bounds": bounds, "max_steps": max_steps, **QUIET}
    found = least_squares_batch(decay, target=data, params=start, **options)
    for i in range(min(many, 10)):
        if i % 5 == WRONG:
            assert (found.status[i], bool(found.success[i])) == ("nonfinite", False)
            assert torch.equal(found.x[i], start[i])
            assert bool(found.cost[i].isnan())
            continue
        alone = levenberg_marquardt(decay, target=data[i], params=start[i], **options)
        assert bool(found.success[i]) == alone.success
        if alone.rule_met:  # which one is first may be a matter of rounding
            assert found.status[i] in ("gradient", "objective", "step")
            assert abs(int(found.steps[i]) - len(alone.log)) <= (found.status[i] != alone.status)
        else:
            assert (found.status[i], int(found.steps[i])) == (alone.status, len(alone.log))
        assert float(found.cost[i]) == pytest.approx(alone.cost, rel=1e-9, abs=1e-25)
        torch.testing.assert_close(found.x[i], alone.x, rtol=1e-6, atol=1e-6)
        if bounds is not None:
            assert torch.equal(found.active_mask[i], alone.active_mask)  # type: ignore[index,arg-type]
    if max_steps == 3:
        assert "max_steps" in found.status
    if bounds is not None and found.active_mask is not None:
        assert bool(found.active_mask.any())


TIMES = torch.linspace(0, 2, 12, dtype=F64)
CURVE = (-TIMES).exp() + 0.5 * (-2 * TIMES).exp() + 0.1 * (7 * TIMES).sin()
SADDLES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "the gradient is zero": (lambda x: torch.cat([x**2 - 1, x[:1] - x[1:] + 0.1 * (x[:1] - x[1:]) ** 2]), 2),
    "columns are equal": (lambda x: x[0] * (-x[1] * TIMES).exp() + x[2] * (-x[3] * TIMES).exp() - CURVE, 4),
}


@pytest.mark.parametrize("name", SADDLES)
def test_saddles_where_a_jacobian_that_is_not_zero_lacks_rank_are_no_success(name: str) -> None:
    model, columns = SADDLES[name]
    found = levenberg_marquardt(model, params=torch.zeros(columns, dtype=F64), **QUIET)
    hessian = torch.autograd.functional.hessian(lambda x: model(x).square().sum() / 2, found.x)
    assert torch.linalg.eigvalsh(hessian)[0] < -1e-3
    assert not found.success
    assert "saddle" in found.message


class Changing:
    """A residual that is another one from its third call on."""

    def __init__(self, before: Callable[[Tensor], Any], after: Callable[[Tensor], Any]) -> None:
        self.before, self.after, self.calls = before, after, 0

    def __call__(self, x: Tensor) -> Any:
        self.calls += 1
        return (self.before if self.calls < 3 else self.after)(x - 1)


@pytest.mark.parametrize("jacobian", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("kernel", [None, "huber"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: x, lambda x: x[:2]),
        (lambda x: x[:2], lambda x: x),
        (lambda x: (x, x.sin()), lambda x: (x,)),
        (lambda x: x, lambda x: x.sum()),
    ],
)
def test_residuals_that_change_their_shape_are_refused(
    before: Callable[[Tensor], Any], after: Callable[[Tensor], Any], kernel: str | None, jacobian: str
) -> None:
    model = Changing(before, after)
    with pytest.raises((ModelStateError, NotDifferentiableError), match="keep their shapes|shape of"):
        levenberg_marquardt(model, params=torch.full((4,), 3.0, dtype=F64), kernel=kernel, jacobian=jacobian)


def test_rows_that_are_left_out_at_some_points_are_refused() -> None:
    """Fewer rows have a smaller sum of squares: a step that leaves some out would look like a good one."""
    with pytest.raises(ModelStateError, match=r"returning \(0,\) after \(2,\).*by zero"):
        levenberg_marquardt(lambda x: (x - 3)[x.detach() < 2], params=at(0.0, 1.9), max_steps=50)


@pytest.mark.filterwarnings("ignore:least_squares_batch")
@pytest.mark.parametrize("vectorized", [False, True])
def test_residuals_of_batches_that_change_their_shape_are_refused(vectorized: bool) -> None:
    calls = [0]

    def model(x: Tensor) -> Tensor:
        calls[0] += 1
        return (x - 3)[..., : 3 + calls[0] % 2]

    with pytest.raises(ModelStateError, match="shapes"):
        least_squares_batch(model, params=torch.zeros(3, 4, dtype=F64), vectorized=vectorized)
