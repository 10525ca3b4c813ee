"""One plot: how many times longer each rival takes than we do, workload by workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of a canvas without a window

from .harness import OURS  # noqa: E402

Row = dict[str, Any]


def ratios(rows: list[Row], path: Path) -> None:
    """Draw rivals' times over ours on a logarithmic axis, one line per workload, goals as marks."""
    timed = [r for r in rows if r["ratio"] and not r["rival"].startswith(OURS)]
    cases = {r["workload"]: r["what"] for r in timed}
    if not cases:
        return
    places = {name: -i for i, name in enumerate(cases)}
    families = sorted({_family(r["rival"]) for r in timed})
    colours = dict(zip(families, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.3 * len(cases)))
    for family in families:
        own = [r for r in timed if _family(r["rival"]) == family]
        x, y = [r["ratio"] for r in own], [places[r["workload"]] for r in own]
        axes.scatter(x, y, s=26, color=colours.get(family, "black"), label=family, zorder=3)
    _goals(axes, rows, places)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(list(places.values()), [f"{name}  {what}"[:62] for name, what in cases.items()], fontsize=7)
    axes.set_ylim(min(places.values()) - 0.7, 0.7)
    axes.set_xlabel("time of a rival / time of jacops (first contender)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def _goals(axes: Any, rows: list[Row], places: dict[str, int]) -> None:
    """Mark the goals of our first contender beside a rival that was timed."""
    first = {}
    for row in rows:
        if row["rival"].startswith(OURS):
            first.setdefault(row["workload"], row["rival"])
    label: str | None = "goal"
    for row in rows:
        for goal in row["goals"]:
            words = goal["wanted"].split()
            if words[-1] == "faster" and goal["ours"] == first.get(row["workload"]) and row["ratio"]:
                x, y = float(words[1]), places[row["workload"]]
                axes.plot([x, x], [y - 0.4, y + 0.4], color="red", linewidth=1.5, zorder=2, label=label)
                label = None


def _family(rival: str) -> str:
    return rival.split(":")[0]
