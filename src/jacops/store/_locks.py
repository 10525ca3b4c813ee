"""Kernel locks beside a store, one for each tile in work: released when their holder ends, in whatever way.

They are files in a folder beside the store, locked by `flock`, and removed when they are released. Network file systems
that pass `flock` on to their server (NFS, SMB) share them between machines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import socket
import time
import weakref
from pathlib import Path
from typing import TextIO, final

from ..errors import StoreFileError, warn
from ._format import Index

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 2.0  # seconds: a tile takes a flush of some milliseconds at least, often minutes
_SAY_AFTER = 20.0  # seconds of waiting without a message, where there is no progress bar


def locks_of(store: Path) -> Path:
    """Return the folder that holds a store's locks."""
    return store.with_name(store.name + ".jacops-locks")


@final
class Lock:
    """A lock of one name, which this or another process may hold.

    Its file is removed when it is released. A lock on a removed file is invisible to others, hence the comparison
    of inodes. A forked child lets go of its copies at once, else it would hold them beyond its parent.

    Args:
        store: The store's folder.
        name: What is locked.
        tile: The tile that it locks, for error messages.
    """

    def __init__(self, store: Path, name: str, tile: tuple[str, Index] | None = None) -> None:
        self.store, self.path, self.tile = store, locks_of(store) / name, tile
        self._file: TextIO | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._file is not None

    def take(self, shared: bool = False) -> bool:
        """Take it, or change how it is held; return whether that was possible. Never waits.

        Raises:
            StoreFileError: The file cannot be made, or the file system has no locks.
        """
        import fcntl  # of POSIX systems alone

        try:
            while True:
                if self._file is None:
                    self._file = self._opened()
                try:
                    fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.abandon()
                    return False
                if _same_file(self._file.fileno(), self.path):
                    break
                self.abandon()  # its holder removed it between our opening and our locking
        except OSError as error:
            self.abandon()
            if error.errno in _NO_LOCKS:
                self._clear()
            raise self._refused(error) from error
        _HELD.add(self)
        if not shared:
            with contextlib.suppress(OSError):  # a courtesy to those who wait
                os.ftruncate(self._file.fileno(), 0)
                os.pwrite(self._file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return True

    def holder(self) -> str:
        """Return who holds it, as far as that is known."""
        try:
            return self.path.read_text(errors="replace")[:200] or "another process"
        except OSError:
            return "another process"

    def release(self) -> None:
        """Let go of what is held alone, and remove the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.abandon()

    def abandon(self) -> None:
        """Close the file only."""
        if self._file is not None:
            self._file.close()
            self._file = None
        _HELD.discard(self)

    def _clear(self) -> None:
        """Remove the file, and the folder where that leaves it empty."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()

    def _opened(self) -> TextIO:
        while True:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                return os.fdopen(os.open(self.path, flags, 0o666), "r+", errors="replace")
            except FileNotFoundError:  # nobody has made the folder yet, or the last one out removed it
                self.store.parent.mkdir(parents=True, exist_ok=True)
                self.path.parent.mkdir(exist_ok=True)

    def _refused(self, error: OSError) -> StoreFileError:
        reason = error.strerror or str(error)
        if error.errno in _NO_LOCKS:
            reason = f"{reason}. {_NEEDS_LOCKS}"
        name, index = self.tile or (None, None)
        return StoreFileError(self.store, f"{self.path.parent.name}/{self.path.name}", reason, name, index)


_NEEDS_LOCKS = "The file system has no locks (`flock`), which processes share a store by; put it on another one"


@final
class Claims:
    """The tiles that a run has taken.

    Args:
        store: The store's folder.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._locks: dict[tuple[str, Index], Lock] = {}

    def has(self, name: str, index: Index) -> bool:
        """Return whether this run has a tile."""
        return (name, index) in self._locks

    def take(self, name: str, index: Index) -> bool:
        """Take a tile, if no run has it."""
        lock = self._lock(name, index)
        if not self.has(name, index) and lock.take():
            self._locks[name, index] = lock
            return True
        return False

    def is_free(self, name: str, index: Index) -> bool:
        """Return whether no run has a tile."""
        free = self.take(name, index)
        if free:
            self.let_go(name, index)
        return free

    def wait_for(self, name: str, index: Index) -> None:
        """Wait until this run has a tile."""
        waited = Wait(f"store {str(self._store)!r}: tile {name}{list(index)} is computed by another process")
        while not self.has(name, index) and not self.take(name, index):
            waited.pause(self.holder(name, index))

    def holder(self, name: str, index: Index) -> str:
        """Return who has a tile, as far as that is known."""
        return self._lock(name, index).holder()

    def let_go(self, name: str, index: Index) -> None:
        """Release a tile."""
        lock = self._locks.pop((name, index), None)
        if lock is not None:
            lock.release()

    def close(self) -> None:
        """Leave all tiles."""
        for name, index in list(self._locks):
            self.let_go(name, index)

    def _lock(self, name: str, index: Index) -> Lock:
        return Lock(self._store, ".".join([name, *map(str, index)]), (name, index))


@final
class Use:
    """A run's part in a store: many may have one, and the first and the last one know that they are alone.

    Args:
        store: The store's folder.
    """

    def __init__(self, store: Path) -> None:
        self._lock = Lock(store, "in-use")

    @property
    def held(self) -> bool:
        """Whether the run takes part; a forked child does not."""
        return self._lock.held

    def begin(self) -> bool:
        """Take part, and return whether no other run does; who is alone keeps others out until `share` is called.

        Raises:
            StoreFileError: The file system refuses, or has no locks.
        """
        waited = Wait(f"store {str(self._lock.store)!r}: another run is beginning or ending it")
        while True:
            if self._lock.take():
                return True
            if self._lock.take(shared=True):
                return False
            waited.pause(self._lock.holder())

    def share(self) -> bool:
        """Let others in; False where one of them slipped in and ended meanwhile, so that it is to be begun again."""
        return self._lock.take(shared=True)

    def probe(self) -> None:
        """Try whether locks exclude each other here.

        Raises:
            StoreFileError: They do not.
        """
        name = f"probe-{secrets.token_hex(8)}"
        one, other = (Lock(self._lock.store, name) for _ in range(2))
        try:
            one.take()
            if other.take():
                raise one._refused(OSError(errno.ENOLCK, "two holders of one lock"))
        finally:
            one.release()
            other.release()

    def end(self) -> None:
        """Leave; the last one removes all lock files, those of killed runs too."""
        if not self._lock.held:
            return
        with contextlib.suppress(StoreFileError):
            if self._lock.take():
                folder = self._lock.path.parent
                with contextlib.suppress(OSError):
                    for file in folder.iterdir():
                        if file != self._lock.path:
                            file.unlink()
                self._lock._clear()
        self._lock.abandon()


@final
class Wait:
    """Pauses that grow, and a word once they have added up."""

    def __init__(self, what: str) -> None:
        self._what, self._pause, self._said = what, _FIRST_PAUSE, False
        self._started = time.monotonic()

    def pause(self, holder: str) -> None:
        """Sleep for a while, and name who is waited for where that takes long."""
        if not self._said and time.monotonic() - self._started >= _SAY_AFTER:
            self._said = True
            warn(f"{self._what}; waiting for {holder}.")
        time.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that many do not come at once
        self._pause = min(self._pause * 1.5, _LONGEST_PAUSE)


def _same_file(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_HELD):
        lock.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
