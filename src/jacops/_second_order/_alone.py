"""What is done where shared sweeps are contradicted: every output entry's slope alone in its graph, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._finite import is_finite
from .._runtime.agreement import tolerance
from .._torch.protocol import RECORDED, JacobianFunction, Samples
from .._trees import output_leaves
from ..errors import NotDifferentiableError, warn
from ._common import Blocks, compared, detached, flat
from ._differences import Differences
from ._evidence import Doubt, Nest, differs, doubt, losses


class OutputEntry:
    """One entry of the output of a function, for every sample.

    Args:
        function: Takes tensors with one row per sample, returns a tree of such.
        output: Which tensor of the output.
        entry: Which number of a sample's part of it.
    """

    def __init__(self, function: Callable[..., Any], output: int, entry: int) -> None:
        self.function, self.output, self.entry = function, output, entry

    def __call__(self, *values: Tensor) -> Tensor:
        """Return `(n,)`.

        Raises:
            RuntimeError: Several samples, and an output without an axis for them.
        """
        many = values[0].shape[0]
        whole = output_leaves(self.function(*values))[0][self.output]
        if many > 1 and (whole.ndim == 0 or whole.shape[0] != many):
            raise RuntimeError(f"an output of shape {tuple(whole.shape)} has no axis of {many} samples first")
        return whole.reshape(many, -1)[:, self.entry]


def settled(nest: Nest, blocks: Blocks, flaw: str | None, differences: Differences) -> Blocks:
    """Return derivatives that passed every check: `blocks`, or what every output entry alone gives.

    Args:
        nest: What was differentiated.
        blocks: What shared sweeps gave, `[output][input][input]`, each `(n, *out, *in, *in)`.
        flaw: What is known to be wrong with them already.
        differences: What they are compared with where a check fails.

    Raises:
        NotDifferentiableError: Every output entry alone is wrong too, or `fallback="error"` and it differs.
    """
    if nest.samples.checks == "never" or nest.samples.count == 0 or nest.slopes.linear:
        return blocks
    found = detached(blocks)
    against = Doubt(flaw, True, slice(0, 0)) if flaw else doubt(nest, found)
    if against is None or not (against.contradicted or _disproved(nest, differences, found, against)):
        return blocks
    error = ""
    for rows in dict.fromkeys((nest.samples.batch_size, 1)):
        other = _alone(nest, blocks, rows)
        if not all(map(is_finite, flat(other))):
            return other
        again = doubt(nest, detached(other))
        error = "" if again is None else _disproved(nest, differences, detached(other), again)
        if not error:
            return other if _same(blocks, other) else _reported(nest, against, other)
    raise NotDifferentiableError(
        f"{nest.samples.call}: {error}{_cause(nest)}. torch.autograd gives this also for every output alone, so it is "
        "wrong for some operation of this model. Write that operation out with elementary ones."
    )


def _disproved(nest: Nest, differences: Differences, blocks: Blocks, against: Doubt) -> str:
    """Return how derivatives differ from differences, at the samples in doubt and at some of all."""
    some = slice(0, nest.samples.count, 1 + (nest.samples.count - 1) // RECORDED)
    error = differences.refute(blocks, against.rows)
    error = differences.refute(blocks, some) if error is None else error
    return "" if error is None else differs(error)


def _alone(nest: Nest, like: Blocks, batch_size: int) -> Blocks:
    """Return what `like` holds, by sweeps in reverse over the graph of one output entry at a time."""
    result = []
    for output, grid in enumerate(like):
        inner = 2 * len(nest.shapes[0])
        shape = grid[0][0].shape[1 : grid[0][0].ndim - inner]
        entries = [_of_entry(nest, output, entry, batch_size) for entry in range(shape.numel())]
        result.append(
            [
                [_joined([e[a][b] for e in entries], block, shape) for b, block in enumerate(row)]
                for a, row in enumerate(grid)
            ]
        )
    return result


def _of_entry(nest: Nest, output: int, entry: int, batch_size: int) -> list[list[Tensor]]:
    call, checks = nest.samples.call, nest.samples.checks
    function: Callable[..., Any] = OutputEntry(nest.function, output, entry)
    for _ in range(nest.order - 1):
        function = JacobianFunction(function, call)
    kept = nest.samples.runner.create_graph
    how: dict[str, Any] = {"checks": checks, "fallback": "silent", "create_graph": kept, "batch_size": batch_size}
    return Samples(function, tuple(nest.x), call=call, **how).jacobians(False, mode="reverse").blocks


def _joined(parts: list[Tensor], like: Tensor, shape: torch.Size) -> Tensor:
    if not parts:
        return like
    whole = torch.stack(parts, 1)
    return whole.reshape(whole.shape[0], *shape, *whole.shape[2:])


def _same(ones: Blocks, others: Blocks) -> bool:
    """Return whether two answers are equal but for rounding."""
    error, scale = compared(flat(ones), flat(others))
    return bool((error <= tolerance([a.dtype for a in flat(ones)]) * scale).all())


def _cause(nest: Nest) -> str:
    lost = losses(nest)
    names = ", ".join(nest.slopes.functions)
    return f" ({lost})" if lost else f" (custom Functions in the graph: {names})" if names else ""


def _reported(nest: Nest, against: Doubt, blocks: Blocks) -> Blocks:
    reason = f"{against.reason}{_cause(nest)}"
    if nest.samples.fallback == "error":
        raise NotDifferentiableError(
            f"{nest.samples.call}: {reason}, and fallback='error' forbids one output at a time."
        )
    if nest.samples.fallback == "warn":
        warn(f"{nest.samples.call}: {reason}; so every output was differentiated alone.")
    return blocks
