"""What was computed on the way is handed back, so that the model need not run again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
import layer_cases
from jacops import Problem
from jacops.errors import InputError, NonFiniteError
from small import draw, settled

F64 = torch.float64
RUNS: list[int] = []  # samples in each forward; not an attribute, since the model is left as it was


class Counted(nn.Module):
    """A model that notes the samples of every forward, with a dict as output if asked for."""

    def __init__(self, inner: nn.Module, named: bool = False) -> None:
        super().__init__()
        self.inner, self.named = inner, named

    def forward(self, x: Tensor) -> Any:
        RUNS.append(len(x))
        output = self.inner(x)
        return {"logits": output, "twice": 2 * output} if self.named else output


def model(named: bool = False) -> nn.Module:
    return settled(Counted(layer_cases.mlp(3, 4, 3), named))


X, Y = draw(6, 3), torch.arange(6) % 3
LOSSES: dict[str, tuple[Any, Tensor]] = {
    "classes": (nn.CrossEntropyLoss(), Y),
    "weighted classes": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64)), Y),
    "squares": (nn.MSELoss(), draw(6, 3)),
    "summed squares": (nn.MSELoss(reduction="sum"), draw(6, 3)),
    "own": (lambda output, y: (output.sin() * y).mean(), draw(6, 3)),
}


def plain(net: nn.Module, loss: Any, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    value = loss(net(x), y)
    return float(value.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])


# ---- outputs -----------------------------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[nn.Module], Any]] = {
    "jacobian": lambda net: jacops.jacobian(net, X),
    "jacobian by inputs": lambda net: jacops.jacobian(net, X, "inputs"),
    "hessian": lambda net: jacops.hessian(net, nn.CrossEntropyLoss(), X, Y),
    "ggn": lambda net: jacops.ggn(net, nn.CrossEntropyLoss(), X, Y),
    "fisher": lambda net: jacops.fisher(net, nn.CrossEntropyLoss(), X),
    "monte carlo": lambda net: jacops.fisher(net, nn.CrossEntropyLoss(), X, kind="monte_carlo"),
    "empirical": lambda net: jacops.fisher(net, nn.CrossEntropyLoss(), X, Y, kind="empirical"),
    "sample gradients": lambda net: jacops.sample_gradients(net, nn.CrossEntropyLoss(), X, Y),
    "sample jacobians": lambda net: jacops.sample_jacobians(net, X),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_output_is_the_models(name: str) -> None:
    net = model()
    expected = net(X).detach()
    operator = OPERATORS[name](net)
    RUNS.clear()
    assert isinstance(operator.output, Tensor)
    assert not operator.output.requires_grad
    torch.testing.assert_close(operator.output, expected, rtol=1e-12, atol=1e-14)
    assert not RUNS


@pytest.mark.parametrize("name", ["jacobian", "hessian", "ggn", "sample gradients"])
def test_an_output_keeps_its_structure(name: str) -> None:
    net, loss = model(named=True), lambda output, y: nn.functional.cross_entropy(output["logits"] + output["twice"], y)
    calls = {
        "jacobian": lambda: jacops.jacobian(net, X),
        "hessian": lambda: jacops.hessian(net, loss, X, Y),
        "ggn": lambda: jacops.ggn(net, loss, X, Y),
        "sample gradients": lambda: jacops.sample_gradients(net, loss, X, Y),
    }
    output = calls[name]().output
    assert list(output) == ["logits", "twice"]
    torch.testing.assert_close(output["twice"], 2 * net(X)["logits"].detach(), rtol=1e-12, atol=1e-14)


def test_a_picked_part_is_what_is_handed_back() -> None:
    net = model()
    for operator in (jacops.jacobian(net, X, outputs=1), jacops.sample_jacobians(net, X, outputs=1)):
        torch.testing.assert_close(operator.output.reshape(6), net(X)[:, 1].detach(), rtol=1e-12, atol=1e-14)


def test_it_is_the_output_as_it_was() -> None:
    net = model()
    expected, J = net(X).detach(), jacops.jacobian(net, X)
    H = jacops.hessian(net, nn.CrossEntropyLoss(), X, Y)
    before = plain(net, nn.CrossEntropyLoss(), X, Y)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    torch.testing.assert_close(J.output, expected, rtol=0, atol=0)
    value, gradient = H.value_and_gradient()
    assert value == pytest.approx(before[0], rel=1e-12)
    torch.testing.assert_close(gradient, before[1], rtol=1e-10, atol=1e-14)


def test_operators_of_no_single_batch_have_none() -> None:
    problem = Problem(model(), nn.CrossEntropyLoss(), [(X, Y)])
    assert problem.ggn().output is None
    with pytest.raises(InputError, match="of a loss on one batch"):
        problem.ggn().value_and_gradient()
    with pytest.raises(InputError, match="of a loss on one batch"):
        jacops.jacobian(model(), X).value_and_gradient()
    with pytest.raises(InputError, match="of a loss on one batch"):
        jacops.fisher(model(), nn.CrossEntropyLoss(), X).value_and_gradient()


# ---- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mixing", [False, True])
def test_losses_are_those_of_the_rows_alone(name: str, mixing: bool) -> None:
    loss, y = LOSSES[name]
    inner = layer_cases.mlp(3, 4, 3)
    net = settled(Counted(nn.Sequential(inner, Centred()) if mixing else inner))
    with pytest.warns(jacops.JacopsWarning) if mixing else nothing():
        G = jacops.sample_gradients(net, loss, X, y)
    expected = torch.stack([loss(net(X[i : i + 1]), y[i : i + 1]) for i in range(6)]).detach()
    assert G.losses is not None
    torch.testing.assert_close(G.losses, expected, rtol=1e-12, atol=1e-14)


class nothing:  # noqa: N801 - a context like the one beside it
    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


class Centred(nn.Module):
    """Mixes samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) + x


def test_no_samples_have_no_losses() -> None:
    G = jacops.sample_gradients(model(), nn.CrossEntropyLoss(), X[:0], Y[:0])
    assert G.losses is not None
    assert G.losses.shape == (0,)
    assert jacops.sample_jacobians(model(), X).losses is None


# ---- values and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_value_and_gradient_come_with_a_curvature(name: str, curvature: str) -> None:
    loss, y = LOSSES[name]
    net = model()
    operator = getattr(jacops, curvature)(net, loss, X, y)
    operator.dense()
    runs = len(RUNS)
    value, gradient = operator.value_and_gradient()
    assert len(RUNS) == runs
    expected = plain(net, loss, X, y)
    assert value == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [(), (2, 5)])
def test_a_problem_gives_both_from_one_pass(name: str, cuts: tuple[int, ...]) -> None:
    loss, y = LOSSES[name]
    net, data = model(), list(zip(X.tensor_split(cuts), y.tensor_split(cuts), strict=True))
    problem = Problem(net, loss, data, l2=0.5, reduction="mean" if name == "own" else None)
    value, gradient = problem.value_and_gradient()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    expected = plain(net, loss, X, y)
    assert value == pytest.approx(expected[0] + 0.25 * float(weights @ weights), rel=1e-12)
    torch.testing.assert_close(gradient, expected[1] + 0.5 * weights, rtol=1e-10, atol=1e-14)
    assert value == pytest.approx(problem.value(), rel=1e-14)
    torch.testing.assert_close(problem.gradient(), gradient, rtol=1e-14, atol=0)


def test_every_batch_runs_once() -> None:
    net, loss = model(), nn.CrossEntropyLoss()
    Problem(net, loss, [(X[:4], Y[:4])]).value_and_gradient()  # how the loss reduces a batch is verified here
    RUNS.clear()
    problem = Problem(net, loss, [(X[:4], Y[:4]), (X[:4] + 1, Y[:4])])
    problem.value_and_gradient()
    assert RUNS == [4, 4]
    problem = Problem(net, loss, [(X[:4], Y[:4]), (X[:4] + 1, Y[:4])])
    problem.ggn().dense()
    RUNS.clear()
    problem.value_and_gradient()
    assert RUNS == []


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    net = settled(nn.Linear(3, 1))
    H = jacops.ggn(net, lambda output, y: output.abs().sqrt().sum(), torch.zeros(2, 3, dtype=F64) + 1, Y[:2])
    assert bool(H.value_and_gradient()[1].isfinite().all())
    with torch.no_grad():
        nn.init.zeros_(net.get_parameter("bias"))
    with pytest.raises(NonFiniteError):
        jacops.hessian(net, lambda output, y: output.abs().sqrt().sum(), torch.zeros(2, 3, dtype=F64), Y[:2])
