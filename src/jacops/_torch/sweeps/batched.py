"""Many cotangents at once through a recorded graph: in one batched pass where arrays are small, else one by one.

A pass over small arrays costs its operations, whatever they hold; over large ones it costs their numbers, and batches
gain nothing (measured: 2.3 times faster at 16,000 numbers a layer, equal at 200,000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError, attempt
from ..._runtime.agreement import worst_disagreement
from ..._runtime.contexts import sweeping
from ..._runtime.restoring import restoring
from .linearization import Linearization

_MOST = 32  # cotangents to a pass: 32 to 64 were equally fast, and fewer hold less memory
_NUMBERS = 2**19  # 2 MiB of float32 found at each place, which stays in a near cache


def at_once(numbers: int) -> int:
    """Return how many cotangents should share a pass that finds so many numbers for each."""
    return max(1, min(_MOST, _NUMBERS // max(1, numbers)))


def passed(
    lin: Linearization, outputs: Sequence[Tensor], edges: Sequence[Any], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return `(m, …)` at every edge for cotangents `(m, …)` of every output; None where nothing arrives.

    The first batched pass is held against a plain one, at one of its rows.
    """
    many, route = cotangents[0].shape[0], f"batched, to {len(edges)} places"
    if many > 1 and not lin.trust.refused("layers", route):
        try:
            found = attempt(lambda: _pass(lin, outputs, edges, cotangents, batched=True))
            error = _disagreement(lin, outputs, edges, cotangents, found) if lin.trust.needs(route) else 0.0
            if error <= lin.tolerance:
                lin.trust.remember(route)
                return found
            reason = f"it disagrees with a plain pass by {error:.1e}"
        except RouteFailedError as failed:
            error, reason = math.inf, str(failed)
        if not math.isnan(error):  # values that are not finite say nothing about the route
            lin.trust.refuse("layers", route, reason)
    alone = [_pass(lin, outputs, edges, [c[i] for c in cotangents]) for i in range(many)]
    return [_rows([grads[e] for grads in alone]) for e in range(len(edges))]


@restoring
def _pass(
    lin: Linearization,
    outputs: Sequence[Tensor],
    edges: Sequence[Any],
    cotangents: Sequence[Tensor],
    batched: bool = False,
) -> list[Tensor | None]:
    lin.sweeps += 1
    with sweeping(outputs[0]):
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": batched}
        return list(torch.autograd.grad(outputs, edges, cotangents, **options))  # type: ignore[arg-type]


def _disagreement(
    lin: Linearization,
    outputs: Sequence[Tensor],
    edges: Sequence[Any],
    cotangents: Sequence[Tensor],
    found: Sequence[Tensor | None],
) -> float:
    plain = _pass(lin, outputs, edges, [c[-1] for c in cotangents])
    pairs = [
        (_or_zero(None if rows is None else rows[-1], other), _or_zero(other, rows))
        for rows, other in zip(found, plain, strict=True)
        if rows is not None or other is not None
    ]
    return worst_disagreement(pairs)


def _or_zero(tensor: Tensor | None, other: Tensor | None) -> Tensor:
    if tensor is not None:
        return tensor
    return torch.zeros(()) if other is None else torch.zeros_like(other)


def _rows(grads: Sequence[Tensor | None]) -> Tensor | None:
    """Return gradients of several passes as one tensor; those of one pass are not copied."""
    like = next((g for g in grads if g is not None), None)
    if like is None:
        return None
    full = [torch.zeros_like(like) if g is None else g for g in grads]
    return full[0].unsqueeze(0) if len(full) == 1 else torch.stack(full)
