"""A least-squares result as text: the parameters, and a line per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .._display import Table

if TYPE_CHECKING:
    from ._result import StepRecord

_LINES = 100  # steps that are all shown: the default of `max_steps`
_FIRST, _LAST = 50, 40  # of a longer run
_FOLDED = 10  # steps; with so many, HTML is longer than a screen, and shows them when clicked
_VALUES = 6  # numbers of a tensor that are shown; of more, the first and last three


def parameters(named: dict[str, Tensor]) -> Table:
    """Return the parameters: names, shapes where they have one, and values, shortened when many."""
    width = max((len(name) for name in named), default=0)
    return Table(("",), [(f"{name:{width}} = {_values(value)}",) for name, value in named.items()])


def _values(value: Tensor) -> str:
    flat = value.detach().as_subclass(Tensor).cpu().reshape(-1)
    if not value.ndim:
        return f"{flat[0].item():.9g}"
    shape = f"shape {tuple(value.shape)}, " if value.ndim > 1 or flat.numel() > _VALUES else ""
    if flat.numel() <= _VALUES:
        return f"{shape}[{', '.join(f'{v:.9g}' for v in flat.tolist())}]"
    ends = [", ".join(f"{v:.6g}" for v in part.tolist()) for part in (flat[:3], flat[-3:])]
    return f"{shape}[{ends[0]}, ..., {ends[1]}]"


def steps(log: Sequence[StepRecord], limited_by: str) -> Table:
    """Return the steps; of a long run the first and the last, and how many lie between.

    Args:
        log: The steps.
        limited_by: What limits them: `"damping"` or `"radius"`; empty for neither.
    """
    header = ("#", "objective", "reduction", "predicted", "step", *([limited_by] if limited_by else []), "")
    rows = [_step(r, limited_by) for r in log]
    if len(log) > _LINES:
        left_out = (f"... {len(log) - _FIRST - _LAST} steps not shown; `log` has all ...",)
        rows = [*rows[:_FIRST], left_out, *rows[-_LAST:]]
    caption = f"{len(log)} steps: the objective before each, and its change" if rows else ""
    return Table(header, rows, caption, labelled=2, folded=len(log) >= _FOLDED)


def _step(record: StepRecord, limited_by: str) -> tuple[str, ...]:
    numbers = (record.objective - record.tried, record.predicted, record.length)
    numbers += (record.damping,) if limited_by else ()
    mark = "" if record.accepted else "rejected"
    return (f"{record.step:4d}", f"{record.objective:.6e}", *map(_number, numbers), mark)


def _number(value: float) -> str:
    return f"{value:9.2e}" if np.isfinite(value) else f"{value!s:>9}"
