"""Rows of samples with their graph: by shared sweeps where these are right, with the derivatives of plain autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacops
from jacops._torch.routes import by_sample
from jacops.linalg import eye
from jacops.solvers import solve
from layer_cases import MODELS, mlp, model_of
from small import Swept, draw, quiet, settled

ALONE = {"an entry per sample", "no layer at all", "positions first"}  # outputs without a row per sample, or no rules
LOSSLESS = {"an entry per sample", "positions first"}
CASES = [(name, loss) for name in MODELS for loss in (False, True) if not (loss and name in LOSSLESS)]


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@sdpa_kernel(SDPBackend.MATH)
def plain_rows(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """Return the rows of every sample by plain autograd, with their graph."""
    own = {name: p.view_as(p) for name, p in model.named_parameters() if p.requires_grad}
    options: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
    rows = []
    for i in range(len(x)):
        output = torch.func.functional_call(model, own, (x[i : i + 1],))
        values = output if y is None else F.mse_loss(output, y[i : i + 1])
        rows += [flat(torch.autograd.grad(value, list(own.values()), **options)) for value in values.reshape(-1)]
    return torch.stack(rows)


def asked(model: nn.Module, x: Tensor, y: Tensor | None, **options: Any) -> Any:
    if y is None:
        return jacops.sample_jacobians(model, x, create_graph=True, **options)
    return jacops.sample_gradients(model, F.mse_loss, x, y, create_graph=True, **options)


def same(found: Tensor, right: Tensor, wrt: list[Tensor]) -> None:
    """Compare values, and the derivatives of a function of them."""
    torch.testing.assert_close(found.detach(), right.detach(), rtol=1e-9, atol=1e-11)
    weight, sides = draw(*right.shape, seed=6), []
    for side in (found, right):
        options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        sides.append(flat(torch.autograd.grad((side * weight).sum() + side.square().sum(), wrt, **options)))
    torch.testing.assert_close(*sides, rtol=1e-8, atol=1e-10 * max(1.0, float(sides[1].abs().max())))


def targets(model: nn.Module, x: Tensor, loss: bool) -> Tensor | None:
    return draw(*model(x).shape, seed=3) if loss else None


@pytest.mark.parametrize(("name", "loss", "most"), [*((*case, 4) for case in CASES), ("tokens", True, 4096)])
def test_rows_and_all_that_is_made_of_them_have_the_derivatives_of_plain_autograd(
    name: str, loss: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sample, "_MOST", most)
    model, x = model_of(name)
    y, wrt = targets(model, x, loss), list(model.parameters())
    x = x.requires_grad_(x.is_floating_point())
    found, right = quiet(asked, model, x, y), plain_rows(model, x, y)
    assert found.route.startswith("one sample") == (name in ALONE), found.route
    assert found.route.endswith("with their graph")
    wrt += [x] if x.requires_grad else []
    v, u = draw(right.shape[1], seed=4), draw(right.shape[0], seed=5)
    same(found.dense(), right, wrt)
    same(found @ v, right @ v, wrt)
    same(found.T @ u, right.T @ u, wrt)
    same(found.gram(), right @ right.T, wrt)
    same(found.squared_norms(), right.square().sum(1), wrt)
    same(found.column_squares(), right.square().sum(0), wrt)


def test_third_derivatives() -> None:
    model, x = model_of("deep")
    (w, *_), third = model.parameters(), []
    y = targets(model, x, True)
    for rows in (asked(model, x, y).dense(), plain_rows(model, x, y)):
        (second,) = torch.autograd.grad(rows.square().sum(), w, create_graph=True)
        third.append(flat(torch.autograd.grad(second.sin().sum(), list(model.parameters()), materialize_grads=True)))
    torch.testing.assert_close(*third, rtol=1e-8, atol=1e-10)


def test_rows_by_some_parameters_are_differentiable_by_all_of_them() -> None:
    model, x = model_of("deep")
    y = targets(model, x, True)
    found = asked(model, x, y, parameters=["4.weight"])
    assert found.route.startswith("9 samples")
    right = plain_rows(model, x, y)[:, -(3 * 6 + 3) : -3]
    same(found.dense(), right, list(model.parameters()))
    next(model.parameters()).requires_grad_(False)
    same(asked(model, x, y).dense(), plain_rows(model, x, y), [p for p in model.parameters() if p.requires_grad])


def test_outputs_and_losses_are_handed_back_without_a_graph() -> None:
    for name in ("mlp", "no layer at all"):
        model, x = model_of(name)
        y = targets(model, x, True)
        found = asked(model, x, y)
        torch.testing.assert_close(found.output, model(x).detach())
        torch.testing.assert_close(found.losses, (model(x) - y).square().mean(1).detach())
        assert not found.output.requires_grad
        assert not found.losses.requires_grad


@pytest.mark.parametrize("n", [2, 9, 60])
def test_sweeps_do_not_grow_with_the_samples(n: int) -> None:
    model = Swept(settled(mlp(3, 8, 4)))
    x, y = draw(n, 3), draw(n, 4)
    for loss in (True, False):
        asked(model, x, y if loss else None)  # the first call proves
        model.spent()
        found = asked(model, x, y if loss else None)
        assert model.spent() == ((2, 1) if loss else (2, 4))  # of one sample, and of all; a sweep for each row
        found.squared_norms().sum().backward()
        assert model.spent() == ((0, 1) if loss else (0, 0))  # cotangents of outputs lead nowhere, those of losses back


class Coupled(nn.Module):
    """A model whose rows are those of samples alone, but whose rows' derivatives are not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(3, 2).double()
        self.a, self.b = (nn.Parameter(torch.zeros(2).double()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        if self.kind == "two gates that are closed":
            return hidden + (self.a * self.b) * hidden.mean(0)
        drift = hidden.mean(0) - hidden.mean(0).detach()
        return hidden + drift.square()


@pytest.mark.parametrize("kind", ["two gates that are closed", "a square of nothing"])
@pytest.mark.parametrize("loss", [True, False])
def test_samples_that_mix_in_derivatives_of_rows_alone_are_taken_one_at_a_time(kind: str, loss: bool) -> None:
    model, x = Coupled(kind), draw(6, 3)
    y = draw(6, 2, seed=2) if loss else None
    for _ in range(2):
        found = quiet(asked, model, x, y)
        assert found.route.startswith("one sample at a time (because"), found.route
        same(found.dense(), plain_rows(model, x, y), list(model.parameters()))


def test_a_gate_that_opens_ends_the_proof() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gate = nn.Linear(3, 2).double(), nn.Parameter(torch.zeros(1).double())

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.linear(x))
            return hidden + self.gate.detach() * hidden.mean(0)

    model, x, y = Gated(), draw(6, 3), draw(6, 2)
    assert asked(model, x, y).route.startswith("6 samples")
    with torch.no_grad():
        model.gate.fill_(0.7)
    with pytest.warns(jacops.JacopsWarning, match="samples mix"):
        found = asked(model, x, y)
    same(found.dense(), plain_rows(model, x, y), list(model.parameters()))


def test_single_precision_is_no_reason_to_leave_shared_sweeps() -> None:
    torch.manual_seed(0)
    model = mlp(20, 30, 30, 30, 4)
    assert asked(model, torch.randn(40, 20), torch.randn(40, 4), fallback="error").route.startswith("40 samples")


@pytest.mark.parametrize("name", ["mlp", "tokens", "convolutions"])
def test_what_is_solved_with_them_needs_no_graph(name: str) -> None:
    model, x = model_of(name)
    y: Any = targets(model, x, True)
    fisher = jacops.linalg.empirical_fisher(model, F.mse_loss, x, y, create_graph=True)
    b = draw(fisher.shape[0], seed=8)
    right = plain_rows(model, x, y)
    damped = right.T @ right / len(x) + 0.5 * torch.eye(len(b)).double()
    solved: Callable[[Any], Tensor] = lambda A: solve(A, b, damping=0.5, create_graph=True).x[0]  # noqa: E731
    same(solved(fisher), torch.linalg.solve(damped, b), list(model.parameters()))
    torch.testing.assert_close((fisher + 0.5 * eye).dense().detach(), damped.detach())
