"""Mislabelled digits found: recall of flipped labels among the worst-scored samples, over five seeds.

`python -m benchmarks.label_errors` prints the table of `docs/influence.md`. 1,000 handwritten digits, one label in ten
replaced by another class; a network learns them with weight decay; every method ranks the training samples by the same
trained network. pyDVL's self-influences run beside ours where it is installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import jacops

SAMPLES, FLIPPED, SEEDS = 1000, 0.1, 5
DECAY, DAMPING = 1e-3, 1e-2


def mlp() -> nn.Module:
    """Return a small multilayer perceptron."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    """Return a small convolutional network."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, given labels, and which of these are wrong."""
    x, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)[:SAMPLES]
    inputs, labels = torch.as_tensor(x, dtype=torch.float32)[order] / 16, torch.as_tensor(y)[order].long()
    wrong = torch.zeros(SAMPLES, dtype=torch.bool)
    wrong[torch.randperm(SAMPLES, generator=generator)[: int(SAMPLES * FLIPPED)]] = True
    shift = torch.randint(1, 10, (SAMPLES,), generator=generator)
    return inputs, torch.where(wrong, (labels + shift) % 10, labels), wrong


def trained(make: Callable[[], nn.Module], x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Return a network trained with weight decay."""
    torch.manual_seed(seed)
    model = make()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(300):
        optimiser.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters())
        (cross_entropy(model(x), y) + DECAY / 2 * penalty).backward()
        optimiser.step()
    return model


Scores = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ours(curvature: str, method: str | jacops.solvers.Solver, damping: float = DAMPING) -> Scores:
    """Return a ranking by self-influence."""

    def scores(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = jacops.TorchTwiceDifferentiable(model, cross_entropy)
        data = list(zip(x.split(256), y.split(256), strict=True))
        return jacops.self_influences(wrapped, data, curvature=curvature, solver=method, damping=damping)

    return scores


def theirs(name: str, **options: object) -> Scores:
    """Return a ranking by pyDVL's self-influence."""

    def scores(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import pydvl.influence.torch as peer
        from torch.utils.data import DataLoader, TensorDataset

        losses = () if name == "EkfacInfluence" else (cross_entropy,)  # which brings its own
        found = getattr(peer, name)(model, *losses, **options).fit(DataLoader(TensorDataset(x, y), batch_size=256))
        blocks = zip(x.split(100), y.split(100), strict=True)
        return torch.cat([found.influences(a, b, a, b).diagonal() for a, b in blocks])

    return scores


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the plain loss of every sample."""
    with torch.no_grad():
        return cross_entropy(model(x), y, reduction="none")


METHODS: dict[str, Scores] = {
    "plain loss": loss,
    "jacops, Hessian, direct": ours("hessian", "direct"),
    "jacops, Hessian, direct, damping 0.5": ours("hessian", "direct", 0.5),
    "jacops, GGN, direct": ours("ggn", "direct"),
    "jacops, GGN, EK-FAC": ours("ggn", jacops.solvers.EKFAC(report_residual=False)),
    "pyDVL 0.10, Hessian, direct": theirs("DirectInfluence", regularization=DAMPING),
    "pyDVL 0.10, EK-FAC": theirs("EkfacInfluence", update_diagonal=True, hessian_regularization=DAMPING),
}


def recall(scores: Tensor, wrong: Tensor, share: float) -> float:
    """Return which part of the wrong labels stands among the worst-scored samples."""
    worst = scores.argsort(descending=True)[: int(len(scores) * share)]
    return float(wrong[worst].sum() / wrong.sum())


def main() -> None:
    """Print the table."""
    print("| network | ranked by | recall in the worst 10 % | in the worst 20 % | seconds |")
    print("|---|---|---|---|---|")
    for title, make in (("MLP", mlp), ("CNN", cnn)):
        sets = [digits(seed) for seed in range(SEEDS)]
        models = [trained(make, x, y, seed) for seed, (x, y, _) in enumerate(sets)]
        for name, method in METHODS.items():
            found: list[tuple[float, float, float]] = []
            error = ""
            for model, (x, y, wrong) in zip(models, sets, strict=True):
                start = time.perf_counter()
                try:
                    scores = method(model, x, y)
                except Exception as reason:  # a method that cannot is a finding
                    error = f"{type(reason).__name__}: {str(reason)[:80]}"
                    break
                found.append((recall(scores, wrong, 0.1), recall(scores, wrong, 0.2), time.perf_counter() - start))
            if error:
                print(f"| {title} | {name} | {error} | | |", flush=True)
                continue
            ten, twenty, seconds = zip(*found, strict=True)
            shown = [f"{100 * statistics.mean(v):.1f} ± {100 * statistics.stdev(v):.1f} %" for v in (ten, twenty)]
            print(f"| {title} | {name} | {shown[0]} | {shown[1]} | {statistics.median(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
