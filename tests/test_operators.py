"""Laws over all operators, and what they are worth against an oracle that shares no code with the library."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jacops
import oracle
from cases import F64, OPERATORS, data, net
from jacops._runtime.engine import swept
from jacops.errors import InputError, NotDifferentiableError
from jacops.linalg import Identity, Matrix, Operator
from jacops.testing import LawBrokenError, check_operator


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_keeps_the_laws(name: str) -> None:
    check_operator(OPERATORS[name]())


@pytest.mark.parametrize("name", OPERATORS)
def test_transpose_of_transpose_and_repr(name: str) -> None:
    operator = OPERATORS[name]()
    assert operator.T.T.shape == operator.shape == operator.T.shape[::-1]
    assert f"{operator.shape[0]} × {operator.shape[1]}" in repr(operator)


def test_a_broken_operator_is_caught() -> None:
    class Wrong(Operator):
        domain = codomain = Identity(Matrix(torch.eye(3, dtype=F64)).domain).space

        def _apply(self, rows: torch.Tensor) -> torch.Tensor:
            return rows.cumsum(1)

        def _apply_transpose(self, rows: torch.Tensor) -> torch.Tensor:
            return rows.cumsum(1)

    with pytest.raises(LawBrokenError, match="<Av, u>"):
        check_operator(Wrong())


@pytest.mark.parametrize("mark", ["symmetric", "positive"])
def test_a_false_mark_is_caught(mark: str) -> None:
    with pytest.raises(LawBrokenError, match=mark):
        check_operator(Matrix(-torch.eye(3, dtype=F64).cumsum(0), **{mark: True}))


def test_gauss_newton_of_a_linear_model_is_its_hessian() -> None:
    model, (x, y) = nn.Linear(3, 2).to(F64), data()
    ggn = jacops.ggn(model, F.mse_loss, x, y)
    torch.testing.assert_close(ggn.dense(), jacops.hessian(model, F.mse_loss, x, y).dense())
    assert ggn.symmetric
    assert ggn.positive


def test_products_answer_in_kind() -> None:
    J, (x, _) = jacops.jacobian(net(), data()[0]), data()
    trees = [torch.ones(shape, dtype=F64) for shape in J.domain.shapes]
    flat = J.domain.flatten(trees)
    named = dict(zip(J.domain.names, trees, strict=True))
    torch.testing.assert_close((J @ trees)[0], (J @ flat).reshape(x.shape[0], 2))
    torch.testing.assert_close((J @ named)["output"], (J @ trees)[0])
    torch.testing.assert_close((J @ flat[:, None].expand(-1, 3))[:, 1], J @ flat)


def test_repeated_products_run_the_model_once() -> None:
    calls = []
    model = net()
    model.register_forward_hook(lambda *_: calls.append(1))
    J = jacops.jacobian(model, data()[0])
    for _ in range(5):
        J @ torch.ones(J.shape[1], dtype=F64)
        J.T @ torch.ones(J.shape[0], dtype=F64)
    assert len(calls) == 1


def test_the_repr_says_which_route_was_taken_and_why() -> None:
    bag, other, ids = nn.EmbeddingBag(5, 3).to(F64), nn.EmbeddingBag(5, 3).to(F64), torch.tensor([[0, 1], [2, 3]])
    J = jacops.jacobian(bag, ids)
    assert "not yet used" in repr(J)
    with pytest.warns(jacops.JacopsWarning, match="row by row"):
        J @ torch.ones(J.shape[1], dtype=F64)
    assert "because" in repr(J)
    assert "embedding_bag" in repr(J)
    strict = jacops.jacobian(other, ids, fallback="error")
    with pytest.raises(NotDifferentiableError, match="fallback"):
        strict @ torch.ones(J.shape[1], dtype=F64)


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(n=st.integers(0, 5), inputs=st.integers(1, 4), outputs=st.integers(1, 5), batch=st.integers(1, 6))
def test_input_jacobians_of_any_shape_are_the_oracles(n: int, inputs: int, outputs: int, batch: int) -> None:
    model = nn.Sequential(nn.Linear(inputs, 3), nn.Tanh(), nn.Linear(3, outputs)).to(F64)
    x = torch.randn(n, inputs, dtype=F64)
    found = jacops.compute_jacobian(model, x, batch_size=batch)
    assert found.shape == (n, outputs, inputs)
    if n:
        torch.testing.assert_close(found, oracle.input_jacobian(model, x))


@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(shape=st.lists(st.integers(0, 3), max_size=3), outer=st.integers(0, 4))
def test_closures_over_any_shape_agree_with_each_other(shape: list[int], outer: int) -> None:
    p = torch.randn(shape, dtype=F64, requires_grad=True)
    weights = torch.randn(outer, *shape, dtype=F64)

    def func() -> torch.Tensor:
        return (weights * p.sin()).reshape(outer, math.prod(shape)).sum(1)

    (J,) = jacops.full_jacobian(func, p)
    v = torch.randn(shape, dtype=F64)
    assert J.shape == (outer, *shape)
    torch.testing.assert_close(J, weights * p.detach().cos())
    torch.testing.assert_close(jacops.jvp(func, p, v), (J * v).reshape(outer, math.prod(shape)).sum(1))


def test_operators_between_other_spaces_do_not_join() -> None:
    with pytest.raises(InputError, match="product"):
        OPERATORS["matrix wide"]() @ OPERATORS["matrix wide"]()
    with pytest.raises(InputError, match="sum"):
        OPERATORS["matrix wide"]() + OPERATORS["matrix tall"]()


def test_a_dense_jacobian_is_written_wherever_it_belongs() -> None:
    model, (x, _) = net(), data()
    J = jacops.jacobian(model, x)
    expected = jacops.modjac(model, x, flatten=True)
    for operator, matrix in ((J, expected), (J.T, expected.T), (-2.0 * J, -2 * expected), (J + J, 2 * expected)):
        torch.testing.assert_close(operator.dense(), matrix)
    places = [torch.full(J.shape, torch.nan, dtype=F64), torch.full(J.shape[::-1], torch.nan, dtype=F64).T,
              torch.full(J.shape, torch.nan)]  # fmt: skip
    for place in places:
        assert J.dense(place) is place
        torch.testing.assert_close(place.to(F64), expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    torch.testing.assert_close(J.dense(), expected)


def test_a_vector_may_have_the_shape_of_the_only_array() -> None:
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    model, loss = torch.nn.Linear(4, 3).double(), torch.nn.functional.cross_entropy
    v = torch.randn_like(x)
    found = jacops.hvp(model, loss, x, y, v, wrt="inputs")
    assert found.shape == x.shape
    torch.testing.assert_close(found.flatten(), jacops.hvp(model, loss, x, y, v.flatten(), wrt="inputs"))
    with pytest.raises(InputError, match="first axis needs 20 entries"):
        jacops.hvp(model, loss, x, y, v[:4], wrt="inputs")


def test_the_error_of_a_spectral_norm_is_not_below_rounding() -> None:
    A = jacops.linalg.Matrix(torch.diag(torch.tensor([3.0, 1.0]).double()), symmetric=True, positive=True)  # noqa: N806
    assert jacops.linalg.spectral_norm(A).error >= 3 * torch.finfo(torch.float64).eps


def test_the_engine_is_given_what_fits_alone() -> None:
    """What `autograd.grad` refuses, such as a cotangent that would broadcast, is still refused."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y, unused = x.sin(), torch.zeros(2, requires_grad=True)
    seed = torch.randn_like(y)
    (found, none), (right,) = swept([y], [x, unused], [seed]), torch.autograd.grad(y, x, seed, retain_graph=True)
    assert none is None
    assert found is not None
    assert torch.equal(found, right)
    for wrong in (seed[0], seed[:, :1]):
        with pytest.raises(RuntimeError, match="Mismatch in shape"):
            swept([y], [x], [wrong])


def test_the_engine_takes_batches_as_grad_does() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    y, seeds = x.sin(), torch.randn(5, 4, 3, dtype=torch.float64)
    (found, none), (right,) = (
        swept([y], [x, unused], [seeds], batched=True),
        torch.autograd.grad(y, x, seeds, retain_graph=True, is_grads_batched=True),
    )
    assert none is None
    assert found is not None
    assert torch.equal(found, right)
    for wrong in (seeds[0], seeds[:, :, :1]):
        with pytest.raises(RuntimeError, match="mismatch was detected"):
            swept([y], [x], [wrong], batched=True)
    with pytest.raises(ValueError, match="same size in the mapped dimension"):
        swept([y, y.cos()], [x], [seeds, seeds[:2]], batched=True)
