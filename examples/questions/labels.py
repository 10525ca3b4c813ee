"""Question 2: which training points moved a prediction, and which labels are wrong?

A small classifier learns handwritten digits of which one label in ten was replaced. Influence (a gradient, a
solve with the Hessian, a gradient) finds the wrong labels, and says who taught the network a given mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import jacops
from jacops._extras.report import Report
from questions import Answer, look

QUESTION = "Which training points moved a prediction?"
CODE = """
problem = jacops.TorchTwiceDifferentiable(net, cross_entropy)
scores = jacops.self_influences(
    problem, train_loader, curvature="hessian", damping=decay
)
moved = jacops.compute_influences(
    problem, train_loader, test_data=misread_loader,
    curvature="hessian", damping=decay,
)
"""
DECAY = 3e-3  # the L2 penalty of training; the same number damps the Hessian, so the curvature is the objective's own


@dataclass
class Digits:
    """Training digits, some with a wrong label, and untouched test digits."""

    x: Tensor  # (n, 64), grey levels from 0 to 1
    given: Tensor  # (n,), the labels in training
    true: Tensor  # (n,)
    test_x: Tensor
    test_y: Tensor

    @property
    def flipped(self) -> np.ndarray:
        """Which labels are wrong, (n,)."""
        return (self.given != self.true).numpy()

    def weights(self) -> Tensor:
        """Every training digit weighs the same, (n,)."""
        return torch.full((len(self.x),), 1 / len(self.x), dtype=torch.float64)

    def loader(self) -> DataLoader:
        """The training digits in order."""
        return DataLoader(TensorDataset(self.x, self.given), batch_size=256)


def load(n_train: int) -> Digits:
    """Return the digits with every tenth training label replaced by another; the file is part of scikit-learn."""
    data = load_digits()
    split = train_test_split(data.data / 16, data.target, train_size=n_train, stratify=data.target, random_state=0)
    x, test_x, true, test_y = (torch.from_numpy(part) for part in split)
    draw = np.random.default_rng(0)
    where = torch.from_numpy(draw.choice(n_train, n_train // 10, replace=False))
    given = true.clone()
    given[where] = (true[where] + torch.from_numpy(draw.integers(1, 10, len(where)))) % 10
    return Digits(x, given, true, test_x, test_y)


def objective(net: nn.Module, digits: Digits, weights: Tensor) -> Tensor:
    """What training minimises: the weighted loss and the penalty."""
    penalty = sum(param.square().sum() for param in net.parameters())
    return weights @ cross_entropy(net(digits.x), digits.given, reduction="none") + DECAY / 2 * penalty


def gradient_of(net: nn.Module, digits: Digits, weights: Tensor) -> Tensor:
    """The objective's gradient as one vector: zero at a minimum."""
    return nn.utils.parameters_to_vector(torch.autograd.grad(objective(net, digits, weights), list(net.parameters())))


def descend(value: Callable[[], Tensor], params: list[Tensor], tolerance: float = 1e-7) -> None:
    """Minimise `value` over `params` until no entry of its gradient is above `tolerance`."""

    def closure() -> Tensor:
        optimiser.zero_grad()
        now = value()
        now.backward()
        return now

    optimiser = torch.optim.LBFGS(
        params, max_iter=3000, tolerance_grad=tolerance, tolerance_change=1e-13, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimiser.step(closure)


def train(digits: Digits, hidden: int) -> nn.Module:
    """Return a classifier at a minimum of its objective."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    descend(lambda: objective(net, digits, digits.weights()), list(net.parameters()))
    return net.eval()


def retrain(net: nn.Module, digits: Digits, row: int, root: Tensor) -> nn.Module:
    """Return the classifier as it is when trained on without one digit.

    The search runs in the coordinates in which the Hessian, `root @ root.T`, is the identity: so it takes
    a few dozen gradients where it would take thousands.
    """
    weights, other = digits.weights(), copy.deepcopy(net)
    weights[row] = 0
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    moved = torch.zeros_like(start, requires_grad=True)
    sizes = [param.numel() for param in net.parameters()]

    def at() -> Tensor:
        return start + torch.linalg.solve_triangular(root.T, moved[:, None], upper=True)[:, 0]

    def value() -> Tensor:
        flat = at()
        parts = zip(net.named_parameters(), flat.split(sizes), strict=True)
        values = {name: part.view_as(param) for (name, param), part in parts}
        loss = cross_entropy(functional_call(net, values, digits.x), digits.given, reduction="none")
        return weights @ loss + DECAY / 2 * flat.square().sum()

    descend(value, [moved], tolerance=1e-6)
    nn.utils.vector_to_parameters(at().detach(), other.parameters())
    return other


def found_by(scores: np.ndarray, flipped: np.ndarray) -> np.ndarray:
    """Share of the wrong labels among the k worst-scored, for k = 1 ... n."""
    return np.cumsum(flipped[np.argsort(-scores, kind="stable")]) / flipped.sum()


def change_on_leaving_out(
    net: nn.Module, digits: Digits, rows: np.ndarray, root: Tensor, x: Tensor, y: Tensor
) -> np.ndarray:
    """What the loss of a test digit really changes by when training goes on without each of `rows`."""
    others = [retrain(net, digits, row, root) for row in rows]
    with torch.no_grad():
        return np.array([float(cross_entropy(other(x), y) - cross_entropy(net(x), y)) for other in others])


def draw_curves(curves: dict[str, np.ndarray], n: int, flipped: int) -> look.Figure:
    """How many wrong labels one finds by looking at the worst-scored first."""
    figure, (axes,) = look.axes_in_a_row(3.6, 1)
    looked = np.arange(1, n + 1) / n
    for (name, curve), colour, line in zip(curves.items(), (look.ORANGE, look.BLUE), ("-", "--"), strict=True):
        axes.plot(looked, curve, line, color=colour, label=name)
    axes.plot(looked, np.minimum(looked * n / flipped, 1), ":", color="black", linewidth=1, label="the best possible")
    axes.plot(looked, looked, color=look.GREY, linewidth=1, label="by chance")
    axes.set(xlabel="share of the training digits looked at, worst score first", xlim=(0, 0.3), ylim=(0, 1.04))
    axes.set(ylabel="share of the wrong labels found")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(True)
    axes.legend(loc="center right")
    return figure


def draw_worst(digits: Digits, order: np.ndarray) -> look.Figure:
    """The worst-scored training digits, three rows of ten."""
    figure = look.Figure(figsize=(8.6, 4.1), layout="constrained")
    for axes, row in zip(figure.subplots(3, 10).flat, order, strict=False):
        given, true = int(digits.given[row]), int(digits.true[row])
        title = f"given {given}\n" + ("right" if given == true else f"is {true}")
        look.show_digit(axes, digits.x[row].reshape(8, 8), title, look.GREY if given == true else look.RED)
    return figure


def draw_teachers(
    digits: Digits, x: Tensor, title: str, groups: dict[str, np.ndarray], moved: np.ndarray
) -> look.Figure:
    """One misread test digit beside the training digits that helped and harmed it most."""
    figure = look.Figure(figsize=(8.6, 3.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4))
    look.show_digit(left.subplots(), x.reshape(8, 8), title, look.BLUE)
    for part, (name, rows) in zip(right.subfigures(2, 1), groups.items(), strict=True):
        part.suptitle(name, fontsize=9.5, x=0.01, ha="left")
        for axes, row in zip(part.subplots(1, len(rows)), rows, strict=True):
            wrong = bool(digits.flipped[row])
            label = f"given {int(digits.given[row])}" + (f", is {int(digits.true[row])}" if wrong else "")
            look.show_digit(axes, digits.x[row].reshape(8, 8), label, look.RED if wrong else look.GREY)
            axes.set_xlabel(look.signed(moved[row], 3), fontsize=8.5)
    return figure


def draw_truth(predicted: np.ndarray, retrained: np.ndarray) -> look.Figure:
    """Predicted against retrained changes of loss."""
    figure, (axes,) = look.axes_in_a_row(3.8, 1)
    low, high = min(predicted.min(), retrained.min()), max(predicted.max(), retrained.max())
    axes.plot([low, high], [low, high], color=look.GREY, linewidth=1, label="predicted = retrained")
    axes.scatter(
        predicted, retrained, s=30, color=look.ORANGE, alpha=0.85, linewidth=0, label="one training digit each"
    )
    axes.set(xlabel="change of the test digit's loss, predicted (nats)", ylabel="after retraining without it (nats)")
    axes.grid(True)
    axes.legend(loc="upper left")
    return figure


def ask(report: Report, *, quick: bool = False) -> Answer:
    """Train, score every training digit, explain one mistake, and write the section."""
    answer = Answer(QUESTION)
    with answer.timed("train the classifier"):
        digits = load(200 if quick else 1000)
        net = train(digits, hidden=6 if quick else 32)
    n, flipped = len(digits.x), digits.flipped
    with torch.no_grad():
        losses = cross_entropy(net(digits.x), digits.given, reduction="none").numpy()
        read = net(digits.test_x).argmax(1)
        test_losses = cross_entropy(net(digits.test_x), digits.test_y, reduction="none")
    wrong = torch.nonzero(read != digits.test_y).flatten()
    wrong = wrong[test_losses[wrong].argsort(descending=True)]  # the surest mistake first
    mistakes = DataLoader(TensorDataset(digits.test_x[wrong], digits.test_y[wrong]), batch_size=256)

    problem = jacops.TorchTwiceDifferentiable(net, cross_entropy)
    with answer.timed(f"self-influence, {n} training digits"):
        scores = np.asarray(jacops.self_influences(problem, digits.loader(), curvature="hessian", damping=DECAY))
    with answer.timed(f"influences on {len(wrong)} misread test digits"):
        influences = jacops.compute_influences(
            problem, training_data=digits.loader(), test_data=mistakes, influence_type="up",
            solver="direct", curvature="hessian", damping=DECAY,
        )  # fmt: skip
    info = influences.info
    moved = influences.to_numpy() / n  # what leaving a training digit out does to a test digit's loss

    curves = {"self-influence": found_by(scores, flipped), "loss": found_by(losses, flipped)}
    at = {share: int(share * n) - 1 for share in (0.1, 0.2)}
    teachers = np.argsort(moved, axis=1)  # most harmful first
    mislabelled = flipped[teachers[:, :10]].mean()
    first = moved[0]
    harmful, helpful = teachers[0, :6], teachers[0, ::-1][:6]
    some = np.random.default_rng(1).choice(n, 2 if quick else 8, replace=False)
    tried = np.unique(np.concatenate([harmful[: 1 if quick else 6], helpful[: 1 if quick else 6], some]))
    one_x, one_y = digits.test_x[wrong[:1]], digits.test_y[wrong[:1]]
    with answer.timed(f"retrain {len(tried)} times to check"):
        hessian = problem.hessian(digits.x, digits.given)
        root = torch.linalg.cholesky(hessian + DECAY * torch.eye(len(hessian), dtype=hessian.dtype))
        retrained = change_on_leaving_out(net, digits, tried, root, one_x, one_y)
    agreement = float(np.corrcoef(first[tried], retrained)[0, 1])

    answer.finding = (
        f"Looking at the worst-scored 10% of the training digits finds {curves['self-influence'][at[0.1]]:.0%} of "
        f"the wrong labels by self-influence, {curves['loss'][at[0.1]]:.0%} by plain loss (10% by chance). Of the ten "
        f"training digits that harmed a misread test digit most, {mislabelled:.0%} carry a wrong label."
    )
    answer.certificate = {
        "sign": influences.sign,
        "damping": f"{info['damping']:g}, the L2 penalty of training: the curvature is that of the objective itself",
        "solve": f"{info['method']}, {info['status']}; worst true residual {max(info['residual']):.1e}, "
        "relative to its right side",
        "against retraining": f"correlation {agreement:.3f} with the real change over {len(tried)} digits left out",
        "training": f"gradient {float(gradient_of(net, digits, digits.weights()).norm()):.1e} at the end; "
        "Hessian + damping has a Cholesky root: a minimum",
        "coverage": f"{info['rows']} of {n} training digits in uneven batches, {info['covered']:,} of "
        f"{info['parameters']:,} parameters, all {len(wrong)} misread test digits",
    }

    report.section(QUESTION, answer.finding)
    accuracy = float((read == digits.test_y).double().mean())
    hidden, size = net[0].out_features, sum(param.numel() for param in net.parameters())
    report.text(
        f"A classifier with {hidden} hidden units ({size:,} parameters) learns {n} digits of 8 × 8 pixels; "
        f"{flipped.sum()} of them, drawn at random, were given a wrong label. Trained to a minimum, it reads "
        f"{accuracy:.1%} of {len(read)} untouched test digits right. Influence asks how the minimum would move if "
        "one training digit weighed a little less: one gradient, one solve with the Hessian of the whole "
        "objective, one gradient."
    )
    report.code(CODE)
    report.table(
        ["score", "wrong labels in the worst 10%", "in the worst 20%"],
        [[name, *(f"{curve[at[share]]:.0%}" for share in at)] for name, curve in curves.items()]
        + [["by chance", "10%", "20%"]],
        "Share of all wrong labels found. Self-influence: how much a digit's own loss would rise if it were left out.",
    )
    report.figure(
        draw_curves(curves, n, int(flipped.sum())),
        "Wrong labels found when the training digits are looked at in order of their score. The plain loss is a "
        "strong rival here; but it cannot say which training digits are behind a mistake, as below.",
    )
    report.figure(
        draw_worst(digits, np.argsort(-scores, kind="stable")[:30]),
        "The 30 training digits with the largest self-influence, largest first. Red frame: the label was replaced.",
    )
    report.figure(
        draw_teachers(
            digits, one_x, f"test digit {int(wrong[0])}\nis {int(one_y)}, read as {int(read[wrong[0]])}",
            {"helped most: leaving it out raises the loss (nats)": helpful,
             "harmed most: leaving it out lowers the loss (nats)": harmful}, first,
        ),
        "The surest mistake on the test set, and the training digits behind it. Below each: how much the test "
        f"digit's loss ({float(test_losses[wrong[0]]):.2f} nats) changes when that training digit is left out. Red "
        "frame: the label was replaced.",
    )  # fmt: skip
    report.figure(
        draw_truth(first[tried], retrained),
        f"Predicted and real: {len(tried)} training digits (the most helpful, the most harmful, some at random) were "
        "left out one at a time and the network was trained on to its new minimum. Influence is a forecast of first "
        "order, so the largest changes stray from the line.",
    )
    report.certificate(answer.certificate)
    return answer
