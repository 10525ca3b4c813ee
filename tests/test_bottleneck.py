"""Splitting at a narrow layer: found where it pays, never where something leads around it."""

import pytest
import torch
from torch import Tensor, nn

import jacops
import oracle
from cases import F64
from jacops._torch.samples.batch import Samples


def autoencoder(*, skip: bool = False, shuffle: bool = False, twice: bool = False) -> nn.Module:
    """Return a net with two numbers in the middle, and perhaps a way around them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.around = nn.Linear(20, 2), nn.Linear(2, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            h = self.down(x.flip(0) if shuffle else x).tanh()
            y = self.up(h.flip(0) if shuffle else h).tanh()
            if twice:
                y = self.up(self.down(y)).tanh()
            return y + self.around(x) if skip else y

    return Net().to(F64)


def route(model: nn.Module, x: Tensor) -> str:
    return Samples(model, x, call="test").jacobians().route


@pytest.mark.parametrize("checks", ["first", "always", "never"])
def test_a_narrow_layer_is_found_and_right(checks: str) -> None:
    model, x = autoencoder(), torch.randn(7, 20, dtype=F64)
    for _ in range(2):
        torch.testing.assert_close(jacops.compute_jacobian(model, x, checks=checks), oracle.input_jacobian(model, x))
    assert "split at down (2 numbers)" in route(model, x)


@pytest.mark.parametrize("around", ["skip", "shuffle", "twice"])
def test_a_way_around_is_no_place_to_cut(around: str) -> None:
    model, x = autoencoder(**{around: True}), torch.randn(7, 20, dtype=F64)
    for _ in range(2):
        torch.testing.assert_close(jacops.compute_jacobian(model, x), oracle.input_jacobian(model, x))
    # Undoing a permutation of samples leaves every sample its own, and the product of the halves right.
    assert ("split at down" in route(model, x)) == (around == "shuffle")


def test_other_chunks_and_later_weights_are_right_too() -> None:
    model, x = autoencoder(), torch.randn(7, 20, dtype=F64)
    jacops.compute_jacobian(model, x, batch_size=3)
    with torch.no_grad():
        model.down.weight.mul_(2)
    torch.testing.assert_close(jacops.compute_jacobian(model, x, batch_size=3), oracle.input_jacobian(model, x))
