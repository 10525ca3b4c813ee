"""What earlier calls proved about a function, so that a check is paid once per shape and not once per call."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable
from typing import Any

from ...errors import InputError, explain
from .restoring import process_lock

CHECKS = ("first", "always", "strict", "never")


class Trust:
    """Verdicts about one function in one setting (shapes, dtypes, modes).

    Args:
        checks: `"first"` checks a route once per shape, `"always"` each time, `"strict"` each time and every pair of
            samples, `"never"` not at all.
    """

    def __init__(self, checks: str = "first") -> None:
        self.checks = checks
        self._proved: set[tuple[Hashable, ...]] = set()
        self._refused: set[tuple[str, str]] = set()
        self.notes: dict[str, Any] = {}

    def needs(self, *route: Hashable) -> bool:
        """Say whether `route` still has to be checked."""
        return self.checks in ("always", "strict") or (self.checks == "first" and route not in self._proved)

    def remember(self, *route: Hashable) -> None:
        """Note that `route` was right."""
        self._proved.add(route)

    def refuse(self, sweep: str, route: str) -> None:
        """Note that `route` failed and should not be tried again."""
        self._refused.add((sweep, route))

    def compare(self, sweep: str, batched: float, alone: float) -> bool:
        """Note seconds of a batched sweep and of as many single ones; refuse batches that were slower twice.

        Once is no proof: the first batched sweep of a process also sets up what it needs. Faster once settles it.
        """
        if batched <= alone < math.inf:
            self.notes[f"fast {sweep}"] = True
        elif batched > alone and f"fast {sweep}" not in self.notes:
            self.notes[f"slow {sweep}"] = self.notes.get(f"slow {sweep}", 0) + 1
            if self.slow(sweep):
                self.refuse(sweep, "batched")
        return self.slow(sweep)

    def slow(self, sweep: str) -> bool:
        """Say whether batches were measured slower."""
        return self.notes.get(f"slow {sweep}", 0) >= 2

    def refused(self, sweep: str, route: str) -> bool:
        """Say whether `route` failed before."""
        return (sweep, route) in self._refused


class SameObject:
    """A key that equals another one while both stand for the same living object, and keeps it not alive."""

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._reference: Any = weakref.ref(value)
        except TypeError:
            self._reference = lambda: None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        own = self._reference()
        return own is not None and isinstance(other, SameObject) and own is other._reference()


def told_apart(value: Any) -> Hashable:
    """Return a key for a selector or a loss: functions by identity, values by what they say."""
    return SameObject(value) if callable(value) else repr(value)


_known: weakref.WeakKeyDictionary[Any, dict[Hashable, Trust]] = weakref.WeakKeyDictionary()


def trust_in(function: Any, setting: Hashable, checks: str) -> Trust:
    """Return what is known of `function` in `setting`, empty at first.

    Raises:
        InputError: `checks` is not one of the known words.
    """
    if checks not in CHECKS:
        raise InputError(explain("checks", repr(checks), f"one of {CHECKS} is needed"))
    if checks in ("always", "strict"):
        return Trust(checks)
    with process_lock:
        try:
            store = _known.setdefault(function, {})
        except TypeError:
            return Trust(checks)
        return store.setdefault((setting, checks), Trust(checks))
