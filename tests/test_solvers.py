"""Laws over all solvers and matrices of every kind: what is called converged is, and what is not says what to do."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from jacops.errors import InputError, InputTypeError, JacopsError, NonFiniteError, SolveError
from jacops.linalg import Diagonal, Matrix, Operator
from jacops.solvers import CG, MINRES, Auto, Direct, LiSSA, Solution, Solver, Status, inverse, solve, solver_of
from jacops.testing import check_operator
from small import draw
from solver_cases import F32, F64, SOLVERS, attainable, falling, operators, rotated, true_residual

# Low rank answers that are worse than zero warn; these tests look at their statuses and residuals.
pytestmark = pytest.mark.filterwarnings("ignore:.*approximate solutions have a relative residual")
APPROXIMATE = {"lanczos", "nystrom"}
KINDS = list(operators(F64))


def check_statement(operator: Matrix, damping: float, b: torch.Tensor, solution: Solution) -> None:
    """Hold a solution to the truth, row by row."""
    k = b.shape[0]
    assert solution.x.shape == b.shape
    assert solution.x.dtype == b.dtype
    assert len(solution.status) == len(solution.iterations) == len(solution.residual) == k
    assert all(isinstance(status, str) for status in solution.status)
    left, reach = true_residual(operator, damping, solution.x, b), attainable(operator, damping, solution.x, b)
    for i, status in enumerate(solution.status):
        if not bool(b[i].any()):
            assert (status, solution.iterations[i]) == ("converged", 0)
            assert not solution.x[i].any()
            continue
        assert (status == Status.APPROXIMATE) <= solution.info["approximate"]
        if status in (Status.CONVERGED, Status.ATTAINABLE, Status.APPROXIMATE):
            assert solution.x[i].isfinite().all()
            assert float(solution.residual[i]) == pytest.approx(float(left[i]), rel=1e-3, abs=2 * float(reach[i]))
        if status == Status.CONVERGED:
            assert float(left[i]) <= solution.info["tolerance"] * (1 + 1e-6) + 2 * float(reach[i])
            assert not solution.info["approximate"]
        if status == Status.ATTAINABLE:
            assert solution.info["tolerance"] < float(solution.residual[i]) < 1
            assert float(solution.residual[i]) <= float(solution.info["attainable"][i])
            assert float(left[i]) <= float(reach[i]) * (1 + 1e-6) + 1e-15, (solution, left[i], reach[i])
        assert status in set(Status)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_reports_true_residuals_on_every_matrix(
    name: str, kind: str, dtype: torch.dtype, damping: float
) -> None:
    operator = operators(dtype)[kind]
    n = operator.shape[0]
    b = draw(5, n, seed=3, dtype=dtype)
    b[1], b[3] = 0, b[0]
    solution = solve(operator, b, SOLVERS[name], damping=damping, on_failure="return")
    check_statement(operator, damping, b, solution)
    assert repr(solution)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("k", [0, 1, 5, 12, 40])
def test_any_number_of_right_hand_sides(name: str, k: int) -> None:
    operator, b = rotated(falling(12, 30), positive=True), draw(k, 12, seed=1)
    solution = solve(operator, b, SOLVERS[name], damping=0.1)
    assert solution.success
    assert solution.converged == (name not in APPROXIMATE or k == 0)
    expected = torch.linalg.solve(operator.matrix + 0.1 * torch.eye(12, dtype=F64), b.T).T
    if name not in APPROXIMATE:
        torch.testing.assert_close(solution.x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_rows_do_not_spoil_good_ones(name: str) -> None:
    operator, b = rotated(falling(12, 30), positive=True), draw(6, 12, seed=1)
    alone = solve(operator, b, SOLVERS[name], damping=0.1).x
    b[2, 3], b[4] = math.nan, 0
    b[5, 0] = math.inf
    solution = solve(operator, b, SOLVERS[name], damping=0.1, on_failure="return")
    good = "approximate" if name in APPROXIMATE else "converged"
    assert [str(status) for status in solution.status] == [
        *(good, good, "nonfinite_input", good),
        *("converged", "nonfinite_input"),
    ]
    torch.testing.assert_close(solution.x[[0, 1, 3]], alone[[0, 1, 3]], rtol=1e-6, atol=1e-7)
    assert solution.x[[2, 5]].isnan().all()
    with pytest.raises(SolveError, match=r"first at index \(2, 3\)") as caught:
        solve(operator, b, SOLVERS[name], damping=0.1)
    assert isinstance(caught.value.solution, Solution)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("size", [1e-290, 1e-30, 1e30, 1e250])
def test_the_size_of_a_right_hand_side_does_not_matter(name: str, size: float) -> None:
    operator, b = rotated(falling(12, 30), positive=True), draw(3, 12, seed=1)
    expected = solve(operator, b, SOLVERS[name], damping=0.1).x
    torch.testing.assert_close(solve(operator, b * size, SOLVERS[name], damping=0.1).x / size, expected)


def test_tiny_gradients_in_single_precision() -> None:
    operator, b = rotated(falling(12, 30), dtype=F32, positive=True), draw(3, 12, seed=1, dtype=F32)
    for name, solver in SOLVERS.items():
        small = solve(operator, b * 1e-30, solver, damping=0.1).x * 1e30
        torch.testing.assert_close(small, solve(operator, b, solver, damping=0.1).x, rtol=1e-4, atol=1e-4, msg=name)


def systems() -> st.SearchStrategy[tuple[Matrix, torch.Tensor, float]]:
    def build(n: int, k: int, kind: str, log: float, dtype: torch.dtype, seed: int, log_damping: float | None) -> tuple:
        values = falling(n, 10.0**log)
        if kind == "singular":
            values[n // 2 :] = 0
        if kind == "indefinite":
            values[::2] *= -1
        operator = rotated(values, seed=seed, dtype=dtype, positive=kind != "indefinite")
        b = draw(k, n, seed=seed + 1, dtype=dtype)
        return operator, b, 0.0 if log_damping is None else 10.0**log_damping

    return st.builds(
        build,
        st.integers(1, 50),
        st.integers(1, 6),
        st.sampled_from(["positive", "positive", "singular", "indefinite"]),
        st.floats(0, 12),
        st.sampled_from([F32, F64]),
        st.integers(0, 10_000),
        st.none() | st.floats(-9, 0),
    )


ITERATIVE = [CG(max_steps=300), CG(block=False, max_steps=300), CG("nystrom", max_steps=300), MINRES(max_steps=300)]
EVERYWHERE = st.sampled_from([Direct(), Direct(indefinite=True), Auto(), LiSSA(max_steps=100), *ITERATIVE])


def converged_is_true(system: tuple[Matrix, torch.Tensor, float], solver: Solver) -> None:
    operator, b, damping = system
    solution = solve(operator, b, solver, damping=damping, on_failure="return")
    check_statement(operator, damping, b, solution)
    bound = solution.info.get("error_bound")
    if bound is not None:
        matrix = operator.matrix.double() + damping * torch.eye(b.shape[1], dtype=F64)
        # the matrix as rounded may be indefinite by rounding, where there is nothing to hold the bound to
        if float(torch.linalg.eigvalsh(matrix)[0]) >= damping * (1 - 1e-9) and damping > 1e-7:
            exact = torch.linalg.solve(matrix, b.double().T).T
            off = (solution.x.double() - exact).norm(dim=1)
            assert bool((off <= bound * (1 + 1e-6) + 1e-12 * exact.norm(dim=1)).all())


@hypothesis.given(systems(), EVERYWHERE)
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
def test_converged_is_true(system: tuple[Matrix, torch.Tensor, float], solver: Solver) -> None:
    converged_is_true(system, solver)


@pytest.mark.slow
@hypothesis.given(systems(), EVERYWHERE)
@hypothesis.settings(max_examples=10_000, deadline=None, derandomize=True)
def test_converged_is_true_ten_thousand_times(system: tuple[Matrix, torch.Tensor, float], solver: Solver) -> None:
    converged_is_true(system, solver)


FAILURES = {
    "negative curvature, direct": (
        Direct(),
        "indefinite",
        "negative_curvature",
        r"curvature is -0\.5.*`damping` of more",
    ),
    "negative curvature, cg": (CG(block=False), "indefinite", "negative_curvature", "GGN"),
    "negative curvature, block": (CG(), "indefinite", "negative_curvature", "MINRES"),
    "negative curvature, auto": (Auto(indefinite=False), "indefinite", "negative_curvature", "Raise it"),
    "negative curvature, lissa": (LiSSA(), "indefinite", "negative_curvature", "Raise it"),
    "negative curvature, lanczos": (SOLVERS["lanczos"], "indefinite", "negative_curvature", "Raise it"),
    "negative curvature, nystrom": (SOLVERS["nystrom"], "indefinite", "negative_curvature", "Raise it"),
    "singular, direct": (Direct(), "singular", "singular", "condition number.*Raise `damping`"),
    "singular, cg": (CG(block=False), "singular", "singular", "Raise `damping`"),
    "singular, block": (CG(), "singular", "singular", "Raise `damping`"),
    "singular, minres": (MINRES(), "singular", "singular", "Raise `damping`"),
    "diverged": (LiSSA(scale=0.2), "well conditioned", "diverged", r"scale=1.* or more"),
    "steps, cg": (CG(block=False, max_steps=3), "ill conditioned", "max_steps", "3 steps.*max_steps.*nystrom"),
    "steps, block": (CG(max_steps=2), "ill conditioned", "max_steps", "2 steps"),
    "steps, minres": (MINRES(max_steps=3), "ill conditioned", "max_steps", "3 steps"),
    "steps, lissa": (LiSSA(max_steps=3), "ill conditioned", "max_steps", "3 steps"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_say_what_to_do(case: str) -> None:
    solver, kind, status, words = FAILURES[case]
    operator = operators(F64)[kind]
    with pytest.raises(SolveError, match=words) as caught:
        solve(operator, draw(3, operator.shape[0], seed=2), solver)
    solution = caught.value.solution
    assert isinstance(solution, Solution)
    assert set(solution.status) == {status}
    assert "damping 0" in str(caught.value)
    assert "on_failure='return'" in str(caught.value)


@pytest.mark.parametrize("solver", [Direct(), CG(), CG(block=False), LiSSA()])
def test_the_damping_asked_for_is_a_lower_bound(solver: Solver) -> None:
    operator = operators(F64)["indefinite"]
    solution = solve(operator, draw(3, 15), solver, damping=0.05, on_failure="return")
    lowest = float(torch.linalg.eigvalsh(operator.matrix)[0])
    assert lowest + 0.05 <= solution.info["lowest_curvature"] * (1 - 1e-12) < 0


def test_an_error_in_single_precision_suggests_double() -> None:
    with pytest.raises(SolveError, match="float64"):
        solve(rotated(falling(20, 1e9), dtype=F32, positive=True), draw(2, 20, dtype=F32), "direct")


def test_a_tolerance_below_rounding_is_taken_to_what_can_be_reached() -> None:
    operator, b = rotated(falling(20, 1e3), dtype=F32, positive=True), draw(2, 20, dtype=F32)
    for solver in (CG(tolerance=1e-12), CG(block=False, tolerance=1e-12), Direct(tolerance=1e-12)):
        solution = solve(operator, b, solver, on_failure="return")
        assert set(solution.status) <= {"converged", "attainable", "stagnated"}
        assert float(solution.info["attainable"].min()) > 1e-8
        check_statement(operator, 0.0, b, solution)


class Overflows(Operator):
    """A symmetric operator whose products are not finite."""

    symmetric = positive = True
    domain = codomain = Matrix(torch.eye(4, dtype=F64)).domain

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * math.inf

    _apply_transpose = _apply


@pytest.mark.parametrize("name", SOLVERS)
def test_products_that_are_not_finite_are_a_breakdown(name: str) -> None:
    solution = solve(Overflows(), draw(2, 4), SOLVERS[name], damping=0.1, on_failure="return")
    assert set(solution.status) == {"breakdown"}


@pytest.mark.parametrize("solver", ["direct", "cg", "minres", "lanczos", "auto"])
def test_the_inverse_is_an_operator(solver: str) -> None:
    operator = rotated(falling(6, 20), positive=True)
    found = inverse(operator, solver, damping=0.3)
    assert found.symmetric
    assert found.positive
    check_operator(found)
    both = found @ operator + 0.3 * found
    torch.testing.assert_close(both.dense(), torch.eye(6, dtype=F64), rtol=1e-6, atol=1e-6)
    assert "6 × 6" in repr(found)


def test_the_inverse_of_a_general_matrix() -> None:
    A = Matrix(draw(6, 6))
    check_operator(inverse(A))
    torch.testing.assert_close(inverse(A).T.dense(), torch.linalg.inv(A.matrix).T)


def test_the_inverse_raises_by_default() -> None:
    operator, v = operators(F64)["indefinite"], draw(15)
    with pytest.raises(SolveError, match="not positive definite"):
        inverse(operator, "cg") @ v
    assert (inverse(operator, "cg", on_failure="return") @ v).shape == (15,)
    with pytest.raises(NonFiniteError):
        inverse(operator, "minres") @ torch.full((15,), math.nan, dtype=F64)


BAD_CALLS = {
    "operator": lambda: solve(torch.eye(3), torch.ones(3)),  # type: ignore[arg-type]
    "shape": lambda: solve(Matrix(torch.ones(3, 2)), torch.ones(2)),
    "half": lambda: solve(Matrix(torch.eye(3, dtype=torch.float16)), torch.ones(3, dtype=torch.float16)),
    "b": lambda: solve(Matrix(torch.eye(3)), [1.0, 2.0, 3.0]),  # type: ignore[arg-type]
    "width": lambda: solve(Matrix(torch.eye(3)), torch.ones(1)),
    "dtype": lambda: solve(Matrix(torch.eye(3)), torch.ones(3, dtype=F64)),
    "damping": lambda: solve(Matrix(torch.eye(3)), torch.ones(3), damping=-1.0),
    "nan damping": lambda: solve(Matrix(torch.eye(3)), torch.ones(3), damping=math.nan),
    "on_failure": lambda: solve(Matrix(torch.eye(3)), torch.ones(3), on_failure="warn"),  # type: ignore[arg-type]
    "solver name": lambda: solve(Matrix(torch.eye(3)), torch.ones(3), "gauss"),
    "solver class": lambda: solve(Matrix(torch.eye(3)), torch.ones(3), CG),  # type: ignore[arg-type]
    "solver kind": lambda: solver_of(3),
    "preconditioner name": lambda: CG("ilu").prepare(Matrix(torch.eye(3))),
    "preconditioner kind": lambda: CG(3).prepare(Matrix(torch.eye(3))),
    "preconditioner shape": lambda: CG(Matrix(torch.eye(2))).prepare(Matrix(torch.eye(3))),
    "asymmetric": lambda: CG().prepare(Matrix(torch.triu(torch.ones(3, 3)))),
    "tolerance": lambda: CG(tolerance=2.0).prepare(Matrix(torch.eye(3))),
    "max_steps": lambda: MINRES(max_steps=0).prepare(Matrix(torch.eye(3))),
    "scale": lambda: LiSSA(scale=-1.0).prepare(Matrix(torch.eye(3))),
    "rank": lambda: SOLVERS["lanczos"].__class__(rank=0).prepare(Matrix(torch.eye(3))),
    "dual": lambda: Direct(dual=True).prepare(Matrix(torch.eye(3))),
    "budget": lambda: Auto(budget=0).prepare(Matrix(torch.eye(3))),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case: str) -> None:
    with pytest.raises((InputError, InputTypeError), match="`") as caught:
        BAD_CALLS[case]()
    assert isinstance(caught.value, JacopsError)


def test_nothing_is_drawn_from_the_global_generator_and_nothing_is_changed() -> None:
    operator, b = rotated(falling(12, 30), positive=True), draw(3, 12)
    kept, matrix, state = b.clone(), operator.matrix.clone(), torch.get_rng_state()
    for solver in SOLVERS.values():
        first = solve(operator, b, solver, damping=0.1).x
        assert torch.equal(first, solve(operator, b, solver, damping=0.1).x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(b, kept)
    assert torch.equal(operator.matrix, matrix)


def test_unmarked_and_composed_operators() -> None:
    d = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    composed: Operator = 2 * Diagonal(d) + Matrix(torch.eye(3, dtype=F64))
    for name, solver in SOLVERS.items():
        solution = solve(composed, torch.ones(3, dtype=F64), solver)
        torch.testing.assert_close(solution.x[0], 1 / (2 * d + 1), rtol=1e-6, atol=1e-7, msg=name)
