"""Small things that many tests share: seeded numbers, a settled net, a function of its weights as a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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


class Calls(nn.Module):
    """A function of its weights and its input."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(shapes))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*self.weights, *args, **kwargs)
