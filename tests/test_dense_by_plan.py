"""Dense Jacobians that take the sweeps of a sparse plan once they were seen to be mostly zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
from jacops import _dense_by_plan
from jacops.errors import NonFiniteError

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Chain(nn.Module):
    """Neighbours tied by residuals of three numbers, and a prior on every fourth."""

    def __init__(self, many: int = 120, several: bool = False) -> None:
        super().__init__()
        self.x, self.s = nn.Parameter(noise(many, 3)), nn.Parameter(noise(many - 1, seed=1))
        self.several, self.gate = several, 0.0

    def forward(self, shift: Tensor) -> Any:
        ties = (self.x[1:] - self.x[:-1]).sin() * self.s[:, None] + shift
        if self.gate:
            ties = ties + self.gate * self.x[:1]
        prior = self.x[::4].square().sum(-1)
        return {"ties": ties, "prior": prior} if self.several else ties


def by_rows(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    parts = list(output.values()) if isinstance(output, dict) else [output]
    flat, rows = torch.cat([part.flatten() for part in parts]), []
    for entry in flat:
        grads = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=F64) if g is None else g.flatten()
                    for g, p in zip(grads, model.parameters(), strict=True)
                ]
            )
        )
    return torch.stack(rows)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call went by the plan."""
    found: list[bool] = []
    old = _dense_by_plan.DenseByPlan.matrix

    def matrix(self: _dense_by_plan.DenseByPlan) -> Any:
        result = old(self)
        found.append(result is not None)
        return result

    monkeypatch.setattr(_dense_by_plan.DenseByPlan, "matrix", matrix)
    return found


@pytest.mark.parametrize("several", [False, True])
def test_later_calls_take_the_plan_and_give_the_same(several: bool, counted: list[bool]) -> None:
    model, x = Chain(several=several), noise(3, seed=2)
    for step in range(4):
        right = by_rows(model, x)
        torch.testing.assert_close(jacops.modjac(model, x, flatten=True), right, rtol=1e-12, atol=1e-14)
        whole = jacops.modjac(model, x)
        parts = [whole] if not several else list(whole.values() if isinstance(whole, dict) else whole)
        flat = [
            torch.cat([b.reshape(b.numel() // p.numel(), -1) for b, p in zip(part, model.parameters(), strict=True)], 1)
            for part in parts
        ]
        torch.testing.assert_close(torch.cat(flat), right, rtol=1e-12, atol=1e-14)
        with torch.no_grad():  # a step of an optimiser
            for p in model.parameters():
                p.add_(noise(*p.shape, seed=step))
    assert counted[0] is False
    assert all(counted[1:])


def test_structures_of_both_routes_are_the_same() -> None:
    model, x = Chain(several=True), noise(3)
    first, again = jacops.modjac(model, x), jacops.modjac(model, x)
    assert jacops.modjac(model, x, parameters="s", flatten=True).shape == (3 * 119 + 30, 119)
    first, again = (torch.utils._pytree.tree_flatten(found) for found in (first, again))
    assert first[1] == again[1]
    for one, other in zip(first[0], again[0], strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype


def test_a_model_that_changes_its_structure_is_right(counted: list[bool]) -> None:
    model, x = Chain(), noise(3)
    for gate in (0.0, 0.0, 0.5, 0.5, 0.0):
        model.gate = gate
        torch.testing.assert_close(jacops.modjac(model, x, flatten=True), by_rows(model, x), rtol=1e-12, atol=1e-14)
    assert sum(counted) >= 3


def test_full_or_small_jacobians_and_layers_are_not_planned(counted: list[bool]) -> None:
    full, small = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 30)).double(), Chain(9)
    for _ in range(3):
        jacops.modjac(full, noise(8, 40), flatten=True)
        jacops.modjac(small, noise(3), flatten=True)
    assert not any(counted)


def test_other_questions_do_not_go_by_a_plan(counted: list[bool]) -> None:
    model, x = Chain(), noise(3)
    jacops.modjac(model, x)
    right = by_rows(model, x)
    many = len(counted)
    out = torch.empty_like(right)
    assert jacops.modjac(model, x, flatten=True, out=out) is out
    torch.testing.assert_close(out, right)
    assert jacops.modjac(model, x, flatten=True, create_graph=True).requires_grad
    torch.testing.assert_close(jacops.modjac(model, x, flatten=True, strategy="forward-mode"), right)
    assert len(counted) == many


def test_values_that_are_not_finite_are_named_as_before() -> None:
    model, x = Chain(), noise(3)
    jacops.modjac(model, x)
    jacops.modjac(model, x)
    with torch.no_grad():
        model.s[3] = torch.inf
    with pytest.raises(NonFiniteError, match="x|s"):
        jacops.modjac(model, x)
