"""`python -m benchmarks.profiles [NAME:CASE,…]`: where the time of a call goes, beside the shortest program by hand.

For each case that has a contender by hand (`by_hand.py`), both are run in turn under torch's profiler, and the time of
operations is summed by kind; what is left is Python, torch's engine and dispatch. One thread, the quickest of ten
calls for each figure: the machine should be idle.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .by_hand import HAND
from .groups import select
from .harness import OURS, Workload
from .report import note

GROUPS = ["input_jacobians", "parameter_jacobians", "products", "curvature", "small_calls"]
CALLS = 10  # of each contender
KINDS = {
    "convolutions": ("conv", "mkldnn"),
    "matrix products": ("mm", "bmm", "addbmm", "baddbmm", "einsum", "linear", "dot", "mv"),
    "copies, joining, filling": ("copy_", "cat", "stack", "fill_", "zero_", "clone", "empty", "resize_", "index"),
}
REST = "other operations"
OUTSIDE = "outside of operations"


def kind_of(name: str) -> str:
    """Return what an operation is counted as."""
    plain = name.rpartition("::")[2]
    return next((kind for kind, words in KINDS.items() if any(word in plain for word in words)), REST)


def spent(call: Callable[[], Any]) -> Counter[str]:
    """Return the microseconds of one call by kinds of operations."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    by_kind = Counter[str]()
    for event in found.key_averages():
        if event.key.startswith("aten::"):
            by_kind[kind_of(event.key)] += event.self_cpu_time_total
    return by_kind


def seconds(call: Callable[[], Any]) -> float:
    """Return the microseconds of one call, without the profiler."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def columns(workload: Workload) -> dict[str, dict[str, float]]:
    """Return for our first contender and those by hand: time by kind, and of the whole call."""
    calls = {name: call for name, call in workload.rivals.items() if name.startswith(HAND)}
    ours = next(name for name in workload.rivals if name.startswith(OURS))
    calls = {ours: workload.rivals[ours], **calls}
    kinds: dict[str, list[Counter[str]]] = {name: [] for name in calls}
    whole: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            whole[name].append(seconds(call))
            kinds[name].append(spent(call))
    found: dict[str, dict[str, float]] = {}
    for name in calls:
        own = {kind: min(each[kind] for each in kinds[name]) for kind in (*KINDS, REST)}
        total = min(whole[name])
        found[name] = {**own, OUTSIDE: max(0.0, total - sum(own.values())), "the call": total}
    return found


def table(workload: Workload) -> Iterator[str]:
    """Yield the lines of one case."""
    found = columns(workload)
    yield f"\n{workload.name}  {workload.what}, µs a call"
    yield "  " + " " * 26 + "".join(f"{name[:34]:>36s}" for name in found)
    for kind in (*KINDS, REST, OUTSIDE, "the call"):
        yield f"  {kind:26s}" + "".join(f"{own[kind]:36,.0f}" for own in found.values())


def main() -> None:
    """Profile the cases that are asked for, all that have a contender by hand by default."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, cases in select(sys.argv[1:] or GROUPS):
        for workload in importlib.import_module(f"benchmarks.bench_{name}").workloads():
            by_hand = any(rival.startswith(HAND) for rival in workload.rivals)
            if by_hand and (not cases or workload.name in cases):
                for line in table(workload):
                    note(line)


if __name__ == "__main__":
    main()
