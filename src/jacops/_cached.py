"""`functools.cached_property` as it is from Python 3.12 on: without a lock.

Python 3.11 holds one lock for all instances of a class while it computes, so that threads which share no object wait
for one another; and it takes it at every first look, where most values of a small call are looked at once.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property(functools.cached_property):  # noqa: N801 - it stands for that of functools
        """An attribute that is computed when it is first read, and kept."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """Return the value, computed now; later the instance has it."""
            if instance is None:
                return self
            value = instance.__dict__[self.attrname] = self.func(instance)
            return value


__all__ = ["cached_property"]
