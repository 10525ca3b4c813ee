"""Operators and results among NumPy, SciPy and PyTorch: conversions, products from the left, sums with matrices."""

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from cases import OPERATORS
from jacops.errors import InputError, InputTypeError
from jacops.linalg import Estimate, Identity, Matrix, Operator, eye, trace
from jacops.results import Influences
from small import draw, refused, small_net

X, Y = draw(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])


def curvature() -> Operator:
    return jacops.ggn(small_net(), F.cross_entropy, X, Y)


# ---- operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_a_linear_operator_of_scipy(name: str):
    op = OPERATORS[name]()
    taken, dense = op.to_scipy(), op.dense().numpy()
    m, n = op.shape
    assert (taken.shape, taken.dtype) == ((m, n), dense.dtype)
    right, left = draw(n, 3, seed=1).numpy(), draw(m, 2, seed=2).numpy()
    cases = [
        (taken @ right[:, 0], dense @ right[:, 0]),
        (taken @ right[:, :1], dense @ right[:, :1]),
        (taken @ right, dense @ right),
        (taken.rmatvec(left[:, 0]), dense.T @ left[:, 0]),
        (taken.H @ left, dense.T @ left),
        (taken @ (right + 1j * right[::-1]), dense @ (right + 1j * right[::-1])),
    ]
    for actual, expected in cases:
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max(initial=0))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_product_from_the_left_is_one_with_the_transpose(name: str):
    op = OPERATORS[name]()
    dense, rows = op.dense(), draw(3, op.shape[0], seed=3)
    torch.testing.assert_close(rows @ op, rows @ dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rows[0] @ op, rows[0] @ dense, rtol=1e-9, atol=1e-9)
    assert (op.dtype, op.device) == (dense.dtype, dense.device)


def test_solvers_of_scipy_take_operators():
    A = curvature() + 0.1 * eye
    dense, b = A.dense().numpy(), draw(A.shape[0], seed=4).numpy()
    np.testing.assert_allclose(
        np.sort(sla.eigsh(A.to_scipy(), 3, return_eigenvectors=False)), np.linalg.eigvalsh(dense)[-3:], rtol=1e-8
    )
    np.testing.assert_allclose(sla.svds(A.to_scipy(), 1)[1], np.linalg.svd(dense)[1][:1], rtol=1e-8)
    for solve in (sla.cg, sla.minres, sla.gmres):
        x, info = solve(A.to_scipy(), b, rtol=1e-10)
        assert info == 0
        np.testing.assert_allclose(x, np.linalg.solve(dense, b), rtol=1e-5, atol=1e-7)
    J = jacops.jacobian(small_net(), X)
    target = draw(J.shape[0], seed=5).numpy()
    found = sla.lsmr(J.to_scipy(), target, damp=0.1, atol=1e-13, btol=1e-13)[0]
    expected = np.linalg.lstsq(
        np.vstack([J.dense().numpy(), 0.1 * np.eye(J.shape[1])]), np.r_[target, np.zeros(J.shape[1])]
    )[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_lower_precision_come_in_the_wider_dtype(dtype: torch.dtype):
    op = Matrix(draw(4, 3).to(dtype))
    taken = op.to_scipy()
    assert taken.dtype == np.float32
    for vector in (np.ones(3, np.float32), np.ones(3), np.ones(3, np.int64)):
        image = taken @ vector
        assert image.dtype == np.result_type(np.float32, vector.dtype)
        np.testing.assert_allclose(image, (op @ torch.ones(3, dtype=dtype)).float().numpy())


def test_the_adjoint_of_a_complex_operator_is_conjugated():
    entries = torch.complex(draw(4, 3), draw(4, 3, seed=1))
    taken, u = Matrix(entries).to_scipy(), draw(4, seed=2).numpy() * (1 + 2j)
    np.testing.assert_allclose(taken.rmatvec(u), entries.numpy().conj().T @ u)


ARITHMETIC: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "A + s * Identity": (lambda A: A + 0.1 * Identity(A.domain), lambda a, i: a + 0.1 * i),
    "A + s * eye": (lambda A: A + 0.1 * eye, lambda a, i: a + 0.1 * i),
    "eye - A": (lambda A: eye - A, lambda a, i: i - a),
    "A - eye / 4": (lambda A: A - eye / 4, lambda a, i: a - i / 4),
    "A + torch.eye": (lambda A: A + 0.1 * torch.eye(A.shape[0]).double(), lambda a, i: a + 0.1 * i),
    "torch.eye - A": (lambda A: torch.eye(A.shape[0]).double() - A, lambda a, i: i - a),
    "A - B": (lambda A: A - 2 * A, lambda a, i: -a),
    "A / 2": (lambda A: A / 2, lambda a, i: a / 2),
    "-A": (lambda A: -A, lambda a, i: -a),
    "+A": (lambda A: +A, lambda a, i: a),
    "sum([A, A])": (lambda A: sum([A, A]), lambda a, i: 2 * a),
    "float32 * A": (lambda A: np.float32(0.5) * A, lambda a, i: a / 2),
    "float64 * A": (lambda A: np.float64(0.5) * A, lambda a, i: a / 2),
    "A * tensor(s)": (lambda A: A * torch.tensor(0.5), lambda a, i: a / 2),
    "tensor(s) * A": (lambda A: torch.tensor(0.5) * A, lambda a, i: a / 2),
    "Estimate * A": (lambda A: Estimate(0.5, 0.1) * A, lambda a, i: a / 2),
    "(2 * eye - 3 * eye + A) @ A": (lambda A: (2 * eye - 3 * eye + A) @ A, lambda a, i: (a - i) @ a),
    "2 * eye @ A": (lambda A: 2 * eye @ A, lambda a, i: 2 * a),
    "A @ -eye": (lambda A: A @ -eye, lambda a, i: -a),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_that_of_matrices(name: str):
    calculate, expected = ARITHMETIC[name]
    A = curvature()
    found, dense = calculate(A), A.dense()
    assert isinstance(found, Operator)
    torch.testing.assert_close(found.dense(), expected(dense, torch.eye(len(dense)).double()), rtol=1e-12, atol=1e-14)
    assert found.symmetric or "@" in name


def test_damping_keeps_what_solvers_rest_on():
    A = curvature()
    assert (A + 0.1 * eye).positive
    assert not (A - 0.1 * eye).positive
    assert (A + torch.eye(A.shape[0]).double()).symmetric
    assert not (A + torch.ones(A.shape).double().triu()).symmetric
    torch.testing.assert_close(eye @ X, X)
    torch.testing.assert_close((2 * eye) @ [X], [2 * X])
    torch.testing.assert_close((2 * eye) @ {"a": X}, {"a": 2 * X})


REFUSED: dict[str, tuple[Callable[[Operator], Any], type[Exception], str]] = {
    "np.asarray(A)": (np.asarray, InputTypeError, "dense"),
    "np.array(A)": (lambda A: np.array(A, dtype=float), InputTypeError, "to_scipy"),
    "torch.as_tensor(A)": (torch.as_tensor, (RuntimeError, InputTypeError), ""),  # type: ignore[dict-item]
    "aslinearoperator(A)": (sla.aslinearoperator, InputTypeError, "to_scipy"),
    "cg(A, b)": (lambda A: sla.cg(A, np.ones(A.shape[0])), InputTypeError, "to_scipy"),
    "A @ array": (lambda A: A @ np.ones(A.shape[1]), InputTypeError, "torch.as_tensor"),
    "array @ A": (lambda A: np.ones(A.shape[0]) @ A, InputTypeError, "to_scipy"),
    "A + number": (lambda A: A + 0.1, InputTypeError, "eye"),
    "array + A": (lambda A: np.ones(A.shape) + A, InputTypeError, "torch matrix"),
    "short @ A": (lambda A: torch.ones(2).double() @ A, InputError, "entries"),
    "A + float32": (lambda A: A + torch.eye(A.shape[0]), InputError, "float32"),
    "A + small": (lambda A: A + torch.eye(2).double(), InputError, "(2, 2)"),
    "A + vector": (lambda A: A + torch.ones(A.shape[0]).double(), InputTypeError, "eye"),
    "A * vector": (lambda A: A * torch.ones(3), TypeError, ""),
    "A * text": (lambda A: A * "2", TypeError, ""),
    "wide + eye": (lambda A: jacops.jacobian(small_net(), X) + eye, InputError, "square"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_operator_does_not_do_is_refused_with_the_word_for_it(name: str):
    call, kind, words = REFUSED[name]
    with pytest.raises(kind) as caught:
        call(curvature())
    assert words in str(caught.value)


# ---- results -----------------------------------------------------------------------------------------------------


def results() -> dict[str, tuple[Any, Any]]:
    A = curvature() + 0.1 * eye
    wrapped = jacops.TorchTwiceDifferentiable(small_net(), F.cross_entropy)
    influences = jacops.compute_influences(wrapped, [(X, Y)], curvature="ggn", damping=0.1)
    parts = jacops.contributions(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double(), X)
    solution = jacops.solve(A, draw(2, A.shape[0]))
    diagonal = jacops.linalg.diagonal(A, probes=3)
    return {
        "influences": (influences, influences.values),
        "factors": (
            found := jacops.compute_influence_factors(wrapped, [(X, Y)], [(X, Y)], curvature="ggn", damping=0.1),
            found.x,
        ),
        "contributions": (parts, parts.values),
        "solution": (solution, solution.x),
        "diagonal": (diagonal, diagonal.value),
        "trace": (found := trace(A), torch.tensor(found.value, dtype=torch.float64)),
        "spectral norm": (found := jacops.linalg.spectral_norm(A), torch.tensor(found.value, dtype=torch.float64)),
    }


def test_results_convert_as_their_numbers_do():
    for name, (result, expected) in results().items():
        for convert in (torch.as_tensor, torch.asarray, torch.tensor, torch.from_dlpack):
            torch.testing.assert_close(convert(result), expected, rtol=0, atol=0, msg=f"{convert.__name__} of {name}")
        for array in (np.asarray(result), np.array(result), np.asarray(result, dtype=np.float32)):
            np.testing.assert_allclose(array, expected.numpy(), rtol=1e-6)
        assert np.asarray(result).dtype == np.float64
        if expected.ndim == 0:
            assert float(result) == float(expected)


def test_copies_are_made_as_numpy_asks_for_them():
    values = draw(2, 3)
    result = Influences(values, "up", "", "", 0.1, {})
    assert np.shares_memory(np.asarray(result), values.numpy())
    assert np.shares_memory(np.array(result, copy=False), values.numpy())
    assert not np.shares_memory(np.array(result, copy=True), values.numpy())
    with pytest.raises(ValueError, match="copy"):
        np.array(result, dtype=np.float32, copy=False)
    half = Influences(values.bfloat16(), "up", "", "", 0.1, {})
    assert np.asarray(half).dtype == np.float32
    with pytest.raises(ValueError, match="copy"):
        np.array(half, copy=False)
    assert torch.as_tensor(half).dtype == torch.bfloat16
    with_graph = Influences(values.clone().requires_grad_(), "up", "", "", 0.1, {})
    np.testing.assert_array_equal(np.asarray(with_graph), values.numpy())
    assert not torch.as_tensor(with_graph).requires_grad


def test_a_result_of_several_arrays_names_them():
    pairs = jacops.linalg.eigenpairs(curvature(), 2)
    fit = jacops.gauss_newton(lambda x: x - torch.tensor([1.0, 3.0]), params=torch.zeros(1))
    np.testing.assert_array_equal(np.asarray(pairs.values), pairs.values.numpy())
    for result, field in ((pairs, ".values"), (fit, ".fun")):
        for convert in (np.asarray, torch.as_tensor, float):
            refused(InputTypeError, lambda call=convert, it=result: call(it), field)


# ---- numbers with an error ------------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[Callable[[Any], Any], float, float]] = {  # of 4 ± 0.5: value and standard error
    "x + 1": (lambda x: x + 1, 5, 0.5),
    "1 + x": (lambda x: 1 + x, 5, 0.5),
    "x - 1": (lambda x: x - 1, 3, 0.5),
    "1 - x": (lambda x: 1 - x, -3, 0.5),
    "-x": (lambda x: -x, -4, 0.5),
    "3 * x": (lambda x: 3 * x, 12, 1.5),
    "x * -3": (lambda x: x * -3, -12, 1.5),
    "x / 2": (lambda x: x / 2, 2, 0.25),
    "2 / x": (lambda x: 2 / x, 0.5, 0.0625),
    "x**2": (lambda x: x**2, 16, 4),
    "x**0.5": (lambda x: x**0.5, 2, 0.125),
    "abs(-x)": (lambda x: abs(-x), 4, 0.5),
    "x + x": (lambda x: x + x, 8, 1.0),
    "x - x": (lambda x: x - x, 0, 1.0),
    "x * x": (lambda x: x * x, 16, 4),
    "x / x": (lambda x: x / x, 1, 0.25),
    "float64 * x": (lambda x: np.float64(3) * x, 12, 1.5),
    "float32 + x": (lambda x: np.float32(1) + x, 5, 0.5),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_an_estimate_calculates_as_a_number_and_carries_its_error(name: str):
    calculate, value, error = NUMBERS[name]
    found = calculate(Estimate(4.0, 0.5))
    assert isinstance(found, Estimate)
    assert (found.value, found.standard_error) == pytest.approx((value, error))
    exact = calculate(Estimate(4.0, 0.0))
    assert (exact.value, exact.standard_error) == (value, 0.0)


@pytest.mark.parametrize("compare", [python.lt, python.le, python.gt, python.ge, python.eq, python.ne])
def test_an_estimate_compares_as_its_value(compare: Callable[[Any, Any], bool]):
    x = Estimate(4.0, 0.5)
    for other in (3, 4, 5.0, np.float64(4), np.float32(5), Estimate(4.0, 0.5), Estimate(5.0, 0.5)):
        assert compare(x, other) == compare(4.0, float(other))
        assert compare(other, x) == compare(float(other), 4.0)


def test_an_estimate_is_taken_where_a_number_is():
    x = Estimate(4.0, 0.5)
    value, error = x
    assert (value, error, float(x), int(x), round(x, 1), math.sqrt(x), math.isclose(x, 4)) == (4, 0.5, 4, 4, 4, 2, True)
    assert f"{x:.2f}" == "4.00 ± 0.50"
    assert np.sqrt(x) == 2
    assert len({x, Estimate(4.0, 0.5), Estimate(4.0, 0.1)}) == 2
    assert hash(x) == hash(4.0)
    assert Estimate(4.0, 0.1) != x
    torch.testing.assert_close(torch.ones(2) * x, torch.full((2,), 4.0))
    np.testing.assert_array_equal(np.ones(2) * float(x), [4.0, 4.0])
    text: Any = "1"
    for wrong in (lambda: x + text, lambda: x < text, lambda: x**text):
        with pytest.raises(TypeError):
            wrong()
    assert float(trace(curvature())) == pytest.approx(float(curvature().dense().trace()))
