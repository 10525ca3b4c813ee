"""Covariances that rest on no distribution: against closed forms, automatic differentiation, and many refits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jacops.errors import InputError, InputTypeError, SolveError
from jacops.fit import Cauchy, Huber, Kernel, gauss_newton, least_squares_batch, levenberg_marquardt

F64 = torch.float64


def lines(many: int, seed: int, outliers: float, count: int = 40) -> tuple[Tensor, Tensor]:
    """Return places, (count, 2), and noisy data of lines through them, (many, count)."""
    rng = np.random.default_rng(seed)
    places = np.stack([np.ones(count), np.linspace(-1, 1, count)], 1)
    noise = rng.standard_normal((many, count)) * np.where(rng.random((many, count)) < outliers, 15.0, 1.0)
    return torch.from_numpy(places), torch.from_numpy(places @ [1.0, 2.0] + noise)


def test_without_a_kernel_it_is_that_of_white() -> None:
    places, data = lines(1, 0, 0.2)
    X, y = places.numpy(), data[0].numpy()
    fit = gauss_newton(lambda x: places @ x, target=data[0], params=torch.zeros(2, dtype=F64))
    left = X @ fit.x.numpy() - y
    bread = np.linalg.inv(X.T @ X)
    expected = 40 / 38 * bread @ (X.T @ (left[:, None] ** 2 * X)) @ bread
    np.testing.assert_allclose(fit.covariance(robust=True), expected, rtol=1e-10)
    np.testing.assert_allclose(fit.covariance([1], robust=True), expected[1:, 1:], rtol=1e-10)


@pytest.mark.parametrize("kernel", [Huber(0.8), Cauchy(1.5)], ids=["huber", "cauchy"])
@pytest.mark.parametrize("corrector", ["first_order", "triggs"])
@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("width", [1, 2])
def test_blocks_and_curvature_are_those_of_the_objective(
    kernel: Kernel, corrector: Any, jacobian: Any, width: int
) -> None:
    rng = np.random.default_rng(width)
    X = torch.from_numpy(rng.standard_normal((30, width, 3)))
    y = torch.from_numpy(rng.standard_normal((30, width)) * np.where(rng.random((30, 1)) < 0.2, 8, 1))
    shape = (30, width) if width > 1 else (30,)
    delta = kernel.delta  # type: ignore[attr-defined]

    def blocks(x: Tensor) -> Tensor:
        s = (X @ x - y).square().sum(1)
        if isinstance(kernel, Cauchy):
            return delta**2 * torch.log1p(s / delta**2) / 2
        return torch.where(s > delta**2, 2 * delta * s.sqrt() - delta**2, s) / 2

    fit = levenberg_marquardt(
        lambda x: (X @ x).reshape(shape),
        target=y.reshape(shape),
        params=torch.zeros(3, dtype=F64),
        kernel=kernel,
        corrector=corrector,
        jacobian=jacobian,
        max_steps=500,
        ftol=None,
        xtol=None,
    )
    bread = np.linalg.inv(torch.func.hessian(lambda x: blocks(x).sum())(fit.x).numpy())  # residuals are linear
    gradients = torch.func.jacrev(blocks)(fit.x).numpy()
    expected = 30 / 27 * bread @ gradients.T @ gradients @ bread
    np.testing.assert_allclose(fit.covariance(robust=True), expected, rtol=1e-6)


def test_with_outliers_it_is_the_spread_of_many_refits() -> None:
    places, data = lines(800, 1, 0.2, 200)
    start = torch.zeros(800, 2, dtype=F64)
    refits = least_squares_batch(lambda x: places @ x, target=data, params=start, kernel=Huber(1.0))
    spread = np.cov(refits.x.numpy().T)
    robust, plain = np.zeros((2, 2)), np.zeros((2, 2))
    for own in data[:20]:
        fit = levenberg_marquardt(lambda x: places @ x, target=own, params=start[0], kernel=Huber(1.0))
        robust, plain = robust + fit.covariance(robust=True) / 20, plain + fit.covariance() / 20
    ratio, other = np.diag(robust) / np.diag(spread), np.diag(plain) / np.diag(spread)
    assert (abs(ratio - 1) < 0.2).all(), ratio  # the spread is known to 5 %, the mean of 20 fits to 4 %
    assert (other > 1.5).all(), other


def test_what_cannot_be_is_refused() -> None:
    places, data = lines(1, 0, 0.0)
    fit = gauss_newton(lambda x: places @ x, target=data[0], params=torch.zeros(2, dtype=F64))
    with pytest.raises(InputError, match="`robust` is True with `absolute=True`"):
        fit.covariance(absolute=True, robust=True)
    with pytest.raises(InputTypeError, match="robust"):
        fit.covariance(robust="yes")  # type: ignore[arg-type]
    few = gauss_newton(lambda x: places[:2] @ x, target=data[0, :2], params=torch.zeros(2, dtype=F64))
    with pytest.raises(InputError, match="True for 2 blocks of residuals, but more than 2 columns are needed"):
        few.covariance(robust=True)
    free = gauss_newton(lambda x: x[:1] + x[1:] - data[0], params=torch.zeros(2, dtype=F64), on_failure="return")
    with pytest.raises(SolveError, match="no full rank"):
        free.covariance(robust=True)


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_marginals_are_blocks_of_the_whole(jacobian: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacops.fit._sandwich._AT_ONCE", 1)
    rng = np.random.default_rng(3)
    X, y = torch.from_numpy(rng.standard_normal((60, 8))), torch.from_numpy(rng.standard_normal(60))
    fit = levenberg_marquardt(
        lambda a, b: X[:, :6] @ a.reshape(-1) + X[:, 6:] @ b - y,
        params=[torch.zeros(3, 2, dtype=F64), torch.zeros(2, dtype=F64)],
        fixed={"x[0]": (1, 0)},
        kernel=Huber(1.0),
        jacobian=jacobian,
    )
    whole = np.zeros((8, 8))
    moving = np.array([0, 1, 3, 4, 5, 6, 7])
    whole[np.ix_(moving, moving)] = fit.covariance(robust=True)
    blocks = fit.marginals("x[0]", robust=True)
    for row in range(3):
        own = slice(2 * row, 2 * row + 2)
        np.testing.assert_allclose(blocks[row], whole[own, own], rtol=1e-9, atol=1e-18)
    other = fit.marginals("x[0]", [2], against={"x[1]": [1]}, robust=True)
    np.testing.assert_allclose(other[0, :, 0], whole[4:6, 7], rtol=1e-9, atol=1e-18)
    assert not np.allclose(blocks, fit.marginals("x[0]"), rtol=0.02)
    with pytest.raises(InputError, match="`robust` is True with `absolute=True`"):
        fit.marginals("x[0]", absolute=True, robust=True)
