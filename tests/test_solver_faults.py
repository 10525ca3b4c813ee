"""Solves at any scale, and solves that fail: a status per right-hand side, and nothing spoiled behind them."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import Problem, TorchTwiceDifferentiable, compute_influences
from jacops.errors import JacopsWarning, NonFiniteError, SolveError
from jacops.linalg import Diagonal, Matrix, Operator, Space
from jacops.solvers import CG, EKFAC, MINRES, Auto, Direct, Lanczos, LiSSA, Nystrom, inverse_quadratic_bounds, solve

F32, F64 = torch.float32, torch.float64
POOR = pytest.mark.filterwarnings("ignore:.*approximate solutions have a relative residual")  # worse than zero
RESULTS = {"converged", "attainable", "approximate", "unchecked"}
SOLVERS: dict[str, Any] = {
    "direct": Direct(),
    "direct indefinite": Direct(indefinite=True),
    "block cg": CG(),
    "cg": CG(block=False),
    "cg jacobi": CG("jacobi"),
    "cg nystrom": CG("nystrom"),
    "cg in cg": CG(Nystrom(rank=4), block=False),
    "minres": MINRES(),
    "lissa": LiSSA(max_steps=400),
    "lanczos": Lanczos(rank=10),
    "nystrom": Nystrom(),
    "auto": Auto(),
    "auto iterative": Auto(budget=1000),
}
APPROXIMATE = {"lanczos", "nystrom"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    turn = torch.linalg.qr(draw(len(values), len(values), seed=seed))[0]
    matrix = (turn * values.double()) @ turn.T
    return (matrix + matrix.T) / 2


def times(tensor: Tensor, exponent: int) -> Tensor:
    """Return a tensor times a power of two, in halves, so that only the result may leave the range."""
    return tensor * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


class Products(Operator):
    """A matrix that only multiplies, and keeps what it was given."""

    def __init__(self, matrix: Tensor, positive: bool = True) -> None:
        self.matrix, self.symmetric, self.positive = matrix, True, positive
        self.seen: list[Tensor] = []

    @property
    def domain(self) -> Space:
        return Space.flat(self.matrix.shape[0], "columns", self.matrix)

    codomain = domain

    def _apply(self, rows: Tensor) -> Tensor:
        self.seen.append(rows)
        return rows @ self.matrix.T

    _apply_transpose = _apply


# ---- scales ------------------------------------------------------------------------------------------------------

# Binary exponents of about 1e±30 in single and 1e±200 in double precision.
CORNERS = [pytest.param(F32, (-100, 0, 100), id="float32"), pytest.param(F64, (-664, 0, 664), id="float64")]


@POOR
@pytest.mark.parametrize("lazy", [False, True], ids=["matrix", "products"])
@pytest.mark.parametrize(("dtype", "exponents"), CORNERS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_scale_gives_the_solution_or_a_failure(name: str, dtype: Any, exponents: Any, lazy: bool) -> None:
    """Powers of two commute with rounding, so the closed form is that of scale one, whatever the scales."""
    unit, rows, damping = spectrum(torch.logspace(0, -1, 10)).to(dtype), draw(2, 10, seed=1).to(dtype), 0.02
    damped = unit.double() + damping * torch.eye(10, dtype=F64)
    exact = torch.linalg.solve(damped, rows.double().T).T
    limits = torch.finfo(dtype)
    for of_operator in exponents:
        for of_rows in exponents:
            matrix, b = times(unit, of_operator), times(rows, of_rows)
            operator = Products(matrix) if lazy else Matrix(matrix, symmetric=True, positive=True)
            given = math.ldexp(damping, of_operator)
            solution = solve(operator, b, SOLVERS[name], damping=given, on_failure="return")
            shift = of_rows - of_operator
            largest = math.log2(float(exact.abs().max())) + shift
            if not math.log2(limits.tiny) + 5 < largest < math.log2(limits.max) - 1:
                assert set(solution.status) == {"breakdown"}, (of_operator, of_rows, solution)
                assert "range of torch.float" in solution.info["reason"]
                continue
            x = times(solution.x.double(), -shift)
            assert set(solution.status) <= RESULTS, (of_operator, of_rows, solution)
            assert ("approximate" in solution.status) == (name in APPROXIMATE)
            left = (rows.double() - x @ damped).norm(dim=1) / rows.double().norm(dim=1)
            torch.testing.assert_close(solution.residual, left, rtol=1e-3, atol=20 * limits.eps)
            error = (x - exact).norm(dim=1)
            if name not in APPROXIMATE:
                assert bool((error <= 1e-2 * exact.norm(dim=1)).all())
            assert bool((error <= times(solution.info["error_bound"], -shift) * (1 + 1e-6)).all())


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - APPROXIMATE))
@pytest.mark.parametrize(("dtype", "exponent"), [(F32, 100), (F32, -100), (F64, 664), (F64, -664)])
def test_a_scaled_system_is_solved_bit_by_bit_as_the_plain_one(name: str, dtype: Any, exponent: int) -> None:
    unit, rows = spectrum(torch.logspace(0, -1, 10)).to(dtype), draw(3, 10, seed=2).to(dtype)
    plain = solve(Matrix(unit, symmetric=True, positive=True), rows, SOLVERS[name], damping=0.25)
    scaled = Matrix(times(unit, exponent), symmetric=True, positive=True)
    solution = solve(scaled, times(rows, exponent), SOLVERS[name], damping=math.ldexp(0.25, exponent))
    torch.testing.assert_close(solution.x, plain.x, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert solution.iterations == plain.iterations


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_figures_are_those_of_the_given_operator(dtype: Any, sign: int) -> None:
    exponent = sign * (90 if dtype == F32 else 600)
    unit = spectrum(torch.tensor([-0.5, 0.3, 1.0, 2.0])).to(dtype)
    operator = Matrix(times(unit, exponent), symmetric=True)
    for solver in (Direct(), CG(), CG(block=False), LiSSA(), Lanczos(rank=4)):
        solution = solve(operator, draw(2, 4).to(dtype), solver, on_failure="return")
        assert set(solution.status) == {"negative_curvature"}
        lowest = math.ldexp(solution.info["lowest_curvature"], -exponent)
        assert -0.5 * (1 + 1e-5) <= lowest < 0
        assert bool(solution.residual.isnan().all())
    positive = Matrix(times(unit @ unit, exponent), symmetric=True, positive=True)
    grown = solve(positive, draw(2, 4).to(dtype), LiSSA(scale=math.ldexp(0.5, exponent)), on_failure="return")
    assert set(grown.status) == {"diverged"}
    needed = math.ldexp(grown.info["scale_needed"], -exponent)
    assert needed == pytest.approx(4.0, rel=0.1)
    again = solve(positive, draw(2, 4).to(dtype), LiSSA(scale=grown.info["scale_needed"], tolerance=1e-3))
    assert set(again.status) <= {"converged", "attainable"}
    assert again.damping == 0.0


@pytest.mark.parametrize(("dtype", "exponent"), [(F32, -50), (F32, 50), (F64, -332), (F64, 332)])
@pytest.mark.parametrize("core", [False, True])
def test_few_rows_of_any_scale_are_solved_in_their_own_space(dtype: Any, exponent: int, core: bool) -> None:
    rows, b = draw(3, 8, seed=3).to(dtype), draw(2, 8).to(dtype)
    inner = torch.diag(torch.tensor([1.0, 0.5, 0.25])).to(dtype)
    J = Matrix(times(rows, exponent))
    A = J.T @ Matrix(inner, symmetric=True, positive=True) @ J if core else J.T @ J
    solution = solve(A, b, Direct(), damping=math.ldexp(0.1, 2 * exponent))
    assert "rows" in solution.method
    unit = rows.double().T @ (inner.double() if core else torch.eye(3, dtype=F64)) @ rows.double()
    exact = torch.linalg.solve(unit + 0.1 * torch.eye(8, dtype=F64), b.double().T).T
    torch.testing.assert_close(times(solution.x.double(), 2 * exponent), exact, rtol=1e-4, atol=1e-4)


def test_an_answer_below_the_smallest_number_is_no_answer() -> None:
    A = Matrix(times(torch.eye(2, dtype=F32), 99), symmetric=True, positive=True)
    b = times(torch.ones(1, 2, dtype=F32), -99)
    for solver in SOLVERS.values():
        solution = solve(A, b, solver, damping=2.0**80, on_failure="return")
        assert solution.status == ("breakdown",)
        assert not solution.success
        assert float(solution.info["error_bound"][0]) > 0
        with pytest.raises(SolveError, match="outside the range of torch.float32.*float64"):
            solve(A, b, solver, damping=2.0**80)
    # in between digits are lost one by one: the residual is that of what is returned
    part = solve(A, times(b, 52), Direct(), damping=2.0**80, on_failure="return")
    assert float(part.residual[0]) > 1e-4 or part.converged


@pytest.mark.parametrize(("scale", "damping"), [(0.0, 1e-30), (0.0, 1e30), (1e-30, 0.5), (1e30, 1e-30), (1.0, 1e-300)])
@POOR
def test_damping_may_be_of_another_scale_than_the_operator(scale: float, damping: float) -> None:
    matrix = scale * torch.diag(torch.tensor([1.0, 0.5, 0.25]))
    b = torch.ones(1, 3)
    exact = b.double() / (matrix.diagonal().double() + damping)
    for name, solver in SOLVERS.items():
        solution = solve(Matrix(matrix, symmetric=True, positive=True), b, solver, damping=damping, on_failure="return")
        if set(solution.status) <= {"converged", "attainable"}:
            torch.testing.assert_close(solution.x.double() / exact, torch.ones_like(exact), rtol=1e-3, atol=0, msg=name)
        assert name in APPROXIMATE or solution.success, (name, solution)


def test_bounds_on_quadratic_forms_hold_at_every_scale() -> None:
    unit, b, damping = spectrum(torch.logspace(0, -2, 12)), draw(3, 12, seed=1), 1e-3
    exact = (b * torch.linalg.solve(unit + damping * torch.eye(12, dtype=F64), b.T).T).sum(1)
    for exponent, of_rows in ((0, 0), (660, 0), (-660, 0), (660, 660), (-660, -660), (660, -660), (-660, 660)):
        A = Matrix(times(unit, exponent), symmetric=True, positive=True)
        for steps in (3, 12):
            bounds = inverse_quadratic_bounds(A, times(b, of_rows), damping=math.ldexp(damping, exponent), steps=steps)
            assert not bool(bounds.upper.isnan().any() | bounds.lower.isnan().any())
            true = 2 * of_rows - exponent + exact.log2()
            assert bool((bounds.lower.log2() <= true + 1e-9).all())
            assert bool((bounds.upper.log2() >= true - 1e-9).all())


def test_a_model_whose_loss_has_any_scale_gives_scaled_influences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(draw(6, 3), draw(6, 2, seed=4))]

    def values(scale: float, solver: Any) -> Tensor:
        wrapped = TorchTwiceDifferentiable(model, lambda output, y: scale * F.mse_loss(output, y))
        options: dict[str, Any] = {"solver": solver, "damping": 5.0 * scale, "curvature": "hessian"}
        return compute_influences(wrapped, data, **options).values / scale

    for solver in ("direct", "cg", "minres"):
        plain = values(1.0, solver)
        for scale in (2.0**-300, 2.0**300):
            torch.testing.assert_close(values(scale, solver), plain, rtol=1e-9, atol=1e-12)


# ---- failed rows never reach an operator ---------------------------------------------------------------------------

BROKEN: dict[str, Tensor] = {
    "indefinite": spectrum(torch.tensor([-0.5, 0.2, 1.0, 2.0, 0.7])),
    "singular": spectrum(torch.tensor([0.0, 0.0, 1.0, 2.0, 0.7])),
    "zero": torch.zeros(5, 5, dtype=F64),
    "negative": -spectrum(torch.tensor([0.1, 0.2, 1.0, 2.0, 0.7])),
    "hopeless": spectrum(torch.logspace(0, -18, 5)),
}


@POOR
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("name", SOLVERS)
def test_no_operator_is_given_rows_that_are_not_finite(name: str, case: str, marked: bool) -> None:
    operator, b = Products(BROKEN[case], positive=marked), draw(4, 5, seed=1)
    b[1, 2], b[3] = math.nan, math.inf
    solution = solve(operator, b, SOLVERS[name], on_failure="return")
    assert all(bool(rows.isfinite().all()) for rows in operator.seen)
    assert [str(solution.status[row]) for row in (1, 3)] == ["nonfinite_input"] * 2
    known = RESULTS | {"max_steps", "stagnated", "singular"}  # a large residual can be what shows a singular matrix
    for status, residual in zip(solution.status, solution.residual.tolist(), strict=True):
        assert status in known or math.isnan(residual)


class Overflows(Operator):
    """A symmetric operator with products that are not finite for some rows."""

    symmetric = positive = True
    domain = codomain = Matrix(torch.eye(4, dtype=F64)).domain

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def _apply(self, rows: Tensor) -> Tensor:
        self.seen.append(rows)
        return torch.where(rows[:, :1] != 0, math.inf, 2.0) * rows

    _apply_transpose = _apply


@pytest.mark.parametrize("solver", [CG(block=False), MINRES(), LiSSA(scale=2.0)])
def test_a_product_that_overflows_fails_its_own_row_only(solver: Any) -> None:
    operator, b = Overflows(), torch.eye(4, dtype=F64)
    solution = solve(operator, b, solver, damping=1.0, on_failure="return")
    assert [str(status) for status in solution.status[1:]] == ["converged"] * 3
    assert solution.status[0] in ("breakdown", "diverged")
    torch.testing.assert_close(solution.x[1:], b[1:] / 3)
    assert all(bool(rows.isfinite().all()) for rows in operator.seen)


def test_preconditioners_that_overflow_are_a_breakdown() -> None:
    A = Matrix(spectrum(torch.tensor([1.0, 2.0, 3.0, 4.0])), symmetric=True, positive=True)
    for block in (True, False):
        for inner in (Overflows(), Diagonal(torch.full((4,), math.inf, dtype=F64))):
            solution = solve(A, draw(2, 4), CG(inner, block=block), on_failure="return")
            assert set(solution.status) == {"breakdown"}


def labelled(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = draw(24, 6).float(), torch.arange(24) % 3
    return model, list(zip(x.split(8), y.split(8), strict=True)), [(x[:5], y[:5])]


def test_a_failed_solve_leaves_the_model_as_good_as_before() -> None:
    """A refused call neither warns of the model nor sends later calls to a slower route (F1)."""
    model, train, test = labelled()
    fresh = TorchTwiceDifferentiable(labelled()[0], F.cross_entropy)
    used = TorchTwiceDifferentiable(model, F.cross_entropy)
    passes: list[int] = []
    for wrapped, spoil in ((fresh, False), (used, True)):
        if spoil:
            for solver in ("direct", "auto", Direct(indefinite=True)):
                with pytest.raises(SolveError, match="singular"):
                    compute_influences(wrapped, train, test_data=test, curvature="ggn", damping=0, solver=solver)
        with Backward() as counted:
            compute_influences(wrapped, train, test_data=test, curvature="ggn", damping=0.1)
            compute_influences(wrapped, train, test_data=test, curvature="ggn", damping=0.1, solver="cg")
        passes.append(counted.count)
    assert passes[1] <= passes[0]  # proofs that the refused calls made need not be made again


class Backward:
    """Counts backward passes."""

    def __enter__(self) -> "Backward":
        self.count, self.real = 0, torch.autograd.grad

        def counted(*args: Any, **options: Any) -> Any:
            self.count += 1
            return self.real(*args, **options)

        torch.autograd.grad = counted
        return self

    def __exit__(self, *_: object) -> None:
        torch.autograd.grad = self.real


@pytest.mark.parametrize("influence_type", ["up", "perturbation"])
def test_failures_that_are_returned_are_nan_rows_with_their_status(influence_type: Any) -> None:
    model, train, test = labelled()
    wrapped = TorchTwiceDifferentiable(model.double(), F.cross_entropy)
    train, test = ([(x.double(), y) for x, y in data] for data in (train, test))
    options: dict[str, Any] = {"test_data": test, "influence_type": influence_type, "on_failure": "return"}
    options |= {"curvature": "hessian", "damping": 0}
    found = compute_influences(wrapped, train, solver="direct", **options)
    assert found.info["status"] in ("negative_curvature", "singular")
    assert found.info["statuses"] == [found.info["status"]] * 5
    assert not found.info["success"]
    assert found.shape[:2] == (5, 24)
    assert found.values.isnan().all() or found.values.isfinite().all()
    assert "no residual computed" in repr(found)


# ---- status words --------------------------------------------------------------------------------------------------


def test_attainable_has_a_level_and_does_not_raise() -> None:
    A = Matrix(spectrum(torch.logspace(0, -5.5, 30)).float(), symmetric=True, positive=True)
    b = draw(2, 30).float()
    seen = set()
    for solver in (Direct(tolerance=1e-7), CG(tolerance=1e-7), MINRES(tolerance=1e-7)):
        solution = solve(A, b, solver, on_failure="return")
        for status, residual, level in zip(
            solution.status, solution.residual, solution.info["attainable"], strict=True
        ):
            seen.add(str(status))
            assert (status == "attainable") <= (1e-7 < float(residual) <= float(level) < 1)
        if set(solution.status) == {"attainable"}:
            assert solution.success
            assert not solution.converged
            assert f"rounding allows {float(solution.info['attainable'].max()):.1e}" in repr(solution)
            solve(A, b, solver)
    assert "attainable" in seen


def test_methods_without_a_tolerance_are_approximate_and_warn_once_where_they_are_no_better_than_zero() -> None:
    A, b = Matrix(spectrum(torch.logspace(0, -2, 30)), symmetric=True, positive=True), draw(4, 30)
    for solver in (Lanczos(rank=3), Nystrom(rank=3)):
        good = solve(A, b, solver, damping=10.0)
        assert set(good.status) == {"approximate"}
        assert good.worst < 1
        prepared = solver.prepare(A, 1e-6)
        with pytest.warns(JacopsWarning, match="4 of 4 approximate solutions.*1 or more.*Raise `damping`"):
            bad = prepared.solve(b)
        prepared.solve(b)  # once: a second warning would be an error here
        assert bad.worst > 1
        assert bad.success
        assert "4 approximate, worst residual" in repr(bad)


def wrapped_net() -> tuple[TorchTwiceDifferentiable, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return TorchTwiceDifferentiable(model, F.cross_entropy), [(draw(20, 4), torch.arange(20) % 3)]


@pytest.mark.parametrize("solver", [EKFAC, lambda **o: Nystrom(rank=5, **o), lambda **o: Lanczos(rank=5, **o)])
def test_an_influence_that_was_not_checked_is_unchecked(solver: Any) -> None:
    wrapped, data = wrapped_net()
    options: dict[str, Any] = {"curvature": "ggn", "damping": 5.0}
    blind = compute_influences(wrapped, data, solver=solver(report_residual=False), **options)
    asked = compute_influences(wrapped, data, solver=solver(report_residual=True), **options)
    assert torch.equal(blind.values, asked.values)
    assert blind.info["status"] == "unchecked"
    assert set(blind.info["statuses"]) == {"unchecked"}
    assert blind.info["success"]
    assert not blind.info["converged"]
    assert all(math.isnan(residual) for residual in blind.info["residual"])
    assert "unchecked, no residual computed" in repr(blind)
    assert "0.0e" not in repr(blind)
    assert asked.info["status"] == "approximate"
    assert f"approximate, worst residual {max(asked.info['residual']):.1e}" in repr(asked)
    factors = jacops.compute_influence_factors(wrapped, data, data, solver=solver(report_residual=False), **options)
    assert factors.info["status"] == "unchecked"
    assert "unchecked, no residual computed" in repr(factors)


def test_the_worst_status_of_all_tiles_is_the_status_and_figures_by_row_are_whole(monkeypatch: Any) -> None:
    from jacops._influence import _run

    wrapped, data = wrapped_net()
    monkeypatch.setattr(_run, "_TILE_BYTES", 7 * wrapped.num_params * 8)  # three tiles
    found = compute_influences(wrapped, data, curvature="ggn", damping=0.1)
    assert found.info["status"] == "converged"
    assert found.info["converged"]
    for name in ("attainable", "error_bound"):
        assert found.info[name].shape == (20,)


# ---- JAX -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Any:
    module = pytest.importorskip("jax")
    before = module.config.jax_enable_x64
    module.config.update("jax_enable_x64", True)
    yield module
    module.config.update("jax_enable_x64", before)


def apply(q: Any, x: Any) -> Any:
    return (x @ q["a"]) ** 2 @ q["b"]


def squares(output: Any, y: Any) -> Any:
    return ((output - y) ** 2).mean()


def jax_net(jax: Any, **more: Any) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    params = {"a": jax.numpy.asarray(rng.normal(size=(3, 2))), "b": jax.numpy.asarray(rng.normal(size=(2, 2))), **more}
    return jacops.JaxTwiceDifferentiable(apply, params, squares), [(x, y)], params


@pytest.mark.parametrize("solver", ["auto", "cg", "arnoldi"])
def test_an_indefinite_hessian_of_a_jax_model_is_a_solve_error(jax: Any, solver: str) -> None:
    wrapped, data, _ = jax_net(jax)
    options: dict[str, Any] = {"curvature": "hessian", "damping": 0}
    with pytest.raises(SolveError, match="negative_curvature") as caught:
        compute_influences(wrapped, data, solver=solver, **options)
    assert not isinstance(caught.value, NonFiniteError)
    returned = compute_influences(wrapped, data, solver=solver, on_failure="return", **options)
    assert returned.info["status"] == "negative_curvature"
    assert len(returned.info["statuses"]) == 6
    assert bool(Problem(wrapped, data=data).hessian().dense().isfinite().all())


def test_none_leaves_of_a_jax_tree_are_passed_on(jax: Any) -> None:
    plain, data, _ = jax_net(jax)
    expected = compute_influences(plain, data, curvature="ggn", damping=2.0)
    wrapped, _, params = jax_net(jax, **{"0": None, "tail": [None, {"deep": None}]})
    found = compute_influences(wrapped, data, curvature="ggn", damping=2.0)
    assert torch.equal(found.values, expected.values)
    assert found.info["parameters"] == expected.info["parameters"] == 10
    x, y = data[0]
    gradient = wrapped.grad(x, y, create_graph=True)
    whole = wrapped.mvp(gradient, np.ones(10), params)  # the whole tree, None leaves included
    assert np.array_equal(whole, wrapped.mvp(gradient, np.ones(10), wrapped.parameters))
    assert jax.tree_util.tree_structure(wrapped.model.params) == jax.tree_util.tree_structure(params)


def test_nothing_warns_in_a_plain_run() -> None:
    wrapped, data = wrapped_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_influences(wrapped, data, curvature="ggn", damping=0.1).info["success"]
