"""Backward passes through reentrant activation checkpoints, which answer `.backward()` only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError
from ..._runtime.restoring import GradientsKept, restoring
from ..._runtime.rows import Rows
from ...errors import NotDifferentiableError

if TYPE_CHECKING:
    from .linearization import Linearization


@restoring
def backward(
    lin: Linearization, outputs: Rows, seeds: Rows, targets: Rows, create_graph: bool, batched: bool
) -> list[Tensor | None]:
    """Return gradients that `.backward()` writes into leaves that only the linearization holds.

    Raises:
        NotDifferentiableError: The leaves are the caller's, or a second derivative is requested.
        RouteFailedError: Several cotangents are to share the pass.
    """
    if not lin.private:
        raise NotDifferentiableError(
            f"{lin.call}: the graph holds a reentrant activation checkpoint, which has no derivative by tensors of the "
            "caller's. Use checkpoint(…, use_reentrant=False), or the call that takes the model instead of a closure."
        )
    if create_graph:
        raise NotDifferentiableError(
            f"{lin.call}: a reentrant activation checkpoint has no second derivative. Use checkpoint(…, "
            "use_reentrant=False)."
        )
    if batched:
        raise RouteFailedError("a reentrant activation checkpoint takes one cotangent at a time")
    with GradientsKept(lin.protected, targets):
        torch.autograd.backward(outputs, seeds, retain_graph=True)
        return [t.grad for t in targets]
