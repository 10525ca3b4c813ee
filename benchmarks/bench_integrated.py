"""Integrated Jacobians: contributions of all outputs along a path, beside one output at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import jacops

from .harness import Goal, Workload, same
from .models import Block, cnn, forward_flops, mlp

LOOP = "torch: one output at a time"
CAPTUM = "captum: IntegratedGradients, one output at a time"
TOLERANCE = 1e-3
MOST = 1024  # nodes after which a rival is not refined any more


def by_outputs(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Return contributions `(n, out, *in)` from zeros by plain autograd, all nodes of a path in one batch."""
    places, weights = (torch.from_numpy(part).to(x) for part in np.polynomial.legendre.leggauss(steps))
    points = torch.cat([x * (t + 1) / 2 for t in places]).requires_grad_()
    found = []
    for output in range(model(x[:1]).shape[1]):
        slopes = torch.autograd.grad(model(points)[:, output].sum(), points)[0].unflatten(0, (steps, len(x)))
        found.append(x * torch.tensordot(weights / 2, slopes, 1))
    return torch.stack(found, 1)


def by_captum(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Return contributions `(n, out, *in)` from zeros by captum, on the nodes of a Gauss-Legendre rule."""
    from captum.attr import IntegratedGradients

    outputs, each = model(x[:1]).shape[1], IntegratedGradients(model)
    parts = [each.attribute(x, target=o, n_steps=steps, method="gausslegendre") for o in range(outputs)]
    return torch.stack(parts, 1)


def refined(call: Callable[[nn.Module, Tensor, int], Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """Return contributions by twice as many nodes as before until they add up to the tolerance for every sample."""
    with torch.no_grad():
        change = model(x) - model(torch.zeros_like(x))
    steps = 8
    while True:
        found = call(model, x, steps)
        gaps = (found.flatten(2).sum(2) - change).abs().amax(1) / change.abs().amax(1)
        if steps >= MOST or bool((gaps <= TOLERANCE).all()):
            return found
        steps *= 2


def quietly(call: Callable[..., Any], *args: Any, **options: Any) -> Tensor:
    """Return contributions; that those of a few nodes do not add up is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jacops.JacopsWarning)
        return call(*args, **options).values


def same_nodes(name: str, what: str, model: nn.Module, x: Tensor, steps: int, goals: list[Goal]) -> Workload:
    """Return a case in which everybody takes the same nodes."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rivals: dict[str, Callable[[], Tensor]] = {
        "jacops": lambda: quietly(jacops.integrated_jacobian, model, x, steps=steps),
        LOOP: lambda: by_outputs(model, x, steps),
        CAPTUM: lambda: by_captum(model, x, steps),
    }
    outputs = model(x[:1]).shape[1]
    flops = float(forward_flops(model, x) * steps * (1 + outputs))
    return Workload(name, what, rivals, same(), goals=goals, flops=flops, result_bytes=x.nbytes * outputs)


def same_gap(name: str, what: str, model: nn.Module, x: Tensor, goals: list[Goal]) -> Workload:
    """Return a case in which everybody refines until contributions add up."""
    found = same_nodes(name, what, model, x, 1, goals)
    rivals: dict[str, Callable[[], Tensor]] = {
        "jacops": lambda: jacops.integrated_jacobian(model, x, tolerance=TOLERANCE).values,
        f"{LOOP}, nodes doubled": lambda: refined(by_outputs, model, x),
        f"{CAPTUM}, nodes doubled": lambda: refined(by_captum, model, x),
    }
    return Workload(name, what, rivals, same(10 * TOLERANCE), goals=goals, flops=found.flops)


def workloads() -> Iterator[Workload]:
    """Yield the cases J1 to J5."""
    torch.manual_seed(1)
    goals = [Goal(CAPTUM, faster=1)]
    smooth, kinked = mlp(64, 128, 128, 10, act=nn.GELU), mlp(64, 128, 128, 10)
    images, tokens = torch.randn(8, 3, 32, 32), torch.randn(16, 16, 64)
    yield same_nodes("J1", "MLP 64-128-128-10 with GELU, 64 samples, 20 nodes", smooth, torch.randn(64, 64), 20, goals)
    yield same_nodes("J2", "CNN on 3 × 32 × 32, 8 samples, 10 outputs, 20 nodes", cnn(), images, 20, goals)
    yield same_nodes("J3", "transformer block, 16 samples, 8 outputs, 20 nodes", Block().eval(), tokens, 20, goals)
    goals = [Goal(f"{CAPTUM}, nodes doubled", faster=1)]
    yield same_gap("J4", "J1's MLP, gap 1e-3", smooth, torch.randn(64, 64), goals)
    yield same_gap("J5", "MLP 64-128-128-10 with ReLU, 64 samples, gap 1e-3", kinked, torch.randn(64, 64), goals)
