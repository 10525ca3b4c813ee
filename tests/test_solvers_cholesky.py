"""A symmetric matrix and its Cholesky factor, in one array where LAPACK can work in place, and in two elsewhere."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from scipy.linalg import lapack
from torch import Tensor

from jacops._operators import Matrix
from jacops._runtime import blas
from jacops.errors import SolveError
from jacops.solvers import Direct, _cholesky, solve
from jacops.solvers._cholesky import FactorisedMatrix, cholesky

DTYPES = [torch.float32, torch.float64]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues."""
    turn = torch.linalg.qr(torch.randn(*values.shape * 2, generator=torch.Generator().manual_seed(seed)).double()).Q
    whole = (turn * values.double()) @ turn.T
    return (whole + whole.T) / 2


@pytest.fixture(params=["one array", "two arrays"])
def arrays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_cholesky, "_IN_PLACE", 0 if request.param == "one array" else 2**62)
    return request.param


def factorised(matrix: Tensor) -> FactorisedMatrix:
    found = cholesky(matrix)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (2, 3), (7, 0), (7, 1), (40, 3), (40, 4), (257, 9)])
def test_solves_and_products_are_those_of_the_matrix(
    arrays: str, dtype: torch.dtype, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cholesky, "CHUNK_ENTRIES", 37 * n)  # several blocks of rows, the last one shorter
    matrix = spectrum(torch.linspace(0.5, 3.0, n)).to(dtype)
    rows = torch.randn(k, n, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept, given = matrix.clone(), rows.clone()
    found = factorised(matrix)
    assert (matrix.data_ptr() == getattr(found, "_array", kept).data_ptr()) == (arrays == "one array")
    x = found.solve(rows)
    assert torch.equal(rows, given)
    assert (x.shape, x.dtype) == (rows.shape, dtype)
    expected = torch.linalg.solve(kept.double(), rows.double().T).T
    assert torch.allclose(x.double(), expected, rtol=0, atol=100 * EPS[dtype] * max(1, n) ** 0.5)
    image = found.image(rows.double())
    assert image.dtype == torch.float64
    assert torch.allclose(image, rows.double() @ kept.double(), rtol=0, atol=1e-13 * n)


@pytest.mark.parametrize("rows", ["transposed", "strided", "expanded"])
def test_right_hand_sides_of_any_layout(arrays: str, rows: str) -> None:
    matrix = spectrum(torch.linspace(0.5, 3.0, 12)).float()
    made = torch.randn(12, 12, generator=torch.Generator().manual_seed(2))
    given = {"transposed": made.T[:6], "strided": made[::2], "expanded": made[:1].expand(6, 12)}[rows]
    expected = torch.linalg.solve(matrix, given.T).T
    assert torch.allclose(factorised(matrix.clone()).solve(given), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 30, 200])
@pytest.mark.parametrize("last", [-1.0, 0.0])
def test_what_is_not_definite_is_left_as_it_was(
    arrays: str, dtype: torch.dtype, n: int, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cholesky, "_TILE", 64)
    matrix = torch.zeros(n, n, dtype=dtype)
    matrix[:-1, :-1] = spectrum(torch.linspace(1.0, 2.0, n - 1)).to(dtype) if n > 1 else 0
    matrix[-1, -1] = last  # which is met last
    kept = matrix.clone()
    assert cholesky(matrix) is None
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize("layout", ["transposed", "part of another"])
def test_other_layouts_take_two_arrays(arrays: str, layout: str) -> None:
    matrix = spectrum(torch.linspace(0.5, 3.0, 8)).float()
    wide = torch.zeros(8, 16)
    wide[:, ::2] = matrix
    given = {"transposed": matrix.T, "part of another": wide[:, ::2]}[layout]
    found = factorised(given)
    assert torch.equal(given, matrix)
    rows = torch.eye(8)
    assert torch.allclose(found.image(rows.double()).float(), matrix)
    assert torch.allclose(found.solve(rows) @ matrix, rows, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_direct_gives_the_same_either_way(arrays: str, dtype: torch.dtype) -> None:
    matrix = spectrum(torch.logspace(-2, 1, 60)).to(dtype)
    rows = torch.randn(5, 60, generator=torch.Generator().manual_seed(3)).to(dtype)
    kept = matrix.clone()
    operator = Matrix(matrix, symmetric=True)
    solution = solve(operator, rows, Direct(), damping=0.1)
    assert torch.equal(matrix, kept)  # the caller's own
    damped = (kept + 0.1 * torch.eye(60, dtype=dtype)).double()
    left = torch.linalg.vector_norm(rows.double() - solution.x.double() @ damped, dim=1)
    assert solution.info["factorisation"] == "Cholesky"
    assert solution.info["condition"] == pytest.approx(10.1 / 0.11, rel=0.05)
    size = torch.linalg.vector_norm(rows, dim=1).double()
    assert torch.allclose(solution.residual, left / size, rtol=0.01, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_direct_refuses_and_solves_the_indefinite(arrays: str, dtype: torch.dtype) -> None:
    values = torch.linspace(1.0, 2.0, 50)
    values[::7] *= -1
    operator = Matrix(spectrum(values).to(dtype), symmetric=True)
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(4)).to(dtype)
    refused = solve(operator, rows, Direct(), on_failure="return")
    assert set(refused.status) == {"negative_curvature"}
    assert refused.x.isnan().all()
    assert refused.info["lowest_curvature"] == pytest.approx(float(values.min()), rel=1e-4)
    solution = solve(operator, rows, Direct(indefinite=True))
    assert solution.info["negative_eigenvalues"] == int((values < 0).sum())
    assert torch.allclose(solution.x @ operator.matrix, rows, atol=1e3 * EPS[dtype])


def test_direct_refuses_the_singular_and_the_infinite(arrays: str) -> None:
    rows = torch.randn(2, 20, generator=torch.Generator().manual_seed(5))
    values = torch.linspace(1.0, 2.0, 20)
    values[3] = 1e-9
    with pytest.raises(SolveError, match="condition number"):
        solve(Matrix(spectrum(values).float(), symmetric=True), rows, Direct())
    broken = torch.eye(20)
    broken[4, 4] = math.nan
    with pytest.raises(SolveError, match="NaN"):
        solve(Matrix(broken, symmetric=True), rows, Direct())


def test_a_matrix_that_is_not_as_symmetric_as_it_says_is_found_out(arrays: str) -> None:
    matrix = spectrum(torch.linspace(1.0, 2.0, 30)).float()
    matrix[5, 3] += 0.2  # one triangle of the two
    rows = torch.randn(3, 30, generator=torch.Generator().manual_seed(6))
    solution = solve(Matrix(matrix, symmetric=True), rows, Direct(), on_failure="return")
    left = torch.linalg.vector_norm(rows - solution.x @ matrix.T, dim=1) / torch.linalg.vector_norm(rows, dim=1)
    assert torch.allclose(solution.residual.float(), left, rtol=0.05, atol=1e-6)


def test_routines_are_those_of_scipy_and_keep_the_threads() -> None:
    matrix = spectrum(torch.linspace(0.5, 3.0, 100))
    expected, _ = lapack.dpotrf(matrix.numpy().T.copy(order="F"), lower=1, clean=0)
    before = [library.get_num_threads() for library in blas._blas_libraries()]
    assert blas.in_place("cython_lapack", "potrf", "L", 100, matrix, 100) == 0
    assert np.array_equal(matrix.numpy().T, expected)
    assert blas.in_place("cython_lapack", "potrf", "L", 1, torch.tensor([[-1.0]]), 1) == 1
    assert [library.get_num_threads() for library in blas._blas_libraries()] == before
    with pytest.raises(RuntimeError, match="nothing"):
        blas.in_place("cython_blas", "nothing", matrix)


def test_other_threads_run_meanwhile() -> None:
    matrix = torch.eye(4000, dtype=torch.float64)
    times, ended = list[float](), threading.Event()

    def count() -> None:
        while not ended.wait(0.001):
            times.append(time.perf_counter())

    thread = threading.Thread(target=count)
    thread.start()
    started = time.perf_counter()
    blas.in_place("cython_lapack", "potrf", "L", 4000, matrix, 4000)
    stopped = time.perf_counter()
    ended.set()
    thread.join()
    assert sum(started < moment < stopped for moment in times) > 5  # of some hundred


def test_a_long_int_of_scipy_takes_two_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cholesky, "_IN_PLACE", 0)
    monkeypatch.setattr(blas, "_routine", lambda module, name: None)
    matrix = spectrum(torch.linspace(0.5, 3.0, 8)).float()
    kept = matrix.clone()
    assert factorised(matrix).solve(torch.eye(8)).shape == (8, 8)
    assert torch.equal(matrix, kept)
