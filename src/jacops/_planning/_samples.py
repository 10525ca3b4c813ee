"""The plan of Jacobians by samples."""

from __future__ import annotations

from typing import Any

from .._torch.protocol import BY_SAMPLES, Samples, planned
from ._base import Plan, listed


def plan_samples(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `compute_jacobian`, from runs of one and of two samples."""
    options = {name: arguments[name] for name in ("outputs", "at", "checks", "fallback")}
    samples = Samples(arguments["model"], arguments["x"], call="compute_jacobian", **options)
    allocated = arguments["out"] is None
    found = planned(samples, arguments["batch_size"], arguments["budget"], arguments["mode"], allocated)
    return listed(found, BY_SAMPLES, found.result, found.startup, found.budget, "samples to a sweep")
