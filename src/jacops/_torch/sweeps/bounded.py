"""Mappings that drop what was used least recently, in which proofs are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Bounded(OrderedDict[Hashable, Kept], Generic[Kept]):
    """A mapping that drops the least recently used entry."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def take(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return what is kept under `key`, made now if nothing is."""
        try:
            self.move_to_end(key)
            return self[key]
        except KeyError:  # not there, or another thread has dropped it
            found = self.setdefault(key, make())
        with suppress(KeyError):
            while len(self) > self.most:
                self.popitem(last=False)
        return found


class Repeated(Generic[Kept]):
    """A `Bounded` mapping for long keys, of which the last one mostly comes again: to compare it is half of hashing.

    Args:
        most: How many entries are kept.
    """

    def __init__(self, most: int) -> None:
        self._all: Bounded[Kept] = Bounded(most)
        self._last: tuple[Hashable, Kept] | None = None

    def take(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return what is kept under `key`, made now if nothing is."""
        last = self._last
        if last is not None and last[0] == key:
            return last[1]
        found = self._all.take(key, make)
        self._last = key, found
        return found

    def get(self, key: Hashable) -> Kept | None:
        """Return what is kept under `key`, None where nothing is."""
        return self._all.get(key)
