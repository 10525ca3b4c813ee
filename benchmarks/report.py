"""Reports of measurements: JSON lines, one table and one plot.

`python -m benchmarks.report` writes the table and the plot again, from the newest figures of every workload, and prints
the goals.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .harness import OURS, RESULTS, Measured, Workload, machine, measure

Row = dict[str, Any]
HEAD = (
    "| case | contender | time, ms | first of a round, ms | slowest / fastest | peak, MiB | time / ours | time / floor "
    "| goal of ours |"
)


def note(text: str) -> None:
    """Print a line at once, so that a long run can be watched."""
    print(text, flush=True)


def run(
    workloads: Iterator[Workload],
    name: str,
    cases: list[str] | None = None,
    rounds: int | None = None,
    clock: str = "wall",
) -> list[Measured]:
    """Measure workloads one after the other, print each row and append it to `results/NAME.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    about, rows = {**machine(), "clock": clock}, []
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        for workload in workloads:
            if cases and workload.name not in cases:
                continue
            note(f"\n{workload.name}  {workload.what}")
            found, rates = measure(workload, rounds, clock)
            speed = {"gflops": rates.flops / 1e9, "warm_gbs": rates.warm / 1e9, "fresh_gbs": rates.fresh / 1e9}
            for row in found:
                note(line_of(row))
                line = {**asdict(row), "what": workload.what, "group": name, **speed, **about}
                file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
            file.flush()
            rows += found
    return rows


def line_of(row: Measured) -> str:
    """Return a row as it is printed while running."""
    if row.error is not None:
        return f"  {row.rival:46s} {row.error}"
    ratio = "" if row.ratio is None else f"{row.ratio:8.2f} ×"
    floor = "" if row.floor is None else f"{row.floor:7.1f} floors"
    times = f"{_milliseconds(row.seconds):>10s} ms {f'({_milliseconds(row.cold)})':>10s}"
    return f"  {row.rival:46s} {times} {_mebibytes(row.peak_mib):>6s} MiB {ratio}{floor}" + (
        "".join(f"\n      {_goal(g)}" for g in row.goals)
    )


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.2f}" if seconds < 0.01 else f"{1e3 * seconds:,.1f}"


def _mebibytes(mib: float | None) -> str:
    return "" if mib is None else f"{mib:,.0f}"


def _goal(goal: Row) -> str:
    return f"{goal['ours']} {goal['wanted']}: {_reached(goal)}, {'met' if goal['met'] else 'missed'}"


def _reached(goal: Row) -> str:
    """Return what was reached; of ratios that by medians, and that of the fastest rounds in brackets."""
    if goal["reached"] is None:
        return "no figure"
    return f"{goal['reached']:.3g}" + ("" if goal["fastest"] is None else f" ({goal['fastest']:.3g})")


def newest(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of every workload's newest run."""
    runs: dict[str, dict[str, Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "what" not in row:
                continue  # of a benchmark that counts instead of timing
            found = runs.setdefault(row["workload"], {})
            if row["rival"] in found:  # a contender comes once in a run: here another one begins
                found.clear()
            found[row["rival"]] = row
    return [row for name in sorted(runs, key=_natural) for row in runs[name].values()]


def _natural(name: str) -> tuple[str, int, str]:
    digits = "".join(c for c in name if c.isdigit())
    return name.rstrip("0123456789abcdefghijklmnopqrstuvwxyz")[:1], int(digits or 0), name


def table(rows: list[Row]) -> str:
    """Return everything that was measured as one table in Markdown."""
    lines = [HEAD, "|---|---|" + "--:|" * 6 + "---|"]
    for row in rows:
        case = f"{row['workload']} {row['what']}" if row["rival"].startswith(OURS) else row["workload"]
        if row["error"] is not None:
            lines.append(f"| {case} | {row['rival']} | | | | | | | {row['error']} |")
            continue
        ratio, floor = ("" if row[k] is None else f"{row[k]:.2f}" for k in ("ratio", "floor"))
        times = [_milliseconds(row["seconds"]), _milliseconds(row.get("cold"))]
        figures = [*times, f"{row['spread']:.2f}", _mebibytes(row["peak_mib"]), ratio, floor]
        goals = "; ".join(_goal(g) for g in row["goals"])
        lines.append(f"| {case} | {row['rival']} | {' | '.join(figures)} | {goals} |")
    return "\n".join(lines)


def goals(rows: list[Row]) -> str:
    """Return the goals, what was reached, and the fastest rival of each workload, as a table in Markdown."""
    lines = ["| case | ours | time, ms | beside | goal | reached | |", "|---|---|--:|---|---|--:|---|"]
    times = {(r["workload"], r["rival"]): r["seconds"] for r in rows}
    for row in rows:
        for goal in row["goals"]:
            time = _milliseconds(times.get((row["workload"], goal["ours"])))
            verdict = "met" if goal["met"] else "**missed**"
            cells = [row["workload"], goal["ours"], time, goal["beside"], goal["wanted"], _reached(goal), verdict]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(folder: Path = RESULTS) -> list[Path]:
    """Write `table.md` and, where matplotlib is installed, `ratios.png`; return their paths."""
    rows = newest(folder)
    if not rows:
        return []
    keys = ("processor", "cores", "threads", "clock", "torch", "jacops", "python")
    about = ", ".join(f"{k} {rows[-1][k]}" for k in keys)
    speeds = [
        f"{min(r[k] for r in rows):.0f} to {max(r[k] for r in rows):.0f}" for k in ("gflops", "warm_gbs", "fresh_gbs")
    ]
    pages = f"written {speeds[1]} GB/s to warm and {speeds[2]} to fresh pages"
    text = f"{about}\n\nMatrix products {speeds[0]} GFLOP/s; {pages}."
    (folder / "table.md").write_text(f"{text}\n\n{table(rows)}\n", encoding="utf-8")
    try:
        from .plot import ratios
    except ModuleNotFoundError:
        return [folder / "table.md"]
    ratios(rows, folder / "ratios.png")
    return [folder / "table.md", folder / "ratios.png"]


if __name__ == "__main__":
    for written in write(Path(sys.argv[1]) if sys.argv[1:] else RESULTS):
        note(f"written: {written}")
    note(goals(newest(Path(sys.argv[1]) if sys.argv[1:] else RESULTS)))
