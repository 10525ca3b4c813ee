"""What public calls take besides their first arguments: typed dicts, for calls that pass it on and for overloads."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor, nn

from ._data import Unpack
from ._ladder.protocol import FrameworkModel
from ._picks import Picks
from ._runtime.memory import Budget
from ._torch.protocol import At, Freeze, Shared
from ._trees import Selector
from ._words import Checks, Fallback, Mode, Sweeps

Model = nn.Module | FrameworkModel


class JacobianOptions(TypedDict, total=False):
    """Options of `compute_jacobian`, for calls that make Jacobians with it."""

    outputs: Selector
    target: Tensor | None
    at: At
    freeze: Freeze
    mode: Mode
    budget: Budget
    out: Any
    checks: Checks
    fallback: Fallback
    check_finite: bool
    compile: bool
    progress: bool | None


class ComputeJacobianOptions(JacobianOptions, total=False):
    """All options of `compute_jacobian`."""

    shared: Shared
    unpack: Unpack | None
    create_graph: bool


class ModjacKeywords(TypedDict, total=False):
    """Options of `modjac` beside those that its page has; without `sparse`, on which the type of the result depends."""

    parameters: Picks
    tangent: bool
    outputs: Selector
    budget: Budget
    out: Any
    check_finite: bool
    progress: bool | None


class ModjacOptions(ModjacKeywords, total=False):
    """Options of `modjac` without those on which the type of the result depends."""

    create_graph: bool
    strict: bool
    vectorize: bool
    strategy: Sweeps


class InputDerivativeOptions(TypedDict, total=False):
    """Options of the derivatives of higher order by the input."""

    outputs: Selector
    target: Tensor | None
    shared: Shared
    unpack: Unpack | None
    checks: Checks
    fallback: Fallback
    progress: bool | None
    create_graph: bool
