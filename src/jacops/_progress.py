"""Progress bars: on a terminal, for long work, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, *, enabled: bool | None = None) -> Iterable[Item]:
    """Iterate over `items` behind a bar called `what`.

    Args:
        items: What to iterate over.
        what: The bar's caption.
        enabled: True or False to force; by default only where standard error is a terminal.

    Returns:
        An iterable over the same items.
    """
    shown = sys.stderr.isatty() if enabled is None else enabled
    return tqdm(items, desc=what, leave=False, delay=1.0) if shown else items
