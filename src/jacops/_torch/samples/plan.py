"""How many samples to a sweep: working memory measured on runs of one and of two samples, then extended as a line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._runtime.contexts import must_surface
from ..._runtime.memory import SMALL, Budget, Meter, budget_bytes, live, refuse, resident, size_of, startup_bytes
from ..._runtime.restoring import restoring
from ..sweeps.mixing import differs, unbatchable, with_reads
from ..sweeps.proofs import ProofStore
from .bottleneck import narrowest, sweep_split
from .results import SAMPLES_TODO
from .runs import Run
from .sweeps import close, counts, sweep

if TYPE_CHECKING:
    from .batch import Samples

ALONE = "one by one"
_TOO_LARGE = "the result does not fit"

# No model is expected to hold more bytes at once than so many times those of its input.
_GROWTH = 2**16

# Sweeps over more bytes than this read everything from memory: 1.2 to 1.5 times slower on perceptrons, convolutions and
# attention. Fewer samples than the least do not fill kernels.
_CACHE, _LEAST = 2**24, 16


@dataclass(frozen=True)
class Working:
    """Bytes held besides the result while a batch is swept: `fixed + each * samples`.

    Attributes:
        fixed: What does not depend on the number of samples.
        each: What every sample adds.
        sweeps: Sweeps over the model, or over its two parts.
    """

    fixed: float
    each: float
    sweeps: int

    def bytes(self, samples: int) -> int:
        """Return what so many samples take."""
        return resident(self.fixed + self.each * samples)

    def samples(self, room: float) -> int:
        """Return how many samples fit into `room` bytes."""
        return int((live(room) - self.fixed) // max(self.each, 1.0))


@dataclass(frozen=True)
class Probe:
    """What runs of one and of two samples show.

    Attributes:
        ways: Working memory by mode; `"one by one"` is a sample alone.
        shapes: Bytes of one sample's Jacobians, of its outputs.
        jacobian: Shape of the largest Jacobian of one sample.
        entries: Entries of a sample's outputs and inputs.
        close: The numbers of sweeps are near each other, so that `"auto"` times both directions.
        place: Where a split pays, and how wide it is.
        reason: Why samples cannot share sweeps, where two of them show it.
    """

    ways: dict[str, Working]
    sizes: tuple[int, int]
    jacobian: tuple[int, ...]
    entries: tuple[int, int]
    close: bool
    place: tuple[str, int] | None
    reason: str | None

    @property
    def candidates(self) -> list[str]:
        """The ways that `mode="auto"` may go."""
        rows, columns = self.entries
        if self.reason is not None:
            return [ALONE]
        if self.place is not None and "split" in self.ways:
            return ["split"]
        both = [way for way in ("reverse", "forward") if way in self.ways]
        return both if self.close or len(both) < 2 else both[:1] if rows <= columns + 1 else both[1:]


@dataclass(frozen=True)
class SamplePlan:
    """What is known before the full call runs.

    Attributes:
        probe: What one and two samples showed.
        count: Samples altogether.
        mode: The mode asked for.
        chunk: Samples to a sweep.
        startup: Bytes that the process takes for its first derivative.
        budget: Bytes allowed.
        allocated: The result is allocated by the call, not given as `out`.
    """

    probe: Probe
    count: int
    mode: str
    chunk: int
    startup: int
    budget: int
    allocated: bool

    @property
    def result(self) -> int:
        """Bytes of the Jacobians."""
        return self.count * self.probe.sizes[0]

    @property
    def kept(self) -> int:
        """Bytes held whatever the chunk is."""
        return self.startup + self.count * self.probe.sizes[1] + (self.result if self.allocated else 0)

    @property
    def ways(self) -> list[str]:
        """The ways that may be gone; the first one is where nothing else is measured."""
        if self.probe.reason is not None or self.count == 1:
            return [ALONE]
        return [self.mode] if self.mode in self.probe.ways else self.probe.candidates

    def fits(self, way: str) -> int:
        """Return how many samples to a sweep fit the budget this way."""
        return self.probe.ways[way].samples(self.budget - self.kept)

    def cached(self, way: str) -> int:
        """Return how many samples to a sweep keep what is worked on in the processor's caches."""
        return max(_LEAST, int(_CACHE / max(self.probe.ways[way].each, 1.0)))

    def peak(self, way: str) -> int:
        """Return the bytes held at once this way."""
        return self.kept + self.probe.ways[way].bytes(1 if way == ALONE else self.chunk)

    def parts(self) -> dict[str, float]:
        """Return the bytes by what they are, for a refusal."""
        parts: dict[str, float] = {}
        if self.allocated:
            parts[f"the Jacobian {(self.count, *self.probe.jacobian)}"] = self.result
        parts["working memory of one sample"] = min(self.probe.ways[way].bytes(1) for way in self.ways)
        if self.startup:
            parts["what torch loads for the first derivative of a process"] = self.startup
        return parts


def is_small(samples: Samples, batch_size: int) -> bool:
    """Say whether a batch is so small that no plan is needed, without looking at the model."""
    many = min(samples.count, batch_size)
    return many * sum(size_of(v[:1]) for v in samples.values) * _GROWTH < 32 * SMALL


def planned(samples: Samples, batch_size: int, budget: Budget, mode: str, allocated: bool = True) -> SamplePlan:
    """Return how a call would go, from runs of one and of two samples, remembered with the trust in the model.

    Args:
        samples: A model and its batch.
        batch_size: Most samples to a sweep.
        budget: Bytes allowed.
        mode: `"auto"`, `"reverse"`, `"forward"` or `"split"`.
        allocated: The call allocates the result.
    """
    startup = startup_bytes(samples.values[0].device)
    allowed = budget_bytes(budget, samples.values[0].device)
    known_here = samples.runner.store([v[:1] for v in samples.values]).known
    known = "probe" if samples.count > 1 else "probe of one sample"
    probe: Probe | None = None if samples.checks in ("always", "strict") else known_here.get(known)
    if probe is None:
        probe = _probe(samples, allowed - startup, allocated)
        if probe.reason != _TOO_LARGE:  # which another budget would not be
            known_here[known] = probe
    plan = SamplePlan(probe, samples.count, mode, 1, startup, allowed, allocated)
    rows = min(plan.fits(way) for way in plan.ways)
    if samples.values[0].device.type == "cpu":
        rows = min(rows, *(plan.cached(way) for way in plan.ways))
    rows = max(1, min(rows, batch_size, samples.count))
    return replace(plan, chunk=math.ceil(samples.count / math.ceil(samples.count / rows)))  # even ones


def ensure_fits(samples: Samples, plan: SamplePlan) -> SamplePlan:
    """Return the plan if it can run.

    Raises:
        MemoryBudgetError: Result and working memory of one sample do not fit.
    """
    if min(plan.fits(way) for way in plan.ways) < 1:
        refuse(samples.call, plan.parts(), plan.budget, SAMPLES_TODO)
    return plan


def _probe(samples: Samples, room: float, allocated: bool) -> Probe:
    one = samples.runner.run([v[:1] for v in samples.values])
    outputs, leaves = one.lin.outputs, one.lin.leaves
    shapes = [o.shape[1:] if o.ndim and o.shape[0] == 1 else o.shape for o in outputs]
    entries = sum(s.numel() for s in shapes), sum(leaf.shape[1:].numel() for leaf in leaves)
    held = sum(s.numel() * o.dtype.itemsize for s, o in zip(shapes, outputs, strict=True))
    sizes = held * entries[1], held
    pairs = [(*s, *leaf.shape[1:]) for s in shapes for leaf in leaves]
    largest = max(pairs, key=lambda shape: torch.Size(shape).numel(), default=())
    alone = samples.count * (held + (sizes[0] if allocated else 0))
    if alone > room:  # no need to see more
        ways, reason, place = {ALONE: Working(0.0, float(sizes[0]), entries[0])}, _TOO_LARGE, None
        return Probe(ways, sizes, largest, entries, False, place, reason)
    reason = _reason(samples, one)
    place = None
    if samples.at is None and len(outputs) == len(leaves) == 1:
        path = narrowest(one.widths, *entries)
        place = (path, one.widths[path] or 0) if path is not None else None
    ways = _ways(samples, one, sizes, place if reason is None else None, reason is None)
    return Probe(ways, sizes, largest, entries, close(*entries), place, reason)


def _reason(samples: Samples, one: Run) -> str | None:
    """Return why samples cannot share a sweep, as far as two of them show."""
    many = min(2, samples.count)
    if many == 1:
        return None
    try:
        two = samples.runner.run([v[:many] for v in samples.values])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if must_surface(error):
            raise
        return "the forward takes no batch"
    reason = unbatchable(two.lin, two.effects, many)
    first = torch.zeros(1, dtype=torch.long)
    pairs = zip(two.lin.outputs, one.lin.outputs, strict=True)
    differences = (differs(a, b, first, two.lin.tolerance) for a, b in pairs)
    return reason or next((with_reads(found, two.effects) for found in differences if found), None)


def _ways(
    samples: Samples, one: Run, sizes: tuple[int, int], place: tuple[str, int] | None, shared: bool
) -> dict[str, Working]:
    rows, columns = counts(one.lin) if shared else (sum(o.numel() for o in one.lin.outputs), 0)
    held, pulled = _measured(samples, one, 1, "reverse")
    pull = max(pulled - held, 1)
    many = one.lin.chunk(rows)
    ways = {ALONE: Working(0.0, max(held, pulled) + many * pull + sizes[0], rows)}
    if not shared or samples.count == 1:
        return ways
    check = 4.0 * (sizes[1] + sum(size_of(leaf) for leaf in one.lin.leaves))  # of samples apart, in a first call
    sweeps = {"reverse": rows, "forward": columns + 1}
    if place is not None:
        sweeps["split"] = 2 * min(place[1] + 1, rows, columns)
    for mode, number in sweeps.items():
        try:
            first, second = (max(_measured(samples, one, r, mode, place)) for r in (1, 2))
        except RouteUnknown:
            continue
        each = max(second - first, 1)
        ways[mode] = Working(max(0.0, first - each), each + check, number)
    return ways


class RouteUnknown(Exception):
    """There is no such route here."""


@restoring
def _measured(
    samples: Samples, one: Run, rows: int, mode: str, place: tuple[str, int] | None = None
) -> tuple[int, int]:
    """Return the most bytes held while running forward, and while taking the first sweeps."""
    values, store, everything = [v[:rows] for v in samples.values], ProofStore("never"), slice(0, rows)
    # Places for results are made outside: they are counted apart, and not touched where nothing is written.
    blocks = [[_room(o, leaf, rows) for leaf in one.lin.leaves] for o in one.lin.outputs]
    with Meter() as meter:
        run = samples.runner.record(values, one.effects)
        forward = meter.peak
        if mode == "split" and place is not None:
            split = samples.runner.split(values, store, one.effects, place[0])
            if split is None or split.head is None:
                raise RouteUnknown
            sweep_split(split.head, split.lin, blocks, everything, limit=2)
        elif any(o.ndim == 0 or o.shape[0] != rows for o in run.lin.outputs):
            run.lin.pull([torch.ones_like(o) for o in run.lin.outputs])
        else:
            sweep(run.lin, blocks, everything, mode, limit=1)
        if mode == "forward" and run.lin.trust.refused("push", "dual"):
            raise RouteUnknown
    return forward, meter.peak


def _room(output: Tensor, leaf: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, *output.shape[1:], *leaf.shape[1:], dtype=output.dtype, device=output.device)
