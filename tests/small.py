"""Small things that many tests share: seeded numbers, settled nets, comparisons, and counts of what a call costs."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from jacops import JacopsWarning
from jacops.results import Contributions, JacobianVerification


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def settled(model: nn.Module) -> nn.Module:
    model = model.double()
    for index, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(0.5 * draw(*parameter.shape, seed=index))
    return model


def small_net() -> nn.Sequential:
    return settled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def tied_net() -> nn.Sequential:
    model = settled(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)))
    model[2].weight = model[0].weight
    return model


def square(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def tangents(model: nn.Module, *batch: int) -> list[Tensor]:
    return [draw(*batch, *p.shape, seed=30 + i).to(p.dtype) for i, p in enumerate(model.parameters())]


def batches(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


class Calls(nn.Module):
    """A function of its weights and its input."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(shapes))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*self.weights, *args, **kwargs)


def by_hand(values: Any, out: int = 1, **fields: Any) -> Contributions:
    """Contributions whose output is the sum of them all and of a bias."""
    tree = values if isinstance(values, dict) else {"x": values}
    leaves = [leaf for leaf in tree.values() if leaf is not None]
    shape = leaves[0].shape[: 1 + out]
    bias = draw(*shape, seed=9)
    output = bias + sum(v.flatten(1 + out).sum(-1) if v.ndim > 1 + out else v for v in leaves)
    verification = JacobianVerification((0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0)
    parts = {"values": values, "bias": bias, "output": output, "jacobian": values, "verification": verification}
    return Contributions(**{**parts, "slope_error": 0.0, "notes": (), **fields})  # pyright: ignore


# Comparing


def close(actual: Any, expected: Any, rtol: float = 1e-10, same_dtype: bool = True) -> None:
    """Two trees hold tensors of the same shapes, dtypes and numbers."""
    for a, b in zip(oracle.leaves(actual), oracle.leaves(expected), strict=True):
        assert a.shape == b.shape, f"shape {tuple(b.shape)} expected, got {tuple(a.shape)}"
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, check_dtype=same_dtype)


def flat(blocks: oracle.Blocks, params: list[Tensor]) -> Tensor:
    """Blocks `[output][parameter]` as one matrix."""
    return torch.cat(
        [torch.cat([b.reshape(-1, p.numel()) for b, p in zip(row, params, strict=True)], 1) for row in blocks]
    )


def quiet(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the call gives; that it took a slower route is another test's matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        return call(*args, **options)


def refused(kind: type[Exception], call: Callable[..., Any], *words: str) -> Exception:
    """The call raises an error of this kind whose message holds the words, in this order; returns the error."""
    with pytest.raises(kind) as caught:
        quiet(call)
    place = 0
    for part in words:
        place = str(caught.value).find(part, place)
        assert place >= 0, f"{part!r} is missing, or out of order, in: {caught.value}"
        place += len(part)
    return caught.value


# Counting


class Counts:
    """Forward runs and backward sweeps."""

    forward = backward = 0


class Swept(nn.Module):
    """A model that counts its runs and the backward sweeps through its output (or, on request, its input)."""

    def __init__(self, model: nn.Module, at_input: bool = False):
        super().__init__()
        self.model, self.at_input = model, at_input
        self.counts = Counts()  # no container, so that private copies share it

    def forward(self, x: Tensor) -> Tensor:
        self.counts.forward += 1
        hidden = x * 1.0
        output = self.model(hidden)
        watched = hidden if self.at_input else output
        if watched.requires_grad:
            watched.register_hook(self.swept)
        return output

    def swept(self, grad: Tensor) -> None:
        self.counts.backward += 1

    def spent(self) -> tuple[int, int]:
        """Forward runs and backward sweeps since the last time they were asked for."""
        counts = self.counts.forward, self.counts.backward
        self.counts.forward = self.counts.backward = 0
        return counts
