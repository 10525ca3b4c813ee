"""Values computed on the way to an operator and returned with it: outputs, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from .._trees import flatten

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Computed:
    """What was computed on the way to an operator of a single batch.

    Attributes:
        output: Of the model, or of the part of it that was picked.
        losses: Of the rows, each alone.
        loss: Of the batch.
        gradient: Returns its gradient, flat, without running the model.
    """

    output: Any = None
    losses: Tensor | None = None
    loss: Tensor | None = None
    gradient: Callable[[], Tensor] | None = None


def with_computed(operator: Made, computed: Computed) -> Made:
    """Return an operator that returns what was computed."""
    object.__setattr__(operator, "computed", computed)
    return operator


def detached(output: Any) -> Any:
    """Return a model's output without its graph, in its structure."""
    leaves, tree = flatten(output, "output")
    return tree.build([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
