"""Traces, diagonals, norms and spectra of operators against dense linear algebra, and whether their error bars hold."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jacops
from cases import OPERATORS, data, net
from jacops._estimators import diagonal, effective_dimension, eigenpairs, norm, spectral_density, spectral_norm, trace
from jacops._lanczos import KrylovSpace
from jacops.errors import InputError, MemoryBudgetError, SolveError
from jacops.linalg import Matrix
from small import draw

SQUARE = [name for name in OPERATORS if OPERATORS[name]().shape[0] == OPERATORS[name]().shape[1] > 0]
SYMMETRIC = [name for name in SQUARE if OPERATORS[name]().symmetric]
N = 60


def rotated(values: Tensor, symmetric: bool = True, seed: int = 0) -> Matrix:
    """A matrix with these singular values (eigenvalues, if symmetric) and random directions."""
    left = torch.linalg.qr(draw(len(values), len(values), seed=seed))[0]
    right = left if symmetric else torch.linalg.qr(draw(len(values), len(values), seed=seed + 1))[0]
    return Matrix((left * values) @ right.T, symmetric=symmetric, positive=symmetric and bool((values >= 0).all()))


COUNTING = torch.arange(1, N + 1, dtype=torch.float64)
SPECTRA: dict[str, Callable[[], Matrix]] = {
    "flat": lambda: rotated(torch.linspace(1, 3, N).double()),
    "powers": lambda: rotated(COUNTING**-2),
    "exponential": lambda: rotated(0.8**COUNTING),
    "a step": lambda: rotated(torch.where(COUNTING < 8, 1.0, 1e-3)),
    "indefinite": lambda: rotated(torch.linspace(-1, 2, N).double() ** 3),
    "not symmetric": lambda: rotated(COUNTING**-1, symmetric=False),
}
spectra = pytest.mark.parametrize("name", SPECTRA)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Exact by default


@pytest.mark.parametrize("name", SQUARE)
def test_exact_values_are_those_of_the_matrix(name: str) -> None:
    operator = OPERATORS[name]()
    dense = operator.dense()
    close(diagonal(operator), dense.diagonal())
    assert tuple(trace(operator)) == (pytest.approx(float(dense.trace()), rel=1e-10, abs=1e-12), 0)


@pytest.mark.parametrize("name", [name for name in OPERATORS if 0 not in OPERATORS[name]().shape])
def test_norms_are_those_of_the_matrix(name: str) -> None:
    operator = OPERATORS[name]()
    dense = operator.dense()
    assert tuple(norm(operator)) == (pytest.approx(float(dense.norm()), rel=1e-10), 0)
    found, exact = spectral_norm(operator), float(torch.linalg.matrix_norm(dense, 2))
    assert found.converged
    assert found.value == pytest.approx(exact, rel=1e-6)
    assert found.value <= exact * (1 + 1e-12)
    assert exact <= found.upper * (1 + 1e-12)


def test_a_gauss_newton_diagonal_goes_through_the_outputs() -> None:
    model, (x, y) = net(), data()
    operator = jacops.ggn(model, F.mse_loss, x[:2], y[:2])
    lin = operator.right.lin  # pyright: ignore[reportAttributeAccessIssue]
    expected = operator.dense().diagonal()
    close(diagonal(operator), expected)
    before = lin.sweeps
    close(diagonal(operator), expected)
    assert lin.sweeps - before <= 2 * y[0].numel() + 1  # once it is proved, by outputs of a sample
    fisher = jacops.linalg.empirical_fisher(model, F.mse_loss, x, y)
    close(diagonal(fisher), fisher.dense().diagonal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_summed_up_in_double(dtype: torch.dtype) -> None:
    matrix = SPECTRA["flat"]().matrix.to(dtype)
    operator = Matrix(matrix, symmetric=True)
    assert trace(operator).value == pytest.approx(float(matrix.double().trace()), rel=1e-12)
    estimate = trace(operator, 10)
    assert abs(estimate.value - float(matrix.double().trace())) < 4 * estimate.standard_error
    assert norm(operator).value == pytest.approx(float(matrix.double().norm()), rel=1e-2)
    found = eigenpairs(operator, 2, tolerance=0.05 if dtype == torch.bfloat16 else None)
    assert float(found.values[0]) == pytest.approx(3, rel=0.02)
    assert found.vectors.dtype == dtype


# Error bars


@spectra
@pytest.mark.parametrize("method", ["xtrace", "hutchinson"])
def test_the_trace_is_unbiased_and_its_error_bar_holds(name: str, method: str) -> None:
    operator = SPECTRA[name]()
    exact = trace(operator).value
    found = [trace(operator, 12, seed, method=method) for seed in range(120)]
    errors = np.array([(e.value - exact) / e.standard_error for e in found])
    assert abs(np.mean([e.value - exact for e in found])) < 4 * np.std([e.value for e in found]) / math.sqrt(120)
    assert 0.5 < math.sqrt(np.mean(errors**2)) < 2
    assert np.mean(np.abs(errors) < 3) > 0.9


@spectra
@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_the_diagonal_is_unbiased_and_its_error_bars_hold(name: str, method: str) -> None:
    operator = SPECTRA[name]()
    exact = operator.matrix.diagonal()
    found = [diagonal(operator, 12, seed, method=method) for seed in range(60)]
    values, bars = (torch.stack([getattr(e, part) for e in found]) for part in ("value", "standard_error"))
    shift = (values.mean(0) - exact) / (values.std(0) / math.sqrt(60))
    assert float((shift**2).mean().sqrt()) < 1.5
    z = (values - exact) / bars
    assert 0.5 < float((z**2).mean().sqrt()) < 1.7
    assert float((z.abs() < 3).double().mean()) > 0.94


def test_leaving_probes_out_beats_averaging_where_the_spectrum_decays() -> None:
    operator = SPECTRA["exponential"]()
    exact = trace(operator).value
    errors = {}
    for method, probes in (("xtrace", 12), ("hutchinson", 24)):  # as many products
        found = [trace(operator, probes, seed, method=method).value for seed in range(30)]
        errors[method, probes] = np.sqrt(np.mean([(value - exact) ** 2 for value in found]))
    assert 3 * errors["xtrace", 12] < errors["hutchinson", 24]


def test_few_directions_or_few_dimensions_are_exact() -> None:
    low = rotated(torch.where(COUNTING < 6, 1.0, 0.0))
    found = trace(low, 12)
    assert found.value == pytest.approx(5, rel=1e-12)
    assert 0 < found.standard_error < 1e-10
    estimate = diagonal(low, 12)
    close(estimate.value, low.matrix.diagonal())
    assert float(estimate.standard_error.max()) < 1e-10
    assert trace(low, N // 2) == trace(low)
    close(diagonal(low, N // 2).value, diagonal(low))
    assert tuple(trace(Matrix(torch.zeros(N, N)), 5)) == (0, 0)


def test_an_estimated_norm_has_a_bar_that_holds() -> None:
    operator = SPECTRA["not symmetric"]()
    found = [norm(operator, 20, seed) for seed in range(100)]
    z = np.array([(e.value - float(operator.matrix.norm())) / e.standard_error for e in found])
    assert 0.5 < math.sqrt(np.mean(z**2)) < 1.8
    assert tuple(norm(Matrix(torch.zeros(4, 3)), 5)) == (0, 0)


def test_seeds_repeat_and_the_global_state_is_not_drawn_from() -> None:
    operator, before = SPECTRA["powers"](), torch.get_rng_state()
    calls = (
        lambda seed: trace(operator, 5, seed).value,
        lambda seed: float(diagonal(operator, 5, seed).value[0]),
        lambda seed: norm(operator, 5, seed).value,
        lambda seed: float(spectral_density(operator, 3, 10, seed=seed).density[100]),
        lambda seed: effective_dimension(operator, 0.1, 4, seed=seed).value,
    )
    for call in calls:
        assert call(3) == call(3) != call(4)
    eigenpairs(operator)
    spectral_norm(operator)
    assert torch.equal(torch.get_rng_state(), before)


# Lanczos and eigenpairs


@pytest.mark.parametrize("n", [2000, 50_000])
def test_float32_does_not_take_a_small_coupling_for_an_invariant_space(n: int) -> None:
    values = torch.linspace(0, 1, n) ** 8
    run = KrylovSpace(lambda rows: rows * values, draw(1, 1, n).float(), 12)
    while run.room:
        run.step()
    exact = KrylovSpace(lambda rows: rows * values.double(), draw(1, 1, n).float().double(), 12)
    while exact.room:
        exact.step()
    torch.testing.assert_close(run.ritz().values, exact.ritz().values, rtol=0, atol=1e-5)
    torch.testing.assert_close(run.ritz().residuals, exact.ritz().residuals, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("n", "block", "runs"), [(7, 2, 1), (7, 3, 2), (40, 1, 3), (40, 8, 1), (1, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_krylov_basis_is_orthonormal_and_finds_multiple_eigenvalues(
    n: int, block: int, runs: int, dtype: torch.dtype
) -> None:
    values = torch.arange(n, dtype=torch.float64).clamp(max=max(n - 3, 0))
    A = rotated(values).matrix.to(dtype)
    run = KrylovSpace(lambda rows: rows @ A, draw(runs, block, n).to(dtype), n)
    while run.room:
        run.step()
    rounding = 100 * torch.finfo(dtype).eps
    assert run.basis.shape == (runs, n, n)
    close(run.basis @ run.basis.mT, torch.eye(n, dtype=dtype).expand(runs, n, n), rounding)
    close(run.ritz().values, values.expand(runs, n), rounding * n)
    assert float(run.ritz().residuals.max()) == 0


@pytest.mark.parametrize("width", [1, 2])
def test_fresh_directions_are_not_the_start_drawn_from_the_same_seed(width: int) -> None:
    """Every space is invariant at once, and the first fresh direction is the start again."""
    start = torch.randn(1, width, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn: list[Tensor] = []

    class Watched(KrylovSpace):
        def _fresh(self, *shape: int) -> Tensor:
            drawn.append(super()._fresh(*shape))
            return drawn[-1]

    run = Watched(lambda rows: 3.0 * rows, start, 7, seed=0)
    while run.room:
        run.step()
    torch.testing.assert_close(run.basis @ run.basis.mT, torch.eye(run.basis.shape[1], dtype=torch.float64)[None])
    torch.testing.assert_close(run.ritz().values, torch.full((1, run.basis.shape[1]), 3.0, dtype=torch.float64))
    assert drawn
    assert not any(torch.equal(each[:, :1], start[:, :1]) for each in drawn)


def test_residuals_of_the_recurrence_are_the_true_ones_also_after_a_restart() -> None:
    A = SPECTRA["indefinite"]().matrix
    run = KrylovSpace(lambda rows: rows @ A, draw(1, 2, N), 16)
    for kept in (None, torch.tensor([0, 1, 12, 13, 14]), torch.tensor([0, 13, 14])):
        if kept is not None:
            run.restart(kept)
        while run.room:
            run.step()
        ritz = run.ritz()
        vectors = run.vectors(ritz.coefficients)[0]
        true = torch.linalg.vector_norm(vectors @ A - ritz.values[0].unsqueeze(1) * vectors, dim=1)
        close(ritz.residuals[0], true)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("name", ["flat", "indefinite", "a step"])
def test_eigenpairs_come_with_true_residuals(name: str, which: str) -> None:
    operator = SPECTRA[name]()
    found = eigenpairs(operator, 5, which)
    every = torch.linalg.eigvalsh(operator.matrix)
    order = {"largest": -every, "smallest": every, "magnitude": -every.abs()}[which].argsort()
    close(found.values, every[order[:5]], 1e-9)
    image = found.vectors @ operator.matrix
    true = torch.linalg.vector_norm(image - found.values.unsqueeze(1) * found.vectors, dim=1)
    close(found.residuals, true)
    assert found.converged
    assert float(true.max()) <= found.tolerance * found.norm
    close(found.vectors @ found.vectors.T, torch.eye(5, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_all_eigenvalues_of_a_small_operator(name: str) -> None:
    operator = OPERATORS[name]()
    n = operator.shape[0]
    found = eigenpairs(operator, n, "smallest")
    close(found.values.sort().values, torch.linalg.eigvalsh(operator.dense()), 1e-8)


def test_what_did_not_converge_says_so() -> None:
    operator = SPECTRA["powers"]()
    with pytest.raises(SolveError, match="max_products") as caught:
        eigenpairs(operator, 3, "smallest", max_products=20)
    assert not caught.value.solution.converged
    found = eigenpairs(operator, 3, "smallest", max_products=20, on_failure="return")
    assert "NOT converged" in repr(found)
    close(found.residuals, caught.value.solution.residuals)
    rough = spectral_norm(SPECTRA["flat"](), max_steps=3)
    assert not rough.converged
    assert rough.value <= 3 <= rough.upper
    assert rough.error > 1e-4


def test_the_bound_on_a_spectral_norm_is_rarely_wrong() -> None:
    operator = SPECTRA["flat"]()
    for seed in range(50):
        found = spectral_norm(operator, max_steps=12, seed=seed)
        assert found.value <= 3 * (1 + 1e-12)
        assert found.upper >= 3
        singular = torch.linspace(1, 3, N).double()
        assert float((singular - found.value).abs().min()) <= found.error * (1 + 1e-6)


# Spectral densities


def test_a_spectral_density_is_that_of_the_eigenvalues_within_its_bars() -> None:
    values = torch.cat([torch.linspace(-1, 1, 180).double() ** 3, torch.tensor([2.0, 2.5, 4.0]).double()])
    operator = rotated(values)
    found = spectral_density(operator, probes=20, steps=60)
    exact = torch.exp(-(((found.grid.unsqueeze(1) - values) / found.width) ** 2) / 2).mean(1)
    exact = exact / (found.width * math.sqrt(2 * math.pi))
    seen = exact > 1e-3 * exact.max()
    z = ((found.density - exact) / found.standard_error)[seen]
    assert float((z**2).mean().sqrt()) < 2
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1, abs=1e-6)
    close(found.weights.sum(1), torch.ones(20, dtype=torch.float64))
    assert found.smallest == pytest.approx(-1, abs=1e-3)
    assert found.largest == pytest.approx(4, abs=1e-6)
    assert found.largest <= 4 * (1 + 1e-12)
    for function, number in ((torch.square, values.square().sum()), (torch.exp, values.exp().sum())):
        estimate = found.trace_of(function)
        assert abs(estimate.value - float(number)) < 4 * estimate.standard_error
    outliers = found.share(1.5, 10)
    assert abs(outliers.value - 3 / 183) < 4 * outliers.standard_error


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_density_with_all_steps_has_the_exact_moments(name: str) -> None:
    operator = OPERATORS[name]()
    n = operator.shape[0]
    found = spectral_density(operator, probes=64, steps=n, seed=1)
    every = torch.linalg.eigvalsh(operator.dense())
    one = found.trace_of(lambda x: x)
    assert abs(one.value - float(every.sum())) <= 5 * one.standard_error + 1e-9 * n
    assert found.largest <= float(every[-1]) + 1e-9
    assert found.smallest >= float(every[0]) - 1e-9


def test_an_effective_dimension_is_exact_or_within_its_bar() -> None:
    operator = SPECTRA["powers"]()
    values = COUNTING**-2
    exact = effective_dimension(operator, 1e-2)
    assert tuple(exact) == (pytest.approx(float((values / (values + 1e-2)).sum()), rel=1e-9), 0)
    found = effective_dimension(operator, 1e-2, probes=30, steps=40)
    assert abs(found.value - exact.value) < 4 * found.standard_error


def test_an_exact_effective_dimension_of_a_large_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacops._estimators._density._DENSE_ENTRIES", 100)
    with pytest.raises(MemoryBudgetError, match="`probes=`"):
        effective_dimension(SPECTRA["powers"](), 1.0)


def test_a_function_that_is_not_finite_on_the_spectrum_is_refused() -> None:
    with pytest.raises(InputError, match="not finite between"):
        spectral_density(SPECTRA["indefinite"](), 2, 10).trace_of(torch.log)
