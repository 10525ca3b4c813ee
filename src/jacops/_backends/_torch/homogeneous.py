r"""The part of an output that no input feature carries, and where an output is not piecewise linear.

A forward is followed operation by operation (`follow`). An operation that is affine in what depends on the input is
applied to bias parts as it is applied to values. Any other operation `g` that is linear around its point `z`
(`local_linear`) passes bias parts on by its derivative and adds its own constant `g(z) - Dg z`, which is zero for one
that is homogeneous. Neither the model's output nor its Jacobian is used, so that comparing `f(x)` with `J x + b` can
fail. Where an operation is curved there is no such constant; it is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, ModelStateError, explain
from ...trees import Selector, select
from .chunks import Chunks
from .cut import At, Cut
from .follow import Follow
from .inputs import forward_explained
from .replica import bare, check_state, replicate
from .surroundings import out_of_inference, random_state_kept, recording
from .watch import WritesState


@dataclass(frozen=True)
class Parts:
    """An output and what it is made of, for all samples.

    Attributes:
        output: The model's output, `(n, *out)`.
        bias: Its bias part, in double precision.
        point: What it was followed from: the input, or the output of the layer that the forward is cut at.
        move: A small change of that, `d`.
        around: The output at `x`, `x + d` and `x - d`, in double precision, what is detached held fixed.
        curved: Names of operations that are not piecewise linear, or could not be examined.
    """

    output: Tensor
    bias: Tensor
    point: Tensor
    move: Tensor
    around: tuple[Tensor, Tensor, Tensor]
    curved: tuple[str, ...]


def bias_part(model: Any, x: Tensor, batch_size: int, *, outputs: Selector = None, at: At = None) -> Parts:
    """Return the output of a model for some samples, its bias part, and what it is not piecewise linear by.

    Raises:
        InputError: `at` or `outputs` picks nothing.
        ModelStateError: As in `compute_jacobian`.
    """
    check_state(bare(model))
    found: list[Parts] = []
    chunks = Chunks(x.shape[0], batch_size)
    for where in chunks:
        with chunks.halving(where, "contributions", "samples"):
            found.append(_of_batch(bare(model), x[where], outputs, at))
    tensors = ([getattr(p, name) for p in found] for name in ("output", "bias", "point", "move"))
    around = tuple(torch.cat(values) for values in zip(*(p.around for p in found), strict=True))
    names = dict.fromkeys(name for p in found for name in p.curved)
    return Parts(*(torch.cat(t) for t in tensors), around, tuple(names))


def _of_batch(model: torch.nn.Module, x: Tensor, outputs: Selector, at: At) -> Parts:
    for cloned in (False, True):  # a second time on copies of the weights, if the forward writes into them
        try:
            return _followed(model, x, outputs, at, cloned)
        except WritesState:
            continue
    raise ModelStateError(
        explain("model", "writing into tensors that are not its own", "its forward must leave such tensors alone")
    )


def _followed(model: torch.nn.Module, x: Tensor, outputs: Selector, at: At, cloned: bool) -> Parts:
    module = replicate(model, training=False, cloned=cloned).module
    with recording(), random_state_kept():
        cut = Cut(module, at)
        given = out_of_inference(x).detach()
        if cut.source is None:
            given = given.requires_grad_()
        leaves = [given] if cut.source is None else cut.leaves
        follow = Follow(leaves, [] if cloned else model.parameters())
        with follow, follow.functions, cut.active(), forward_explained(model, [x]):
            output = select(cut.result(module(given.clone())), outputs)
        if not isinstance(output, Tensor):
            todo = "Pick one with `outputs=`."
            raise InputError(explain("model", f"returning a {type(output).__name__}", "one tensor is needed", todo))
        (bias, *around), curved = follow.read(output)
    return Parts(output.detach(), bias, leaves[0].detach(), follow.moves[0], tuple(around), tuple(curved))
