"""Factors by torch's own cross-entropy, whose slopes and Hessian are read off the labels once that is proved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import jacops
from jacops._runtime.counter import Draws
from jacops._torch.sweeps.evidence import neutral
from jacops.errors import InputError, JacopsError, NonFiniteError

KINDS = ["empirical", "ggn", "monte_carlo"]
Batch = tuple[nn.Module, Tensor, Tensor]
Call = Callable[..., list[Tensor]]


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))


def factors(model: nn.Module, x: Tensor, y: Tensor, loss: Any = cross_entropy, kind: Any = "empirical") -> list[Tensor]:
    found = jacops.kronecker_factors(model, loss, x, y, kind=kind)
    return [side for pair in found.values() for side in pair]


def check_same(found: list[Tensor], wanted: list[Tensor], coarse: bool = False) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05 if coarse else None, atol=0.01 if coarse else None)


def written_out(output: Tensor, y: Tensor) -> Tensor:
    """Return cross-entropy as a function of the user's own, of which nothing is known but its values."""
    return cross_entropy(output, y)


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(), written_out])
def test_labels_that_are_ignored_later_are_left_out(loss: Any, batch: Batch) -> None:
    model, x, y = batch
    for _ in range(3):
        factors(model, x, y, loss)
    for ignored in ([2], [2, 5], []):
        own = y.clone()
        own[ignored] = -100
        output = model(x).detach().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(output, own, reduction="sum"), output)
        for _ in range(18):  # with those in which proofs are looked at again
            last = factors(model, x, own, loss)[-2]
            torch.testing.assert_close(last, slope.T @ slope / (7 - len(ignored)))


def test_each_position_of_a_sample_has_its_label(batch: Batch) -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(4, 3, 1).double()
    x, y = torch.randn(6, 4, 5, dtype=torch.float64), torch.randint(3, (6, 5))
    for places in ((), (0, 1)):
        y[places] = -100 if places else y[places]
        for kind in KINDS[:2]:
            wanted = factors(deepcopy(model), x, y, written_out, kind)
            for _ in range(3):
                check_same(factors(model, x, y, kind=kind), wanted)


def weigh(loss: nn.CrossEntropyLoss) -> None:
    loss.weight = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)


def smooth(loss: nn.CrossEntropyLoss) -> None:
    loss.label_smoothing = 0.2


def ignore(loss: nn.CrossEntropyLoss) -> None:
    loss.ignore_index = 1


def add_up(loss: nn.CrossEntropyLoss) -> None:
    loss.reduction = "sum"


def double(module: Any, args: Any, output: Any) -> Any:
    return 2 * output


def hook(loss: nn.CrossEntropyLoss) -> None:
    loss.register_forward_hook(double)


@pytest.mark.parametrize("change", [weigh, smooth, ignore, add_up, hook])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_loss_that_changes_between_calls_is_followed(
    kind: str, change: Callable[[nn.CrossEntropyLoss], None], batch: Batch
) -> None:
    model, x, y = batch
    loss = nn.CrossEntropyLoss()
    before = [factors(model, x, y, loss, kind) for _ in range(3)][-1]
    change(loss)
    fresh = nn.CrossEntropyLoss()
    change(fresh)
    wanted = factors(deepcopy(model), x, y, fresh, kind)  # of a copy nothing is remembered
    for _ in range(2):
        check_same(factors(model, x, y, loss, kind), wanted)
    same_hessian = change is smooth and kind == "ggn"
    assert same_hessian or not torch.allclose(wanted[0], before[0])


class Adjusted(nn.CrossEntropyLoss):
    """Cross-entropy by values that its graph does not keep and that are not looked at among its attributes."""

    def __init__(self, change: str) -> None:
        super().__init__(label_smoothing=0.1 if change == "weight" else 0.0)
        self.change = change
        self.held = SimpleNamespace(prior=torch.full((3,), 2.0), weight=torch.full((3,), 2.0), counted=7)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        target = torch.where(torch.arange(len(target)) < self.held.counted, target, -100)
        scores, weight = input + self.held.prior, self.held.weight.to(input)
        return cross_entropy(scores, target, weight=weight, label_smoothing=self.label_smoothing)


@pytest.mark.parametrize("change", ["prior", "weight", "counted"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_hessian_of_a_loss_of_the_users_is_compared_in_every_call(kind: str, change: str, batch: Batch) -> None:
    model, x, y = batch
    loss, later = Adjusted(change), {"prior": Tensor([3, 2, -1]), "weight": Tensor([2, 3, 5]), "counted": 3}
    for _ in range(3):
        factors(model, x, y, loss, kind)
    vars(loss.held)[change] = later[change]
    output = model(x).detach()
    wanted = torch.autograd.functional.hessian(lambda o: loss(o, y), output)  # of a linear layer the second factor
    for _ in range(2):
        if kind == "ggn":
            found = factors(model, x, y, loss, kind)[-2]
            torch.testing.assert_close(found, torch.einsum("ncnd->cd", wanted))
        elif change == "prior":  # a likelihood whose rows count alike
            check_same(factors(model, x, y, loss, kind), factors(deepcopy(model), x, y, deepcopy(loss), kind))


def test_smoothed_labels_that_begin_to_weigh_unequally_are_followed(batch: Batch) -> None:
    model, x, y = batch
    loss = nn.CrossEntropyLoss(weight=torch.full((3,), 2.0).double(), label_smoothing=0.3)
    for _ in range(3):
        factors(model, x, y, loss, "ggn")
    loss.weight = torch.tensor([2.0, 3.0, 5.0]).double()
    check_same(factors(model, x, y, loss, "ggn"), factors(deepcopy(model), x, y, deepcopy(loss), "ggn"))
    hessian = torch.autograd.functional.hessian(lambda o: loss(o, y), model(x).detach())
    torch.testing.assert_close(factors(model, x, y, loss, "ggn")[-2], torch.einsum("ncnd->cd", hessian))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_no_classes_are_refused_in_remembered_calls_too(kind: str, batch: Batch) -> None:
    model, x, y = batch
    for _ in range(3):
        factors(model, x, y, kind=kind)
    for wrong in (3, -1):
        own = y.clone()
        own[4] = wrong
        with pytest.raises(InputError, match="out of bounds"):
            factors(model, x, own, kind=kind)
    with pytest.raises(InputError, match="cross_entropy"):
        factors(model, x, y.int(), kind=kind)
    check_same(factors(model, x, y, kind=kind), factors(deepcopy(model), x, y, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_not_finite_are_named(kind: str, batch: Batch) -> None:
    model, x, y = batch
    for _ in range(3):
        factors(model, x, y, kind=kind)
    with torch.no_grad():
        model[2].bias[0] = torch.inf  # type: ignore[index]
    with pytest.raises(NonFiniteError):
        factors(model, x, y, kind=kind)


class Mixing(nn.Module):
    """A net that adds the batch's mean, times a number of which nothing in its graph or its attributes tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.read: Callable[[], Tensor] = partial(getattr, SimpleNamespace(share=torch.zeros(3).double()), "share")

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z + z.detach().mean(0) * self.read()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_begin_to_mix_unseen_are_found_by_looking_again(kind: str, batch: Batch) -> None:
    _, x, y = batch
    model, held = Mixing(), SimpleNamespace(share=torch.rand(3).double())
    for _ in range(3):
        factors(model, x, y, kind=kind)
    vars(model)["read"] = lambda: held.share
    for _ in range(3):
        with contextlib.suppress(JacopsError):
            factors(model, x, y, kind=kind)
    held.share = 5 + 5 * torch.rand(3).double()

    def repeat() -> None:
        for _ in range(40):
            factors(model, x, y, kind=kind)

    with pytest.raises(InputError, match="rows together"):
        repeat()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu")])
@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_torch_and_threads_change_nothing(
    kind: str, context: Callable[[], contextlib.AbstractContextManager[object]], batch: Batch
) -> None:
    model, x, y = batch
    model, x = model.float(), x.float()
    before = [factors(model, x, y, kind=kind) for _ in range(3)][-1]
    with context():
        wanted = factors(deepcopy(model), x, y, kind=kind)
    with ThreadPoolExecutor(4) as pool:

        def inside() -> list[Tensor]:
            with context():
                return factors(model, x, y, kind=kind)

        for found in [pool.submit(inside) for _ in range(8)]:
            check_same(found.result(), wanted, coarse=isinstance(context, partial))
    check_same(factors(model, x, y, kind=kind), before)


def test_numbers_that_are_drawn_again_are_the_callers_own() -> None:
    real = torch.ones(5, 1, dtype=torch.bool)
    draws = Draws(3, 2)
    wanted = draws._computed(real, 2)
    draws.uniform(real, 2).zero_()
    assert torch.equal(draws.uniform(real, 2), wanted)
    assert torch.equal(draws.uniform(real.new_zeros(5, 1), 2), wanted)  # those that do not count are not used
    assert not torch.equal(Draws(3, 3).uniform(real, 2), wanted)


def test_functions_of_torch_hold_nothing_but_what_they_close_over() -> None:
    assert not neutral(cross_entropy)
    factor = torch.ones(2)

    def own(x: Tensor) -> Tensor:
        return factor * x

    own.__module__ = "torch.own"
    assert len(neutral(own)) == 1
