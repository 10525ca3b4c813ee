"""Which dense blocks a sparse Cholesky factorisation works with: ordering, elimination tree, fronts.

The multifrontal method (Duff and Reid, 1983; Liu, 1992) on the graph of units, which are eliminated together. Units
with almost the same columns make one front; so do small subtrees, where dense zeros cost less than more fronts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..sparse._matrix import csc
from ._row_blocks import spread

_RELAX = 0.1  # share of zeros that a front may gain by taking in its last child: 0.1 to 0.2 cost the same
_NARROW = 32  # a narrow front below a front of up to so many columns is taken in though it brings more zeros
_SHARE = 0.6  # but no more than this share
_CHAIN = 12  # columns of a narrow front: two poses


class Graph(NamedTuple):
    """Which units meet in a symmetric matrix.

    Attributes:
        widths: Columns of each unit.
        ends: CSC column pointers of the lower triangle of the graph, its diagonal included.
        units: Its row indices.
    """

    widths: np.ndarray
    ends: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class Fronts:
    """The fronts of a factorisation, children before parents.

    Attributes:
        order: Column of the matrix that is eliminated at each place.
        columns: First column of each front in that order, and the number of columns.
        rows: Rows below each front's own columns, one front after the other.
        ends: Where these end.
        parent: The front that takes what is left of each; -1 for none.
        inside: Where these rows are in the front of the parent.
    """

    order: np.ndarray
    columns: np.ndarray
    rows: np.ndarray
    ends: np.ndarray
    parent: np.ndarray
    inside: np.ndarray

    @classmethod
    def of(cls, graph: Graph, leaf: int) -> Fronts:
        """Return the fronts for a symmetric matrix.

        Args:
            graph: Which units meet.
            leaf: Subtrees of at most so many columns become one front.
        """
        widths, ends, units = graph
        parent, below, order = _eliminated(ends, units, _ordered(ends, units))
        width = widths[order]
        groups = _grouped(parent, below, width, leaf)
        offset = np.r_[0, np.cumsum(width)]
        owner = np.repeat(np.arange(len(groups)), [last - first + 1 for first, last in groups])
        lists = [below[last] for _, last in groups]
        flat = np.concatenate([np.asarray(own, np.int64) for own in lists]) if lists else np.zeros(0, np.int64)
        rows = spread(offset[flat], width[flat])
        sizes = np.array([int(width[own].sum()) for own in lists], np.int64)
        columns = np.r_[offset[[first for first, _ in groups]], offset[-1]].astype(np.int64)
        above = np.array([owner[own[0]] if len(own) else -1 for own in lists], np.int64)
        start = np.cumsum(widths) - widths
        made = cls(spread(start[order], width), columns, rows, np.r_[0, np.cumsum(sizes)], above, np.zeros(0, np.int64))
        object.__setattr__(made, "inside", made._in_parents())
        return made

    @property
    def count(self) -> int:
        """How many."""
        return len(self.parent)

    @cached_property
    def wide(self) -> np.ndarray:
        """Own columns of each."""
        return np.diff(self.columns)

    @cached_property
    def high(self) -> np.ndarray:
        """Rows of each, below its own columns."""
        return np.diff(self.ends)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the factor's entries of each front begin, column by column; and their number."""
        return np.r_[0, np.cumsum((self.wide + self.high) * self.wide)]

    @cached_property
    def children(self) -> list[list[int]]:
        """The fronts that leave something to each."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        for child, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                found[parent].append(child)
        return found

    def panels(self, entries: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the entries of each front `(own columns and rows below, own columns)`, and the number of columns."""
        starts = self.starts.tolist()
        for front, wide in enumerate(self.wide.tolist()):
            yield entries[starts[front] : starts[front + 1]].reshape(wide, -1).T, wide

    @cached_property
    def operations(self) -> float:
        """Multiplications of a factorisation."""
        wide, high = self.wide.astype(float), self.high.astype(float)
        return float((wide**3 / 3 + wide**2 * high + wide * high**2).sum())

    @cached_property
    def place(self) -> np.ndarray:
        """Where each column is eliminated."""
        place = np.empty(len(self.order), np.int64)
        place[self.order] = np.arange(len(self.order))
        return place

    def scattered(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Return where entries of a lower triangle go among those of the factor."""
        i, j = self.place[rows], self.place[cols]
        i, j = np.maximum(i, j), np.minimum(i, j)
        front = np.searchsorted(self.columns, j, side="right") - 1
        return self.starts[front] + (j - self.columns[front]) * (self.wide + self.high)[front] + self._row(front, i)

    def _row(self, front: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Return the row of columns `i` within fronts."""
        size = self.columns[-1] + 1
        keys = np.repeat(np.arange(self.count), self.high) * size + self.rows
        own = i < self.columns[front + 1]
        below = np.searchsorted(keys, front * size + i) - self.ends[front] + self.wide[front]
        return np.where(own, i - self.columns[front], below)

    def _in_parents(self) -> np.ndarray:
        child = np.repeat(np.arange(self.count), self.high)
        return self._row(self.parent[child], self.rows) if len(self.rows) else np.zeros(0, np.int64)


def _ordered(ends: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return units in an order with little fill: SuperLU's multiple minimum degree on the graph."""
    from scipy.sparse.linalg import splu

    many = len(ends) - 1
    columns = np.repeat(np.arange(many), np.diff(ends))
    below = units > columns
    a, b = units[below], columns[below]
    degree = np.bincount(a, minlength=many) + np.bincount(b, minlength=many)
    index = np.arange(many)
    # Diagonally dominant: it is only to be ordered.
    entries = np.r_[np.full(2 * len(a), -1.0), degree + 1.0]
    graph = csc((entries, (np.r_[a, b, index], np.r_[b, a, index])))
    found = splu(graph, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return np.argsort(found.perm_c)


def _eliminated(
    ends: np.ndarray, units: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """Return the elimination tree in postorder: parents, what is below the diagonal of each column, and the order."""
    many = len(order)
    place = np.empty(many, np.int64)
    place[order] = np.arange(many)
    columns = np.repeat(np.arange(many), np.diff(ends))
    a, b = place[units], place[columns]
    low, high = np.minimum(a, b), np.maximum(a, b)
    by_row = np.lexsort((low, high))
    low, high = low[by_row], high[by_row]
    parent = _tree(many, low, high)
    post = _postorder(parent)
    rank = np.empty(many, np.int64)
    rank[post] = np.arange(many)
    moved = np.full(many, -1)
    has = parent[post] >= 0
    moved[has] = rank[parent[post][has]]
    return moved, _structures(moved, rank[low], rank[high]), order[post]


def _tree(many: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return parents in the elimination tree (Liu, 1986), entries being ordered by rows."""
    parent, ancestor = [-1] * many, [-1] * many
    for j, i in zip(low.tolist(), high.tolist(), strict=True):
        while j != i and j != -1:
            following = ancestor[j]
            ancestor[j] = i
            if following == -1:
                parent[j] = i
            j = following if following != -1 else i
    return np.array(parent, np.int64)


def _postorder(parent: np.ndarray) -> np.ndarray:
    """Return nodes with children before parents and subtrees together."""
    children: list[list[int]] = [[] for _ in parent]
    stack: list[int] = []
    for node, above in enumerate(parent.tolist()):
        (children[above] if above >= 0 else stack).append(node)
    backwards = []
    while stack:
        node = stack.pop()
        backwards.append(node)
        stack += children[node]
    return np.array(backwards[::-1], np.int64)


def _structures(parent: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[list[int]]:
    """Return rows below the diagonal of each column of the factor, rising."""
    found: list[set[int]] = [set() for _ in parent]
    for j, i in zip(np.minimum(low, high).tolist(), np.maximum(low, high).tolist(), strict=True):
        if i != j:
            found[j].add(i)
    for node, above in enumerate(parent.tolist()):
        if above >= 0:
            found[above] |= found[node]
            found[above].discard(above)
    return [sorted(own) for own in found]


def _grouped(parent: np.ndarray, below: list[list[int]], width: np.ndarray, leaf: int) -> list[tuple[int, int]]:
    """Return the first and the last unit of each front."""
    above, size, first = parent.tolist(), width.tolist(), list(range(len(parent)))
    for node, up in enumerate(above):
        if up >= 0:
            size[up] += size[node]
            first[up] = min(first[up], first[node])
    offset = np.r_[0, np.cumsum(width)].tolist()
    high = [int(width[own].sum()) for own in below]
    found: list[tuple[int, int, int]] = []  # first and last unit, zeros
    for node, up in enumerate(above):
        if size[node] <= leaf:
            if up >= 0 and size[up] <= leaf:
                continue
            found.append((first[node], node, 0))
            continue
        start, zeros = node, 0
        while found:
            begin, last, before = found[-1]
            if not (last + 1 == start and start <= above[last] <= node):
                break
            wide, own = offset[last + 1] - offset[begin], offset[node + 1] - offset[start]
            gained = wide * (own + high[node] - high[last]) + before + zeros
            total = (wide + own) * (wide + own + 1) // 2 + (wide + own) * high[node]
            narrow = wide <= _CHAIN and own <= _NARROW and gained <= _SHARE * total
            if not (narrow or gained <= _RELAX * total):
                break
            start, zeros = begin, gained
            found.pop()
        found.append((start, node, zeros))
    return [(begin, last) for begin, last, _ in found]
