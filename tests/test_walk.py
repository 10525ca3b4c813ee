"""Walks over modules give what torch's own give, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jacops._torch.model.walk import modules_of, named_modules_of, named_parameters_of, tensors_of


class Shared(nn.Module):
    """A module that stands in two places, tied weights, children that are None, and a cycle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.second = nn.ModuleDict({"again": self.first, "other": nn.Linear(2, 2, bias=False)})
        self.second["other"].weight = self.first[0].weight
        self.gone = None
        self.register_module("none", None)
        self.register_parameter("empty", None)
        self.own = nn.Parameter(torch.ones(3))
        self.add_module("itself", self)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the first does."""
        return self.first(x)


class Renamed(nn.Linear):
    """A module with walks of its own, as FSDP has."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield itself under another name."""
        yield "renamed", self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weight alone."""
        yield "clean", self.weight


CASES: dict[str, Callable[[], nn.Module]] = {
    "one": lambda: nn.Linear(2, 2),
    "without modules": nn.Identity,
    "nested": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "shared": Shared,
    "scripted": lambda: torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(1, 2)),
    "script inside": lambda: nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), nn.Linear(2, 1)),
    "renamed": lambda: Renamed(2, 2),
    "renamed inside": lambda: nn.Sequential(nn.Linear(2, 2), Renamed(2, 2)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_walks_are_those_of_torch(name: str) -> None:
    model = CASES[name]()
    assert [id(m) for m in modules_of(model)] == [id(m) for m in model.modules()]
    assert [(n, id(m)) for n, m in named_modules_of(model)] == [(n, id(m)) for n, m in model.named_modules()]
    found, expected = named_parameters_of(model), dict(model.named_parameters())
    assert list(found) == list(expected)
    assert all(found[n].data_ptr() == p.data_ptr() for n, p in expected.items())


def test_all_tensors_are_found() -> None:
    model = Shared()
    found = {id(tensor) for tensor in tensors_of(modules_of(model))}
    assert found == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
