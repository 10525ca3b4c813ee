r"""Solver: a frozen recipe that turns an operator and a damping into an inverse, and says how each solve went."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

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
    """A solver made ready for one operator and damping; it solves as often as asked.

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
        self.system.given.domain.check_rows("b", rows)
        started, products = time.perf_counter(), self.system.products
        judge = Judge(self.system, rows.detach())
        step = max(1, _WORKING_ENTRIES // (_VECTORS * max(1, self.system.n)))
        for where in judge.solvable.split(step):
            if len(where):
                judge.take(where, self._attempted(judge.rows[where]))
        judge.info["products"] = self.system.products - products
        judge.info["seconds"] = time.perf_counter() - started
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

    @abstractmethod
    def prepare(self, operator: Operator, damping: float = 0.0) -> Prepared:
        """Do what all right-hand sides share.

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
