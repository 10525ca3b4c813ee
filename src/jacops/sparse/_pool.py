"""Index sets, each kept once: the values that detection computes with.

A set of outputs is named by a number, its id. Outputs are in small blocks: rows of a residual, for example. Inside one
block the id is the block's number and a mask, so that a union is one `or` of numbers. A set that reaches over several
blocks is stored once, so that a dense layer costs one set and not one per entry. Such sets are known by a 64-bit sum of
random keys (Zobrist, 1970): with a million sets, two different ones are taken for the same with probability 3e-8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._matrix import Csr, csr

Array = NDArray[np.int64]
_MIX = np.uint64(0xBF58476D1CE4E5B9)  # an odd constant of splitmix64 (Steele, Lea and Flood, 2014)


class Pool:
    """Sets over `range(size)`; id 0 is the empty set.

    Args:
        size: How many different members there may be.
        starts: First members of the blocks, rising from 0; by default every member is one.
    """

    def __init__(self, size: int, starts: Array | None = None) -> None:
        self.size = size
        self._starts = np.arange(size) if starts is None else starts
        widths = np.diff(np.r_[self._starts, size])
        self._width = int(widths.max(initial=1))  # bits of a mask
        self._block = np.repeat(np.arange(len(widths)), widths)
        self._first = (len(widths) + 1) << self._width  # least id of a set that is stored
        held = (np.arange(1 << self._width)[:, None] >> np.arange(self._width)) & 1
        self._counts = held.sum(1)
        self._places = np.nonzero(held)[1]  # of the bits of each mask, one mask after another
        self._keys = np.random.default_rng(0).integers(1, 2**63 - 1, size=max(size, 1), dtype=np.uint64)
        self._ends = np.zeros(1, np.int64)  # stored set i holds members[ends[i]:ends[i + 1]]
        # Doubled when full.
        self._members = np.zeros(1024, np.int32)
        self._hashes = np.zeros(0, np.uint64)  # sorted, with the ids they belong to
        self._ids = np.zeros(0, np.int64)

    @property
    def _bits(self) -> int:
        """How many bits an id has."""
        return (self._first + len(self._ends)).bit_length()

    def singletons(self, members: Array) -> Array:
        """Return the ids of `{m}` for each given member."""
        block = self._block[members]
        return ((block + 1) << self._width) | np.left_shift(1, members - self._starts[block])

    def sizes(self, ids: Array) -> Array:
        """Return how many members each set has."""
        stored = ids >= self._first
        if not stored.any():
            return self._counts[ids & _mask(self._width)]
        own = np.where(stored, ids - self._first, 0)
        return np.where(stored, self._ends[own + 1] - self._ends[own], self._counts[ids & _mask(self._width)])

    def _held(self, ids: Array) -> tuple[Array, Array]:
        """Return the members of these sets, one set after another, and how many each has."""
        sizes, stored = self.sizes(ids), ids >= self._first
        if not stored.any():
            return self._masked(ids, sizes), sizes
        own = ids[stored] - self._first
        found = self._members[spans(self._ends[own], sizes[stored])].astype(np.int64)
        if stored.all():
            return found, sizes
        members = np.empty(int(sizes.sum()), np.int64)
        in_stored = np.repeat(stored, sizes)
        members[in_stored] = found
        members[~in_stored] = self._masked(ids[~stored], sizes[~stored])
        return members, sizes

    def _masked(self, ids: Array, sizes: Array) -> Array:
        """Return the members of sets within a block, one set after another."""
        first = (np.cumsum(self._counts) - self._counts)[ids & _mask(self._width)]
        blocks = ids >> self._width
        return self._places[spans(first, sizes)] + np.repeat(self._starts[np.maximum(blocks, 1) - 1], sizes)

    def union(self, ids: Array) -> int:
        """Return the id of the union of all these sets."""
        ids = distinct(np.ravel(ids))
        return int(self.union_groups(np.zeros(len(ids), np.int64), ids, 1)[0])

    def union_pairs(self, left: Array, right: Array) -> Array:
        """Return unions entry by entry of two arrays of one shape."""
        if left is right or not right.any():
            return left
        if not left.any():
            return right
        differ = left ^ right
        apart = ((differ >> self._width) != 0) | ((left >= self._first) & (differ != 0))
        apart &= (left != 0) & (right != 0)
        joined = left | right
        if apart.any():
            joined[apart] = self._paired(left[apart], right[apart])
        return joined

    def _paired(self, left: Array, right: Array) -> Array:
        """Return unions of pairs of sets that are not in one block, flat."""
        bits = self._bits
        pairs, where = _numbered((np.minimum(left, right) << bits) | np.maximum(left, right))
        # Side by side and rising, so that no sort is needed.
        ids = np.stack([pairs >> bits, pairs & _mask(bits)], 1).ravel()
        return self.union_groups(np.arange(len(pairs)).repeat(2), ids, len(pairs))[where]

    def union_groups(self, groups: Array, ids: Array, count: int) -> Array:
        """Return, for each of `count` groups, the id of the union of the sets that carry its number."""
        out = np.zeros(count, np.int64)
        held = ids != 0
        bits = self._bits
        keys = distinct((groups[held] << bits) | ids[held])
        if not len(keys):
            return out
        groups, ids = keys >> bits, keys & _mask(bits)
        start = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
        count_of = np.diff(np.r_[start, len(groups)])
        last = ids[start + count_of - 1]  # the largest
        near = ((ids[start] ^ last) >> self._width == 0) & (last < self._first)
        near |= count_of == 1
        out[groups[start[near]]] = np.bitwise_or.reduceat(ids, start)[near]
        several = np.flatnonzero(~near)
        if len(several):
            out[groups[start[several]]] = self._unions(ids, start, count_of, several)
        return out

    def _unions(self, ids: Array, start: Array, count_of: Array, several: Array) -> Array:
        """Return the unions of runs of ids; runs that hold the same ids are worked out once."""
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
        marks = np.add.reduceat(mixed, start)[several]
        marks, where = _numbered(marks)
        first = np.empty(len(marks), np.int64)
        first[where] = np.arange(len(where))
        runs = several[first]
        members, sizes = self._held(ids[spans(start[runs], count_of[runs])])
        rows = np.repeat(np.repeat(np.arange(len(runs)), count_of[runs]), sizes)
        bits = self.size.bit_length()
        keys = distinct((rows << bits) | members)
        rows, members = keys >> bits, keys & _mask(bits)
        ends = np.searchsorted(rows, np.arange(len(runs) + 1))
        return self._interned(ends, members, np.add.reduceat(self._keys[members], ends[:-1]))[where]

    def _interned(self, ends: Array, members: Array, hashes: NDArray[np.uint64]) -> Array:
        """Return the ids of these sets, of the same ones stored before where there are any."""
        fresh, where = _numbered(hashes)
        first = np.empty(len(fresh), np.int64)
        first[where] = np.arange(len(where))
        place = np.searchsorted(self._hashes, fresh)
        near = np.minimum(place, len(self._hashes) - 1)
        known = self._hashes[near] == fresh if len(self._hashes) else np.zeros(len(fresh), bool)
        ids = np.zeros(len(fresh), np.int64)
        ids[known] = self._ids[near[known]]
        new = np.flatnonzero(~known)
        if len(new):
            ids[new] = self._first + len(self._ends) - 1 + np.arange(len(new))
            sizes = np.diff(ends)[first[new]]
            self._append(members[spans(ends[:-1][first[new]], sizes)], sizes)
            self._hashes = np.insert(self._hashes, place[new], fresh[new])
            self._ids = np.insert(self._ids, place[new], ids[new])
        return ids[where]

    def _append(self, members: Array, sizes: Array) -> None:
        used = int(self._ends[-1])
        if used + len(members) > len(self._members):
            grown = np.zeros(max(2 * len(self._members), used + len(members)), np.int32)
            grown[:used] = self._members[:used]
            self._members = grown
        self._members[used : used + len(members)] = members
        self._ends = np.concatenate([self._ends, used + np.cumsum(sizes)])

    def matrix(self, ids: Array) -> Csr:
        """Return a boolean matrix `(len(ids), size)` with a row per set."""
        members, sizes = self._held(ids)
        ends = np.r_[0, np.cumsum(sizes)]
        return csr((np.ones(len(members), bool), members, ends), shape=(len(ids), self.size))


def spans(start: Array, length: Array) -> Array:
    """Return `arange(start[k], start[k] + length[k])` for all k, one after another."""
    total = int(length.sum())
    if not total:
        return np.zeros(0, np.int64)
    return np.arange(total) + np.repeat(start - np.r_[0, np.cumsum(length)[:-1]], length)


def distinct(values: Array) -> Array:
    """Return the different values, sorted; quick where they come in sorted runs, as they mostly do (timsort)."""
    if len(values) < 2:
        return values
    ordered = values if bool((values[1:] >= values[:-1]).all()) else np.sort(values, kind="stable")
    return ordered[np.r_[True, ordered[1:] != ordered[:-1]]]


def _numbered(values: NDArray[Any]) -> tuple[NDArray[Any], Array]:
    """Return the different values, sorted, and for each given one its number."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    fresh = np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
    where = np.empty(len(values), np.int64)
    where[order] = np.cumsum(fresh) - 1
    return ordered[fresh], where


def _mask(bits: int) -> int:
    return (1 << bits) - 1
