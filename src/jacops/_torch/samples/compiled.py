"""Sweeps by outputs as one compiled graph: the forward and a group of backward passes, traced together and fused.

A trace holds what Python did when it was made. So a graph is compared with plain sweeps when it is made, all of it, and
in every later call on two samples; and it stays only where it was measured to be faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError, RouteWrongError, attempt
from ..._ladder.names import Fact
from ..._ladder.plan import Cost
from ..._ladder.route import answer
from ..._runtime.agreement import worst_disagreement
from ..._runtime.contexts import must_surface
from ..._runtime.restoring import WarningsIgnored, restoring
from ..sweeps.mixing import coupled, differs
from ..sweeps.proofs import Proofs
from .ask import BatchAsk
from .runs import Run
from .sweeps import sweep

_GROUP = 32  # backward passes to a graph: compiling more takes longer than it saves
_BACKEND = "inductor"
_TRIES = 3  # graphs compiled for one model, of up to a minute each, until it counts as one that changes in every call
Rows = tuple[Tensor, list[Tensor]]


@dataclass
class GraphAsk:
    """A batch to be filled in from a graph; or by sweeps, after which a graph may be made for later calls.

    Attributes:
        batch: The batch.
        plainly: Fills it in by sweeps, and returns why samples were taken one at a time.
    """

    batch: BatchAsk
    plainly: Callable[[], str | None]

    question, asked, call, shape = "compiled", None, "compile=True", None

    @property
    def verdicts(self) -> Proofs:
        """What is known of graphs for batches like this one."""
        return self.batch.store.known.take("graphs", lambda: Proofs("never"))

    @property
    def fallback(self) -> str:
        """What happens where there can be no graph."""
        return self.batch.fallback

    @property
    def routes(self) -> dict[str, str]:
        """Descriptions of routes."""
        return self.batch.routes


@dataclass
class Compiled:
    """A graph for so many samples.

    Attributes:
        function: From inputs, parameters with buffers, and cotangents to the output and its rows by input.
        group: Cotangents.
        output: Outputs of all samples, for their shape.
        proofs: What was known of the graph of two samples when it was made.
    """

    function: Callable[..., Rows]
    group: int
    output: Tensor
    proofs: Proofs

    @restoring
    def fill(self, ask: BatchAsk, blocks: Sequence[Tensor]) -> Tensor:
        """Fill `blocks[leaf]`, a few outputs after another, and return the outputs."""
        state, output, entries = ask.runner.state(), self.output, self.output[0].numel()
        for start in range(0, entries, self.group):
            start = min(start, entries - self.group)  # the last group may repeat rows
            seeds = _seeds(self.output, start, self.group)
            with torch.no_grad():
                output, rows = _compiles(lambda seeds=seeds: self.function(list(ask.values), state, seeds))
            for block, row in zip(blocks, rows, strict=True):
                block.view(len(output), entries, *row.shape[2:])[:, start : start + self.group] = row
        return output


class KeptGraph:
    """Sweeps by a graph of an earlier call, which has to fit what two samples show in this one."""

    name, claims, leaving = "graph", (), "silent"

    def refuses(self, ask: GraphAsk) -> str | None:
        """There has to be a graph."""
        return None if "graph" in ask.batch.store.known else ""

    def cost(self, ask: GraphAsk) -> Cost:
        """It was measured to be faster than sweeps."""
        return Cost(0)

    def describe(self, ask: GraphAsk) -> str:
        """Name it."""
        return "compiled"

    def value(self, ask: GraphAsk) -> None:
        """Fill in the batch.

        Raises:
            RouteFailedError: The model is not what it was when the graph was made.
        """
        batch, few = ask.batch, None
        result, where = batch.result, batch.where
        graph = batch.store.known.pop("graph")  # kept where it is still right
        if where.start == 0:  # once in a call
            few = batch.runner.run([v[:2] for v in batch.values])
            if few.lin.proofs is not graph.proofs or graph.proofs.needs(Fact.COMPILED):
                raise RouteFailedError("two samples are recorded in another way")
            result.prepare(few)
        output = graph.fill(batch, [block[where] for block in result.blocks[0]])
        result.output[0][where] = output
        if few is not None:
            reason = differs(output, few.lin.outputs[0], torch.arange(2))
            reason = reason or coupled(few.lin, result.blocks, slice(0, 2))
            if reason is not None:
                raise RouteWrongError(reason)
        batch.store.known["graph"] = graph
        result.route, result.sure = f"reverse, {output[0].numel()} pulls, compiled", False


class NewGraph(KeptGraph):
    """A graph that was right and faster on samples that are filled in already."""

    name, leaving = "new graph", "warned"

    def refuses(self, ask: GraphAsk) -> str | None:
        """It takes samples that share sweeps by outputs, and a model that is the same in later calls."""
        batch = ask.batch
        if batch.run is None or not batch.routes[batch.question].startswith("reverse"):
            return ""
        if not any(output.requires_grad for output in batch.run.lin.outputs):
            return ""
        tries = batch.store.known.get("tries", 0)
        return "the model was another one in every call" if tries >= _TRIES else None

    def value(self, ask: GraphAsk) -> None:
        """Make it.

        Raises:
            RouteFailedError: There is none; the message states why.
        """
        batch, run, known = ask.batch, ask.batch.run, ask.batch.store.known
        known["tries"] = known.get("tries", 0) + 1
        if run is None or run.head is not None or run.effects.writes or len(run.lin.outputs) != 1:
            raise RouteFailedError("only whole models with one output tensor that write into nothing are compiled")
        output, few = run.lin.outputs[0].detach(), batch.runner.run([v[:2] for v in batch.values]).lin.proofs
        group = math.ceil(output[0].numel() / math.ceil(output[0].numel() / _GROUP))
        graph = Compiled(_traced(batch, run, group), group, torch.empty_like(output), few)
        blocks = [block[batch.where] for block in batch.result.blocks[0]]
        scratch = [torch.empty_like(block) for block in blocks]

        def plainly() -> None:
            again = batch.runner.record(batch.values, run.effects)
            sweep(again.lin, [scratch], slice(0, batch.many), "reverse")

        alone = _seconds(plainly, output)
        graph.fill(batch, scratch)  # the first one compiles
        fused = _seconds(lambda: graph.fill(batch, scratch), output)
        error = worst_disagreement(list(zip(blocks, scratch, strict=True)))
        if not error <= run.lin.tolerance:
            raise RouteWrongError(f"the compiled sweeps disagree with the plain ones (by {error:.1e})")
        if fused > alone:
            raise RouteFailedError(f"compiled sweeps were measured slower ({fused:.2g} s, plain ones {alone:.2g} s)")
        few.remember(Fact.COMPILED)
        known.pop("graphs")  # why earlier ones were left
        known["graph"] = graph


class NoGraph:
    """Plain sweeps from now on."""

    name, claims, leaving = "plain sweeps", (), "never"

    def refuses(self, ask: GraphAsk) -> str | None:
        """It always applies."""
        return None

    def cost(self, ask: GraphAsk) -> Cost:
        """More than a graph that was measured to be faster."""
        return Cost(1)

    def describe(self, ask: GraphAsk) -> str:
        """Name it."""
        return "plain sweeps"

    def value(self, ask: GraphAsk) -> str | None:
        """Return nothing: the batch is filled in."""
        return None


class ThenGraph(NoGraph):
    """Plain sweeps, after which a graph may be made."""

    def value(self, ask: GraphAsk) -> str | None:
        """Fill in the samples, and return why they were taken one at a time."""
        reason = ask.plainly()
        answer(ask, (NewGraph(), NoGraph()))
        return reason


COMPILED = (KeptGraph(), ThenGraph())


def _traced(batch: BatchAsk, run: Run, group: int) -> Callable[..., Rows]:
    from torch.fx.experimental.proxy_tensor import make_fx  # here, because it loads half of torch's compiler

    def sweeps(values: list[Tensor], state: dict[str, Tensor], seeds: Tensor) -> Rows:
        lin = batch.runner.record(values, run.effects, state=state).lin
        (output,), columns = lin.outputs, []
        for seed in seeds.unbind():
            columns.append(torch.autograd.grad(output, lin.leaves, seed, retain_graph=True, materialize_grads=True))
        return output.detach(), [torch.stack(rows, 1) for rows in zip(*columns, strict=True)]

    example = list(batch.values), batch.runner.state(), _seeds(run.lin.outputs[0].detach(), 0, group)
    graph = attempt(lambda: make_fx(sweeps)(*example))
    return _compiles(lambda: torch.compile(graph, dynamic=False, backend=_BACKEND))


def _seeds(output: Tensor, start: int, group: int) -> Tensor:
    """Return cotangents on entries `start` and on of every sample, `(group, *output)`."""
    seeds = output.new_zeros(group, len(output), output[0].numel())
    seeds[range(group), :, range(start, start + group)] = 1
    return seeds.view(group, *output.shape)


def _seconds(call: Callable[[], Any], like: Tensor) -> float:
    """Return what a call takes, the device's work included."""
    started = time.perf_counter()
    call()
    if like.device.type != "cpu":  # whose work is not done when the call returns
        torch.accelerator.synchronize(like.device)
    return time.perf_counter() - started


@restoring
def _compiles(call: Callable[[], Any]) -> Any:
    """Run what may compile: compilers fail in their own ways.

    Raises:
        RouteFailedError: There is no compiler, or it failed.
    """
    try:
        with WarningsIgnored():  # torch's own, about what its compiler imports
            return call()
    except Exception as error:
        if must_surface(error):
            raise
        what = " ".join(str(error).split()) or type(error).__name__
        raise RouteFailedError(f"torch.compile failed: {what[:200]}") from error
