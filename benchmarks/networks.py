"""Small networks that are trained again and again, by torch alone: the environments of rivals import them too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Add two convolutions to what came."""
        return relu(x + self.norms[1](self.second(relu(self.norms[0](self.first(x))))))


class ResNet(nn.Module):
    """Two residual blocks over images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks, self.head = nn.Sequential(Block(8), Block(8)), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, 10)`."""
        return self.head(self.blocks(relu(self.norm(self.stem(x.view(-1, 1, 8, 8))))).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, 10)`."""
        return self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])


class Transformer(nn.Module):
    """One encoder layer over an image's rows as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, 16), nn.Parameter(torch.zeros(8, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, 10)`."""
        return self.head(self.layer(self.embed(x.view(-1, 8, 8)) + self.places).mean(1))


def mlp() -> nn.Module:
    """Return a perceptron for images of digits."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def regression() -> nn.Module:
    """Return a perceptron with one output for ten features."""
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


class Attention(nn.Module):
    """A block of self-attention and a perceptron, every product a module of its own, so that hooks see all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and perceptron to what came."""
        normed = self.norms[0](x)
        scores = self.query(normed) @ self.key(normed).transpose(-1, -2) / x.shape[-1] ** 0.5
        x = x + self.out(scores.softmax(-1) @ self.value(normed))
        return x + self.outer(torch.nn.functional.gelu(self.inner(self.norms[1](x))))


class Sequences(nn.Module):
    """A transformer of two layers over an image's rows as tokens."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, width), nn.Parameter(torch.zeros(8, width))
        self.blocks = nn.Sequential(Attention(width), Attention(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(n, 10)`."""
        return self.head(self.norm(self.blocks(self.embed(x.view(-1, 8, 8)) + self.places).mean(1)))


SCORED: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "transformer, two layers": Sequences}
