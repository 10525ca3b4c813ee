"""Input Jacobians of all samples: which features does each output rest on, how fast and in how much memory?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

import jacops

from .harness import Workload, same
from .models import Block, cnn, mlp


def by_functional(model: nn.Module, x: Tensor, transform: Callable[..., Callable[..., Tensor]] = jacrev) -> Tensor:
    """Return Jacobians by the usual recipe, `vmap` over a `torch.func` transform."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    return vmap(transform(lambda xi: functional_call(model, params, (xi[None],))[0]))(x)


def glass_box(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """Return Jacobians as attribution packages do it: the recipe in chunks, joined at the end."""
    return torch.cat([by_functional(model, part) for part in x.split(batch_size)])


def row_by_row(model: nn.Module, x: Tensor) -> Tensor:
    """Return Jacobians by `torch.autograd.functional.jacobian` of the outputs' sum over samples."""
    jacobian = torch.autograd.functional.jacobian(lambda inputs: model(inputs).sum(0), x)
    return jacobian.movedim(1, 0)


def workload(name: str, what: str, model: nn.Module, x: Tensor, goals: dict[str, float], fast: bool = True) -> Workload:
    """Return one case with its rivals."""
    for param in model.parameters():
        param.requires_grad_(False)
    rivals: dict[str, Callable[[], Tensor]] = {
        "jacops": lambda: jacops.compute_jacobian(model, x),
        "jacops, first call with its checks": lambda: jacops.compute_jacobian(model, x, checks="always"),
        "vmap(jacrev) in chunks, joined": lambda: glass_box(model, x),
        "vmap(jacrev)": lambda: by_functional(model, x),
        "vmap(jacfwd)": lambda: by_functional(model, x, jacfwd),
        "autograd.functional.jacobian": lambda: row_by_row(model, x),
    }
    if not fast:
        rivals.pop("vmap(jacfwd)")
    return Workload(name, what, rivals, same(), goals=goals)


def workloads() -> Iterator[Workload]:
    """Yield the cases A1 to A5."""
    torch.manual_seed(1)
    chunked = "vmap(jacrev) in chunks, joined"
    wide = mlp(50, 1024, 512, 256, 128, 2)
    yield workload(
        "A1", "MLP 50-1024-512-256-128-2, 10,000 samples", wide, torch.randn(10_000, 50), {chunked: 1.4}, False
    )
    yield workload(
        "A2", "CNN on 3 × 32 × 32, 256 samples, 10 outputs", cnn(), torch.randn(256, 3, 32, 32), {chunked: 3.2}, False
    )
    yield workload(
        "A3",
        "transformer block, 256 samples, 8 outputs",
        Block().eval(),
        torch.randn(256, 16, 64),
        {chunked: 1.5},
        False,
    )
    decoder = mlp(10, 512, 512, 784)
    yield workload(
        "A4",
        "decoder 10-512-512-784, 1,024 samples",
        decoder,
        torch.randn(1024, 10),
        {chunked: 50, "vmap(jacfwd)": 0.91},
    )
    autoencoder = mlp(784, 256, 16, 256, 784)
    yield workload(
        "A5", "autoencoder 784-256-16-256-784, 64 samples", autoencoder, torch.randn(64, 784), {chunked: 12}, False
    )
