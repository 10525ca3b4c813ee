"""Compressed evaluation: a few sweeps over sums of rows or columns, and every entry read off them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._operators import Operator
from .._progress import track
from .._runtime.memory import ensure_fits
from .._space import Space
from .._torch.protocol import Linearization
from ..errors import NotDifferentiableError
from ._coloring import Coloring, reading
from ._matrix import Csr, csr
from ._pool import Array
from ._probe import Floats, Prober, Verdict, draw, judged

_CHUNK_ENTRIES = 2**24  # 128 MiB of seeds and products in float64
_CHUNK_ROWS = 64  # as in `_runtime.chunks`
_CONFIDENCE = 1e-3  # probability that an error bound fails: the 99.9 % of `SparseJacobian.error_bound`
_SEED = 7000  # fixed, so that routes are reproducible, and apart from the seeds of other noise
_LESS = 0.7  # no power of two, which would not round at all
_SAMPLED = 100.0  # one sample of the rounding errors may be this much smaller than another
_TODO = "Use products (`jacobian(...) @ v`) where the pattern is not sparse, or fewer outputs at a time."


@dataclass(frozen=True, eq=False)
class Sweeper:
    """The two products everything is evaluated with.

    Attributes:
        pull: Rows `(k, m)` to rows `(k, n)`.
        push: Rows `(k, n)` to rows `(k, m)`.
        domain: What the columns are.
        codomain: What the rows are.
    """

    pull: Callable[[Tensor], Tensor]
    push: Callable[[Tensor], Tensor]
    domain: Space
    codomain: Space

    @classmethod
    def over(cls, operator: Operator) -> Sweeper:
        """Return the products of an operator."""
        return cls(operator._apply_transpose, operator._apply, operator.domain, operator.codomain)

    @classmethod
    def on(cls, lin: Linearization) -> Sweeper:
        """Return the sweeps of a linearization."""
        domain, codomain = lin.domain, lin.codomain

        def pull(rows: Tensor) -> Tensor:
            return domain.join(lin.pull_rows(codomain.split(rows))).detach()

        def push(rows: Tensor) -> Tensor:
            return codomain.join(lin.push_rows(domain.split(rows))).detach()

        return cls(pull, push, domain, codomain)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.codomain.dim, self.domain.dim

    @property
    def rows(self) -> Tensor:
        """A tensor in the dtype and on the device of cotangents."""
        return torch.empty(0, dtype=self.codomain.dtype, device=self.codomain.device)

    @property
    def columns(self) -> Tensor:
        """The same for tangents."""
        return torch.empty(0, dtype=self.domain.dtype, device=self.domain.device)

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """All dtypes of both ends."""
        return frozenset((*self.codomain.dtypes, *self.domain.dtypes))

    def swept(self, seeds: Tensor, push: bool) -> Tensor:
        """Return the products of all seeds, a chunk at a time."""
        chunk = max(1, min(_CHUNK_ROWS, _CHUNK_ENTRIES // max(1, sum(self.shape))))
        product = self.push if push else self.pull
        parts = [product(part) for part in track(seeds.split(chunk), "sweeps")]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Assembly:
    """How sweeps become a matrix in CSR order.

    Attributes:
        shape: Of the matrix.
        ends: CSR row pointers.
        columns: CSR column indices, sorted within rows.
        pulled: For each term its place in the flat `(pulls, columns of the sweeper)`, or -1.
        pushed: For each term its place in the flat `(pushes, rows of the sweeper)`, or -1; None where none is.
        start: Where the terms of each entry start; None where every entry has one term.
    """

    shape: tuple[int, int]
    ends: NDArray[np.int32]
    columns: NDArray[np.int32]
    pulled: Array
    pushed: Array | None
    start: Array | None

    @classmethod
    def of(cls, matrix: Csr, coloring: Coloring, column_of: Array, width: int) -> Assembly:
        """Return the assembly of a pattern whose columns are copies of the columns of a narrower matrix.

        Args:
            matrix: Pattern over the sweeper's columns.
            coloring: Its colouring.
            column_of: Which final column each of its columns copies.
            width: Number of final columns.
        """
        m, wide = matrix.shape
        rows = np.repeat(np.arange(m), np.diff(matrix.indptr))
        inner = matrix.indices.astype(np.int64)
        found = reading(rows, inner, coloring)
        if found is None:
            raise NotDifferentiableError(
                "sparse: a colouring does not tell all entries apart; this is a fault in jacops."
            )
        keys = rows * width + column_of[inner]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.r_[True, keys[1:] != keys[:-1]][: len(keys)]
        start = None if first.all() else np.flatnonzero(first)
        entries = keys[first]
        ends = np.searchsorted(entries, np.arange(m + 1) * width).astype(np.int32)
        pushes = found.pushed.any()
        pulled = found.sweep * wide + found.at
        pushed = np.where(found.pushed, found.sweep * m + found.at, -1)[order] if pushes else None
        pulled = (np.where(found.pushed, -1, pulled) if pushes else pulled)[order]
        return cls((m, width), ends, (entries % width).astype(np.int32), pulled, pushed, start)

    def values(self, pulled: Tensor | None, pushed: Tensor | None, like: Tensor) -> Tensor:
        """Return the entries in CSR order from what the sweeps gave; `like` has their dtype where there are none."""
        parts = []
        for swept, places in ((pulled, self.pulled), (pushed, self.pushed)):
            if swept is None or places is None or not swept.numel():
                continue
            index = torch.from_numpy(places).to(swept.device)
            part = swept.reshape(-1)[index if places.min(initial=0) >= 0 else index.clamp(min=0)]
            parts.append(part if places.min(initial=0) >= 0 else part.masked_fill(index < 0, 0))
        if not parts:
            return like.new_zeros(0)
        terms = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if self.start is None:
            return terms
        # Copies of one entry add up: the forward read it more than once.
        entry = torch.from_numpy(np.repeat(np.arange(len(self.start)), np.diff(np.r_[self.start, len(terms)])))
        return terms.new_zeros(len(self.start)).index_add_(0, entry.to(terms.device), terms)

    def matrix(self, values: Tensor) -> Csr:
        """Return the matrix with these entries; NumPy has no bfloat16, which comes as float32."""
        values = values.float() if values.dtype is torch.bfloat16 else values
        return csr((values.cpu().numpy(), self.columns, self.ends), shape=self.shape)


def seeds(colors: Array, like: Tensor) -> Tensor:
    """Return one row per colour, one where a row or column has it."""
    many = int(colors.max(initial=-1)) + 1
    rows = torch.zeros(many, len(colors), dtype=like.dtype, device=like.device)
    held = np.flatnonzero(colors >= 0)
    rows[torch.from_numpy(colors[held]), torch.from_numpy(held)] = 1
    return rows


@dataclass(frozen=True, eq=False)
class Compressed:
    """A Jacobian from few sweeps.

    Attributes:
        values: Its entries in CSR order.
        matrix: Itself, in scipy.
        verdict: The result of random probes; None without probes.
        bound: With probability 99.9 % at most so much is missing or wrong, in the Frobenius norm; NaN without probes.
        sweeps: Pulls and pushes, probes included.
    """

    values: Tensor
    matrix: Csr
    verdict: Verdict | None
    bound: float
    sweeps: int


def compress(
    sweeper: Sweeper,
    assembly: Assembly,
    coloring: Coloring,
    column_of: Array,
    certify: int,
    prober: Prober,
) -> Compressed:
    r"""Return the matrix, certified by random probes in the same batch of sweeps.

    For normal `u` the expected square of $\|(J - \hat J)^\top u\|$ is $\|J - \hat J\|_F^2$, and an error of rank one
    is the worst case, so with k probes $\|J - \hat J\|_F \le \sqrt{k / q_k}\, \mathrm{rms}$ with probability 99.9 %,
    $q_k$ being the 0.1 % quantile of $\chi^2_k$. Divisors are at most 1 and so only make the bound larger.

    Args:
        sweeper: The products.
        assembly: How they become the matrix.
        coloring: Which of them to take.
        column_of: Which column of the matrix each column of the sweeper copies.
        certify: Number of probes; a single one is divided by the sizes of the rows, as far as they are known.
        prober: What the probes are judged by.
    """
    m, n = sweeper.shape
    many = coloring.pulls + coloring.pushes + certify
    ensure_fits(
        "sparse", {f"{many} sweeps": many * (m + n) * sweeper.columns.element_size()}, None, sweeper.rows.device, _TODO
    )
    divisors = prober.divisors if certify == 1 else None
    apart = certify == 1  # with several, numbers near zero do not meet in one row, and the bound is that of normal ones
    probes = [draw(sweeper.rows, m, _SEED + i, divisors, apart) for i in range(certify)]
    start = seeds(coloring.rows, sweeper.rows)
    start = torch.cat([start, torch.stack(probes)]) if probes else start
    pulled = sweeper.swept(start, push=False) if len(start) else None
    forward = seeds(coloring.columns, sweeper.columns)
    pushed = sweeper.swept(forward, push=True) if len(forward) else None
    values = assembly.values(pulled[: coloring.pulls] if pulled is not None else None, pushed, sweeper.columns)
    matrix = assembly.matrix(values)
    sweeps = len(start) + len(forward)
    if pulled is None or not probes:
        return Compressed(values, matrix, None, math.nan, sweeps)
    verdict = judged(matrix, probes, pulled[coloring.pulls :], column_of, prober.tolerance)
    return Compressed(values, matrix, verdict, verdict.rms * probe_factor(certify), sweeps)


def probed_by_rows(
    sweeper: Sweeper,
    found: Compressed,
    column_of: Array,
    prober: Prober,
    used: Floats | None = None,
    importance: Floats | None = None,
) -> Compressed:
    """Return the same with one more probe, where rows differ so much from `used` that the first were blind to some.

    Its verdict has the larger excess of the probes so far and of that one.
    """
    if found.verdict is None or not prober.outdated(found.matrix, used, importance):
        return found
    more = probed(sweeper, found.matrix, column_of, prober.divisors, prober.tolerance)
    worse = more if more.excess > found.verdict.excess else found.verdict
    verdict = replace(found.verdict, excess=worse.excess, column=worse.column)
    return replace(found, verdict=verdict, sweeps=found.sweeps + 1)


def probed(
    sweeper: Sweeper, matrix: Csr, column_of: Array, divisors: Floats | None = None, limit: float = 0.0
) -> Verdict:
    """Return the verdict of one more probe."""
    probe = draw(sweeper.rows, sweeper.shape[0], _SEED, divisors, apart=True)
    return judged(matrix, [probe], sweeper.swept(probe[None], push=False), column_of, limit)


def is_rounding(sweeper: Sweeper, error: float) -> bool:
    """Say whether rounding alone explains that products are off by `error`, relative to their size.

    A product of 0.7 u is 0.7 times that of u but for rounding, whose size it shows. A product of 2 u is twice that of u
    without any rounding, unless it is random or not linear.
    """
    probe = draw(sweeper.rows, sweeper.shape[0], _SEED, apart=True)
    once, twice, less = (sweeper.swept(p[None], push=False).double() for p in (probe, 2 * probe, _LESS * probe))
    size = float(torch.linalg.vector_norm(once))
    rounded = float(torch.linalg.vector_norm(less / _LESS - once))
    changed = float(torch.linalg.vector_norm(twice / 2 - once))
    return error * size <= _SAMPLED * rounded and changed <= error * size / _SAMPLED


def probe_factor(probes: int) -> float:
    """Return $c_k$: 798, 31.6, 11.1, 4.9, 2.6 for k = 1, 2, 3, 5, 10."""
    from scipy.special import gammaincinv  # when called: it takes long to load

    return math.sqrt(probes / (2 * float(gammaincinv(probes / 2, _CONFIDENCE))))
