"""The same models in torch and in JAX, with the same weights: parameters as a tuple in torch's own order."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from small import draw, settled, small_net

if jax.__version__.startswith("0.10."):  # a flag that XLA does not know ends the process
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # compiles in less than half the time


@contextmanager
def double_precision() -> Iterator[None]:
    """JAX in float64, compiling with little optimisation, for as long as a test runs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def as_jax(tensor: Tensor) -> Any:
    return jnp.array(tensor.detach().numpy())


def as_torch(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def weights(model: nn.Module) -> tuple[Any, ...]:
    return tuple(as_jax(p) for p in model.parameters())


def mse(output: Any, y: Any) -> Any:
    return jnp.mean((output - y) ** 2)


def cross_entropy(output: Any, y: Any) -> Any:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], 1))


def mlp(params: Sequence[Any], x: Any) -> Any:
    w, b, v, c = params
    return jnp.tanh(x @ w.T + b) @ v.T + c


def cnn(params: Sequence[Any], x: Any) -> Any:
    kernel, bias, w, b = params
    hidden = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID") + bias[:, None, None]
    return jnp.tanh(hidden).reshape(x.shape[0], -1) @ w.T + b


class Attention(nn.Module):
    """One head, with a norm and a residual, over four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(3, 9), nn.Linear(3, 3)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inward(x).chunk(3, -1)
        mixed = torch.softmax(q @ k.mT / 3**0.5, -1) @ v
        return self.head(self.norm(x + self.outward(mixed)).mean(1))


def attention(params: Sequence[Any], x: Any) -> Any:
    w, b, v, c, scale, shift, head, bias = params
    q, k, value = jnp.split(x @ w.T + b, 3, -1)
    mixed = jax.nn.softmax(q @ k.swapaxes(1, 2) / 3**0.5, -1) @ value
    stream = x + mixed @ v.T + c
    centred = stream - stream.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift
    return normed.mean(1) @ head.T + bias


@dataclass
class Pair:
    """A model and its loss in torch and in JAX, and a batch."""

    model: nn.Module
    loss: Callable[..., Tensor]
    apply: Callable[..., Any]
    jax_loss: Callable[..., Any]
    x: Tensor
    y: Tensor

    @property
    def params(self) -> tuple[Any, ...]:
        return weights(self.model)


PAIRS: dict[str, Callable[[], Pair]] = {
    "mlp": lambda: Pair(small_net(), F.mse_loss, mlp, mse, draw(5, 3), draw(5, 2, seed=1)),
    "cnn": lambda: Pair(
        settled(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))),
        F.cross_entropy,
        cnn,
        cross_entropy,
        draw(4, 1, 3, 3),
        torch.tensor([0, 2, 1, 1]),
    ),
    "attention": lambda: Pair(
        settled(Attention()), F.cross_entropy, attention, cross_entropy, draw(3, 4, 3), torch.tensor([0, 1, 1])
    ),
}
