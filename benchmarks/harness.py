"""How a workload is measured: answers compared, rivals interleaved with samples of the machine's own speed."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .machine import CLOCKS, Clock, Rates, machine, timed, watched

__all__ = ["BEST", "FLOOR", "OURS", "RESULTS", "Goal", "Measured", "Workload", "machine", "measure", "same"]

OURS = "jacops"
FLOOR = "the floor"
BEST = "the fastest rival"
RESULTS = Path(__file__).parent / "results"
SLOW = 6.0  # seconds of a first call after which a contender is not run again
QUICK = 0.5  # seconds that rounds beyond a workload's own may take, since quick calls suffer most from neighbours
MOST = 25
ROUND = 0.02  # seconds of a round at least, by repeated calls, as a loop of such calls takes them
MOST_CALLS = 50


@dataclass(frozen=True)
class Goal:
    """What one of our contenders is to reach; only what is given counts.

    Attributes:
        rival: Beside whom: a contender, `FLOOR`, or `BEST`.
        faster: Least ratio of the rival's time to ours.
        memory: Most that our peak may be of the rival's.
        mib: Most that our peak may be, in MiB, whatever the rival's.
        ours: Which of ours is meant; the first by default.
    """

    rival: str = ""
    faster: float | None = None
    memory: float | None = None
    mib: float | None = None
    ours: str = ""


@dataclass(frozen=True)
class Workload:
    """One question and everybody who answers it.

    Attributes:
        name: Short id, such as `A1`.
        what: One line for the table.
        rivals: Callables by name, the one that ratios refer to first; those that start with `jacops` are ours.
            Others are named `package: call`.
        close: Says whether two answers are the same; None where answers are of different kinds.
        rounds: How often each is run at least, interleaved; quick ones more often, slow ones once.
        goals: Least ratios of a rival's time to our first contender's, by rival; or goals in full.
        flops: Floating-point operations that no way of answering saves.
        result_bytes: Bytes of the answer.
        dtype: Of the arithmetic.
        compiles: First calls compile, and say nothing of others.
    """

    name: str
    what: str
    rivals: dict[str, Callable[[], Any]]
    close: Callable[[Any, Any], bool] | None = None
    rounds: int = 5
    goals: dict[str, float] | Sequence[Goal] = field(default_factory=dict)
    flops: float = 0.0
    result_bytes: float = 0.0
    dtype: torch.dtype = torch.float32
    compiles: bool = False

    @property
    def all_goals(self) -> list[Goal]:
        """The goals in full."""
        if isinstance(self.goals, dict):
            return [Goal(rival, faster=least) for rival, least in self.goals.items()]
        return list(self.goals)


@dataclass
class Measured:
    """What one contender took.

    Attributes:
        workload: The workload's id.
        rival: Who.
        seconds: Median over the rounds of a call's time; a round of a quick call repeats it after a first call.
        cold: Median over the rounds of the first call's time, when processor caches hold what others used.
        fastest: The quickest round, which a shared machine disturbs least.
        spread: Slowest over fastest round.
        runs: How many rounds there were.
        peak_mib: Resident memory beyond that before one call, at its highest, the answer included.
        ratio: Its time over that of our first contender.
        floor: Its time over the floor's.
        goals: What was wanted here, what was reached, and whether that is enough.
        error: Why there are no figures.
    """

    workload: str
    rival: str
    seconds: float | None = None
    cold: float | None = None
    fastest: float | None = None
    spread: float | None = None
    runs: int = 0
    peak_mib: float | None = None
    ratio: float | None = None
    floor: float | None = None
    goals: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


class Contender:
    """A call, what it took so far, and why it is out if it is."""

    def __init__(self, name: str, call: Callable[[], Any], clock: Clock) -> None:
        self.name, self.call, self.clock = name, call, clock
        self.times: list[float] = []
        self.cold: list[float] = []
        self.peak: float | None = None
        self.rounds = 0
        self.error: str | None = None

    def begin(self, rounds: int, compiles: bool = False) -> Any:
        """Make the first call, which imports and warms up; return its answer.

        Args:
            rounds: How many are wanted at least.
            compiles: A call before it is not counted.
        """
        try:
            if compiles:
                self.call()
            answer, seconds, self.peak = watched(self.call, self.clock)
        except ModuleNotFoundError as error:
            self.error = f"not installed: {error.name}"
        except Exception as error:  # a rival that cannot is a finding, not a failure of the run
            self.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        else:
            self.times = [seconds] if seconds > SLOW else []
            self.rounds = 0 if self.times else max(rounds, min(MOST, int(QUICK / seconds)))
            return answer
        return None

    def run(self) -> None:
        """Take the time of one call, or of as many as fill a round, the first of which is for itself."""
        gc.collect()
        spent = [timed(self.call, self.clock)]
        while sum(spent) < ROUND and len(spent) < MOST_CALLS:
            spent.append(timed(self.call, self.clock))
        self.cold.append(spent[0])
        self.times.append(statistics.mean(spent[1:] or spent))

    def row(self, workload: str) -> Measured:
        """Return what was measured."""
        if self.error is not None:
            return Measured(workload, self.name, error=self.error)
        fastest, median = min(self.times), statistics.median(self.times)
        spread, runs = max(self.times) / fastest, len(self.times)
        cold = statistics.median(self.cold or self.times)
        return Measured(workload, self.name, median, cold, fastest, spread, runs, self.peak)


def measure(workload: Workload, rounds: int | None = None, clock: str = "wall") -> tuple[list[Measured], Rates]:
    """Run a workload; return a row per contender, in their order, and the machine's rates in the same rounds."""
    tell = CLOCKS[clock]
    contenders = [Contender(name, call, tell) for name, call in workload.rivals.items()]
    least = rounds or workload.rounds
    _compare(contenders, workload, least)
    rates = Rates(workload.dtype, tell)
    for i in range(max([least, *(c.rounds for c in contenders)])):
        rates.sample()
        for contender in (c for c in contenders if i < c.rounds):
            contender.run()
    for contender in (c for c in contenders if c.rounds):
        contender.peak = watched(contender.call, tell)[2]
    rows = [c.row(workload.name) for c in contenders]
    headline = next((r.seconds for r in rows if r.rival.startswith(OURS)), None)
    floor = rates.floor(workload.flops, workload.result_bytes)
    for row in rows:
        if row.seconds is not None:
            row.ratio = row.seconds / headline if headline else None
            row.floor = row.seconds / floor if floor else None
    for goal in workload.all_goals:
        _judge(goal, rows)
    return rows, rates


def _compare(contenders: list[Contender], workload: Workload, rounds: int) -> None:
    """Make everybody's first call and put out who answers otherwise than the first who answers."""
    reference = None
    for contender in contenders:
        answer = contender.begin(rounds, workload.compiles)
        if contender.error is None and workload.close is not None:
            reference = answer if reference is None else reference
            if not workload.close(reference, answer):
                contender.error = "another answer"


def _judge(goal: Goal, rows: list[Measured]) -> None:
    """Note with the row that a goal concerns what was wanted and what was reached."""
    own = next((r for r in rows if r.rival == goal.ours or (not goal.ours and r.rival.startswith(OURS))), None)
    others = [r for r in rows if not r.rival.startswith(OURS) and r.seconds is not None]
    beside = min(others, key=lambda r: r.seconds or 0.0, default=None) if goal.rival == BEST else None
    beside = beside or next((r for r in rows if r.rival == goal.rival and r.seconds is not None), None)
    if own is None or (goal.rival not in ("", FLOOR) and beside is None):
        return  # nobody to compare with
    rival = beside or own
    about = {"ours": own.rival, "beside": FLOOR if goal.rival == FLOOR else "" if rival is own else rival.rival}

    def note(wanted: str, reached: float | None, least: bool, bound: float, fastest: float | None = None) -> None:
        met = reached is not None and (reached >= bound if least else reached <= bound)
        rival.goals.append({**about, "wanted": wanted, "reached": reached, "fastest": fastest, "met": met})

    if goal.faster is not None and goal.rival == FLOOR:
        note(f"≤ {1 / goal.faster:.3g} × the floor", own.floor, False, 1 / goal.faster)
    elif goal.faster is not None:
        ratios = _ratio(rival.seconds, own.seconds), _ratio(rival.fastest, own.fastest)
        note(f"≥ {goal.faster:.3g} × faster", ratios[0], True, goal.faster, ratios[1])
    if goal.memory is not None:
        note(f"≤ {goal.memory:.3g} of its memory", _ratio(own.peak_mib, rival.peak_mib), False, goal.memory)
    if goal.mib is not None:
        note(f"peak ≤ {goal.mib:.3g} MiB", own.peak_mib, False, goal.mib)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def same(tolerance: float = 1e-3) -> Callable[[Any, Any], bool]:
    """Return a comparison of tensors, operators, or lists of them, by relative distance."""

    def close(a: Any, b: Any) -> bool:
        left, right = (torch.cat([t.reshape(-1).double() for t in _listed(v)]) for v in (a, b))
        return left.shape == right.shape and float((left - right).norm()) <= tolerance * float(left.norm() + 1e-30)

    return close


def curvlinops_module() -> Any:
    """Return curvlinops, from version 3 on; the tests install 2 for laplace-torch, whose operators take NumPy arrays.

    Raises:
        ModuleNotFoundError: It is not there, or older.
    """
    import curvlinops

    if int(version("curvlinops-for-pytorch").partition(".")[0]) < 3:
        raise ModuleNotFoundError("an older curvlinops is installed", name="curvlinops 3")
    return curvlinops


def _listed(value: Any) -> list[torch.Tensor]:
    if isinstance(value, list | tuple):
        return [t for v in value for t in _listed(v)]
    # An operator is known by what it does: checkouts that are compared may have its class in different places.
    return [value.detach() if isinstance(value, torch.Tensor) else value.dense()]
