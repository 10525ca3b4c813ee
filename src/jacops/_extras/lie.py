"""LieTensors of PyPose (extra `pypose`): which of their derivatives are right, and how wide rows and columns are.

PyPose stores an element of a Lie group in one number more than it can move (SE3: 7 and 6). Backward passes of its own
operations hand on the derivative along the update `X <- Exp(d) X`, padded with a zero; those of torch hand on the
derivative by the stored numbers. Both pass as "the gradient of X" and fit each other in shape, so where the two meet
it is wrong without an error. A walk over the recorded graph finds where. At an output the rows are corrected, since its
value is at hand; anywhere else the call is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from ..errors import NotDifferentiableError
from ._lie_groups import group_of, storage_jacobian, storage_width
from ._lie_walk import OPERATIONS, EdgeKind, Walk

Blocks = list[list[Tensor]]


def layout(recorded: Any, tangent: bool, create_graph: bool = False) -> Callable[[Blocks], Blocks] | None:
    """Return what turns blocks `(output entries, *leaf)` into their final shapes; None where no LieTensor is involved.

    Columns of a group-valued parameter are those of `d` in `Exp(d) X`, rows of a group-valued output those of
    `Log(f(x + dx) f(x)⁻¹)`, both padded with a zero to the width of storage unless `tangent`. Rows of any other output,
    a LieTensor's `.tensor()` among them, are those of its numbers. Gradients of Log and Exp are put right on the way
    where PyPose loses digits.

    Args:
        recorded: The linearisation point, over private copies of the parameters.
        tangent: Leave the padding out.
        create_graph: The Jacobian will be differentiated.

    Raises:
        NotDifferentiableError: PyPose's derivative is wrong for how the function uses a LieTensor; the message names
            the operation and the parameter.
    """
    lin, walked = recorded.lin, _walked(recorded.lin)
    if walked is None:
        return None
    walk, kinds = walked
    outputs = lin.outputs if create_graph else [output.detach() for output in lin.outputs]
    carried = [kind.group if kind is not None else group_of(o) for kind, o in zip(kinds, outputs, strict=True)]

    @restoring
    def laid_out(blocks: Blocks) -> Blocks:
        with arithmetic(create_graph):
            done = [
                [
                    _rows(_columns(block, o, leaf, tangent), o, group, tangent)
                    for block, leaf in zip(row, lin.leaves, strict=True)
                ]
                for row, o, group in zip(blocks, outputs, carried, strict=True)
            ]
        if create_graph:
            _check_twice(walk, [block for row in done for block in row])
        return done

    return laid_out


def _walked(lin: Any) -> tuple[Walk, list[EdgeKind | None]] | None:
    """Return the walk and what the outputs hold, with gradients corrected; None where no LieTensor is involved."""
    if not _involved(lin):
        return None
    walk = Walk.over(lin)
    kinds = walk.kinds(lin.outputs)
    walk.check_outputs(kinds, lin.outputs)
    walk.mend(private=not lin.aliased_leaves)
    return walk, kinds


def _involved(lin: Any) -> bool:
    if "pypose" not in sys.modules:
        return False
    from pypose import LieTensor

    if any(isinstance(t, LieTensor) for t in (*lin.leaves, *lin.outputs)):
        return True
    return not OPERATIONS.isdisjoint(lin.graph_info.functions)


def inspect(recorded: Any) -> None:
    """Apply the same walk before a sparse sweep: correct what can be corrected, refuse what is wrong.

    Raises:
        NotDifferentiableError: PyPose's derivative is wrong here, or an output is an element of a group.
    """
    lin, walked = recorded.lin, _walked(recorded.lin)
    for kind, name in zip(walked[1], lin.codomain.names, strict=True) if walked else ():
        if kind is not None and kind.group:
            raise NotDifferentiableError(
                f"{lin.call}: {name} is an element of the Lie group {kind.group}, whose rows have no sparse form. "
                "Take its `.Log()`."
            )


def _columns(block: Tensor, output: Tensor, leaf: Tensor, tangent: bool) -> Tensor:
    block = block.reshape(*output.shape, *leaf.shape)
    return _padded(block[..., :-1], -1, tangent) if group_of(leaf) else block


def _rows(block: Tensor, output: Tensor, carried: str, tangent: bool) -> Tensor:
    """Return a block with the rows that its output needs, from those of the graph.

    Args:
        block: `(*output, *leaf)`; the rows of a group are tangent ones and a last one to be dropped.
        output: What the rows are of.
        carried: The group that it has in the graph, empty for numbers.
        tangent: Leave the padding out.
    """
    own, axis = group_of(output), output.ndim - 1
    if not own and not carried:
        return block
    if own == carried:
        return _padded(block.narrow(axis, 0, block.shape[axis] - 1), axis, tangent)
    elements = output.as_subclass(Tensor).reshape(-1, storage_width(own or carried))
    moved = storage_jacobian(own or carried, elements).to(block.dtype)
    tail = block.shape[output.ndim :]
    rows = block.reshape(*moved.shape[:2], tail.numel())
    rows = torch.linalg.pinv(moved) @ rows if own else moved @ rows[:, :-1]
    rows = rows.reshape(*output.shape[:-1], rows.shape[1], *tail)
    return _padded(rows, axis, tangent) if own else rows


def _padded(block: Tensor, axis: int, tangent: bool) -> Tensor:
    return block if tangent else torch.cat([block, torch.zeros_like(block.narrow(axis, 0, 1))], axis)


def _check_twice(walk: Walk, blocks: list[Tensor]) -> None:
    """Refuse a Jacobian that is made of raw storage, whose own derivatives PyPose gets wrong.

    Raises:
        NotDifferentiableError: It is; the message names the operation.
    """
    walk.check_frozen()
    again = Walk(walk.call, walk.sources, twice=True)
    again.check_outputs(again.kinds(blocks), blocks)
