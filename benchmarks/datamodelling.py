"""Linear datamodelling scores of influence as it is by default: models really trained again on halves of the data.

`python -m benchmarks.datamodelling` prints the table of `docs/influence.md`, and `--damping` the measurement from which
the default damping was taken. Five small networks are trained briefly, far from an optimum. Each is then trained again
from the same start on random halves of its data. For every test sample, the score is Spearman's rank correlation, over
these halves, of the test loss with the one that is predicted: a sum of influences of the samples in the half (Park et
al., 2023). Printed is the mean over test samples with its standard error. Everything is seeded; one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, relu

import jacops

HALVES, TESTED, BATCH = 96, 100, 50
SHARES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0)  # of the curvature's spectral norm


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


Data = tuple[Tensor, Tensor]


def digits(rows: int) -> Data:
    """Return images `(rows, 64)` and their digits."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows]
    return torch.as_tensor(x, dtype=torch.float32)[order] / 16, torch.as_tensor(y)[order].long()


def diabetes(rows: int) -> Data:
    """Return ten features of patients and the standardised progress of their disease, `(rows, 1)`."""
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True, scaled=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows]
    x, y = x / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)
    return x[order], y[order]


@dataclass(frozen=True)
class Case:
    """A network, its data, and how it is trained.

    Attributes:
        name: In the table.
        make: Returns the network as it starts.
        load: Returns so many rows of data.
        loss: Of outputs and targets, their mean.
        rows: Of the training data.
        epochs: Of training by Adam.
        rate: Its learning rate.
    """

    name: str
    make: Callable[[], nn.Module]
    load: Callable[[int], Data]
    loss: Callable[..., Tensor]
    rows: int
    epochs: int
    rate: float

    @property
    def data(self) -> tuple[Data, Data]:
        """Training and test data."""
        x, y = self.load(self.rows + TESTED)
        return (x[: self.rows], y[: self.rows]), (x[self.rows :], y[self.rows :])

    def trained(self, rows: Tensor) -> nn.Module:
        """Return the network, trained on some rows of the training data, in eval mode."""
        (x, y), _ = self.data
        torch.manual_seed(0)
        model, generator = self.make().train(), torch.Generator().manual_seed(1)
        optimiser = torch.optim.Adam(model.parameters(), self.rate)
        for _ in range(self.epochs):
            for some in rows[torch.randperm(len(rows), generator=generator)].split(BATCH):
                optimiser.zero_grad()
                self.loss(model(x[some]), y[some]).backward()
                optimiser.step()
        return model.eval()

    def test_losses(self, model: nn.Module) -> Tensor:
        """Return the loss of every test sample, `(tested,)`."""
        _, (x, y) = self.data
        with torch.no_grad():
            return torch.stack([self.loss(model(a), b) for a, b in zip(x.split(1), y.split(1), strict=True)])

    def halves(self, many: int = HALVES) -> Tensor:
        """Return which rows are in each half, `(many, rows)`, as ones."""
        generator, found = torch.Generator().manual_seed(2), torch.zeros(many, self.rows)
        for half in found:
            half[torch.randperm(self.rows, generator=generator)[: self.rows // 2]] = 1
        return found

    def retrained(self, halves: Tensor) -> Tensor:
        """Return the test losses of the networks trained on each half, `(halves, tested)`."""
        return torch.stack([self.test_losses(self.trained(half.nonzero()[:, 0])) for half in halves])

    def influences(self, model: nn.Module, **options: Any) -> jacops.results.Influences:
        """Return influences of the training on the test samples, by default those that a bare call gives."""
        (x, y), test = self.data
        loader = list(zip(x.split(100), y.split(100), strict=True))
        return jacops.compute_influences(model, loader, loss=self.loss, test_data=[test], **options)

    def products(self, model: nn.Module) -> Tensor:
        """Return the products of test with training gradients, `(tested, rows)`."""
        problem = jacops.Problem(model, self.loss, [self.data[0]])
        return problem.sample_gradients().apply(problem.sample_gradients([self.data[1]]).dense())


CASES = [
    Case("MLP", mlp, digits, cross_entropy, 500, 10, 3e-3),
    Case("tanh regression", regression, diabetes, mse_loss, 300, 20, 3e-3),
    Case("ResNet, BatchNorm", ResNet, digits, cross_entropy, 500, 8, 1e-2),
    Case("LSTM", Recurrent, digits, cross_entropy, 500, 15, 1e-2),
    Case("transformer", Transformer, digits, cross_entropy, 500, 12, 3e-3),
]


def score(values: Tensor, halves: Tensor, losses: Tensor) -> Tensor:
    """Return the rank correlation of predicted and real losses over the halves, for each test sample, `(tested,)`."""
    predicted = -halves @ values.T.to(halves)  # a positive influence lowers the loss
    ranks = [part.argsort(0).argsort(0).double() for part in (predicted, losses)]
    a, b = (part - part.mean(0) for part in ranks)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def shown(scores: Tensor) -> str:
    """Return a mean with its standard error."""
    return f"{float(scores.mean()):.3f} ± {float(scores.std() / len(scores) ** 0.5):.3f}"


def line(case: Case, dampings: bool) -> str:
    """Return a network's line in the table of defaults, or in that of dampings."""
    model, halves = case.trained(torch.arange(case.rows)), case.halves()
    losses = case.retrained(halves)
    found = case.influences(model)
    plain, own = (score(values, halves, losses) for values in (case.products(model), found.values))
    if dampings:
        norm = float(jacops.linalg.spectral_norm(jacops.Problem(model, case.loss, [case.data[0]]).ggn()))
        tried = [case.influences(model, damping=share * norm, solver="direct").values for share in SHARES]
        return f"| {case.name} | {' | '.join(f'{float(score(v, halves, losses).mean()):.3f}' for v in tried)} |"
    layers = case.influences(model, solver=jacops.solvers.EKFAC(report_residual=False))
    cells = [
        shown(plain),
        shown(own),
        shown(score(layers.values, halves, losses)),
        f"{float((own > plain).float().mean()):.0%}",
    ]
    size = sum(p.numel() for p in model.parameters())
    return f"| {case.name} | {size:,} | {found.damping:.2g} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or that of dampings."""
    torch.set_num_threads(1)
    dampings = "--damping" in sys.argv[1:]
    columns = (
        [f"{share:g}" for share in SHARES]
        if dampings
        else ["parameters", "damping", "gradient products", "default", "default, EK-FAC", "test samples better off"]
    )
    print(f"| network | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for case in CASES:
        print(line(case, dampings), flush=True)


if __name__ == "__main__":
    main()
