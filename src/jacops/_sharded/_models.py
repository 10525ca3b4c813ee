"""Products with models whose parameters are sharded, by reverse over reverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._digests import digest_tensors
from .._finite import check_outputs, check_vector, require_finite
from .._recorded_loss import loss_of_output, recordable
from .._runtime.contexts import recording, sweeping
from .._runtime.restoring import restoring
from .._torch.protocol import ForwardExplained, ShardedModel, input_leaves, parts_of, private_inputs, split_input
from .._trees import Tree, flatten, output_leaves
from ..errors import ModelStateError
from ._common import Grads, agree, are_summed, check_common, ranks_of, refuse_options_of, results_of, sketch, words_of
from ._sweeps import cotangents_of, explained, pulled, pushed


class _Joint:
    """One product that all ranks take together.

    Args:
        model: The sharded model.
        call: The public call, for messages.
        wrt: Which parameters are differentiated, by name and value.
    """

    def __init__(self, model: Any, call: str, wrt: Callable[[str, Tensor], bool]) -> None:
        self.call, self.model = call, ShardedModel(model, wrt)
        self.shards = self.model.chosen
        if not self.shards:
            needed = "at least one must be a floating-point parameter that is asked for"
            raise ModelStateError.of("model", "without parameters to differentiate", needed)
        self.leaves = [shard.local for shard in self.shards.values()]
        self.ranks = ranks_of(self.shards, call)

    def prepared(self, data: Mapping[str, Any], v: Any = None) -> tuple[bool, list[Tensor]]:
        """Return whether the ranks' parts are summed, and this rank's parts of a tangent, if there is one.

        Args:
            data: What a rank may have of its own, by argument.
            v: A tangent; None for none.

        Raises:
            InputError: The ranks differ in what they must have in common, or some have the same data and others not.
        """
        with self.ranks.stage() as stage:
            input_leaves(data["x"])
            parts, whole = ([], {}) if v is None else parts_of(self.shards, v, "v")
            check_vector(self.call, "v", parts)
            replicated = {n: s.parameter for n, s in self.model.shards.items() if not s.is_dtensor}
            buffers = dict(self.model.module.named_buffers())
            stage.words |= {
                "the call": f"{self.call} by {', '.join(self.shards)}"[-400:],
                "parameters that are not sharded": digest_tensors(replicated),
                "buffers": digest_tensors(buffers),
                "v": digest_tensors(whole),
                **words_of(data),
            }
        check_common(stage, self.call, "the call", "parameters that are not sharded", "buffers", "v")
        return are_summed(stage, self.call), parts

    @restoring
    def run(self, x: Any, summed: bool, finish: Callable[[list[Tensor], Tree, Any], Any]) -> Any:
        """Return what `finish` makes of the leaves, the structure and the value of the model's output.

        Raises:
            ModelStateError: All ranks have the same data, and the outputs differ.
        """
        values, tree = flatten(x, "input")
        with self.ranks.stage() as stage:
            args, kwargs = split_input(private_inputs(values, tree, fixed=True)[0])
            tensors = [value for value in values if isinstance(value, Tensor)]
            with recording(), ForwardExplained(self.model.module, tensors), explained():
                output = self.model.run(args, kwargs, summed, stage.turn)
                leaves, shape = output_leaves(output, aside=True)
                found = finish(leaves, shape, output)
            check_outputs(self.call, leaves, shape.names)
            stage.words["output"] = sketch(leaves)
        if not summed and not agree(stage, leaves):
            came = "giving different outputs on ranks with the same parameters and data"
            needed = "it must be one function (dropout draws its own masks on each rank)"
            raise ModelStateError.of("model", came, needed, "Call `model.eval()`, or seed all ranks alike.")
        return found

    def results(self, grads: Grads) -> list[Tensor]:
        """Return derivatives as the parameters are, zeros where there are none.

        Raises:
            NonFiniteError: One is NaN or Inf.
        """
        return results_of(self.ranks, self.shards, grads)


@restoring
def sharded_vjp(model: Any, x: Any, v: Any, call: str, create_graph: bool) -> list[Tensor]:
    """Return the model's `J^T v`, summed over ranks that have data of their own, placed as the parameters."""
    refuse_options_of(call, create_graph=create_graph)
    joint = _Joint(model, call, lambda name, parameter: True)
    summed, _ = joint.prepared({"x": x, "v": v})

    def cotangents(outputs: list[Tensor], tree: Tree, output: Any) -> tuple[list[Tensor], list[Tensor]]:
        return outputs, cotangents_of(outputs, tree, v, call)

    outputs, us = joint.run(x, summed, cotangents)
    with sweeping(outputs[0]):
        return joint.results(pulled(call, outputs, joint.leaves, us))


@restoring
def sharded_jvp(model: Any, x: Any, v: Any, call: str, create_graph: bool) -> Any:
    """Return the model's `J v` for this rank's input."""
    refuse_options_of(call, create_graph=create_graph)
    joint = _Joint(model, call, lambda name, parameter: True)
    summed, parts = joint.prepared({"x": x}, v)
    outputs, tree = joint.run(x, summed, lambda outputs, tree, output: (outputs, tree))
    with sweeping(outputs[0]):
        rows = pushed(call, outputs, joint.leaves, parts)
    with joint.ranks.stage():
        for row, name in zip(rows, tree.names, strict=True):
            require_finite(row, f"{call}: in the derivative's part for {name}", "; the output itself is finite.")
    return tree.build(rows)


@restoring
def sharded_hvp(model: Any, loss: Any, x: Any, y: Any, v: Any, options: Mapping[str, Any]) -> Any:
    """Return the Hessian of the loss times `v`, in the form of `v`, summed over ranks that have data of their own."""
    joint, of_output, summed, parts = _curvature("hvp", model, loss, {"x": x, "y": y}, v, options)
    value = joint.run(x, summed, lambda outputs, tree, output: of_output(output))
    with sweeping(value):
        slopes = pulled("hvp", [value], joint.leaves, again=True)
        return _like(v, joint, joint.results(pulled("hvp", slopes, joint.leaves, parts)))


@restoring
def sharded_ggnvp(model: Any, loss: Any, x: Any, y: Any, v: Any, options: Mapping[str, Any]) -> Any:
    """Return the Gauss-Newton matrix times `v`, in the form of `v`, summed over ranks that have data of their own."""
    joint, of_output, summed, parts = _curvature("ggnvp", model, loss, {"x": x, "y": y}, v, options)

    def slopes_of(outputs: list[Tensor], tree: Tree, output: Any) -> tuple[list[Tensor], list[Tensor], Grads]:
        inner = [part.detach().requires_grad_() for part in outputs]
        value = of_output(tree.build([part.clone() for part in inner]))
        return outputs, inner, pulled("ggnvp", [value], inner, again=True)

    outputs, inner, slopes = joint.run(x, summed, slopes_of)
    with sweeping(outputs[0]):
        rows = pushed("ggnvp", outputs, joint.leaves, parts)
        bent = pulled("ggnvp", slopes, inner, rows)
        cotangents = [torch.zeros_like(o) if b is None else b.detach() for o, b in zip(outputs, bent, strict=True)]
        return _like(v, joint, joint.results(pulled("ggnvp", outputs, joint.leaves, cotangents)))


def _curvature(
    call: str, model: Any, loss: Any, data: dict[str, Any], v: Any, options: Mapping[str, Any]
) -> tuple[_Joint, Callable[[Any], Tensor], bool, list[Tensor]]:
    refuse_options_of(call, **options)
    of_output = loss_of_output(loss, recordable(data["y"], kept=False))
    joint = _Joint(model, call, lambda name, parameter: parameter.requires_grad)
    return joint, of_output, *joint.prepared(data, v)


def _like(v: Any, joint: _Joint, results: list[Tensor]) -> Any:
    """Return results in the form of `v`: a tensor, a list or a dict by name."""
    if isinstance(v, Tensor):
        return results[0]
    return dict(zip(joint.shards, results, strict=True)) if isinstance(v, Mapping) else results
