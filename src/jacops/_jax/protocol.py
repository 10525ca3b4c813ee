"""What the rest of the library uses of the JAX backend; nothing else of it is imported from outside."""

from __future__ import annotations

from .adapted import Apply
from .crossing import to_numpy
from .function import JaxFunction, JaxLoss
from .origins import GradientOrigin, directions_of, origin_of, remember
from .results import check_rows, finite_gradient
