"""SparsePlan: pattern, colours and decompression, made once and used at every point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._display import Described, Description
from .._finite import check_outputs, is_finite, require_finite
from .._keywords import keywords
from .._operators import LinearizedMap
from .._picks import Picks, variable
from .._progress import shows_progress
from .._requirements import check_choice, check_whole
from .._torch.protocol import Proofs
from .._trees import Selector
from .._words import Layout, Wrt
from ..errors import DataError, InputError, NotDifferentiableError, warn
from . import storage
from ._compress import Assembly, Compressed, Compression
from ._declared import check_declared
from ._matrix import Csr, csr
from ._point import RecordedPoint, gradients_agree, record_point
from ._pool import Array
from ._probe import Floats, Prober
from ._scheme import Scheme, colored, placed, unlifted
from .detect import traced
from .layouts import SparseJacobian, arranged, block_of
from .pattern import Pattern, declared

_KEPT = 4_000_000  # entries of a pattern whose graph may be held while the plan is made: about 300 MB


@dataclass(eq=False, repr=False)
class SparsePlan(Described):
    """A plan to evaluate the sparse Jacobian of a model in few sweeps; made by `sparse_plan`, `SparsePlan.load`.

    Attributes:
        pattern: Where the Jacobian may be nonzero.
        shape: Rows (entries of the output) and columns (entries of what it is differentiated by).
        sweeps: Sweeps per evaluation, probes left out.
    """

    _scheme: Scheme
    shape: tuple[int, int]
    _final: Array
    _options: dict[str, Any]  # of `sparse_plan`: by what, outputs, tangent, local
    _unknown: dict[str, int]
    _names: tuple[str, ...]
    _dtypes: frozenset[torch.dtype] = frozenset()  # met inside the model, as far as it was traced
    _proofs: Proofs = field(default_factory=Proofs)
    _prober: Prober | None = None
    _traced: bool = False  # the pattern is that of a graph whatever the values of what is differentiated by
    _replays: bool = True  # some selections are rows of what is computed
    _certified: tuple[Any, ...] | None = None  # such a graph that a probe was taken of

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of what `assembly` is made from; a probe certifies their first evaluation anew."""
        return {name: value for name, value in vars(self).items() if name != "assembly"} | {"_certified": None}

    # ---- properties -----------------------------------------------------------------------------------------

    @cached_property
    def assembly(self) -> Assembly:
        """How sweeps become the matrix."""
        scheme = self._scheme
        return Assembly.of(scheme.matrix, scheme.coloring, self._final[scheme.columns], self.shape[1])

    @property
    def pattern(self) -> Pattern:
        """Where the Jacobian may be nonzero."""
        found = self.assembly
        ones = np.ones(len(found.columns), bool)
        return Pattern(csr((ones, found.columns, found.ends), shape=self.shape), self._options["local"], self._unknown)

    @property
    def sweeps(self) -> int:
        """Sweeps per evaluation, probes left out."""
        return self._scheme.coloring.pulls + self._scheme.coloring.pushes

    def _describe(self) -> Description:
        (m, n), coloring, pattern = self.shape, self._scheme.coloring, self.pattern
        few = f"{self.sweeps} sweep{'s' * (self.sweeps != 1)} instead of {min(m, n):,}"
        facts = [("sweeps", f"{coloring.pulls} backward, {coloring.pushes} forward")]
        facts += [("lifted", f"at {len(self._scheme.structure)} selections")] if self._scheme.structure else []
        shown = pattern._describe()
        facts += [("pattern", shown.title), *shown.facts]
        return Description(f"SparsePlan({m:,} × {n:,}): {few}", facts, picture=shown.picture)

    # ---- evaluation --------------------------------------------------------------------------------------------

    @shows_progress()
    def evaluate(
        self,
        model: nn.Module | Callable[..., Any],
        inputs: Any,
        *,
        certify: int = 1,
        layout: Layout = "scipy",
        progress: bool | None = None,
    ) -> SparseJacobian:
        """Return the sparse Jacobian and the output at the model's present parameters and these inputs.

        A random probe in which all rows have the same size checks that the pattern still holds: it shows an entry that
        is missing in a row of any scale down to 1e-12 of the largest row (1e-5 in float32), unless the entry is at
        rounding level (1e-9, in float32 1e-4) of its row or column. Where the pattern does not hold it is detected
        again, with a `JacopsWarning`, and the plan keeps the new entries. One more probe is taken when the sizes of
        rows have changed by orders of magnitude since the last one.

        Args:
            model: The model, of the same structure as the plan was made with.
            inputs: Its input.
            certify: Number of random probes: 1 to notice a pattern that no longer holds, 5 for an error bound within
                a factor 5 of the error measured, 0 for none.
            layout: `"scipy"` (CSR), or torch's `"coo"`, `"csr"`, `"bsr"`.
            progress: Force the progress bar on or off.

        Returns:
            The matrix, the output, the error bound and the number of sweeps.

        Raises:
            InputError: Shapes do not fit the plan.
            NonFiniteError: The output or the Jacobian holds NaN or Inf.
            NotDifferentiableError: The derivative is random, so that it has no pattern.
        """
        return self._evaluated(model, inputs, certify, layout, None)

    def _evaluated(
        self,
        model: Any,
        inputs: Any,
        certify: int | None,
        layout: Layout,
        importance: Floats | None,
        point: RecordedPoint | None = None,
    ) -> SparseJacobian:
        """Evaluate as above; `importance` is what the caller multiplies the rows with, `point` what it has recorded.

        With `certify=None` a probe is taken unless one has certified this very graph, whose operations are all known.
        """
        check_choice("layout", layout, Layout)
        point = point or self.recorded(model, inputs, "SparsePlan")
        certify = int(self._certified != point.lin.graph_info.key) if certify is None else certify
        check_whole("certify", certify, 0)
        found = self.at(point, certify, layout, importance)
        if found is None:
            if not self._fits(point):
                shape = (point.recording.lin.codomain.dim, point.widths(self._options["tangent"])[1])
                raise InputError.of("model", f"one with a Jacobian of {shape}", f"the plan is for {self.shape}")
            warn("SparsePlan: the model selects other parts of its parameters than before; the plan was made again.")
            vars(self).update(vars(detected(model, inputs, self._options)[0]))
            return self._evaluated(model, inputs, certify, layout, importance)
        return found

    def recorded(self, model: Any, inputs: Any, call: str) -> RecordedPoint:
        """Return a point to evaluate at."""
        lift, asked = bool(self._scheme.structure), (self._options["by"], self._options["outputs"])
        return record_point(model, inputs, call, *asked, lift=lift, replay=self._replays)

    def _fits(self, point: RecordedPoint) -> bool:
        final, width = point.widths(self._options["tangent"])
        same = self.shape == (point.recording.lin.codomain.dim, width)
        return same and np.array_equal(final, self._final)

    def at(
        self,
        point: RecordedPoint,
        certify: int = 1,
        layout: Layout = "csr",
        importance: Floats | None = None,
        *,
        redetect: bool = True,
    ) -> SparseJacobian | None:
        """Evaluate at a recorded point; a pattern that does not hold there is detected again with `redetect`.

        None is returned where the shape is another one, other selections are lifted, or the pattern does not hold and
        `redetect` is False.
        """
        if not self._fits(point) or point.structure() != self._scheme.structure:
            return None
        point.lin.proofs = self._proofs
        columns = point.storage_columns()
        if not np.array_equal(columns, self._scheme.columns):
            # Other indices into the same parameters: the same sweeps, read off into other columns.
            self._use(replace(self._scheme, columns=columns))
        found = self._compressed(point, certify, importance)
        check_outputs("SparsePlan", point.lin.outputs, point.lin.codomain.names)
        holds = found.verdict is None or found.verdict.excess <= self._compression(point).prober.tolerance
        if found.verdict is not None:
            self._certified = point.lin.graph_info.key if holds and self._traced and not self._unknown else None
        if not holds and is_finite(found.values):
            if not redetect:
                return None
            found = self._again(point, found, certify, importance)
        require_finite(found.values, "SparsePlan: of the Jacobian's entries")
        block = block_of(point.recording.lin.codomain), point.block(self._options["tangent"])
        matrix = arranged(self.assembly, found, layout, block)
        return SparseJacobian(matrix, point.output, found.bound, found.sweeps)

    def _compression(self, point: RecordedPoint) -> Compression:
        operator = LinearizedMap(point.lin)
        if self._prober is None or not self._prober.fits(operator, self._dtypes):
            self._prober = Prober.of(operator, self._dtypes)
        return Compression(operator, self.assembly, self._prober)

    def _compressed(self, point: RecordedPoint, certify: int, importance: Floats | None = None) -> Compressed:
        """Return the Jacobian, probed once more where row sizes were out of date."""
        compression = self._compression(point)
        used = compression.prober.divisors if certify == 1 else None
        return compression.probed_by_rows(compression.evaluate(certify), used, importance)

    def _again(self, point: RecordedPoint, found: Compressed, certify: int, importance: Floats | None) -> Compressed:
        """Detect at this point; add new entries to the pattern, or measure the rounding errors where there are none.

        Raises:
            NotDifferentiableError: The pattern is right and a probe fails all the same.
        """
        seen, dtypes, _ = traced(point.lin, None)
        self._dtypes |= dtypes
        both = csr((self._scheme.matrix + seen.matrix).astype(bool))
        grown = both.nnz > self._scheme.matrix.nnz
        if grown:
            warn("SparsePlan: the pattern no longer holds at this point; it was detected again and is kept.")
            self._unknown = {**self._unknown, **seen.unknown}
            self._use(replace(self._scheme, matrix=both, coloring=colored(both, point.lin)))
            found = self._compressed(point, certify, importance)
        compression = self._compression(point)
        plain_probe = compression.probed(found.matrix)
        if plain_probe.error > compression.prober.whole and not compression.is_rounding(plain_probe.error):
            raise NotDifferentiableError(
                f"SparsePlan: two backward passes over the same graph disagree by {plain_probe.error:.1e}, so no "
                "pattern holds. A backward pass is random or not linear, or the derivative is smaller than the "
                "rounding errors of this dtype; use float64 then."
            )
        if not grown:
            compression.learn(found, plain_probe, importance)
        return found

    def _use(self, scheme: Scheme) -> None:
        self._scheme = scheme
        vars(self).pop("assembly", None)

    # ---- on disk -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the plan to a file (NumPy's npz), to be read by `SparsePlan.load`."""
        storage.save(self, path)

    @staticmethod
    def load(path: str | Path, *, outputs: Selector = None) -> SparsePlan:
        """Return a plan from a file.

        Args:
            path: Where `save` wrote it.
            outputs: The selection passed to `sparse_plan`, if it is not a name, an index or a list of them.

        Raises:
            DataError: The file is no plan, of another version, or damaged.
        """
        plan = SparsePlan(*storage.load(path, outputs))
        try:
            plan.assembly  # noqa: B018 - shows whether the colouring fits the pattern
        except NotDifferentiableError:
            raise DataError(f"{path}: damaged, its colours do not separate the entries of its pattern.") from None
        return plan


@keywords()
@shows_progress("operations")
def sparse_plan(
    model: nn.Module | Callable[..., Any],
    inputs: Any,
    *,
    wrt: Wrt = "parameters",
    parameters: Picks = None,
    outputs: Selector = None,
    tangent: bool = True,
    pattern: Any = None,
    local: bool = False,
    lift: bool = True,
    progress: bool | None = None,
) -> SparsePlan:
    """Return a plan for the sparse Jacobian of a model, with few sweeps.

    The pattern is detected from one traced backward pass (`detect_pattern`), selections of parameters are lifted into
    leaves of their own where that saves sweeps, and rows, columns or both are coloured. Zeros of the inputs and of what
    is differentiated by do not count as zeros; those of buffers and frozen weights do.

    Args:
        model: A module, or with `wrt="inputs"` a function `f(x)`.
        inputs: Its input, as in `jacobian`.
        wrt: `"parameters"` or `"inputs"`.
        parameters: Which parameters, as in `jacobian`.
        outputs: Part of the output, as in `jacobian`.
        tangent: For LieTensor parameters: tangent width, without columns of zeros.
        pattern: If known: a scipy or torch sparse matrix, or a `Pattern`; verified by a random probe.
        local: The pattern at this very point, which may be emptier and must be detected again elsewhere.
        lift: Whether selections of parameters may be lifted.
        progress: Force the progress bar on or off; by default it is shown after 2 s in a terminal or notebook.

    Returns:
        A plan, for `plan.evaluate(model, inputs)`.

    Raises:
        NotDifferentiableError: No path leads from the output to what it is differentiated by.
        InputError: A declared pattern has another shape, or lacks entries.
        MemoryBudgetError: The Jacobian is not sparse.

    Example:
        >>> class Chain(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x[1:] - x[:-1] ** 2
        >>> plan = sparse_plan(Chain(), torch.randn(1000), wrt="inputs")
        >>> plan.shape, plan.sweeps
        ((999, 1000), 1)
    """
    by = variable(model, wrt, parameters)
    options: dict[str, Any] = {"by": by, "outputs": outputs, "tangent": tangent, "local": local}
    if pattern is not None:
        return _from_declared(model, inputs, pattern, options)
    return detected(model, inputs, options, lift)[0]


def detected(
    model: Any, inputs: Any, options: dict[str, Any], lift: bool = True, direct: RecordedPoint | None = None
) -> tuple[SparsePlan, RecordedPoint | None]:
    """Return a plan whose pattern is detected, and the point of detection where that is small and can be swept.

    Args:
        model: A module.
        inputs: Its input.
        options: As a plan holds them: `by`, `outputs`, `tangent`, `local`.
        lift: Whether selections of parameters may be lifted.
        direct: The same point, recorded without lifting, where there is one.
    """
    asked, watch = (model, inputs, "sparse_plan", options["by"], options["outputs"]), not options["local"]
    point = record_point(*asked, lift=lift, watch=watch)
    if point.selections and not gradients_agree(point, direct or record_point(*asked, lift=False)):
        point = record_point(*asked, lift=False, watch=watch)
    seen, dtypes, here_only = traced(point.lin, point.taint)
    matrix = seen.matrix
    final, width = point.widths(options["tangent"])
    columns = point.storage_columns()
    _check_padding(matrix, final[columns], width, point)
    scheme = Scheme(matrix, colored(matrix, point.lin), point.structure(), columns)
    if point.selections:
        scheme = unlifted(scheme, point.lin, point.recording.lin.domain.dim)
    names, shape, replays = point.recording.lin.domain.names, (matrix.shape[0], width), point.replayed
    kept = point if point.structure() == scheme.structure and matrix.nnz <= _KEPT else None
    del point  # and the graph with it
    plan = SparsePlan(scheme, shape, final, options, dict(seen.unknown), names, dtypes)
    plan._traced, plan._replays = not here_only, replays
    plan.assembly  # noqa: B018 - worked out now, so that every evaluation costs the same
    return plan, kept


def _check_padding(matrix: Csr, column_of: Array, width: int, point: RecordedPoint) -> None:
    """Refuse entries in columns that pad a LieTensor.

    Raises:
        NotDifferentiableError: There are some, so stored numbers were read as if they were free.
    """
    padded = column_of >= width
    if padded.any() and padded[matrix.indices].any():
        names = point.recording.lin.domain.layout
        raise NotDifferentiableError(
            f"sparse_plan: the model reads the stored numbers of a LieTensor among {names}, whose gradients are not "
            "tangent ones. Use Act, Log, matrix() or rotation().matrix(), or pass `tangent=False`."
        )


def _from_declared(model: Any, inputs: Any, pattern: Any, options: dict[str, Any]) -> SparsePlan:
    point = record_point(model, inputs, "sparse_plan", options["by"], options["outputs"], lift=False)
    final, width = point.widths(options["tangent"])
    shape = (point.recording.lin.codomain.dim, width)
    known = declared(pattern, shape)
    matrix = placed(known.matrix, np.flatnonzero(final < width), len(final))
    scheme = Scheme(matrix, colored(matrix, point.lin), [], np.arange(len(final)))
    names = point.recording.lin.domain.names
    plan = SparsePlan(scheme, shape, final, options, dict(known.unknown), names)
    found = plan._compressed(point, 1)
    check_declared(plan._compression(point), found, "Leave it out to have it detected.")
    return plan
