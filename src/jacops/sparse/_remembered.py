"""Sparse Jacobians of calls that keep no plan: on the one that an earlier call made for the same graph."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from .._derivatives import Wrt
from .._torch.protocol import bare, identity_key, store_for
from .._trees import Selector, flatten
from ._point import record_point
from .layouts import SparseJacobian
from .plan import OutdatedError, SparsePlan, sparse_plan


def sparse_jacobian(
    model: nn.Module, inputs: Any, wrt: Wrt, word: str, outputs: Selector, tangent: bool
) -> SparseJacobian:
    """Return the sparse Jacobian of a model, as torch's CSR.

    A plan serves the graph that it was made for. It is made again where an entry that its pattern may rest on became
    zero or ceased to be, and where a random probe shows that the pattern does not hold.

    Args:
        model: A module.
        inputs: Its input.
        wrt: As in `sparse_plan`.
        word: What tells one `wrt` from another.
        outputs: As in `sparse_plan`.
        tangent: As in `sparse_plan`.
    """
    tensors = [value for value in flatten(inputs, "input")[0] if isinstance(value, Tensor)]
    shapes = tuple((t.shape, t.dtype, t.device) for t in tensors)
    indices = tuple(identity_key(t) for t in tensors if not (t.is_floating_point() or t.is_complex()))
    claim = ("sparse plan", word, shapes, indices, identity_key(outputs), tangent)
    made = store_for(bare(model), claim, "first").known
    latest: SparsePlan | None = made.get("latest")
    if latest is not None:
        point = record_point(model, inputs, "modjac", wrt, outputs, lift=latest.is_lifted)
        trust = point.recording.lin.trust
        plan = None if trust.needs(*claim) else trust.known.get(claim)
        if plan is not None:
            with suppress(OutdatedError):
                return plan.at(point, learns=False)
        del point, plan
    plan = sparse_plan(model, inputs, wrt=wrt, outputs=outputs, tangent=tangent)
    point = record_point(model, inputs, "modjac", wrt, outputs, lift=plan.is_lifted)
    found, trust = plan.at(point), point.recording.lin.trust
    trust.known[claim] = made["latest"] = plan
    trust.remember(*claim)
    return found
