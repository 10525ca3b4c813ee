"""What to hold fixed where residuals do not determine every parameter."""

from __future__ import annotations

import numpy as np

from ._layout import Layout
from ._solvers import factorised
from ._state import FitPoint
from ._system import LinearizedFit, Singular

_DAMPING = 1e-12  # of a matrix with unit diagonal: solves with it enlarge a free direction by 1e12, others less
_ROUNDS = 3  # after which only directions with singular values below 1e-4 of the largest are left
_FREE = 1e-4


def what_to_hold(point: FitPoint, layout: Layout) -> str:
    """Return in words which direction is free, and what to hold fixed; something general where it is not found."""
    system = point.system
    columns = np.arange(len(system.norms)) if point.face is None else point.face.free.nonzero()[0]
    unseen = (system.norms == 0).nonzero()[0]
    if len(unseen):
        name, element = _home(layout, int(columns[unseen[0]]))
        more = f" (and on {len(unseen) - 1} numbers more)" if len(unseen) > 1 else ""
        return f"no residual depends on '{name}' at {element}{more}; hold it with `fixed={{'{name}': {element}}}`"
    try:
        direction = _free_direction(system)
    except (Singular, np.linalg.LinAlgError):
        direction = None
    if direction is None:
        return "hold something fixed with `fixed=`"
    # Of elements that move alike the first one is as good as any; rounding does not choose between them.
    first = int(columns[np.argmax(np.abs(direction) > np.abs(direction).max() / 2)])
    name, element = _home(layout, first)
    moved = "changes no residual: where all of it is, or how it is turned, is not determined"
    return f"a joint move of '{name}' {moved}; hold a part of it, such as `fixed={{'{name}': {element}}}`"


def _free_direction(system: LinearizedFit) -> np.ndarray | None:
    """Return a direction of unit columns that changes no residual, by inverse iteration; None if there is none."""
    unit = system.equilibration(None)
    damping = _DAMPING * unit**2
    if system.is_sparse:
        solve = factorised(system, damping).solve
    else:
        matrix = system.unit_normal(damping)
        solve = lambda v: np.linalg.solve(matrix, v)  # noqa: E731
    # Neither constant nor alternating, which some problem's determined directions are.
    v = np.cos(np.arange(len(unit)) * 2.4)
    for _ in range(_ROUNDS):
        v = solve(v)
        v = v / np.linalg.norm(v)
    moved = float(np.linalg.norm(system.J @ (v / unit)))
    return v if np.isfinite(v).all() and moved <= _FREE else None


def _home(layout: Layout, column: int) -> tuple[str, str]:
    """Return which parameter a column belongs to, and which element of it, as `fixed` takes it."""
    ends = np.cumsum(layout.sizes)
    number = int(np.searchsorted(ends, column, side="right"))
    part = layout.parts[number]
    own = part.kept[column - int(ends[number]) + layout.sizes[number]] // part.width
    place = tuple(int(k) for k in np.unravel_index(own, tuple(part.lead))) if part.lead else ()
    return part.name, str(place[0] if len(place) == 1 else place or True)
