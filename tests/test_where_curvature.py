"""Curvature by inputs and at hidden layers, of a closure, and the Jacobian over a loader."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
import layer_cases
from jacops import Problem
from jacops.errors import InputError, InputTypeError, NotDifferentiableError
from jacops.testing import check_operator
from small import draw, settled

F64 = torch.float64
X, Y = draw(5, 3), torch.arange(5) % 3
LOSS = nn.CrossEntropyLoss()


def net() -> Any:
    return settled(layer_cases.mlp(3, 4, 3))


def plain(function: Any, at: Tensor) -> Tensor:
    flat = at.detach().flatten()
    return torch.func.hessian(lambda v: function(v.view_as(at)))(flat).detach()


# ---- by inputs and hidden values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [None, "0", "1"])
def test_curvature_by_inputs_and_hidden_values(at: str | None) -> None:
    model = net()
    cut = 0 if at is None else int(at) + 1
    point = model[:cut](X).detach()
    options: Any = {"wrt": "inputs", "at": at}
    H = jacops.hessian(model, LOSS, X, Y, **options)
    check_operator(H)
    torch.testing.assert_close(H.dense(), plain(lambda z: LOSS(model[cut:](z), Y), point), rtol=1e-9, atol=1e-14)
    value, gradient = H.value_and_gradient()
    leaf = point.clone().requires_grad_()
    loss = LOSS(model[cut:](leaf), Y)
    assert value == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0].flatten(), rtol=1e-9, atol=1e-14)
    J = torch.func.jacrev(lambda v: model[cut:](v.view_as(point)).flatten())(point.flatten()).detach()
    expected = J.T @ plain(lambda f: LOSS(f, Y), model(X)) @ J
    for operator in (jacops.ggn(model, LOSS, X, Y, **options), jacops.fisher(model, LOSS, X, **options)):
        check_operator(operator)
        torch.testing.assert_close(operator.dense(), expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(jacops.hvp(model, LOSS, X, Y, gradient, **options), H @ gradient)


def test_drawn_labels_by_inputs_come_near() -> None:
    exact = jacops.fisher(net(), LOSS, X, wrt="inputs").dense()
    drawn = jacops.fisher(net(), LOSS, X, wrt="inputs", kind="monte_carlo", samples=2000).dense()
    assert float((drawn - exact).norm() / exact.norm()) < 0.1


def test_a_hidden_layer_needs_the_inputs() -> None:
    for call in (jacops.hessian, jacops.ggn, jacops.fisher):
        with pytest.raises(InputError, match="cuts the parameters"):
            call(net(), LOSS, X, Y, at="0")
        with pytest.raises(InputError, match="no parameter is differentiated"):
            call(net(), LOSS, X, Y, wrt="inputs", parameters="0.*")
    with pytest.raises(InputError, match="empirical"):
        jacops.fisher(net(), LOSS, X, Y, kind="empirical", wrt="inputs")


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2 / 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0].detach()  # drops the second derivative


def test_a_custom_function_that_cannot_be_checked_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Any:
            return Halved.apply(self.inner(x))

    with pytest.raises(NotDifferentiableError, match="Halved"):
        jacops.hessian(settled(Own()), LOSS, X, Y, wrt="inputs")


# ---- of a closure ------------------------------------------------------------------------------------------------


def test_the_hessian_of_a_closure() -> None:
    model, calls = net(), []
    weights = list(model.parameters())

    def closure() -> Tensor:
        calls.append(1)
        return LOSS(model(X), Y) + sum((p**2).sum() for p in weights)

    H = jacops.hessian(closure, parameters=weights)
    check_operator(H)
    expected = jacops.hessian(model, LOSS, X, Y).dense() + 2 * torch.eye(H.shape[0], dtype=F64)
    torch.testing.assert_close(H.dense(), expected, rtol=1e-9, atol=1e-13)
    value, gradient = H.value_and_gradient()
    assert calls == [1]
    loss = closure()
    assert value == pytest.approx(float(loss.detach()), rel=1e-12)
    plain_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-9, atol=1e-13)


def test_what_is_no_closure_is_refused() -> None:
    model = net()
    weights = list(model.parameters())
    with pytest.raises(InputTypeError, match="parameters"):
        jacops.hessian(lambda: LOSS(model(X), Y))
    with pytest.raises(InputTypeError, match="without arguments"):
        jacops.hessian(lambda: LOSS(model(X), Y), x=X, parameters=weights)
    with pytest.raises(InputError, match="one number"):
        jacops.hessian(lambda: model(X), parameters=weights)
    with pytest.raises(InputTypeError, match="loss"):
        jacops.hessian(model)


# ---- over a loader -----------------------------------------------------------------------------------------------


def test_the_jacobian_of_a_problem_has_the_rows_of_all_samples() -> None:
    model = net()
    problem = Problem(model, LOSS, [(X[:2], Y[:2]), (X[2:2], Y[2:2]), (X[2:], Y[2:])])
    J = problem.jacobian()
    check_operator(J)
    expected = jacops.sample_jacobians(model, X)
    torch.testing.assert_close(J.dense(), expected.dense(), rtol=1e-12, atol=1e-14)
    assert J.codomain.shapes == expected.codomain.shapes
    picked = problem.jacobian([(X + 1, Y)], outputs=1)
    torch.testing.assert_close(picked.dense(), jacops.sample_jacobians(model, X + 1, outputs=1).dense())
