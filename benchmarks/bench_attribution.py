"""Contributions: what bias parts and their checks take beside the Jacobian, once proofs about the model are known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import jacops

from .harness import Goal, Workload, same
from .models import cnn, forward_flops, mlp

OURS, ALONE = "jacops", "jacops, the Jacobian alone"
NO_MORE_THAN = 1.5  # times the Jacobian


def workload(name: str, what: str, model: nn.Module, x: Tensor) -> Workload:
    """Return one case: contributions beside the Jacobian that they rest on."""
    for param in model.parameters():
        param.requires_grad_(False)
    with torch.no_grad():
        outputs = model(x[:1])[0].numel()
    rivals: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: jacops.contributions(model, x).jacobian,
        ALONE: lambda: jacops.compute_jacobian(model, x),
    }
    flops = forward_flops(model, x) * (2 + outputs)
    size = 2 * x.numel() * outputs * x.element_size()
    goals = [Goal(ALONE, faster=1 / NO_MORE_THAN)]
    return Workload(name, what, rivals, same(), goals=goals, flops=flops, result_bytes=size, dtype=x.dtype)


def workloads() -> Iterator[Workload]:
    """Yield the cases H1 to H5."""
    torch.manual_seed(1)
    perceptron, rows = mlp(50, 256, 256, 10), torch.randn(2048, 50)
    images, convolutions = torch.randn(64, 3, 32, 32), cnn()
    yield workload("H1", "MLP 50-256-256-10, 2,048 samples", perceptron, rows)
    yield workload("H2", "the same in double precision", copy.deepcopy(perceptron).double(), rows.double())
    hard = mlp(50, 256, 256, 10, act=nn.Hardtanh)
    yield workload("H3", "the same with hardtanh, which adds constants", hard, rows)
    yield workload("H4", "CNN on 3 × 32 × 32, 64 samples, 10 outputs", convolutions, images)
    yield workload("H5", "the same in double precision", copy.deepcopy(convolutions).double(), images.double())
