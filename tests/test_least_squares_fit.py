"""Gauss-Newton and Levenberg-Marquardt: the same answers as SciPy, one linearisation, nothing of the caller's moved."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, least_squares
from torch import Tensor, nn

import jacops
from jacops.errors import (
    InputError,
    InputTypeError,
    JacopsError,
    ModelStateError,
    NonFiniteError,
    NotDifferentiableError,
    SolveError,
)
from jacops.fit import Nielsen, gauss_newton, levenberg_marquardt

BOTH = pytest.mark.parametrize("solve", [gauss_newton, levenberg_marquardt])
T = torch.linspace(0, 2, 30).double()


def decay(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T)


def noisy() -> Tensor:
    return 3 * torch.exp(-1.5 * T) + 0.05 * torch.randn(30).double()


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0).double())
        self.scale = nn.Parameter(torch.tensor(2.0).double())

    def forward(self, t: Tensor) -> Tensor:
        return self.scale * torch.exp(-self.rate * t)


# ---- the same answers as others ------------------------------------------------------------------------------------


@BOTH
def test_the_optimum_is_that_of_scipy(solve: object) -> None:
    y = noisy()
    theirs = least_squares(
        lambda x: decay(torch.from_numpy(x)).numpy() - y.numpy(), [2.0, 1.0], xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    ours = solve(decay, target=y, params=torch.tensor([2.0, 1.0]).double())  # type: ignore[operator]
    np.testing.assert_allclose(ours.x.numpy(), theirs.x, rtol=1e-7)
    assert ours.cost == pytest.approx(theirs.cost, rel=1e-12)
    np.testing.assert_allclose(ours.fun.numpy(), theirs.fun, atol=1e-7)
    np.testing.assert_allclose(ours.jac, theirs.jac, atol=1e-5)
    assert np.abs(ours.grad).max() < 1e-6
    assert ours.success


def test_covariance_is_that_of_curve_fit() -> None:
    y, sigma = noisy(), 0.05

    def model(t: np.ndarray, a: float, b: float) -> np.ndarray:
        return a * np.exp(-b * t)

    _, relative = curve_fit(model, T.numpy(), y.numpy(), [2.0, 1.0])
    _, absolute = curve_fit(model, T.numpy(), y.numpy(), [2.0, 1.0], sigma=np.full(30, sigma), absolute_sigma=True)
    fit = levenberg_marquardt(decay, target=y, params=torch.tensor([2.0, 1.0]).double())
    np.testing.assert_allclose(fit.covariance(), relative, rtol=1e-4)
    weighted = levenberg_marquardt(decay, target=y, params=torch.tensor([2.0, 1.0]).double(), weight=sigma**-2)
    np.testing.assert_allclose(weighted.covariance(absolute=True), absolute, rtol=1e-4)
    np.testing.assert_allclose(weighted.covariance([1], absolute=True), absolute[1:, 1:], rtol=1e-4)
    sparse = levenberg_marquardt(decay, target=y, params=torch.tensor([2.0, 1.0]).double(), jacobian="sparse")
    np.testing.assert_allclose(sparse.covariance(), relative, rtol=1e-4)
    with pytest.raises(InputError, match="`columns`"):
        fit.covariance([2])


def test_a_covariance_that_does_not_exist_is_refused() -> None:
    fit = levenberg_marquardt(
        lambda x: torch.stack([x[0] + x[1], 2 * (x[0] + x[1]) - 1, x[0] + x[1]]), params=torch.ones(2).double()
    )
    with pytest.raises(SolveError, match="no full rank"):
        fit.covariance()
    with pytest.raises(InputError, match="of 2 residuals for 2 columns"):
        levenberg_marquardt(lambda x: x - 1, params=torch.zeros(2).double()).covariance()


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_weights_in_every_form_agree_with_doing_it_by_hand(jacobian: str) -> None:
    A = torch.randn(5, 3, 3).double()
    y = torch.randn(5, 3).double()
    M = torch.randn(5, 3, 3).double()
    W = M.mT @ M + 0.1 * torch.eye(3).double()
    forms: list[tuple[dict[str, object], Tensor]] = [
        ({"weight": 4.0}, 2 * torch.eye(3).double().expand(5, 3, 3)),
        (
            {"weight": torch.arange(1.0, 6).double()},
            torch.arange(1.0, 6).double().sqrt()[:, None, None] * torch.eye(3).double(),
        ),
        ({"weight": W[0].unsqueeze(0)}, torch.linalg.cholesky(W[0]).mT.expand(5, 3, 3)),
        ({"weight": W[:, :, 0] ** 2}, torch.diag_embed(W[:, :, 0].abs())),
        ({"weight": W[0]}, torch.linalg.cholesky(W[0]).mT.expand(5, 3, 3)),
        ({"weight": W}, torch.linalg.cholesky(W).mT),
        ({"sqrt_weight": M}, M),
        ({"sqrt_weight": M[:, :, 0]}, torch.diag_embed(M[:, :, 0])),
    ]
    for options, root in forms:
        rows, right = (root @ A).reshape(15, 3), (root @ y.unsqueeze(-1)).reshape(15)
        best = torch.linalg.lstsq(rows, right.unsqueeze(-1)).solution[:, 0]
        fit = gauss_newton(lambda x: A @ x, target=y, params=torch.zeros(3).double(), jacobian=jacobian, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(fit.x, best, rtol=1e-9, atol=1e-9)
        assert fit.cost == pytest.approx(float(((rows @ best - right) ** 2).sum()) / 2)
        robust = gauss_newton(
            lambda x: A @ x,
            target=y,
            params=torch.zeros(3).double(),
            jacobian=jacobian,
            kernel="cauchy",
            f_scale=1e6,
            **options,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(robust.x, best, rtol=1e-6, atol=1e-6)


def test_one_matrix_over_a_vector_is_generalised_least_squares() -> None:
    A, y, M = torch.randn(6, 2).double(), torch.randn(6).double(), torch.randn(6, 6).double()
    W = M.mT @ M
    best = torch.linalg.solve(A.mT @ W @ A, A.mT @ W @ y)
    for jacobian in ("dense", "sparse"):
        for extra in ({}, {"kernel": "soft_l1", "f_scale": 1e7}):
            fit = gauss_newton(
                lambda x: A @ x, target=y, params=torch.zeros(2).double(), weight=W, jacobian=jacobian, **extra
            )  # type: ignore[arg-type]
            torch.testing.assert_close(fit.x, best, rtol=1e-5, atol=1e-5)


def test_information_may_vanish_in_a_direction_but_not_be_negative() -> None:
    W = torch.diag(torch.tensor([1.0, 0.0])).double()
    fit = levenberg_marquardt(
        lambda x: x.expand(4, 2) * 1.0, target=torch.ones(4, 2).double(), params=torch.zeros(2).double(), weight=W
    )
    assert fit.x[0] == pytest.approx(1.0)
    assert fit.x[1] == 0
    with pytest.raises(InputError, match="eigenvalue -1 in block 0"):
        levenberg_marquardt(lambda x: x.expand(4, 2) * 1.0, params=torch.zeros(2).double(), weight=-W)
    with pytest.raises(InputError, match="not symmetric"):
        levenberg_marquardt(
            lambda x: x.expand(4, 2) * 1.0, params=torch.zeros(2).double(), weight=W + torch.tensor([[0, 1.0], [0, 0]])
        )


def test_a_weight_that_could_mean_two_things_is_refused() -> None:
    start = torch.zeros(3).double()
    with pytest.raises(InputError, match=r"per entry or one matrix.*\(1, 3, 3\).*diag_embed"):
        levenberg_marquardt(lambda x: x.expand(3, 3) - 1, params=start, weight=torch.eye(3).double())
    levenberg_marquardt(lambda x: x.expand(3, 3) - 1, params=start, weight=torch.eye(3).double().unsqueeze(0))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 8),
    columns=st.integers(1, 6),
    strategy=st.sampled_from(["nielsen", "marquardt", "adaptive", "trust_region"]),
    kernel=st.sampled_from([None, "huber", "cauchy"]),
)
def test_no_fit_ends_above_its_start(seed: int, rows: int, columns: int, strategy: str, kernel: str | None) -> None:
    torch.manual_seed(seed)
    A, B = torch.randn(rows, columns).double(), torch.randn(rows, columns).double()
    fit = levenberg_marquardt(
        lambda x: torch.sin(A @ x) + (B @ x) ** 2 - 1,
        params=torch.randn(columns).double(),
        strategy=strategy,
        kernel=kernel,
        max_steps=60,
        on_failure="return",
    )
    costs = [r.objective for r in fit.log] + [fit.cost]
    rounding = 1e-28  # of residuals that are zero but for rounding, squared: found with seed 264
    assert all(after <= max(before, rounding) for before, after in zip(costs[:-1], costs[1:], strict=True))
    assert np.isfinite(fit.cost)
    s = np.square(fit.fun.numpy())
    if kernel is None:
        assert fit.cost == pytest.approx(s.sum() / 2, rel=1e-12, abs=1e-300)


def test_threads_may_share_a_model() -> None:
    model, y = Decay(), noisy()
    right = levenberg_marquardt(model, T, y, inplace=False)
    with ThreadPoolExecutor(4) as pool:
        fits = list(pool.map(lambda _: levenberg_marquardt(model, T, y, inplace=False), range(8)))
    assert all(torch.equal(f.x["rate"], right.x["rate"]) for f in fits)


# ---- several outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_trees_of_outputs_with_their_own_targets_weights_and_kernels(jacobian: str) -> None:
    def parts(x: Tensor) -> dict[str, Tensor]:
        return {"a": x[:2] * 2, "b": (x[1:] ** 2).reshape(1, 2)}

    together = levenberg_marquardt(
        parts,
        target={"a": torch.ones(2).double(), "b": torch.full((1, 2), 2.0).double()},
        weight={"a": 3.0, "b": torch.eye(2).double()},
        kernel={"a": None, "b": "huber"},
        params=torch.ones(3).double(),
        jacobian=jacobian,
        max_steps=300,
    )
    at = together.x
    cost = 1.5 * float(((2 * at[:2] - 1) ** 2).sum())
    s = float(((at[1:] ** 2 - 2) ** 2).sum())
    assert together.cost == pytest.approx(cost + (s if s < 1 else 2 * s**0.5 - 1) / 2)
    assert together.fun.shape == (4,)
    as_tuple = levenberg_marquardt(
        lambda x: (x[:1] - 1, x[1:] - 2), target=(None, torch.ones(1).double()), params=torch.zeros(2).double()
    )
    torch.testing.assert_close(as_tuple.x, torch.tensor([1.0, 3.0]).double())


# ---- one linearisation (P8) ----------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A linear model behind dropout and batch statistics, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(self.drop(self.norm(x)))


def test_residual_and_jacobian_come_from_one_mask() -> None:
    model, x, y = Noisy().double(), torch.randn(40, 6).double(), torch.randn(40, 2).double()
    buffers = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num" in k}
    state = torch.get_rng_state()
    fit = gauss_newton(model, x, y)
    assert fit.njev == 2  # linear in its parameters: one step, as only one mask for all runs gives
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in buffers.items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.calls == 0
    # The model's own next forward draws the very mask of the fit.
    residual = (model(x) - y).reshape(-1)
    torch.testing.assert_close(residual.detach(), fit.fun, rtol=0, atol=1e-9)
    J = torch.from_numpy(fit.jac)
    assert float((J.T @ fit.fun).abs().max()) < 1e-8


# ---- the caller's things -------------------------------------------------------------------------------------------


def test_parameters_are_written_only_when_the_call_returns() -> None:
    y = noisy()
    model = Decay()
    before = [p.detach().clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    levenberg_marquardt(model, T, y, inplace=False)
    with pytest.raises(SolveError) as caught:
        levenberg_marquardt(model, T, y, max_steps=1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert versions == [p._version for p in model.parameters()]
    partial = caught.value.solution
    assert partial.status == "max_steps"  # type: ignore[attr-defined]
    assert partial.cost < partial.log[0].objective  # type: ignore[attr-defined]
    returned = levenberg_marquardt(model, T, y, max_steps=1, on_failure="return")
    assert not returned.success
    assert torch.equal(model.rate, returned.x["rate"])
    fit = levenberg_marquardt(model, T, y)
    assert torch.equal(model.rate, fit.x["rate"])
    assert model.rate.requires_grad
    assert model.rate.grad is None
    assert not fit.x["rate"].requires_grad


def test_tensors_are_written_only_on_request() -> None:
    start = torch.tensor([2.0, 1.0]).double()
    fit = gauss_newton(decay, target=noisy(), params=start)
    assert start.tolist() == [2.0, 1.0]
    again = gauss_newton(decay, target=noisy(), params=start, inplace=True)
    assert torch.equal(start, again.x)
    assert not torch.equal(fit.x, torch.tensor([2.0, 1.0]).double())


def test_params_come_back_in_their_own_form() -> None:
    one, two = torch.zeros(2).double(), torch.zeros(()).double()
    pair = gauss_newton(
        lambda a, b, c: torch.cat([a - c, (b + 2).reshape(1)]), torch.ones(2).double(), params=[one, two]
    )
    assert isinstance(pair.x, list)
    torch.testing.assert_close(pair.x[0], torch.ones(2).double())
    named = gauss_newton(lambda *, a, b: torch.cat([a - 1, (b + 2).reshape(1)]), params={"a": one, "b": two})
    assert set(named.x) == {"a", "b"}
    assert float(named.x["b"]) == pytest.approx(-2)


def test_frozen_parameters_stay() -> None:
    model = Decay()
    model.rate.requires_grad_(False)
    fit = gauss_newton(model, T, noisy())
    assert list(fit.x) == ["scale"]
    assert float(model.rate.detach()) == 1.0


def test_an_exception_inside_the_model_leaves_all_as_it_was() -> None:
    class Failing(Decay):
        def forward(self, t: Tensor) -> Tensor:
            if float(self.scale.detach()) != 2.0:
                raise RuntimeError("on purpose")
            return super().forward(t)

    model = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        levenberg_marquardt(model, T, noisy())
    assert float(model.scale.detach()) == 2.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_of_the_caller_do_not_matter(mode: type) -> None:
    y = noisy()
    right = levenberg_marquardt(decay, target=y, params=torch.tensor([2.0, 1.0]).double()).x
    with mode():
        start = torch.tensor([2.0, 1.0]).double()
        found = levenberg_marquardt(decay, target=y, params=start, inplace=True)
    torch.testing.assert_close(found.x, right)
    torch.testing.assert_close(start.clone(), right)


def test_single_precision_ends_where_its_rounding_begins() -> None:
    y = noisy().float()
    fit = levenberg_marquardt(lambda x: x[0] * torch.exp(-x[1] * T.float()), target=y, params=torch.tensor([2.0, 1.0]))
    right = levenberg_marquardt(decay, target=y.double(), params=torch.tensor([2.0, 1.0]).double())
    torch.testing.assert_close(fit.x.double(), right.x, rtol=1e-3, atol=1e-3)
    assert fit.x.dtype == torch.float32


# ---- stopping and telling ------------------------------------------------------------------------------------------


def test_every_rule_stops_and_says_so() -> None:
    y, start = noisy(), torch.tensor([2.0, 1.0]).double()
    none = {"ftol": None, "xtol": None, "gtol": None}
    for rule, status in (("ftol", "objective"), ("xtol", "step"), ("gtol", "gradient")):
        fit = levenberg_marquardt(decay, target=y, params=start, **{**none, rule: 1e-4})  # type: ignore[arg-type]
        assert fit.status == status
        assert rule in fit.message
    fit = levenberg_marquardt(decay, target=y, params=start, **none)  # type: ignore[arg-type]
    assert "rounding" in fit.message
    few = levenberg_marquardt(decay, target=y, params=start, max_nfev=4, on_failure="return")
    assert few.status == "max_nfev"
    exact = levenberg_marquardt(decay, target=decay(torch.tensor([3.0, 1.5])), params=start, **none)  # type: ignore[arg-type]
    assert exact.success
    assert exact.cost < 1e-25
    assert levenberg_marquardt(lambda x: x - 1, params=torch.ones(1)).log == []


def test_the_log_and_the_repr_show_the_fit() -> None:
    fit = levenberg_marquardt(decay, target=noisy(), params=torch.tensor([2.0, 1.0]).double())
    assert [r.step for r in fit.log] == list(range(1, len(fit.log) + 1))
    assert fit.log[-1].tried >= fit.cost
    for before, after in zip(fit.log[:-1], fit.log[1:], strict=True):
        assert after.objective == (before.tried if before.accepted else before.objective)
    assert fit.nfev >= fit.njev == 1 + sum(r.accepted for r in fit.log)
    text = repr(fit)
    assert fit.status in text
    assert "30 x 2 is small" in text
    assert "gradient" in repr(fit.log[0])


def test_gauss_newton_that_runs_away_is_stopped() -> None:
    with pytest.raises(SolveError, match="use levenberg_marquardt, which damps steps"):
        gauss_newton(torch.atan, params=torch.tensor([3.0]).double())
    fit = levenberg_marquardt(torch.atan, params=torch.tensor([3.0]).double())
    assert abs(float(fit.x)) < 1e-6


def test_a_step_into_nan_is_rejected() -> None:
    fit = levenberg_marquardt(lambda x: torch.log(x), params=torch.tensor([5.0]).double(), damping=1e-12)
    assert not fit.log[0].accepted
    assert float(fit.x) == pytest.approx(1.0)


def test_results_are_the_same_every_time() -> None:
    y = noisy()
    one, two = (levenberg_marquardt(decay, target=y, params=torch.tensor([2.0, 1.0]).double()) for _ in range(2))
    assert torch.equal(one.x, two.x)


# ---- what does not fit ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": torch.zeros(1).double()}, InputError, "`target` is of shape .*Nothing is broadcast"),
        ({"target": torch.zeros(2)}, InputError, r"`target` is of dtype .*Call `.to\(torch.float64\)`"),
        ({"target": [0.0, 0.0]}, InputTypeError, "`target` is a list"),
        ({"target": torch.full((2,), torch.nan).double()}, NonFiniteError, "`target` is holding NaN"),
        ({"weight": torch.ones(3)}, InputError, r"`weight` is of shape \(3,\), but one of these is needed"),
        ({"weight": -1.0}, InputError, "`weight` is negative"),
        ({"weight": "1"}, InputTypeError, "`weight` is a str"),
        ({"weight": 1.0, "sqrt_weight": 1.0}, InputError, "not both"),
        ({"fixed": [0, 1]}, InputError, "`fixed` is everything"),
        ({"fixed": 7}, InputError, "`fixed` is 7 for 'x'"),
        ({"fixed": {"y": 0}}, InputError, "`fixed` is naming 'y'"),
        ({"manifolds": {"x": "SE3"}}, InputTypeError, "`manifolds` is 'SE3' for 'x'"),
        ({"jacobian": "diagonal"}, InputError, "`jacobian` is 'diagonal'"),
        ({"ftol": -1}, InputError, "`ftol` is -1"),
        ({"gtol": "1"}, InputTypeError, "`gtol` is a str"),
        ({"max_steps": 0}, InputError, "`max_steps` is 0"),
        ({"max_nfev": True}, InputError, "`max_nfev` is True"),
        ({"on_failure": "ignore"}, InputError, "`on_failure` is 'ignore'"),
        ({"params": None}, InputTypeError, "`params` is None"),
        ({"params": []}, InputError, "`params` is empty"),
        ({"params": [1.0]}, InputTypeError, r"`params\[0\]` is a float"),
        ({"params": torch.ones(2, dtype=torch.int64)}, InputTypeError, "`params` is of dtype torch.int64"),
        ({"params": torch.ones(2, dtype=torch.complex64)}, InputTypeError, "real floating-point"),
        ({"params": torch.tensor([1.0, torch.inf]).double()}, NonFiniteError, r"at the start, in the parameter x"),
    ],
)
def test_bad_arguments_are_refused_by_name(solve: object, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        solve(lambda x: x * 1.0, **{"params": torch.ones(2).double(), **options})  # type: ignore[operator]
    assert isinstance(caught.value, JacopsError)


def test_bad_models_are_refused_by_name() -> None:
    with pytest.raises(InputTypeError, match="`model` is a float"):
        gauss_newton(1.0, params=torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="Did you mean Decay"):
        gauss_newton(Decay, T, noisy())
    with pytest.raises(InputError, match="`params` is given"):
        gauss_newton(Decay(), T, noisy(), params=torch.ones(1))
    with pytest.raises(ModelStateError, match="without parameters that require grad"):
        gauss_newton(nn.ReLU(), T)
    with pytest.raises(InputTypeError, match="`output` is a float"):
        gauss_newton(lambda x: float(x.sum()), params=torch.ones(1))
    with pytest.raises(NotDifferentiableError, match="output"):
        gauss_newton(lambda x: x.long(), params=torch.ones(1))
    with pytest.raises(NotDifferentiableError, match="complex"):
        gauss_newton(lambda x: x * 1j, params=torch.ones(1))
    with pytest.raises(InputError, match="the residual` is empty"):
        gauss_newton(lambda x: x[:0], params=torch.ones(1))
    with pytest.raises(NonFiniteError, match="Jacobian of output by x"):
        gauss_newton(lambda x: x.sqrt(), params=torch.zeros(2).double())
    with pytest.raises(InputTypeError, match="one entry per output"):
        gauss_newton(lambda x: (x, x), params=torch.ones(1), target=torch.ones(1))
    with pytest.raises(InputError, match="one entry per output"):
        gauss_newton(lambda x: {"a": x, "b": x}, params=torch.ones(1), weight={"a": 1.0, "c": 1.0})


def test_a_strategy_object_can_be_reused() -> None:
    recipe = Nielsen(1e-2)
    for _ in range(2):
        fit = levenberg_marquardt(decay, target=noisy(), params=torch.tensor([2.0, 1.0]).double(), strategy=recipe)
        assert fit.log[0].damping == 1e-2
    assert jacops.fit.Nielsen is Nielsen


@pytest.mark.parametrize("name", ["weight", "sqrt_weight"])
def test_a_weight_that_is_a_python_number_is_not_rounded(name: str) -> None:
    t = torch.linspace(0, 1, 5).double()
    found = [
        jacops.levenberg_marquardt(lambda p: p[0] + p[1] * t, target=t**2, params=torch.ones(2).double(), **{name: w})
        for w in (1 / 0.15**2, torch.tensor(1 / 0.15**2, dtype=torch.float64))
    ]
    assert found[0].jac[0, 0] == found[1].jac[0, 0]
