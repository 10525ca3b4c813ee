"""Every sample in a batch of one: plain autograd, right for every model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..._ladder.plan import Cost, Memory
from ..routes.whole_matrix import jacobian_blocks
from ..sweeps.mixing import explain_alone
from .results import ALONE

if TYPE_CHECKING:
    from .ask import BatchAsk


class OneByOne:
    """A run and its sweeps for every sample."""

    name, claims, leaving = "one by one", (), "never"

    def refuses(self, ask: BatchAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: BatchAsk) -> Cost:
        """More than any other route takes."""
        return Cost(math.inf, lambda: ask.memory(self.name) or Memory(0, 0))

    def describe(self, ask: BatchAsk) -> str:
        """Name it."""
        return ALONE

    def value(self, ask: BatchAsk) -> None:
        """Fill in the batch."""
        if ask.known is None:
            explain_alone(ask.call, ask.fallback, ask.apart or "no shared sweep is right")
        result = ask.result
        result.proved = False
        for i in range(ask.many):
            run = ask.runner.run([v[i : i + 1] for v in ask.values])
            row, shapes = ask.where.start + i, result.prepare(run, alone=True)
            result.batches.append((1, run.lin.proofs, run.followed))
            parts = jacobian_blocks(run.lin, ask.runner.create_graph)
            for out, output in enumerate(run.lin.outputs):
                result.output[out][row] = output.detach().reshape(shapes[out])
            if ask.runner.create_graph:
                result.keep(slice(row, row + 1), parts)
                continue
            for out, blocks in enumerate(parts):
                for leaf, block in enumerate(blocks):
                    target = result.blocks[out][leaf]
                    target[row] = block.reshape(target.shape[1:])
