"""Results have memory of their own: who writes into one changes no vector that was given, and no other result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops

F64 = torch.float64


class Shift(nn.Module):
    """Adds two parameters, so that cotangents arrive at both as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1, 3, dtype=F64)), nn.Parameter(torch.ones(1, 3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first + self.second


def half_square(output: Tensor, _: Any) -> Tensor:
    return 0.5 * (output**2).sum()


def closure(call: Callable[..., Any], model: Shift) -> Callable[[Tensor], Any]:
    return lambda v: call(lambda: model.first + model.second, [model.first, model.second], v)


X = torch.ones(1, 3, dtype=F64)
FIRST: dict[str, Any] = {"parameters": "first"}
CALLS: dict[str, Callable[[Shift, Tensor], Any]] = {
    "hessian": lambda m, v: jacops.hessian(m, half_square, X, None, **FIRST) @ v[0],
    "columns": lambda m, v: jacops.hessian(m, half_square, X, None, **FIRST) @ v.T,
    "rows": lambda m, v: jacops.hessian(m, half_square, X, None, **FIRST).apply(v),
    "tree": lambda m, v: jacops.hessian(m, half_square, X, None, **FIRST) @ [v],
    "hvp": lambda m, v: jacops.hvp(m, half_square, X, None, [v], **FIRST),
    "ggnvp": lambda m, v: jacops.ggnvp(m, half_square, X, None, v[0], **FIRST),
    "jacobian": lambda m, v: jacops.jacobian(m, X, wrt="inputs") @ v[0],
    "transpose": lambda m, v: jacops.jacobian(m, X, wrt="inputs").T @ v[0],
    "model_vjp": lambda m, v: jacops.model_vjp(m, X, v),
    "model_jvp": lambda m, v: jacops.model_jvp(m, X, [v, torch.zeros_like(v)]),
    "vjp": lambda m, v: closure(jacops.vjp, m)(v),
    "batch_vjp": lambda m, v: closure(jacops.batch_vjp, m)(v.unsqueeze(0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_writing_into_a_result_changes_nothing_else(name: str) -> None:
    model, v = Shift(), torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    for _ in range(3):
        found = CALLS[name](model, v)
        results = found if isinstance(found, list) else [found]
        for i, result in enumerate(results):
            assert torch.equal(result.reshape(-1), v[0])
            assert all(torch.equal(other.reshape(-1), v[0]) for other in results[i:])
            result.zero_()
        assert torch.equal(v, torch.tensor([[1.0, 2.0, 3.0]], dtype=F64))
