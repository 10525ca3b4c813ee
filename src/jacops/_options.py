"""What public calls take besides their first arguments, for calls that pass it on."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from torch import Tensor

from ._runtime.memory import Budget
from ._torch.protocol import At
from ._trees import Selector


class JacobianOptions(TypedDict, total=False):
    """Options of `compute_jacobian`, for calls that make Jacobians with it."""

    outputs: Selector
    target: Tensor | None
    at: At
    mode: Literal["auto", "reverse", "forward", "split"]
    budget: Budget
    out: Any
    checks: str
    fallback: str
    check_finite: bool
    compile: bool
    progress: bool | None
