"""Where Jacobians of samples are written: tensors allocated once, or the caller's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._finite import check_outputs, require_finite
from ..._runtime.memory import Budget, check_places, ensure_fits
from ..._trees import Tree, flatten
from ...errors import ModelStateError
from ..bias.completeness import Errors
from ..bias.homogeneous import FollowedRun
from ..sweeps.proofs import Proofs
from .runs import Run

Shapes = list[tuple[int, ...]]

SLOPES = "slopes"  # under which it is known how far they are from Jacobians
ALONE = "one sample at a time"  # how a route begins where samples could not share sweeps
SAMPLES_TODO = (
    "Pass fewer samples at a time, pick outputs with `outputs=`, write into a memmap with `out=`, use products "
    "(`jvp`, `vjp`), or raise `budget=`."
)


_BARE = flatten(0, "at")[1]  # of one tensor, such as a layer's output


@dataclass
class SampleJacobians:
    """Jacobians of samples, allocated once and filled in place.

    Attributes:
        call: The public call.
        count: Samples altogether.
        budget: What may be allocated.
        places: The caller's own tensors for the blocks, if given.
        blocks: `J[output][input]`, each `(n, *out, *in)`.
        output: The outputs themselves, one tensor per leaf, `(n, *out)`.
        sure: All blocks so far are known to be finite, by the sizes of what they were multiplied from.
        proved: Those of the last batch are, without having been read.
        input_tree: The structure of the input; None at inputs without derivatives.
        inputs: Which entries of the input tree the columns stand for.
        route: How it was computed and why; of the last batch, until all are done.
        followed: Most samples to a run beside, where the call has such runs.
        coarse: The coarsest dtype that the forward computed in, where it was watched.
        batches: How many samples each batch had, the proofs of its graph, and what was carried along with it.
        graphs: Where graphs are kept, the blocks of some samples with theirs, by the first of these.
    """

    call: str
    count: int
    budget: Budget = None
    places: list[Tensor] | None = None
    blocks: list[list[Tensor]] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)
    sure: bool = True
    proved: bool = False
    input_tree: Tree = _BARE
    inputs: Sequence[int] = (0,)
    route: str = "reverse"
    followed: int = 1
    coarse: torch.dtype | None = None
    batches: list[tuple[int, Proofs, FollowedRun | None]] = field(default_factory=list)
    graphs: dict[int, list[list[Tensor]]] = field(default_factory=dict)
    _tree: Tree | None = None
    _shapes: Shapes = field(default_factory=list)

    @property
    def alone(self) -> bool:
        """Every sample was run in a batch of one."""
        return self.route.startswith(ALONE)

    @property
    def output_tree(self) -> Tree:
        """The structure of the output.

        Raises:
            ModelStateError: No sample ran.
        """
        if self._tree is None:
            raise ModelStateError.of("model", "not evaluated", "at least one sample must run")
        return self._tree

    def slope_error(self) -> float | None:
        """Return how far slopes were from Jacobians where they were compared; None where they are to be compared."""
        graphs = {id(proofs): proofs for _, proofs, _ in self.batches}.values()
        if sum(rows for rows, *_ in self.batches) != self.count or any(proofs.needs(SLOPES) for proofs in graphs):
            return None
        errors = [proofs.known.get(SLOPES) for proofs in graphs if not proofs.spot_due(SLOPES)]
        known = [error for error in errors if error is not None]
        return max(known) if known and len(known) == len(graphs) else None

    def keep_slopes(self, checks: Sequence[Errors]) -> float:
        """Return how far slopes are from Jacobians, and remember it where rounding explains that."""
        error = max(check.largest for check in checks)
        for _, proofs, _ in self.batches if all(check.holds for check in checks) else ():
            proofs.remember(SLOPES)
            proofs.known[SLOPES] = error
        return error

    @property
    def runs(self) -> list[FollowedRun]:
        """What was carried along with all samples; nothing where some were not followed."""
        found = [run for _, _, run in self.batches if run is not None]
        return found if sum(len(run.points[0]) for run in found) == self.count else []

    def arranged(self, blocks: Sequence[Sequence[Any]] | None = None) -> Any:
        """Return the Jacobians in the structures of output and input, None at inputs that are not differentiated by.

        Args:
            blocks: Take these in place of the Jacobians, `[output][input]`.
        """
        places = range(len(self.input_tree.names))
        rows = (dict(zip(self.inputs, row, strict=True)) for row in (self.blocks if blocks is None else blocks))
        return self.output_tree.build([self.input_tree.build([row.get(i) for i in places]) for row in rows])

    def check_finite(self, todo: str) -> None:
        """Refuse outputs and Jacobians with NaN or Inf.

        Raises:
            NonFiniteError: There is one; the message names the output, and states what to do.
        """
        names = self.output_tree.names
        check_outputs(self.call, self.output, names, todo)
        for name, row in zip(names, [] if self.sure else self.blocks, strict=False):
            for block in row:
                what = f"{self.call}: in the Jacobian of {name} by x"
                require_finite(block.detach(), what, f"; the output itself is finite.{todo}")

    def keep(self, where: slice, parts: list[list[Tensor]]) -> None:
        """Take the blocks of some samples with their graph."""
        shaped: list[list[Tensor]] = []
        for row, targets in zip(parts, self.blocks, strict=True):
            shaped.append([])
            for part, target in zip(row, targets, strict=True):
                shaped[-1].append(part.reshape(target[where].shape))
                target[where] = shaped[-1][-1].detach()
        self.graphs[where.start] = shaped

    def connect(self) -> None:
        """Put the blocks with their graph in place of those without."""
        parts = [self.graphs.pop(start) for start in sorted(self.graphs)]
        if len(parts) == 1:
            self.blocks = parts[0]
            return
        pairs = zip(*parts, strict=True)
        self.blocks = [[torch.cat(column) for column in zip(*rows, strict=True)] for rows in pairs]

    def prepare(self, run: Run, alone: bool = False) -> Shapes:
        """Allocate at the first sight of the shapes, and return those of one sample's outputs.

        Args:
            run: A run over some samples.
            alone: It is a run of one sample, whose output may have lost its batch axis.

        Raises:
            ModelStateError: Shapes change from sample to sample.
            MemoryBudgetError: The result is beyond the budget.
        """
        outputs = run.lin.outputs
        shapes = [tuple(o.shape if alone and not (o.ndim and o.shape[0] == 1) else o.shape[1:]) for o in outputs]
        if self._tree is not None:
            if self._shapes != shapes:
                came = f"returning {shapes} after {self._shapes}"
                raise ModelStateError.of("model", came, "all samples must have outputs of one shape")
            return shapes
        self._shapes, self._tree, self.coarse = shapes, run.tree, run.effects.coarse
        leaves = (run.head or run.lin).leaves
        whole = [(self.count, *shape, *leaf.shape[1:]) for shape in shapes for leaf in leaves]
        like = [output for output in outputs for _ in leaves]
        if self.places is None:
            self._check_budget(run, whole, like)
            self.places = [torch.empty(s, dtype=o.dtype, device=o.device) for s, o in zip(whole, like, strict=True)]
        else:
            check_places(self.places, whole, like)
        self.blocks = [self.places[i : i + len(leaves)] for i in range(0, len(whole), max(1, len(leaves)))]
        self.blocks = self.blocks or [[] for _ in outputs]
        pairs = zip(shapes, outputs, strict=True)
        self.output = [torch.empty(self.count, *s, dtype=o.dtype, device=o.device) for s, o in pairs]
        return shapes

    def _check_budget(self, run: Run, whole: Sequence[tuple[int, ...]], like: Sequence[Tensor]) -> None:
        sizes = [math.prod(shape) * o.dtype.itemsize for shape, o in zip(whole, like, strict=True)]
        largest = f"the Jacobian {whole[sizes.index(max(sizes))]}" if whole else ""
        if whole:
            ensure_fits(self.call, {largest: sum(sizes)}, self.budget, like[0].device, SAMPLES_TODO)
