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
    palette = plt.get_cmap("tab10" if len(families) <= 10 else "tab20")
    colours = {family: palette(i % palette.N) for i, family in enumerate(families)}
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.3 * len(cases)))
    for family in families:
        own = [r for r in timed if _family(r["rival"]) == family]
        x, y = [r["ratio"] for r in own], [places[r["workload"]] for r in own]
        axes.scatter(x, y, s=26, color=colours[family], label=family, zorder=3, alpha=0.85, linewidths=0)
    _goals(axes, rows, places, colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvspan(0, 1, color="black", alpha=0.05, linewidth=0)
    axes.set_xscale("log")
    above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 7}
    axes.annotate("jacops is faster →", (1, 1), (4, 4), **above)
    axes.annotate("← a rival is faster", (1, 1), (-4, 4), ha="right", **above)
    axes.set_yticks(list(places.values()), [_short(f"{name}  {what}") for name, what in cases.items()], fontsize=7)
    axes.set_ylim(min(places.values()) - 0.7, 0.7)
    axes.set_xlabel("time of a rival / time of jacops (first contender)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def _goals(axes: Any, rows: list[Row], places: dict[str, int], colours: dict[str, Any]) -> None:
    """Mark the goals of our first contender, in the colour of the rival; black beside another call of ours."""
    first = {}
    for row in rows:
        if row["rival"].startswith(OURS):
            first.setdefault(row["workload"], row["rival"])
    for row in [r for r in rows if r["workload"] in places]:
        for goal in row["goals"]:
            words = goal["wanted"].split()
            if words[-1] == "faster" and goal["ours"] == first.get(row["workload"]) and row["ratio"]:
                x, y = float(words[1]), places[row["workload"]]
                axes.plot(
                    [x, x],
                    [y - 0.4, y + 0.4],
                    color=colours.get(_family(goal["beside"]), "black"),
                    linewidth=2,
                    zorder=2,
                )
    axes.plot([], [], color="grey", marker="|", markersize=9, markeredgewidth=2, linestyle="", label="goal beside it")


def _short(text: str, most: int = 64) -> str:
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _family(rival: str) -> str:
    return rival.split(":")[0]
