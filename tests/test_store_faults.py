"""Stored runs under kill -9, damage and full disks: the right numbers, or an error with the cause."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jacops.errors import JacopsWarning, StoreDamagedError, StoreFileError, StoreIncompleteError
from jacops.store import Grid, Store, StoredRun, read_store
from stored_run import ARRAYS, IDENTITY, TILES, fill, hold_and_fork, tile, truth, whole, work

PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def _quick_processes() -> None:
    PROCESSES.set_forkserver_preload(["jacops.store", "zarr.codecs"])  # what takes long to import
    first = PROCESSES.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()


# ---- killed --------------------------------------------------------------------------------------------------------


def check_half_written(path: Path) -> None:
    """Whatever is marked is right, and whatever any zarr reader sees is right or missing."""
    import zarr

    if not (path / "zarr.json").exists():
        return
    store = Store.open(path)
    for name in ARRAYS:
        views = [store.read(name, partial=True)]
        if (path / name / "zarr.json").exists():
            views.append(np.asarray(zarr.open_array(path / name, mode="r")[:]))
        for view in views:
            assert np.array_equal(view[~np.isnan(view)], truth(name)[~np.isnan(view)])


def killed_over_and_over(path: Path, log: Path, kills: int, draw: random.Random, how: int) -> int:
    """Kill writers until one of them finishes, or `kills` are done; returns the number of kills."""
    for done in range(kills):
        writer = PROCESSES.Process(target=work, args=(path, log, 0.002))
        before, steps = lines(log), draw.randrange(4)
        writer.start()
        while writer.is_alive() and lines(log) < before + steps:  # so far into its work, whatever the machine's load
            time.sleep(0.001)
        writer.join(draw.uniform(0.0, 0.02 if steps else 0.1))
        if writer.is_alive():
            os.kill(writer.pid or 0, how)
        writer.join()
        if writer.exitcode == 0:
            return done
        assert writer.exitcode == -how
        check_half_written(path)
    return kills


def lines(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def survives(folder: Path, kills: int, seed: int, how: int = signal.SIGKILL) -> None:
    draw, left = random.Random(seed), kills
    while left:
        path, log = folder / f"run{left}", folder / f"log{left}"
        done = killed_over_and_over(path, log, left, draw, how)
        with StoredRun.open(path, IDENTITY, ARRAYS) as run, warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill leaves nothing that looks damaged
            computed = fill(run)
        computed += log.read_text().splitlines() if log.exists() else []
        counts = Counter(computed)
        assert len(counts) == TILES
        assert sum(counts.values()) - TILES <= done  # at most the one tile in work at each kill
        for name in ARRAYS:
            assert np.array_equal(read_store(path, name), truth(name))
        assert not [file for file in path.rglob("*partial*")]
        left -= done


def test_a_run_survives_kill_9(tmp_path: Path):
    survives(tmp_path, kills=8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_survives_forty_kills(tmp_path: Path, seed: int):
    survives(tmp_path, kills=40, seed=1 + seed)


def test_a_run_survives_sigterm(tmp_path: Path):
    survives(tmp_path, kills=2, seed=9, how=signal.SIGTERM)


def test_a_run_survives_an_interrupt_and_lets_go_of_the_store(tmp_path: Path):
    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    def prepared() -> None:
        with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
            run.write("influences", (0, 0), tile("influences", (0, 0)))
            run.obtain("factors", (0, 0), interrupted)

    with pytest.raises(KeyboardInterrupt):
        prepared()
    assert len(whole(tmp_path / "run")) == TILES - 1


def test_the_lock_goes_with_its_holder_even_where_a_forked_child_lives_on(tmp_path: Path):
    holder = PROCESSES.Process(target=hold_and_fork, args=(tmp_path / "run", tmp_path / "ready"))
    holder.start()
    while not (tmp_path / "forked").exists():
        time.sleep(0.01)
    lock = tmp_path / "run.jacops-locks" / "influences.0.0"
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        assert not run.take("influences", (0, 0))
        assert f"process {holder.pid} on" in lock.read_text()
        holder.kill()
        holder.join()
        assert lock.exists()
        assert len(fill(run)) == TILES
    assert not lock.parent.exists()
    (tmp_path / "ready").unlink()


# ---- damaged -------------------------------------------------------------------------------------------------------


def changed(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


CHUNK, MARK, NEIGHBOUR = "influences/c/1/2", "influences/done/1.2", "influences/c/1/1"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "bit flipped": lambda path: changed(path / CHUNK, lambda raw: raw[:50] + bytes([raw[50] ^ 1]) + raw[51:]),
    "bit of the checksum flipped": lambda path: changed(path / CHUNK, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
    "cut to half": lambda path: changed(path / CHUNK, lambda raw: raw[: len(raw) // 2]),
    "cut to nothing": lambda path: changed(path / CHUNK, lambda raw: b""),
    "longer": lambda path: changed(path / CHUNK, lambda raw: raw + b"\0"),
    "zeroed": lambda path: changed(path / CHUNK, lambda raw: bytes(len(raw))),
    "deleted": lambda path: (path / CHUNK).unlink(),
    "a folder": lambda path: ((path / CHUNK).unlink(), (path / CHUNK).mkdir()),
    "neighbour copied over it": lambda path: shutil.copy(path / NEIGHBOUR, path / CHUNK),
    "neighbour with its mark": lambda path: (
        shutil.copy(path / NEIGHBOUR, path / CHUNK),
        shutil.copy(path / "influences/done/1.1", path / MARK),
    ),
    "link to its neighbour": lambda path: ((path / CHUNK).unlink(), (path / CHUNK).symlink_to("1")),
    "a pipe": lambda path: ((path / CHUNK).unlink(), os.mkfifo(path / CHUNK)),
    "mark emptied": lambda path: changed(path / MARK, lambda raw: b""),
    "mark of another tile": lambda path: shutil.copy(path / "influences/done/1.1", path / MARK),
    "mark is a list": lambda path: changed(path / MARK, lambda raw: b"[1]"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    whole(path)
    return path


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_tile_is_named_by_readers_and_computed_again_by_writers(tmp_path: Path, finished: Path, kind: str):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    DAMAGES[kind](path)
    for partial in (False, True):
        with pytest.raises(StoreDamagedError, match=r"tile influences\[1, 2\] is damaged") as error:
            read_store(path, partial=partial)
        assert (error.value.array, error.value.index) == ("influences", (1, 2))
    assert np.array_equal(read_store(path, "factors"), truth("factors"))
    if kind == "a folder":  # not ours to delete
        with pytest.warns(JacopsWarning), pytest.raises(StoreDamagedError):
            whole(path)
        return
    with pytest.warns(JacopsWarning, match=r"tile influences\[1, 2\] is damaged.*computed again") as told:
        assert whole(path) == ["influences(1, 2)"]
    assert len(told) == 1
    assert np.array_equal(read_store(path), truth("influences"))


def test_a_mark_gone_from_a_finished_run_is_damage_to_readers_and_work_to_writers(tmp_path: Path, finished: Path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / MARK).unlink()
    with pytest.raises(StoreDamagedError, match="mark is gone"):
        read_store(tmp_path / "run")
    assert whole(tmp_path / "run") == ["influences(1, 2)"]
    assert np.array_equal(read_store(tmp_path / "run"), truth("influences"))


def test_a_finished_run_under_repair_is_not_finished(tmp_path: Path, finished: Path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for mark in (MARK, "influences/done/0.0"):
        (path / mark).unlink()
    with StoredRun.open(path, IDENTITY, ARRAYS) as run:
        run.write("influences", (0, 0), tile("influences", (0, 0)))
    with pytest.raises(StoreIncompleteError):
        read_store(path)


def test_tiles_of_another_run_are_not_taken_over(tmp_path: Path, finished: Path):
    other = {**IDENTITY, "model": "m2"}
    StoredRun.open(tmp_path / "run", other, ARRAYS).close()
    shutil.copytree(finished / "influences", tmp_path / "run" / "influences", dirs_exist_ok=True)
    with pytest.raises(StoreDamagedError):
        read_store(tmp_path / "run", partial=True)
    with StoredRun.open(tmp_path / "run", other, ARRAYS) as run, pytest.warns(JacopsWarning):
        assert len(fill(run)) == TILES


@pytest.mark.filterwarnings("ignore::jacops.errors.JacopsWarning")
@pytest.mark.parametrize("name", ["influences", "influences/c", "influences/done", "influences/zarr.json"])
def test_links_out_of_the_store_are_not_followed(tmp_path: Path, finished: Path, name: str):
    path, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(finished, path)
    shutil.move(path / name, outside)
    (path / name).symlink_to(outside)
    before = [(file, file.read_bytes()) for file in sorted(tmp_path.rglob("outside/**/*")) if file.is_file()]
    with pytest.raises(StoreDamagedError, match="link"):
        read_store(path)
    if name.endswith("zarr.json"):  # the writer replaces the link by the file that it wrote
        assert whole(path) == []
    else:
        with pytest.raises(StoreDamagedError, match="link"):
            whole(path)
    assert [(file, file.read_bytes()) for file, _ in before] == before


# ---- the file system refuses ---------------------------------------------------------------------------------------


class Refusal:
    """Makes the n-th call that changes the file system fail as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int):
        self.left = at
        for name in ("open", "fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.failing(name, getattr(os, name)))

    def failing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **options: Any) -> Any:
            if name == "mkdir":
                call(*args, **options)  # says so first where the folder is there already
            if name != "open" or (args[1] & os.O_CREAT):
                self.left -= 1
                if self.left == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **options) if name != "mkdir" else None

        return instead


def two_tiles(path: Path) -> None:
    with StoredRun.open(path, IDENTITY, {"a": Grid((2,), (1,))}) as run:
        for index in run.missing("a"):
            run.write("a", index, np.ones(1) + index[0])
        run.complete()


def refused(path: Path, at: int) -> tuple[bool, StoreFileError | None]:
    """Whether a run made an n-th change, which failed, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        refusal = Refusal(patch, at)
        try:
            two_tiles(path)
        except StoreFileError as error:
            return True, error
    return refusal.left <= 0, None


def test_a_full_disk_at_any_moment_names_path_and_tile_and_leaves_a_store_to_resume(tmp_path: Path):
    tiles_named = 0
    for at in itertools.count(1):
        path = tmp_path / f"run{at}"
        failed, error = refused(path, at)
        if not failed:
            break
        if error is not None:  # none where the folder to be made was there all the same
            assert isinstance(error, OSError)
            assert str(path) in str(error)
            assert "No space left on device" in str(error)
            tiles_named += f"tile {error.array}{list(error.index or ())}" in str(error)
        assert not list(tmp_path.rglob("*partial*"))
        two_tiles(path)
        assert read_store(path, "a").tolist() == [1.0, 2.0]
    assert tiles_named >= 2 * 2 * 4  # for each tile a file and a mark, with four changes each


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_kernel_cuts_short_leaves_nothing_behind(tmp_path: Path):
    grid, block = Grid((20000,), (10000,)), np.ones(10000)
    with StoredRun.open(tmp_path / "run", IDENTITY, {"a": grid}) as run:
        run.write("a", (0,), block)
        with largest_file(30000), pytest.raises(StoreFileError, match=r"tile a\[1\], file 'a/c/1': File too large"):
            run.write("a", (1,), block)
        assert run.marked("a") == {(0,)}
        run.write("a", (1,), block)
        run.complete()
    assert (read_store(tmp_path / "run", "a") == 1).all()
    assert not list(tmp_path.rglob("*partial*"))


def test_an_unwritable_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with pytest.raises(StoreFileError, match="file/run"):
        StoredRun.open(tmp_path / "file" / "run", IDENTITY, ARRAYS)
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(StoreFileError, match="closed/run"):
            StoredRun.open(tmp_path / "closed" / "run", IDENTITY, ARRAYS)


def test_a_vanished_folder_is_named_and_not_made_again(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(StoreFileError, match=r"tile factors\[0, 0\].*No such file"):
            fill(run)
    assert not (tmp_path / "run").exists()
