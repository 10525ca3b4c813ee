"""Exceptions for a fast route that does not apply, or gives wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .._runtime.contexts import must_surface
from ..errors import NotDifferentiableError, PeerFailedError

Result = TypeVar("Result")


class RouteFailedError(Exception):
    """A fast route does not apply here; the reason is its message."""


class RouteWrongError(RouteFailedError):
    """A fast route gave numbers that the plain one does not confirm."""


class RouteUndecidedError(RouteFailedError):
    """What a fast route gave proves nothing about the route."""


class RouteNotFiniteError(RouteUndecidedError):
    """A fast route gave NaN or Inf."""


def attempt(sweep: Callable[[], Result]) -> Result:
    """Run a fast sweep; what torch raises is a reason to leave the route, what else a model raises passes through.

    Raises:
        RouteFailedError: The sweep raised; memory errors pass through.
    """
    with Attempted():
        return sweep()


def succeeds(sweep: Callable[[], Any]) -> bool:
    """Run a fast sweep as `attempt` does, and return whether it came to its end."""
    try:
        attempt(sweep)
    except RouteFailedError:
        return False
    return True


_REASONS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


class Attempted:
    """A context that runs what is inside as `attempt` does a fast sweep."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Make a reason to leave the route of what torch raised.

        Raises:
            RouteFailedError: Something was; memory errors pass through.
        """
        if error is None or isinstance(error, NotDifferentiableError | PeerFailedError):
            return
        if not isinstance(error, _REASONS) or must_surface(error):
            return
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise RouteFailedError(first[:200]) from error
