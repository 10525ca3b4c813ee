"""The plan of Jacobians by samples."""

from __future__ import annotations

from typing import Any

from .._torch.protocol import ALONE, SamplePlan, Samples, planned
from ._base import Plan, table


def plan_samples(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `compute_jacobian`, from runs of one and of two samples."""
    options = {name: arguments[name] for name in ("outputs", "at", "checks", "fallback")}
    samples = Samples(arguments["model"], arguments["x"], call="compute_jacobian", **options)
    mode, allocated = arguments["mode"], arguments["out"] is None
    found = planned(samples, arguments["batch_size"], arguments["budget"], mode, allocated)
    chosen = max(found.ways, key=lambda way: found.probe.ways[way].bytes(found.chunk))
    routes: dict[str, tuple[int | None, int | None, str]] = {}
    for way in ("reverse", "forward", "split", ALONE):
        working = found.probe.ways.get(way)
        sweeps = None if working is None else working.sweeps
        peak = None if working is None else found.peak(way)
        routes[way] = sweeps, peak, _why(found, way, chosen)
    return Plan(
        "compute_jacobian",
        table(routes, chosen),
        found.result,
        found.startup,
        found.budget,
        1 if chosen == ALONE else found.chunk,
        "samples to a sweep",
    )


def _why(plan: SamplePlan, way: str, chosen: str) -> str:
    probe = plan.probe
    if way == ALONE:
        return (probe.reason or "one sample") if chosen == ALONE else "samples share sweeps unless the check refutes it"
    if chosen == ALONE:
        return "needs samples that share sweeps"
    if way not in probe.ways:
        return "no narrow layer that everything passes" if way == "split" else "no second derivative rule"
    if plan.mode == way:
        return "asked for by `mode=`"
    if way in plan.ways:
        return "timed against the other direction" if len(plan.ways) > 1 else "fewest sweeps"
    return "not asked for by `mode=`" if plan.mode != "auto" else "more sweeps"
