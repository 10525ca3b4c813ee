"""Robust kernels: their formulas against SciPy and PyPose, and the corrections against differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from jacops.errors import InputError, InputTypeError
from jacops.fit import (
    Arctan,
    Cauchy,
    Huber,
    Kernel,
    PseudoHuber,
    Scale,
    SoftLOne,
    Tolerant,
    gauss_newton,
    levenberg_marquardt,
)
from jacops.fit._kernels import _FLOOR, correction

KERNELS = [Huber(0.7), PseudoHuber(0.7), SoftLOne(0.7), Cauchy(0.7), Arctan(0.7), Tolerant(0.5, 0.3), Scale(0.4)]
KERNELS += [Tolerant(0.5, -0.3)]
EACH = pytest.mark.parametrize("kernel", KERNELS, ids=repr)
SQUARES = np.array([0.0, 1e-12, 0.1, 0.48, 0.5, 1.0, 3.0, 50.0])


@EACH
def test_slope_and_curvature_are_derivatives_of_the_value(kernel: Kernel) -> None:
    s, h = SQUARES[2:], 1e-5
    _, first, second = kernel(s)
    np.testing.assert_allclose(first, (kernel(s + h)[0] - kernel(s - h)[0]) / (2 * h), atol=1e-7)
    np.testing.assert_allclose(second, (kernel(s + h)[1] - kernel(s - h)[1]) / (2 * h), atol=1e-7)
    assert kernel(np.zeros(1))[0][0] == pytest.approx(0, abs=1e-15)


def test_values_are_those_of_pypose() -> None:
    kernels = pytest.importorskip("pypose").optim.kernel
    for kernel in KERNELS:
        if kernel == Tolerant(0.5, 0.3):
            continue  # which PyPose refuses
        theirs = getattr(kernels, type(kernel).__name__)(*vars(kernel).values())
        np.testing.assert_allclose(kernel(SQUARES)[0], theirs(torch.from_numpy(SQUARES)).numpy(), atol=1e-13)


@pytest.mark.parametrize("loss", ["linear", "huber", "soft_l1", "cauchy", "arctan"])
@pytest.mark.parametrize("corrector", ["triggs", "first_order"])
def test_the_optimum_is_that_of_scipy(loss: str, corrector: str) -> None:
    t = torch.linspace(0, 3, 40).double()
    y = 2 * torch.exp(-1.2 * t) + 0.02 * torch.randn(40).double()
    y[::7] += 1.0
    theirs = least_squares(
        lambda x: x[0] * np.exp(-x[1] * t.numpy()) - y.numpy(),
        [1.5, 1.0],
        loss=loss,
        f_scale=0.1,
        xtol=1e-14,
        ftol=1e-14,
    )
    ours = levenberg_marquardt(
        lambda x: x[0] * torch.exp(-x[1] * t),
        target=y,
        params=torch.tensor([1.5, 1.0]).double(),
        kernel=loss,
        f_scale=0.1,
        corrector=corrector,
        ftol=None,
        xtol=1e-12,
        max_steps=300,
    )
    assert ours.cost == pytest.approx(theirs.cost, rel=1e-9)
    np.testing.assert_allclose(ours.x.numpy(), theirs.x, rtol=1e-4)


@EACH
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 5.0))
def test_corrections_keep_gradient_and_hessian(kernel: Kernel, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    r, J = scale * rng.normal(size=(1, 3)), rng.normal(size=(3, 4))
    s = float((r**2).sum())
    _, first, second = kernel(np.array([s]))
    for second_order in (False, True):
        values, fixed, factor, along = correction(kernel, r, second_order)
        assert values[0] == pytest.approx(float(kernel(np.array([s]))[0][0]))
        moved = J if along is None else J - along[0][:, None] * (r[0] @ J)
        moved = factor[0] * moved
        np.testing.assert_allclose(moved.T @ fixed[0], first[0] * J.T @ r[0], rtol=1e-8, atol=1e-12)
        if second_order and 1 + 2 * s * second[0] / max(first[0], 1e-300) > _FLOOR:
            right = J.T @ (first[0] * np.eye(3) + 2 * second[0] * np.outer(r, r)) @ J
            np.testing.assert_allclose(moved.T @ moved, right, rtol=1e-7, atol=1e-10)


def test_a_kernel_sees_blocks_of_a_matrix_and_entries_of_a_vector() -> None:
    values = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).double()
    start = torch.zeros(1).double()
    by_rows = levenberg_marquardt(lambda x: values + 0 * x, params=start, kernel=Huber(1.0), on_failure="return")
    by_entry = levenberg_marquardt(
        lambda x: values.reshape(-1) + 0 * x, params=start, kernel=Huber(1.0), on_failure="return"
    )
    assert by_rows.cost == pytest.approx((2 * 5 - 1 + 0.25) / 2)
    assert by_entry.cost == pytest.approx((2 * 3 - 1 + 2 * 4 - 1 + 0.25) / 2)


def test_a_function_of_a_tensor_is_a_kernel_and_so_is_pyposes() -> None:
    pp = pytest.importorskip("pypose")
    y = torch.tensor([1.0, 1.1, 0.9, 8.0]).double()
    start = torch.zeros(1).double()

    def fit(kernel: object) -> float:
        return float(levenberg_marquardt(lambda x: x - y, params=start, kernel=kernel, xtol=1e-12).x)

    right = fit(Cauchy(0.5))
    assert fit(lambda s: 0.25 * torch.log1p(s / 0.25)) == pytest.approx(right, rel=1e-8)
    assert fit(pp.optim.kernel.Cauchy(0.5)) == pytest.approx(right, rel=1e-8)


def test_gauss_newton_with_huber_survives_an_outlier() -> None:
    y = torch.tensor([1.0, 1.1, 0.9, 80.0]).double()
    fit = gauss_newton(lambda x: x - y, params=torch.zeros(1).double(), kernel="huber", f_scale=0.1, max_steps=200)
    assert float(fit.x) == pytest.approx(1.05, abs=0.06)


def test_what_is_no_kernel_is_refused() -> None:
    def fit(**options: object) -> None:
        levenberg_marquardt(lambda x: x, params=torch.ones(1), **options)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="`kernel` is 'hubert', but one of"):
        fit(kernel="hubert")
    with pytest.raises(InputError, match="`f_scale` is 0, but a positive number"):
        fit(kernel="huber", f_scale=0)
    with pytest.raises(InputError, match="`delta` is -1"):
        Huber(-1)
    with pytest.raises(InputTypeError, match="`kernel` is the class Huber"):
        fit(kernel=Huber)
    with pytest.raises(InputTypeError, match="`kernel` is an int"):
        fit(kernel=3)
    with pytest.raises(InputError, match="`kernel` is falling somewhere"):
        fit(kernel=lambda s: -s)
    with pytest.raises(InputError, match="`kernel` is giving a Tensor of shape"):
        fit(kernel=lambda s: s.sum())
    with pytest.raises(InputError, match="`corrector` is 'none'"):
        fit(corrector="none")
    with pytest.raises(InputError, match="`a` is -1"):
        Tolerant(-1.0)
    with pytest.raises(InputError, match="`b` is 0"):
        Tolerant(1.0, 0.0)
