"""How many samples to a sweep: working memory measured on runs of one and of two samples, then extended as a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._ladder.failures import succeeds
from ..._ladder.names import Question
from ..._ladder.plan import Memory
from ..._ladder.route import candidates
from ..._runtime.memory import SMALL, Budget, Meter, budget_bytes, live, refuse, resident, size_of, startup_bytes
from ..._runtime.restoring import restoring
from ..sweeps.linearization import Linearization
from ..sweeps.mixing import batched, differs, unbatchable, with_reads
from ..sweeps.proofs import Proofs
from .ask import ONE_SAMPLE
from .bottleneck import narrowest
from .results import SAMPLES_TODO
from .routes import BY_SAMPLES
from .runs import Run
from .sweeps import sweep

if TYPE_CHECKING:
    from .batch import Samples

ALONE = "one by one"
_TOO_LARGE = "the result does not fit"

# No model is expected to hold more bytes at once than so many times those of its input.
_GROWTH = 2**16

# Sweeps over more bytes than this read everything from memory: 1.2 to 1.5 times slower on perceptrons, convolutions and
# attention. Fewer samples than the least do not fill kernels.
_CACHE, _LEAST = 2**24, 16
_FOLLOWED = 2**28  # bytes of a run beside: it then takes 100 times as long as what is done once a run (2 ms)


@dataclass(frozen=True)
class Working:
    """Bytes held besides the result while a batch is swept: `fixed + each * samples`.

    Attributes:
        fixed: What does not depend on the number of samples.
        each: What every sample adds.
    """

    fixed: float
    each: float

    def bytes(self, samples: int) -> int:
        """Return what so many samples take."""
        return resident(self.fixed + self.each * samples)

    def samples(self, room: float) -> int:
        """Return how many samples fit into `room` bytes."""
        return int((live(room) - self.fixed) // max(self.each, 1.0))


@dataclass(frozen=True)
class Beside:
    """What a call holds beside Jacobians and sweeps.

    Attributes:
        arrays: Arrays as large as the Jacobians.
        run: Runs once more, after the sweeps, over so many samples.
        known: Under which key it is known what that run holds.
    """

    arrays: int = 0
    run: Callable[[int], object] | None = None
    known: str = ""

    def measured(self, count: int) -> Working:
        """Return what a run holds, by one over one and one over two samples."""
        if self.run is None:
            return Working(0.0, 0.0)
        self.run(1)  # tables that are made once are nobody's working memory
        peaks = [_peak(self.run, rows) for rows in range(1, min(2, count) + 1)]
        each = max(peaks[-1] - peaks[0], 1) if count > 1 else peaks[0]
        return Working(max(0.0, peaks[0] - each), each)


@restoring
def _peak(run: Callable[[int], object], rows: int) -> int:
    with Meter() as meter:
        run(rows)
    return meter.peak


@dataclass(frozen=True)
class Probe:
    """What runs of one and of two samples show.

    Attributes:
        ways: Working memory by mode; `"one by one"` is a sample alone.
        sizes: Bytes of one sample's Jacobians, of its outputs.
        jacobian: Shape of the largest Jacobian of one sample.
        entries: Entries of a sample's outputs and inputs.
        place: Where a split saves sweeps, and how wide it is.
        reason: Why samples cannot share sweeps, where two of them show it.
    """

    ways: dict[str, Working]
    sizes: tuple[int, int]
    jacobian: tuple[int, ...]
    entries: tuple[int, int]
    place: tuple[str, int] | None
    reason: str | None


@dataclass(frozen=True)
class SamplePlan(Probe):
    """What is known before the full call runs; routes answer it as they answer a batch.

    Attributes:
        call: The public call.
        count: Samples altogether.
        mode: The mode requested.
        chunk: Samples to a sweep.
        startup: Bytes that the process takes for its first derivative.
        budget: Bytes allowed.
        allocated: The Jacobians are allocated by the call, not given as `out`.
        arrays: Arrays of the size of the Jacobians that the call allocates beside.
        beside: Working memory of a run beside.
        followed: Samples to such a run, if there is one.
    """

    call: str
    count: int
    mode: str
    chunk: int
    startup: int
    budget: int
    allocated: bool
    arrays: int
    beside: Working
    followed: int = 1

    question, argument = Question.SAMPLES, "mode="
    verdicts = Proofs("never")  # nothing is known of a batch not recorded

    @property
    def asked(self) -> str | None:
        """The route requested by name."""
        return None if self.mode == "auto" else self.mode

    @property
    def apart(self) -> str | None:
        """Why samples do not share sweeps."""
        return self.reason or (ONE_SAMPLE if self.count == 1 else None)

    @property
    def unpushable(self) -> str | None:
        """Why there are no pushes."""
        return None if "forward" in self.ways else "no second derivative rule"

    def memory(self, route: str) -> Memory | None:
        """Return what a route holds; None where that was not measured."""
        return Memory(1 if route == ALONE else self.chunk, self.peak(route)) if route in self.ways else None

    @property
    def route(self) -> str:
        """The name of the route that will be taken, of those whose memory was measured."""
        return next(route.name for route, _ in candidates(self, BY_SAMPLES) if route.name in self.ways)

    @property
    def result(self) -> int:
        """Bytes of the Jacobians, and of what is as large."""
        return self.count * self.sizes[0] * (1 + self.arrays)

    @property
    def kept(self) -> int:
        """Bytes held whatever the chunk is."""
        arrays = self.arrays + self.allocated
        return self.startup + self.count * (self.sizes[1] + arrays * self.sizes[0])

    @property
    def fits(self) -> int:
        """How many samples to a sweep fit the budget."""
        room = self.budget - self.kept
        return self.ways[self.route].samples(room) if self.beside.samples(room) >= 1 else 0

    @property
    def cached(self) -> int:
        """How many samples to a sweep keep what is worked on in the processor's caches."""
        return max(_LEAST, int(_CACHE / max(self.ways[self.route].each, 1.0)))

    def peak(self, way: str) -> int:
        """Return the bytes held at once this way."""
        swept = self.ways[way].bytes(1 if way == ALONE else self.chunk)
        return self.kept + max(swept, self.beside.bytes(self.followed))

    def parts(self) -> dict[str, float]:
        """Return the bytes by what they are, for a refusal."""
        parts: dict[str, float] = {}
        if self.allocated:
            parts[f"the Jacobian {(self.count, *self.jacobian)}"] = self.count * self.sizes[0]
        if self.arrays:
            parts["contributions of its shape"] = self.arrays * self.count * self.sizes[0]
        parts["working memory of one sample"] = max(self.ways[self.route].bytes(1), self.beside.bytes(1))
        if self.startup:
            parts["what torch loads for the first derivative of a process"] = self.startup
        return parts


def is_small(samples: Samples) -> bool:
    """Return whether a batch is so small that no plan is needed, without looking at the model."""
    many = min(samples.count, samples.batch_size)
    return many * sum(size_of(v[:1]) for v in samples.values) * _GROWTH < 32 * SMALL


def planned(samples: Samples, budget: Budget, mode: str, allocated: bool = True) -> SamplePlan:
    """Return how a call would go, from runs of one and of two samples, kept with the proofs about the model.

    Args:
        samples: A model and its batch.
        budget: Bytes allowed.
        mode: `"auto"`, `"reverse"`, `"forward"` or `"split"`.
        allocated: The call allocates the result.
    """
    startup, allowed = startup_bytes(samples.values[0].device), budget_bytes(budget, samples.values[0].device)
    count = samples.count
    if not count:  # of the shapes of one sample
        samples = samples.over([value.new_zeros((1, *value.shape[1:])) for value in samples.values])
    known_here = samples.runner.store([v[:1] for v in samples.values]).known
    known = "probe" if samples.count > 1 else "probe of one sample"
    kept = samples.checks not in ("always", "strict")
    probe: Probe | None = known_here.get(known) if kept else None
    if probe is None:
        probe = _probe(samples, allowed - startup, samples.beside.arrays + allocated)
        if probe.reason != _TOO_LARGE:  # which another budget would not be
            known_here[known] = probe
    name = f"{known}, {samples.beside.known}"
    beside = Working(0.0, 0.0) if probe.reason == _TOO_LARGE else known_here.get(name) if kept else None
    if beside is None:
        beside = known_here[name] = samples.beside.measured(samples.count)
    plan = SamplePlan(
        **vars(probe),
        call=samples.call,
        count=count,
        mode=mode,
        chunk=1,
        startup=startup,
        budget=allowed,
        allocated=allocated,
        arrays=samples.beside.arrays,
        beside=beside,
    )
    # Chunks that fit the cache are faster on a processor; a device takes what fits its memory.
    rows = min(plan.fits, plan.cached) if samples.values[0].device.type == "cpu" else plan.fits
    most = min(beside.samples(allowed - plan.kept), int(_FOLLOWED / max(beside.each, 1.0)), samples.batch_size)
    followed = 1 if plan.apart else _evenly(count, most)
    return replace(plan, chunk=_evenly(count, min(rows, samples.batch_size)), followed=followed)


def remembered_plan(samples: Samples, budget: Budget, mode: str, allocated: bool) -> SamplePlan:
    """Return the plan of a call that is about to run, as `planned` does.

    Where an earlier one needed so little that every machine has it, it holds whatever is free now: reading that takes
    as long as a small call.

    Raises:
        MemoryBudgetError: The tensors do not fit the budget; nothing was allocated.
    """
    if budget is not None or not samples.count or samples.values[0].device.type != "cpu":
        return ensure_fits(samples, planned(samples, budget, mode, allocated))
    beside = samples.beside
    question = "plan", samples.count, samples.batch_size, mode, allocated, beside.arrays, beside.known
    known = samples.runner.store([v[:1] for v in samples.values]).known
    found: SamplePlan | None = known.get(question)
    if found is None:
        found = ensure_fits(samples, planned(samples, budget, mode, allocated))
        wanted = min(found.cached, samples.batch_size, samples.count)
        # What torch loads for the first derivative is there by the next call.
        if wanted <= found.fits and found.peak(found.route) - found.startup <= SMALL:
            known[question] = found
    return found


def _evenly(count: int, most: int) -> int:
    """Return how many of `count` go together in chunks of one size, of at most `most`."""
    return math.ceil(count / math.ceil(count / max(1, min(most, count)))) if count else 1


def ensure_fits(samples: Samples, plan: SamplePlan) -> SamplePlan:
    """Return the plan if it can run.

    Raises:
        MemoryBudgetError: Result and working memory of one sample do not fit.
    """
    if plan.fits < 1:
        refuse(samples.call, plan.parts(), plan.budget, SAMPLES_TODO)
    return plan


def _probe(samples: Samples, room: float, arrays: int) -> Probe:
    """Return what a run of one sample shows, and a run of two where the result fits and they may share sweeps.

    Args:
        samples: A model and its batch.
        room: Bytes for results and work.
        arrays: How many arrays of the Jacobians' size are allocated.
    """
    one, held = _recorded(samples, 1)
    outputs, leaves = one.lin.outputs, one.lin.leaves
    shapes = [o.shape[1:] if o.ndim and o.shape[0] == 1 else o.shape for o in outputs]
    entries = sum(s.numel() for s in shapes), sum(leaf.shape[1:].numel() for leaf in leaves)
    given = sum(s.numel() * o.dtype.itemsize for s, o in zip(shapes, outputs, strict=True))
    sizes = given * entries[1], given
    pairs = [(*s, *leaf.shape[1:]) for s in shapes for leaf in leaves]
    largest = max(pairs, key=lambda shape: torch.Size(shape).numel(), default=())
    if samples.count * (given + arrays * sizes[0]) > room:  # no need to see more
        return Probe({ALONE: Working(0.0, float(sizes[0]))}, sizes, largest, entries, None, _TOO_LARGE)
    peaks = _swept(one.lin, held, 1)
    pull, many = max(peaks["reverse"] - held, 1), one.lin.chunk(entries[0])
    ways = {ALONE: Working(0.0, max(held, *peaks.values()) + many * pull + sizes[0])}
    if samples.count == 1:
        return Probe(ways, sizes, largest, entries, None, None)
    two, reason = _two(samples, one)
    if reason is not None:
        return Probe(ways, sizes, largest, entries, None, reason)
    check = 4.0 * (sizes[1] + sum(size_of(leaf) for leaf in leaves))  # of samples apart, in a first call
    for name, peak in two.items():
        each = max(peak - peaks[name], 1)
        ways[name] = Working(max(0.0, peaks[name] - each), each + check)
    place = None
    if samples.at is None and len(outputs) == len(leaves) == 1:
        path = narrowest(one.widths, *entries)
        place = None if path is None else (path, one.widths[path] or 0)
    if place is not None:  # the same graph in two parts, and the two factors of the result, which pushes stage
        factors = 2 * place[1] * sum(entries) * outputs[0].dtype.itemsize
        ways["split"] = replace(ways["reverse"], each=ways["reverse"].each + factors)
    return Probe(ways, sizes, largest, entries, place, None)


def _two(samples: Samples, one: Run) -> tuple[dict[str, int], str | None]:
    """Return the bytes held at most for two samples, and why they cannot share sweeps as far as a run shows."""
    found = batched(lambda: _recorded(samples, 2), 2)
    if isinstance(found, str):
        return {}, found
    two, held = found
    first, pairs = torch.zeros(1, dtype=torch.long), zip(two.lin.outputs, one.lin.outputs, strict=True)
    differences = (differs(a, b, first, two.lin.tolerance) for a, b in pairs)
    reason = unbatchable(two.lin, two.effects, 2)
    reason = reason or next((with_reads(found, two.effects) for found in differences if found), None)
    return ({} if reason else _swept(two.lin, held, 2)), reason


@restoring
def _recorded(samples: Samples, rows: int) -> tuple[Run, int]:
    """Record some samples, and return the bytes that are held."""
    with Meter() as meter:
        run = samples.runner.run([v[:rows] for v in samples.values])
    return run, meter.peak


@restoring
def _swept(lin: Linearization, held: int, rows: int) -> dict[str, int]:
    """Return the bytes held at most in the first sweep of each direction that there is."""
    if any(o.ndim == 0 or o.shape[0] != rows for o in lin.outputs):
        with Meter() as sweeping:
            lin.pull([torch.ones_like(o) for o in lin.outputs])
        return {"reverse": held + sweeping.peak}
    # Places for results are allocated outside: they are counted separately, and take no memory until they are written.
    blocks, peaks = [[_room(o, leaf, rows) for leaf in lin.leaves] for o in lin.outputs], {}
    for direction in ("reverse", "forward"):
        with Meter() as sweeping:
            there = succeeds(partial(sweep, lin, blocks, slice(0, rows), direction, limit=1))
        peaks |= {direction: held + sweeping.peak} if there else {}
    return peaks


def _room(output: Tensor, leaf: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, *output.shape[1:], *leaf.shape[1:], dtype=output.dtype, device=output.device)
