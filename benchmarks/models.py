"""The models of the benchmarks, seeded."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a multilayer perceptron in eval mode."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).eval()


def cnn() -> nn.Sequential:
    """Return two convolutions with pools and a linear head, for 3 × 32 × 32."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 10),
    ).eval()  # fmt: skip


class Block(nn.Module):
    """One transformer block over 16 tokens of width 64, read out into 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, 8)`."""
        return self.head(self.block(x).mean(1))
