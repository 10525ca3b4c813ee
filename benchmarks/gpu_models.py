"""The models of `benchmarks.gpu_check`, and their derivatives in float64 by nothing but `autograd.grad`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention


@dataclass(frozen=True)
class Sizes:
    """How large the models and their data are."""

    width: int = 1024
    samples: int = 512
    images: int = 64
    chain: int = 20_000
    words: int = 50_257
    tokens: int = 256
    embedding: int = 768
    blocks: int = 12
    rows: int = 4_000


TINY = Sizes(16, 12, 3, 60, 40, 6, 8, 2, 24)


def perceptron(width: int) -> nn.Sequential:
    """Return a perceptron of two hidden layers for 64 features and ten classes."""
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def convolutions() -> nn.Sequential:
    """Return two convolutions with a linear head, for 3 × 32 × 32."""
    body = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.triple, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(1, width // 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return what it makes of `(n, tokens, width)`."""
        parts = self.triple(self.before(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        x = x + self.out(scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.between(x))))


class Language(nn.Module):
    """A model in the manner of GPT-2: 124 million parameters in full size, the head tied to the embedding."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(s.words, s.embedding), nn.Embedding(s.tokens, s.embedding)
        self.blocks = nn.Sequential(*(Block(s.embedding) for _ in range(s.blocks)))
        self.norm, self.head = nn.LayerNorm(s.embedding), nn.Linear(s.embedding, s.words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits; they and the embeddings are kept small, as those of a trained model are."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return 0.05 * self.head(self.norm(self.blocks(0.1 * (self.words(tokens) + self.places(places)))))


def next_word(output: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of all words but the first."""
    return cross_entropy(output[:, :-1].flatten(0, 1), y[:, 1:].flatten())


class Chain(nn.Module):
    """Residuals that each hold two neighbouring parameters."""

    def __init__(self, many: int, device: torch.device) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(0, 1, many, device=device, dtype=torch.float64))

    def forward(self) -> Tensor:
        """Return `x[i + 1] - x[i] ** 2`."""
        return self.x[1:] - self.x[:-1] ** 2


class Plain:
    """A model in float64, a batch and a loss, and their derivatives by nothing but `autograd.grad`."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor | None = None, loss: Any = None) -> None:
        self.model = copy.deepcopy(model).double()
        self.x, self.y = (t.double() if t is not None and t.is_floating_point() else t for t in (x, y))
        self.loss, self.params = loss, list(self.model.parameters())

    def output(self) -> Tensor:
        """Return the output, recorded by operations that have second derivatives."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(self.x)

    def parts(self, v: Tensor) -> list[Tensor]:
        """Return a flat vector as one tensor for each parameter."""
        sizes = [p.numel() for p in self.params]
        return [part.view_as(p) for part, p in zip(v.double().split(sizes), self.params, strict=True)]

    def vjp(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """Return `J^T u`, flat."""
        out = self.output() if out is None else out
        return flat(torch.autograd.grad(out, self.params, u.double().view_as(out), retain_graph=True))

    def jvp(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """Return `J v`, by the derivative of `J^T u` by `u`."""
        out = self.output() if out is None else out
        u = torch.zeros_like(out, requires_grad=True)
        slopes = torch.autograd.grad(out, self.params, u, create_graph=True)
        return torch.autograd.grad(slopes, u, self.parts(v), retain_graph=True)[0]

    def hvp(self, v: Tensor) -> Tensor:
        """Return the Hessian times `v`, flat."""
        slopes = torch.autograd.grad(self.loss(self.output(), self.y), self.params, create_graph=True)
        return flat(torch.autograd.grad(slopes, self.params, self.parts(v)))

    def ggnvp(self, v: Tensor) -> Tensor:
        """Return the Gauss-Newton matrix times `v`, flat."""
        out = self.output()
        top = out.detach().requires_grad_()
        slope = torch.autograd.grad(self.loss(top, self.y), top, create_graph=True)[0]
        return self.vjp(torch.autograd.grad(slope, top, self.jvp(v, out))[0], out)

    def gradients(self) -> Tensor:
        """Return the gradient of every sample's loss as rows."""
        samples = zip(self.model(self.x).split(1), self.y.split(1), strict=True)  # pyright: ignore
        return torch.stack(
            [flat(torch.autograd.grad(self.loss(o, y), self.params, retain_graph=True)) for o, y in samples]
        )

    def jacobian(self) -> Tensor:
        """Return the Jacobian of every sample's output by its input, `(n, out, *in)`."""
        x = self.x.detach().requires_grad_()
        out = self.model(x)
        rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in out.unbind(1)]
        return torch.stack(rows, 1)


def flat(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([part.detach().reshape(-1) for part in parts])
