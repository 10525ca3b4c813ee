"""Graphs that hold nested tensors or torch's implicit zeros, forwards that spoil their own graph, samples alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops

mse = nn.functional.mse_loss
no_memory: Any = vars(torch)["_efficientzerotensor"]  # zeros that torch keeps no numbers of


class Net(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.between = nn.Linear(3, 4), nn.Linear(4, 2), between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.between(self.first(x))))


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of every sample alone, by plain autograd."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(mse(model(x[i : i + 1]), y[i : i + 1]), parameters) for i in range(len(x))]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def rows_of(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of the batch by all parameters, row by row."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in model(x).reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


# ---- tensors without sizes or without memory -------------------------------------------------------------------------


def padded(h: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(list(h.split(1))), 0.0).squeeze(1)


def jagged(h: Tensor) -> Tensor:
    made = torch.nested.as_nested_tensor(list(h.split(1)), layout=torch.jagged)
    return torch.tanh(made).to_padded_tensor(0.0).squeeze(1)


def implicit_zeros(h: Tensor) -> Tensor:
    return h + no_memory(h.shape, dtype=h.dtype) * h.square().sum(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("between", [padded, jagged, implicit_zeros])
def test_nested_tensors_and_implicit_zeros_in_a_graph_are_right(between: Callable[[Tensor], Tensor]) -> None:
    model, x, y = Net(between), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    for _ in range(2):
        torch.testing.assert_close(jacops.jacobian(model, x).dense(), rows_of(model, x))
        torch.testing.assert_close(jacops.sample_gradients(model, mse, x, y).dense(), gradients(model, x, y))
        direction = torch.randn(26).double()
        torch.testing.assert_close(
            jacops.jacobian(model, x, fallback="silent") @ direction, rows_of(model, x) @ direction
        )
        whole = torch.stack(
            [torch.autograd.functional.jacobian(lambda one: model(one[None])[0], x[i]) for i in range(5)]
        )
        torch.testing.assert_close(jacops.compute_jacobian(model, x), whole)


def test_implicit_zeros_count_as_zeros_for_proofs() -> None:
    factor = [no_memory((1, 4), dtype=torch.float64)]
    model = Net(lambda h: h + factor[0] * h.sum(0, keepdim=True))
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    for made in (factor[0], torch.ones(1, 4).double()):
        factor[0] = made
        torch.testing.assert_close(
            jacops.sample_gradients(model, mse, x, y, fallback="silent").dense(), gradients(model, x, y)
        )
        torch.testing.assert_close(jacops.jacobian(model, x).dense(), rows_of(model, x))


def spoiling(h: Tensor) -> Tensor:
    made = h.exp()
    made.view(-1, 2)[:, 0].mul_(2)  # exp needs its result
    return made


@pytest.mark.parametrize("call", ["sample_gradients", "sample_jacobians"])
def test_a_forward_that_spoils_its_own_graph_is_refused_in_words(call: str) -> None:
    model, x = Net(spoiling), torch.randn(5, 3).double()
    given = (model, x) if call == "sample_jacobians" else (model, mse, x, x[:, :2])
    for _ in range(3):
        with pytest.raises(jacops.errors.NotDifferentiableError, match=f"{call}.*inplace"):
            getattr(jacops, call)(*given, fallback="silent")


class Counting(nn.Module):
    """A net that writes into a buffer, by which it multiplied before, from some call on."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.writes = nn.Linear(3, 4), nn.Linear(4, 2), False
        self.register_buffer("factor", torch.full((4,), 2.0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) * self.factor
        if self.writes:
            self.factor.copy_(1 * self.factor)
        return self.last(h)


def factors_of(model: nn.Module, x: Tensor, kind: Any) -> Any:
    return jacops.kronecker_factors(model, mse, x, x[:, :2], kind=kind)


SPOILED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "sample_gradients": lambda model, x: jacops.sample_gradients(model, mse, x, x[:, :2], fallback="silent"),
    "sample_jacobians": lambda model, x: jacops.sample_jacobians(model, x, fallback="silent"),
    "kronecker_factors of the GGN": lambda model, x: factors_of(model, x, "ggn"),
    "kronecker_factors of labels": lambda model, x: factors_of(model, x, "empirical"),
    "ggn": lambda model, x: jacops.linalg.diagonal(jacops.ggn(model, mse, x, x[:, :2])),
}


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("call", SPOILED)
def test_a_forward_that_begins_to_spoil_its_graph_is_refused_in_words(call: str, before: int, samples: int) -> None:
    model, x = Counting(), torch.randn(samples, 3).double()
    for _ in range(before):
        SPOILED[call](model, x)
    model.writes = True
    for _ in range(2):
        with pytest.raises(jacops.errors.NotDifferentiableError, match=f"{call.split()[0]}.*inplace"):
            SPOILED[call](model, x)


# ---- samples that are alike prove nothing about others ---------------------------------------------------------------


def detached_mean(h: Tensor) -> Tensor:
    return h - h.detach().mean(0)


def scaled_by_the_largest(h: Tensor) -> Tensor:
    return h / (1 + h.detach().abs().max())


def attended(h: Tensor) -> Tensor:
    far = h - h.mean(0)
    return h + far @ far.T @ torch.sin(far)


CALLS: dict[str, Callable[[Net, Tensor, Tensor], tuple[Any, Any]]] = {
    "sample_gradients": lambda m, x, y: (
        jacops.sample_gradients(m, mse, x, y, fallback="silent").dense(),
        gradients(m, x, y),
    ),
    "sample_jacobians": lambda m, x, y: (
        jacops.sample_jacobians(m, x, target=y[:, 0].gt(0).long(), fallback="silent").dense(),
        torch.stack([rows_of(m, x[i : i + 1])[int(y[i, 0] > 0)] for i in range(len(x))]),
    ),
    "modjac": lambda m, x, y: (
        torch.cat([block.reshape(10, -1) for block in jacops.modjac(m, x)], 1),
        rows_of(m, x),
    ),
    "jacobian": lambda m, x, y: (jacops.jacobian(m, x).dense(), rows_of(m, x)),
}


@pytest.mark.parametrize("between", [detached_mean, scaled_by_the_largest, attended])
@pytest.mark.parametrize("call", CALLS)
def test_what_samples_alike_seem_to_prove_is_not_remembered(call: str, between: Callable[[Tensor], Tensor]) -> None:
    model, alike = Net(between), torch.randn(1, 3).double().expand(5, 3).clone()
    for x in (alike, alike, torch.randn(5, 3).double(), torch.randn(5, 3).double()):
        found, expected = CALLS[call](model, x, torch.randn(5, 2).double())
        torch.testing.assert_close(found, expected)


# ---- the caller's autocast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_solves_inside_autocast_work_in_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    data = [(torch.randn(20, 6), torch.arange(20) % 3)]
    given: dict[str, Any] = {"loss": nn.functional.cross_entropy, "test_data": data, "damping": 0.1, "solver": "direct"}
    outside = jacops.compute_influences(model, data, **given).values
    matrix, vector = jacops.linalg.Matrix(torch.randn(5, 4)), torch.randn(4)
    products = matrix @ vector, matrix.T @ torch.ones(5)
    with torch.autocast("cpu", dtype=dtype):
        inside = jacops.compute_influences(model, data, **given).values
        for found, expected in zip((matrix @ vector, matrix.T @ torch.ones(5)), products, strict=True):
            torch.testing.assert_close(found, expected)
    assert inside.dtype == torch.float32
    assert float((inside - outside).norm() / outside.norm()) < 0.05
