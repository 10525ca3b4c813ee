"""A model's structure is what torch's own walks give, in their order."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from tests.small import draw, settled, square
from torch import Tensor, nn

import jacops
import oracle
from jacops._torch.model.replica import replicate
from jacops._torch.model.structure import ModelStructure


class Shared(nn.Module):
    """A module that stands in two places, tied weights, children that are None, and a cycle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.second = nn.ModuleDict({"again": self.first, "other": nn.Linear(2, 2, bias=False)})
        self.second["other"].weight = self.first[0].weight
        self.gone = None
        self.register_module("none", None)
        self.register_parameter("empty", None)
        self.own = nn.Parameter(torch.ones(3))
        self.add_module("itself", self)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the first does."""
        return self.first(x)


class Renamed(nn.Linear):
    """A module with walks of its own, as FSDP has."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield itself under another name."""
        yield "renamed", self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weight alone."""
        yield "clean", self.weight


CASES: dict[str, Callable[[], nn.Module]] = {
    "one": lambda: nn.Linear(2, 2),
    "without modules": nn.Identity,
    "nested": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "shared": Shared,
    "scripted": lambda: torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(1, 2)),
    "script inside": lambda: nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), nn.Linear(2, 1)),
    "renamed": lambda: Renamed(2, 2),
    "renamed inside": lambda: nn.Sequential(nn.Linear(2, 2), Renamed(2, 2)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_walks_are_those_of_torch(name: str) -> None:
    model = CASES[name]()
    structure = ModelStructure(model)
    assert list(structure.modules) == [id(m) for m in model.modules()]
    assert structure.kinds == tuple(type(m) for m in model.modules())
    assert list(structure.places) == [id(p) for p in structure.parameters.values()]
    for found, expected in (
        (structure.parameters, dict(model.named_parameters())),
        (structure.buffers, dict(model.named_buffers())),
    ):
        assert list(found) == list(expected)
        assert all(found[n].data_ptr() == t.data_ptr() for n, t in expected.items())


@pytest.mark.parametrize("name", ["shared", "renamed"])
def test_all_tensors_are_found(name: str) -> None:
    """Also those that the model does not name."""
    model = CASES[name]()
    found = {id(tensor) for tensor in ModelStructure(model).tensors}
    held = [tensor for m in model.modules() for tensor in (*m._parameters.values(), *m._buffers.values())]
    assert found == {id(tensor) for tensor in held if tensor is not None}


# ---- copies ----------------------------------------------------------------------------------------------------------


class Entangled(nn.Module):
    """Modules in attributes, lists and closures, which lead to each other in every way that a copy has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.table = nn.Embedding(4, 3, sparse=True)
        self.register_buffer("count", torch.zeros(()))
        self.steps = [nn.Tanh(), nn.Linear(3, 3).double()]  # modules that are not registered
        self.again = self.steps
        self.names = OrderedDict(first=self.first, method=self.first.forward)
        self.part = partial(self.apply_to, self.last)
        self.seen: list[Tensor] = []
        self.parent = [self]

    def apply_to(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the module does, and write wherever a forward may."""
        self.count += 1
        self.seen.append(x)
        self.register_forward_hook(lambda *_: None)
        self.steps[0].flag = True
        return module(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return what all of them do."""
        x = self.tied(self.names["method"](x)) + self.table(torch.tensor(1))
        return self.part(self.steps[1](self.steps[0](x)))


def test_a_replica_refers_to_its_own_parts_alone() -> None:
    model = settled(Entangled()).eval()
    x, expected = draw(5, 3), copy.deepcopy(model)(draw(5, 3))
    twin = replicate(model, wrt={"first.weight"})
    copied: Any = twin.module
    assert torch.equal(twin((x,), {}), expected)
    assert (model.count, len(model.seen), len(model._forward_hooks)) == (0, 0, 0)
    assert not hasattr(model.steps[0], "flag")
    assert (copied.count, len(copied.seen), len(copied._forward_hooks), copied.training) == (1, 1, 1, False)
    own = {id(m) for m in (*model.modules(), *model.steps)} | {id(p) for p in model.parameters()}
    held = [*copied.modules(), *copied.steps, *copied.parameters(), copied.part.args[0], copied.names["first"]]
    assert not own & {id(part) for part in held}
    assert copied.first.weight is copied.tied.weight is twin.parameters["first.weight"]
    assert copied.names["method"].__self__ is copied.first is copied.names["first"]
    assert copied.part.args[0] is copied.last
    assert copied.part.func.__self__ is copied.parent[0] is copied
    assert copied.again is copied.steps
    assert not copied.table.sparse
    assert [name for name, p in copied.named_parameters() if p.requires_grad] == ["first.weight"]
    assert copied.last.weight.data_ptr() == model.last.weight.data_ptr()
    assert list(twin.originals) == list(twin.parameters) == [name for name, _ in model.named_parameters()]


# ---- what changes between two calls shows in the second --------------------------------------------------------------


class Bent(nn.Module):
    """A net of modules in a list, with a factor, a buffer and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)])
        self.extra: list[nn.Module] = []
        self.register_buffer("scale", torch.tensor(1.5))
        self.factor, self.curved = 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers do one after the other."""
        for layer in (*self.layers, *self.extra):
            x = layer(x)
        return self.factor * self.scale * (x.sin() if self.curved else x)


def replace_parameter(model: Bent) -> None:
    model.layers[0].weight = nn.Parameter(draw(4, 3, seed=40))


def replace_data(model: Bent) -> None:
    model.layers[2].weight.data = draw(4, 4, seed=41)


def tie(model: Bent) -> None:
    model.layers.append(nn.Linear(2, 2, bias=False).double())
    model.layers.append(nn.Linear(2, 2, bias=False).double())
    model.layers[5].weight = model.layers[6].weight


def freeze(model: Bent) -> None:
    model.layers[0].requires_grad_(False)


def swap(model: Bent) -> None:
    model.layers[1] = nn.Softplus()


def hook(model: Bent) -> None:
    model.layers[2].register_forward_hook(lambda module, args, output: output**2)


def pre_hook(model: Bent) -> None:
    model.layers[4].register_forward_pre_hook(lambda module, args: (args[0].exp(),))


def train(model: Bent) -> None:
    model.layers.insert(1, nn.BatchNorm1d(4).double())
    model.train()


def replace_buffer(model: Bent) -> None:
    model.scale = torch.tensor(-0.5, dtype=torch.float64)


def write_buffer(model: Bent) -> None:
    model.scale.fill_(2.5)


def set_attribute(model: Bent) -> None:
    model.factor = 0.3


def flip(model: Bent) -> None:
    model.curved = True


def extend(model: Bent) -> None:
    model.extra.append(settled(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())))


def widen(model: Bent) -> None:
    model.layers[2], model.layers[4] = settled(nn.Linear(4, 7)), settled(nn.Linear(7, 2))


def patch(model: Bent) -> None:
    first = model.layers[0]
    first.forward = MethodType(lambda self, x: x @ self.weight.T, first)


CHANGES = [replace_parameter, replace_data, tie, freeze, swap, hook, pre_hook, train, replace_buffer, write_buffer]
CHANGES += [set_attribute, flip, extend, widen, patch]
CONTEXTS = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]


def check_calls(model: Bent, x: Tensor, y: Tensor) -> None:
    """Compare products and Jacobians with plain autograd."""
    free = [p for p in model.parameters() if p.requires_grad]
    v = draw(sum(p.numel() for p in free), seed=7)
    found = jacops.hvp(model, square, x, y, v)
    by_inputs = jacops.compute_jacobian(model, x, fallback="silent")
    with torch.inference_mode(False), torch.enable_grad():
        expected = oracle.hessian(model, square, x, y) @ v.clone()
        torch.testing.assert_close(torch.cat([part.reshape(-1) for part in found]).clone(), expected)
        modes = [m.training for m in model.modules()]
        model.eval()
        rows = [torch.autograd.functional.jacobian(lambda one: model(one[None])[0], row) for row in x.clone()]
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        torch.testing.assert_close(by_inputs.clone(), torch.stack(rows))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_call_sees_what_changed_since_the_last(change: Callable[[Bent], None]) -> None:
    model, x, y = settled(Bent()).eval(), draw(6, 3, seed=1), draw(6, 2, seed=2)
    for _ in range(2):
        check_calls(model, x, y)
    change(model)
    for context in CONTEXTS:
        with context():
            check_calls(model, x, y)
    check_calls(model, x[:4], y[:4])


def test_threads_that_call_for_one_model_agree() -> None:
    model, x, y = settled(Bent()).eval(), draw(6, 3, seed=1), draw(6, 2, seed=2)
    failures: list[Exception] = []

    def call() -> None:
        try:
            for _ in range(5):
                check_calls(model, x, y)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Adjustable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)
        self.factor, self.squares = 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.first(x)) * self.factor
        return self.last(hidden**2 if self.squares else hidden)


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


ADJUSTED: dict[str, Callable[[Adjustable], object]] = {
    "flag": lambda model: setattr(model, "squares", True),
    "number": lambda model: setattr(model, "factor", 3.0),
    "module": lambda model: setattr(model, "between", nn.Sigmoid()),
    "hook": lambda model: model.first.register_forward_hook(doubled),
}


@pytest.mark.parametrize("name", ADJUSTED)
def test_what_a_problem_keeps_is_of_the_model_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = Adjustable().double(), torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    problem = jacops.Problem(model, nn.functional.mse_loss, [(x, y)])
    before = problem.hessian().dense()
    ADJUSTED[name](model)
    expected = jacops.hessian(model, nn.functional.mse_loss, x, y).dense()
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(problem.hessian().dense(), expected)
