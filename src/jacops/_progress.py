"""Progress bars: one for each call of the user, on a terminal or in a notebook, once it has taken two seconds.

A public call opens a bar (`shows_progress`); loops inside it report where they are (`track`), and iterations without a
known end what they have counted (`tick`). The outermost loop moves the bar, the next one inside it moves it within
that loop's items; deeper ones are not shown. So a matrix from a hundred passes over the data has one bar, not one for
each pass.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ._runtime.restoring import WarningsIgnored, restoring

Item = TypeVar("Item")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DELAY = 2.0  # seconds that a call takes without a bar: shorter ones would only flicker
_DEEPEST = 2  # loops that move a bar


class _TrackedLoop:
    """A loop at work: how many items are done, of how many; None where that is not known, and `unit` is counted."""

    __slots__ = ("done", "total", "unit")

    def __init__(self, total: int | None, unit: str = "") -> None:
        self.done, self.total, self.unit = 0, total, unit


class Bar:
    """The progress of one call.

    Args:
        call: Its name, the caption.
        enabled: True shows the bar at once and anywhere, False never; None after `DELAY` where a user looks.
    """

    def __init__(self, call: str, enabled: bool | None) -> None:
        self.call, self.enabled = call, enabled
        self.loops: list[_TrackedLoop] = []
        self._started, self._next = time.monotonic(), 0.0
        self._shown: Any = None
        self._of: tuple[int | None, str] = None, ""

    def decide(self, enabled: bool | None) -> None:
        """Take a wish from inside the call where the caller has none."""
        if self.enabled is None:
            self.enabled = enabled

    def moved(self) -> None:
        """Draw the bar where it is now, if it is time."""
        if self.enabled is False or not self.loops:
            return
        now = time.monotonic()
        if now < self._next or (self._shown is None and not self._is_due(now)):
            return
        self._next = now + 0.1  # tqdm's own interval between two drawings
        outer = self.loops[0]
        inner = self.loops[1] if len(self.loops) > 1 and outer.total is not None else None
        part = min(inner.done / inner.total, 1.0) if inner is not None and inner.total else 0.0
        self._draw(outer.done + part, outer.total, outer.unit or "steps")

    def _is_due(self, now: float) -> bool:
        return bool(self.enabled) or (now - self._started >= DELAY and is_watched())

    def _draw(self, done: float, total: int | None, unit: str) -> None:
        if self._shown is None or (total, unit) != self._of:
            self.close()
            self._of = total, unit
            self._shown = _tqdm()(
                desc=self.call,
                total=total,
                leave=False,
                miniters=0,
                unit=f" {unit}",
                delay=0.0 if self.enabled else DELAY,
                file=sys.stderr,
                bar_format=None if total is None else "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]",
            )
            self._shown.start_t = self._shown._time() - (time.monotonic() - self._started)
        self._shown.update(done - self._shown.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None


class _Here(threading.local):
    bar: Bar | None = None


_here = _Here()


def is_watched() -> bool:
    """Return whether standard error is a terminal, or this runs in a notebook."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and "IPKernelApp" in getattr(shell, "config", ()):
        return True
    return sys.stderr is not None and sys.stderr.isatty()


@restoring
def _tqdm() -> Any:
    """Return `tqdm.auto.tqdm`, without its warning where a notebook lacks ipywidgets: it then draws text."""
    from tqdm import TqdmWarning

    with WarningsIgnored("IProgress not found", TqdmWarning):
        from tqdm.auto import tqdm

    return tqdm


def shows_progress(
    counts: str = "", *, call: str = ""
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator for public calls that may take long; a keyword `progress` of theirs forces the bar.

    Args:
        counts: For iterations without a known end: what `tick` counts, such as `"products"`. Loops inside, such as the
            pass over data that one product takes, then do not move the bar.
        call: The caption; by default the function's name.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        name = call or getattr(function, "__name__", "")

        @wraps(function)
        def shown(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            enabled: Any = kwargs.get("progress")
            outer = _here.bar
            bar = outer or Bar(name, enabled)
            bar.decide(enabled)
            loops = bar.loops
            counter = _TrackedLoop(None, counts) if counts and len(loops) < _DEEPEST else None
            _here.bar = bar
            try:
                if counter is not None:
                    loops.append(counter)
                return function(*args, **kwargs)
            finally:
                _here.bar = outer
                if counter is not None and counter in loops:
                    loops.remove(counter)
                if outer is None:
                    bar.close()

        return shown

    return decorate


def tick(count: int = 1) -> None:
    """Count items of an iteration without a known end."""
    bar = _here.bar
    if bar is not None and bar.loops and bar.loops[0].unit:
        bar.loops[0].done += count
        bar.moved()


def track(items: Iterable[Item], what: str, *, enabled: bool | None = None, total: int | None = None) -> Iterable[Item]:
    """Iterate over `items`, and move the bar of the call that is at work; outside of one, a bar called `what`.

    Args:
        items: What to iterate over.
        what: The caption where there is no call.
        enabled: True or False to force, where the call does not.
        total: How many items there are, if it is known; by default their length.

    Returns:
        An iterable over the same items.
    """
    bar = _here.bar
    if bar is not None:
        bar.decide(enabled)
    total = len(items) if total is None and isinstance(items, Sized) else total
    if bar is not None and (bar.enabled is False or len(bar.loops) >= _DEEPEST or total in (0, 1)):
        return items
    return _tracked(items, total, bar, Bar(what, enabled))


def _tracked(items: Iterable[Item], total: int | None, bar: Bar | None, own: Bar) -> Iterator[Item]:
    here = bar or own
    if bar is None:
        _here.bar = own
    loop = _TrackedLoop(total)
    here.loops.append(loop)
    try:
        for item in items:
            yield item
            loop.done += 1
            here.moved()
    finally:
        if loop in here.loops:
            here.loops.remove(loop)
        if bar is None:
            _here.bar = None if _here.bar is own else _here.bar
            own.close()
