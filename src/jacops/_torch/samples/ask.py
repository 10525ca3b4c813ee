"""The question of the Jacobians of a batch's samples, written in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from ..._ladder.names import Question, RouteName
from ..._ladder.plan import Memory
from ..sweeps.linearization import Linearization
from ..sweeps.proofs import Proofs, ProofStore
from .bottleneck import GAIN, narrowest
from .results import SampleJacobians
from .runs import Run

if TYPE_CHECKING:
    from .runs import Runner

ONE_SAMPLE = "one sample"


@dataclass
class BatchAsk:
    """Samples `where` of a call, recorded as `run` where they may share sweeps.

    Attributes:
        runner: Runs the model.
        result: Where Jacobians and outputs are written.
        where: Which samples.
        values: Their inputs.
        mode: The route requested by name, or `"auto"`.
        fallback: What happens when a route is left.
        store: What is known of the model with batches like this one.
        apart: Why samples cannot share sweeps; None where they may.
        run: The recorded batch; None where `apart` holds why there is none.
        fresh: It still has to be proved that samples do not mix.
        strict: Every ordered pair of samples is checked.
        undecided: Rounding explains what the evidence found, so that it proves nothing for later calls.
    """

    runner: Runner
    result: SampleJacobians
    where: slice
    values: Sequence[Tensor]
    mode: str
    fallback: str
    store: ProofStore
    apart: str | None
    run: Run | None = None
    fresh: bool = False
    strict: bool = False
    undecided: bool = False
    routes: dict[str, str] = field(default_factory=dict, init=False)

    question, argument = Question.SAMPLES, "mode="

    def __post_init__(self) -> None:
        self.known = self.apart  # the caller has been warned
        self.call = self.runner.call
        self.shape = self.many = self.where.stop - self.where.start

    @property
    def verdicts(self) -> Proofs:
        """What is known of the recorded graph."""
        return self.run.lin.proofs if self.run is not None else self._unknown

    @cached_property
    def _unknown(self) -> Proofs:
        return Proofs("never")

    @property
    def lin(self) -> Linearization:
        """The whole batch, from inputs to outputs; recorded now if it was cut."""
        if self.run is None or self.run.head is not None:
            self.run = self.runner.run(self.values, self.store)
        return self.run.lin

    @property
    def unpushable(self) -> str | None:
        """Why pushes would go row by row; None where they do not."""
        known = self.verdicts.refusal(Question.PUSH, RouteName.DOUBLE_BACKWARD)
        return None if known is None else known.reason or "no second derivative rule"

    @property
    def asked(self) -> str | None:
        """The route that the user requested by name."""
        return None if self.mode == "auto" else self.mode

    @property
    def entries(self) -> tuple[int, int] | None:
        """Entries of a sample's outputs and of its inputs; None where nothing is recorded."""
        return None if self.run is None else self.run.entries

    @property
    def place(self) -> tuple[str, int] | None:
        """The narrowest layer that saves sweeps, and its numbers per sample; None where there is none."""
        run = self.run
        if (
            self.runner.create_graph
            or run is None
            or self.runner.at is not None
            or not len(run.lin.outputs) == len(run.lin.leaves) == 1
        ):
            return None
        if run.head is not None:
            return run.head.codomain.names[0], run.head.outputs[0].shape[1:].numel()
        rows, columns = self.entries or (0, 0)
        path = narrowest(run.widths, rows, columns, GAIN if self.mode == "auto" else 0.0)
        return None if path is None else (path, run.widths[path] or 0)

    def memory(self, route: str) -> Memory | None:
        """Nothing is measured here: the plan was."""
        return None
