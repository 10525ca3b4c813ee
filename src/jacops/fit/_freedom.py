"""What to hold fixed where residuals do not determine every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..sparse._matrix import sp
from ._columns import FitColumns
from ._solvers import factorised
from ._system import LinearizedFit, Singular

_DAMPING = 1e-12  # of a matrix with unit diagonal: solves with it enlarge a free direction by 1e12, others less
_ROUNDS = 3  # after which only directions with singular values below 1e-4 of the largest are left
_FREE = 1e-4
UNSEEN = 1e-8  # singular values of unit columns whose squares are rounding errors of a normal matrix
_AT_ONCE = 8  # directions that are looked for in each connected part: similarities of space have 7
_NAMED = 8  # elements that a message names


@dataclass(frozen=True, eq=False)
class Freedom:
    """What changes no residual in one connected part.

    Attributes:
        columns: The part's columns.
        directions: Free directions of unit columns, orthonormal, (columns, free).
    """

    columns: np.ndarray
    directions: np.ndarray

    @property
    def may_be_more(self) -> bool:
        """Whether there may be more directions than were looked for."""
        return self.directions.shape[1] == _AT_ONCE < len(self.columns)


def what_to_hold(system: LinearizedFit, names: FitColumns, taken: np.ndarray | None, below: float = _FREE) -> str:
    """Return in words what is free and what to hold fixed; something general where nothing free is found.

    Args:
        system: The linearised problem.
        names: Which columns belong to what.
        taken: Which of these columns the problem has; None for all.
        below: Singular values that count as zero.
    """
    columns = np.arange(len(system.norms)) if taken is None else taken
    unseen = (system.norms == 0).nonzero()[0]
    if len(unseen):
        name, place = names.home(int(columns[unseen[0]]))
        more = f" (and on {len(unseen) - 1} numbers more)" if len(unseen) > 1 else ""
        element = _index([place])
        return f"no residual depends on '{name}' at {element}{more}; hold it with `fixed={{'{name}': {element}}}`"
    found = free_directions(system, below)
    if not found:
        return "hold something fixed with `fixed=`"
    held: dict[str, list[tuple[int, ...]]] = {}
    moved: dict[str, None] = {}
    for part in found:
        homes = [names.home(int(column)) for column in columns[part.columns]]
        moved |= dict.fromkeys(name for name, _ in homes)
        for name, place in _held(part, homes):
            held.setdefault(name, []).append(place)
    count = sum(part.directions.shape[1] for part in found)
    apart = f", in {len(found)} parts that share no residual" if len(found) > 1 else ""
    least = "at least " if any(part.may_be_more for part in found) else ""
    what = f"a joint move of {' and '.join(repr(name) for name in moved)} changes no residual"
    how = f" in {least}{count} direction{'s' * (count > 1)}{apart}: where all of it is, or how it is turned"
    fixed = ", ".join(f"'{name}': {_index(places)}" for name, places in held.items())
    return f"{what}{how}, is not determined; hold a part of it, such as `fixed={{{fixed}}}`"


def free_directions(system: LinearizedFit, below: float) -> list[Freedom]:
    """Return what is free in each connected part, by inverse iteration with several directions at once.

    Args:
        system: The linearised problem, without columns of zeros.
        below: Singular values of unit columns that count as zero.
    """
    unit = system.equilibration(None)
    damping = _DAMPING * unit**2
    try:
        if system.is_sparse:
            solve = factorised(system, damping).solve
        else:
            matrix = system.unit_normal(damping)
            solve = lambda v: np.linalg.solve(matrix, v)  # noqa: E731
        parts = list(_parts(system))
        # Neither constant nor alternating, which some problem's determined directions are.
        v = np.cos(np.outer(np.arange(len(unit)), 2.4 + np.arange(_AT_ONCE) / 9))
        for _ in range(_ROUNDS):
            v = solve(v)
            for columns, _ in parts:
                many = min(_AT_ONCE, len(columns))
                v[columns, :many], v[columns, many:] = np.linalg.qr(v[columns][:, :many])[0], 0.0
    except (Singular, np.linalg.LinAlgError):
        return []
    moved, found = system.J @ (v / unit[:, None]), []
    if not np.isfinite(moved).all():
        return []
    for columns, rows in parts:
        many = min(_AT_ONCE, len(columns))
        _, s, turned = np.linalg.svd(moved[rows, :many], full_matrices=True)
        free = np.r_[s, np.zeros(many - len(s))] <= below
        if free.any():
            found.append(Freedom(columns, v[columns, :many] @ turned[free].T))
    return found


def _parts(system: LinearizedFit) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield columns and rows of each connected part of a Jacobian."""
    J = sp.coo_array(system.J)
    rows, columns = J.shape
    kept = J.data != 0
    pairs = sp.coo_array(
        (np.ones(int(kept.sum()), bool), (J.coords[0][kept], rows + J.coords[1][kept])), (rows + columns,) * 2
    )
    label = sp.csgraph.connected_components(pairs, directed=False)[1]
    numbers, label = np.unique(label, return_inverse=True)
    order = np.argsort(label, kind="stable")
    for own in np.split(order, np.cumsum(np.bincount(label, minlength=len(numbers)))[:-1]):
        if len(own) and own[-1] >= rows:
            yield own[own >= rows] - rows, own[own < rows]


def _held(found: Freedom, homes: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """Return elements to hold: one after the other those that leave the fewest directions free."""
    order = {home: number for number, home in enumerate(dict.fromkeys(homes))}
    element, elements = np.array([order[home] for home in homes]), list(order)
    left, held = found.directions, []
    while left.shape[1]:
        # Of elements that move alike the first one is as good as any; rounding does not choose between them.
        sizes = np.sqrt(np.bincount(element, (left**2).sum(1)))
        best, chosen = 0, 0
        for candidate in np.flatnonzero(sizes > sizes.max() / 2)[:_AT_ONCE].tolist():
            rank = _rank(left[element == candidate])
            best, chosen = (rank, candidate) if rank > best else (best, chosen)
        held.append(elements[chosen])
        turned = np.linalg.svd(left[element == chosen], full_matrices=True)[2]
        left = left @ turned[best:].T
    return held


def _index(places: list[tuple[int, ...]]) -> str:
    """Return elements of a parameter as `fixed` takes them."""
    if len(places) == 1:
        return str(places[0][0] if len(places[0]) == 1 else places[0] or True)
    axes = [list(axis) for axis in zip(*(place for place in places[:_NAMED]), strict=True)]
    shown = axes[0] if len(axes) == 1 else tuple(axes)
    return f"{shown}" if len(places) <= _NAMED else f"{str(shown)[:-1]}, ...{str(shown)[-1]}"


def _rank(block: np.ndarray) -> int:
    s = np.linalg.svd(block, compute_uv=False)
    return int((s > 1e-6 * s.max(initial=0.0)).sum())
