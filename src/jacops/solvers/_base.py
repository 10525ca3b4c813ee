r"""Solver: a frozen recipe that turns an operator and a damping into an inverse, and reports how each solve ended."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from .._finite import is_finite
from .._operators import Operator
from .._operators._graphs import without_graph
from .._progress import shows_progress
from .._runtime.contexts import eager
from ..errors import warn
from ._judge import Judge, Raw
from ._solution import Solution, Status
from ._system import System

_WORKING_ENTRIES = 2**26  # entries of right-hand sides, solutions, residuals and directions: 512 MiB in float64
_VECTORS = 8  # rows of working memory per right-hand side, at most


class Prepared(ABC):
    """A solver prepared for one operator and damping, for any number of solves.

    Attributes:
        system: The damped operator.
        method: The solver's name, for reports.
    """

    system: System
    method: str
    _has_warned = False

    @abstractmethod
    def _solve(self, rows: Tensor) -> Raw:
        """Solve for finite rows `(k, n)` of which none is zero, k ≥ 1, in the unit of the system."""

    @eager
    @shows_progress("products")
    def solve(self, rows: Tensor) -> Solution:
        """Solve for right-hand sides, one per row; never raises for a solve that failed.

        Args:
            rows: `(k, n)`.

        Raises:
            InputError: The rows have another width, dtype or device than the operator.
        """
        started, products = time.perf_counter(), self.system.products
        judge = self._judge(rows)
        for where, raw in self._attempts(judge):
            judge.take(where, raw)
        return self._verdict(judge, self.system.products - products, time.perf_counter() - started)

    @eager
    @shows_progress("products")
    def solve_each(self, tiles: Sequence[Tensor]) -> list[Solution]:
        """Solve for each tile of right-hand sides as `solve` does, to the last bit.

        Residuals that a method does not compute itself take one pass over the data for all tiles, which holds the
        tiles, their solutions and as many products.

        Args:
            tiles: Right-hand sides `(k, n)`.

        Raises:
            InputError: A right-hand side does not fit.
        """
        judges, counts, times = [self._judge(rows) for rows in tiles], list[int](), list[float]()
        raws: list[list[tuple[Tensor, Raw]]] = []
        for judge in judges:
            started, products = time.perf_counter(), self.system.products
            raws.append(list(self._attempts(judge)))
            counts.append(self.system.products - products)
            times.append(time.perf_counter() - started)
        started, found = time.perf_counter(), list[Solution]()
        self._measure(judges, raws)
        shared = (time.perf_counter() - started) / max(1, len(judges))
        for judge, own, count, spent in zip(judges, raws, counts, times, strict=True):
            started, products = time.perf_counter(), self.system.products
            count += sum(len(where) for where, raw in own if raw.measured)
            for where, raw in own:
                judge.take(where, raw)
            count += self.system.products - products
            found.append(self._verdict(judge, count, spent + shared + time.perf_counter() - started))
        return found

    def _judge(self, rows: Tensor) -> Judge:
        self.system.given.domain.check_rows("b", rows)
        return Judge(self.system, rows.detach())

    def _attempts(self, judge: Judge) -> Iterator[tuple[Tensor, Raw]]:
        """Solve for the rows that need it, some at a time."""
        step = max(1, _WORKING_ENTRIES // (_VECTORS * max(1, self.system.n)))
        for where in judge.solvable.split(step):
            if len(where):
                yield where, self._attempted(judge.some(where))

    def _measure(self, judges: Sequence[Judge], raws: Sequence[Sequence[tuple[Tensor, Raw]]]) -> None:
        """Compute the residuals that methods left to be computed, all together; those of failed rows stay for later."""
        asked, pairs = list[Raw](), list[tuple[Tensor, Tensor]]()
        for judge, own in zip(judges, raws, strict=True):
            for where, raw in own:
                if raw.left is None and not raw.unchecked and not raw.failed and is_finite(raw.x):
                    asked.append(raw)
                    pairs.append((raw.x, judge.some(where)))
        for raw, left in zip(asked, self.system.residual_norms(pairs) if pairs else (), strict=True):
            raw.left, raw.measured = left, True

    def _verdict(self, judge: Judge, products: int, seconds: float) -> Solution:
        judge.info["products"], judge.info["seconds"] = products, seconds
        solution = judge.verdict(self.method)
        self._warn_of_poor(solution)
        return solution

    def _attempted(self, rows: Tensor) -> Raw:
        """Solve; a decomposition that LAPACK gives up is a breakdown of these rows."""
        try:
            return self._solve(rows)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            k = rows.shape[0]
            failed = dict.fromkeys(range(k), Status.BREAKDOWN)
            return Raw(torch.full_like(rows, math.nan), [0] * k, failed, info={"reason": f"a decomposition: {error}"})

    def _warn_of_poor(self, solution: Solution) -> None:
        """Warn once of approximate solutions that are no better than zero, whose residual is 1."""
        judged = zip(solution.residual.tolist(), solution.status, strict=True)
        poor = sum(status == Status.APPROXIMATE and residual >= 1 for residual, status in judged)
        if poor and not self._has_warned:
            self._has_warned = True
            warn(
                f"{self.method}: {poor} of {len(solution.status)} approximate solutions have a relative residual of 1 "
                f"or more (at most {solution.worst:.1e}), which zero has too. Raise `damping`, allow a larger rank, "
                "or solve by `CG()` with this method as its `preconditioner`."
            )


@final
class PreparedBy(Prepared):
    """A solver that is a function, once it is ready.

    Args:
        system: The damped operator.
        method: The solver's name.
        solve: Solves for rows, as `Prepared._solve`.
    """

    def __init__(self, system: System, method: str, solve: Callable[[Tensor], Raw]) -> None:
        self.system, self.method, self._run = system, method, solve

    def _solve(self, rows: Tensor) -> Raw:
        return self._run(rows)


class Solver(ABC):
    r"""A recipe for $(A + \lambda I) x = b$; concrete ones are frozen dataclasses."""

    @property
    def is_linear(self) -> bool:
        """Whether solutions depend linearly on right-hand sides, as far as residuals go to zero."""
        return True

    @abstractmethod
    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Prepare what all right-hand sides share.

        Raises:
            InputError: The operator is not square or not one that this solver can take.
        """

    @eager
    @shows_progress()
    def solve(self, operator: Operator, rows: Tensor, damping: float = 0.0) -> Solution:
        """Prepare, then solve for rows `(k, n)`; never raises for a solve that failed."""
        started = time.perf_counter()
        prepared = self.prepare(without_graph(operator), damping)
        before = time.perf_counter() - started
        solution = prepared.solve(rows)
        solution.info["products"] = prepared.system.products
        solution.info["seconds"] += before
        return solution
