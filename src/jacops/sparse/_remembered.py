"""Sparse Jacobians of calls that keep no plan: on the one that an earlier call made for the same graph."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from .._ladder.names import Fact
from .._picks import Picked, variable
from .._torch.protocol import bare, identity_key, parameter_names, store_for
from .._trees import Selector, flatten
from ._point import RecordedPoint
from .layouts import SparseJacobian
from .plan import SparsePlan, detected


def sparse_jacobian(model: nn.Module, inputs: Any, picks: Picked, outputs: Selector, tangent: bool) -> SparseJacobian:
    """Return the sparse Jacobian of a model, as torch's CSR.

    A plan serves the graph that it was made for. It is made again where an entry that its pattern may depend on has
    become zero or ceased to be, and where a random probe shows that the pattern does not hold.

    Args:
        model: A module.
        inputs: Its input.
        picks: Which parameters.
        outputs: Part of the output: indices along its last axis, an entry of a tuple or dict, or a callable.
        tangent: Columns are tangent coordinates of LieTensors.
    """
    names = tuple(name for name, p in parameter_names(bare(model)).items() if picks(name, p))
    claim = (Fact.SPARSE_PLAN, names, *_kinds(inputs), identity_key(outputs), tangent)
    made = store_for(bare(model), claim, "first").known
    latest: SparsePlan | None = made.get("latest")
    if latest is not None:
        point = latest.recorded(model, inputs, "modjac")
        proofs = point.recording.lin.proofs
        plan = None if proofs.needs(*claim) else proofs.known.get(claim)
        found = None if plan is None else plan.at(point, redetect=False)
        if found is not None:
            return found
        del point
    plan, _ = detected(model, inputs, {"by": picks, "outputs": outputs, "tangent": tangent, "local": False})
    point = plan.recorded(model, inputs, "modjac")
    found, proofs = plan.at(point), point.recording.lin.proofs
    proofs.known[claim] = made["latest"] = plan
    proofs.remember(*claim)
    return found or plan.evaluate(model, inputs, layout="csr")  # it selects other parameters each time


def notes_of(model: nn.Module, inputs: Any, question: Hashable, outputs: Selector) -> dict[Any, Any]:
    """Return the stored facts on a question about a model, for inputs of one kind."""
    return store_for(bare(model), (question, *_kinds(inputs), identity_key(outputs)), "first").known


def kept_plan(model: Any, inputs: Any, setting: Hashable) -> SparsePlan | None:
    """Return the plan by parameters that an earlier fit made, None if there is none.

    Args:
        model: A module or function, by whose identity the plan is kept.
        inputs: Its input.
        setting: What distinguishes plans, besides the kinds of inputs.
    """
    return _made(model, inputs, setting).get("plan")


def new_plan(
    model: Any, module: nn.Module, inputs: Any, setting: Hashable, direct: RecordedPoint | None
) -> tuple[SparsePlan, RecordedPoint | None]:
    """Return a plan by parameters, kept for `kept_plan`, and the point where it was made, if that can be swept.

    Args:
        model: A module or function, by whose identity the plan is kept.
        module: What is recorded.
        inputs: Its input.
        setting: What distinguishes plans, besides the kinds of inputs.
        direct: The point as it was recorded without lifting, where it was.
    """
    options = {"by": variable(module, "parameters", None), "outputs": None, "tangent": True, "local": False}
    plan, point = detected(module, inputs, options, direct=direct)
    _made(model, inputs, setting)["plan"] = plan
    return plan, point


def _made(model: Any, inputs: Any, setting: Hashable) -> dict[Any, Any]:
    return store_for(model, ("plan for fits", setting, *_kinds(inputs)), "first").known


def _kinds(inputs: Any) -> tuple[Hashable, ...]:
    """Return shapes, dtypes and devices of the tensors among inputs, and those that are indices by value."""
    tensors = [value for value in flatten(inputs, "input")[0] if isinstance(value, Tensor)]
    indices = tuple(identity_key(t) for t in tensors if not (t.is_floating_point() or t.is_complex()))
    return tuple((t.shape, t.dtype, t.device) for t in tensors), indices
