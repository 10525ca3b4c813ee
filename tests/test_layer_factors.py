"""Whole parameter Jacobians by where parameters enter: taken where they are right, and only there."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from cases import F64
from jacops._torch.routes.whole import LayerBlocks, layer_route
from jacops._torch.sweeps.linearization import Linearization
from jacops._torch.sweeps.record import record_model


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Again(nn.Module):
    """A layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Aside(nn.Module):
    """A weight used by its layer and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x).tanh(), self.layer.weight)


class Power(nn.Module):
    """A parameter that enters by an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x.exp().pow(self.exponent)


class Mixing(nn.Module):
    """Samples mix a little."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        return y + 1e-9 * y.mean(0)


TAKEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (6, 4)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3), Mean()), (6, 7, 4)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)),
        (4, 2, 5, 6),
    ),
    "squeezed": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (6, 4)),
    "batch norm in eval mode": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)).eval(),
        (6, 4),
    ),
    "used twice": (Again, (6, 4)),
    "used aside": (Aside, (6, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (6, 4)),
    "slopes": (lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)), (6, 4)),
    "written into": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (6, 4)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2)), (4, 2, 4, 4)),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten()),
        (4, 2, 4, 4),
    ),
}
LEFT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm in train mode": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)),
        (6, 4),
    ),
    "mixing": (Mixing, (6, 4)),
    "no rule": (lambda: nn.Sequential(nn.Linear(4, 5), Power(), nn.Linear(5, 3)), (6, 4)),
    "one sample": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (1, 4)),
}


def case(made: tuple[Callable[[], nn.Module], tuple[int, ...]]) -> tuple[nn.Module, Tensor]:
    make, shape = made
    return make().to(F64), torch.randn(shape, dtype=F64)


def by_layers(lin: Linearization) -> LayerBlocks | None:
    route = layer_route(lin)
    return route.blocks(route.together(None)) if route else None


def taken(model: nn.Module, x: Tensor) -> bool:
    found = record_model(model, x, call="test", parameters=lambda name, p: True, checks="always")
    return by_layers(found.lin) is not None


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_blocks_are_the_oracles_at_first_and_later(name: str) -> None:
    model, x = case({**TAKEN, **LEFT}[name])
    (expected,) = oracle.parameter_jacobian(model, x)
    for _ in range(2):
        found = jacops.modjac(model, x)
        for ours, theirs in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", TAKEN)
def test_the_route_is_taken(name: str) -> None:
    assert taken(*case(TAKEN[name]))


@pytest.mark.parametrize("name", LEFT)
def test_the_route_is_left(name: str) -> None:
    assert not taken(*case(LEFT[name]))


def test_it_costs_a_sweep_per_output_entry_and_two_to_check() -> None:
    model, x = case(TAKEN["mlp"])
    sweeps = []
    for _ in range(2):
        found = record_model(model, x, call="test", parameters=lambda name, p: True)
        by_layers(found.lin)
        sweeps.append(found.lin.sweeps)
    assert sweeps == [3 + 2, 3]


def test_mixed_precision_and_sparse_inputs_are_left_to_plain_sweeps() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(model, x)
        assert jacops.modjac(model, x)[0].dtype is torch.float32
    sparse = torch.eye(4).to_sparse()
    (weight, _), (expected, _) = jacops.modjac(model, sparse), jacops.modjac(model, torch.eye(4))
    torch.testing.assert_close(weight, expected)


def test_entries_that_overflow_are_still_found() -> None:
    model, x = nn.Linear(1, 1, bias=False), torch.full((3, 1), 1e30)
    with torch.no_grad():
        model.weight.fill_(1e-30)

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model

        def forward(self, x: Tensor) -> Tensor:
            return 1e20 * self.layer(x)

    assert torch.isfinite(Steep()(x)).all()
    with pytest.raises(jacops.NonFiniteError, match=r"layer\.weight"):
        jacops.modjac(Steep(), x)
