"""Influence against the truth: what leaving a training sample out really does, by retraining to convergence.

`python -m benchmarks.leave_one_out` prints the table of `docs/influence.md`. Ridge regression on the diabetes data,
logistic regression on the standardised breast-cancer data with scikit-learn's C: float64, 100 random points left out
one at a time, the loss of 50 test points before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn

import jacops

LEFT_OUT = 100
TESTED = 50


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: Data and regularisation.
        method: First order, or with the leverage correction.
        pearson: Correlation of predicted with real changes.
        slope: Of the least-squares line through the origin, real changes by predicted ones.
        largest: The largest leverage of a sample that was left out.
    """

    case: str
    method: str
    pearson: float
    slope: float
    largest: float


class Case:
    """A convex problem: a linear model, its loss, its penalty, and its optimum for any sample weights."""

    def __init__(self, name: str, x: np.ndarray, y: np.ndarray, penalty: float, logistic: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(x), generator=generator)
        data = torch.as_tensor(x).double()[order], torch.as_tensor(y).double()[order].unsqueeze(1)
        self.name, self.penalty, self.logistic = name, penalty, logistic
        self.x, self.y = (part[TESTED:] for part in data)
        self.test_x, self.test_y = (part[:TESTED] for part in data)
        self.loss = nn.BCEWithLogitsLoss(reduction="sum") if logistic else nn.MSELoss(reduction="sum")
        self.model = nn.Linear(x.shape[1], 1).double()
        self.fit(self.model, torch.ones(len(self.x)).double())

    @property
    def l2(self) -> dict[str, float]:
        """The penalty spares the intercept; a squared error has twice a half."""
        return {"weight": self.penalty}

    def fit(self, model: nn.Linear, weights: Tensor) -> None:
        """Put a model at the optimum of the weighted objective, by Newton's method."""
        design = torch.cat([self.x, torch.ones(len(self.x), 1).double()], 1)
        ridge = torch.full((design.shape[1],), self.penalty).double()
        ridge[-1] = 0
        theta = torch.cat([model.weight.detach()[0], model.bias.detach()])
        for _ in range(100):
            score = design @ theta
            if self.logistic:
                slope, bend = score.sigmoid() - self.y[:, 0], score.sigmoid() * (1 - score.sigmoid())
            else:
                slope, bend = 2 * (score - self.y[:, 0]), torch.full_like(score, 2.0)
            gradient = design.T @ (weights * slope) + ridge * theta
            step = torch.linalg.solve((design.T * (weights * bend)) @ design + torch.diag(ridge), gradient)
            theta = theta - step
            if float(step.norm()) <= 1e-13 * float(theta.norm()):
                break
        with torch.no_grad():
            model.weight.copy_(theta[None, :-1])
            model.bias.copy_(theta[-1:])

    def test_losses(self, model: nn.Linear) -> Tensor:
        """Return the loss of every test point, (tested,)."""
        with torch.no_grad():
            return torch.stack([self.loss(model(x), y) for x, y in zip(self.test_x, self.test_y, strict=True)])

    def real(self, left_out: Tensor) -> Tensor:
        """Return how each test loss changes when each of some samples is left out, (tested, left out)."""
        before, changes = self.test_losses(self.model), []
        for i in left_out.tolist():
            weights = torch.ones(len(self.x)).double()
            weights[i] = 0
            model = nn.Linear(self.x.shape[1], 1).double()
            model.load_state_dict(self.model.state_dict())
            self.fit(model, weights)
            changes.append(self.test_losses(model) - before)
        return torch.stack(changes, 1)


def cases() -> list[Case]:
    """Return ridge regression, and logistic regression from strong to weak regularisation."""
    x, y = load_diabetes(return_X_y=True, scaled=True)
    found = [Case("diabetes, ridge 1", x / x.std(0), (y - y.mean()) / y.std(), 2.0, logistic=False)]
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return found + [Case(f"breast cancer, C = {C}", x, y, 1 / C, logistic=True) for C in (0.01, 0.1, 1.0, 10.0)]


def rows(case: Case) -> list[Row]:
    """Compare predicted with real changes, plainly and with the leverage correction."""
    picked = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(1))[:LEFT_OUT]
    real = case.real(picked)
    wrapped, found = jacops.TorchTwiceDifferentiable(case.model, case.loss), []
    for method in ("first order", "with leverage"):
        predicted = jacops.compute_influences(
            wrapped,
            [(case.x, case.y)],
            test_data=[(case.test_x, case.test_y)],
            input_data=[(case.x[picked], case.y[picked])],
            curvature="hessian",
            damping=0,
            l2=case.l2,
            leverage=method == "with leverage",
        )
        a, b = predicted.leave_one_out().flatten(), real.flatten()
        pearson = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        leverage = predicted.info.get("leverage")
        largest = float("nan") if leverage is None else float(leverage.max())
        found.append(Row(case.name, method, pearson, float((a @ b) / (a @ a)), largest))
    return found


def main() -> None:
    """Print the table."""
    print("| data | prediction | Pearson r | slope real / predicted | largest leverage |")
    print("|---|---|---|---|---|")
    for case in cases():
        for row in rows(case):
            largest = "" if row.largest != row.largest else f"{row.largest:.2f}"
            print(f"| {row.case} | {row.method} | {row.pearson:.4f} | {row.slope:.3f} | {largest} |")


if __name__ == "__main__":
    main()
