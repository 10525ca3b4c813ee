"""Jacobians in a store: the rows of the call without one, in tiles that processes share."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("zarr")

import jacops
from jacops import _stored_rows, compute_jacobian
from jacops.errors import InputError, NonFiniteError, StoreIncompleteError, StoreMismatchError
from jacops.store import Store, StoredArray, read_store
from shared_store import jacobian, notes, share_jacobian
from small import draw, small_net
from test_store_shared import _quick_processes, ended, started, until  # noqa: F401 - a fixture

X = draw(11, 3)
ROW = 2 * 3 * 8  # bytes


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stored_rows, "_TILE_BYTES", 4 * ROW)  # four rows to a tile, three in the last one


class Counted(nn.Module):
    """A net that notes how many samples its forwards are given."""

    rows: list[int] = []

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_net()

    def forward(self, x: Tensor) -> Tensor:
        Counted.rows.append(len(x))
        return self.inner(x)


def loader(rows: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part))) for part in X.split(rows)]


@pytest.mark.parametrize("x", [X, loader(3), loader(5)], ids=["tensor", "batches of 3", "batches of 5"])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_rows_are_those_of_the_call_without_a_store(tmp_path: Path, x: Any, mode: Any):
    found = compute_jacobian(small_net(), x, mode=mode, store=tmp_path / "run")
    expected = compute_jacobian(small_net(), X, mode=mode)
    assert isinstance(found, StoredArray)
    assert (found.shape, len(found), found.ndim, found.dtype) == ((11, 2, 3), 11, 3, np.float64)
    assert Store.open(tmp_path / "run").arrays["jacobian"].counts == (3, 1, 1)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-12)
    assert np.array_equal(read_store(tmp_path / "run", "jacobian"), np.asarray(found))


def test_an_index_reads_the_tiles_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = compute_jacobian(small_net(), X, store=tmp_path / "run")
    whole, real, read = np.asarray(found), Store.tile, list[Any]()
    monkeypatch.setattr(Store, "tile", lambda self, name, index: read.append(index) or real(self, name, index))
    for index in (3, -1, slice(2, 6), slice(None, None, 4), slice(9, 2, -3), slice(4, 4), (5, 1), (slice(0, 9), 1, 2)):
        assert np.array_equal(found[index], whole[index]), index
    read.clear()
    _ = found[4:8]
    assert read == [(1, 0, 0)]
    for index in (11, -12, True, [1, 2], 1.0, None):
        with pytest.raises(InputError, match="a row from 0 to 10"):
            found[index]


def test_a_finished_store_costs_no_forward_and_a_tile_no_more_than_its_rows(tmp_path: Path):
    model = Counted().eval()
    Counted.rows.clear()
    first = np.asarray(compute_jacobian(model, X, store=tmp_path / "run"))
    assert max(Counted.rows) <= 4
    Counted.rows.clear()
    assert np.array_equal(np.asarray(compute_jacobian(model, X, store=tmp_path / "run")), first)
    assert Counted.rows == []


def test_one_output_per_sample_and_several_outputs(tmp_path: Path):
    target = torch.arange(11) % 2
    found = compute_jacobian(small_net(), X, target=target, store=tmp_path / "picked")
    np.testing.assert_allclose(np.asarray(found), compute_jacobian(small_net(), X, target=target).numpy(), rtol=1e-12)

    def two(x: Tensor) -> dict[str, Tensor]:
        return {"sum": x.sum(1), "square": x**2}

    found = compute_jacobian(two, X, store=tmp_path / "two")
    expected = compute_jacobian(two, X)
    assert isinstance(found, tuple)
    for part, name in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(part), expected[name].numpy(), rtol=1e-12)


def test_no_samples(tmp_path: Path):
    assert compute_jacobian(small_net(), X[:0], store=tmp_path / "run").shape == (0, 2, 3)


def other() -> nn.Module:
    model = small_net()
    with torch.no_grad():
        next(model.parameters()).add_(1e-9)
    return model


OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": other()},
    "data": {"x": X.flip(0)},
    "target": {"target": torch.zeros(11, dtype=torch.int64)},
    "outputs": {"outputs": [0]},
    "mode": {"mode": "forward"},
    "at": {"at": "0"},
}


@pytest.mark.parametrize("field", OTHERS)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, field: str):
    before = np.asarray(compute_jacobian(small_net(), X, store=tmp_path / "run"))
    with pytest.raises(StoreMismatchError, match=field):
        compute_jacobian(**{"model": small_net(), "x": X, **OTHERS[field], "store": tmp_path / "run"})
    assert np.array_equal(read_store(tmp_path / "run", "jacobian"), before)


@pytest.mark.parametrize("option", [{"out": torch.empty(11, 2, 3)}, {"create_graph": True}, {"compile": True}])
def test_what_a_store_does_not_go_with_is_said(tmp_path: Path, option: dict[str, Any]):
    with pytest.raises(InputError, match=f"`{next(iter(option))}`"):
        compute_jacobian(small_net(), X, store=tmp_path / "run", **option)
    assert not list(tmp_path.iterdir())


def test_a_sample_that_is_not_finite_is_named_and_the_rest_kept(tmp_path: Path):
    def root(x: Tensor) -> Tensor:
        return x.sqrt()

    x = X.abs()
    x[6] = -1.0
    with pytest.raises(NonFiniteError, match="samples 6 to 7"):
        compute_jacobian(root, x, store=tmp_path / "run")
    with pytest.raises(StoreIncompleteError, match="3 tiles"):
        read_store(tmp_path / "run", "jacobian")
    found = compute_jacobian(root, x, store=tmp_path / "loose", check_finite=False)
    assert np.isnan(found[6]).all()
    assert np.isfinite(np.delete(np.asarray(found), 6, 0)[:, 0, 0]).all()


def test_processes_share_the_rows_and_one_may_be_killed(tmp_path: Path):
    store, log = tmp_path / "run", tmp_path / "log"
    alone = np.asarray(jacobian(tmp_path / "alone"))
    with started(2, share_jacobian, store, log, 0.1, 2) as workers:
        until(lambda: len({pid for pid, _ in notes(log)}) == 2, workers)
        os.kill(workers[0].pid, signal.SIGKILL)
        ended(workers)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0]
    assert np.array_equal(read_store(store, "jacobian"), alone)
    tiles = [what for _, what in notes(log) if what == "tile"]
    assert 8 <= len(tiles) <= 9


def test_jax_models_are_refused(tmp_path: Path):
    pytest.importorskip("jax")
    model = jacops.JaxFunction(lambda params, x: params["w"] * x, {"w": np.ones(3, np.float32)})
    with pytest.raises(InputError, match="`store`"):
        compute_jacobian(model, np.ones((2, 3), np.float32), store=tmp_path / "run")  # type: ignore[arg-type]
