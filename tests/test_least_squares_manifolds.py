"""Parameters on groups: native charts, LieTensors, what is held fixed; dense and sparse alike."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_graphs import grid_graph, sphere_graph, synthetic_bundle
from torch import Tensor, nn

from jacops._extras.graph_problems import PoseGraph
from jacops.charts import SE2, SE3, SO2, SO3, Chart
from jacops.errors import InputError, NotDifferentiableError, SolveError
from jacops.fit import gauss_newton, levenberg_marquardt
from jacops.fit._problem import FitProblem
from jacops.sparse.detect import traced

pp = pytest.importorskip("pypose")
EACH = pytest.mark.parametrize("chart", [SO2, SE2, SO3, SE3], ids=repr)


def drawn(chart: Chart, *shape: int, scale: float = 0.5) -> Tensor:
    return chart.exp(scale * torch.randn(*shape, chart.tangent, dtype=torch.float64))


def problem(model: nn.Module, jacobian: str, **options: object) -> FitProblem:
    given = {"manifolds": None, "fixed": None, "target": None, "weight": None, "sqrt_weight": None, "kernel": None}
    return FitProblem(
        model, None, "test", {**given, "f_scale": 1.0, "corrector": "triggs", "jacobian": jacobian, **options}
    )


class Points(nn.Module):
    """Poses that should bring points to where they were seen, and a common offset."""

    def __init__(self, chart: Chart, poses: Tensor) -> None:
        super().__init__()
        self.chart, self.poses = chart, nn.Parameter(poses)
        self.offset = nn.Parameter(torch.zeros(chart.space).double())
        self.register_buffer("points", torch.randn(5, chart.space).double())
        self.register_buffer("index", torch.tensor([0, 0, 1, 2, 1]))

    def forward(self) -> Tensor:
        return self.chart.act(self.poses[self.index], self.points) + self.offset


@EACH
@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_tangent_jacobians_agree_with_differences_along_the_retraction(chart: Chart, jacobian: str) -> None:
    model = Points(chart, drawn(chart, 3))
    found = problem(model, jacobian, manifolds={"poses": chart})
    values = found.values()
    _, system, _ = found.linearised(values)
    J = system.J if jacobian == "dense" else system.J.toarray()
    assert J.shape == (5 * chart.space, 3 * chart.tangent + chart.space)
    for column in range(J.shape[1]):
        step = np.zeros(J.shape[1])
        step[column] = 1e-6
        ends = []
        for sign in (1, -1):
            found._set(found.layout.moved(values, sign * step))
            ends.append(found._forward().detach().reshape(-1).numpy())
        np.testing.assert_allclose(J[:, column], (ends[0] - ends[1]) / 2e-6, atol=2e-9)


@EACH
@pytest.mark.parametrize("solve", [gauss_newton, levenberg_marquardt])
def test_an_element_is_found_from_what_it_does(chart: Chart, solve: object) -> None:
    true, points = drawn(chart, 2), torch.randn(2, 6, chart.space).double()
    target = chart.act(true[:, None].expand(-1, 6, -1), points)
    fit = solve(  # type: ignore[operator]
        lambda x: chart.act(x[:, None].expand(-1, 6, -1), points),
        target=target,
        params=drawn(chart, 2),
        manifolds=chart,
    )
    torch.testing.assert_close(chart.matrix(fit.x), chart.matrix(true), rtol=0, atol=1e-9)
    chart.check(fit.x)


@pytest.mark.parametrize("graph", [sphere_graph(4, 6), grid_graph(5, 4)], ids=["sphere", "grid"])
def test_dense_and_sparse_are_the_same_fit(graph: PoseGraph) -> None:
    options = {"manifolds": {"poses": graph.chart}, "weight": graph.information, "fixed": {"poses": 0}, "gtol": 1e-10}
    dense = levenberg_marquardt(graph.residual(), jacobian="dense", solver="cholesky", **options)
    for kind, solver in (("sparse", "splu"), ("sparse", "pcg"), ("auto", "auto")):
        fit = levenberg_marquardt(graph.residual(), jacobian=kind, solver=solver, **options)
        assert fit.cost == pytest.approx(dense.cost, rel=1e-9)
        torch.testing.assert_close(fit.x["poses"], dense.x["poses"], rtol=0, atol=1e-6)
        assert torch.equal(fit.x["poses"][0], graph.poses[0])
    assert dense.cost < 0.2 * dense.log[0].objective


def test_a_plan_is_made_once_and_can_be_given_again() -> None:
    graph = sphere_graph(4, 6)
    options = {"manifolds": {"poses": SE3}, "weight": graph.information, "fixed": {"poses": 0}}
    first = levenberg_marquardt(graph.residual(), jacobian="sparse", **options)
    assert "6 sweeps" in first.route
    second = levenberg_marquardt(graph.residual(), jacobian=first.plan, **options)
    assert second.plan is first.plan
    assert torch.equal(first.x["poses"], second.x["poses"])


def test_a_second_fit_of_the_same_model_does_not_plan_again(monkeypatch: pytest.MonkeyPatch) -> None:
    detected = []

    def counted(lin: Any, taint: Any) -> Any:
        detected.append(lin)
        return traced(lin, taint)

    monkeypatch.setattr("jacops.sparse.plan.traced", counted)
    graph = sphere_graph(4, 6)
    options = {"manifolds": {"poses": SE3}, "weight": graph.information, "fixed": {"poses": 0}, "inplace": False}
    model = graph.residual()
    first, second = (levenberg_marquardt(model, jacobian="sparse", **options) for _ in range(2))
    assert len(detected) == 1
    assert torch.equal(first.x["poses"], second.x["poses"])
    function, start = lambda x: torch.cat([x[1:] - x[:-1] ** 2, x[:1] - 0.5]), torch.linspace(0, 1, 12).double()
    for _ in range(2):
        gauss_newton(function, params=start, jacobian="sparse")
    assert len(detected) == 2
    gauss_newton(function, params=start[:6], jacobian="sparse")
    assert len(detected) == 3


class Window(nn.Module):
    """Differences of entries by indices that are squared first, so that no selection of a parameter is lifted."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(0.5, 1, 12).double())
        self.register_buffer("index", torch.arange(12).roll(1))

    def forward(self) -> Tensor:
        squares = self.x**2
        return torch.cat([squares[self.index] - squares, self.x - 1])


def test_a_plan_that_does_not_hold_any_more_is_made_anew() -> None:
    model = Window()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shift in (1, 3, 5):
            model.index = torch.arange(12).roll(shift)
            fit = gauss_newton(model, jacobian="sparse", inplace=False)
            assert fit.plan.pattern.nnz == 36
            torch.testing.assert_close(fit.x["x"], torch.ones(12).double())


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize("corrector", ["triggs", "first_order"])
def test_robust_kernels_on_blocks_are_the_same_dense_and_sparse(jacobian: str, corrector: str) -> None:
    graph = grid_graph(4, 4, noise=0.1)
    fit = levenberg_marquardt(
        graph.residual(),
        manifolds={"poses": SE2},
        weight=graph.information,
        fixed={"poses": 0},
        kernel="cauchy",
        jacobian=jacobian,
        corrector=corrector,
        xtol=None,
        ftol=None,
        gtol=1e-6,
        max_steps=500,
    )
    assert fit.cost == pytest.approx(_CAUCHY, rel=1e-8)


_CAUCHY = 0.0


def setup_module() -> None:
    """The optimum by SciPy, over tangents at the start, where kernels see whole blocks."""
    global _CAUCHY
    from scipy.optimize import minimize

    graph = grid_graph(4, 4, noise=0.1)
    model = graph.residual()
    start = graph.poses

    def objective(d: np.ndarray) -> tuple[float, np.ndarray]:
        step = torch.from_numpy(d).requires_grad_()
        full = torch.cat([torch.zeros(1, 3).double(), step.reshape(-1, 3)])
        moved = SE2.retract(start, full)
        r = torch.func.functional_call(model, {"poses": moved}, ())
        s = torch.einsum("ki,kij,kj->k", r, graph.information, r)
        value = torch.log1p(s).sum() / 2
        (gradient,) = torch.autograd.grad(value, step)
        return float(value.detach()), gradient.numpy()

    found = minimize(objective, np.zeros(45), jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 2000})
    _CAUCHY = float(found.fun)


def test_bundle_adjustment_dense_and_sparse() -> None:
    bundle = synthetic_bundle(3, 12)
    dense = levenberg_marquardt(bundle.residual(), jacobian="dense", max_steps=300)
    sparse = levenberg_marquardt(bundle.residual(), jacobian="sparse", max_steps=300)
    assert dense.cost == pytest.approx(sparse.cost, rel=1e-6)
    assert dense.cost < 1e-3 * dense.log[0].objective


# ---- fixed ---------------------------------------------------------------------------------------------------------


def test_what_is_fixed_stays_to_the_bit() -> None:
    graph = grid_graph(3, 3)
    for fixed in (0, [0, 4], slice(0, 2), torch.arange(9) == 8):
        model = graph.residual()
        levenberg_marquardt(model, manifolds={"poses": SE2}, fixed={"poses": fixed})
        assert torch.equal(model.poses.detach()[fixed], graph.poses[fixed])
        assert not torch.equal(model.poses.detach(), graph.poses)
    entries = torch.tensor([True, False, False])
    fit = gauss_newton(lambda x: x - 5, params=torch.zeros(3).double(), fixed=entries)
    assert fit.x.tolist() == [0, 5, 5]


def test_without_anything_fixed_damping_or_the_shortest_step_help() -> None:
    graph = grid_graph(3, 3)
    options = {"manifolds": {"poses": SE2}, "weight": graph.information, "gtol": 1e-9}
    right = levenberg_marquardt(graph.residual(), fixed={"poses": 0}, **options).cost
    assert levenberg_marquardt(graph.residual(), **options).cost == pytest.approx(right, rel=1e-8)
    shortest = gauss_newton(graph.residual(), **options)
    assert shortest.cost == pytest.approx(right, rel=1e-8)
    assert "rank 24 of 27" in shortest.log[0].solver
    with pytest.raises(SolveError, match="singular"):
        gauss_newton(graph.residual(), jacobian="sparse", **options)


# ---- LieTensors ----------------------------------------------------------------------------------------------------


class LieGraph(nn.Module):
    def __init__(self, graph: PoseGraph) -> None:
        super().__init__()
        self.poses = pp.Parameter(pp.SE3(graph.poses.clone()))
        self.graph = graph

    def forward(self) -> Tensor:
        graph = self.graph
        measured = pp.SE3(graph.measured)
        return (measured.Inv() @ self.poses[graph.source].Inv() @ self.poses[graph.target]).Log().tensor()


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_lietensors_move_as_native_charts_do(jacobian: str) -> None:
    graph = sphere_graph(3, 5)
    options = {"weight": graph.information, "fixed": {"poses": 0}, "jacobian": jacobian, "gtol": 1e-9}
    native = levenberg_marquardt(graph.residual(), manifolds={"poses": SE3}, **options)
    model = LieGraph(graph)
    theirs = levenberg_marquardt(model, **options)
    assert theirs.jac.shape == native.jac.shape == (25 * 6 - 6, 14 * 6)
    assert theirs.cost == pytest.approx(native.cost, rel=1e-8)
    assert isinstance(model.poses, pp.LieTensor)
    assert isinstance(theirs.x["poses"], pp.LieTensor)
    torch.testing.assert_close(model.poses.tensor().detach(), native.x["poses"], rtol=0, atol=1e-6)


def test_lietensors_without_a_module_and_algebras() -> None:
    target = pp.randn_SE3(4).double()
    fit = gauss_newton(lambda x: (x @ target.Inv()).Log(), params=pp.identity_SE3(4, dtype=torch.float64))
    torch.testing.assert_close(fit.x.matrix(), target.matrix(), rtol=0, atol=1e-6)
    algebra = levenberg_marquardt(
        lambda x: (x.Exp() @ target.Inv()).Log().tensor(), params=pp.se3(torch.zeros(4, 6).double()), max_steps=300
    )
    torch.testing.assert_close(algebra.x.Exp().matrix(), target.matrix(), rtol=0, atol=1e-6)


def test_pyposes_own_example_of_a_pose_to_be_inverted() -> None:
    class PoseInv(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.pose = pp.Parameter(pp.randn_SE3(*shape, dtype=torch.float64))

        def forward(self, input: Tensor) -> Tensor:
            return (self.pose @ input).Log().tensor()

    input, model = pp.randn_SE3(2, 2, dtype=torch.float64), PoseInv(2, 2)
    levenberg_marquardt(model, input, max_steps=20)
    assert float(model(input).detach().abs().max()) < 1e-8


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_raw_storage_of_a_lietensor_is_right_or_refused_by_name(jacobian: str) -> None:
    target = torch.randn(3, 3).double()
    for read in (lambda x: x.translation(), lambda x: x.tensor()[..., :3], lambda x: (x @ x).translation()):
        for back in (lambda t: t, lambda t: t - target, lambda t: t.exp()):
            start = pp.randn_SE3(3, dtype=torch.float64)
            given = target if back(target) is target else None
            try:
                fit = levenberg_marquardt(
                    lambda x, read=read, back=back: back(read(x)),
                    target=given,
                    params=start,
                    jacobian=jacobian,
                    max_steps=4,
                    on_failure="return",
                )
            except NotDifferentiableError as error:
                assert "x" in str(error)  # noqa: PT017
                continue
            assert fit.log[0].ratio > 0.2  # a wrong Jacobian predicts badly


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_charts_that_do_not_fit_are_refused() -> None:
    def fit(**options: object) -> None:
        levenberg_marquardt(lambda x: x, **options)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="`x` is of shape .* SE3 needs a last axis of 7"):
        fit(params=torch.ones(2, 3), manifolds=SE3)
    with pytest.raises(InputError, match=r"length 2 \(element 0\)"):
        fit(params=torch.ones(2, 4), manifolds=SO3)
    with pytest.raises(InputError, match="a LieTensor has its own"):
        fit(params=pp.identity_SE3(2), manifolds=SE3)
    with pytest.raises(InputError, match=r"`output` is an element of SE3.*\.Log\(\)"):
        fit(params=pp.identity_SE3(2))
    with pytest.raises(InputError, match="`manifolds` is naming 'pose'"):
        levenberg_marquardt(grid_graph(2, 2).residual(), manifolds={"pose": SE2})
