"""Minima differentiated by their data: against refits at data that differ, and in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jacops.charts import SO3
from jacops.errors import InputTypeError, NotDifferentiableError, SolveError
from jacops.fit import gauss_newton, least_squares_batch, levenberg_marquardt

T = torch.linspace(0, 2, 12).double()
TIGHT: dict[str, Any] = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-13}
SUMMED = torch.tensor([1.0, -2.0, 3.0]).double()


def decay(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T) + x[2]


def noisy(*lead: int) -> Tensor:
    noise = torch.randn(*lead, 12, generator=torch.Generator().manual_seed(3)).double()
    return decay(torch.tensor([2.0, 1.0, 0.5]).double()) + 0.1 * noise


def differences(value: Callable[[Tensor], Tensor], at: Tensor, step: float = 2e-3) -> Tensor:
    """Return the gradient by central differences of fourth order."""
    units = torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)
    rows = []
    for unit in units:
        near, far = (value(at + k * step * unit) - value(at - k * step * unit) for k in (1, 2))
        rows.append((8 * near - far) / (12 * step))
    return torch.stack(rows).reshape(at.shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "huber", "f_scale": 0.08},
        {"kernel": "cauchy", "f_scale": 0.3},
        {"bounds": (0.0, torch.tensor([1.8, 9.0, 9.0]).double())},
        {"fixed": 1},
    ],
    ids=["plain", "huber", "cauchy", "at a bound", "fixed"],
)
def test_derivatives_by_targets_and_weights_are_those_of_refits(options: dict[str, Any]) -> None:
    y, w = noisy(), 0.5 + torch.rand(12, generator=torch.Generator().manual_seed(4)).double()

    def value(y: Tensor, w: Tensor, **more: Any) -> Tensor:
        fit = levenberg_marquardt(decay, target=y, weight=w, params=torch.ones(3).double(), **TIGHT, **options, **more)
        assert fit.success
        return (fit.x * SUMMED).sum()

    leaves = [y.clone().requires_grad_(), w.clone().requires_grad_()]
    by_y, by_w = torch.autograd.grad(value(*leaves, create_graph=True), leaves)
    torch.testing.assert_close(by_y, differences(lambda v: value(v, w), y), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_w, differences(lambda v: value(y, v), w), rtol=1e-5, atol=1e-6)


def test_a_parameter_at_a_bound_does_not_move() -> None:
    y = noisy().requires_grad_()
    fit = levenberg_marquardt(decay, target=y, params=torch.ones(3).double(), bounds=(0.0, 1.2), create_graph=True)
    mask: Any = fit.active_mask
    assert int(mask.abs().sum()) > 0
    for i, side in enumerate(mask.tolist()):
        moved = torch.autograd.grad(fit.x[i], y, retain_graph=True)[0]
        assert bool((moved == 0).all()) == (side != 0)


def test_the_minimum_of_a_linear_problem_moves_as_its_pseudoinverse() -> None:
    A = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    b = torch.arange(7.0).double().requires_grad_()
    fit = gauss_newton(lambda x: A @ x, target=b, params=torch.zeros(3).double(), create_graph=True)
    moved = torch.stack([torch.autograd.grad(v, b, retain_graph=True)[0] for v in fit.x])
    torch.testing.assert_close(moved, torch.linalg.pinv(A))


def test_a_batch_has_the_derivatives_of_its_problems_alone() -> None:
    times = (T + 0.01 * torch.randn(4, 12, generator=torch.Generator().manual_seed(5)).double()).requires_grad_()
    y = noisy(4).requires_grad_()
    gain = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)  # held by the function alone

    def curve(x: Tensor, t: Tensor) -> Tensor:
        return gain * x[0] * torch.exp(-x[1] * t) + x[2]

    start = torch.ones(4, 3).double()
    whole = least_squares_batch(
        curve, times, y, params=start, kernel="soft_l1", f_scale=0.1, create_graph=True, **TIGHT
    )
    found = torch.autograd.grad((whole.x * SUMMED).sum(), [times, y, gain])
    total: Any = 0.0
    for i in range(4):
        one = levenberg_marquardt(
            curve, times[i], y[i], params=start[i], kernel="soft_l1", f_scale=0.1, create_graph=True, **TIGHT
        )
        total = total + (one.x * SUMMED).sum()
    for mine, theirs in zip(found, torch.autograd.grad(total, [times, y, gain]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)

    def refit(v: Tensor) -> Tensor:
        with torch.no_grad():
            again = least_squares_batch(curve, v, y.detach(), params=start, kernel="soft_l1", f_scale=0.1, **TIGHT)
        return (again.x * SUMMED).sum()

    torch.testing.assert_close(found[0], differences(refit, times.detach()), rtol=3e-5, atol=3e-6)


def test_information_matrices_and_elements_of_groups() -> None:
    points = torch.randn(4, 3, generator=torch.Generator().manual_seed(6)).double()
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()) + 0.1
    turn = torch.tensor([0.3, -0.2, 0.1, 0.9]).double()
    turn = turn / turn.norm()

    def turned(q: Tensor) -> Tensor:
        axis = q[:3].expand(4, 3)
        cross = torch.linalg.cross(axis, points)
        return points + 2 * (q[3] * cross + torch.linalg.cross(axis, cross))

    seen = turned(turn) + 0.05 * torch.randn(4, 3, generator=torch.Generator().manual_seed(7)).double()

    def value(y: Tensor, **more: Any) -> Tensor:
        start = torch.tensor([0.0, 0, 0, 1]).double()
        fit = levenberg_marquardt(turned, target=y, weight=matrix, params=start, manifolds=SO3, **TIGHT, **more)
        return (fit.x * torch.arange(4.0).double()).sum()

    leaf = seen.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaf, create_graph=True), leaf)
    torch.testing.assert_close(found, differences(value, seen), rtol=1e-5, atol=1e-6)


def test_a_module_is_written_into_and_its_frozen_parameters_receive_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    net[0].requires_grad_(False)
    last: Any = net[2]
    x, y = torch.randn(20, 1).double(), torch.randn(20, 1).double().requires_grad_()
    fit = levenberg_marquardt(net, x, y, create_graph=True)
    assert torch.equal(last.weight, fit.x["2.weight"])
    assert last.weight.is_leaf
    fit.x["2.weight"].sum().backward()
    assert y.grad is not None
    assert bool(torch.isfinite(y.grad).all())
    assert float(y.grad.norm()) > 0
    assert last.weight.grad is None


def test_a_second_derivative_is_refused() -> None:
    y = noisy().requires_grad_()
    fit = levenberg_marquardt(decay, target=y, params=torch.ones(3).double(), create_graph=True)
    with pytest.raises(NotDifferentiableError, match="levenberg_marquardt: ImplicitSolution.*given once"):
        torch.autograd.grad(fit.x.sum(), y, create_graph=True)


def test_problems_without_a_minimum_have_no_derivative_and_stop_nobody_else() -> None:
    y = noisy(3)
    y[1] = float("nan")
    y.requires_grad_()
    fit = least_squares_batch(decay, target=y, params=torch.ones(3, 3).double(), create_graph=True, on_failure="return")
    (found,) = torch.autograd.grad(fit.x[fit.success].sum(), y, retain_graph=True)
    assert bool(torch.isfinite(found[[0, 2]]).all())
    assert float(found[0].norm()) > 0
    with pytest.raises(SolveError, match="of 1 problems, the first being 1, has no derivative"):
        torch.autograd.grad(fit.x.sum(), y)


def test_without_the_option_nothing_has_a_graph() -> None:
    y = noisy().requires_grad_()
    assert not levenberg_marquardt(decay, target=y, params=torch.ones(3).double()).x.requires_grad
    with torch.no_grad():
        fit = levenberg_marquardt(decay, target=y, params=torch.ones(3).double(), create_graph=True)
    assert fit.x.requires_grad
    with pytest.raises(InputTypeError, match="create_graph.*True or False"):
        levenberg_marquardt(decay, target=y, params=torch.ones(3).double(), create_graph="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_problem_without_success_leaves_derivatives_by_shared_data_alone(bad: float, vectorized: bool) -> None:
    def f(x: Tensor, s: Tensor) -> Tensor:
        x = x.mT.unsqueeze(-1) if vectorized else x
        return x[0] * torch.exp(-x[1] * s)

    def gradient(y: Tensor, which: list[int]) -> Tensor:
        times, y = T.clone().requires_grad_(), y.clone().requires_grad_()
        options: Any = {"shared": [0], "vectorized": vectorized, "create_graph": True, "on_failure": "return"}
        fits = least_squares_batch(f, (times,), target=y, params=torch.ones(len(y), 2).double(), **options)
        by_times, by_target = torch.autograd.grad(fits.x[which].sum(), [times, y])
        return torch.cat([by_times, by_target[which].flatten()])

    y = noisy(4)
    spoilt = y.clone()
    spoilt[2, 5] = bad
    torch.testing.assert_close(gradient(spoilt, [0, 1, 3]), gradient(y, [0, 1, 3]), rtol=1e-6, atol=1e-9)
