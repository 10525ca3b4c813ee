"""Options of least squares that users know from elsewhere: bounds, fixed parameters, priors, callbacks and limits."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, least_squares, lsq_linear
from scipy.spatial.transform import Rotation
from synthetic_graphs import grid_graph, synthetic_bundle, walk_graph
from torch import Tensor, nn

from jacops.charts import SE2
from jacops.errors import InputError, InputTypeError, NonFiniteError, SolveError
from jacops.fit import PCG, FitProgress, Nielsen, gauss_newton, levenberg_marquardt

BOTH = pytest.mark.parametrize("solve", [gauss_newton, levenberg_marquardt])
STRATEGIES = ["trust_region", "nielsen", "marquardt", "adaptive"]
T = torch.linspace(0, 2, 30).double()
Y = 3 * torch.exp(-1.5 * T) + 0.05 * torch.sin(9 * T)
INF = float("inf")


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def decay(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T) - Y


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def wood(x: Tensor) -> Tensor:
    ends = [90**0.5 * (x[3] - x[2] ** 2), 1 - x[2], 10**0.5 * (x[1] + x[3] - 2), 0.1**0.5 * (x[1] - x[3])]
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0], *ends])


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(tensor(1.0)[0])
        self.scale = nn.Parameter(tensor(2.0)[0])

    def forward(self, t: Tensor) -> Tensor:
        return self.scale * torch.exp(-self.rate * t)


# ---- strategies ----------------------------------------------------------------------------------------------------


def test_the_default_strategy_solves_graphs_in_few_steps() -> None:
    """Odometry of a long walk drifts far; dampings in units of the diagonal hold such steps back for long."""
    for graph, most in ((walk_graph(808, 20, noise=0.08, side=12), 10), (walk_graph(600, 300, noise=0.02), 10)):
        fit = levenberg_marquardt(
            graph.residual(), manifolds={"poses": SE2}, weight=graph.information, fixed={"poses": 0}
        )
        assert fit.success
        assert len(fit.log) <= most


class Loop(nn.Module):
    """A chain with one closure and a weak prior: linear, with a condition of about 1e12."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[1:] - self.x[:-1] - 1, (self.x[-1:] - self.x[:1] - 0.5), 1e-3 * self.x[:1]


def test_the_default_strategy_solves_linear_problems_at_once() -> None:
    fit = levenberg_marquardt(Loop(20_000))
    assert fit.success
    assert len(fit.log) <= 2
    # All residuals but the prior's share the misfit: (n - 1) - 0.5 over n edges.
    assert fit.cost == pytest.approx((20_000 - 1.5) ** 2 / 20_000 / 2, rel=1e-9)


def test_the_default_strategy_follows_damping_and_solver() -> None:
    start = tensor(2.0, 1.0)
    assert levenberg_marquardt(decay, params=start).method.endswith("trust_region")
    assert levenberg_marquardt(decay, params=start, damping=1e-3).method.endswith("nielsen")
    assert levenberg_marquardt(decay, params=start, solver="pcg", jacobian="sparse").method.endswith("nielsen")
    assert levenberg_marquardt(decay, params=start, solver=PCG(), jacobian="sparse").method.endswith("nielsen")
    with pytest.raises(InputError, match="a trust region has none"):
        levenberg_marquardt(decay, params=start, strategy="trust_region", damping=1e-3)


OSBORNE = [
    0.844,
    0.908,
    0.932,
    0.936,
    0.925,
    0.908,
    0.881,
    0.850,
    0.818,
    0.784,
    0.751,
    0.718,
    0.685,
    0.658,
    0.628,
    0.603,
    0.580,
    0.558,
]
OSBORNE += [0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406]


def powell_singular(x: Tensor) -> Tensor:
    squares = [(x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2]
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), *squares])


def brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = ((5 - x[1]) * x[1] - 2) * x[1], ((x[1] + 1) * x[1] - 14) * x[1]
    return torch.stack([x[0] + a - 13, x[0] + b - 29])


def box(x: Tensor) -> Tensor:
    t = 0.1 * torch.arange(1, 11).double()
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def osborne(x: Tensor) -> Tensor:
    t = 10 * torch.arange(33).double()
    return tensor(*OSBORNE) - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


@pytest.mark.parametrize(
    ("residual", "start", "right"),
    [
        (rosenbrock, [-1.2, 1], 0),
        (rosenbrock, [-12.0, 10], 0),
        (powell_singular, [3.0, -1, 0, 1], 0),
        (powell_singular, [30.0, -10, 0, 10], 0),
        (brown_badly_scaled, [1.0, 1], 0),
        (brown_badly_scaled, [100.0, 100], 0),
        (wood, [-3.0, -1, -3, -1], 0),
        (box, [0.0, 10, 20], 0),
        (osborne, [0.5, 1.5, -1, 0.01, 0.02], 5.46489e-5),
        (freudenstein_roth, [0.5, -2], 48.98425),
    ],
)
def test_the_default_strategy_finds_published_minima(
    residual: Callable[[Tensor], Tensor], start: list, right: float
) -> None:
    """Of Moré, Garbow and Hillstrom, Testing unconstrained optimization software, 1981."""
    fit = levenberg_marquardt(residual, params=tensor(*start), on_failure="return", progress=False)
    assert 2 * fit.cost == pytest.approx(right, rel=1e-5, abs=1e-12)
    # Where the Jacobian is singular at a minimum that is not zero, an undamped step is no evidence for it.
    assert fit.success or residual is freudenstein_roth


# ---- bounds --------------------------------------------------------------------------------------------------------


def kkt_violation(residual: Callable[[Tensor], Tensor], x: Tensor, low: Tensor, high: Tensor) -> float:
    """Return the largest scaled gradient that the box does not hold, by plain autograd."""
    J, r = torch.func.jacrev(residual)(x), residual(x)
    slope = J.T @ r / J.norm(dim=0) / r.norm()
    slope = torch.where((x == low) & (slope > 0) | (x == high) & (slope < 0), 0.0, slope)
    return float(slope.abs().max())


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("residual", "start", "low", "high"),
    [
        (rosenbrock, [-1.2, 2.0], [-2.0, 1.5], [INF, INF]),
        (rosenbrock, [-1.2, 1.0], [-INF, -INF], [0.5, 2.0]),
        (wood, [-3.0, -1, -3, -1], [-5.0, -5, -5, -5], [0.0, 10, 3, 10]),
        (decay, [2.0, 1.0], [0.0, 0.0], [2.5, 10.0]),
        (decay, [2.0, 1.0], [0.0, 0.0], [10.0, 10.0]),
    ],
)
def test_bounds_lead_where_those_of_scipy_do(
    residual: Callable[[Tensor], Tensor], start: list, low: list, high: list, strategy: str, jacobian: str
) -> None:
    lower, upper, seen = tensor(*low), tensor(*high), []

    def watched(progress: FitProgress) -> None:
        seen.append(progress.x)

    fit = levenberg_marquardt(
        residual, params=tensor(*start), bounds=(lower, upper), strategy=strategy, jacobian=jacobian,
        callback=watched, max_steps=300, progress=False,
    )  # fmt: skip
    theirs = least_squares(
        lambda x: residual(tensor(*x)).numpy(), start, jac=lambda x: torch.func.jacrev(residual)(tensor(*x)).numpy(),
        bounds=(low, high), xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000,
    )  # fmt: skip
    assert fit.success
    assert fit.cost <= theirs.cost * (1 + 1e-6) + 1e-12
    np.testing.assert_allclose(fit.x, theirs.x, rtol=1e-4, atol=1e-5)
    assert all(bool(((lower <= x) & (x <= upper)).all()) for x in (*seen, fit.x))
    right = (fit.x == upper).int() - (fit.x == lower).int()
    assert fit.active_mask.tolist() == right.tolist()
    if fit.cost > 1e-12:
        assert kkt_violation(residual, fit.x, lower, upper) < 1e-4
        assert fit.optimality == pytest.approx(kkt_violation(residual, fit.x, lower, upper), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("solve", [gauss_newton, levenberg_marquardt])
def test_linear_problems_within_bounds_end_at_the_minimum(solve: Callable[..., Any], seed: int) -> None:
    """Correlated columns, with half of the bounds active: a step often leads out of a bound that is met."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    A = A + 2 * A[:, :1]
    b = torch.randn(12, generator=generator, dtype=torch.float64)
    low = -torch.rand(8, generator=generator, dtype=torch.float64) / 4
    high = torch.rand(8, generator=generator, dtype=torch.float64) / 4
    corner = torch.where(torch.arange(8) % 2 == 0, low, high)
    start = torch.zeros(8).double() if solve is gauss_newton else corner
    fit = solve(lambda x: A @ x - b, params=start, bounds=(low, high), on_failure="return", progress=False)
    right = lsq_linear(A.numpy(), b.numpy(), (low.numpy(), high.numpy()), tol=1e-14)
    assert fit.success, fit
    assert fit.cost == pytest.approx(right.cost, rel=1e-8)
    assert kkt_violation(lambda x: A @ x - b, fit.x, low, high) < 1e-6


def test_a_corner_is_a_minimum() -> None:
    fit = levenberg_marquardt(lambda x: x + 1, params=tensor(1.0, 2.0), bounds=(0.0, None))
    assert fit.x.tolist() == [0, 0]
    assert fit.success
    assert fit.optimality == 0
    assert "every parameter is at a bound" in fit.certificate
    assert fit.active_mask.tolist() == [-1, -1]


def test_bounds_come_in_the_forms_of_the_parameters() -> None:
    right = levenberg_marquardt(decay, params=tensor(2.0, 1.0), bounds=([0.0, 0.0], [2.5, 10.0])).x
    for bounds in ((0.0, tensor(2.5, 10.0)), (None, np.array([2.5, INF])), Bounds([0, 0], [2.5, INF])):
        torch.testing.assert_close(levenberg_marquardt(decay, params=tensor(2.0, 1.0), bounds=bounds).x, right)

    def of_two(scale: Tensor, rate: Tensor) -> Tensor:
        return decay(torch.stack([scale, rate]))

    pairs: list[Any] = [{0: (0.0, 2.5)}, ([0.0, 0.0], [2.5, 10.0]), {"x[0]": (None, 2.5), 1: (0.0, None)}]
    for bounds in pairs:
        fit = levenberg_marquardt(of_two, params=[tensor(2.0)[0], tensor(1.0)[0]], bounds=bounds)
        torch.testing.assert_close(torch.stack(fit.x), right)
        assert [int(mask) for mask in fit.active_mask] == [1, 0]
    model = Decay()
    fit = levenberg_marquardt(model, T, Y, bounds={"scale": (0, 2.5)})
    assert float(model.scale.detach()) == 2.5
    assert {name: int(mask) for name, mask in fit.active_mask.items()} == {"rate": 0, "scale": 1}
    assert levenberg_marquardt(decay, params=tensor(2.0, 1.0)).active_mask is None


def test_bounds_go_with_charts_fixed_elements_and_single_precision() -> None:
    graph = grid_graph(3, 3)

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.bias = graph.residual(), nn.Parameter(torch.zeros(3).double())

        def forward(self) -> Tensor:
            return self.graph() + self.bias

    options = {"manifolds": {"graph.poses": SE2}, "fixed": {"graph.poses": 0}, "weight": graph.information}
    for jacobian in ("dense", "sparse"):
        fit = levenberg_marquardt(Biased(), bounds={"bias": (-1e-3, 1e-3)}, jacobian=jacobian, **options)
        assert fit.success
        assert float(fit.x["bias"].abs().max()) == 1e-3
    with pytest.raises(InputError, match="given for 'graph.poses' on a chart"):
        levenberg_marquardt(Biased(), bounds={"graph.poses": (0, 1)}, **options)
    single = levenberg_marquardt(
        lambda x: x[0] * torch.exp(-x[1] * T.float()) - Y.float(), params=torch.tensor([2.0, 1.0]), bounds=(0, 2.5)
    )
    assert single.success
    assert float(single.x[0]) == 2.5
    held = levenberg_marquardt(decay, params=tensor(3.0, 1.0), bounds=(0, 2.5), fixed=[0])
    assert float(held.x[0]) == 3  # what is held need not be within


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ((2.5, 5.0), InputError, r"`bounds` is \[2.5, 5\] where 'x' starts at 2, .*\(2 entries do not\)"),
        ((3.0, 1.0), InputError, "not in order for 'x'"),
        ((2.0, 2.0), InputError, "not in order for 'x'.*`fixed=`"),
        ((float("nan"), 1.0), InputError, "NaN for 'x'"),
        ((torch.zeros(3), None), InputError, r"of shape \(3,\) for 'x'"),
        ({"y": (0, 1)}, InputError, "`bounds` is naming 'y'"),
        (1.0, InputTypeError, r"`bounds` is a float, but a pair \(lower, upper\)"),
        ((0, 1, 2), InputTypeError, r"a tuple of 3, but a pair"),
        (("a", 1), InputTypeError, "a str for 'x'"),
        ((True, 1), InputTypeError, "a bool for 'x'"),
    ],
    ids=str,
)
def test_bad_bounds_are_refused_by_name(bounds: object, error: type, message: str) -> None:
    for solve in (gauss_newton, levenberg_marquardt):
        with pytest.raises(error, match=message):
            solve(decay, params=tensor(2.0, 1.0), bounds=bounds)


# ---- what is held, and priors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fixed", ["rate", ["rate"], {"rate": True}, "ra*", {"r?te": True}, {"rate": True, "s*": False}], ids=str
)
@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_a_whole_parameter_is_held_by_name_or_pattern(fixed: object, jacobian: str) -> None:
    model = Decay()
    levenberg_marquardt(model, T, Y, fixed=fixed, jacobian=jacobian)
    basis = torch.exp(-T)
    assert float(model.rate.detach()) == 1
    assert float(model.scale.detach()) == pytest.approx(float(basis @ Y / (basis @ basis)), rel=1e-9)


def test_a_name_that_fits_nothing_and_all_names_are_refused() -> None:
    for fixed in ("camera*", {"camera*": True}, ["rate", "camera"]):
        with pytest.raises(InputError, match="`fixed` is naming 'camera.*the free parameters are"):
            levenberg_marquardt(Decay(), T, Y, fixed=fixed)
    with pytest.raises(InputError, match="`fixed` is everything"):
        levenberg_marquardt(Decay(), T, Y, fixed="*")


def test_a_prior_is_one_more_output() -> None:
    A, b = torch.randn(6, 3).double(), torch.randn(6).double()
    mean, precision = torch.randn(3).double(), torch.diag(tensor(4.0, 0.5, 9.0))
    fit = gauss_newton(lambda x: (A @ x - b, x - mean), params=torch.zeros(3).double(), weight=[None, precision])
    right = torch.linalg.solve(A.T @ A + precision, A.T @ b + precision @ mean)
    torch.testing.assert_close(fit.x, right)


# ---- callbacks, lines and limits -----------------------------------------------------------------------------------


@BOTH
def test_a_callback_sees_every_step_that_is_taken(solve: Callable[..., Any]) -> None:
    seen: list[FitProgress] = []
    fit = solve(decay, params=tensor(2.0, 1.0), callback=seen.append)
    taken = [record for record in fit.log if record.accepted]
    assert [p.step for p in seen] == taken
    assert [p.nit for p in seen] == [r.step for r in taken]
    assert [p.cost for p in seen] == [pytest.approx(float(decay(p.x).square().sum()) / 2, rel=1e-12) for p in seen]
    torch.testing.assert_close(seen[-1].x, fit.x, rtol=0, atol=0)
    assert seen[-1].nfev <= fit.nfev


@pytest.mark.parametrize("how", ["true", "StopIteration"])
@BOTH
def test_a_callback_ends_the_call(solve: Callable[..., Any], how: str) -> None:
    def ends(progress: FitProgress) -> bool:
        progress.x["rate"].zero_()  # a copy
        if how == "StopIteration":
            raise StopIteration
        return True

    model = Decay()
    fit = solve(model, T, Y, callback=ends)
    assert fit.status == "callback"
    assert not fit.success
    assert len(fit.log) == 1
    assert float(model.rate.detach()) == float(fit.x["rate"]) != 0


def test_what_a_callback_raises_leaves_the_parameters_alone() -> None:
    def fails(progress: FitProgress) -> None:
        raise KeyboardInterrupt

    model = Decay()
    with pytest.raises(KeyboardInterrupt):
        levenberg_marquardt(model, T, Y, callback=fails)
    assert (float(model.rate.detach()), float(model.scale.detach())) == (1, 2)
    assert levenberg_marquardt(model, T, Y, callback=lambda progress: progress).success  # neither True nor an error


def test_lines_are_printed_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    fit = levenberg_marquardt(decay, params=tensor(2.0, 1.0))
    assert capsys.readouterr().out == ""
    levenberg_marquardt(decay, params=tensor(2.0, 1.0), verbose=1)
    assert capsys.readouterr().out.startswith(f"LeastSquaresResult({fit.status}")
    levenberg_marquardt(decay, params=tensor(2.0, 1.0), verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert sum(bool(re.match(r" +\d+: .* -> .*gradient.*radius", line)) for line in lines) == len(fit.log)


def test_time_is_limited() -> None:
    with pytest.raises(SolveError, match="1e-09 seconds were not enough") as caught:
        levenberg_marquardt(decay, params=tensor(2.0, 1.0), max_seconds=1e-9)
    result: Any = caught.value.solution
    assert result.status == "max_seconds"
    assert len(result.log) == 1
    assert levenberg_marquardt(decay, params=tensor(2.0, 1.0), max_seconds=600).success


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seconds": 0}, InputError, "`max_seconds`"),
        ({"max_seconds": "1"}, InputTypeError, "`max_seconds`"),
        ({"callback": 3}, InputTypeError, "`callback` is an int"),
        ({"verbose": 3}, InputError, "`verbose` is 3"),
        ({"verbose": "yes"}, InputTypeError, "`verbose`"),
    ],
    ids=str,
)
def test_bad_limits_are_refused_by_name(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        levenberg_marquardt(decay, params=tensor(2.0, 1.0), **options)


# ---- names ---------------------------------------------------------------------------------------------------------

SCIPY = ["fun", "x0", "jac", "bounds", "method", "ftol", "xtol", "gtol", "x_scale", "loss", "f_scale", "diff_step"]
SCIPY += ["tr_solver", "tr_options", "jac_sparsity", "max_nfev", "verbose", "args", "kwargs", "callback"]
PYPOSE = ["solver", "strategy", "kernel", "corrector", "weight", "reject", "min", "max", "vectorize", "target", "input"]
POINTS = {
    "fun": "model", "x0": "params", "jac": "jacobian", "method": "strategy", "loss": "kernel", "diff_step": "jacobian",
    "tr_solver": "solver", "tr_options": "solver", "jac_sparsity": "jacobian", "args": "input", "kwargs": "input",
    "reject": "max_steps", "min": "damping", "max": "strategy", "vectorize": "leave it out", "priors": "weight",
}  # fmt: skip


@pytest.mark.parametrize("name", [*SCIPY, *PYPOSE, "priors"])
@BOTH
def test_every_familiar_name_is_taken_or_points_to_the_one_to_use(solve: Callable[..., Any], name: str) -> None:
    if name not in POINTS:
        if name == "strategy" and solve is gauss_newton:
            return
        with pytest.raises(InputTypeError) as caught:
            solve(**{name: 1, "no_such_keyword": 1})
        assert f"`{name}`. " not in str(caught.value)
        return
    with pytest.raises(InputTypeError, match=rf"has no keyword `{name}`\. .*{POINTS[name]}"):
        solve(**{name: 1})


def test_a_recipe_keeps_its_own_damping() -> None:
    with pytest.raises(InputError, match="the strategy has its own"):
        levenberg_marquardt(decay, params=tensor(2.0, 1.0), strategy=Nielsen(), damping=1.0)


# ---- what no fit can do --------------------------------------------------------------------------------------------

NAN = float("nan")


def test_a_free_frame_names_what_to_hold() -> None:
    graph = grid_graph(6, 6)
    model = graph.residual()
    before = model.poses.detach().clone()
    options = {"manifolds": {"poses": SE2}, "weight": graph.information, "jacobian": "sparse"}
    with pytest.raises(SolveError, match=r"a joint move of 'poses' changes no residual.*`fixed=\{'poses': \d+\}`"):
        gauss_newton(model, **options)
    assert torch.equal(model.poses, before)
    assert gauss_newton(model, fixed={"poses": 0}, **options).success


def test_a_part_that_floats_is_found() -> None:
    """Two chains, of which the first is held by a prior: what to hold is in the second one."""

    def chains(x: Tensor) -> Tensor:
        return torch.cat([x[:1], x[1:5] - x[:4] - 1, x[6:] - x[5:-1] - 1])

    with pytest.raises(SolveError, match=r"a joint move of 'x' .*`fixed=\{'x': (5|6|7|8)\}`") as caught:
        gauss_newton(chains, params=torch.zeros(9).double(), jacobian="sparse")
    held = int(re.findall(r"'x': (\d)", str(caught.value))[0])
    assert gauss_newton(chains, params=torch.zeros(9).double(), jacobian="sparse", fixed={0: held}).success


def test_a_number_that_no_residual_sees_is_named() -> None:
    start = torch.zeros(2, 3).double()
    with pytest.raises(SolveError, match=r"no residual depends on 'x' at \(1, 1\) \(and on 1 numbers more\).*fixed="):
        gauss_newton(lambda x: x.reshape(-1)[:4] - 1, params=start, jacobian="sparse")
    alone = [torch.zeros(3).double(), torch.zeros(()).double()]
    with pytest.raises(SolveError, match=r"no residual depends on 'x\[1\]' at True; hold it with `fixed=.*: True"):
        gauss_newton(lambda x, y: x - 1 + 0 * y, params=alone, jacobian="sparse")


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@BOTH
def test_parameters_that_are_nan_are_named(solve: Callable[..., Any], jacobian: str) -> None:
    with pytest.raises(NonFiniteError, match="at the start, in the parameter x, 1 of 2 entries are NaN"):
        solve(lambda x: x[1:] - 1, params=tensor(NAN, 1.0), jacobian=jacobian)
    with pytest.raises(NonFiniteError, match="at the start, output has 1 entries"):
        solve(lambda x, t: x - t, tensor(NAN, 1.0), params=tensor(0.0, 1.0), jacobian=jacobian)


def test_points_behind_cameras_are_reported() -> None:
    bundle = synthetic_bundle(3, 8)
    assert len(bundle.behind) == 0
    points = bundle.points.clone()
    points[2] = tensor(0.0, 0.0, 50.0)
    moved = replace(bundle, points=points)
    cameras = bundle.cameras.numpy()
    right = [
        k for k, (c, p) in enumerate(zip(bundle.camera.tolist(), bundle.point.tolist(), strict=True))
        if (Rotation.from_rotvec(cameras[c, :3]).apply(points[p].numpy()) + cameras[c, 3:6])[2] >= 0
    ]  # fmt: skip
    assert moved.behind.tolist() == right
    assert right
    assert f"{len(right)} of points behind their camera" in repr(moved)
