"""Processes that share a store, for tests: what each computes is noted in a file that survives it."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import jacops
from jacops import _stored_rows
from jacops._influence import _run
from jacops.solvers import CG, EKFAC, _block, _kept
from jacops.store import StoredRun
from small import draw, small_net
from stored_run import ARRAYS, IDENTITY

ROWS, TILES = 18, 6
X, Y = draw(9, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
TEST = draw(ROWS, 3, seed=5), Y.repeat(2)
SOLVERS: dict[str, Any] = {
    "auto": "auto",
    "cg": CG(),
    "cg by nystrom": CG(preconditioner="nystrom", rank=4),
    "ekfac": EKFAC(report_residual=False),
}


def note(log: Path, what: str) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {what}\n")


def notes(log: Path) -> list[tuple[int, str]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(pid), what) for pid, what in (line.split(" ", 1) for line in lines)]


def gather(log: Path, what: str, parties: int) -> None:
    """Wait until so many processes have noted something, so that none comes too late for its part."""
    for _ in range(2000):
        if len({pid for pid, noted in notes(log) if noted == what}) >= parties:
            return
        time.sleep(0.01)


def influences(store: Path | None, solver: str) -> jacops.results.Influences:
    options: dict[str, Any] = {"loss": F.cross_entropy, "solver": SOLVERS[solver], "store": store}
    with patch.object(_run, "_TILE_BYTES", 3 * 26 * 8):  # three rows to a tile
        return jacops.compute_influences(small_net(), [(X, Y)], test_data=[TEST], **options)


def share(store: Path, log: Path, solver: str, slow: float, parties: int) -> None:
    """Run the line that everybody runs, slowly, and note solves and fits."""
    solve, fit = _run.InfluenceRun.solve_each, EKFAC.approximate

    def slowly(self: Any, tiles: Sequence[Tensor]) -> Any:
        for _ in tiles:
            note(log, "solve")
            gather(log, "solve", parties)
            time.sleep(slow)
        return solve(self, tiles)

    def fitted(self: EKFAC, *args: Any) -> Any:
        if self.factors is None:
            note(log, "fit")
            time.sleep(slow)
        return fit(self, *args)

    _run.InfluenceRun.solve_each = slowly  # type: ignore[method-assign]
    EKFAC.approximate = fitted  # type: ignore[method-assign]
    found = influences(store, solver)
    np.save(log.parent / f"values-{os.getpid()}.npy", found.values.numpy())
    note(log, "done")


def open_at_once(store: Path, log: Path, start: float, model: str) -> None:
    """Open a store at a moment, say how that went, and hold it for a while."""
    time.sleep(max(0.0, start - time.time()))
    try:
        with StoredRun.open(store, {**IDENTITY, "model": model}, ARRAYS):
            note(log, f"opened {model}")
            time.sleep(0.3)
    except jacops.errors.StoreMismatchError:
        note(log, f"refused {model}")


def hold(store: Path, log: Path) -> None:
    """Take a tile and never let go."""
    run = StoredRun.open(store, IDENTITY, ARRAYS)
    run.take("influences", (0, 0))
    note(log, "holds")
    time.sleep(60)
    run.close()


def jacobian(store: Path) -> Any:
    _stored_rows._TILE_BYTES = 4 * 2 * 3 * 8  # four rows to a tile
    return jacops.compute_jacobian(small_net(), draw(32, 3), store=store)


def share_jacobian(store: Path, log: Path, slow: float, parties: int) -> None:
    """Run the line that everybody runs, slowly, and note tiles."""
    write = StoredRun.write

    def slowly(self: StoredRun, name: str, *args: Any) -> None:
        if name == "jacobian":
            note(log, "tile")
            gather(log, "tile", parties)
            time.sleep(slow)
        write(self, name, *args)

    StoredRun.write = slowly  # type: ignore[method-assign]
    jacobian(store)
    note(log, "done")


def keep_always() -> None:
    """Let solves keep a state after every step."""
    _kept._SECONDS, _kept._SHARE = 0.0, 1e9


def solve_slowly(store: Path, log: Path, solver: str) -> None:
    """Run the line that everybody runs, and note products of conjugate gradients, which take long."""
    keep_always()
    advance = _block._BlockRun.advance

    def slowly(self: Any) -> Any:
        note(log, "step")
        time.sleep(0.05)
        return advance(self)

    _block._BlockRun.advance = slowly  # type: ignore[method-assign]
    influences(store, solver)


def begin_for_long(store: Path, log: Path) -> None:
    """Begin a store whose facts take longer than anybody waits."""

    def facts() -> dict[str, Any]:
        note(log, "begins")
        time.sleep(60)
        return {}

    StoredRun.open(store, IDENTITY, ARRAYS, facts=facts)
