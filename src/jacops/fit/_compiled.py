# pyright: basic, reportMissingImports=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN202 - numba finds the types
"""The loops over fronts, compiled by numba: imported only where that is installed (extra `fast`).

Dense kernels are SciPy's own BLAS and LAPACK, called by addresses that stand in an array: a global pointer would
forbid a cache on disk. All arrays are arguments, since numba frees one of its own after its last visible use, whatever
address was taken of it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import get_cython_function_address as address
from numba.extending import intrinsic

word = np.uintp

# Words and numbers that BLAS takes by address.
_LETTERS = np.frombuffer(b"LRTN", np.uint8).copy()
_NUMBERS = np.array([1.0, -1.0, 0.0])
_KERNELS = np.array(
    [
        address("scipy.linalg.cython_lapack", "dpotrf"),
        address("scipy.linalg.cython_blas", "dtrsm"),
        address("scipy.linalg.cython_blas", "dsyrk"),
        address("scipy.linalg.cython_lapack", "dpotri"),
        address("scipy.linalg.cython_blas", "dgemm"),
    ],
    np.uintp,
)


@intrinsic
def _call(typing, at, args):
    """Call the function at an address with machine words."""
    count = len(args)

    def generate(context, builder, signature, values):
        size = ir.IntType(64)
        function = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [size] * count).as_pointer())
        builder.call(function, [builder.extract_value(values[1], k) for k in range(count)])
        return context.get_dummy_value()

    return types.void(at, args), generate


@njit(nogil=True, cache=True)
def _added(child, begin, L, place, fronts, work):
    """Add what a child leaves to the panel and the rest of its parent."""
    (panel, own, below), (_, _, high, ends, inside), (left, rest) = place, fronts, work
    many, rows, size = high[child], ends[child], own + below
    for j in range(many):
        column, from_ = inside[rows + j], begin[child] + j * many
        if column < own:
            to = panel + column * size
            for i in range(j, many):
                L[to + inside[rows + i]] += left[from_ + i]
        else:
            to = (column - own) * below - own
            for i in range(j, many):
                rest[to + inside[rows + i]] += left[from_ + i]


@njit(nogil=True, cache=True)
def _factorised(kernels, words, L, fronts, tree, work):
    (letters, sizes, numbers), (starts, wide, high, _, _), (first, children), (left, rest) = words, fronts, tree, work
    at_letters, at_sizes, at_numbers = word(letters.ctypes.data), word(sizes.ctypes.data), word(numbers.ctypes.data)
    at_factor, at_rest = word(L.ctypes.data), word(rest.ctypes.data)
    begin = np.zeros(len(wide) + 1, np.int64)  # where the update matrix of a front is on the stack
    top = 0
    for front in range(len(wide)):
        own, below, panel = wide[front], high[front], starts[front]
        size = own + below
        rest[: below * below] = 0.0
        lowest = top
        for k in range(first[front], first[front + 1]):
            lowest = min(lowest, begin[children[k]])
            _added(children[k], begin, L, (panel, own, below), fronts, work)
        sizes[0], sizes[1], sizes[2], sizes[3] = own, size, below, 0
        at_own, at_size = at_sizes, at_sizes + word(4)
        at_below, at_failed = at_sizes + word(8), at_sizes + word(12)
        lower, right, transposed, plain = at_letters, at_letters + word(1), at_letters + word(2), at_letters + word(3)
        one, minus = at_numbers, at_numbers + word(8)
        diagonal, rows = at_factor + word(8 * panel), at_factor + word(8 * (panel + own))
        _call(kernels[0], (lower, at_own, diagonal, at_size, at_failed))
        if sizes[3] != 0:
            return False
        top = begin[front] = lowest
        if below > 0:
            _call(
                kernels[1],
                (right, lower, transposed, plain, at_below, at_own, one, diagonal, at_size, rows, at_size),
            )
            _call(kernels[2], (lower, plain, at_below, at_own, minus, rows, at_size, one, at_rest, at_below))
            left[top : top + below * below] = rest[: below * below]
            top += below * below
    return True


@njit(nogil=True, cache=True)
def _handed_down(child, begin, Z, place, fronts, work):
    """Put on the stack what the rows below a child have of the inverse: entries of its parent's front."""
    (panel, own, below), (_, _, high, ends, inside), (left, rest) = place, fronts, work
    many, rows, size = high[child], ends[child], own + below
    for j in range(many):
        column = inside[rows + j]
        for i in range(j, many):
            row = inside[rows + i]
            value = Z[panel + column * size + row] if column < own else rest[(column - own) * below + row - own]
            left[begin[child] + j * many + i] = left[begin[child] + i * many + j] = value


@njit(nogil=True, cache=True)
def _inverted_front(kernels, words, Z, place, work):
    """Turn the factor's entries of a front into those of the inverse; `rest` is that of the rows below."""
    (letters, sizes, numbers), (panel, own, below), (_, rest, product) = words, place, work
    at_letters, at_sizes, at_numbers = word(letters.ctypes.data), word(sizes.ctypes.data), word(numbers.ctypes.data)
    at_inverse, at_rest, at_product = word(Z.ctypes.data), word(rest.ctypes.data), word(product.ctypes.data)
    lower, right, transposed, plain = at_letters, at_letters + word(1), at_letters + word(2), at_letters + word(3)
    one, minus, zero = at_numbers, at_numbers + word(8), at_numbers + word(16)
    at_own, at_size, at_below, at_failed = at_sizes, at_sizes + word(4), at_sizes + word(8), at_sizes + word(12)
    size = own + below
    sizes[0], sizes[1], sizes[2], sizes[3] = own, size, below, 0
    diagonal, rows = at_inverse + word(8 * panel), at_inverse + word(8 * (panel + own))
    if below > 0:
        _call(kernels[1], (right, lower, plain, plain, at_below, at_own, one, diagonal, at_size, rows, at_size))
        shape = (plain, plain, at_below, at_own, at_below)
        _call(kernels[4], shape + (minus, at_rest, at_below, rows, at_size, zero, at_product, at_below))
    _call(kernels[3], (lower, at_own, diagonal, at_size, at_failed))
    for j in range(own):
        for i in range(j + 1, own):
            Z[panel + i * size + j] = Z[panel + j * size + i]
    if below > 0:
        shape = (transposed, plain, at_own, at_own, at_below)
        _call(kernels[4], shape + (minus, rows, at_size, at_product, at_below, one, diagonal, at_size))
        for j in range(own):
            Z[panel + j * size + own : panel + (j + 1) * size] = product[j * below : (j + 1) * below]


@njit(nogil=True, cache=True)
def _inverted(kernels, words, Z, fronts, tree, work):
    """Turn the factor's entries of the needed fronts into those of the inverse, from the root down."""
    (starts, wide, high, _, _), (first, children, needed), (left, rest, _) = fronts, tree, work
    begin = np.zeros(len(wide) + 1, np.int64)
    top = 0
    for front in range(len(wide) - 1, -1, -1):
        if not needed[front]:
            continue
        below, place = high[front], (starts[front], wide[front], high[front])
        if below > 0:
            top = begin[front]
            rest[: below * below] = left[top : top + below * below]
        _inverted_front(kernels, words, Z, place, work)
        for k in range(first[front], first[front + 1]):
            child = children[k]
            if needed[child]:
                begin[child] = top
                top += high[child] ** 2
                _handed_down(child, begin, Z, place, fronts, (left, rest))


@njit(nogil=True, cache=True)
def _solved(x, L, fronts, some):
    starts, columns, wide, high, ends, rows = fronts
    for front in range(len(wide)):
        own, below, c, panel = wide[front], high[front], columns[front], starts[front]
        some[:below] = 0.0
        for j in range(own):
            at = panel + j * (own + below)
            value = x[c + j] / L[at + j]
            x[c + j] = value
            for i in range(j + 1, own):
                x[c + i] -= L[at + i] * value
            for i in range(below):
                some[i] += L[at + own + i] * value
        for i in range(below):
            x[rows[ends[front] + i]] -= some[i]
    for front in range(len(wide) - 1, -1, -1):
        own, below, c, panel = wide[front], high[front], columns[front], starts[front]
        for i in range(below):
            some[i] = x[rows[ends[front] + i]]
        for j in range(own - 1, -1, -1):
            at = panel + j * (own + below)
            value = x[c + j]
            for i in range(j + 1, own):
                value -= L[at + i] * x[c + i]
            for i in range(below):
                value -= L[at + own + i] * some[i]
            x[c + j] = value / L[at + j]


class Loops:
    """The loops over the fronts of one analysis, with the memory that they work in.

    Args:
        fronts: The fronts.
        children: Of each front.
    """

    def __init__(self, fronts, children) -> None:
        self.fronts = fronts
        self._first = np.cumsum([0, *(len(own) for own in children)])
        self._children = np.array([child for own in children for child in own], np.int64)
        self._sizes = np.zeros(4, np.int32)
        held = most = 0
        for own, below in zip(children, fronts.high.tolist(), strict=True):
            held += below**2
            most = max(most, held)
            held -= int((fronts.high[own] ** 2).sum())
        widest = int(fronts.high.max(initial=1))
        self._left, self._rest, self._some = np.empty(most + widest**2), np.empty(widest**2), np.empty(widest)

    def factorised(self, L: np.ndarray) -> bool:
        """Factorise in place, from the entries of the matrix; return whether it is positive definite."""
        fronts = self.fronts
        about = fronts.starts, fronts.wide, fronts.high, fronts.ends, fronts.inside
        words, tree = (_LETTERS, self._sizes, _NUMBERS), (self._first, self._children)
        return _factorised(_KERNELS, words, L, about, tree, (self._left, self._rest))

    def inverted(self, Z: np.ndarray, needed: np.ndarray) -> None:
        """Turn entries of the factor in place into those of the inverse, for fronts that are needed.

        Those above a needed front are needed too. Other entries are left as they are.
        """
        fronts = self.fronts
        about = fronts.starts, fronts.wide, fronts.high, fronts.ends, fronts.inside
        words, tree = (_LETTERS, self._sizes, _NUMBERS), (self._first, self._children, needed)
        product = np.empty(int((fronts.wide * fronts.high).max(initial=1)))
        _inverted(_KERNELS, words, Z, about, tree, (self._left, self._rest, product))

    def solved(self, L: np.ndarray, x: np.ndarray) -> None:
        """Solve in place for one right-hand side in the order of elimination."""
        fronts = self.fronts
        about = fronts.starts, fronts.columns, fronts.wide, fronts.high, fronts.ends, fronts.rows
        _solved(x, L, about, self._some)
