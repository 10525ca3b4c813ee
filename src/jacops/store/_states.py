"""States of a tile that is in work: what a process that is killed has got so far, for the one that takes over."""

from __future__ import annotations

from typing import final

from ._files import Folder
from ._format import Index
from ._reading import explained

_STATES = "states"


@final
class TileStates:
    """What is kept of a tile until it is finished, by name; only who has taken the tile may ask.

    Args:
        folder: The store.
        name: The array.
        index: The tile.
        limit: Bytes that a state may have.
    """

    def __init__(self, folder: Folder, name: str, index: Index, limit: int) -> None:
        self._folder, self._name, self._index, self._limit = folder, name, index, limit
        self._prefix = ".".join(map(str, index)) + "."

    def load(self, name: str) -> bytes | None:
        """Return what was kept under a name, None where nothing was.

        Raises:
            StoreFileError: It cannot be read.
        """
        with explained(self._folder, self._place(name), self._name, self._index):
            return self._folder.read(self._place(name), self._limit)

    def keep(self, name: str, raw: bytes) -> None:
        """Keep bytes under a name of letters and digits, in place of what was there.

        Raises:
            StoreFileError: The file system refuses.
        """
        with explained(self._folder, self._place(name), self._name, self._index):
            self._folder.write(self._place(name), raw)

    def forget(self) -> None:
        """Remove all of the tile.

        Raises:
            StoreFileError: The file system refuses.
        """
        with explained(self._folder, (self._name, _STATES), self._name, self._index):
            for file in self._folder.names((self._name, _STATES)):
                if file.startswith(self._prefix):
                    self._folder.remove((self._name, _STATES, file))

    def _place(self, name: str) -> tuple[str, str, str]:
        return self._name, _STATES, self._prefix + name
