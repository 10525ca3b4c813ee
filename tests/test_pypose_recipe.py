"""The PyPose recipe: optimisers with jacops' Jacobian take the steps that they take with their own."""

import re
from pathlib import Path
from typing import Any

import pypose as pp
import pytest
import torch
from torch import Tensor, nn

from jacops.errors import NonFiniteError

PAGE = Path(__file__).parent.parent / "docs" / "recipes" / "pypose.md"
RECIPE: dict[str, Any] = {"__name__": "pypose_recipe"}
exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0], RECIPE)
OWN = {"GN": pp.optim.GN, "LM": pp.optim.LM}
OWN_MODJAC = pp.optim.optimizer.modjac


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pose = pp.Parameter(pp.randn_se3(2, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.pose.Exp() @ x).Log().tensor()


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.poses = pp.Parameter(pp.randn_SE3(5, sigma=0.2, dtype=torch.float64))

    def forward(self, edges: Tensor, measured: Tensor) -> Tensor:
        a, b = self.poses[edges[:, 0]], self.poses[edges[:, 1]]
        return (measured.Inv() @ a.Inv() @ b).Log().tensor()


class Two(nn.Module):
    """Two residuals of two parameters each."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.scale = (nn.Parameter(torch.tensor([v]).double()) for v in (0.5, 1.0))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * torch.exp(-self.rate * t), (self.rate * self.scale).expand(1, 1)


def chain() -> tuple[Tensor, Tensor]:
    edges = torch.tensor([(i, i + k) for k in (1, 2) for i in range(5 - k)])
    return edges, pp.randn_SE3(len(edges), sigma=0.3, dtype=torch.float64)


def case(name: str) -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """Return a model, its input, its target and options of the optimiser."""
    torch.manual_seed(3)
    t = torch.linspace(0, 2, 12).double()[:, None]
    if name == "two":
        weight = [2 * torch.eye(1).double(), 0.5 * torch.eye(1).double()]
        target = (3 * torch.exp(-1.5 * t), torch.ones(1, 1).double())
        return Two(), t, target, {"kernel": [pp.optim.kernel.Huber(), None], "weight": weight}
    if name == "graph":
        return Graph(), chain(), None, {}
    if name == "mapping":
        edges, measured = chain()
        return Graph(), {"edges": edges, "measured": measured}, None, {"kernel": pp.optim.kernel.Cauchy()}
    if name == "net":
        net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        return net, t, t.sin(), {"vectorize": False}
    return Inverse(), pp.randn_SE3(2, 2, dtype=torch.float64), None, {}


def run(kind: Any, name: str, **more: Any) -> tuple[list[float], list[Tensor]]:
    model, x, y, options = case(name)
    optimizer = kind(model, **options, **more)
    losses = [float(optimizer.step(x, y)) for _ in range(4)]
    return losses, [torch.as_tensor(p.detach()).clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["inverse", "graph", "mapping", "two", "net"])
@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("coloured", [False, True])
def test_the_steps_are_those_of_pypose(kind: str, name: str, coloured: bool) -> None:
    own, parameters = run(OWN[kind], name)
    losses, found = run(RECIPE[kind], name, coloured=coloured)
    assert own[0] != own[1]
    torch.testing.assert_close(losses, own, rtol=1e-7, atol=1e-18)
    for a, b in zip(found, parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("coloured", [False, True])
def test_a_frozen_pose_stays_and_the_others_are_fitted(coloured: bool) -> None:
    truth = pp.randn_SE3(5, sigma=0.5, dtype=torch.float64)

    class Anchored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = pp.Parameter(truth[:1].clone(), requires_grad=False)
            self.others = pp.Parameter(truth[1:] @ pp.randn_SE3(4, sigma=0.1, dtype=torch.float64))

        def forward(self, edges: Tensor) -> Tensor:
            poses = torch.cat([self.first, self.others])
            apart = truth[edges[:, 0]].Inv() @ truth[edges[:, 1]]
            return (apart.Inv() @ poses[edges[:, 0]].Inv() @ poses[edges[:, 1]]).Log().tensor()

    model, edges = Anchored(), chain()[0]
    with pytest.raises(RuntimeError, match="split_sizes"):
        OWN["LM"](model).step(edges)
    optimizer = RECIPE["LM"](model, coloured=coloured)
    for _ in range(6):
        loss = optimizer.step(edges)
    assert float(loss) < 1e-20
    torch.testing.assert_close(model.first.tensor(), truth[:1].tensor(), rtol=0, atol=0)
    torch.testing.assert_close(model.others.matrix(), truth[1:].matrix(), rtol=0, atol=1e-9)


def test_an_error_leaves_pypose_as_it_is() -> None:
    model = nn.Linear(2, 1).double()
    with pytest.raises(NonFiniteError, match=r"weight|output"):
        RECIPE["LM"](model).step(torch.tensor([[float("nan"), 1.0]]).double(), torch.zeros(1, 1).double())
    assert pp.optim.optimizer.modjac is OWN_MODJAC
