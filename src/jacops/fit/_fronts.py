"""Which dense blocks a sparse Cholesky factorisation works with: ordering, elimination tree, fronts.

The multifrontal method (Duff and Reid, 1983; Liu, 1992) on the graph of units, which are eliminated together. Units
with almost the same columns make one front; so do small subtrees, where dense zeros cost less than more fronts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from ..sparse._matrix import csc
from ..sparse._pool import distinct
from ._row_blocks import Stack, classes, spread

_RELAX = 0.1  # share of zeros that a front may gain by taking in its last child: 0.1 to 0.2 cost the same
_NARROW = 32  # a narrow front below a front of up to so many columns is taken in though it brings more zeros
_SHARE = 0.6  # but no more than this share
_LEAVES = 0.1  # columns that are eliminated at once: where fewer are, a round costs more than their loop
_CHAIN = 12  # columns of a narrow front: two poses


@dataclass(frozen=True, eq=False)
class Graph:
    """Which units meet in a symmetric matrix, and how its lower triangle is stored: by columns of units.

    Attributes:
        widths: Columns of each unit.
        ends: CSC column pointers of the lower triangle of the graph.
        units: Its row indices, rising; the first one of each column is the unit itself.
    """

    widths: np.ndarray
    ends: np.ndarray
    units: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """The first column of each unit."""
        return np.cumsum(self.widths) - self.widths

    @cached_property
    def columns(self) -> np.ndarray:
        """The unit in whose column each of `units` is."""
        return np.repeat(np.arange(len(self.widths)), np.diff(self.ends))

    @cached_property
    def above(self) -> np.ndarray:
        """Entries above each of `units` in its column."""
        sizes = self.widths[self.units]
        total = np.cumsum(sizes) - sizes
        return total - np.repeat(total[self.ends[:-1]], np.diff(self.ends))

    @cached_property
    def heights(self) -> np.ndarray:
        """Entries in each column of a unit."""
        return np.add.reduceat(self.widths[self.units], self.ends[:-1])

    @cached_property
    def first(self) -> np.ndarray:
        """Where the entries of each unit's columns begin."""
        sizes = self.heights * self.widths
        return np.cumsum(sizes) - sizes

    @cached_property
    def size(self) -> int:
        """Stored entries."""
        return int((self.heights * self.widths).sum())

    @property
    def numbers(self) -> type[np.signedinteger[Any]]:
        """The type of numbers of entries."""
        return np.int32 if self.size < 2**31 else np.int64


@dataclass(frozen=True, eq=False)
class Fronts:
    """The fronts of a factorisation, children before parents.

    Attributes:
        graph: What is factorised.
        order: Unit that is eliminated at each place.
        firsts: First place of each front, and the number of places.
        below: Places of the units below each front's own, one front after the other.
        below_ends: Where these end.
        parent: The front that takes what is left of each; -1 for none.
        batches: Fronts without children that are alike, and are worked with at once; their entries lie together.
    """

    graph: Graph
    order: np.ndarray
    firsts: np.ndarray
    below: np.ndarray
    below_ends: np.ndarray
    parent: np.ndarray
    batches: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, graph: Graph, leaf: int, least: int | None = None) -> Fronts:
        """Return the fronts for a symmetric matrix.

        Args:
            graph: Which units meet.
            leaf: Subtrees of at most so many columns become one front.
            least: So many equal fronts without children make a batch; None for no batches.
        """
        parent, ends, rows, order = _eliminated(graph, _ordered(graph))
        width = graph.widths[order]
        high = np.diff(np.r_[0, np.cumsum(width[rows])][ends])
        groups = np.array(_grouped(parent, high, width, leaf), np.int64).reshape(-1, 2)
        firsts, counts = np.r_[groups[:, 0], len(order)], np.diff(ends)[groups[:, 1]]
        below, below_ends = rows[spread(ends[groups[:, 1]], counts)], np.r_[0, np.cumsum(counts)]
        owner = np.repeat(np.arange(len(groups)), np.diff(firsts))
        above = np.full(len(groups), -1)
        above[counts > 0] = owner[below[below_ends[:-1][counts > 0]]]
        made = cls(graph, order, firsts, below, below_ends, above, ())
        return made if least is None else replace(made, batches=made._alike(least))

    def _alike(self, least: int) -> tuple[np.ndarray, ...]:
        """Return narrow fronts without children, those together whose units have equal widths."""
        is_leaf = (self.wide <= _NARROW) & (np.bincount(self.parent + 1, minlength=self.count + 1)[1:] == 0)
        leaves = np.flatnonzero(is_leaf)
        counts = np.diff(self.below_ends)[leaves]
        units = self.below[spread(self.below_ends[leaves], counts)]
        stack = Stack(self.wide[leaves], np.r_[0, np.cumsum(counts)], units, np.zeros(len(leaves), np.int64))
        return tuple(leaves[own] for own in stack.kinds(self.width) if len(own) >= least)

    @property
    def count(self) -> int:
        """How many."""
        return len(self.parent)

    @cached_property
    def width(self) -> np.ndarray:
        """Columns of the unit at each place."""
        return self.graph.widths[self.order]

    @cached_property
    def offset(self) -> np.ndarray:
        """Columns before each place, and their number."""
        return np.r_[0, np.cumsum(self.width)]

    @cached_property
    def eliminated(self) -> np.ndarray:
        """Columns of the matrix in the order of elimination."""
        return spread(self.graph.starts[self.order], self.width)

    @cached_property
    def columns(self) -> np.ndarray:
        """First column of each front in that order, and the number of columns."""
        return self.offset[self.firsts]

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows below each front's own columns, one front after the other."""
        return spread(self.offset[self.below], self.width[self.below])

    @cached_property
    def ends(self) -> np.ndarray:
        """Where these end."""
        return np.r_[0, np.cumsum(self.width[self.below])][self.below_ends]

    @cached_property
    def inside(self) -> np.ndarray:
        """Where these rows are in the front of the parent."""
        parent = np.repeat(self.parent, np.diff(self.below_ends))
        return spread(self.row(parent, self.below), self.width[self.below])

    @cached_property
    def wide(self) -> np.ndarray:
        """Own columns of each."""
        return np.diff(self.columns)

    @cached_property
    def high(self) -> np.ndarray:
        """Rows of each, below its own columns."""
        return np.diff(self.ends)

    @cached_property
    def owner(self) -> np.ndarray:
        """The front of each place."""
        return np.repeat(np.arange(self.count), np.diff(self.firsts))

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the factor's entries of each front begin, column by column."""
        batched = np.concatenate([*self.batches, self.single])
        sizes, starts = ((self.wide + self.high) * self.wide)[batched], np.empty(self.count, np.int64)
        starts[batched] = np.cumsum(sizes) - sizes
        return starts

    @property
    def size(self) -> int:
        """Entries of the factor."""
        return int(((self.wide + self.high) * self.wide).sum())

    @cached_property
    def single(self) -> np.ndarray:
        """Fronts that are in no batch."""
        alone = np.ones(self.count, bool)
        for batch in self.batches:
            alone[batch] = False
        return np.flatnonzero(alone)

    @cached_property
    def children(self) -> list[list[int]]:
        """The fronts that leave something to each; batches are left out."""
        found: list[list[int]] = [[] for _ in range(self.count)]
        for child, parent in zip(self.single.tolist(), self.parent[self.single].tolist(), strict=True):
            if parent >= 0:
                found[parent].append(child)
        return found

    def panels(self, entries: np.ndarray) -> Iterator[tuple[int, np.ndarray, int]]:
        """Yield each front in no batch, its entries (own columns and rows below, own columns), and its own columns."""
        starts, wide, high = self.starts.tolist(), self.wide.tolist(), self.high.tolist()
        for front in self.single.tolist():
            own, start = wide[front], starts[front]
            yield front, entries[start : start + own * (own + high[front])].reshape(own, -1).T, own

    def row(self, front: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Return the row of the units at these places within fronts."""
        size = len(self.order) + 1
        own = place < self.firsts[front + 1]
        found = self.offset[place] - self.columns[front]
        keys = self._owned_keys
        front, place = front[~own], place[~own]
        found[~own] = self.wide[front] + self._heads[np.searchsorted(keys, front * size + place)]
        return found

    @cached_property
    def _owned_keys(self) -> np.ndarray:
        return np.repeat(np.arange(self.count), np.diff(self.below_ends)) * (len(self.order) + 1) + self.below

    @cached_property
    def _heads(self) -> np.ndarray:
        """Rows above each unit below a front's own."""
        sizes = self.width[self.below]
        total = np.cumsum(sizes) - sizes
        return total - np.repeat(self.ends[:-1], np.diff(self.below_ends))

    def meeting(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the factor's entries of columns `low` and rows `high` begin, and how far the next column is.

        Args:
            low: Places of units.
            high: Places of units, not before them.
        """
        front = self.owner[low]
        size = (self.wide + self.high)[front]
        return self.starts[front] + (self.offset[low] - self.columns[front]) * size + self.row(front, high), size

    def scattered(self) -> np.ndarray:
        """Return where the stored entries of the matrix go among those of the factor.

        Those above the diagonal, of which the blocks of single units have some, go above the diagonal of a front.
        """
        graph, place = self.graph, np.empty(len(self.order), np.int64)
        place[self.order] = np.arange(len(self.order))
        a, b = place[graph.units], place[graph.columns]
        to, size = self.meeting(np.minimum(a, b), np.maximum(a, b))
        down, right = np.where(a >= b, 1, size), np.where(a >= b, size, 1)
        number = np.int32 if max(self.size, graph.size) < 2**31 else np.int64
        to, down, right = to.astype(number), down.astype(number), right.astype(number)
        from_, below = (graph.first[graph.columns] + graph.above).astype(number), graph.heights[graph.columns]
        found = np.empty(graph.size, number)
        wide, high = graph.widths[graph.columns], graph.widths[graph.units]
        for own in classes((wide, high), len(wide)):
            rows, columns = int(high[own[0]]), int(wide[own[0]])
            i, j = np.arange(rows, dtype=number), np.arange(columns, dtype=number)[:, None]
            at = [part[own].astype(number)[:, None, None] for part in (from_, below, to, right, down)]
            found[at[0] + j * at[1] + i] = at[2] + j * at[3] + i * at[4]
        return found


def _ordered(graph: Graph) -> np.ndarray:
    """Return units in an order with little fill: SuperLU's multiple minimum degree on the graph."""
    from scipy.sparse.linalg import splu

    below, index = graph.units > graph.columns, np.arange(len(graph.widths))
    a, b = graph.units[below], graph.columns[below]
    degree = np.bincount(a, minlength=len(index)) + np.bincount(b, minlength=len(index))
    # Diagonally dominant: it is only to be ordered.
    entries = np.r_[np.full(2 * len(a), -1.0), degree + 1.0]
    matrix = csc((entries, (np.r_[a, b, index], np.r_[b, a, index])))
    found = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return np.argsort(found.perm_c)


def _eliminated(graph: Graph, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the elimination tree in postorder: parents, what is below the diagonal of each column, and the order.

    What is below is given by the ends of columns and rising rows.
    """
    many = len(order)
    place = np.empty(many, np.int64)
    place[order] = np.arange(many)
    a, b = place[graph.units], place[graph.columns]
    off = a != b
    ends, rows = _structures(many, np.minimum(a, b)[off], np.maximum(a, b)[off])
    counts, parent = np.diff(ends), np.full(many, -1)
    parent[counts > 0] = rows[ends[:-1][counts > 0]]
    post = _postorder(parent)
    rank = np.empty(many + 1, np.int64)
    rank[post], rank[-1] = np.arange(many), -1
    below = rank[rows[spread(ends[post], counts[post])]]
    return rank[parent[post]], np.r_[0, np.cumsum(counts[post])], below, order[post]


def _structures(many: int, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends and the rows, rising, below the diagonal of each column of the factor.

    Columns that no earlier one meets are eliminated at once, as long as they are many. What one of them leaves is for
    its parent: the first of its rows meets the others.
    """
    parts, is_left = [], np.ones(many, bool)
    keys = distinct(low * many + high)
    while True:
        low, high = np.divmod(keys, many)
        is_leaf = is_left.copy()
        is_leaf[high] = False
        if is_leaf.sum() < _LEAVES * is_left.sum() or not is_left.any():
            break
        taken = is_leaf[low]
        own, rows = low[taken], high[taken]
        parts.append(keys[taken])
        first = np.r_[True, own[1:] != own[:-1]][: len(own)]
        parent = rows[first][np.cumsum(first) - 1]
        keys = distinct(np.concatenate([keys[~taken], (parent * many + rows)[~first]]))
        is_left &= ~is_leaf
    found: dict[int, set[int]] = {node: set() for node in np.flatnonzero(is_left).tolist()}
    for j, i in zip(low.tolist(), high.tolist(), strict=True):
        found[j].add(i)
    for rows in found.values():
        if len(rows) > 1:
            above = min(rows)
            found[above] |= rows
            found[above].discard(above)
    columns = np.repeat(list(found), [len(rows) for rows in found.values()]).astype(np.int64)
    flat = np.fromiter(chain.from_iterable(found.values()), np.int64, len(columns))
    keys = np.sort(np.concatenate([*parts, columns * many + flat]))
    columns, rows = np.divmod(keys, many)
    return np.r_[0, np.cumsum(np.bincount(columns, minlength=many))], rows


def _postorder(parent: np.ndarray) -> np.ndarray:
    """Return nodes with children before parents and subtrees together."""
    # The last child of each node, that of none at the end, and the child before each: no list per node to collect.
    last, before = [-1] * (len(parent) + 1), [-1] * len(parent)
    for node, above in enumerate(parent.tolist()):
        before[node], last[above] = last[above], node
    backwards, stack = [], last[-1:]
    while stack:
        node = stack.pop()
        if node >= 0:
            backwards.append(node)
            stack += (before[node], last[node])
    return np.array(backwards[::-1], np.int64)


def _grouped(parent: np.ndarray, below: np.ndarray, width: np.ndarray, leaf: int) -> list[tuple[int, int]]:
    """Return the first and the last unit of each front."""
    above, size, first = parent.tolist(), width.tolist(), list(range(len(parent)))
    for node, up in enumerate(above):
        if up >= 0:
            size[up] += size[node]
            first[up] = min(first[up], first[node])
    offset = np.r_[0, np.cumsum(width)].tolist()
    high = below.tolist()
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
