"""Rows of samples of a model that changes between calls: remembered calls record no sample alone, and stay right."""

from __future__ import annotations

import math
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy, mse_loss

import jacops
from jacops._torch.routes import by_sample
from jacops.errors import NonFiniteError

AGAIN = 18  # calls: more than between two in which a sample is recorded alone all the same


class Net(nn.Module):
    """A network with whatever a caller may change in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale, self.mixes, self.turned = 1.0, False, False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * self.scale
        if self.mixes:
            hidden = hidden - hidden.mean(0)
        if self.turned:
            hidden = hidden @ self.second.weight.T @ self.second.weight
        return self.second(hidden)


def expected(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """Return every sample's own rows, by its batch of one."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def output(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, p, (one[None],))[0]

    found = []
    for i, one in enumerate(x):
        if y is None:
            blocks = jacrev(output)(params, one)
        else:
            blocks = grad(lambda p, one=one, i=i: cross_entropy(output(p, one)[None], y[i : i + 1]))(params)
        found.append(torch.cat([block.reshape(3 if y is None else 1, -1) for block in blocks.values()], 1))
    return torch.cat(found)


def train(model: Net) -> None:
    for p in model.parameters():
        p.data += 0.1


def replace(model: Net) -> None:
    model.second = nn.Linear(6, 3).to(model.first.weight)


def tie(model: Net) -> None:
    model.extra = nn.Linear(6, 3).to(model.first.weight)
    model.second.bias = model.extra.bias


CHANGES = {
    "weights": train,
    "scale": lambda model: setattr(model, "scale", 2.5),
    "samples mix": lambda model: setattr(model, "mixes", True),
    "another use of a weight": lambda model: setattr(model, "turned", True),
    "a layer": replace,
    "a hook": lambda model: model.first.register_forward_hook(lambda module, args, output: 2 * output),
    "a parameter more": lambda model: model.register_parameter("more", nn.Parameter(torch.ones(2))),
    "tied": tie,
    "precision": lambda model: model.float(),
    "frozen": lambda model: model.first.requires_grad_(False),
}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_model_that_changes_between_calls(change, labelled):
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(7, 4, dtype=torch.float64)
    y = torch.arange(7) % 3 if labelled else None

    def rows() -> Tensor:
        given = x.to(model.first.weight.dtype)
        if y is not None:
            return jacops.sample_gradients(model, cross_entropy, given, y).dense()
        return jacops.sample_jacobians(model, given).dense()

    def right() -> Tensor:
        found = expected(model, x.to(model.first.weight.dtype), y)
        trainable = [p.requires_grad for p in model.parameters() for _ in range(p.numel())]
        return found[:, torch.tensor(trainable)]

    for _ in range(3):
        torch.testing.assert_close(rows(), right())
    CHANGES[change](model)
    for _ in range(AGAIN):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where samples mix they are taken one at a time, which is said
            torch.testing.assert_close(rows(), right())


def test_changes_to_and_fro():
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    for number in range(AGAIN):
        model.turned, model.scale = number % 2 == 1, 1.0 + number
        torch.testing.assert_close(jacops.sample_jacobians(model, x).dense(), expected(model, x, None))


def test_outputs_of_another_number_to_and_fro():
    narrow, wide = nn.Linear(6, 3).double(), nn.Linear(6, 4).double()
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), narrow).double(), torch.randn(5, 4, dtype=torch.float64)
    for number in range(8):
        model[2] = (narrow, wide)[number % 2]
        assert jacops.sample_jacobians(model, x).shape[0] == 5 * (3 + number % 2)


def test_a_remembered_call_records_each_batch_once():
    seen: list[int] = []

    class Counted(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    model, x = Counted(), torch.randn(7, 4)
    jacops.sample_jacobians(model, x)
    seen.clear()
    jacops.sample_jacobians(model, x)
    assert seen == [7]
    seen.clear()
    jacops.sample_jacobians(model, x, checks="always")
    assert 1 in seen


def test_an_error_of_the_model_is_its_own_in_remembered_calls():
    class Fails(Net):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise ZeroDivisionError("the model's own")
            return super().forward(x)

    model, x = Fails(), torch.randn(7, 4)
    for _ in range(2):
        jacops.sample_jacobians(model, x)
    model.fails = True
    with pytest.raises(ZeroDivisionError, match="the model's own"):
        jacops.sample_jacobians(model, x)


@pytest.mark.parametrize("large", [1e30, 1e20, 1.0, math.nan, math.inf])
def test_rows_that_overflow_are_refused(large):
    """Factors may be finite where their products are not, and products where the bound of them is not."""
    model, x = nn.Linear(2, 1, bias=False), torch.tensor([[large, 1.0], [1.0, 2.0]])

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output * y).sum()

    y = torch.tensor([[1.0], [1e20]]) if large < math.inf else torch.ones(2, 1)
    products = x * y
    rows = jacops.sample_gradients(model, loss, x, y, check_finite=False)
    torch.testing.assert_close(rows.dense(), products, equal_nan=True)
    checked = jacops.sample_jacobians(nn.Linear(2, 1, bias=False), x, check_finite=True)
    if math.isfinite(large):
        assert checked.dense().isfinite().all()
    else:
        with pytest.raises(NonFiniteError):
            checked.dense()


def test_a_product_of_finite_factors_that_overflows_is_refused():
    model, x, y = nn.Linear(2, 1, bias=False), torch.full((2, 2), 1e30), torch.full((2, 1), 1e30)
    with torch.no_grad():
        model.weight.zero_()
    rows = jacops.sample_gradients(model, lambda output, y: mse_loss(output, y, reduction="sum"), x, y * 1e-15)
    with pytest.raises(NonFiniteError):
        rows.dense()


def test_agrees_with_vmap():
    model, x = Net().double(), torch.randn(6, 4, dtype=torch.float64)
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(jacrev(lambda p, one: functional_call(model, p, (one[None],))[0]), (None, 0))(params, x)
    whole = torch.cat([block.flatten(2) for block in found.values()], 2).flatten(0, 1)
    for _ in range(3):
        torch.testing.assert_close(jacops.sample_jacobians(model, x).dense(), whole)


def test_gradients_and_jacobians_of_one_graph_do_not_share_what_is_remembered():
    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    for _ in range(3):
        torch.testing.assert_close(jacops.sample_jacobians(model, x).dense(), expected(model, x, None))
        torch.testing.assert_close(jacops.sample_gradients(model, cross_entropy, x, y).dense(), expected(model, x, y))


def test_batches_of_other_structure_are_taken_whole_in_remembered_calls(monkeypatch):
    """The first batch's graph is dropped before the second one turns out to enter in another way."""
    monkeypatch.setattr(by_sample, "_MOST", 4)

    class Switching(Net):
        turns, seen = False, 0

        def forward(self, x: Tensor) -> Tensor:
            Switching.seen += 1
            self.turned = self.turns and float(x[0, 0]) > 0
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Switching().double(), torch.randn(8, 4, dtype=torch.float64)
    x[:4, 0], x[4:, 0] = -1.0, 1.0
    for turns in (False, False, True, True, False, False):
        model.turns = turns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = jacops.sample_jacobians(model, x).dense()
        rows = []
        for one in x:
            params = {name: p.detach() for name, p in model.named_parameters()}
            model.turned = turns and float(one[0]) > 0
            blocks = jacrev(lambda p, one=one: functional_call(Plain(model), p, (one[None],))[0])(
                {f"of.{name}": p for name, p in params.items()}
            )
            rows.append(torch.cat([block.reshape(3, -1) for block in blocks.values()], 1))
        torch.testing.assert_close(found, torch.cat(rows))


class Plain(nn.Module):
    """A network by the forward of its base."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return Net.forward(self.of, x)


def test_no_graph_of_a_first_batch_is_held_while_others_are_recorded(monkeypatch):
    monkeypatch.setattr(by_sample, "_MOST", 4)
    x, made, alive = torch.randn(12, 4), [], []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(output() is not None for output in made))
            found = super().forward(x)
            made.append(weakref.ref(found))
            return found

    model = Watched()
    for _ in range(3):
        jacops.sample_jacobians(model, x)
    alive.clear()
    jacops.sample_jacobians(model, x)
    assert alive == [0, 0, 0]
