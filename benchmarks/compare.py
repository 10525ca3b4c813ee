"""Compare two checkouts: processor time of every call of ours in the benchmarks, in interleaved rounds.

`python -m benchmarks.compare OLD NEW [NAME[:CASE,…] …]` starts a process for each checkout, which imports jacops from
there and the benchmarks from NEW. The two take turns, round by round, on one thread. What counts is the median over the
rounds of the ratio of processor times, new to old. Rounds go on while noise leaves open on which side of its limit a
row is; a row over its limit is measured again in new processes. A row that uses what OLD lacks is reported as new. The
exit status is 1 if a row is over its limit, fails, or gives another answer than before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .groups import NAMES_HELP, select

ROUNDS = 9  # at least: enough for a median that four disturbed rounds do not move
MORE = 4  # times as many at most, while noise leaves it open on which side of its limit a row is
REPEATS = 2  # three measurements in all, so that one that was disturbed, or unlucky in its memory layout, is outvoted
WARM = 2  # calls after the first that are not counted: the second may still compile or prove what the first could not
ROUND = 0.05  # seconds of a round at least, by repeated calls: a switch between processes empties caches once a round
MOST_CALLS = 50
LIMIT = 1.05  # what some tens of rounds can distinguish from noise on a shared machine
QUICK = 5e-3  # seconds of the old call below which ...
QUICK_LIMIT = 1.15  # ... fixed costs of Python, which vary more, are most of it
# One thread; and freed memory is kept and used again, up to what glibc allows. By default the size of earlier arrays
# decides which later ones are fresh pages, and one checkout compared with itself may differ by half.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
HEAD = "| case | call | old, ms | new, ms | ratio (95 %) | limit | verdict | first call: old, ms | new, ms |"
Key = tuple[str, str]


class Failed(Exception):
    """A command failed in a worker.

    Args:
        message: Type and text of the error.
        missing: The module that was not found, if that was it.
        absent: jacops lacks a name or a keyword that the row uses.
    """

    def __init__(self, message: str, missing: str | None, absent: bool) -> None:
        super().__init__(message)
        self.missing, self.absent = missing, absent


class Checkout:
    """A process that runs the calls of one checkout; a context that ends it.

    Args:
        source: The folder that holds the package jacops.
        benchmarks: The folder that holds the package of the benchmarks.
    """

    def __init__(self, source: Path, benchmarks: Path) -> None:
        paths = os.pathsep.join(map(str, (source, benchmarks)))
        command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("worker.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
        self.source = source
        self._process = subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes)

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, *command: Any) -> Any:
        """Send a command and return the reply.

        Raises:
            Failed: It failed there.
            SystemExit: The process has ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise TypeError("the worker was started without pipes")
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"the process of {self.source} ended with {self._process.wait()} at {command}")
        found = json.loads(line)
        if "error" in found:
            raise Failed(found["error"], found["missing"], found["absent"])
        return found["value"]

    def open(self, group: str, cases: list[str]) -> None:
        """Import a group of benchmarks.

        Raises:
            Failed: It cannot be imported there.
            SystemExit: jacops was imported from elsewhere.
        """
        used = Path(self.ask("open", group, cases)).resolve()
        if not used.is_relative_to(self.source.resolve()):
            raise SystemExit(f"{self.source} was asked for, but jacops was imported from {used}")


@dataclass
class Row:
    """One call in both checkouts.

    Attributes:
        case: The workload, such as `A1`.
        call: Which of its calls.
        old: Seconds per call in the old checkout, round by round.
        new: The same in the new one.
        often: How many times the row was measured, in processes of their own.
        first: Seconds of the first calls.
        finding: Why there is no measurement: `new`, `left out`, `another answer`, `fails` or `fails in old`, with the
            reason.
    """

    case: str
    call: str
    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    often: int = 0
    first: tuple[float | None, float | None] = (None, None)
    finding: str = ""

    @property
    def ratio(self) -> float:
        """The median over the rounds of new to old: what slows both down for a while cancels in it."""
        return statistics.median(self._ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds between which the true median lies with 95 % (sign test)."""
        ratios = self._ratios
        left_out = max(0, math.floor((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2))
        return ratios[left_out], ratios[-1 - left_out]

    @property
    def limit(self) -> float:
        """The largest ratio of new to old that is accepted."""
        return QUICK_LIMIT if statistics.median(self.old) < QUICK else LIMIT

    @property
    def over(self) -> bool:
        """Whether the ratio exceeds the limit."""
        return bool(self.old) and self.ratio > self.limit

    @property
    def decided(self) -> bool:
        """Whether noise leaves no doubt on which side of the limit the ratio is."""
        low, high = self.interval
        return not low <= self.limit <= high

    @property
    def _ratios(self) -> list[float]:
        return sorted(after / before for before, after in zip(self.old, self.new, strict=True))

    @property
    def bad(self) -> bool:
        """Whether this row makes the comparison fail."""
        return self.over or self.finding.startswith(("fails", "another answer"))

    def __str__(self) -> str:
        first = [milliseconds(seconds) for seconds in self.first]
        if not self.old:
            cells = [self.case, self.call, "", "", "", "", self.finding, *first]
        else:
            low, high = self.interval
            often = f" ({self.often} measurements)" if self.often > 1 else ""
            times = [milliseconds(statistics.median(seconds)) for seconds in (self.old, self.new)]
            ratio = f"{self.ratio:.3f} ({low:.2f} to {high:.2f})"
            cells = [self.case, self.call, *times, ratio, f"{self.limit:.2f}"]
            cells += [("**over**" if self.over else "within") + often, *first]
        return f"| {' | '.join(cells)} |"


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds, with two digits where they are few."""
    return "" if seconds is None else f"{1e3 * seconds:,.{2 if seconds < 0.01 else 1}f}"


def rows_once(
    old: Checkout, new: Checkout, group: str, cases: list[str], rounds: int, known: dict[Key, Row] | None = None
) -> Iterator[Row]:
    """Yield the rows of a group, measured once.

    Args:
        old: The process of the one checkout.
        new: That of the other.
        group: Which benchmarks.
        cases: Which of its cases; all if empty.
        rounds: How many interleaved rounds.
        known: Rows to be measured again; others are left out.
    """
    reason = ""  # why the old checkout has nothing to compare with
    try:
        new.open(group, cases)
        reason = _reason(old, "open", group, cases)
        while (found := new.ask("advance")) is not None:
            reason = reason or _reason(old, "advance", found)
            case, *calls = found
            for call in calls:
                row = Row(case, call) if known is None else known.get((case, call))
                if row is None:
                    continue
                if reason:
                    row.finding = reason
                else:
                    measure(row, old, new, rounds)
                print(row, file=sys.stderr, flush=True)
                yield row
    except Failed as error:
        yield Row(group, "", finding=_failure(error))


def _reason(old: Checkout, command: str, *arguments: Any) -> str:
    """Return the finding for all rows that follow where the old checkout cannot build them, or an empty text."""
    try:
        if command == "open":
            old.open(*arguments)
        elif old.ask(command) != arguments[0]:
            return "new: the old checkout has other rows here"
    except Failed as error:
        return _old_failure(error)
    return ""


def _failure(error: Failed) -> str:
    """Return the finding for an error of the new checkout: only a package that is not installed is no fault of its."""
    missing = (error.missing or "jacops").split(".")[0]
    return f"fails: {error}" if missing in ("jacops", "benchmarks") else f"left out: {missing} is not installed"


def _old_failure(error: Failed) -> str:
    """Return the finding for an error of the old checkout: a name that it lacks is no failure."""
    return f"{'new' if error.absent else 'fails in old'}: {error}"


def measure(row: Row, old: Checkout, new: Checkout, rounds: int) -> None:
    """Compare the first answers of a row's call, then measure it in interleaved rounds.

    Args:
        row: Which call; gets the figures or the finding.
        old: The process of the one checkout.
        new: That of the other.
        rounds: How many at least.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            row.first = (None, new.ask("first", row.call, f"{folder}/new"))
        except Failed as error:
            row.finding = _failure(error)
            return
        try:
            row.first = (old.ask("first", row.call, f"{folder}/old"), row.first[1])
        except Failed as error:
            row.finding = _old_failure(error)
            return
        # Both compare, since what a process has allocated before can change its speed afterwards.
        if not all([new.ask("agrees", f"{folder}/old"), old.ask("agrees", f"{folder}/new")]):
            row.finding = "another answer"
            return
    warm = max(1e-6, *(side.ask("time", row.call, WARM) for side in (old, new)))
    calls = max(1, min(MOST_CALLS, math.ceil(ROUND / warm)))
    row.often += 1
    for i in range(MORE * rounds):
        if i >= rounds and row.decided:
            break
        # Each is first in turn, also after a change of processor (every second round), where caches are cold.
        for side in (old, new) if (i + i // 2) % 2 else (new, old):
            (row.old if side is old else row.new).append(side.ask("time", row.call, calls, i // 2))


def compare(sources: Sequence[Path], group: str, cases: list[str], rounds: int, repeats: int) -> Iterator[Row]:
    """Yield the rows of a group; those over their limit are measured again first, in new processes.

    Args:
        sources: The folders that hold the old and the new jacops, and the one that holds the benchmarks.
        group: Which benchmarks.
        cases: Which of its cases; all if empty.
        rounds: How many interleaved rounds; twice as many where a row is measured again.
        repeats: How often a row over its limit is measured again.
    """
    over: dict[Key, Row] = {}
    for again in range(1 + repeats):
        with Checkout(sources[0], sources[2]) as old, Checkout(sources[1], sources[2]) as new:
            if again:
                rows = list(rows_once(old, new, group, sorted({case for case, _ in over}), 2 * rounds, over))
            else:
                rows = list(rows_once(old, new, group, cases, rounds))
        over = {(row.case, row.call): row for row in rows if row.over}
        yield from (row for row in rows if not row.over)
        if not over:
            break
    yield from over.values()


def source_of(checkout: Path) -> Path:
    """Return the folder that holds the package jacops, given that folder or the checkout.

    Raises:
        SystemExit: There is none.
    """
    for folder in (checkout / "src", checkout):
        if (folder / "jacops").is_dir():
            return folder.resolve()
    raise SystemExit(f"{checkout} holds no package jacops, neither in src/ nor itself")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the table, and return the exit status; rows are shown as they come on stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="checkout, or its src folder, to compare with")
    parser.add_argument("new", type=Path, help="checkout, or its src folder, that is judged; its benchmarks are run")
    parser.add_argument("names", nargs="*", metavar="NAME[:CASE,…]", help=NAMES_HELP)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds; {ROUNDS} by default")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="measurements more of a row over its limit")
    asked = parser.parse_args(arguments)
    old, new = source_of(asked.old), source_of(asked.new)
    benchmarks = new.parent if (new.parent / "benchmarks").is_dir() else Path(__file__).resolve().parents[1]
    rows: list[Row] = []
    for group, cases in select(asked.names, benchmarks / "benchmarks"):
        rows += compare((old, new, benchmarks), group, cases, asked.rounds, asked.repeats)
    print(HEAD, "|---|---|" + "--:|" * 4 + "---|--:|--:|", *rows, sep="\n")
    bad = [f"{row.case} {row.call}" for row in rows if row.bad]
    print(f"\n{len(rows)} rows, {len(bad)} not accepted", *bad, sep="\n  ")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
