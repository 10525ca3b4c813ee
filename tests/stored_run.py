"""A small stored run for tests: what it computes, how it is written, and by a process that can be killed."""

import os
import threading
import time
from pathlib import Path

import numpy as np

from jacops.store import Grid, StoredRun

IDENTITY = {"model": "m1", "data.train": "d1", "data.test": "t1", "loss": "l1", "damping": "0.1", "seed": "0"}
INFLUENCES, FACTORS = Grid((11, 17), (4, 5)), Grid((11, 6), (4, 6), "float32")
ARRAYS = {"influences": INFLUENCES, "factors": FACTORS}
TILES = INFLUENCES.total + FACTORS.total


def truth(name: str) -> np.ndarray:
    shape, dtype = ARRAYS[name].shape, ARRAYS[name].dtype
    return np.random.default_rng(len(name)).normal(size=shape).astype(dtype)


def tile(name: str, index: tuple[int, ...]) -> np.ndarray:
    return truth(name)[ARRAYS[name].selection(index)]


def fill(run: StoredRun, computed: list[str] | None = None, slow: float = 0.0) -> list[str]:
    """Compute what is missing; returns what was computed."""
    computed = [] if computed is None else computed

    def compute(name: str, index: tuple[int, ...]) -> np.ndarray:
        computed.append(f"{name}{index}")
        time.sleep(slow)
        return tile(name, index)

    for i, j in run.missing("influences"):
        index = (i, 0)
        factors = run.obtain("factors", index, lambda index=index: compute("factors", index))
        assert np.array_equal(factors, tile("factors", index))
        run.write("influences", (i, j), compute("influences", (i, j)))
    for index in run.missing("factors"):
        run.write("factors", index, compute("factors", index))
    run.complete()
    return computed


def whole(path: Path) -> list[str]:
    with StoredRun.open(path, IDENTITY, ARRAYS) as run:
        return fill(run)


class Log(list[str]):
    """A list that is also written to a file, line by line, so that it survives the process."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def append(self, text: str) -> None:
        with open(self.path, "a") as file:
            file.write(text + "\n")


def work(path: Path, log: Path, slow: float) -> None:
    with StoredRun.open(path, IDENTITY, ARRAYS) as run:
        fill(run, Log(log), slow)


def hold_and_fork(path: Path, ready: Path) -> None:
    """Hold a tile, and leave a forked child that lives on as long as the file `ready` does."""
    run = StoredRun.open(path, IDENTITY, ARRAYS)
    run.take("influences", (0, 0))
    ready.touch()
    if os.fork() == 0:
        while ready.exists():
            time.sleep(0.01)
        os._exit(0)
    (ready.parent / "forked").touch()
    threading.Event().wait()  # until it is killed
    run.close()
