"""What whole Jacobians are checked for: that outputs depend on parameters, and that all is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ._finite import check_outputs, require_finite
from ._torch.protocol import Blocks, Recording
from .errors import InputError, NotDifferentiableError

FINITE_TODO = " Correct the model or the data, or pass `check_finite=False`."


def check_dependence(recorded: Recording) -> None:
    """Refuse an output that does not depend on a parameter at all.

    Raises:
        NotDifferentiableError: There is one; the message names both.
    """
    lin = recorded.lin
    for index, (name, output) in enumerate(zip(lin.codomain.names, lin.outputs, strict=True)):
        seeds = [torch.ones_like(o) if i == index else None for i, o in enumerate(lin.outputs)]
        for parameter, grad in zip(lin.domain.names, lin.pull(seeds), strict=True):
            if grad is None and output.numel():
                raise NotDifferentiableError(
                    f"modjac: {name} does not depend on parameter {parameter}, and strict=True requires it. "
                    "Leave strict out to get zeros."
                )


def check_blocks(call: str, recorded: Recording, blocks: Blocks, todo: str = "", sure: bool = False) -> None:
    """Refuse outputs and blocks of a Jacobian that hold NaN or Inf; blocks that are known to be finite are not read.

    Raises:
        NonFiniteError: There is one; the message names output and parameter.
    """
    check_outputs(call, recorded.lin.outputs, recorded.lin.codomain.names, todo)
    if sure:
        return
    for output, row in zip(recorded.lin.codomain.names, blocks, strict=True):
        for parameter, block in zip(recorded.lin.domain.names, row, strict=True):
            check_block(call, block, output, parameter)


def check_block(call: str, block: Tensor, output: str, by: str) -> None:
    """Refuse a block of a Jacobian that holds NaN or Inf.

    Raises:
        NonFiniteError: It does.
    """
    where = f"{call}: in the Jacobian of {output} by {by}"
    require_finite(block.detach(), where, f"; the output itself is finite.{FINITE_TODO}")


def refuse_with_graph(**given: bool) -> None:
    """Refuse options that results with a graph do not have.

    Raises:
        InputError: One is given.
    """
    for name, value in given.items():
        if value:
            came = "'split'" if name == "mode" else "given"
            needed = "results are not written in place"
            if name == "freeze":
                needed = "what is held constant would have no derivative by the parameters"
            raise InputError.of(name, came, f"with `create_graph=True` {needed}", "Leave it out.")


def refuse_with_sparse(**given: bool) -> None:
    """Refuse options that a sparse result does not have.

    Raises:
        InputError: One is given.
    """
    for name, value in given.items():
        if value:
            raise InputError.of(name, "asked for together with `sparse=True`", "a sparse result has no such variant")
