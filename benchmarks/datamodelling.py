"""Linear datamodelling scores of influence as it is by default: models really trained again on halves of the data.

`python -m benchmarks.datamodelling` prints the table of `docs/influence.md`, and `--damping` the measurement from which
the default damping was taken. Five small networks are trained briefly, far from an optimum. Each is then trained again
from the same start on random halves of its data. For every test sample, the score is Spearman's rank correlation, over
these halves, of the test loss with the one that is predicted: a sum of influences of the samples in the half (Park et
al., 2023). Printed is the mean over test samples with its standard error. Everything is seeded; one thread.

What training gave is kept in `benchmarks/results`, below a digest of everything that decides it, and read from there
by whoever asks again, `benchmarks.influence_quality` too.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import jacops

from . import networks
from .harness import RESULTS
from .networks import Recurrent, ResNet, Transformer, mlp, regression

HALVES, TESTED, BATCH = 96, 100, 50
SHARES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0)  # of the curvature's spectral norm
MEMBERS = 5  # of an ensemble; the first is the network itself

Data = tuple[Tensor, Tensor]
State = dict[str, Tensor]


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
        tested: Test samples.
        many: Halves on which it is trained again.
    """

    name: str
    make: Callable[[], nn.Module]
    load: Callable[[int], Data]
    loss: Callable[..., Tensor]
    rows: int
    epochs: int
    rate: float
    tested: int = TESTED
    many: int = HALVES

    @cached_property
    def data(self) -> tuple[Data, Data]:
        """Training and test data."""
        x, y = self.load(self.rows + self.tested)
        return (x[: self.rows], y[: self.rows]), (x[self.rows :], y[self.rows :])

    def trained(self, rows: Tensor, seed: int = 0, states: list[State] | None = None) -> nn.Module:
        """Return the network trained on some rows of the training data; `states` takes four on its way."""
        (x, y), _ = self.data
        torch.manual_seed(seed)
        model, generator = self.make().train(), torch.Generator().manual_seed(seed + 1)
        optimiser = torch.optim.Adam(model.parameters(), self.rate)
        for epoch in range(1, self.epochs + 1):
            for some in rows[torch.randperm(len(rows), generator=generator)].split(BATCH):
                optimiser.zero_grad()
                self.loss(model(x[some]), y[some]).backward()
                optimiser.step()
            if states is not None and epoch in [-(-self.epochs * part // 4) for part in range(1, 5)]:
                states.append(state(model))
        return model.eval()

    def test_losses(self, model: nn.Module) -> Tensor:
        """Return the loss of every test sample, `(tested,)`."""
        _, (x, y) = self.data
        with torch.no_grad():
            return self.loss(model(x), y, reduction="none").reshape(len(x), -1).mean(1)

    @cached_property
    def halves(self) -> Tensor:
        """Which rows are in each half, `(many, rows)`, as ones."""
        generator, found = torch.Generator().manual_seed(2), torch.zeros(self.many, self.rows)
        for half in found:
            half[torch.randperm(self.rows, generator=generator)[: self.rows // 2]] = 1
        return found

    def retrained(self) -> Tensor:
        """Return the test losses of the networks trained on each half, `(many, tested)`."""
        return torch.stack([self.test_losses(self.trained(half.nonzero()[:, 0])) for half in self.halves])

    @property
    def digest(self) -> str:
        """Of all that decides what training gives: data, start, halves, settings, and the code of both."""
        torch.manual_seed(0)  # as `trained` does
        tensors = [self.halves, *(part for pair in self.data for part in pair), *state(self.make()).values()]
        settings = [self.name, self.loss.__name__, self.epochs, self.rate, self.tested, self.many, BATCH, MEMBERS]
        found = hashlib.sha256(repr([*settings, torch.__version__]).encode())
        for code in (networks, Case.trained, Case.test_losses, trainings):
            found.update(inspect.getsource(code).encode())
        for tensor in tensors:
            found.update(repr((tensor.shape, tensor.dtype)).encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

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


def state(model: nn.Module) -> State:
    """Return a copy of a network's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Trainings:
    """What training a case gave.

    Attributes:
        losses: Test losses of the networks trained on each half, `(many, tested)`.
        states: Four states on the way of the network itself, the last of which is the network.
        members: The network, and others that started and went through the data by other seeds.
    """

    losses: Tensor
    states: list[State]
    members: list[State]


def trainings(case: Case) -> Trainings:
    """Train a case: itself, others by other seeds, and on each half of its data."""
    states: list[State] = []
    rows = torch.arange(case.rows)
    members = [state(case.trained(rows, seed, states if seed == 0 else None)) for seed in range(MEMBERS)]
    return Trainings(case.retrained(), states, members)


def kept(case: Case, folder: Path = RESULTS) -> Trainings:
    """Return what training a case gave, from the file of its digest; where there is none, train and write it."""
    path = folder / f"trained-{case.digest}.safetensors"
    if not path.exists():
        found = trainings(case)
        groups = {f"state {k}": part for k, part in enumerate(found.states)}
        groups |= {f"member {k}": part for k, part in enumerate(found.members)}
        tensors = {f"{group}/{name}": value for group, part in groups.items() for name, value in part.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"losses": found.losses, **tensors}, path.with_suffix(".part"), {"case": case.name})
        path.with_suffix(".part").replace(path)  # so that a killed run leaves none that looks whole
    read = load_file(path)
    grouped: dict[str, State] = {}
    for name in sorted(read.keys() - {"losses"}):
        group, _, own = name.partition("/")
        grouped.setdefault(group, {})[own] = read[name]
    states, members = ([part for group, part in grouped.items() if group.startswith(k)] for k in ("state", "member"))
    return Trainings(read["losses"], states, members)


def network(case: Case, found: Trainings) -> nn.Module:
    """Return the trained network of a case, in eval mode."""
    model = case.make()
    model.load_state_dict(found.members[0])
    return model.eval()


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
    trained = kept(case)
    model, halves, losses = network(case, trained), case.halves, trained.losses
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
