"""Jacobians are held to be finite, block by block: the message names the output and what it is differentiated by."""

from __future__ import annotations

from torch import Tensor

from ._finite import check_outputs, require_finite
from ._torch.protocol import Blocks, Recording

FINITE_TODO = " Mend the model or the data, or pass `check_finite=False`."


def check_blocks(call: str, recorded: Recording, blocks: Blocks, todo: str = "", sure: bool = False) -> None:
    """Refuse recorded outputs and their Jacobians with NaN or Inf; `sure` ones are not read.

    Raises:
        NonFiniteError: There is one.
    """
    check_outputs(call, recorded.lin.outputs, recorded.lin.codomain.names, todo)
    if sure:
        return
    for output, row in zip(recorded.lin.codomain.names, blocks, strict=True):
        for parameter, block in zip(recorded.lin.domain.names, row, strict=True):
            check_block(call, block, output, parameter)


def check_block(call: str, block: Tensor, output: str, by: str) -> None:
    """Refuse one Jacobian with NaN or Inf.

    Raises:
        NonFiniteError: It holds one.
    """
    where = f"{call}: in the Jacobian of {output} by {by}"
    require_finite(block.detach(), where, f"; the output itself is finite.{FINITE_TODO}")
