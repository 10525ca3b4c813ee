"""Long solves in a store: a run that is killed goes on from its last state, with the bits of one that is not."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("zarr")

from jacops.errors import JacopsWarning
from jacops.linalg import Matrix
from jacops.solvers import CG, _block, _kept
from jacops.store import StoredRun, read_store
from shared_store import influences, notes, solve_slowly
from stored_run import ARRAYS, IDENTITY, tile
from test_store_shared import _quick_processes, ended, started, until  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def _keep_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "_SECONDS", 0.0)
    monkeypatch.setattr(_kept, "_SHARE", 1e9)


class Memory:
    """Keeps states in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def load(self, name: str) -> bytes | None:
        return self.kept.get(name)

    def keep(self, name: str, raw: bytes) -> None:
        self.kept[name] = raw


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Interrupt iterations after so many steps; returns the steps that were taken."""
    steps, real = list[int](), _block._BlockRun.advance

    def counted(self: Any) -> Any:
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(1)
        return real(self)

    monkeypatch.setattr(_block._BlockRun, "advance", counted)
    return steps


def interrupted(after: int, call: Callable[[], Any]) -> None:
    """Make a call that is interrupted after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, after)
        with pytest.raises(KeyboardInterrupt):
            call()


def system(dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(60, 60, generator=draw, dtype=dtype) * torch.logspace(0, -2, 60, dtype=dtype)
    return Matrix(root.T @ root, symmetric=True, positive=True), torch.randn(3, 60, generator=draw, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e12])
@pytest.mark.parametrize("preconditioner", [None, "nystrom", "jacobi"])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupted_solve_goes_on_with_the_same_bits(
    after: int, preconditioner: Any, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    operator, rows = system(dtype)
    operator, rank = scale * operator, 4 if preconditioner == "nystrom" else None
    expected = CG(preconditioner, rank=rank).solve(operator, rows, scale * 1e-3)
    memory = Memory()
    interrupted(after, lambda: CG(preconditioner, rank=rank, kept=memory).solve(operator, rows, scale * 1e-3))
    steps = stopping(monkeypatch, -1)
    found = CG(preconditioner, rank=rank, kept=memory).solve(operator, rows, scale * 1e-3)
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.residual, expected.residual)
    assert (found.iterations, found.status) == (expected.iterations, expected.status)
    assert found.info["products"] == expected.info["products"]
    total = len(steps) + after
    steps.clear()
    CG(preconditioner, rank=rank).solve(operator, rows, scale * 1e-3)
    assert len(steps) == total


def test_a_state_is_of_its_own_right_hand_sides_only():
    operator, rows = system(torch.float64)
    memory = Memory()
    interrupted(4, lambda: CG(kept=memory).solve(operator, rows, 1e-3))
    other = rows.flip(0)
    assert torch.equal(CG(kept=memory).solve(operator, other, 1e-3).x, CG().solve(operator, other, 1e-3).x)


def test_states_are_seldom_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    operator, rows = system(torch.float64)
    memory = Memory()
    CG(kept=memory).solve(operator, rows, 1e-3)
    assert not memory.kept


@pytest.mark.parametrize("solver", ["cg", "cg by nystrom"])
def test_a_killed_solve_goes_on_where_it_was(tmp_path: Path, solver: str, monkeypatch: pytest.MonkeyPatch):
    steps = stopping(monkeypatch, -1)
    alone = influences(tmp_path / "alone", solver)
    needed = len(steps)
    steps.clear()
    store, log = tmp_path / "run", tmp_path / "log"
    with started(1, solve_slowly, store, log, solver) as workers:
        until(lambda: len(notes(log)) >= 4, workers)
        os.kill(workers[0].pid, signal.SIGKILL)
        ended(workers)
    found = influences(store, solver)
    assert torch.equal(found.values, alone.values)
    assert found.info["iterations"] == alone.info["iterations"]
    assert needed <= len(steps) + len(notes(log)) <= needed + 1  # the step that was killed is taken again
    assert not list((store / "factors" / "states").iterdir())
    for name in ("influences", "factors", "residual"):
        assert np.array_equal(read_store(store, name), read_store(tmp_path / "alone", name))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "cut": lambda raw: raw[: len(raw) // 2],
    "emptied": lambda raw: b"",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_left_with_a_warning(tmp_path: Path, kind: str):
    alone = influences(tmp_path / "alone", "cg")
    interrupted(2, lambda: influences(tmp_path / "run", "cg"))
    (file,) = (tmp_path / "run" / "factors" / "states").iterdir()
    file.write_bytes(DAMAGES[kind](file.read_bytes()))
    with pytest.warns(JacopsWarning, match="a kept state.*begins anew"):
        found = influences(tmp_path / "run", "cg")
    assert torch.equal(found.values, alone.values)


def test_states_are_those_of_a_tile_and_go_when_it_is_finished(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        run.states("factors", (1, 0)).keep("a", b"one")
        run.states("factors", (2, 0)).keep("a", b"two")
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        assert run.states("factors", (1, 0)).load("a") == b"one"
        assert run.states("factors", (1, 0)).load("b") is None
        run.write("factors", (1, 0), tile("factors", (1, 0)))
        assert run.states("factors", (1, 0)).load("a") is None
        assert run.states("factors", (2, 0)).load("a") == b"two"
