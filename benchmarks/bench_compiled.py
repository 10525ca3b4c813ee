"""The same input Jacobians where both sides may compile: first calls take up to a minute and are not counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn

import jacops

from .bench_input_jacobians import GLASS_BOX, by_functional, glass_box
from .harness import Goal, Workload, same
from .models import Block, cnn

COMPILED = "jacops, compile=True"


def workload(name: str, what: str, model: nn.Module, x: Tensor, least: float) -> Workload:
    """Return one case with its rivals."""
    for param in model.parameters():
        param.requires_grad_(False)
    options = {"compile": True}

    @cache
    def compiled() -> Callable[[Tensor], Tensor]:
        return torch.compile(partial(by_functional, model))

    rivals: dict[str, Callable[[], Tensor]] = {
        COMPILED: lambda: jacops.compute_jacobian(model, x, **options),
        "jacops": lambda: jacops.compute_jacobian(model, x),
        GLASS_BOX: lambda: glass_box(model, x),
        "torch.compile: vmap(jacrev)": lambda: compiled()(x),
    }
    goals = [Goal(GLASS_BOX, faster=least, ours=COMPILED)]
    return Workload(name, what, rivals, same(), goals=goals, compiles=True)


def workloads() -> Iterator[Workload]:
    """Yield A2 and A3, compiled."""
    torch.manual_seed(1)
    yield workload("A2c", "CNN of A2, compiled", cnn(), torch.randn(256, 3, 32, 32), 4.5)
    yield workload("A3c", "transformer block of A3, compiled", Block().eval(), torch.randn(256, 16, 64), 2.1)
