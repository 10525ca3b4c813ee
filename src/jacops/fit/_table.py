"""A least-squares result as text: the parameters, and a line per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from ._result import StepRecord

_LINES = 100  # steps that are all shown: the default of `max_steps`
_FIRST, _LAST = 50, 40  # of a longer run
_VALUES = 6  # numbers of a tensor that are shown; of more, the first and last three


def parameter_lines(named: dict[str, Tensor]) -> list[str]:
    """Return a line per parameter: its name, its shape where it has one, and its values, shortened when many."""
    width = max((len(name) for name in named), default=0)
    return [f"  {name:{width}} = {_values(value)}" for name, value in named.items()]


def _values(value: Tensor) -> str:
    flat = value.detach().as_subclass(Tensor).cpu().reshape(-1)
    if not value.ndim:
        return f"{flat[0].item():.9g}"
    shape = f"shape {tuple(value.shape)}, " if value.ndim > 1 or flat.numel() > _VALUES else ""
    if flat.numel() <= _VALUES:
        return f"{shape}[{', '.join(f'{v:.9g}' for v in flat.tolist())}]"
    ends = [", ".join(f"{v:.6g}" for v in part.tolist()) for part in (flat[:3], flat[-3:])]
    return f"{shape}[{ends[0]}, ..., {ends[1]}]"


def step_lines(log: Sequence[StepRecord], limited_by: str) -> list[str]:
    """Return a line per step; of a long run the first and the last, and how many lie between.

    Args:
        log: The steps.
        limited_by: What limits them: `"damping"` or `"radius"`; empty for neither.
    """
    if len(log) <= _LINES:
        return [step_line(r, limited_by) for r in log]
    left_out = f"  ... {len(log) - _FIRST - _LAST} steps not shown; `log` has all ..."
    shown = [[step_line(r, limited_by) for r in part] for part in (log[:_FIRST], log[-_LAST:])]
    return [*shown[0], left_out, *shown[1]]


def step_line(record: StepRecord, limited_by: str) -> str:
    """Return the line of a step."""
    actual = record.objective - record.tried
    fields: list[tuple[str, Any]] = [("reduction", actual), ("predicted", record.predicted), ("step", record.length)]
    if limited_by:
        fields.append((limited_by, record.damping))
    shown = "  ".join(f"{name} {_number(value)}" for name, value in fields)
    mark = "" if record.accepted else "  rejected"
    return f"  {record.step:4d}  {record.objective:.6e}  {shown}{mark}"


def _number(value: float) -> str:
    return f"{value:9.2e}" if np.isfinite(value) else f"{value!s:>9}"
