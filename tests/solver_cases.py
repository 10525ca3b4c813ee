"""Matrices of every kind for laws over solvers, made in float64 from a spectrum and a seed."""

import torch

from jacops.linalg import Matrix
from jacops.solvers import CG, MINRES, Auto, Direct, Lanczos, LiSSA, Nystrom, Solver
from small import draw

F32, F64 = torch.float32, torch.float64

SOLVERS: dict[str, Solver] = {
    "direct": Direct(),
    "direct indefinite": Direct(indefinite=True),
    "block cg": CG(),
    "cg": CG(block=False),
    "cg jacobi": CG("jacobi"),
    "cg nystrom": CG("nystrom", block=False),
    "block cg nystrom": CG("nystrom"),
    "minres": MINRES(),
    "lissa": LiSSA(max_steps=300),
    "lanczos": Lanczos(rank=6),
    "nystrom": Nystrom(),
    "auto": Auto(),
}


def rotated(values: torch.Tensor, *, seed: int = 0, dtype: torch.dtype = F64, positive: bool = False) -> Matrix:
    """Return a symmetric matrix with these eigenvalues."""
    n = len(values)
    turn = torch.linalg.qr(draw(n, n, seed=seed))[0]
    matrix = (turn * values.double()) @ turn.T
    return Matrix(((matrix + matrix.T) / 2).to(dtype), symmetric=True, positive=positive)


def falling(n: int, condition: float) -> torch.Tensor:
    """Return eigenvalues from 1 down to 1 / condition, evenly in the logarithm."""
    return torch.tensor([condition ** (-i / max(n - 1, 1)) for i in range(n)], dtype=F64)


def operators(dtype: torch.dtype) -> dict[str, Matrix]:
    """Return one matrix of every kind."""
    zeros = torch.zeros
    return {
        "well conditioned": rotated(falling(12, 10), dtype=dtype, positive=True),
        "ill conditioned": rotated(falling(20, 1e5), dtype=dtype, positive=True),
        "hopeless": rotated(falling(20, 1e16), dtype=dtype, positive=True),
        "singular": rotated(torch.cat([falling(5, 10), zeros(4)]), dtype=dtype, positive=True),
        "indefinite": rotated(torch.linspace(-0.55, 1, 15), dtype=dtype),
        "negative": rotated(-falling(8, 5), dtype=dtype),
        "zero": Matrix(zeros(4, 4, dtype=dtype), symmetric=True, positive=True),
        "one by one": Matrix(torch.full((1, 1), 3.0, dtype=dtype), symmetric=True, positive=True),
        "empty": Matrix(zeros(0, 0, dtype=dtype), symmetric=True, positive=True),
        "tiny": rotated(1e-12 * falling(9, 10), dtype=dtype, positive=True),
    }


def true_residual(operator: Matrix, damping: float, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return relative residuals per row, in double, without the library."""
    matrix = operator.matrix.double() + damping * torch.eye(operator.shape[0], dtype=F64)
    return (b.double() - x.double() @ matrix.T).norm(dim=1) / b.double().norm(dim=1)


def attainable(operator: Matrix, damping: float, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the residuals that rounding allows: eps |A| |x| / |b|."""
    matrix = operator.matrix.double() + damping * torch.eye(operator.shape[0], dtype=F64)
    size = float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0
    return torch.finfo(x.dtype).eps * size * x.double().norm(dim=1) / b.double().norm(dim=1)
