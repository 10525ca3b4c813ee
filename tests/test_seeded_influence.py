"""Influence of models with dropout: every sample has the same masks, however the data come in batches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
from jacops.influence import projected_index, tracin

F64, DAMPING = torch.float64, 0.1
loss = nn.functional.cross_entropy


class Net(nn.Module):
    """Two layers with dropout between them: as a module, or as a call that no scan of modules finds."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.dropout = nn.Linear(4, 6), nn.Linear(6, 3), nn.Dropout(0.3)
        self.functional = functional
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(nn.functional.dropout(h, 0.3) if self.functional else self.dropout(h))


def alone(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of samples, and the Gauss-Newton matrix of their mean, each sample alone with the same masks."""
    parameters, rows, total = list(model.parameters()), [], torch.zeros(51, 51, dtype=F64)
    for i in range(len(x)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            output = model(x[i : i + 1])
        grads = [torch.autograd.grad(o, parameters, retain_graph=True) for o in output[0]]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])
        share = output[0].detach().softmax(0)
        total += jacobian.T @ (share.diag() - torch.outer(share, share)) @ jacobian / len(x)
        rows.append((share - nn.functional.one_hot(y[i], 3)) @ jacobian)
    return torch.stack(rows), total


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("functional", [False, True])
def test_masks_are_the_same_for_every_sample_of_a_batch(functional: bool, size: int) -> None:
    model, state = Net(functional).train(), torch.random.get_rng_state()
    x, y = torch.randn(8, 4, dtype=F64), torch.arange(8) % 3
    data = list(zip(x.split(size), y.split(size), strict=True))
    torch.random.set_rng_state(state)
    for seed in (3, 4, 5, 6):
        gradients, matrix = alone(model, x, y, seed)
        given: dict[str, Any] = {"loss": loss, "randomness": "same", "seed": seed}
        damped = matrix + DAMPING * torch.eye(51, dtype=F64)
        expected = gradients @ torch.linalg.solve(damped, gradients.T)
        for solver in ("direct", "cg"):
            found = jacops.compute_influences(model, data, test_data=data, damping=DAMPING, solver=solver, **given)
            torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-6)
        own = jacops.self_influences(model, data, damping=DAMPING, **given)
        torch.testing.assert_close(own, expected.diagonal(), rtol=1e-6, atol=1e-6)
        index = projected_index(model, data, rank=64, curvature="ggn", **given)
        torch.testing.assert_close(index.influences(data, damping=DAMPING).values, expected, rtol=1e-6, atol=1e-6)
        steps = tracin(model, data, [model.state_dict()], test_data=data, **given)
        torch.testing.assert_close(steps.values, gradients @ gradients.T)
        problem = jacops.Problem(model, loss, data, randomness="same", seed=seed)
        torch.testing.assert_close(problem.ggn().dense(), matrix)
        torch.testing.assert_close(problem.gradient(), gradients.mean(0))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("size", [3, 8])
def test_a_wrong_reduction_is_refused_with_dropout_too(size: int) -> None:
    model, x, y = Net(False).train(), torch.randn(8, 4, dtype=F64), torch.arange(8) % 3
    data = list(zip(x.split(size), y.split(size), strict=True))

    def summed(output: Tensor, y: Tensor) -> Tensor:
        return loss(output, y, reduction="sum")

    for reduction in ("mean", "sum"):
        problem = jacops.Problem(model, summed, data, reduction=reduction, randomness="same", seed=3)
        if reduction == "sum":
            torch.testing.assert_close(problem.gradient(), alone(model, x, y, 3)[0].sum(0))
        else:
            with pytest.raises(jacops.errors.InputError, match="`reduction` is 'mean'"):
                problem.gradient()
