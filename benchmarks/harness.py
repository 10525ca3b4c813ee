"""How a workload is measured: answers compared, rivals interleaved, medians and peak memory as JSON lines."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import jacops

OURS = "jacops"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Workload:
    """One question and everybody who answers it.

    Attributes:
        name: Short id, such as `A1`.
        what: One line for the table.
        rivals: Callables by name; those that start with `jacops` are ours.
        close: Says whether two answers are the same; None where answers are of different kinds.
        rounds: How often each is run, interleaved.
        goals: Least ratio of a rival's time to ours, by rival.
    """

    name: str
    what: str
    rivals: dict[str, Callable[[], Any]]
    close: Callable[[Any, Any], bool] | None = None
    rounds: int = 5
    goals: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What one contender took.

    Attributes:
        workload: The workload's id.
        rival: Who.
        seconds: Median over the rounds.
        spread: Slowest over fastest round.
        peak_mib: Resident memory beyond that before one call, at its highest.
        ratio: Its time over ours.
        goal: The least ratio asked for, if one is.
        error: Why there are no figures.
    """

    workload: str
    rival: str
    seconds: float | None = None
    spread: float | None = None
    peak_mib: float | None = None
    ratio: float | None = None
    goal: float | None = None
    error: str | None = None


def measure(workload: Workload) -> list[Measured]:
    """Run a workload and return a row per contender, ours first."""
    answers, errors = {}, {}
    for name, call in workload.rivals.items():
        try:
            answers[name] = call()
        except Exception as error:  # a rival that cannot is a finding, not a failure of the run
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    reference = next((answers[n] for n in answers if n.startswith(OURS)), None)
    for name, answer in answers.items():
        if workload.close is not None and not workload.close(reference, answer):
            errors[name] = "another answer"
    answers.clear()
    alive = {n: c for n, c in workload.rivals.items() if n not in errors}
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(workload.rounds):
        for name, call in alive.items():
            times[name].append(_timed(call))
    peaks = {name: peak_mib(call) for name, call in alive.items()}
    ours = min((statistics.median(t) for n, t in times.items() if n.startswith(OURS)), default=None)
    rows = []
    for name in workload.rivals:
        if name in errors:
            rows.append(Measured(workload.name, name, error=errors[name]))
            continue
        median = statistics.median(times[name])
        ratio = median / ours if ours else None
        spread = max(times[name]) / min(times[name])
        rows.append(Measured(workload.name, name, median, spread, peaks[name], ratio, workload.goals.get(name)))
    return rows


def _timed(call: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_mib(call: Callable[[], Any]) -> float | None:
    """Return how far resident memory rises during one call, in MiB; None where the system does not tell."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # start the high-water mark anew
        before = _status("VmRSS")
        call()
        return max(0.0, (_status("VmHWM") - before) / 1024)
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "jacops": jacops.__version__,
        "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def run(workloads: Iterator[Workload], name: str) -> list[Measured]:
    """Measure workloads one after the other, print a table and append JSON lines to `results/NAME.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    about, rows = machine(), []
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        for workload in workloads:
            print(f"\n{workload.name}  {workload.what}")
            for row in measure(workload):
                print(told(row), flush=True)
                file.write(json.dumps({**asdict(row), **about}, allow_nan=False) + "\n")
                rows.append(row)
    return rows


def told(row: Measured) -> str:
    """Return a row of the table."""
    if row.error is not None:
        return f"  {row.rival:38s} {row.error}"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:8.0f} MiB"
    ratio = "" if row.ratio is None else f"{row.ratio:8.2f} ×"
    goal = "" if row.goal is None else f"  goal {row.goal:g} ×: {'met' if (row.ratio or 0) >= row.goal else 'missed'}"
    return f"  {row.rival:38s} {1e3 * (row.seconds or 0):10.1f} ms {peak} {ratio}{goal}"


def same(tolerance: float = 1e-3) -> Callable[[Any, Any], bool]:
    """Return a comparison of tensors, or of lists of them, by relative distance."""

    def close(a: Any, b: Any) -> bool:
        left, right = (torch.cat([t.reshape(-1).double() for t in _listed(v)]) for v in (a, b))
        return left.shape == right.shape and float((left - right).norm()) <= tolerance * float(left.norm() + 1e-30)

    return close


def _listed(value: Any) -> list[torch.Tensor]:
    return [t for v in value for t in _listed(v)] if isinstance(value, list | tuple) else [value.detach()]
