"""Each solver by itself: textbook counts, preconditioners, the space of rows, low rank, what Auto chooses."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg as scipy_solvers
import torch
import torch.nn.functional as F
from torch import nn

import jacops
from jacops.errors import InputError, SolveError
from jacops.linalg import Diagonal, Identity, Matrix, Operator, Space
from jacops.solvers import CG, MINRES, Auto, Direct, Lanczos, LiSSA, Nystrom, inverse_quadratic_bounds, solve
from small import draw, small_net
from solver_cases import F32, F64, attainable, falling, operators, rotated, true_residual

POOR = pytest.mark.filterwarnings("ignore:.*approximate solutions have a relative residual")  # worse than zero


class Lazy(Operator):
    """A matrix that only multiplies, as derivatives do, and counts."""

    def __init__(self, matrix: Matrix, positive: bool | None = None) -> None:
        self.matrix, self.rows = matrix, 0
        self.symmetric = True
        self.positive = matrix.positive if positive is None else positive

    @property
    def domain(self) -> Space:
        return self.matrix.domain

    codomain = domain

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows += rows.shape[0]
        return self.matrix._apply(rows)

    _apply_transpose = _apply


def textbook(A: torch.Tensor, b: torch.Tensor, tolerance: float) -> int:
    """Return the steps of conjugate gradients as every textbook writes them (D7)."""
    r, p, steps = b.clone(), b.clone(), 0
    while r.norm() > tolerance * b.norm():
        Ap = A @ p
        pace = (r @ r) / (p @ Ap)
        fresh = r - pace * Ap
        p = fresh + (fresh @ fresh) / (r @ r) * p
        r, steps = fresh, steps + 1
    return steps


@pytest.mark.parametrize(("n", "condition"), [(6, 20), (20, 50), (20, 300), (60, 1000)])
def test_conjugate_gradients_take_textbook_steps(n: int, condition: float) -> None:
    A, b = rotated(falling(n, condition), positive=True), draw(3, n, seed=5)
    solution = solve(A, b, CG(block=False))
    for row, steps in zip(b, solution.iterations, strict=True):
        expected = textbook(A.matrix, row, 1e-8)
        assert abs(steps - expected) <= max(1, expected // 15)  # rounding delays either, by the processor's kernels
        counted: list[int] = []
        scipy_solvers.cg(A.matrix.numpy(), row.numpy(), rtol=1e-8, callback=lambda _, c=counted: c.append(1))
        assert abs(steps - len(counted)) <= max(1, expected // 25)


def test_d7_five_nineteen_nineteen() -> None:
    """A random quadratic in six unknowns ends in at most six steps, as theory has it."""
    A, b = rotated(falling(6, 50), positive=True), draw(4, 6, seed=2)
    assert max(solve(A, b, CG(block=False)).iterations) <= 6
    assert max(solve(A, b, CG()).iterations) <= 2  # four right-hand sides share one space of six


def test_minres_takes_the_steps_of_scipy() -> None:
    A, b = operators(F64)["indefinite"], draw(2, 15)
    solution = solve(A, b, MINRES())
    for row, steps in zip(b, solution.iterations, strict=True):
        residuals: list[float] = []

        def follow(x: np.ndarray, row: torch.Tensor = row, residuals: list[float] = residuals) -> None:
            residuals.append(float(np.linalg.norm(row.numpy() - A.matrix.numpy() @ x) / np.linalg.norm(row.numpy())))

        scipy_solvers.minres(A.matrix.numpy(), row.numpy(), rtol=1e-14, callback=follow)
        assert abs(steps - (1 + next(i for i, left in enumerate(residuals) if left <= 1e-8))) <= 1
    assert solution.info["lowest_curvature"] < 0


def test_block_and_single_agree_and_the_block_is_shorter() -> None:
    A, b = rotated(falling(200, 1e4), positive=True), draw(20, 200)
    block, single = solve(A, b, CG()), solve(A, b, CG(block=False))
    torch.testing.assert_close(block.x, single.x, rtol=1e-4, atol=1e-4)
    assert block.info["products"] < 0.5 * single.info["products"]


def test_repeated_right_hand_sides_cost_no_products() -> None:
    A = Lazy(rotated(falling(100, 1e3), positive=True))
    b = draw(2, 100)
    solve(A, b, CG())
    alone, A.rows = A.rows, 0
    solution = solve(A, torch.cat([b, b, b[:1] + b[1:], -b]), CG())
    assert solution.converged
    assert A.rows <= 1.25 * alone  # true residuals are looked at row by row, and rounding may ask for one step more
    assert solution.info["products"] == A.rows


@pytest.mark.parametrize("block", [True, False])
def test_nystrom_preconditioner_follows_its_rule(block: bool) -> None:
    values = falling(300, 1e10)
    A, b = Lazy(rotated(values, positive=True)), draw(5, 300)
    plain = solve(A, b, CG(block=block, max_steps=5000), damping=1e-6)
    good = solve(A, b, CG("nystrom", block=block), damping=1e-6)
    assert good.info["products"] < 0.5 * plain.info["products"]
    rank = good.info["rank"]
    assert rank <= 256
    assert float(values[rank - 1]) <= 10e-6 * 1.01
    assert good.info["effective_dimension"] == pytest.approx(float((values / (values + 1e-6)).sum()), rel=0.2)
    assert solve(A, b, CG("nystrom", rank=20, block=block), damping=1e-3).info["rank"] == 20


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_jacobi_corrects_scales(block: bool, dtype: torch.dtype) -> None:
    scale = torch.logspace(0, 2, 40, dtype=F64)
    inner = rotated(falling(40, 5), positive=True).matrix
    A = Matrix((scale[:, None] * inner * scale).to(dtype), symmetric=True, positive=True)
    b = draw(2, 40, dtype=dtype)
    good = solve(A, b, CG("jacobi", block=block))
    assert max(good.iterations) < max(solve(A, b, CG(block=block), on_failure="return").iterations)


def test_operators_and_solvers_precondition() -> None:
    A, b = rotated(falling(40, 1e4), positive=True), draw(1, 40)
    perfect = Matrix(torch.linalg.inv(A.matrix), symmetric=True, positive=True)
    for block in (True, False):
        assert max(solve(A, b, CG(perfect, block=block)).iterations) <= 2
        assert max(solve(A, b, CG(Nystrom(rank=40), block=block), damping=1e-3).iterations) <= 2


@pytest.mark.parametrize("block", [True, False])
def test_a_preconditioner_that_is_not_definite_is_a_breakdown(block: bool) -> None:
    A, b = rotated(falling(10, 10), positive=True), draw(2, 10)
    for inner in (-1.0 * Identity(A.domain), Diagonal(torch.zeros(10, dtype=F64))):
        with pytest.raises(SolveError, match="preconditioner is not positive definite.*another preconditioner") as e:
            solve(A, b, CG(inner, block=block))
        assert set(e.value.solution.status) == {"breakdown"}


def test_lissa_stops_at_the_first_growth_and_names_a_scale_that_works() -> None:
    A, b = rotated(3 * falling(12, 20), positive=True), draw(3, 12)
    b[1] = 0
    solution = solve(A, b, LiSSA(scale=1.0), on_failure="return")
    assert [str(status) for status in solution.status] == ["diverged", "converged", "diverged"]
    assert max(solution.iterations) == 10
    assert solve(A, b, LiSSA(scale=solution.info["scale_needed"])).converged
    assert solve(A, b, LiSSA(scale=1.6)).converged  # above half of the largest eigenvalue is enough


def test_the_complement_counts() -> None:
    """D8: rank 4 of 8, exact with the complement's term."""
    A = rotated(torch.cat([falling(4, 5), torch.zeros(4)]), positive=True)
    b = draw(3, 8)
    exact = solve(A, b, Direct(), damping=0.1).x
    for solver in (Lanczos(rank=4), Nystrom(rank=4), Nystrom()):
        solution = solve(A, b, solver, damping=0.1)
        torch.testing.assert_close(solution.x, exact)
        assert solution.info["approximate"]
        assert "approximate" in repr(solution)


def test_lanczos_is_exact_at_full_rank() -> None:
    A, b = operators(F64)["indefinite"], draw(3, 15)
    solution = solve(A, b, Lanczos(rank=15, indefinite=True))
    torch.testing.assert_close(solution.x, torch.linalg.solve(A.matrix, b.T).T)
    assert solution.info["pairs_found"] == 15


@POOR
def test_low_rank_says_how_far_it_is() -> None:
    A, b = rotated(falling(60, 1e4), positive=True), draw(3, 60)
    for solver in (Lanczos(rank=5), Nystrom(rank=5)):
        solution = solve(A, b, solver, damping=1e-3)
        assert set(solution.status) == {"approximate"}
        torch.testing.assert_close(solution.residual, true_residual(A, 1e-3, solution.x, b))
        assert solution.worst > 1e-2


def test_eigenpairs_that_did_not_converge_are_counted() -> None:
    A = rotated(torch.linspace(1, 2, 200, dtype=F64), positive=True)
    with pytest.raises(SolveError, match=r"Only \d+ of 20 eigenpairs.*max_steps") as caught:
        solve(A, draw(1, 200), Lanczos(rank=20, max_steps=25), damping=0.1)
    assert 0 <= caught.value.solution.info["pairs_found"] < 20


def test_repeated_eigenvalues_come_out_whole() -> None:
    A, b = rotated(torch.tensor([2.0, 2.0, 2.0, 1.0, 0.0, 0.0]), positive=True), draw(2, 6)
    exact = solve(A, b, Direct(), damping=0.1).x
    torch.testing.assert_close(solve(A, b, Lanczos(rank=4), damping=0.1).x, exact)


def wide(m: int, n: int, dtype: torch.dtype = F64) -> Matrix:
    return Matrix(draw(m, n, seed=4, dtype=dtype) / math.sqrt(n))


def with_core(J: Matrix) -> Operator:
    m = J.shape[0]
    core = draw(m, m // 2, seed=6, dtype=J.domain.dtype)  # singular, as softmax's is
    return J.T @ Matrix(core @ core.T, symmetric=True, positive=True) @ J


DUALS: dict[str, Callable[[Matrix], Operator]] = {
    "gram": lambda J: J.T @ J,
    "scaled": lambda J: 0.25 * (J.T @ J),
    "core": with_core,
    "shifted": lambda J: 0.5 * (J.T @ J) + 0.01 * Identity(J.domain),
    "shift first": lambda J: Identity(J.domain) + with_core(J),
}


@pytest.mark.parametrize("case", DUALS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_few_rows_are_solved_in_their_own_space(case: str, dtype: torch.dtype) -> None:
    A, b = DUALS[case](wide(10, 80, dtype)), draw(4, 80, dtype=dtype)
    solution = solve(A, b, Direct(), damping=0.05)
    assert "rows" in solution.method
    expected = torch.linalg.solve(A.dense().double() + 0.05 * torch.eye(80, dtype=F64), b.double().T).T
    tolerance = 5e-4 if dtype == F32 else 1e-9
    torch.testing.assert_close(solution.x.double(), expected, rtol=tolerance, atol=tolerance)
    assert bool(((solution.x.double() - expected).norm(dim=1) <= solution.info["error_bound"]).all())
    assert "rows" not in solve(A, b, Direct(dual=False), damping=0.05).method


def test_the_space_of_rows_needs_damping_and_few_rows() -> None:
    J = wide(10, 8)
    assert solve(J.T @ J, draw(1, 8), Direct(), damping=0.1).method == "direct"
    assert "rows" in solve(J.T @ J, draw(1, 8), Direct(dual=True), damping=0.1).method
    J = wide(3, 8)
    with pytest.raises(SolveError, match="singular"):
        solve(J.T @ J, draw(1, 8), Direct())
    with pytest.raises(SolveError, match="singular to rounding"):
        solve(J.T @ J, draw(1, 8), Direct(), damping=1e-17)


def test_the_space_of_rows_of_a_model() -> None:
    model, x, y = small_net(), draw(3, 3), torch.tensor([0, 1, 0])
    A = jacops.ggn(model, nn.CrossEntropyLoss(), x, y)
    assert A.shape == (26, 26)
    solution = solve(A, draw(2, 26), Direct(), damping=1e-3)
    assert "rows" in solution.method
    assert float(true_residual(Matrix(A.dense()), 1e-3, solution.x, draw(2, 26)).max()) < 1e-10
    fisher = jacops.linalg.empirical_fisher(model, nn.CrossEntropyLoss(), x, y)
    assert "rows" in solve(fisher, draw(2, 26), damping=1e-3).method


@POOR
@pytest.mark.parametrize("recipe", [Lanczos, Nystrom])
def test_low_rank_answers_may_go_unchecked(recipe: type) -> None:
    A, b = Lazy(rotated(falling(30, 1e3), positive=True)), draw(4, 30)
    asked = solve(A, b, recipe(rank=5), damping=0.1)
    blind = solve(A, b, recipe(rank=5, report_residual=False), damping=0.1)
    torch.testing.assert_close(blind.x, asked.x)
    assert bool(blind.residual.isnan().all())
    assert not bool(asked.residual.isnan().any())
    assert set(blind.status) == {"unchecked"}
    assert blind.success
    assert not blind.converged
    assert "no residual computed" in repr(blind)
    assert blind.info["products"] == asked.info["products"] - 4
    assert solve(A, b * torch.nan, recipe(rank=5, report_residual=False), on_failure="return").status[0] != "converged"


def test_direct_reports_inertia_and_condition() -> None:
    A, b = operators(F64)["indefinite"], draw(3, 15)
    solution = solve(A, b, Direct(indefinite=True))
    assert solution.info["negative_eigenvalues"] == int((torch.linalg.eigvalsh(A.matrix) < 0).sum())
    solution = solve(rotated(falling(30, 1e6), positive=True), draw(2, 30), "direct")
    assert solution.info["condition"] == pytest.approx(1e6, rel=0.2)
    close = rotated(falling(30, 3e6), dtype=F32, positive=True)
    b = draw(1, 30, dtype=F32)
    assert solve(close, b, Direct(), on_failure="return").status == ("singular",)
    assert solve(close, b, Direct(max_condition=math.inf)).worst < 0.1


def test_a_large_indefinite_matrix_is_distinguished_from_a_singular_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacops.solvers._direct._EXACT_SPECTRUM", 10)
    values = torch.cat([torch.linspace(-0.16, -0.01, 12), torch.linspace(0.01, 0.3, 270), torch.tensor([8.0, 50.0])])
    A, b = rotated(values, dtype=F32), draw(2, len(values), dtype=F32)
    refused = solve(A, b, Direct(), on_failure="return")
    assert refused.status == ("negative_curvature",) * 2
    assert refused.info["lowest_curvature"] == pytest.approx(-0.16, rel=0.05)
    assert solve(A, b, Direct(indefinite=True)).info["negative_eigenvalues"] == 12


def test_refinement_takes_single_precision_to_its_level() -> None:
    A, b = rotated(falling(60, 1e5), dtype=F32, positive=True), draw(4, 60, dtype=F32)
    solution = solve(A, b, Direct(tolerance=1e-7), on_failure="return")
    assert bool((true_residual(A, 0, solution.x, b) <= attainable(A, 0, solution.x, b)).all())


def test_auto_says_what_it_chose() -> None:
    small = rotated(falling(20, 10), positive=True)
    assert "fit as a matrix" in solve(small, draw(1, 20)).info["chosen"]
    positive = Lazy(rotated(falling(600, 1e3), positive=True))
    tried = solve(positive, draw(1, 600), damping=0.01)
    assert "CG" in tried.info["chosen"]
    assert tried.info["products"] < 0.4 * 600
    hard = solve(positive, draw(30, 600), damping=1e-9)
    assert "direct" in hard.info["chosen"]
    large = Auto(budget=1000)
    assert "nystrom" in solve(positive, draw(1, 600), large, damping=0.01).info["preconditioner"]
    assert solve(Lazy(small, positive=False), draw(1, 20), large).info["chosen"].startswith("MINRES")
    indefinite = Lazy(operators(F64)["indefinite"])
    assert solve(indefinite, draw(1, 15), large).info["lowest_curvature"] < 0
    assert solve(indefinite, draw(1, 15)).info["negative_eigenvalues"] > 0
    for solver in (Auto(budget=1000, indefinite=False), Auto(indefinite=False)):
        with pytest.raises(SolveError, match="not positive definite"):
            solve(indefinite, draw(1, 15), solver)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e8])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("fits", [True, False])
def test_auto_is_near_the_best(condition: float, k: int, fits: bool) -> None:
    """Within one and a half times the products of the best one that converges."""
    A, b = Lazy(rotated(falling(400, 1e10), positive=True)), draw(k, 400)
    costs = []
    for rival in [CG(max_steps=200), CG("nystrom", max_steps=200)] + [Direct()] * fits:
        solution = solve(A, b, rival, damping=1 / condition, on_failure="return")
        if solution.converged:
            costs.append(solution.info["products"] + (400 / 6 if rival == Direct() else 0))
    found = solve(A, b, Auto() if fits else Auto(budget=1000), damping=1 / condition)
    cost = found.info["products"] + (400 / 6 if "direct" in found.method else 0)
    assert cost <= 1.5 * min(costs), (cost, costs, found)


def test_prepared_solvers_are_used_again() -> None:
    A = Lazy(rotated(falling(300, 1e6), positive=True))
    prepared = Auto().prepare(A, 1e-4)
    for seed in range(8):
        assert prepared.solve(draw(10, 300, seed=seed)).converged
    assert A.rows < 2 * 300 + 16 * 10


def test_quadrature_brackets_self_influences() -> None:
    A, b = rotated(falling(80, 1e8), positive=True), draw(6, 80)
    b[2] = 0
    exact = (b * solve(A, b, Direct(), damping=1e-3).x).sum(1)
    before = None
    for steps in (1, 3, 10, 30, 80, 200):
        bounds = inverse_quadratic_bounds(A, b, damping=1e-3, steps=steps)
        slack = 1e-9 * exact
        assert bool((bounds.lower <= exact + slack).all())
        assert bool((bounds.upper >= exact - slack).all())
        if before is not None:
            assert bool((bounds.lower >= before.lower - slack).all())
            assert bool((bounds.upper <= before.upper + slack).all())
        before = bounds
    torch.testing.assert_close(before.lower, before.upper)
    assert float(before.upper[2]) == 0
    with pytest.raises(InputError, match="damping above 0"):
        inverse_quadratic_bounds(A, b, damping=0.0)
    with pytest.raises(InputError, match="positive one"):
        inverse_quadratic_bounds(operators(F64)["indefinite"], draw(1, 15), damping=0.1)


def test_a_hessian_of_a_model_solves_by_name() -> None:
    model, x, y = small_net(), draw(7, 3), draw(7, 2)
    A = jacops.hessian(model, F.mse_loss, x, y)
    b = draw(3, 26)
    exact = solve(A, b, Direct(indefinite=True), damping=1.0).x
    for name in ("auto", "direct", "cg", "minres", "lissa"):
        torch.testing.assert_close(solve(A, b, name, damping=1.0).x, exact, rtol=1e-5, atol=1e-6)
