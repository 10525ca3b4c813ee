"""Sweeps by outputs as one compiled graph: the forward and a group of backward passes, traced together and fused.

A trace holds what Python did when it was made. So a graph is held against plain sweeps when it is made, all of it, and
in every later call on two samples; and it stays only where it was measured to be faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._ladder.failures import RouteFailedError, RouteWrongError, attempt
from ..._runtime.agreement import worst_disagreement
from ..._runtime.contexts import must_surface
from ..._runtime.restoring import WarningsIgnored, restoring
from ...errors import NotDifferentiableError, warn
from ..sweeps.mixing import coupled, differs
from ..sweeps.proofs import Proofs, ProofStore
from .results import Results
from .runs import Run, Runner
from .sweeps import counts, sweep

_GROUP = 32  # backward passes to a graph: compiling more takes longer than it saves
_BACKEND = "inductor"
_TRIES = 3  # graphs compiled for one model, of up to a minute each, until it counts as one that changes in every call
Rows = tuple[Tensor, list[Tensor]]


@dataclass
class Compiled:
    """A graph for so many samples.

    Attributes:
        function: From inputs, parameters with buffers, and cotangents to the output and its rows by input.
        many: Samples.
        group: Cotangents.
        entries: Outputs of a sample.
        output: A sample's output, for its shape.
        proofs: What was known of the graph of two samples when it was made.
    """

    function: Callable[..., Rows]
    many: int
    group: int
    entries: int
    output: Tensor
    proofs: Proofs

    def fits(self, few: Run) -> bool:
        """Say whether two samples are recorded as they were when the graph was made."""
        return few.lin.trust is self.proofs and not self.proofs.needs("compiled")

    @restoring
    def fill(self, runner: Runner, values: Sequence[Tensor], blocks: Sequence[Tensor], where: slice) -> Tensor:
        """Fill `blocks[leaf][where]`, a few outputs after another, and return the outputs."""
        state, output = runner.state(), self.output
        for start in range(0, self.entries, self.group):
            start = min(start, self.entries - self.group)  # the last group may repeat rows
            with torch.no_grad():
                output, rows = self.function(list(values), state, _seeds(self.output, self.many, start, self.group))
            for block, row in zip(blocks, rows, strict=True):
                target = block[where].view(self.many, self.entries, *row.shape[2:])
                target[:, start : start + self.group] = row
        return output


class Compiler:
    """Graphs in place of sweeps, for one call.

    Args:
        runner: Runs the model.
        fallback: `"warn"`, `"silent"` or `"error"` where there can be no graph.
    """

    def __init__(self, runner: Runner, fallback: str) -> None:
        self.runner, self.fallback, self._held = runner, fallback, False

    def fill(self, result: Results, where: slice, values: Sequence[Tensor], store: ProofStore) -> bool:
        """Fill in one batch from a graph, and say whether there was one that is still right."""
        graph = store.known.get("compiled")
        if not isinstance(graph, Compiled):
            return False
        few = None
        if not self._held:
            few = self.runner.run([v[:2] for v in values])
            if not graph.fits(few):
                store.known.pop("compiled")
                return False
            result.prepare(few)
        try:
            output = _compiles(lambda: graph.fill(self.runner, values, result.blocks[0], where))
        except RouteFailedError:
            store.known.pop("compiled")
            return False
        result.outputs[0][where] = output
        if few is not None and _doubtful(few, result, where):
            store.known.pop("compiled")  # the model is not what it was
            return False
        self._held = True
        result.direction = f"reverse, {graph.entries} pulls, compiled"
        return True

    def consider(self, result: Results, where: slice, run: Run, values: Sequence[Tensor], store: ProofStore) -> None:
        """Make a graph for batches like this one, unless it is known that none pays."""
        known = store.known
        connected = any(output.requires_grad for output in run.lin.outputs)
        if known.get("compiled") is not None or where.stop - where.start < 2 or not connected:
            return
        known["compiles"] = known.get("compiles", 0) + 1
        if known["compiles"] > _TRIES:
            known["compiled"] = "the model was another one in every call"
            return
        try:
            known["compiled"] = compiled(self.runner, run, values, result.blocks[0], where)
        except RouteFailedError as reason:
            known["compiled"] = str(reason)
            self._say(str(reason))

    def _say(self, reason: str) -> None:
        message = f"compile=True: {reason}"
        if self.fallback == "error":
            raise NotDifferentiableError(f"{message}, and fallback='error' forbids plain sweeps.")
        if self.fallback == "warn":
            warn(f"{message}; plain sweeps go on.")


def _doubtful(run: Run, result: Results, where: slice) -> bool:
    """Hold the first two samples of a batch against a run of them alone."""
    reason = differs(result.outputs[0][where], run.lin.outputs[0], torch.arange(2))
    return bool(reason or coupled(run.lin, result.blocks, slice(where.start, where.start + 2)))


def compiled(runner: Runner, run: Run, values: Sequence[Tensor], blocks: Sequence[Tensor], where: slice) -> Compiled:
    """Return a graph that was right and faster on these samples, whose rows are in `blocks[leaf][where]`.

    Raises:
        RouteFailedError: There is none; the message says why.
    """
    lin, effects = run.lin, run.effects
    if run.head is not None or effects.writes or len(lin.outputs) != 1 or counts(lin)[0] == 0:
        raise RouteFailedError("only whole models with one output tensor that write into nothing are compiled")
    entries, many = counts(lin)[0], where.stop - where.start
    group = math.ceil(entries / math.ceil(entries / _GROUP))
    output = lin.outputs[0].detach()[:1].clone()
    few = runner.run([v[:2] for v in values]).lin.trust
    found = Compiled(_traced(runner, run, values, group), many, group, entries, output, few)
    scratch = [torch.empty_like(block[where]) for block in blocks]
    everything = slice(0, many)

    def plainly() -> None:
        again = runner.record(values, effects)
        sweep(again.lin, [scratch], everything, "reverse")

    alone = _seconds(plainly, lin.outputs[0])
    filled = partial(_compiles, lambda: found.fill(runner, values, scratch, everything))
    filled()  # the first one compiles
    fused = _seconds(filled, lin.outputs[0])
    error = worst_disagreement([(block[where], other) for block, other in zip(blocks, scratch, strict=True)])
    if not error <= lin.tolerance:
        raise RouteWrongError(f"the compiled sweeps disagree with the plain ones (by {error:.1e})")
    if fused > alone:
        raise RouteFailedError(f"compiled sweeps were measured slower ({fused:.2g} s, plain ones {alone:.2g} s)")
    few.remember("compiled")
    return found


def _traced(runner: Runner, run: Run, values: Sequence[Tensor], group: int) -> Callable[..., Rows]:
    from torch.fx.experimental.proxy_tensor import make_fx  # here, because it loads half of torch's compiler

    def sweeps(values: list[Tensor], state: dict[str, Tensor], seeds: Tensor) -> Rows:
        lin = runner.record(values, run.effects, state=state).lin
        (output,), columns = lin.outputs, []
        for seed in seeds.unbind():
            columns.append(torch.autograd.grad(output, lin.leaves, seed, retain_graph=True, materialize_grads=True))
        return output.detach(), [torch.stack(rows, 1) for rows in zip(*columns, strict=True)]

    many, output = values[0].shape[0], run.lin.outputs[0].detach()
    example = list(values), runner.state(), _seeds(output, many, 0, group)
    graph = attempt(lambda: make_fx(sweeps)(*example))
    return _compiles(lambda: torch.compile(graph, dynamic=False, backend=_BACKEND))


def _seeds(output: Tensor, many: int, start: int, group: int) -> Tensor:
    """Return cotangents on entries `start` and on of every sample, `(group, many, *output)`."""
    seeds = torch.zeros(group, many, output.shape[1:].numel(), dtype=output.dtype, device=output.device)
    for row in range(group):
        seeds[row, :, start + row] = 1
    return seeds.view(group, many, *output.shape[1:])


def _seconds(call: Callable[[], Any], like: Tensor) -> float:
    """Return what a call takes, the device's work included."""
    started = time.perf_counter()
    call()
    if like.device.type != "cpu":
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
