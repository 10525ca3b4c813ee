"""Operators of every kind, for laws that hold for all of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import jacops
from jacops.linalg import Diagonal, Identity, Matrix, Operator, Space

F64 = torch.float64


def net(*, out: int = 2) -> nn.Module:
    """Return a small smooth network with weights that do not depend on the global seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out)).to(F64)


def data(out: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return five samples and their targets."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 3, dtype=F64, generator=generator), torch.randn(5, out, dtype=F64, generator=generator)


class Attention(nn.Module):
    """Self-attention over three tokens of two features."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True).to(F64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _tokens() -> torch.Tensor:
    return torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(5))


def _matrix(rows: int, columns: int) -> Matrix:
    return Matrix(torch.randn(rows, columns, dtype=F64, generator=torch.Generator().manual_seed(rows)))


def _symmetric() -> Matrix:
    root = _matrix(4, 4).matrix
    return Matrix(root @ root.T, symmetric=True, positive=True)


OPERATORS: dict[str, Callable[[], Operator]] = {
    "matrix wide": lambda: _matrix(3, 5),
    "matrix tall": lambda: _matrix(6, 2),
    "matrix symmetric": _symmetric,
    "matrix empty": lambda: _matrix(0, 3),
    "identity": lambda: Identity(Space.flat(4, "x", torch.zeros(4, dtype=F64))),
    "diagonal": lambda: Diagonal(torch.tensor([1.0, -2.0, 3.0], dtype=F64)),
    "transposed": lambda: _matrix(3, 5).T,
    "product": lambda: _matrix(3, 5) @ _matrix(5, 4),
    "congruence": lambda: _matrix(4, 3).T @ _symmetric() @ _matrix(4, 3),
    "gram": lambda: _matrix(3, 5).T @ _matrix(3, 5),
    "sum": lambda: _matrix(3, 5) + 2.0 * _matrix(3, 5),
    "difference": lambda: _matrix(3, 5) - 0.5 * _matrix(3, 5),
    "damped": lambda: _symmetric() + 0.1 * Identity(_symmetric().domain),
    "jacobian by parameters": lambda: jacops.jacobian(net(), data()[0]),
    "jacobian by inputs": lambda: jacops.jacobian(net(), data()[0], "inputs"),
    "jacobian by some parameters": lambda: jacops.jacobian(net(), data()[0], parameters="*bias"),
    "jacobian of one output": lambda: jacops.jacobian(net(), data()[0], outputs=1),
    "jacobian of attention": lambda: jacops.jacobian(Attention(), _tokens()),
    "jacobian from a hidden layer": lambda: jacops.jacobian(net(), data()[0], "inputs", at="0"),
    "jacobian to a hidden layer": lambda: jacops.jacobian(net(), data()[0], at=(None, "1")),
    "hessian": lambda: jacops.hessian(net(), F.mse_loss, *data()),
    "hessian of attention": lambda: jacops.hessian(Attention(), F.mse_loss, _tokens(), torch.zeros(4, 3, 2, dtype=F64)),
    "ggn": lambda: jacops.ggn(net(), F.mse_loss, *data()),
    "ggn of cross-entropy": lambda: jacops.ggn(net(), F.cross_entropy, data()[0], torch.tensor([0, 1, 1, 0, 1])),
    "empirical fisher": lambda: jacops.linalg.empirical_fisher(net(), F.mse_loss, *data()),
    "sample gradients": lambda: jacops.sample_gradients(net(), F.mse_loss, *data()),
}
