"""What optional packages add to the library; lists that are filled before anything large is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

inspectors: list[Callable[[Any], None]] = []
"""Called with every recording before it is swept in a sparse way: an extra may refuse or mend what it knows better."""

# By package: what kind of its tensors one is (empty: not one of them), and such a tensor of a plain one.
SUBCLASSES: dict[str, tuple[Callable[[Tensor], str], Callable[[Tensor, str], Tensor]]] = {}
