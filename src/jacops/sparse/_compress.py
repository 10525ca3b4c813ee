"""Compressed evaluation: a few sweeps over sums of rows or columns, and every entry read off them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._operators import Operator
from .._progress import track
from .._runtime.chunks import ROWS
from .._runtime.memory import ensure_fits
from .._space import Space
from ..errors import NotDifferentiableError
from ._coloring import Coloring, reading
from ._matrix import Csr, csr
from ._pool import Array
from ._probe import Floats, Prober, Verdict, draw, judged

_CHUNK_ENTRIES = 2**24  # 128 MiB of seeds and products in float64
_CONFIDENCE = 1e-3  # probability that an error bound fails: the 99.9 % of `SparseJacobian.error_bound`
_SEED = 7000  # fixed, so that routes are reproducible, and apart from the seeds of other noise
_LESS = 0.7  # no power of two, which would not round at all
_ROOM = 4.0  # margin on the rounding errors measured at one point: those of the next may be larger
_SAMPLED = 100.0  # one sample of the rounding errors may be this much smaller than another
_TODO = "Use products (`jacobian(...) @ v`) where the pattern is not sparse, or fewer outputs at a time."


@dataclass(frozen=True, eq=False)
class Assembly:
    """How sweeps become a matrix in CSR order.

    Attributes:
        shape: Of the matrix.
        coloring: Which sweeps are taken.
        column_of: Which column of the matrix each column that is swept copies.
        ends: CSR row pointers.
        columns: CSR column indices, sorted within rows.
        places: For each term its place in the flat pulls `(pulls, columns swept)` and, after them, pushes.
        entry: For each term the entry it adds to; None where every entry has one term.
        kept: What others work out from the pattern.
    """

    shape: tuple[int, int]
    coloring: Coloring
    column_of: Array
    ends: NDArray[np.int32]
    columns: NDArray[np.int32]
    places: Array
    entry: Array | None
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, matrix: Csr, coloring: Coloring, column_of: Array, width: int) -> Assembly:
        """Return the assembly of a pattern whose columns are copies of the columns of a narrower matrix.

        Args:
            matrix: Pattern over the columns that are swept.
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
                "sparse: a colouring does not separate all entries; this is a fault in jacops."
            )
        pushed, sweep, at = found
        places = np.where(pushed, coloring.pulls * wide + sweep * m, sweep * wide) + at
        final = column_of[inner]
        keys = rows * width + final
        if bool((keys[1:] > keys[:-1]).all()):  # in order, and no two copies of one column in a row
            ends, columns = matrix.indptr.astype(np.int32), final.astype(np.int32)
            return cls((m, width), coloring, column_of, ends, columns, places, None)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.r_[True, keys[1:] != keys[:-1]]
        entry = None if first.all() else np.cumsum(first) - 1
        taken = order[first]
        ends = np.r_[0, np.cumsum(np.bincount(rows[taken], minlength=m))].astype(np.int32)
        columns = final[taken].astype(np.int32)
        return cls((m, width), coloring, column_of, ends, columns, places[order], entry)

    def values(self, *swept: Tensor) -> Tensor:
        """Return the entries in CSR order from the pulls and the pushes."""
        flat = [part.reshape(-1) for part in swept if len(part)] or [swept[0].new_zeros(0)]
        every = flat[0] if len(flat) == 1 else torch.cat(flat)
        terms = every[torch.from_numpy(self.places).to(every.device)]
        if self.entry is None:
            return terms
        # Copies of one entry add up: the forward read it more than once.
        entry = torch.from_numpy(self.entry).to(terms.device)
        return terms.new_zeros(len(self.columns)).index_add_(0, entry, terms)

    def matrix(self, values: Tensor) -> Csr:
        """Return the matrix with these entries; NumPy has no bfloat16, which comes as float32."""
        values = values.float() if values.dtype is torch.bfloat16 else values
        return csr((values.cpu().numpy(), self.columns, self.ends), shape=self.shape)


def _seeds(colors: Array, space: Space) -> Tensor:
    """Return one row per colour, one where a row or column has it."""
    held = np.flatnonzero(colors >= 0)
    rows = torch.zeros(int(colors.max(initial=-1)) + 1, space.dim, dtype=space.dtype, device=space.device)
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


@dataclass(frozen=True, eq=False)
class Compression:
    """An operator as a sparse matrix: the products that give it, and the random probes that it is judged by.

    Attributes:
        operator: What the products are of; its columns may be copies of those of the matrix.
        assembly: How they become the matrix.
        prober: The state of the probes.
    """

    operator: Operator
    assembly: Assembly
    prober: Prober

    def evaluate(self, certify: int) -> Compressed:
        r"""Return the matrix, certified by random probes in the same batch of sweeps.

        For normal `u` the expected square of $\|(J - \hat J)^\top u\|$ is $\|J - \hat J\|_F^2$, and an error of rank
        one is the worst case, so with k probes $\|J - \hat J\|_F \le \sqrt{k / q_k}\, \mathrm{rms}$ with probability
        99.9 %, $q_k$ being the 0.1 % quantile of $\chi^2_k$. Divisors are at most 1 and so only make the bound larger.

        Args:
            certify: Number of probes; a single one is divided by the sizes of the rows, as far as they are known.
        """
        coloring, rows, columns = self.assembly.coloring, self.operator.codomain, self.operator.domain
        many = coloring.pulls + coloring.pushes + certify
        needed = {f"{many} sweeps": many * (rows.dim + columns.dim) * columns.dtype.itemsize}
        ensure_fits("sparse", needed, None, rows.device, _TODO)
        divisors = self.prober.divisors if certify == 1 else None
        # With several, small random numbers do not coincide in one row, and the bound is that of normal ones.
        probes = [draw(rows, _SEED + i, divisors, apart=certify == 1) for i in range(certify)]
        pulled = self.pulled(torch.cat([_seeds(coloring.rows, rows), *(p[None] for p in probes)]))
        pushed = self._swept(_seeds(coloring.columns, columns), self.operator._apply, rows)
        values = self.assembly.values(pulled[: coloring.pulls], pushed)
        matrix = self.assembly.matrix(values)
        if not probes:
            return Compressed(values, matrix, None, math.nan, many)
        verdict = self._judged(matrix, probes, pulled[coloring.pulls :])
        return Compressed(values, matrix, verdict, verdict.rms * probe_factor(certify), many)

    def pulled(self, seeds: Tensor) -> Tensor:
        """Return the products of the transpose with these rows, a chunk at a time."""
        return self._swept(seeds, self.operator._apply_transpose, self.operator.domain)

    def _swept(self, seeds: Tensor, product: Callable[[Tensor], Tensor], into: Space) -> Tensor:
        chunk = max(1, min(ROWS, _CHUNK_ENTRIES // max(1, sum(self.operator.shape))))
        parts = [product(part) for part in track(seeds.split(chunk), "sweeps") if len(part)]
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else into.units(slice(0, 0))

    def _judged(self, matrix: Csr, probes: list[Tensor], pulled: Tensor) -> Verdict:
        return judged(matrix, probes, pulled, self.assembly.column_of, self.prober.tolerance)

    def probed_by_rows(
        self, found: Compressed, used: Floats | None = None, importance: Floats | None = None
    ) -> Compressed:
        """Return the same with one more probe, where rows differ so much from `used` that others were blind to some.

        Its verdict has the larger excess of the probes so far and of that one.
        """
        if found.verdict is None or not self.prober.outdated(found.matrix, used, importance):
            return found
        more = self.probed(found.matrix, self.prober.divisors)
        worse = more if more.excess > found.verdict.excess else found.verdict
        verdict = replace(found.verdict, excess=worse.excess, column=worse.column)
        return replace(found, verdict=verdict, sweeps=found.sweeps + 1)

    def probed(self, matrix: Csr, divisors: Floats | None = None, seed: int = _SEED) -> Verdict:
        """Return the verdict of one more probe."""
        probe = draw(self.operator.codomain, seed, divisors, apart=True)
        return self._judged(matrix, [probe], self.pulled(probe[None]))

    def learn(self, found: Compressed, plain_probe: Verdict, importance: Floats | None) -> None:
        """Raise floor and tolerance of the probes to the rounding errors of this point, whose pattern was verified."""
        prober = self.prober
        prober.outdated(found.matrix, None, importance)
        now = self.probed(found.matrix, prober.divisors)
        while now.excess > prober.tolerance and prober.raise_floor(importance):
            now = self.probed(found.matrix, prober.divisors)
        worst = max(now.excess, plain_probe.excess)
        if prober.tolerance < worst < math.inf:
            prober.slack *= _ROOM * worst / prober.tolerance

    def is_rounding(self, error: float) -> bool:
        """Return whether rounding alone explains that products are off by `error`, relative to their size.

        A product of 0.7 u is 0.7 times that of u but for rounding, whose size it shows. A product of 2 u is twice that
        of u without any rounding, unless it is random or not linear.
        """
        probe = draw(self.operator.codomain, _SEED, apart=True)[None]
        once, twice, less = (self.pulled(p).double() for p in (probe, 2 * probe, _LESS * probe))
        size = float(torch.linalg.vector_norm(once))
        rounded = float(torch.linalg.vector_norm(less / _LESS - once))
        changed = float(torch.linalg.vector_norm(twice / 2 - once))
        return error * size <= _SAMPLED * rounded and changed <= error * size / _SAMPLED


def probe_factor(probes: int) -> float:
    """Return $c_k$: 798, 31.6, 11.1, 4.9, 2.6 for k = 1, 2, 3, 5, 10."""
    from scipy.special import gammaincinv  # when called: it takes long to load

    return math.sqrt(probes / (2 * float(gammaincinv(probes / 2, _CONFIDENCE))))
