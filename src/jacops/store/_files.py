"""A folder whose files appear whole or not at all, reached without following links.

Names inside the folder are tuples of parts. Every folder on the way is opened relative to the one before it and
without following a symbolic link, so nothing a store holds can lead a read or a write out of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from ..errors import InputError, InputTypeError

Parts = tuple[str, ...]

# Only our own temporary files: those that a killed writer had not renamed yet.
_PARTIAL = re.compile(r".+\.[0-9a-f]{16}\.jacops-partial")


@final
@dataclass(frozen=True)
class Folder:
    """A folder of whole files.

    Attributes:
        path: Where it is, absolute.
    """

    path: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Folder:
        """Return the folder at a local path, links on the way to it resolved: one folder, one lock.

        Raises:
            InputError: It is an address, or the platform lacks what safe writing needs.
            InputTypeError: It is no path.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputTypeError.of("path", f"a {type(path).__name__}", "a path is needed")
        if "://" in str(path):
            raise InputError.of("path", f"the address {str(path)!r}", "a folder of a local file system is needed")
        if sys.platform == "win32":
            raise InputError.of("path", "on Windows", "stored runs need the file locks of a POSIX system")
        return cls(Path(os.path.realpath(path)))

    def read(self, parts: Parts, limit: int) -> bytes | None:
        """Return a file's bytes, at most `limit + 1` of them; None where there is no such file.

        Raises:
            OSError: It is a link, no plain file, or cannot be read.
        """
        try:
            with self._inside(parts[:-1]) as place:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not make us wait
                number = os.open(parts[-1], flags, dir_fd=place)
                try:
                    if not stat.S_ISREG(os.fstat(number).st_mode):
                        raise OSError(errno.ELOOP, "not a plain file")
                    with os.fdopen(number, "rb", closefd=False) as file:
                        return file.read(limit + 1)
                finally:
                    os.close(number)
        except FileNotFoundError:
            return None

    def names(self, parts: Parts = ()) -> list[str]:
        """Return what a folder inside holds, sorted; nothing where there is no such folder.

        Raises:
            OSError: It is a link, no folder, or cannot be read.
        """
        try:
            with self._inside(parts) as place:
                return sorted(os.listdir(place))
        except FileNotFoundError:
            return []

    def write(self, parts: Parts, data: bytes) -> None:
        """Put a file in place, whole and on the disk when this returns: written beside it, flushed, renamed.

        Raises:
            OSError: The file system refuses; what was there before is still there.
        """
        with self._inside(parts[:-1], create=True) as place:
            name = f"{parts[-1]}.{secrets.token_hex(8)}.jacops-partial"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            number = os.open(name, flags, 0o666, dir_fd=place)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, parts[-1], src_dir_fd=place, dst_dir_fd=place)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=place)
                raise
            os.fsync(place)

    def remove(self, parts: Parts) -> None:
        """Remove a file, if it is there.

        Raises:
            OSError: The file system refuses.
        """
        with contextlib.suppress(FileNotFoundError), self._inside(parts[:-1]) as place:
            os.unlink(parts[-1], dir_fd=place)

    def sweep(self, parts: Parts, deep: bool = True) -> None:
        """Remove what killed writers left half-written in a folder, and in the folders below it if `deep`."""
        for name in self.names(parts):
            with self._inside(parts) as place:
                mode = os.stat(name, dir_fd=place, follow_symlinks=False).st_mode
                if stat.S_ISREG(mode) and is_partial(name):
                    os.unlink(name, dir_fd=place)
            if deep and stat.S_ISDIR(mode):
                self.sweep((*parts, name))

    @contextlib.contextmanager
    def _inside(self, parts: Parts, create: bool = False) -> Iterator[int]:
        """Give the descriptor of a folder inside; no part on the way may be a link."""
        opened = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts:
                outer = opened
                if create:
                    _make(part, outer)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                opened = os.open(part, flags, dir_fd=outer)
                os.close(outer)
            yield opened
        finally:
            os.close(opened)


def is_partial(name: str) -> bool:
    """Return whether a file is what a killed writer had not yet renamed."""
    return _PARTIAL.fullmatch(name) is not None


def _make(name: str, place: int) -> None:
    try:
        os.mkdir(name, dir_fd=place)
    except FileExistsError:
        return
    os.fsync(place)
