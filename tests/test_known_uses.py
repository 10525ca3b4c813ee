"""What is remembered of where parameters enter, and of labels, holds no longer than the model and the loss do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import jacops
from jacops.errors import JacopsError


class Branching(nn.Module):
    """Two layers of one shape whose order is a flag, a weight that is seen in one of two shapes, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(72))
        self.swapped, self.long = False, 6

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.b, self.a) if self.swapped else (self.a, self.b)
        h = second(first(x).tanh()).tanh()
        wide = h.repeat(1, 2)[:, : self.long] @ self.w.view(-1, self.long).mT
        return self.last(h) + wide.square().sum(1, keepdim=True)


def swap(model: Branching) -> None:
    model.swapped = not model.swapped


def reshape(model: Branching) -> None:
    model.long = 12 if model.long == 6 else 6


def replace_weight(model: Branching) -> None:
    model.a.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))


def replace_layer(model: Branching) -> None:
    model.b = nn.Linear(6, 6, bias=False).double()


def share_layer(model: Branching) -> None:
    model.b = model.a


def train_a_step(model: Branching) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def add_hook(model: Branching) -> None:
    def double(module: Any, args: Any, output: Any) -> Any:
        return 2 * output

    model.a.register_forward_hook(double)


def freeze(model: Branching) -> None:
    model.b.weight.requires_grad_(False)


CHANGES: list[Callable[[Branching], None]] = [
    swap, reshape, replace_weight, replace_layer, share_layer, train_a_step, add_hook, freeze,
]  # fmt: skip


def factors(kind: str) -> Callable[[nn.Module, Tensor, Tensor], list[Tensor]]:
    def call(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        found = jacops.kronecker_factors(model, cross_entropy, x, y, kind=kind)  # type: ignore[arg-type]
        return [side for pair in found.values() for side in pair]

    return call


def diagonal(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [jacops.linalg.diagonal(jacops.ggn(model, cross_entropy, x, y))]


CALLS = {"ggn": factors("ggn"), "empirical": factors("empirical"), "drawn": factors("monte_carlo"), "diag": diagonal}


@pytest.fixture
def case() -> tuple[Branching, Tensor, Tensor]:
    torch.manual_seed(0)
    return Branching().double(), torch.randn(7, 6, dtype=torch.float64), torch.randint(3, (7,))


def check_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_changes_between_calls_is_followed(
    name: str, change: Callable[[Branching], None], case: tuple[Branching, Tensor, Tensor]
) -> None:
    model, x, y = case
    call = CALLS[name]
    for _ in range(3):
        call(model, x, y)
    change(model)
    for _ in range(2):
        check_same(call(model, x, y), call(deepcopy(model), x, y))  # of a copy nothing is remembered


@pytest.mark.parametrize("name", CALLS)
def test_other_batches_are_followed(name: str, case: tuple[Branching, Tensor, Tensor]) -> None:
    model, x, y = case
    call = CALLS[name]
    for rows in (7, 3, 1, 7):
        check_same(call(model, x[:rows], y[:rows]), call(deepcopy(model), x[:rows], y[:rows]))
    y[2] = -100
    check_same(call(model, x, y), call(deepcopy(model), x, y))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("name", CALLS)
def test_settings_of_torch_and_threads_change_nothing(
    name: str, context: Callable[[], contextlib.AbstractContextManager[object]], case: tuple[Branching, Tensor, Tensor]
) -> None:
    model, x, y = case
    call = CALLS[name]
    wanted = call(deepcopy(model), x, y)

    def inside() -> list[Tensor]:
        with context():
            return call(model, x, y)

    check_same(inside(), wanted)
    with ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(inside) for _ in range(8)]:
            check_same(found.result(), wanted)


@pytest.mark.parametrize("name", ["ggn", "empirical"])
def test_a_loss_that_writes_into_the_weights_changes_no_factor_silently(
    name: str, case: tuple[Branching, Tensor, Tensor]
) -> None:
    model, x, y = case
    wanted = CALLS[name](deepcopy(model), x, y)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        train_a_step(model)
        return cross_entropy(output, target)

    with contextlib.suppress(JacopsError):  # what was recorded refuses sweeps, or is what the model was
        found = jacops.kronecker_factors(model, loss, x, y, kind=name)  # type: ignore[arg-type]
        check_same([side for pair in found.values() for side in pair], wanted)


def weigh_otherwise(loss: nn.CrossEntropyLoss) -> None:
    loss.weight = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)


def ignore_a_class(loss: nn.CrossEntropyLoss) -> None:
    loss.ignore_index = 1


def take_the_sum(loss: nn.CrossEntropyLoss) -> None:
    loss.reduction = "sum"


@pytest.mark.parametrize("change", [weigh_otherwise, ignore_a_class, take_the_sum])
def test_a_diagonal_is_that_of_the_loss_as_it_was_recorded(
    change: Callable[[nn.CrossEntropyLoss], None], case: tuple[Branching, Tensor, Tensor]
) -> None:
    model, x, y = case
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    for _ in range(2):
        jacops.linalg.diagonal(jacops.ggn(model, loss, x, y))
    before = jacops.ggn(model, loss, x, y)
    wanted = before.dense().diagonal()
    change(loss)
    torch.testing.assert_close(jacops.linalg.diagonal(before), wanted)
    after = jacops.ggn(model, loss, x, y)
    torch.testing.assert_close(jacops.linalg.diagonal(after), after.dense().diagonal())
    assert not torch.allclose(after.dense().diagonal(), wanted)


def test_labels_that_are_written_into_change_no_recorded_diagonal(case: tuple[Branching, Tensor, Tensor]) -> None:
    model, x, y = case
    jacops.linalg.diagonal(jacops.ggn(model, cross_entropy, x, y))
    operator = jacops.ggn(model, cross_entropy, x, y)
    wanted = operator.dense().diagonal()
    y[:3] = -100
    torch.testing.assert_close(jacops.linalg.diagonal(operator), wanted)


def test_data_that_are_not_finite_are_named_in_remembered_calls_too(case: tuple[Branching, Tensor, Tensor]) -> None:
    model, x, y = case
    jacops.linalg.diagonal(jacops.ggn(model, cross_entropy, x, y))
    x[3] = float("nan")
    with pytest.raises(jacops.errors.NonFiniteError, match="row 3"):
        jacops.linalg.diagonal(jacops.ggn(model, cross_entropy, x, y))


@pytest.mark.parametrize("name", ["ggn", "diagonal"])
def test_a_loss_whose_weights_become_negative_is_what_it_is_in_a_first_call(
    name: str, case: tuple[Branching, Tensor, Tensor]
) -> None:
    model, x, y = case
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))

    def computed() -> Any:
        if name == "ggn":
            return jacops.kronecker_factors(model, loss, x, y, kind="ggn")
        return jacops.linalg.diagonal(jacops.ggn(model, loss, x, y))

    for _ in range(2):
        computed()
    loss.weight = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    if name == "ggn":
        with pytest.raises(jacops.errors.InputError, match="not convex"):
            computed()
    else:
        torch.testing.assert_close(computed(), jacops.ggn(model, loss, x, y).dense().diagonal())


def test_gradients_whose_squares_overflow_are_no_error_of_python() -> None:
    torch.manual_seed(0)
    last = nn.Linear(5, 4)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), last).double()
    last.weight.data.mul_(1e200)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.arange(7) % 4
    operator = jacops.ggn(model, cross_entropy, x, y)
    torch.testing.assert_close(jacops.linalg.diagonal(operator), operator.dense().diagonal())
