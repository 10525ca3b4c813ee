"""Influences by way of a store: what is finished there is read, and nothing of it is computed again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._data import Batches
from .._digests import digest_data, surroundings
from .._problem import Problem
from ..errors import StoreDamagedError
from ..solvers import Solution, Status
from ._damping import identity_of
from ._pinned import SolveStates, damping_in, facts_of, pinned_by
from ._result import described
from ._run import InfluenceRun

if TYPE_CHECKING:
    from ..store import Grid, StoredRun

# Codes of the array `status`; their meaning is part of the identity of a store.
_CODES = (Status.CONVERGED, Status.ATTAINABLE, Status.APPROXIMATE, Status.UNCHECKED)
_REPORT_BYTES = 4096  # of a tile's report; those of all solvers take less than 1000
_TEXT = 500  # characters of a text in it
_PER_ROW = ("residual", "attainable", "error_bound")
_TRUNCATION = "truncation"  # the same where solutions are cut to a rank


def stored(run: InfluenceRun, path: Any, test: Batches, asked: Batches) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return influences `(n_test, n_asked)`, weights `(n_asked,)` and what is known of the solves.

    Any number of processes may do so at once: each tile of test samples is computed by one of them. Solutions are kept
    beside influences, so that a crash never repeats a solve. A finished store is compared with the digests of model
    and data, and read; the model is not evaluated.

    Raises:
        StoreMismatchError: The store was made with something else; the message names what.
        StoreDamagedError: A status or a report is not what a run writes.
        MissingExtraError: zarr is not installed.
    """
    from ..store import StoredRun

    identity, grids = _identity(run, test, asked), _grids(run, test.rows, asked.rows)
    device, settled, states = run.problem.space.device, list[InfluenceRun](), SolveStates()

    def facts() -> dict[str, Any]:
        pinned, found = facts_of(run, lambda: next(run.tiles(test))(), states)
        settled.append(pinned)
        return found

    with StoredRun.open(path, identity, grids, surroundings=surroundings(), facts=facts) as kept:
        _finish(_TestTiles(run, test, settled, states), kept, asked)
        values = torch.from_numpy(kept.read("influences")).to(device)
        shares = torch.from_numpy(kept.read("shares")).to(device)
        damping = damping_in(kept)
        solutions = [_solution(kept, number, damping.value) for number in range(kept.arrays["residual"].total)]
    info = described(run.problem, run.kind, solutions, damping)
    return values, shares, {**info, "store": str(path)}


def shares_of(problem: Problem, data: Batches) -> Tensor:
    """Return the weight of each sample in the objective, `(n,)`."""
    return torch.cat([problem.shares(batch) for batch in data]) / problem.denominator


def _identity(run: InfluenceRun, test: Batches, asked: Batches) -> dict[str, str]:
    """Return digests of all that the numbers depend on, in one pass over each data set."""
    sources = {"training data": run.problem.data, "test data": test, "input data": asked}
    digests = {id(data): "" for data in sources.values()}
    for data in sources.values():
        digests[id(data)] = digests[id(data)] or digest_data((b.x, b.y, b.weights) for b in data)
    return {
        **run.problem.fingerprint(),
        **{name: digests[id(data)] for name, data in sources.items()},
        "curvature": run.kind,
        "damping": identity_of(run.asked),
        "solver": repr(run.solver),
        "dtype": _dtype(run),
        "status codes": ", ".join(f"{code} {status}" for code, status in enumerate(_CODES)),
    }


def _grids(run: InfluenceRun, rows: int, columns: int) -> dict[str, Grid]:
    from ..store import Grid

    tile, kind, unknowns = max(1, min(run.step, rows)), _dtype(run), run.held.dim
    return {
        "factors": Grid((rows, unknowns), tile=(tile, unknowns), dtype=kind),
        "status": Grid((rows,), tile=(tile,), dtype="uint8"),
        "iterations": Grid((rows,), tile=(tile,), dtype="int64"),
        **{name: Grid((rows,), tile=(tile,), dtype="float64", finite=False) for name in _per_row(run)},
        "report": Grid((-(-rows // tile), _REPORT_BYTES), tile=(1, _REPORT_BYTES), dtype="uint8"),
        "influences": Grid((rows, columns), tile=(tile, columns), dtype=kind),
        "shares": Grid((columns,), tile=(max(1, columns),), dtype="float64"),
    }


def _per_row(run: InfluenceRun) -> tuple[str, ...]:
    return _PER_ROW if run.held.rank is None else (*_PER_ROW, _TRUNCATION)


def _dtype(run: InfluenceRun) -> str:
    return str(run.problem.space.dtype).removeprefix("torch.")


class _TestTiles:
    """Test samples, solved for tile by tile; the solver is prepared when it is first needed.

    Args:
        run: The run, as it was requested.
        data: The test samples.
        settled: The run as its facts left it, in the process that computed these.
        states: Where its solver keeps states.
    """

    def __init__(self, run: InfluenceRun, data: Batches, settled: list[InfluenceRun], states: SolveStates) -> None:
        self._states = states
        # Once for all tiles: both follow the memory that is free.
        self.run, self.group, self.together = run, run.group(data.rows, run.held) // run.step or 1, run.together
        self._data, self._settled, self._next = data, settled, 0
        self._walk: Iterator[Callable[[], Tensor]] = iter(())

    def solve(self, numbers: list[int], kept: StoredRun) -> None:
        """Solve some tiles, rising, and write what is known of them."""
        if not numbers:
            return
        if not self._settled:
            self._settled.append(pinned_by(self.run, kept, self._states))
        tiles = [self._gradients(number) for number in numbers]
        self._states.solving(kept, numbers[0])  # solvers that keep states solve one tile at a time
        for number, solution in zip(numbers, self._settled[0].solve_each(tiles), strict=True):
            _write(self.run, kept, number, solution)

    def _gradients(self, number: int) -> Tensor:
        """Return the gradients of a tile; one before the last one requested costs another pass over the samples."""
        if number < self._next or self._next == 0:
            self._walk, self._next = self.run.tiles(self._data), 0
        while True:
            gradients = next(self._walk)
            self._next += 1
            if self._next > number:
                return gradients()

    def rest(self) -> None:
        """Leave the pass that is under way."""
        self._walk, self._next = iter(()), 0


def _finish(rows: _TestTiles, kept: StoredRun, asked: Batches) -> None:
    """Compute what the store lacks, if anything; solutions that nothing needs any more are not even read."""
    needed = [(name, grid) for name, grid in kept.arrays.items() if name != "factors"]
    if kept.is_complete and all(kept.has(name, index) for name, grid in needed for index in grid.indices()):
        return
    solved, free = _solved(rows.run), True
    while free:
        waiting, unsolved = list[int](), list[int]()
        for number, column in kept.arrays["influences"].indices():
            if not kept.take("influences", (number, column), *solved):
                continue
            is_solved = all(kept.has(name, (number, 0)[: len(kept.arrays[name].counts)]) for name in solved)
            if is_solved and kept.has("influences", (number, column)):
                kept.leave("influences", (number, column))
                continue
            waiting.append(number)
            if not is_solved:
                unsolved.append(number)
            if len(unsolved) == rows.together or len(waiting) == rows.group:
                rows.solve(unsolved, kept)
                unsolved = []
            if len(waiting) == rows.group:
                _meet(rows.run, kept, waiting, asked)
                waiting = []
        rows.solve(unsolved, kept)
        _meet(rows.run, kept, waiting, asked)
        rows.rest()
        free = kept.wait("influences", *solved)
    kept.obtain("shares", (0,), lambda: shares_of(rows.run.problem, asked).double())
    kept.complete()


def _solved(run: InfluenceRun) -> tuple[str, ...]:
    """Return the arrays that hold what is known of solves."""
    return ("factors", "status", "iterations", *_per_row(run), "report")


def _meet(run: InfluenceRun, kept: StoredRun, tiles: list[int], asked: Batches) -> None:
    """Write the influences of some tiles, whose solutions meet the gradients of all samples in one pass."""
    if not tiles:
        return
    parts = [torch.from_numpy(kept.tile("factors", (number, 0))).to(run.problem.space.device) for number in tiles]
    for number, tile in zip(tiles, run.problem.sample_gradients(asked).apply_each(parts, run.held), strict=True):
        kept.write("influences", (number, 0), tile)


def _write(run: InfluenceRun, kept: StoredRun, number: int, solution: Solution) -> None:
    """Write the solutions of a tile, and all that is known of them."""
    kept.write("factors", (number, 0), run.held.packed(solution.x))
    kept.write("status", (number,), np.array([_CODES.index(Status(s)) for s in solution.status], np.uint8))
    kept.write("iterations", (number,), np.array(solution.iterations, np.int64))
    missing = torch.full_like(solution.residual, math.nan)
    for name in _per_row(run):
        kept.write(name, (number,), solution.residual if name == "residual" else solution.info.get(name, missing))
    figures = {"method": solution.method, "bounded": "error_bound" in solution.info, **solution.info}
    kept.write("report", (number, 0), _packed(figures))


def _solution(kept: StoredRun, number: int, damping: float) -> Solution:
    """Return what is known of the solves of a tile, without the solutions."""
    codes = kept.tile("status", (number,)).tolist()
    if codes and max(codes) >= len(_CODES):
        reason = f"the status code {max(codes)} is none of 0 to {len(_CODES) - 1}"
        raise StoreDamagedError(kept.path, reason, "status", (number,))
    info = _unpacked(kept, number)
    method = str(info.pop("method", "none"))
    names = [name for name in (*_PER_ROW, _TRUNCATION) if name in kept.arrays]
    rows = {name: torch.from_numpy(kept.tile(name, (number,))) for name in names}
    residual = rows.pop("residual")
    if not info.pop("bounded", False):
        del rows["error_bound"]
    steps = tuple(kept.tile("iterations", (number,)).tolist())
    status = tuple(_CODES[code] for code in codes)
    return Solution(torch.empty(len(codes), 0), status, residual, steps, damping, method, {**info, **rows})


def _packed(figures: dict[str, Any]) -> np.ndarray:
    """Return figures that are plain as JSON in `(1, bytes)`, padded by blanks; the last ones go where that is long."""
    plain = {name: _plain(value) for name, value in figures.items() if _is_plain(value)}
    while len(text := json.dumps(plain, allow_nan=False).encode()) > _REPORT_BYTES:
        plain.popitem()
    return np.frombuffer(text.ljust(_REPORT_BYTES), np.uint8)[None]


def _unpacked(kept: StoredRun, number: int) -> dict[str, Any]:
    """Return the figures in a tile's report.

    Raises:
        StoreDamagedError: It is no JSON object of plain values.
    """
    from ..store._format import loaded_json

    try:
        found = loaded_json(kept.tile("report", (number, 0)).tobytes())
    except ValueError as error:
        raise StoreDamagedError(kept.path, f"the report is {error}", "report", (number, 0)) from None
    return {name: _numbers(value) for name, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(name) is str and not isinstance(part, dict) and _is_plain(part) for name, part in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, NaN and Inf as `{"float": text}`."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value[:_TEXT] if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict) and value.get("float") in ("nan", "inf", "-inf"):
        return float(value["float"])
    return value
