"""Least squares: success means a minimum, by an oracle of its own; a wrong stop goes on; `print` shows every step."""

import math

import numpy as np
import pytest
import torch
from synthetic_graphs import grid_graph
from torch import Tensor, nn

import jacops
from jacops.charts import SE2
from jacops.errors import InputError, InputTypeError, SolveError
from jacops.fit import LeastSquaresResult, gauss_newton, levenberg_marquardt

STRATEGIES = ["nielsen", "marquardt", "adaptive", "trust_region"]
EACH = pytest.mark.parametrize("strategy", STRATEGIES)


def fitted(strategy: str, model: object, **options: object) -> LeastSquaresResult:
    options = {"on_failure": "return", "progress": False, **options}
    if strategy == "gauss_newton":
        return gauss_newton(model, **options)  # type: ignore[arg-type]
    return levenberg_marquardt(model, strategy=strategy, **options)  # type: ignore[arg-type]


def left_to_gain(residual: object, x: Tensor) -> float:
    """What an undamped step predicts, relative to the objective: plain float64 autograd and NumPy's singular values."""
    x = x.detach().double()
    J = torch.func.jacrev(residual)(x).reshape(-1, x.numel()).numpy()  # type: ignore[arg-type]
    r = residual(x).reshape(-1).numpy()  # type: ignore[operator]
    norms = np.linalg.norm(J, axis=0)
    U, s, _ = np.linalg.svd(J / np.where(norms > 0, norms, 1), full_matrices=False)
    return float(np.sum((U[:, s > 1e-13 * s.max()].T @ r) ** 2) / (r @ r))


# ---- the two that stopped wrongly ----------------------------------------------------------------------------------


@EACH
def test_parameters_of_very_different_size_do_not_end_a_fit_early(strategy: str) -> None:
    d = torch.linspace(-65, -61, 300).double()
    true = torch.tensor([-62.905, 6.3e7, 0.013], dtype=torch.float64)

    def line(p: Tensor) -> Tensor:
        return p[1] * p[2] / ((d - p[0]) ** 2 + p[2] ** 2)

    fit = fitted(strategy, line, target=line(true), params=torch.tensor([-62.88, 6e7, 0.02], dtype=torch.float64))
    assert fit.success
    torch.testing.assert_close(fit.x, true, rtol=1e-9, atol=0)
    assert fit.cost < 1e-6


Q = math.pi / 2
LEGS = torch.tensor([[2e4, 0, 0]] + [[2e4, 0, Q]] * 4, dtype=torch.float64)
SOURCE, TARGET = torch.arange(5), torch.tensor([1, 2, 3, 4, 1])
STARTS = torch.tensor(
    [[0.5, 0, 0.2], [20000.3, 0.1, -0.2], [40001, 0.1, Q], [40000, 20000, math.pi], [21000, 20000, -Q]],
    dtype=torch.float64,
)
SIGMAS = torch.diag(torch.tensor([2e-6, 2e-6, 1e-3]).double() ** -2).repeat(5, 1, 1)


def big_map(x: Tensor) -> Tensor:
    return SE2.log(SE2.compose(SE2.inverse(LEGS), SE2.between(x[SOURCE], x[TARGET])))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"xtol": None},
        {"gtol": None, "ftol": None},
        {"strategy": "trust_region"},
        {"strategy": "trust_region", "jacobian": "sparse"},
        {"strategy": "marquardt", "jacobian": "sparse"},
        {"strategy": "adaptive", "solver": "cholesky"},
        {"jacobian": "sparse", "solver": "pcg"},
        {"strategy": "trust_region", "solver": "pcg"},
        {"damping": 1e-2},
        {"fixed": None},
        {"fixed": None, "jacobian": "sparse"},
    ],
    ids=str,
)
def test_a_map_of_long_and_exact_legs_is_closed(options: dict) -> None:
    given = {"params": {"x": STARTS}, "manifolds": {"x": SE2}, "weight": SIGMAS, "fixed": {"x": 0}, **options}
    fit = levenberg_marquardt(big_map, progress=False, **given)
    assert fit.success, fit
    assert fit.cost < 1e-6
    assert float(big_map(fit.x["x"]).abs().max()) < 1e-9


# ---- zeros where the Jacobian is singular ----------------------------------------------------------------------------

SHIFT = torch.tensor([0.3, -1.7], dtype=torch.float64)
ZEROS = {
    "square": (lambda x: x**2, [1.0, -2.0], [0.0, 0.0]),
    "square, shifted": (lambda x: (x - SHIFT) ** 2, [1.0, -2.0], SHIFT.tolist()),
    "cube, shifted": (lambda x: (x - SHIFT) ** 3, [1.0, -2.0], SHIFT.tolist()),
    "beside a regular one": (lambda x: torch.stack([(x[0] - 0.3) ** 2, 5 * x[1].exp() - 5]), [2.0, 1.0], [0.3, 0.0]),
    "from far away": (lambda x: x**2 - 1, [1e12, 3.0], [1.0, 1.0]),
}


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("strategy", ["trust_region", "gauss_newton"])
@pytest.mark.parametrize("name", ZEROS)
def test_a_zero_where_the_jacobian_vanishes_is_a_success(name: str, strategy: str, jacobian: str) -> None:
    model, start, zero = ZEROS[name]
    fit = fitted(strategy, model, params=torch.tensor(start, dtype=torch.float64), jacobian=jacobian)
    assert fit.success, fit
    torch.testing.assert_close(fit.x, torch.tensor(zero, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert len(fit.log) <= 60


@pytest.mark.parametrize("strategy", ["trust_region", "gauss_newton"])
@pytest.mark.parametrize(
    "model", [lambda x: (-x).exp(), lambda x: 1 / x, lambda x: 1 / x**2], ids=["exp(-x)", "1/x", "1/x^2"]
)
def test_an_objective_that_falls_for_ever_is_no_success(strategy: str, model: object) -> None:
    fit = fitted(strategy, model, params=torch.ones(1, dtype=torch.float64), max_steps=60)
    assert not fit.success


# ---- data of NIST's Statistical Reference Datasets, nonlinear regression, with their certified sums of squares -----

X_THURBER = [-3.067, -2.981, -2.921, -2.912, -2.840, -2.797, -2.702, -2.699, -2.633, -2.481, -2.363, -2.322, -1.501]
X_THURBER += [-1.460, -1.274, -1.212, -1.100, -1.046, -0.915, -0.714, -0.566, -0.545, -0.400, -0.309, -0.109, -0.103]
X_THURBER += [0.010, 0.119, 0.377, 0.790, 0.963, 1.006, 1.115, 1.572, 1.841, 2.047, 2.200]
Y_THURBER = [80.574, 84.248, 87.264, 87.195, 89.076, 89.608, 89.868, 90.101, 92.405, 95.854, 100.696, 101.060, 401.672]
Y_THURBER += [390.724, 567.534, 635.316, 733.054, 759.087, 894.206, 990.785, 1090.109, 1080.914, 1122.643, 1178.351]
Y_THURBER += [1260.531, 1273.514, 1288.339, 1327.543, 1353.863, 1414.509, 1425.208, 1421.384, 1442.962, 1464.350]
Y_THURBER += [1468.705, 1447.894, 1457.628]
T_LANCZOS = 0.05 * torch.arange(24).double()


def misra(b: Tensor) -> Tensor:
    x = [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0]
    y = [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78]
    return b[0] * (1 - torch.exp(-b[1] * b.new_tensor(x))) - b.new_tensor(y)


def thurber(b: Tensor) -> Tensor:
    x = b.new_tensor(X_THURBER)
    top = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return top / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3) - b.new_tensor(Y_THURBER)


def mgh09(b: Tensor) -> Tensor:
    x = b.new_tensor([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])
    y = [0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
    return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]) - b.new_tensor(y)


def mgh10(b: Tensor) -> Tensor:
    x = 5 * torch.arange(10, 26).to(b)
    y = [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]
    return b[0] * torch.exp(b[1] / (x + b[2])) - b.new_tensor(y)


def boxbod(b: Tensor) -> Tensor:
    x, y = b.new_tensor([1, 2, 3, 5, 7, 10]), b.new_tensor([109, 149, 149, 191, 213, 224])
    return b[0] * (1 - torch.exp(-b[1] * x)) - y


def rat42(b: Tensor) -> Tensor:
    x = b.new_tensor([9, 14, 21, 28, 42, 57, 63, 70, 79])
    y = b.new_tensor([8.93, 10.8, 18.59, 22.33, 39.35, 56.11, 61.73, 64.62, 67.08])
    return b[0] / (1 + torch.exp(b[1] - b[2] * x)) - y


def exponentials(b: Tensor, t: Tensor) -> Tensor:
    return b[0] * torch.exp(-b[1] * t) + b[2] * torch.exp(-b[3] * t) + b[4] * torch.exp(-b[5] * t)


L_TRUE = torch.tensor([0.0951, 1, 0.8607, 3, 1.5576, 5], dtype=torch.float64)


def lanczos(digits: int) -> object:
    """Sums of exponentials rounded to some digits, so that the residual is rounding of the data, not of the sum."""
    y = torch.round(exponentials(L_TRUE, T_LANCZOS) * 10**digits) / 10**digits
    return lambda b: exponentials(b, T_LANCZOS.to(b)) - y.to(b)


def bennett(b: Tensor) -> Tensor:
    x = torch.linspace(7.4, 16.8, 60).to(b)
    y = -2523.5 * (46.74 + x) ** (-1 / 0.9322) + 1e-4 * torch.sin(37 * x)
    return b[0] * (b[1] + x) ** (-1 / b[2]) - y


CERTIFIED = {
    "misra far": (misra, [500, 1e-4], 1.2455138894e-1),
    "thurber far": (thurber, [1000, 1000, 400, 40, 0.7, 0.3, 0.03], 5.6427082397e3),
    "thurber": (thurber, [1300, 1500, 500, 75, 1, 0.4, 0.05], 5.6427082397e3),
    "mgh09": (mgh09, [0.25, 0.39, 0.415, 0.39], 3.0750560385e-4),
    "mgh10": (mgh10, [0.02, 4000, 250], 8.7945855171e1),
    "boxbod": (boxbod, [100, 0.75], 1.1680088766e3),
    "rat42 far": (rat42, [100, 1, 0.1], 8.0565229338),
}


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("case", ["misra far", "thurber far", "mgh09", "boxbod", "rat42 far", "mgh10"])
def test_sums_of_squares_are_those_certified(case: str, jacobian: str) -> None:
    residual, start, right = CERTIFIED[case]
    for strategy in ("nielsen", "trust_region") if case != "mgh10" else ("trust_region",):
        fit = fitted(
            strategy, residual, params=torch.tensor(start, dtype=torch.float64), jacobian=jacobian, max_steps=200
        )
        assert fit.success, fit
        assert 2 * fit.cost == pytest.approx(right, rel=1e-8)
        assert left_to_gain(residual, fit.x) < 2e-8


@pytest.mark.parametrize("strategy", [*STRATEGIES, "gauss_newton"])
def test_success_is_never_without_evidence(strategy: str) -> None:
    """From starts where some runs get lost: what ends with success is a point where an undamped step gains nothing."""
    starts = [(mgh09, [25, 39, 41.5, 39]), (boxbod, [1, 1]), (mgh10, [2, 4e5, 25e3]), (thurber, [100] * 4 + [1] * 3)]
    starts += [(bennett, [-2000, 50, 0.8]), (rat42, [100, 1, 0.1]), (misra, [1.0, 1.0])]
    for residual, start in starts:
        fit = fitted(strategy, residual, params=torch.tensor(start, dtype=torch.float64), max_steps=30)
        if fit.success:
            assert left_to_gain(residual, fit.x) < 2e-8, fit
        else:
            assert fit.status in ("max_steps", "stalled", "singular", "diverged")


@pytest.mark.parametrize("strategy", ["nielsen", "trust_region"])
@pytest.mark.parametrize("digits", [16, 13, 5])
def test_exponentials_are_distinguished_as_far_as_their_digits_go(strategy: str, digits: int) -> None:
    start = torch.tensor([0.5, 0.7, 3.6, 4.2, 4, 6.3]).double()
    fit = fitted(strategy, lanczos(digits), params=start, max_steps=300)
    assert fit.success, fit
    assert fit.cost <= float((lanczos(digits)(L_TRUE) ** 2).sum()) / 2 + 1e-25  # type: ignore[operator]
    if digits == 5:
        assert left_to_gain(lanczos(digits), fit.x) < 2e-8


@pytest.mark.parametrize("case", ["misra far", "thurber", "mgh09", "boxbod", "rat42 far"])
def test_single_precision_ends_at_the_minimum_too(case: str) -> None:
    residual, start, right = CERTIFIED[case]
    for strategy in (*STRATEGIES, "gauss_newton"):
        if strategy == "gauss_newton" and case in ("mgh09", "rat42 far"):
            continue  # whole steps lead away from their minima
        fit = fitted(strategy, residual, params=torch.tensor(start, dtype=torch.float32), max_steps=200)
        assert fit.success, (strategy, fit)
        assert 2 * fit.cost == pytest.approx(right, rel=1e-3)


# ---- scales --------------------------------------------------------------------------------------------------------

T = torch.linspace(0, 2, 20).double()
NOISY = 3 * torch.exp(-1.5 * T) + 0.01 * torch.sin(9 * T)


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("units", [(1e12, 1e-12), (1e-12, 1e12), (1e8, 1e12)], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "gauss_newton"])
def test_units_of_parameters_change_nothing(strategy: str, units: tuple[float, float], jacobian: str) -> None:
    a, b = units

    def model(x: Tensor) -> Tensor:
        return x[0] / a * torch.exp(-x[1] / b * T)

    plain = fitted(
        strategy, lambda x: x[0] * torch.exp(-x[1] * T), target=NOISY, params=torch.tensor([2.0, 1.0]).double()
    )
    fit = fitted(strategy, model, target=NOISY, params=torch.tensor([2 * a, b], dtype=torch.float64), jacobian=jacobian)
    assert fit.success
    assert len(fit.log) == len(plain.log)
    torch.testing.assert_close(fit.x / torch.tensor(units, dtype=torch.float64), plain.x, rtol=1e-7, atol=0)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "gauss_newton"])
def test_rounding_of_large_residuals_hides_no_small_one(strategy: str) -> None:
    fit = fitted(
        strategy, lambda x: torch.stack([1e18 * (x[0] - 1), x[1] ** 2 - 2]), params=torch.tensor([1.0, 5.0]).double()
    )
    assert fit.success
    assert float(fit.x[1]) == pytest.approx(2**0.5, rel=1e-12)


@pytest.mark.parametrize("strategy", ["nielsen", "trust_region"])
def test_columns_whose_squares_underflow_are_seen(strategy: str) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x[0] * 1e-200 - 2, x[1] - 1, x[0] * 1e-200 + x[1]])

    fit = fitted(strategy, model, params=torch.tensor([1e200, 0.5], dtype=torch.float64))
    if fit.success:
        assert left_to_gain(model, fit.x) < 2e-8


def test_a_scale_is_the_same_as_another_unit() -> None:
    scale = torch.tensor([7.0, 0.03]).double()
    y, start = NOISY, torch.tensor([2.0, 1.0]).double()
    for strategy in STRATEGIES:
        scaled = fitted(strategy, lambda x: x[0] * torch.exp(-x[1] * T), target=y, params=start, x_scale=scale)
        other = fitted(
            strategy,
            lambda u: scale[0] * u[0] * torch.exp(-scale[1] * u[1] * T),
            target=y,
            params=start / scale,
            x_scale=1.0,
        )
        torch.testing.assert_close(scaled.x, other.x * scale, rtol=1e-9, atol=0)
        assert [r.objective for r in scaled.log] == pytest.approx([r.objective for r in other.log], rel=1e-9)
        assert scaled.success


def test_scales_come_in_the_form_of_the_parameters() -> None:
    def model(a: Tensor, b: Tensor) -> Tensor:
        return a * torch.exp(-b * T)

    start = [torch.tensor(2.0).double(), torch.tensor(1.0).double()]
    right = levenberg_marquardt(model, params=start, target=NOISY).x
    for scale in (1.0, [1.0, 0.1], [torch.tensor(3.0), torch.tensor(0.5)], {0: 1.0, "x[1]": 2.0}):
        fit = levenberg_marquardt(model, params=start, target=NOISY, x_scale=scale)
        torch.testing.assert_close(fit.x, right, rtol=1e-6, atol=0)
    graph = grid_graph(3, 3)
    options = {"manifolds": {"poses": SE2}, "weight": graph.information, "fixed": {"poses": 0}}
    right = levenberg_marquardt(graph.residual(), **options).cost
    widths = torch.tensor([1.0, 1.0, 0.1]).double().expand(9, 3)
    fit = levenberg_marquardt(graph.residual(), x_scale={"poses": widths}, **options)
    assert fit.cost == pytest.approx(right, rel=1e-8)


@pytest.mark.parametrize(
    ("x_scale", "error", "message"),
    [
        ("column", InputError, "`x_scale` is 'column'"),
        (0.0, InputError, "not positive for 'x'"),
        (torch.tensor([1.0, -1.0]), InputError, "not positive for 'x'"),
        (torch.ones(3), InputError, r"of shape \(3,\) for 'x'"),
        ({"y": 1.0}, InputError, "`x_scale` is naming 'y'"),
        ({}, InputError, r"for \['x'\] too"),
        (object(), InputTypeError, "`x_scale` is an object for 'x'"),
        (True, InputTypeError, "`x_scale` is a bool"),
    ],
    ids=["word", "zero", "negative", "shape", "name", "none", "object", "flag"],
)
def test_bad_scales_are_refused_by_name(x_scale: object, error: type, message: str) -> None:
    for call in (gauss_newton, levenberg_marquardt):
        with pytest.raises(error, match=message):
            call(lambda x: x - 1, params=torch.zeros(2).double(), x_scale=x_scale)


# ---- no minimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*STRATEGIES, "constant", "gauss_newton"])
@pytest.mark.parametrize("start", [30.0, 300.0, 1e3, 1e5])
def test_a_plateau_is_no_success(strategy: str, start: float) -> None:
    t = T[1:]
    target = torch.exp(-1.5 * t)
    fit = fitted(
        strategy, lambda x: torch.exp(-x * t), target=target, params=torch.tensor([start]).double(), max_steps=60
    )
    assert fit.success == (abs(float(fit.x) - 1.5) < 1e-6), fit


def test_a_jacobian_of_zeros_is_no_evidence() -> None:
    with pytest.raises(SolveError, match="the Jacobian is zero: no parameter changes a residual") as caught:
        levenberg_marquardt(lambda x: 1.0 + 0 * x, params=torch.ones(2).double())
    assert not caught.value.solution.success  # type: ignore[attr-defined]
    assert levenberg_marquardt(lambda x: 0 * x, params=torch.ones(2).double()).success


def test_few_steps_and_few_passes_are_no_success() -> None:
    start = torch.tensor([2.0, 1.0]).double()
    for limit in ({"max_steps": 2}, {"max_nfev": 5}):
        fit = fitted("nielsen", lambda x: x[0] * torch.exp(-x[1] * T), target=NOISY, params=start, **limit)
        assert not fit.success
        assert fit.status in limit
        assert fit.certificate == ""


@EACH
def test_a_looser_rule_of_the_callers_stops_and_claims_nothing(strategy: str) -> None:
    fit = levenberg_marquardt(
        lambda x: x[0] * torch.exp(-x[1] * T),
        target=NOISY,
        params=torch.tensor([9.0, 5.0]).double(),
        strategy=strategy,
        ftol=0.3,
    )
    assert fit.status == "objective"
    assert "ftol=0.3" in fit.message
    assert fit.success == (left_to_gain(lambda x: x[0] * torch.exp(-x[1] * T) - NOISY, fit.x) <= 1e-8)
    assert fit.predicted <= 0.3


# ---- kernels and rank ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["huber", "cauchy", "soft_l1", "arctan"])
@pytest.mark.parametrize("strategy", ["nielsen", "trust_region", "gauss_newton"])
def test_robust_fits_end_where_the_reweighted_problem_gains_nothing(strategy: str, kernel: str) -> None:
    y = NOISY + 0.5 * (torch.arange(20) % 6 == 2)
    fit = fitted(
        strategy,
        lambda x: x[0] * torch.exp(-x[1] * T),
        target=y,
        params=torch.tensor([2.5, 1.2]).double(),
        kernel=kernel,
        f_scale=0.1,
        max_steps=300,
    )
    assert fit.success, fit
    x = fit.x.clone().requires_grad_()
    s = ((x[0] * torch.exp(-x[1] * T) - y) / 0.1) ** 2
    rho = {
        "huber": torch.where(s > 1, 2 * s.clamp(min=1e-30).sqrt() - 1, s),
        "cauchy": torch.log1p(s),
        "soft_l1": 2 * ((1 + s).sqrt() - 1),
        "arctan": torch.atan(s),
    }[kernel]
    (slope,) = torch.autograd.grad(rho.sum(), s, retain_graph=True)
    root = slope.detach().sqrt() / 0.1

    def reweighted(x: Tensor) -> Tensor:
        return root * (x[0] * torch.exp(-x[1] * T) - y)

    share = float(reweighted(x.detach()).square().sum() / rho.sum().detach())
    assert left_to_gain(reweighted, fit.x) * share < 2e-6  # a kernel's second derivative makes other steps


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@EACH
def test_free_directions_neither_stop_nor_keep_a_fit(strategy: str, dtype: torch.dtype, jacobian: str) -> None:
    graph = grid_graph(3, 3, noise=0.05)
    options = {"manifolds": {"poses": SE2}, "weight": graph.information.to(dtype)}
    right = levenberg_marquardt(graph.residual(), fixed={"poses": 0}, **options).cost
    fit = fitted(strategy, graph.residual().to(dtype), jacobian=jacobian, **options)
    assert fit.success, fit
    assert fit.cost == pytest.approx(right, rel=1e-8 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "gauss_newton"])
def test_fewer_residuals_than_parameters_are_met_exactly(strategy: str, dtype: torch.dtype) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x.sum() - 1, x[0] - x[1] + x[2] ** 2 - 0.1])

    fit = fitted(strategy, model, params=torch.linspace(-1, 2, 6).to(dtype))
    assert fit.success, fit
    assert float(model(fit.x).abs().max()) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("call", [gauss_newton, levenberg_marquardt])
def test_a_sparse_problem_of_some_size_is_taken_as_one(call: object) -> None:
    graph = grid_graph(14, 14, noise=0.05)
    options = {"manifolds": {"poses": SE2}, "weight": graph.information, "progress": False}
    fixed = call(graph.residual(), fixed={"poses": 0}, **options)  # type: ignore[operator]
    assert fixed.route.startswith("sparse")
    free = call(graph.residual(), **options)  # type: ignore[operator]
    assert free.success
    assert free.cost == pytest.approx(fixed.cost, rel=1e-8)


def test_a_full_problem_of_some_size_is_taken_densely() -> None:
    net = nn.Sequential(nn.Linear(3, 100), nn.Tanh(), nn.Linear(100, 1)).double()
    x = torch.linspace(-1, 1, 1800).double().reshape(600, 3)
    full = levenberg_marquardt(net, x, x.sum(1, keepdim=True), max_steps=1, on_failure="return", progress=False)
    assert full.route.startswith("dense")


def test_a_minimum_to_start_from_is_seen_at_once() -> None:
    start = levenberg_marquardt(lambda x: x[0] * torch.exp(-x[1] * T), target=NOISY, params=torch.ones(2).double()).x
    for strategy in (*STRATEGIES, "gauss_newton"):
        fit = fitted(strategy, lambda x: x[0] * torch.exp(-x[1] * T), target=NOISY, params=start)
        assert fit.success
        assert len(fit.log) <= 2


# ---- printing ------------------------------------------------------------------------------------------------------


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5).double())
        self.scale = nn.Parameter(torch.tensor(1.0).double())

    def forward(self, t: Tensor) -> Tensor:
        return self.scale * torch.exp(-self.rate * t)


def test_print_shows_parameters_and_every_step() -> None:
    fit = jacops.levenberg_marquardt(Decay(), T, target=3 * torch.exp(-1.5 * T))
    lines = str(fit).splitlines()
    reason, note = fit.message.split("; ")
    assert lines[:2] == [f"LeastSquaresResult({fit.status}: {reason})", f"  note: {note}"]
    assert sum("radius" in line for line in lines) == len(fit.log) > 0
    for record in fit.log:
        (line,) = [line for line in lines if line.startswith(f"  {record.step:4d}  ")]
        assert f"{record.objective:.6e}" in line
        assert all(word in line for word in ("reduction", "predicted", "step"))
    assert any(line.split() == ["rate", "=", "1.5"] for line in lines)
    assert any(line.split() == ["scale", "=", "3"] for line in lines)
    assert "success True" in str(fit)
    assert repr(fit) in str(fit)
    assert len(repr(fit).splitlines()) <= 5


def test_print_names_radius_rejection_and_failure() -> None:
    fit = fitted("trust_region", lambda x: torch.atan(x), params=torch.tensor([5.0]).double())
    assert sum("radius" in line for line in str(fit).splitlines()) == len(fit.log)
    assert sum("rejected" in line for line in str(fit).splitlines()) == sum(not r.accepted for r in fit.log) > 0
    whole = fitted("gauss_newton", lambda x: x**2 - 2, params=[torch.ones(2).double()], max_steps=1)
    assert "success False" in str(whole)
    assert "x[0] = [1.5, 1.5]" in str(whole)
    assert "damping" not in str(whole)


def test_print_of_a_long_run_says_how_much_it_leaves_out() -> None:
    for steps, shown in ((100, 100), (130, 90)):
        fit = fitted("constant", lambda x: x - 1, params=torch.zeros(2).double(), damping=100.0, max_steps=steps)
        assert len(fit.log) == steps
        assert sum("damping" in line for line in str(fit).splitlines()) == shown
        assert ("... 40 steps not shown" in str(fit)) == (steps == 130)


def test_many_values_are_shortened() -> None:
    fit = gauss_newton(lambda x: x - torch.arange(60.0).double().reshape(6, 10), params=torch.zeros(6, 10).double())
    (line,) = [line for line in str(fit).splitlines() if line.startswith("  x")]
    assert "shape (6, 10)" in line
    assert "..." in line
    assert "57, 58, 59" in line
    assert len(line) < 120
