"""The rows of every sample alone, with their graph: many samples to a sweep where that is right, else one at a time.

Cotangents at the places where parameters enter are differentiable like any gradient, and what multiplies the
parameters there is a part of the recorded graph. So rows put together from both have derivatives, which are held
against those of a plain sweep and of a sample alone, as the rows themselves are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._runtime.contexts import private_noise, sweeping
from ..._runtime.restoring import restoring
from ..layers.connected_rows import ConnectedRows
from ..layers.part import matrix_shape
from ..sweeps.linearization import Linearization
from .by_sample import Pairs, SampleFactors
from .whole_matrix import jacobian_blocks


class ConnectedFactors(SampleFactors):
    """All rows with their graph; recordings of the definition stay connected to the caller's parameters.

    Raises:
        ModelStateError: Samples have outputs of different shapes.
        NotDifferentiableError: A backward cannot be differentiated.
    """

    connected = True

    def _collected(self) -> ConnectedRows:
        found = self._filled(ConnectedRows())
        self.route += ", with their graph"
        return found

    def forced(self, where: slice) -> str | None:
        """Return why samples are taken alone before anything is tried; a parameter without a rule is a reason."""
        reason, missing = super().forced(where), self.layers.missing
        if reason is not None or not missing:
            return reason
        return f"{', '.join(self.lin.domain.names[leaf] for leaf in missing)} enter by operations without a rule"

    def _alone(self, collected: ConnectedRows, i: int) -> None:
        (blocks,) = jacobian_blocks(self._taken_alone(i), create_graph=True)
        rows = [block.reshape(1, len(block), *matrix_shape(block.shape[1:])) for block in blocks]
        collected.fill_formed(i, rows)

    def _pairs(
        self, collected: Any, where: slice, lin: Linearization, seeds: Sequence[Tensor], mix: Tensor
    ) -> list[Pairs]:
        """Return also derivatives of both sides of all pairs, at random, by what the caller may ask for."""
        (pairs,) = super()._pairs(collected, where, lin, seeds, mix)
        wrt = [t for t in (*lin.protected, *self.what.values) if t.requires_grad]
        noise = [private_noise(ours, seed) for seed, (ours, _) in enumerate(pairs)]
        ours, plain = (_slopes(side, noise, wrt) for side in zip(*pairs, strict=True))
        return [pairs, list(zip(ours, plain, strict=True))]


@restoring
def _slopes(parts: Sequence[Tensor], noise: Sequence[Tensor], wrt: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the derivatives of the inner product of two lists of tensors, zeros where the first has no graph."""
    with sweeping(parts[0]):
        total = torch.stack([(part * weight).sum() for part, weight in zip(parts, noise, strict=True)]).sum()
        if not wrt or not total.requires_grad:
            return [torch.zeros_like(t) for t in wrt]
        return torch.autograd.grad(total, wrt, retain_graph=True, materialize_grads=True)
