"""Which benchmarks there are, and which of them a command line selects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NAMES_HELP = "a group (bench_GROUP.py), or some of its cases, such as products:C1,D3; all groups by default"


def select(names: Sequence[str], folder: Path = Path(__file__).parent) -> list[tuple[str, list[str]]]:
    """Return groups of benchmarks with the cases selected in each; an empty list stands for all cases.

    Args:
        names: `GROUP` or `GROUP:CASE,CASE`; none selects all groups.
        folder: Where the files `bench_GROUP.py` are.

    Raises:
        SystemExit: There is no such group.
    """
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    selected = []
    for name in names or known:
        group, _, cases = name.partition(":")
        if group not in known:
            raise SystemExit(f"no benchmark {group!r}; there are: {', '.join(known)}")
        selected.append((group, cases.split(",") if cases else []))
    return selected
