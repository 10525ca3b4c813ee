"""Derivatives of derivatives, sample by sample: the Jacobians of a batch as one more function of the batch.

A `ConnectedModel` is a model as a function that stays connected to its arguments; `JacobianFunction` of a function is
its Jacobian, by sweeps that all samples share, connected again. `nested` differentiates that once more with all the
evidence that `Samples` asks for. So samples are proved apart for the function and its derivatives alike: the slopes
of a sample alone and in the batch agree, a cotangent on half of the samples leaves exact zeros on the others, and a
plain sweep confirms the numbers. Otherwise every sample is taken alone, where a sweep over a batch of one is plain
autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._ladder.route import answer
from ..._runtime.kernels import norms_written_out
from ..._runtime.rows import Rows
from ..._trees import Tree, is_differentiable, output_leaves
from ..sweeps.ask import SweepAsk
from ..sweeps.graph import inspect_graph, refuse_cut
from ..sweeps.linear_nodes import all_linear, first_slope, has_fused_norm
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import rows_differ
from ..sweeps.proofs import Proofs
from ..sweeps.record import setting
from .batch import Samples
from .slopes import SLOPES, pays_to_push

RECORDED = 64  # samples: a graph of so few costs little to keep, and a second forward would take as long as its sweeps


class ConnectedModel:
    """A model in eval mode as a function of its inputs, connected to those that require grad.

    Args:
        samples: The model with the batch it was asked about.

    Attributes:
        tree: The structure of the output of the last call.
    """

    def __init__(self, samples: Samples) -> None:
        self.runner = replace(samples.runner, at=None, connected=True)
        self.tree: Tree | None = None

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for values as those of the samples, one tensor per leaf of the output."""
        run = self.runner.run(values)
        self.tree = run.tree
        return tuple(run.lin.outputs)


class JacobianFunction:
    """The Jacobians of all samples of a batch, `(n, *out, *in)`, as a function that can be differentiated again.

    Args:
        function: Takes tensors with one row per sample, gives a tree of such.
        call: The public call on whose behalf this is done.

    Attributes:
        linear: The graphs of `function` and of its slopes hold only operations whose backward is linear whatever the
            cotangent is.
        recorded: Inputs and outputs of the last call of `function`, with their graph, unless that is linear or has
            many samples.
    """

    def __init__(self, function: Callable[..., Any], call: str) -> None:
        self.function, self.call = function, call
        self.linear = True
        self.recorded: tuple[list[Tensor], list[Tensor]] | None = None
        self._met: dict[str, None] = {}

    @property
    def functions(self) -> list[str]:
        """Names of the custom autograd Functions that were met, here and further inside."""
        return list(dict.fromkeys([*getattr(self.function, "functions", ()), *self._met]))

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return a tensor per output and input, outputs first.

        Raises:
            NotDifferentiableError: A backward on the way is marked once_differentiable.
            RuntimeError: Several samples, and an output without an axis for them.
        """
        leaves = [v if v.requires_grad else v.detach().requires_grad_() for v in values if is_differentiable(v)]
        each = iter(leaves)
        given = [next(each) if is_differentiable(v) else v for v in values]
        outputs = self._recorded(given)
        many = leaves[0].shape[0]
        for output in outputs:
            if many > 1 and (output.ndim == 0 or output.shape[0] != many):
                raise RuntimeError(f"an output of shape {tuple(output.shape)} has no axis of {many} samples first")
        lin = Linearization(
            leaves,
            outputs,
            leaf_names="input",
            output_names="output",
            call=self.call,
            private=True,
        )
        lin.proofs = Proofs("never")
        slopes = _shared_sweeps(lin, many)
        self.linear = all_linear(lin.graph_info.nodes) and all_linear(first_slope(slopes))
        self.recorded = (leaves, outputs) if many <= RECORDED and not self.linear else None
        self._note(lin, slopes)
        return tuple(slopes)

    def _recorded(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Record the function; with norms written out where their fused kernels would be differentiated three times."""

        def run() -> list[Tensor]:
            return output_leaves(self.function(*given))[0]

        if isinstance(self.function, JacobianFunction):
            with norms_written_out():
                return run()
        outputs = run()
        many = given[0].shape[0]
        columns = sum(v[:1].numel() for v in given if is_differentiable(v))
        if pays_to_push(sum(o.numel() for o in outputs) // many, columns) and has_fused_norm(
            inspect_graph(outputs).nodes
        ):
            with norms_written_out():
                return run()
        return outputs

    def _note(self, lin: Linearization, slopes: Rows) -> None:
        self._met |= dict.fromkeys(lin.graph_info.functions)
        refuse_cut(self.call, self.functions if lin.graph_info.functions else (), slopes)


def _shared_sweeps(lin: Linearization, many: int) -> Rows:
    """Return `(n, *out, *in)` for every output and leaf, with a graph, by the fewer of pulls and pushes."""
    batched = [o.ndim > 0 and o.shape[0] == many for o in lin.outputs]
    outs = [o.shape[1:] if b else o.shape for o, b in zip(lin.outputs, batched, strict=True)]
    ins = [leaf.shape[1:] for leaf in lin.leaves]
    parts = answer(SweepAsk("slopes", lin, (), many, create_graph=True), SLOPES)
    return [
        part.reshape(many, *out, *inner)
        for line, out in zip(parts, outs, strict=True)
        for part, inner in zip(line, ins, strict=True)
    ]


def nested(
    function: Callable[..., Any],
    x: Sequence[Tensor],
    of: Samples,
    kind: Hashable,
    progress: bool | None = None,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return the Jacobians of a function made from a model, sample by sample, and what the function returned.

    Args:
        function: Made of `Forward` and `JacobianFunction`.
        x: Its arguments, one row per sample.
        of: The model and batch that were asked about.
        kind: Distinguishes this function of the model from others in stored proofs.
        progress: Force the progress bar on or off.

    Returns:
        `J[output][input]`, each `(n, *out, *in)`, and the outputs `(n, *out)`.
    """
    model, inputs = of.runner.model, of.runner.inputs_in(of.values)
    equal = not rows_differ(inputs)
    parts = ("nested", kind, *of.runner.asked, equal)
    if of.runner.structure is not None:
        key: Hashable = setting(of.runner.structure, of.values, *parts)
    else:
        key = (*parts, tuple((v.shape, v.dtype, v.device) for v in of.values), torch.get_default_dtype())

    kept = of.runner.create_graph
    samples = Samples(
        function,
        tuple(x),
        call=of.call,
        checks=of.checks,
        fallback=of.fallback,
        create_graph=kept,
        batch_size=of.batch_size,
    )
    samples.runner = replace(samples.runner, owner=(model, key))
    found = samples.jacobians(progress)
    return found.blocks, found.output
