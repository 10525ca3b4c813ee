"""What optional packages add to the library; lists that are filled before anything large is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

inspectors: list[Callable[[Any], None]] = []
"""Functions called with every recording before a sparse sweep; an extra may refuse it or correct it."""

# By package: what kind of its tensors one is (empty: not one of them), and such a tensor of a plain one.
SUBCLASSES: dict[str, tuple[Callable[[Tensor], str], Callable[[Tensor, str], Tensor]]] = {}
