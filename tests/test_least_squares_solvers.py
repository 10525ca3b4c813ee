"""Linear solvers and strategies: the right step or none, and a residual that is true."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from jacops._words import StepSolverName
from jacops.errors import InputError, InputTypeError, MemoryBudgetError, MissingExtraError, SolveError
from jacops.fit import (
    LSTSQ,
    PCG,
    QDLDL,
    QR,
    RSLAB,
    Adaptive,
    AutoStepSolver,
    Cholesky,
    Constant,
    Marquardt,
    Nielsen,
    SparseLU,
    StepSolver,
    TrustRegion,
    gauss_newton,
    levenberg_marquardt,
)
from jacops.fit._system import LinearizedFit, Singular

SOLVERS = [QR(), Cholesky(), LSTSQ(), SparseLU(), PCG(), AutoStepSolver()]
PACKAGES = {"qdldl": (QDLDL(), "Solver"), "rslab": (RSLAB(), "analyze")}
HAS = {
    name: pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"needs the package {name}")
    for name in PACKAGES
}
SOLVERS += [pytest.param(solver, marks=HAS[name]) for name, (solver, _) in PACKAGES.items()]
EACH = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
STRATEGIES = [Nielsen(), Marquardt(), Adaptive(1e-3), Constant(1e-2), TrustRegion(), TrustRegion(0.5)]


def drawn(seed: int, rows: int, columns: int, sparse: bool) -> LinearizedFit:
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.5)
    J[:columns] += 3 * np.eye(columns)
    J *= 10.0 ** rng.uniform(-3, 3, columns)
    return LinearizedFit(csr_array(J) if sparse else J, rng.normal(size=rows), np.arange(columns) // 2)


@EACH
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.integers(1, 9), sparse=st.booleans(), damped=st.booleans())
def test_steps_solve_their_equations(solver: StepSolver, seed: int, columns: int, sparse: bool, damped: bool) -> None:
    system = drawn(seed, columns + 6, columns, sparse)
    damping = 1e-2 * system.scale**2 if damped else None
    found = solver.solve(system, damping)
    J = system.J.toarray() if sparse else system.J
    H = J.T @ J + (np.diag(damping) if damping is not None else 0)
    right = -np.linalg.solve(H / np.outer(system.scale, system.scale), system.gradient / system.scale) / system.scale
    np.testing.assert_allclose(found.step * system.scale, right * system.scale, rtol=1e-5, atol=1e-7)
    true = np.linalg.norm(H @ found.step + system.gradient) / np.linalg.norm(system.gradient)
    assert found.residual == pytest.approx(true, abs=1e-9)
    assert found.residual < 1e-7


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("solver", [QR(), Cholesky(), SparseLU()], ids=repr)
def test_a_singular_matrix_is_noticed(solver: StepSolver, sparse: bool) -> None:
    J = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    system = LinearizedFit(csr_array(J) if sparse else J, np.ones(3), np.arange(3))
    with pytest.raises(Singular):
        solver.solve(system, None)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), level=st.sampled_from([1e-8, 1e-4, 1.0]))
def test_fewer_rows_than_columns(seed: int, rows: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    system = LinearizedFit(rng.normal(size=(rows, 9)), rng.normal(size=rows), np.arange(9))
    damping = level * system.scale**2
    right = QR().solve(system, damping).step
    for sparse in (False, True):
        given = LinearizedFit(csr_array(system.J) if sparse else system.J, system.r, system.blocks)
        found = Cholesky().solve(given, damping)
        np.testing.assert_allclose(found.step, right, rtol=1e-6, atol=1e-8)
        assert "by rows" in found.note


def test_the_shortest_step_without_full_rank() -> None:
    system = LinearizedFit(np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([2.0, 2.0]), np.arange(2))
    found = AutoStepSolver().solve(system, None)
    np.testing.assert_allclose(found.step, [-1, -1], atol=1e-12)
    assert "shortest step" in found.note
    assert "rank 1 of 2" in found.note


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_every_strategy_finds_the_bottom_of_rosenbrocks_valley(strategy: object) -> None:
    def valley(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    start = torch.tensor([0.8, 0.5] if isinstance(strategy, Constant) else [-1.2, 1.0]).double()
    fit = levenberg_marquardt(valley, params=start, strategy=strategy, max_steps=400)  # type: ignore[arg-type]
    torch.testing.assert_close(fit.x, torch.ones(2).double(), rtol=0, atol=1e-6)
    assert all(r.tried < r.objective for r in fit.log if r.accepted)
    assert all(r.inner_residual < 1e-8 for r in fit.log)


def test_a_full_network_is_taken_densely_and_a_hopeless_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacops.fit._problem._DENSE_ENTRIES", 10)
    net = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)).double()
    x = torch.randn(80, 3).double()
    fit = levenberg_marquardt(net, x, torch.sin(x.sum(1, keepdim=True)), max_steps=3, on_failure="return")
    assert "full" in fit.route
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(MemoryBudgetError, match="80 x 101 needs about"):
        levenberg_marquardt(net, x)


@pytest.mark.parametrize("progress", [True, False])
def test_a_progress_bar_on_request(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    levenberg_marquardt(lambda x: x**2 - 2, params=torch.ones(3).double(), progress=progress)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["nielsen", "marquardt", "adaptive", "constant"])
def test_names_of_strategies_and_a_damping(name: str) -> None:
    fit = levenberg_marquardt(lambda x: x**2 - 2, params=torch.ones(1).double(), strategy=name, damping=1e-2)
    assert fit.log[0].damping == 1e-2
    assert float(fit.x) == pytest.approx(2**0.5, rel=1e-7)
    if name == "constant":
        assert {r.damping for r in fit.log} == {1e-2}


def test_constant_damping_ends_when_a_step_leads_uphill() -> None:
    with pytest.raises(SolveError, match="with constant damping the next one would be the same"):
        levenberg_marquardt(torch.atan, params=torch.tensor([5.0]).double(), strategy="constant")


def test_a_trust_region_keeps_within_its_radius() -> None:
    fit = levenberg_marquardt(
        lambda x: torch.atan(x), params=torch.tensor([5.0]).double(), strategy=TrustRegion(0.1), max_steps=200
    )
    assert abs(float(fit.x)) < 1e-6
    assert (
        not levenberg_marquardt(lambda x: x.sum().reshape(1) - 1, params=torch.zeros(2), strategy="trust_region")
        .log[0]
        .ratio
        < 0.9
    )


def test_names_of_solvers_are_said_in_the_log() -> None:
    for name in ("qr", "cholesky", "lstsq", "splu", "pcg"):
        fit = levenberg_marquardt(lambda x: x**2 - 2, params=torch.ones(3).double(), solver=name)
        assert {r.solver for r in fit.log} == {name}
    auto = levenberg_marquardt(lambda x: x**2 - 2, params=torch.ones(3).double())
    assert "auto: dense and small" in auto.log[0].solver
    assert levenberg_marquardt(lambda x: x**2 - 2, params=torch.ones(3).double(), solver=PCG()).log[0].inner_steps > 0


def test_pcg_that_stops_early_says_so() -> None:
    fit = levenberg_marquardt(
        lambda x: torch.stack([x[0] + 2 * x[1], x[1] - x[2], x[2] * 3 - 1, x[0]]),
        params=torch.zeros(3).double(),
        solver=PCG(max_steps=1),
        on_failure="return",
    )
    assert "stopped before its tolerance" in fit.log[0].solver


def test_gauss_newton_on_a_sparse_singular_problem_says_what_to_do() -> None:
    with pytest.raises(SolveError, match=r"changes no residual in 1 direction.*fixed=\{'x': 0\}") as caught:
        gauss_newton(lambda x: x[1:] - x[:-1], params=torch.arange(9.0).double(), jacobian="sparse", gtol=None)
    assert caught.value.solution.status == "singular"  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(package: StepSolverName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"jacops\[{package}\]"):
        levenberg_marquardt(lambda x: x - 1, params=torch.zeros(2).double(), solver=package)


@pytest.mark.parametrize("package", [pytest.param(name, marks=mark) for name, mark in HAS.items()])
def test_what_packages_analyse_is_kept_with_the_structure(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solver, analysis = PACKAGES[package]
    module = importlib.import_module(package)
    analyse, made = getattr(module, analysis), []
    monkeypatch.setattr(module, analysis, lambda *given, **options: made.append(1) or analyse(*given, **options))

    def chain(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1] - 0.5, torch.sin(x[1:]) - x[:-1] ** 2, 0.1 * x])

    for start in (0.1, 0.2):
        begin = torch.full((40,), start, dtype=torch.float64)
        found = levenberg_marquardt(chain, params=begin, solver=solver, strategy="nielsen", jacobian="sparse")
        other = levenberg_marquardt(chain, params=begin, solver="qr", strategy="nielsen", jacobian="dense")
        torch.testing.assert_close(found.x, other.x, rtol=1e-6, atol=1e-7)
        assert len(found.log) > 2
    assert made == [1]


def test_what_is_no_solver_or_strategy_is_refused() -> None:
    def fit(**options: object) -> None:
        levenberg_marquardt(lambda x: x, params=torch.ones(1), **options)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="`solver` is 'lu', but one of"):
        fit(solver="lu")
    with pytest.raises(InputTypeError, match="`solver` is an int"):
        fit(solver=1)
    with pytest.raises(InputError, match="`strategy` is 'newton', but one of"):
        fit(strategy="newton")
    with pytest.raises(InputTypeError, match="`strategy` is an int"):
        fit(strategy=1)
    with pytest.raises(InputError, match="`damping` is -1"):
        fit(damping=-1)
    with pytest.raises(InputTypeError, match="`damping` is '1'"):
        fit(damping="1")
    with pytest.raises(InputError, match="a trust region has none"):
        fit(strategy="trust_region", damping=1.0)
    with pytest.raises(InputError, match="the strategy has its own"):
        fit(strategy=Nielsen(), damping=1.0)
    with pytest.raises(InputError, match="`radius` is 0"):
        TrustRegion(0)
