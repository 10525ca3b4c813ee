"""Small calls: what does a derivative of a small model cost that hardly any arithmetic stands behind?

What counts here is what every call does besides its sweeps: copies, recording, what is compared with earlier calls. So
each row stands beside a loop of plain autograd that does none of that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy, mse_loss

import jacops

from .bench_input_jacobians import by_functional
from .by_hand import HAND as BY_HAND
from .by_hand import input_rows
from .harness import BEST, Goal, Workload, same
from .models import mlp

HAND = f"{BY_HAND}sweeps"
LOOP = f"{BY_HAND}a loop over outputs"
FUNCTIONAL = "torch.func: vmap(jacrev)"
PARAMETERS = "torch.func: jacrev by parameters"
FIRST = "jacops, first call with its checks"


def small_cnn() -> nn.Sequential:
    """Return two convolutions with pools and a linear head, for 1 × 16 × 16."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10),
    ).eval()  # fmt: skip


def inputs(name: str, what: str, model: nn.Module, x: Tensor) -> Workload:
    """Return the Jacobians by inputs of one model, remembered."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rivals: dict[str, Callable[[], Any]] = {
        "jacops.compute_jacobian": lambda: jacops.compute_jacobian(model, x),
        FIRST: lambda: jacops.compute_jacobian(model, x, checks="always"),
        FUNCTIONAL: lambda: by_functional(model, x),
        LOOP: input_rows(model, x, len(x)),
    }
    return Workload(name, what, rivals, same(), rounds=25, goals=[Goal(BEST, faster=1 / 1.2)])


class Toy:
    """A small classifier with a batch and a direction of its parameters.

    Args:
        widths: Of its layers.
        n: How many samples.
    """

    def __init__(self, *widths: int, n: int) -> None:
        self.model = mlp(*widths, act=nn.Tanh)
        self.x, self.y = torch.randn(n, widths[0]), torch.arange(n) % widths[-1]
        self.params = list(self.model.parameters())
        self.v = torch.randn(sum(p.numel() for p in self.params))
        parts = self.v.split([p.numel() for p in self.params])
        self.vs = [part.reshape(p.shape) for part, p in zip(parts, self.params, strict=True)]
        self.slopes = self.recorded()

    def recorded(self) -> tuple[Tensor, ...]:
        """Return the gradient with its graph."""
        return grad(cross_entropy(self.model(self.x), self.y), self.params, create_graph=True)

    def product(self, slopes: tuple[Tensor, ...]) -> Tensor:
        """Return the product with the Hessian, of a recorded gradient."""
        found = grad(slopes, self.params, self.vs, retain_graph=True)
        return torch.cat([part.flatten() for part in found])


def one_product(toy: Toy) -> Workload:
    """Return M4: a product of an operator that is made for it."""
    given = toy.model, cross_entropy, toy.x, toy.y, toy.v
    rivals: dict[str, Callable[[], Any]] = {
        "jacops.hvp": lambda: jacops.hvp(*given),
        FIRST: lambda: jacops.hvp(*given, checks="always"),
        HAND: lambda: toy.product(toy.recorded()),
    }
    what = "one product with the Hessian, toy classifier"
    return Workload("M4", what, rivals, same(), rounds=25, goals=[Goal(HAND, faster=1 / 1.6)])


def kept_product(toy: Toy) -> Workload:
    """Return M5: a product of an operator that was made before."""
    H = jacops.hessian(toy.model, cross_entropy, toy.x, toy.y)  # noqa: N806
    rivals: dict[str, Callable[[], Any]] = {
        "jacops.hessian: H @ v": lambda: H @ toy.v,
        HAND: lambda: toy.product(toy.slopes),
    }
    return Workload("M5", "the same, of what was recorded before", rivals, same(), rounds=25, goals={HAND: 1.0})


def by_rows(model: nn.Module, x: Tensor) -> Tensor:
    """Return `(n * k, P)` by a sweep for each row, as `modjac` was published."""
    params, output = list(model.parameters()), model(x).flatten()
    rows = [grad(value, params, retain_graph=True) for value in output]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def by_jacrev(model: nn.Module, x: Tensor) -> Tensor:
    """Return `(n * k, P)` by one transform over all rows."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = jacrev(lambda p: functional_call(model, p, (x,)).flatten())(params)
    return torch.cat([block.flatten(1) for block in found.values()], 1)


def dense(name: str, what: str, model: nn.Module, x: Tensor) -> Workload:
    """Return the dense Jacobian by parameters, by the operator and by `modjac`."""
    flat, plain = "jacops.modjac, flatten", "torch.autograd: a sweep for each row"
    rivals: dict[str, Callable[[], Any]] = {
        "jacops.jacobian, dense": lambda: jacops.jacobian(model, x).dense(),
        flat: lambda: jacops.modjac(model, x, flatten=True),
        FIRST: lambda: jacops.jacobian(model, x, checks="always").dense(),
        plain: lambda: by_rows(model, x),
        PARAMETERS: lambda: by_jacrev(model, x),
    }
    goals = [Goal(rival, faster=1 / 1.2) for rival in (flat, plain)]
    return Workload(name, what, rivals, same(), rounds=25, goals=goals)


class Chain(nn.Module):
    """Residuals of neighbours in a vector of parameters.

    Args:
        size: How many parameters.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, scale: Tensor) -> Tensor:
        """Return a residual for every two neighbours, and one for every parameter."""
        return torch.cat([scale * (self.x[1:] - self.x[:-1] ** 2), 1 - self.x])


def sparse(size: int) -> Workload:
    """Return M7: the sparse Jacobian, called again, beside the evaluation of a plan that the caller keeps."""
    model, scale = Chain(size), torch.tensor(10.0, dtype=torch.float64)
    plan, kept = jacops.sparse_plan(model, scale), "jacops.sparse_plan: evaluate, kept"

    def first() -> Tensor:
        fresh = Chain(size)
        return jacops.modjac(fresh, scale, sparse=True)

    rivals: dict[str, Callable[[], Any]] = {
        "jacops.modjac, sparse": lambda: jacops.modjac(model, scale, sparse=True),
        "jacops.modjac, sparse, first call": first,
        kept: lambda: plan.evaluate(model, scale, layout="csr").matrix,
    }
    what = f"sparse Jacobian of a chain of {size:,} parameters"
    return Workload("M7", what, rivals, _same_values, rounds=25, goals={kept: 1 / 1.2})


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and same()(a.to_dense(), b.to_dense())


class Counted(nn.Module):
    """A model that counts its forwards.

    Args:
        model: It.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = Counter[str]()  # shared by the copies that are run

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model does."""
        self.forwards["all"] += 1
        return self.model(x)


def influences() -> Workload:
    """Return M8: all influences among two batches by conjugate gradients, and how often the model ran for them."""
    batches = [(torch.randn(32, 8), torch.randn(32, 2)) for _ in range(2)]
    model = Counted(mlp(8, 16, 2, act=nn.Tanh))

    def call(of: nn.Module) -> Tensor:
        return jacops.compute_influences(of, batches, loss=mse_loss, solver="cg", damping=0.1).values

    for _ in range(2):
        model.forwards.clear()
        call(model)
    rivals: dict[str, Callable[[], Any]] = {
        "jacops.compute_influences, cg": lambda: call(model),
        "jacops.compute_influences, cg, first call": lambda: call(Counted(model.model)),
    }
    what = f"influences again, 2 batches of 32: {model.forwards.total() / 2:g} forwards a batch (wanted: ≤ 2)"
    return Workload("M8", what, rivals, same(1e-2))


def imports() -> Workload:
    """Return M9: a process that imports jacops, beside one that imports torch."""
    # As installed: with bytecode, which the first of these processes writes.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    rivals: dict[str, Callable[[], Any]] = {
        "jacops: import": lambda: run("import jacops"),
        "jacops: import of one name": lambda: run("from jacops import hessian"),
        "jacops: import of all names": lambda: run("from jacops import *"),
        "torch: import": lambda: run("import torch"),
    }
    return Workload("M9", "import in a fresh process", rivals, rounds=7, goals={"torch: import": 1 / 1.15})


def workloads() -> Iterator[Workload]:
    """Yield the cases M1 to M9."""
    torch.manual_seed(6)
    encoder, net = mlp(50, 128, 128, 2), mlp(64, 128, 128, 10, act=nn.GELU)
    yield inputs("M1", "encoder 50-128-128-2, 2,048 samples", encoder, torch.randn(2048, 50))
    yield inputs("M2", "MLP 64-128-128-10 with GELU, 128 samples", net, torch.randn(128, 64))
    yield inputs("M3", "CNN on 1 × 16 × 16, 32 samples, 10 outputs", small_cnn(), torch.randn(32, 1, 16, 16))
    toy = Toy(8, 16, 16, 3, n=32)
    yield one_product(toy)
    yield kept_product(toy)
    yield dense("M6", "MLP 8-16-16-3 with tanh, 32 samples: 96 × 467", mlp(8, 16, 16, 3, act=nn.Tanh), toy.x)
    yield sparse(300)
    yield influences()
    yield imports()
