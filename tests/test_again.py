"""What a run reads of the last one is still its own: names, shapes, keys, random states and the trees of inputs."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional as F

import jacops
import oracle
from jacops._runtime.contexts import random_state_kept, recording
from jacops._torch.sweeps.bounded import Repeated
from jacops._torch.sweeps.graph import inspect_graph
from jacops._trees import flatten, paths_in


class Product(nn.Module):
    """A bilinear model of two square matrices, whose names may be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(3, 3)), nn.Parameter(torch.rand(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b.tanh()


X, Y = torch.rand(5, 3), torch.rand(5, 3)


def check(model: nn.Module, loss: Callable[..., Tensor] = F.mse_loss, y: Tensor = Y, x: Tensor = X) -> list[str]:
    """Compare a product with the Hessian by hand, and return the names of what it is by."""
    wanted = oracle.hessian(model, loss, x, y)
    v = torch.linspace(-1, 1, len(wanted), dtype=next(model.parameters()).dtype)
    torch.testing.assert_close(jacops.hvp(model, loss, x, y, v).double(), wanted @ v.double(), rtol=1e-4, atol=1e-5)
    return [*jacops.hessian(model, loss, x, y).domain.names]


def test_spaces_follow_names_shapes_and_dtypes() -> None:
    model: Any = Product()
    for _ in range(3):
        assert check(model) == ["a", "b"]
    a, b = model.a, model.b
    del model.a, model.b
    model.b, model.a = a, b  # the same tensors and shapes, by each other's names
    assert check(model) == ["b", "a"]
    a.requires_grad_(False)
    assert check(model) == ["a"]
    a.requires_grad_(True)
    model.a = nn.Parameter(torch.rand(3, 7))
    model.b = nn.Parameter(torch.rand(3, 3))
    y = torch.rand(5, 7)
    model.forward = lambda x: x @ model.b @ model.a.tanh()
    named = jacops.hessian(Renamed(model), F.mse_loss, X, y)
    assert dict(zip(named.domain.names, named.domain.shapes, strict=True)) == {"of.b": (3, 3), "of.a": (3, 7)}


class Renamed(nn.Module):
    """A model under a path."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)


def test_spaces_of_two_models_of_one_shape_in_threads() -> None:
    models, failed = [Product(), Renamed(Product())], []
    v = torch.linspace(-1, 1, 18)
    # The oracle chooses kernels of attention for the whole process, so that it must not run beside others.
    wanted = {model: oracle.hessian(model, F.mse_loss, X, Y) @ v.double() for model in models}

    def work(model: nn.Module, names: list[str]) -> None:
        try:
            for _ in range(8):
                found = jacops.hvp(model, F.mse_loss, X, Y, v)
                torch.testing.assert_close(found.double(), wanted[model], rtol=1e-4, atol=1e-5)
                assert [*jacops.hessian(model, F.mse_loss, X, Y).domain.names] == names
        except BaseException as error:
            failed.append(error)

    names = [["a", "b"], ["of.a", "of.b"]]
    threads = [threading.Thread(target=work, args=pair) for pair in zip(models * 2, names * 2, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_dtype_that_changes_between_calls() -> None:
    model = Product()
    check(model)
    check(model)
    check(model.double(), x=X.double(), y=Y.double())
    assert jacops.hessian(model, F.mse_loss, X.double(), Y.double()).dtype is torch.float64


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 0.5])])
def test_sums_of_class_weights_that_are_neutral_or_not(weight: Tensor | None) -> None:
    """Torch divides by them, so that proofs do not rest on their values: none, one, several and no such labels."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y, None if weight is None else weight.to(output))

    for labels in ([0, 2, 2, 0, 2], [0, -100, -100, -100, -100], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1], [2, 2, 2, 1, 0]):
        check(model, loss, torch.tensor(labels))


def test_the_last_key_is_told_from_another_and_from_a_dead_one() -> None:
    kept, made = Repeated[int](2), []

    def ask(key: Any) -> int:
        return kept.take(key, lambda: made.append(key) or len(made))

    assert [ask("a"), ask("a"), ask("b"), ask("a"), ask("c"), ask("a"), ask("b")] == [1, 1, 2, 1, 3, 1, 4]
    assert kept.get("a") == 1
    assert kept.get("c") is None


@pytest.mark.parametrize("given", [(), (X,), (X, None), (X, 1, "word", 2.5, True), (nn.Parameter(X), X)])
def test_flat_tuples_are_flattened_as_torch_does(given: tuple[Any, ...]) -> None:
    leaves, tree = flatten(given, "input")
    paths, spec = paths_in(given)
    assert tree.spec == spec
    assert tree.names == tuple("input" + pytree.keystr(path) for path, _ in paths)
    assert all(a is b for a, (_, b) in zip(leaves, paths, strict=True))
    assert not tree.single
    assert type(tree.build(leaves)) is tuple


def test_recordings_keep_random_states_also_within_each_other() -> None:
    before = torch.get_rng_state()
    with recording():
        torch.rand(3)
        inside = torch.get_rng_state()
        with random_state_kept(), recording():
            torch.rand(3)
        assert torch.equal(torch.get_rng_state(), inside)
    assert torch.equal(torch.get_rng_state(), before)
    with recording(advance=True):
        torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_wirings_tell_numbers_of_outputs_and_edges_apart() -> None:
    x = torch.rand(4, 4, requires_grad=True)
    first, second = (x * 2).unbind()[:2]
    graphs = [first * first, first * second, second * first, second * second, first * 2, first**2, first**3]
    assert len({inspect_graph([graph]).wiring for graph in graphs}) == len(graphs)
    assert inspect_graph([first]).wiring != inspect_graph([second]).wiring
