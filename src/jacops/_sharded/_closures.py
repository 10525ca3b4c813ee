"""Products with functions without arguments that close over DTensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .._digests import digest_tensors
from .._finite import check_outputs, check_vector, require_finite
from .._runtime.contexts import recording, sweeping
from .._runtime.restoring import restoring
from .._torch.protocol import check_params, parents_first, parts_of, shards_of
from .._trees import is_dtensor, output_leaves
from ..errors import InputError, InputTypeError, ModelStateError
from ._common import agree, check_common, ranks_of, refuse_options_of, results_of, sketch
from ._sweeps import cotangents_of, pulled, pushed


def sharded_closure(params: Any) -> tuple[Any, bool]:
    """Return `params`, read once where they can be read once only, and whether one of them is a DTensor."""
    if isinstance(params, Tensor):
        return params, is_dtensor(params)
    if not isinstance(params, Iterable):
        return params, False
    params = params if isinstance(params, Mapping) else list(params)
    return params, any(map(is_dtensor, params.values() if isinstance(params, Mapping) else params))


class _JointClosure:
    """A function without arguments that all ranks call together, over parameters of which some are DTensors."""

    @restoring
    def __init__(self, func: Any, params: Any, call: str) -> None:
        if not callable(func):
            raise InputTypeError.of("func", f"a {type(func).__name__}", "a callable without arguments is needed")
        self.call, self.params = call, check_params(params, spread=True)
        self.shards = shards_of(self.params, [f"params[{i}]" for i in range(len(self.params))])
        self.ranks = ranks_of(self.shards, call)
        with self.ranks.stage(), recording(advance=True):
            self.outputs, self.tree = output_leaves(func(), "func()")
        for output, name in zip(self.outputs, self.tree.names, strict=True):
            if is_dtensor(output):
                raise InputError.of(name, "a DTensor", "this rank's output is needed", "Return its `full_tensor()`.")
        check_outputs(call, self.outputs, self.tree.names)
        self.nodes = parents_first([o.grad_fn for o in self.outputs if o.grad_fn is not None])
        if any(type(node).__name__ == "RegisterPostBackwardFunctionBackward" for node in self.nodes):
            todo = f"Use `model_{call}(model, x, v)`, which runs a copy of the model without them."
            needed = "their gradients reach `.grad` alone, by FSDP's hooks"
            raise ModelStateError.of("func", "a function that calls a module under FSDP", needed, todo)

    def check_gathering(self, v: Sequence[Tensor]) -> None:
        """Refuse to pull through gathered parameters whose cotangents are not summed where they differ among ranks.

        Raises:
            InputError: They are gathered in the wrong way for what the ranks have.
        """
        with self.ranks.stage() as stage:
            stage.words |= {"output": sketch(self.outputs), "v": digest_tensors(_numbered(v))}
        differ = bool(stage.differing("v")) or not agree(stage, self.outputs)
        for node in self.nodes:
            if type(node).__name__ != "_ToTorchTensorBackward" or self.ranks.many == 1:
                continue
            summed = any(placement.is_partial() for placement in node.grad_placements or ())
            if summed != differ:
                came = f"gathering a parameter with `grad_placements={node.grad_placements}`"
                has = "outputs or cotangents of its own" if differ else "the same output and cotangent"
                todo = f"Write `p.full_tensor({'grad_placements=[Partial()]' if differ else ''})` in it."
                raise InputError.of("func", came, f"each rank has {has}", todo)


@restoring
def closure_vjp(func: Any, params: Any, v: Any, create_graph: bool) -> list[Tensor]:
    """Return `J^T v` of a function of DTensors, placed as they are."""
    refuse_options_of("vjp", create_graph=create_graph)
    joint = _JointClosure(func, params, "vjp")
    us = cotangents_of(joint.outputs, joint.tree, v, "vjp")
    joint.check_gathering(us)
    with sweeping(joint.outputs[0]):
        grads = pulled("vjp", joint.outputs, joint.params, us)
    parts = [None if g is None else _part(g, p) for g, p in zip(grads, joint.params, strict=True)]
    return results_of(joint.ranks, joint.shards, parts)


@restoring
def closure_jvp(func: Any, params: Any, v: Any, create_graph: bool) -> Any:
    """Return `J v` of a function of DTensors, for this rank's output."""
    refuse_options_of("jvp", create_graph=create_graph)
    joint = _JointClosure(func, params, "jvp")
    parts, whole = parts_of(joint.shards, v, "v")
    check_vector("jvp", "v", parts)
    with joint.ranks.stage() as stage:
        stage.words["v"] = digest_tensors(whole)
    check_common(stage, "jvp", "v")
    tangents = [shard.like_parameter(part) for shard, part in zip(joint.shards.values(), parts, strict=True)]
    with sweeping(joint.outputs[0]):
        rows = pushed("jvp", joint.outputs, joint.params, tangents)
    for row, name in zip(rows, joint.tree.names, strict=True):
        require_finite(row, f"jvp: in the derivative's part for {name}", "; the output itself is finite.")
    return joint.tree.build(rows)


def _part(grad: Any, parameter: Any) -> Tensor:
    """Return this rank's part of a gradient, placed as its parameter."""
    if not is_dtensor(grad):
        return grad
    return grad.detach().redistribute(placements=parameter.placements).to_local()


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(tensors)}
