"""Input Jacobians of all samples: which features does each output rest on, how fast and in how much memory?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

import jacops

from .by_hand import HAND, input_rows
from .harness import FLOOR, Goal, Workload, same
from .models import Block, after_step, cnn, forward_flops, mlp

GLASS_BOX = "glass-box: its recipe, vmap(jacrev) in chunks"
FORWARD = "torch.func: vmap(jacfwd)"
INTO = "jacops, into `out`"
STEPPED = "jacops, after an optimiser step"
REMEMBERED = Goal("jacops", faster=1 / 1.15, ours=STEPPED)  # proofs survive training


def by_functional(
    model: nn.Module, x: Tensor, transform: Callable[..., Callable[..., Tensor]] = jacrev, chunk: int | None = None
) -> Tensor:
    """Return Jacobians by the usual recipe, `vmap` over a `torch.func` transform."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    return vmap(transform(lambda xi: functional_call(model, params, (xi[None],))[0]), chunk_size=chunk)(x)


def glass_box(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """Return Jacobians as `glass_box_umap` does, written anew: the recipe in chunks, joined at the end."""
    return torch.cat([by_functional(model, part) for part in x.split(batch_size)])


def row_by_row(model: nn.Module, x: Tensor, vectorize: bool = False) -> Tensor:
    """Return Jacobians by `torch.autograd.functional.jacobian` of the outputs' sum over samples."""
    jacobian = torch.autograd.functional.jacobian(lambda inputs: model(inputs).sum(0), x, vectorize=vectorize)
    return jacobian.movedim(1, 0)


def workload(
    name: str,
    what: str,
    model: nn.Module,
    x: Tensor,
    goals: list[Goal],
    sweeps: int | None = None,
    more_flops: float = 0.0,
    by_hand: int | None = None,
) -> Workload:
    """Return one case with its rivals.

    Args:
        name: As in `Workload`.
        what: As in `Workload`.
        model: As it stands; its parameters need no gradient here.
        x: The samples.
        goals: As in `Workload`.
        sweeps: Fewest sweeps that do; the number of outputs by default.
        more_flops: Operations beyond those of the sweeps.
        by_hand: Samples at a time with which a loop over outputs by hand is fastest, where there is one.
    """
    for param in model.parameters():
        param.requires_grad_(False)
    with torch.no_grad():
        outputs = model(x[:1])[0].numel()
    out = torch.zeros(len(x), outputs, *x.shape[1:])
    rivals: dict[str, Callable[[], Tensor]] = {
        "jacops": lambda: jacops.compute_jacobian(model, x),
        INTO: lambda: jacops.compute_jacobian(model, x, out=out),
        STEPPED: after_step(model, lambda: jacops.compute_jacobian(model, x)),
        "jacops, first call with its checks": lambda: jacops.compute_jacobian(model, x, checks="always"),
        GLASS_BOX: lambda: glass_box(model, x),
        "torch.func: vmap(jacrev)": lambda: by_functional(model, x),
        "torch.func: vmap(jacrev), chunk_size=32": lambda: by_functional(model, x, chunk=32),
        FORWARD: lambda: by_functional(model, x, jacfwd),
        "autograd.functional: jacobian of the sum": lambda: row_by_row(model, x),
        "autograd.functional: the same, vectorized": lambda: row_by_row(model, x, vectorize=True),
    }
    if by_hand:
        rivals[f"{HAND}a loop over outputs"] = input_rows(model, x, by_hand)
    if outputs <= x[0].numel():
        rivals.pop(FORWARD)
    if len(x) > 1024:
        rivals.pop("torch.func: vmap(jacrev), chunk_size=32")
    flops = forward_flops(model, x) * (1 + (sweeps or outputs)) + more_flops
    return Workload(name, what, rivals, same(), goals=[*goals, REMEMBERED], flops=flops, result_bytes=out.nbytes)


def workloads() -> Iterator[Workload]:
    """Yield the cases A1 to A5."""
    torch.manual_seed(1)
    what = "MLP 50-1024-512-256-128-2, 10,000 samples"
    goals = [Goal(FLOOR, faster=1 / 1.35), Goal(GLASS_BOX, faster=1.4), Goal(mib=64, ours=INTO)]
    yield workload("A1", what, mlp(50, 1024, 512, 256, 128, 2), torch.randn(10_000, 50), goals, by_hand=2500)
    what = "CNN on 3 × 32 × 32, 256 samples, 10 outputs"
    goals = [Goal(GLASS_BOX, faster=3.2), Goal(mib=60, ours=INTO)]
    yield workload("A2", what, cnn(), torch.randn(256, 3, 32, 32), goals, by_hand=32)
    what = "transformer block, 256 samples, 8 outputs"
    goals = [Goal(GLASS_BOX, faster=1.5), Goal(mib=24, ours=INTO)]
    yield workload("A3", what, Block().eval(), torch.randn(256, 16, 64), goals)
    goals = [Goal(GLASS_BOX, faster=50), Goal(FORWARD, faster=1 / 1.1)]
    decoder = mlp(10, 512, 512, 784)
    yield workload("A4", "decoder 10-512-512-784, 1,024 samples", decoder, torch.randn(1024, 10), goals, sweeps=10)
    goals = [Goal(GLASS_BOX, faster=12, ours=INTO), Goal(mib=32, ours=INTO)]
    what, autoencoder = "autoencoder 784-256-16-256-784, 64 samples", mlp(784, 256, 16, 256, 784)
    product = 2 * 64 * 784 * 16 * 784
    yield workload("A5", what, autoencoder, torch.randn(64, 784), goals, sweeps=16, more_flops=product)
