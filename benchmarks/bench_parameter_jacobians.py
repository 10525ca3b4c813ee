"""Parameter Jacobians of every sample's outputs, dense or as factors: what does a training point weigh?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import jacops

from .by_hand import HAND, parameter_rows
from .harness import BEST, Goal, Workload, same
from .models import after_step, cnn, forward_flops, mlp

PYPOSE = "PyPose: modjac"
FUNCTIONAL = "torch.func: vmap(jacrev), joined"
INTO = "jacops.sample_jacobians, dense into `out`"
MODJAC = "jacops.modjac"
STEPPED = "jacops.modjac, after an optimiser step"


def by_functional(model: nn.Module, x: Tensor) -> Tensor:
    """Return `(n * k, P)` by the usual recipe."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    found = vmap(jacrev(lambda p, xi: functional_call(model, p, (xi[None],))[0]), (None, 0))(params, x)
    return torch.cat([block.flatten(2) for block in found.values()], 2).flatten(0, 1)


def pypose(model: nn.Module, x: Tensor, vectorize: bool = False) -> Tensor:
    """Return `(n * k, P)` by PyPose's function, which does not distinguish samples."""
    from pypose.optim.functional import modjac

    return modjac(model, x, vectorize=vectorize, flatten=True)


def backpack(model: nn.Sequential, x: Tensor) -> Tensor:
    """Return `(n * k, P)` by per-sample gradients of each output."""
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import BatchGrad

    extend(model)
    rows, outputs = [], model(x[:1]).shape[1]
    for k in range(outputs):
        with extended(BatchGrad()):
            model(x)[:, k].sum().backward()
        rows.append(torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1))  # pyright: ignore
    model.zero_grad()
    return torch.stack(rows, 1).flatten(0, 1)


def torchjd(model: nn.Module, x: Tensor) -> Tensor:
    """Return `(n * k, P)` by TorchJD's batched rows."""
    from torchjd.autojac import jac

    return torch.cat([block.flatten(1) for block in jac(model(x).flatten(), list(model.parameters()))], 1)


def workload(name: str, what: str, make: Callable[[], nn.Sequential], x: Tensor, goals: list[Goal]) -> Workload:
    """Return one case with its rivals, each of which gets a model of its own (BackPACK changes it)."""
    model, other = make(), make()
    with torch.no_grad():
        rows = model(x).numel()
    out = torch.zeros(rows, sum(p.numel() for p in model.parameters()))
    rivals: dict[str, Callable[[], Any]] = {
        "jacops.sample_jacobians, dense": lambda: jacops.sample_jacobians(model, x).dense(),
        INTO: lambda: jacops.sample_jacobians(model, x).dense(out),
        MODJAC: lambda: jacops.modjac(model, x, flatten=True),
        "jacops.modjac, into `out`": lambda: jacops.modjac(model, x, flatten=True, out=out),
        STEPPED: after_step(model, lambda: jacops.modjac(model, x, flatten=True)),
        FUNCTIONAL: lambda: by_functional(model, x),
        PYPOSE: lambda: pypose(model, x),
        "PyPose: modjac(vectorize=True)": lambda: pypose(model, x, vectorize=True),
        "BackPACK: BatchGrad of each output": lambda: backpack(other, x),
        "TorchJD: jac": lambda: torchjd(model, x),
        f"{HAND}hooks and products": lambda: parameter_rows(model, x),
    }
    flops = forward_flops(model, x) * (1 + 2 * rows / len(x))  # cotangents, and weight gradients, of each output
    return Workload(name, what, rivals, same(), goals=goals, flops=flops, result_bytes=out.nbytes)


def factors() -> Workload:
    """Return B4: what is kept of a Jacobian that nobody needs as a matrix."""
    model = mlp(512, 512, 50, act=nn.Tanh)
    x = torch.randn(16, 512)
    rivals: dict[str, Callable[[], Any]] = {
        "jacops.sample_jacobians, factors": lambda: jacops.sample_jacobians(model, x),
        FUNCTIONAL: lambda: by_functional(model, x),
    }
    what = "factors only: 16 samples × 50 outputs × 288,306 parameters"
    return Workload("B4", what, rivals, same(1e-6), goals=[Goal(mib=16)])


def forward() -> Workload:
    """Return B5: a push per parameter, as who asks for forward mode gets."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    x, params = torch.randn(32, 1, 8, 8), {n: p.detach() for n, p in model.named_parameters()}

    def functional() -> Tensor:
        found = torch.func.jacfwd(lambda p: functional_call(model, p, (x,)))(params)
        return torch.cat([block.flatten(2) for block in found.values()], 2).flatten(0, 1)

    rivals: dict[str, Callable[[], Any]] = {
        "jacops.modjac, forward mode": lambda: jacops.modjac(model, x, flatten=True, strategy="forward-mode"),
        "torch.func: jacfwd": functional,
    }
    what = "forward mode, small CNN, 32 samples: 320 × 666"
    return Workload("B5", what, rivals, same(), goals=[Goal(BEST, faster=1.0)])


def workloads() -> Iterator[Workload]:
    """Yield the cases B1, B2 (with B3, the same through `modjac`), B4 and B5."""
    torch.manual_seed(3)

    def goals(modjac: float, functional: float, mib: float) -> list[Goal]:
        own = [Goal(PYPOSE, faster=modjac), Goal(FUNCTIONAL, faster=functional), Goal(mib=mib, ours=INTO)]
        halves = [(PYPOSE, modjac / 2), (FUNCTIONAL, functional / 2)]
        own.append(Goal(MODJAC, faster=1 / 1.15, ours=STEPPED))  # proofs survive training
        return [*own, *(Goal(rival, faster=least, ours=MODJAC) for rival, least in halves)]

    what = "MLP 20-64-64-5, 256 samples: 1,280 × 5,829"
    small = torch.randn(256, 20)
    yield workload("B1", what, lambda: mlp(20, 64, 64, 5, act=nn.Tanh), small, goals(50, 1.6, 8))
    yield workload("B2", "CNN, 64 samples: 640 × 25,578", cnn, torch.randn(64, 3, 32, 32), goals(30, 1.0, 48))
    yield factors()
    yield forward()
