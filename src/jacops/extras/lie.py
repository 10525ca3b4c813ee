"""LieTensors of PyPose (extra `pypose`): widths of rows and columns. Imported only where PyPose is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def layout(recorded: Any, tangent: bool) -> Callable[[Any], Any] | None:
    """Return how blocks of LieTensors are laid out; None where there are none."""
    return None if "pypose" not in sys.modules else None
