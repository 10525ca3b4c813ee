"""What calls by samples are given: tensors with a row per sample, apart from what has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ._requirements import check_dense
from ._torch.protocol import AxisExplained, ModelRun, SampleTarget, Shared, rows_apart
from ._trees import Tree
from .errors import InputError


@dataclass(frozen=True)
class SampleInputs:
    """What a call by samples is given.

    Attributes:
        x: The model's input.
        y: What the loss is given, None where there is no loss.
        shared: Which parts of `x` have no axis of samples.
        target: One output per sample.
    """

    x: Any
    y: Any = None
    shared: Shared = None
    target: Any = None

    @cached_property
    def apart(self) -> tuple[list[Tensor], Tree, int]:
        """Tensors with a row per sample, the structure of `(x, y)` over them, and how many of them are of `x`.

        Raises:
            InputError: Their leading axes differ.
        """
        values, tree = rows_apart((self.x, self.y), "x, y", self.shared, self.x)
        lengths = {v.shape[0] if isinstance(v, Tensor) and v.ndim else -1 for v in values}
        if len(lengths) != 1 or -1 in lengths:
            of = "x" if self.y is None else "x, y"
            todo = "Name those that have no axis of samples with `shared=`."
            raise InputError.of(of, f"of lengths {sorted(lengths)}", "all need one row per sample", todo)
        for name, value in zip(tree.names, values, strict=True):
            check_dense(name, value)
        return values, tree, len(rows_apart(self.x, "x", self.shared)[0])

    @property
    def picks(self) -> SampleTarget | None:
        """Which output of each sample."""
        values, _, _ = self.apart
        return SampleTarget.of(self.target, values[0].shape[0], values[0].device)

    def explained(self, model: Any, call: str, options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return a context in which a model that fails on samples, but not on all as one, is said to miss an axis."""
        values, tree, inputs = self.apart

        def run(some: Sequence[Tensor]) -> None:
            ModelRun(model, tree.build([*some, *values[inputs:]])[0], call=call, **options).recorded()

        return AxisExplained(values[:inputs], run)
