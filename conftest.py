"""Names that doctests may use without importing them, one seed for every test, and a fixture of several files."""

import gc
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch


def pytest_collection_finish() -> None:
    """Take collected tests and imported modules out of the garbage collector's passes, which take seconds with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, np=np)


@pytest.fixture(autouse=True)
def _same_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["numba", "scipy"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loops over fronts, compiled or not."""
    if request.param == "scipy":
        monkeypatch.setitem(sys.modules, "jacops.fit._compiled", None)
    elif find_spec("numba") is None:
        pytest.skip("numba is not installed")
    return request.param
