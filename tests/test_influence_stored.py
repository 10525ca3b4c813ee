"""Influences by way of a store: the same numbers, resumed and never mixed with those of another run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("zarr")

import jacops
from jacops import TorchTwiceDifferentiable, compute_influences
from jacops._influence import _run
from jacops.errors import InputError, StoreMismatchError
from small import draw, small_net

X, Y = draw(9, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
TEST = [(draw(4, 3, seed=5), Y[:4]), (draw(3, 3, seed=6), Y[:3])]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "_TILE_BYTES", 3 * 26 * 8)  # three rows to a tile: across batches, one left over


def influences(path: Path | None, **options: Any) -> jacops.results.Influences:
    settings: dict[str, Any] = {"damping": 0.5, "curvature": "ggn", "store": path, **options}
    wrapped = TorchTwiceDifferentiable(settings.pop("model", small_net()), settings.pop("loss", F.cross_entropy))
    return compute_influences(wrapped, settings.pop("data", [(X, Y)]), test_data=settings.pop("test", TEST), **settings)


def test_a_stored_run_gives_the_numbers_of_one_that_is_not(tmp_path: Path):
    stored, plain = influences(tmp_path / "run"), influences(None)
    assert torch.equal(stored.values, plain.values)
    assert stored.info["residual"] == pytest.approx(plain.info["residual"])
    assert len(stored.info["residual"]) == 7
    assert "direct" in repr(stored)
    assert torch.equal(torch.from_numpy(jacops.store.read_store(tmp_path / "run")), plain.values)


def test_a_killed_run_goes_on_and_repeats_no_solve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    solved: list[int] = []
    real = _run.InfluenceRun.solve_each

    def counted(self: _run.InfluenceRun, tiles: list[Tensor]) -> Any:
        if len(solved) == 2 and not hasattr(counted, "over"):
            counted.over = True  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        solved.extend(map(len, tiles))
        return real(self, tiles)

    monkeypatch.setattr(_run.InfluenceRun, "solve_each", counted)
    with pytest.raises(KeyboardInterrupt):
        influences(tmp_path / "run")
    found = influences(tmp_path / "run")
    assert solved == [3, 3, 1]
    assert torch.equal(influences(tmp_path / "run").values, found.values)
    assert solved == [3, 3, 1]


OTHERS: dict[str, dict[str, Any]] = {
    "damping": {"damping": 0.25},
    "curvature": {"curvature": "hessian", "damping": 20.0},
    "model": {"model": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()},
    "model loss": {"loss": torch.nn.CrossEntropyLoss()},
    "training data": {"data": [(X.flip(0), Y)]},
    "test data": {"test": [(draw(7, 3, seed=8), Y[:7])]},
    "input data": {"input_data": [(draw(9, 3, seed=8), Y)]},
    "solver": {"solver": "cg"},
    "l2": {"l2": 0.1},
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_store_of_another_run_is_refused_by_what_differs(field: str, tmp_path: Path):
    before = influences(tmp_path / "run").values
    with pytest.raises(StoreMismatchError, match=field.split()[0]):
        influences(tmp_path / "run", **OTHERS[field])
    assert torch.equal(torch.from_numpy(jacops.store.read_store(tmp_path / "run")), before)


@pytest.mark.parametrize("option", [{"leverage": True}, {"influence_type": "perturbation"}, {"on_failure": "return"}])
def test_what_a_store_does_not_hold_is_said(option: dict[str, Any], tmp_path: Path):
    with pytest.raises(InputError, match=f"`{next(iter(option))}`.*a stored run needs"):
        influences(tmp_path / "run", **option)
