"""Colouring: which rows or columns may share one sweep, so that every entry can still be read off.

One-sided colourings group rows (or columns) that never meet in a column (or row) (Curtis, Powell and Reid, 1974);
with a few dense rows or columns, these go one by one from their own side and the rest is coloured (Coleman and Verma,
1998, in a greedy form). A symmetric matrix needs less: of an entry and its mirror one has to be readable (star
colouring; Coleman and Moré, 1984; Gebremedhin, Manne and Pothen, 2005).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ._matrix import Csr, csc, csr
from ._pool import Array, distinct

# Dense columns that may get a colour of their own: doubling finds the best number within a factor of 2.
_TAKEN_OUT = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_STAR_STEPS = 3_000_000  # steps of a Python loop, about two seconds
_COUNTED = 16  # keys to an entry: up to so many, counting three million entries took half the time of sorting them
PUSH_COST = 2.0  # a push is a backward pass through a recorded backward pass


@dataclass(frozen=True, eq=False)
class Coloring:
    """Colours of rows and columns; -1 where a row or column takes part in no sweep of its side.

    Attributes:
        rows: Colour of each row: rows of one colour share a backward pass.
        columns: Colour of each column: columns of one colour share a forward push.
        symmetric: Entries may be read from their mirrors.
    """

    rows: Array
    columns: Array
    symmetric: bool = False

    @property
    def pulls(self) -> int:
        """Number of backward passes."""
        return int(self.rows.max(initial=-1)) + 1

    @property
    def pushes(self) -> int:
        """Number of forward pushes."""
        return int(self.columns.max(initial=-1)) + 1

    @property
    def cost(self) -> float:
        """Backward passes, with pushes counted as what they cost beside one."""
        return _cost(self.pulls, self.pushes)


def _cost(pulls: int, pushes: int) -> float:
    return pulls + (1 + PUSH_COST * pushes if pushes else 0)


def color(matrix: Csr, columns: bool = True, symmetric: bool = False, limit: float = np.inf) -> Coloring:
    """Return the cheapest colouring found, always the same for the same matrix.

    Args:
        matrix: The pattern.
        columns: Whether there are pushes at all.
        symmetric: The matrix is a Hessian.
        limit: Colourings that cost as much are not looked for; every row by itself is the answer then.
    """
    best = _one_sided(matrix, columns, limit)
    star = _star(matrix) if symmetric else None
    mirrored = best if star is None else Coloring(star, np.full(matrix.shape[1], -1), True)
    return mirrored if mirrored.cost < best.cost else best


@dataclass(frozen=True, eq=False)
class _Try:
    """One way to colour: a side, and how many of the densest of the other side go one by one.

    Attributes:
        turned: Columns are coloured.
        dense: What goes one by one.
        bound: The least this can cost.
    """

    turned: bool
    dense: Array
    bound: float

    def color(self, matrix: Csr) -> Coloring:
        """Return the colouring."""
        one = csr(matrix.T) if self.turned else matrix
        single = np.full(one.shape[1], -1)
        single[self.dense] = np.arange(len(self.dense))
        if len(self.dense):
            one = csr((single[one.indices] < 0, one.indices, one.indptr), shape=one.shape, copy=True)
            one.eliminate_zeros()
        colors = group(one)
        return Coloring(single, colors) if self.turned else Coloring(colors, single)


def _one_sided(matrix: Csr, columns: bool, limit: float) -> Coloring:
    """Return the best colouring by rows or columns, with 0, 1, 2, 4 … of the densest of the other side taken out."""
    best = Coloring(np.arange(matrix.shape[0]), np.full(matrix.shape[1], -1))
    per_column = np.bincount(matrix.indices, minlength=matrix.shape[1])
    for one in sorted(_tries(np.diff(matrix.indptr), per_column, columns), key=lambda t: t.bound):
        if one.bound >= limit:
            break
        done = one.color(matrix)
        if done.cost < limit:
            best, limit = done, done.cost
    return best


def _tries(per_row: Array, per_column: Array, columns: bool) -> Iterator[_Try]:
    for turned in (False, True) if columns else (False,):
        across = per_row if turned else per_column
        dense = np.argsort(-across, kind="stable")
        for out in _TAKEN_OUT if columns else (0,):
            if out and (out >= len(across) or across[dense[out - 1]] <= 1):
                break
            longest = int(across[dense[out]]) if out < len(dense) else 0
            yield _Try(turned, dense[:out], _cost(out, longest) if turned else _cost(longest, out))


def group(matrix: Csr) -> Array:
    """Return colours of the rows such that no two of one colour meet in a column; -1 for empty rows.

    Rows are taken as they come, those that meet most others first, and in a random order with a fixed seed; the
    order with the fewest colours wins.
    """
    matrix = csr(matrix)
    m = matrix.shape[0]
    held = np.diff(matrix.indptr) > 0
    met, bound = _met(matrix)
    orders: list[Callable[[], Array]] = [
        lambda: np.arange(m),
        lambda: np.argsort(-met, kind="stable"),
        lambda: np.random.default_rng(0).permutation(m),
    ]
    best = np.full(m, -1)
    if not bound:
        return best
    groups = _grouper()
    least = m + 1
    for order in orders:
        colors = np.where(held, groups(matrix, order()), -1)
        colors = _renumbered(colors)
        if colors.max() + 1 < least:
            best, least = colors, int(colors.max()) + 1
        if least == bound:
            break
    return best


def most_colors(matrix: Csr) -> int:
    """Return how many colours `color` gives rows at most: one more than a row meets others, or each by itself."""
    met = _met(matrix)[0] - np.diff(matrix.indptr)  # not counting itself
    return min(max(int(met.max(initial=0)) + 1, _TAKEN_OUT[-1]), matrix.shape[0])


def _met(matrix: Csr) -> tuple[Array, int]:
    """Return how many entries share a column with each row's, its own included, and the fullest column's number."""
    per_column = np.bincount(matrix.indices, minlength=matrix.shape[1])
    sums = np.add.reduceat(np.r_[per_column[matrix.indices], 0], matrix.indptr[:-1]) if matrix.shape[0] else np.zeros(0)
    return sums * (np.diff(matrix.indptr) > 0), int(per_column.max(initial=0))


def _renumbered(colors: Array) -> Array:
    """Return colours 0, 1, 2 … without gaps, -1 kept."""
    used = distinct(colors[colors >= 0])
    return np.where(colors >= 0, np.searchsorted(used, colors), -1)


def _grouper() -> Callable[[Csr, Array], Array]:
    """Return scipy's compiled grouping, or the one below where scipy has moved its private module."""
    try:
        from scipy.optimize._numdiff import group_columns
    except ImportError:
        return greedy
    # Its annotations say that the order is a number.
    return lambda matrix, order: np.asarray(group_columns(csr(matrix.T), order=order), np.int64)  # pyright: ignore[reportArgumentType]


def greedy(matrix: Csr, order: Array) -> Array:
    """Return colours of rows, each in turn taking the first colour that no row it meets has."""
    across = csc(matrix)
    colors = np.full(matrix.shape[0], -1)
    seen = np.full(matrix.shape[0] + 1, -1)
    for row in order:
        for column in matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]:
            seen[colors[across.indices[across.indptr[column] : across.indptr[column + 1]]]] = row
        colors[row] = np.argmax(seen != row)
    return colors


# ---- symmetric -------------------------------------------------------------------------------------------------


def _star(matrix: Csr) -> Array | None:
    """Return a star colouring, the densest vertices having colours of their own; None where it would take too long."""
    whole = csr(matrix + matrix.T)
    degrees = np.diff(whole.indptr)
    dense = np.argsort(-degrees, kind="stable")
    best: Array | None = None
    for out in _TAKEN_OUT:
        if out >= len(degrees):
            break
        kept = np.sort(dense[out:])
        rest = csr(whole[kept][:, kept])
        steps = float((np.diff(rest.indptr).astype(float) ** 3).sum())
        if steps > _STAR_STEPS:
            continue
        inner = _star_colors(rest)
        colors = np.full(len(degrees), -1)
        colors[kept] = inner
        colors[dense[:out]] = inner.max(initial=-1) + 1 + np.arange(out)
        if best is not None and colors.max() >= best.max():
            break
        best = colors
    return None if best is None else _renumbered(best)


def _star_colors(matrix: Csr) -> Array:
    """Return colours of vertices such that every path of four has three colours (greedy, in the order they come)."""
    near = [matrix.indices[a:b].tolist() for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)]
    colors = [-1] * len(near)
    for v, around in enumerate(near):
        taken = set()
        for w in around:
            if w == v:
                continue
            if colors[w] < 0:
                taken.update(colors[x] for x in near[w] if x != v)
                continue
            taken.add(colors[w])
            for x in near[w]:
                # v - w - x - y with the colours of w and y alike: x must differ from v.
                if x != v and colors[x] >= 0 and any(y != w and colors[y] == colors[w] for y in near[x]):
                    taken.add(colors[x])
        color = 0
        while color in taken:
            color += 1
        colors[v] = color
    return np.asarray(colors, np.int64)


# ---- reading off -----------------------------------------------------------------------------------------------


def reading(rows: Array, columns: Array, coloring: Coloring) -> tuple[NDArray[np.bool_], Array, Array] | None:
    """Return how entries at these rows and columns are read off; None if the colouring does not allow it.

    Entry k is in sweep `sweep[k]` at place `at[k]`: where `pushed[k]` in a row of a push, else in a column of a
    pull. The three are returned in the order pushed, sweep, at.
    """
    alone = _alone(coloring.rows, rows, columns)
    pushed, sweep, at = np.zeros(len(rows), bool), coloring.rows[rows], columns.copy()
    if not alone.all():
        colors = coloring.rows if coloring.symmetric else coloring.columns  # an entry's mirror is in a pull too
        across = _alone(colors, columns, rows) & ~alone
        sweep[across], at[across] = colors[columns[across]], rows[across]
        pushed = pushed if coloring.symmetric else across
        alone |= across
    return (pushed, sweep, at) if alone.all() else None


def _alone(colors: Array, own: Array, other: Array) -> NDArray[np.bool_]:
    """Return which entries are the only one of their colour in their line across."""
    if not len(own):
        return np.zeros(0, bool)
    keys = (colors[own] + 1) * (int(other.max()) + 1) + other
    usable, most = colors[own] >= 0, int(keys.max())
    if most < _COUNTED * len(keys):
        return (np.bincount(keys)[keys] == 1) & usable
    keys = keys.astype(np.int32) if most < 2**31 else keys
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    differs = keys[1:] != keys[:-1]
    single = np.empty(len(keys), bool)
    single[order] = np.r_[True, differs] & np.r_[differs, True]
    return single & usable
