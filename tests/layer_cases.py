"""Models by the ways in which weights enter them: layers of every kind, tied, used twice, shaped by hand."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from small import Calls, draw, settled


class Tokens(nn.Module):
    """An embedding with padding, positions, attention, norms and a gain; the table is also the head where tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.position = nn.Parameter(draw(1, 5, 4, seed=9))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
        self.gain = nn.Parameter(draw(4, seed=8))
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.table(ids) + self.position) * self.gain).mean(1)[:, :3]


class Words(nn.Module):
    """Attention over looked-up words, and weights that know no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(11, 4, padding_idx=3), nn.Parameter(draw(1, 2, 4))
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.inner, self.gain, self.last = nn.Linear(4, 6), nn.Parameter(draw(6)), nn.Parameter(draw(6, 3))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids) + self.places
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return torch.tanh(self.inner(h) * self.gain).mean(1) @ self.last


class SamplesSecond(nn.Module):
    """A transformer layer with the batch along the second axis inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).mean(0))


class Residual(nn.Module):
    """Layers that skip, a norm with gains, a gate."""

    def __init__(self, inputs: int, width: int, outputs: int):
        super().__init__()
        self.first, self.second, self.gate = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width + inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        v = self.norm(h + F.gelu(self.second(h))) * torch.sigmoid(self.gate(h))
        return self.last(torch.cat([v, x], 1))


class Convolutions(nn.Module):
    """Padding, dilation, groups, strides, norms, a gate, a convolution along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(2, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, groups=2, stride=2)
        self.norms, self.gate = nn.ModuleList([nn.BatchNorm2d(4), nn.GroupNorm(2, 4)]), nn.PReLU()
        self.along, self.head = nn.Conv1d(4, 3, 2, stride=2, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(self.norms[1](self.grouped(self.norms[0](self.first(x)))))
        return self.head(self.along(h.flatten(2)).tanh().mean(2))


class TiedWords(nn.Module):
    """A table that is also the head, over running sums."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).cumsum(1).tanh())[:, -1]


class LastState(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    pairs = zip(widths, widths[1:], strict=False)
    layers = [part for a, b in pairs for part in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def tied(w: Tensor, g: Tensor, v: Tensor, x: Tensor) -> Tensor:
    h = torch.tanh(F.linear(x, w)) * g
    return torch.tanh(torch.tanh(h @ w) * g) @ v


def steps(w: Tensor, u: Tensor, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 3)
    for _ in range(2):
        h = torch.tanh(h @ w + x @ u)
    return h


def words(rows: int, length: int, many: int) -> Tensor:
    return torch.randint(0, many, (rows, length), generator=torch.Generator().manual_seed(0))


def of(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Calls(function, *shapes)


DEPTHWISE = (nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: mlp(5, 8, 3), draw(6, 5)),
    "deep": (lambda: mlp(5, 7, 6, 3), draw(9, 5)),
    "without bias": (lambda: mlp(3, 4, 3, bias=False), draw(9, 3)),
    "one sample": (lambda: mlp(5, 8, 3), draw(1, 5)),
    "residual": (lambda: Residual(5, 6, 3), draw(9, 5)),
    "called twice": (lambda: nn.Sequential(*2 * [nn.Linear(3, 3)], nn.Tanh()), draw(9, 3)),
    "turned": (of(lambda W, b, x: ((x @ W) + b).tanh(), (5, 3), (3,)), draw(6, 5)),
    "turned and used both ways": (of(lambda w, b, x: (x @ w + b).tanh() @ w.T, (3, 4), (4,)), draw(9, 3)),
    "used twice": (of(lambda W, x: F.linear(F.linear(x, W).tanh(), W), (5, 5)), draw(6, 5)),
    "used both ways": (of(lambda W, x: F.linear(x, W).tanh() @ W, (4, 5)), draw(6, 5)),
    "unused": (of(lambda W, b, x: F.linear(x, W), (4, 5), (3, 2)), draw(6, 5)),
    "tied": (of(tied, (4, 4), (4,), (4, 3)), draw(7, 4)),
    "few tokens": (lambda: nn.Sequential(mlp(9, 8), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)), draw(6, 2, 9)),
    "many tokens": (of(lambda W, V, x: (F.linear(x, W).tanh() @ V).mean(1), (30, 3), (30, 2)), draw(6, 7, 3)),
    "mixed tokens": (lambda: nn.Sequential(mlp(3, 4, 3), nn.Flatten(), nn.Linear(6, 3)), draw(9, 2, 3)),
    "positions first": (of(lambda w, v, x: (torch.tanh(x @ w) @ v).sum(0), (5, 7), (7, 3)), draw(2, 9, 5)),
    "positions": (of(lambda w, v, x: torch.tanh(x @ w) @ v, (9, 5), (5, 3)), draw(4, 2, 9)),
    "convolutions": (Convolutions, draw(9, 2, 6, 6)),
    "depthwise": (lambda: nn.Sequential(*DEPTHWISE), draw(9, 2, 4, 4)),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten()),
        draw(4, 2, 4, 4),
    ),
    "tied tokens": (lambda: Tokens(tied=True), words(6, 5, 7)),
    "tokens": (lambda: Tokens(tied=False), words(6, 5, 7)),
    "samples second": (SamplesSecond, draw(6, 3, 4)),
    "table": (lambda: nn.Sequential(nn.Embedding(90, 3, 1), nn.Flatten(), nn.Linear(15, 2)), words(6, 5, 7)),
    "words": (Words, words(9, 2, 11)),
    "tied embedding": (TiedWords, words(9, 3, 7)),
    "lstm": (LastState, draw(9, 4, 2)),
    "a product of weights": (of(lambda p, q, w, x: torch.tanh(x @ w) * (p * q), (3,), (3,), (4, 3)), draw(6, 4)),
    "an entry per sample": (of(lambda p, w, x: torch.tanh(x @ w + p) ** 2, (6, 3), (4, 3)), draw(6, 4)),
    "a weight of weights": (of(lambda a, b, x: torch.tanh(x @ (a @ b)), (4, 2), (2, 3)), draw(6, 4)),
    "a loop": (of(steps, (3, 3), (2, 3)), draw(8, 2)),
    "no layer at all": (of(lambda w, x: (x[:, :, None] * w.exp()).sum(1), (3, 3)), draw(9, 3)),
}


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    """A settled model in eval mode, and its inputs."""
    make, x = MODELS[name]
    return settled(make()).eval(), x.clone()
