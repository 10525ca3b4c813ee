"""Stores that many processes write: each tile by one of them, whoever is killed, with the bits of a single writer."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zarr")

from jacops.errors import InputError, JacopsWarning, StoreFileError
from jacops.store import Grid, Store, StoredRun, _locks, read_store
from shared_store import TILES, begin_for_long, hold, influences, notes, open_at_once, share
from stored_run import ARRAYS, IDENTITY, fill, tile, truth, whole

PROCESSES = multiprocessing.get_context("forkserver")
BOUND = 30.0  # seconds that a test waits for its processes


@pytest.fixture(scope="module", autouse=True)
def _quick_processes() -> None:
    PROCESSES.set_forkserver_preload(["jacops", "jacops.store", "zarr.codecs", "shared_store"])
    first = PROCESSES.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()


@contextlib.contextmanager
def started(count: int, target: Callable[..., None], *args: Any) -> Iterator[list[Any]]:
    """Start processes, and leave none of them behind."""
    workers = [PROCESSES.Process(target=target, args=args) for _ in range(count)]
    try:
        for worker in workers:
            worker.start()
        yield workers
        ended(workers)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()


def ended(workers: list[Any]) -> None:
    deadline = time.monotonic() + BOUND
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        assert not worker.is_alive(), "a process hangs"


def until(condition: Callable[[], Any], workers: list[Any]) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        assert any(worker.is_alive() for worker in workers)
        time.sleep(0.005)


# ---- influences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "ekfac"])
def test_three_writers_of_which_one_is_killed_give_the_bits_of_one(tmp_path: Path, solver: str):
    store, log = tmp_path / "run", tmp_path / "log"
    alone = influences(tmp_path / "alone", solver)
    with started(3, share, store, log, solver, 0.2, 3) as workers:
        until(lambda: len({pid for pid, what in notes(log) if what == "solve"}) == 3, workers)
        victim = workers[0]
        os.kill(victim.pid, signal.SIGKILL)
        ended(workers)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    for worker in workers[1:]:
        assert np.array_equal(np.load(tmp_path / f"values-{worker.pid}.npy"), alone.values.numpy())
    for name in ("influences", "factors", "status", "shares"):
        assert np.array_equal(read_store(store, name), read_store(tmp_path / "alone", name))
    solves = [pid for pid, what in notes(log) if what == "solve"]
    assert TILES <= len(solves) <= TILES + 1  # the victim's last one at most is done again
    assert set(solves) == {worker.pid for worker in workers}
    assert sum(what == "fit" for _, what in notes(log)) == (solver == "ekfac")
    assert Store.open(store).is_complete
    assert not (tmp_path / "run.jacops-locks").exists()


def test_fitted_factors_and_damping_are_taken_from_the_store(tmp_path: Path):
    store, log = tmp_path / "run", tmp_path / "log"
    expected = influences(store, "ekfac")
    for array in ("influences", "factors"):
        (store / array / "done" / "2.0").unlink()
    with started(1, share, store, log, "ekfac", 0.0, 1):
        pass
    assert [what for _, what in notes(log)] == ["solve", "done"]
    assert np.array_equal(read_store(store), expected.values.numpy())


def test_damaged_factors_are_fitted_again_with_a_warning(tmp_path: Path):
    store = tmp_path / "run"
    expected = influences(store, "ekfac")
    for array in ("influences", "factors"):
        (store / array / "done" / "2.0").unlink()
    raw = bytearray((store / "facts" / "factors.bytes").read_bytes())
    raw[-1] ^= 1
    (store / "facts" / "factors.bytes").write_bytes(raw)
    with pytest.warns(JacopsWarning, match="'factors' is damaged"):
        found = influences(store, "ekfac")
    assert np.array_equal(found.values.numpy(), expected.values.numpy())


# ---- beginning and ending at once ----------------------------------------------------------------------------------


def test_processes_that_open_an_empty_folder_at_once_share_it(tmp_path: Path):
    with started(4, open_at_once, tmp_path / "run", tmp_path / "log", time.time() + 0.5, "m1"):
        pass
    assert [what for _, what in notes(tmp_path / "log")] == ["opened m1"] * 4
    assert len(whole(tmp_path / "run")) == sum(grid.total for grid in ARRAYS.values())


def test_of_two_runs_that_open_an_empty_folder_at_once_one_is_refused(tmp_path: Path):
    store, log, start = tmp_path / "run", tmp_path / "log", time.time() + 0.5
    with started(1, open_at_once, store, log, start, "m1"), started(1, open_at_once, store, log, start, "m2"):
        pass
    told = dict(what.split()[::-1] for _, what in notes(log))
    assert sorted(told.values()) == ["opened", "refused"]
    assert told[Store.open(store).identity["model"]] == "opened"


def test_one_completes_while_another_opens_and_a_third_reads(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as one:
        assert fill(one)
        with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as two:
            assert np.array_equal(two.read("influences"), read_store(tmp_path / "run"))
            assert fill(two) == []
        assert np.array_equal(one.read("factors"), truth("factors"))
    assert np.array_equal(read_store(tmp_path / "run"), truth("influences"))


# ---- waiting -------------------------------------------------------------------------------------------------------


def test_a_holder_is_named_while_it_is_waited_for_and_its_tile_taken_over_when_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, log, said = tmp_path / "run", tmp_path / "log", list[str]()
    with started(1, hold, store, log) as workers:
        until(lambda: notes(log), workers)

        def told(message: str) -> None:
            said.append(message)
            workers[0].kill()

        monkeypatch.setattr(_locks, "warn", told)
        monkeypatch.setattr(_locks, "_SAY_AFTER", 0.05)
        with StoredRun.open(store, IDENTITY, ARRAYS) as run:
            fill(run)
    assert len(said) == 1
    assert (
        f"1 of the tiles of 'influences' are left to other processes; waiting for process {workers[0].pid} on"
        in said[0]
    )
    assert np.array_equal(read_store(store), truth("influences"))


def test_what_another_writes_is_waited_for_and_not_computed(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as one:
        assert one.take("factors", (1, 0))
        writer = threading.Timer(0.2, lambda: one.write("factors", (1, 0), tile("factors", (1, 0))))
        writer.start()
        with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as two:
            asked = [
                index for index in two.missing("factors") if not two.write("factors", index, tile("factors", index))
            ]
            assert asked == [(0, 0), (2, 0)]
            assert np.array_equal(
                two.obtain("factors", (1, 0), lambda: pytest.fail("computed")), tile("factors", (1, 0))
            )
        writer.join()


def test_a_tile_that_is_skipped_is_not_waited_for_by_its_own_run(tmp_path: Path):
    with StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS) as run:
        assert len(list(run.missing("influences"))) == ARRAYS["influences"].total
    assert len(whole(tmp_path / "run")) == sum(grid.total for grid in ARRAYS.values())


# ---- facts ---------------------------------------------------------------------------------------------------------


def test_facts_are_computed_once_and_kept(tmp_path: Path):
    computed: list[int] = []

    def facts() -> dict[str, Any]:
        computed.append(1)
        return {"step": 0.1, "why": "it is small", "sketch": bytes(range(256))}

    for _ in range(2):
        with StoredRun.open(tmp_path / "run", IDENTITY, {"a": Grid((2,), (1,))}, facts=facts) as run:
            for index in run.missing("a"):
                run.write("a", index, np.ones(1))
            run.complete()
            assert [run.fact(name) for name in ("step", "why", "sketch")] == [0.1, "it is small", bytes(range(256))]
            with pytest.raises(InputError, match="sketch"):
                run.fact("rank")
    assert len(computed) == 1


def test_facts_that_cannot_be_computed_leave_no_store(tmp_path: Path):
    def facts() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StoredRun.open(tmp_path / "run", IDENTITY, {"a": Grid((2,), (1,))}, facts=facts)
    assert not list(tmp_path.iterdir())


def test_who_dies_over_the_facts_leaves_them_to_the_next(tmp_path: Path):
    store, log = tmp_path / "run", tmp_path / "log"
    with started(1, begin_for_long, store, log) as workers:
        until(lambda: notes(log), workers)
        killer = threading.Timer(0.3, workers[0].kill)
        killer.start()
        with StoredRun.open(store, IDENTITY, ARRAYS, facts=lambda: {"step": 2}) as run:
            assert not killer.is_alive()
            assert run.fact("step") == 2


def test_facts_that_were_not_written_yet_are_computed_later(tmp_path: Path):
    def opened(step: int) -> StoredRun:
        return StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS, facts=lambda: {"step": step})

    opened(1).close()
    (tmp_path / "run" / "facts" / "done" / "0.0").unlink()  # as a kill right after the header leaves it
    with opened(2) as run, opened(3) as other:
        assert (run.fact("step"), other.fact("step")) == (2, 2)


@pytest.mark.parametrize("facts", [{"../up": b"1"}, {"long": "x" * 5000}, {"nan": float("nan")}])
def test_facts_that_cannot_be_kept_are_refused(tmp_path: Path, facts: dict[str, Any]):
    with pytest.raises((InputError, ValueError)):
        StoredRun.open(tmp_path / "run", IDENTITY, {"a": Grid((2,), (1,))}, facts=lambda: facts)
    assert sorted(file.name for file in tmp_path.iterdir()) in ([], ["run"])


# ---- file systems that refuse --------------------------------------------------------------------------------------


def refusing(number: int) -> Callable[..., None]:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("flock", [refusing(errno.ENOLCK), refusing(errno.EOPNOTSUPP), lambda *_: None])
def test_a_file_system_without_locks_is_refused_and_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Any
):
    whole(tmp_path / "there")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(fcntl, "flock", flock)
    for name in ("new", "there"):
        with pytest.raises(StoreFileError, match=r"no locks \(`flock`\)"):
            StoredRun.open(tmp_path / name, IDENTITY, ARRAYS)
    assert np.array_equal(read_store(tmp_path / "there"), truth("influences"))
    monkeypatch.undo()
    assert whole(tmp_path / "there") == []
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_read_only_place_is_named_and_what_is_there_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole(tmp_path / "run")
    real = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(StoreFileError, match="Read-only file system"):
        StoredRun.open(tmp_path / "run", IDENTITY, ARRAYS)
    assert np.array_equal(read_store(tmp_path / "run"), truth("influences"))
