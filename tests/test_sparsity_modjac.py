"""The drop-in call with sparse results."""

import pypose as pp
import pytest
import torch
from torch import Tensor, nn

import jacops
from cases import F64
from jacops.errors import InputError


class Poses(nn.Module):
    """Relative poses along a closed chain, and an offset that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.poses = pp.Parameter(pp.se3(torch.randn(5, 6, generator=generator, dtype=F64)).Exp())
        self.shift = nn.Parameter(torch.ones(6, dtype=F64), requires_grad=False)

    def forward(self) -> Tensor:
        order = torch.arange(5)
        return (self.poses[order].Inv() @ self.poses[(order + 1) % 5]).Log().tensor() + self.shift


class Chain(nn.Module):
    """Neighbours in a vector of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(0, 1, 12, dtype=F64))

    def forward(self, scale: Tensor) -> Tensor:
        return scale * (self.x[1:] - self.x[:-1] ** 2)


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("parameters", [None, "trainable"])
def test_sparse_is_flatten_without_the_zeros(tangent: bool, parameters: str | None) -> None:
    options = {"tangent": tangent, "parameters": parameters}
    found = jacops.modjac(Poses(), sparse=True, **options)
    assert found.layout is torch.sparse_csr
    torch.testing.assert_close(found.to_dense(), jacops.modjac(Poses(), flatten=True, **options))


def test_sparse_of_neighbours_holds_two_numbers_a_row() -> None:
    found = jacops.modjac(Chain(), torch.tensor(2.0, dtype=F64), sparse=True)
    assert found.values().numel() == 22
    expected = jacops.modjac(Chain(), torch.tensor(2.0, dtype=F64), flatten=True)
    torch.testing.assert_close(found.to_dense(), expected)


@pytest.mark.parametrize("option", [{"create_graph": True}, {"strict": True}, {"strategy": "forward-mode"}])
def test_sparse_refuses_what_it_cannot_do(option: dict[str, object]) -> None:
    with pytest.raises(InputError, match="sparse=True"):
        jacops.modjac(Chain(), torch.tensor(2.0, dtype=F64), sparse=True, **option)
