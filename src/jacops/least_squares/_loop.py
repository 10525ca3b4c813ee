"""The loop: linearise, step, compare, until a rule says stop."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from .._progress import track
from ..errors import InputError, InputTypeError, explain
from ._layout import Values
from ._problem import Problem
from ._result import StepRecord
from ._solvers import Solver
from ._strategies import Constant, Strategy
from ._system import Singular, Solved, System

_GOOD = 1e-4  # least ratio of actual to foretold reduction for a step to be taken
_REJECTIONS = 32  # so many in a row, and nothing helps


@dataclass(frozen=True)
class Rules:
    """When to stop.

    Attributes:
        ftol: Relative change of the objective.
        xtol: Relative length of a step.
        gtol: Scaled gradient.
        max_steps: Steps tried.
        max_nfev: Forward passes.
    """

    ftol: float | None
    xtol: float | None
    gtol: float | None
    max_steps: int
    max_nfev: int | None

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputTypeError: A rule is not a number.
            InputError: A rule is negative, or a count not positive.
        """
        for name in ("ftol", "xtol", "gtol"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, float | int)):
                raise InputTypeError(explain(name, f"a {type(value).__name__}", "a number or None is needed"))
            if value is not None and not value >= 0:
                raise InputError(explain(name, repr(value), "a number from zero on, or None, is needed"))
        for name in ("max_steps", "max_nfev"):
            value = getattr(self, name)
            if name == "max_nfev" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(explain(name, repr(value), "a positive whole number is needed"))


@dataclass(eq=False)
class Point:
    """Where the loop stands."""

    values: Values
    cost: float
    system: System
    raw: np.ndarray

    @property
    def optimality(self) -> float:
        r"""The scaled gradient: the largest $|J_j^\top r| / (\lVert J_j \rVert \sqrt{2F})$."""
        if self.cost <= 0:
            return 0.0
        return float(np.abs(self.system.gradient / self.system.scale).max(initial=0.0)) / (2 * self.cost) ** 0.5


@dataclass(eq=False)
class Ended:
    """How the loop ended."""

    point: Point
    status: str
    message: str
    log: list[StepRecord]


def run(problem: Problem, solver: Solver, strategy: Strategy | None, rules: Rules, progress: bool | None) -> Ended:
    """Run steps until a rule is met; without a strategy every Gauss-Newton step is taken whole."""
    loop = _Loop(problem, solver, strategy, rules)
    status = loop.at_rest()
    if status is None:
        for _ in track(range(rules.max_steps), problem.call, enabled=progress):
            status = loop.step()
            if status is not None:
                break
    status = status or ("max_steps", f"{rules.max_steps} steps were not enough")
    if strategy is None and loop.point.cost > (1 + 1e-6) * loop.first:
        status = "diverged", "the objective ended above its start; levenberg_marquardt is more careful"
    return Ended(loop.point, *status, loop.log)


class _Loop:
    def __init__(self, problem: Problem, solver: Solver, strategy: Strategy | None, rules: Rules) -> None:
        self.problem, self.solver, self.strategy, self.rules = problem, solver, strategy, rules
        self.started = perf_counter()
        self.eps = max(torch.finfo(p.dtype).eps for p in problem.original.values())
        self.point = self._at(problem.values())
        self.first = self.point.cost
        self.level = strategy.begin() if strategy else None
        self.rejections = 0
        self.log: list[StepRecord] = []

    def _at(self, values: Values) -> Point:
        cost, system, raw = self.problem.linearised(values)
        return Point(values, cost, system, raw)

    def at_rest(self) -> tuple[str, str] | None:
        """Say so if the gradient vanishes here."""
        optimality, gtol = self.point.optimality, self.rules.gtol
        if gtol is not None and optimality <= gtol:
            return "gradient", f"the scaled gradient {optimality:.1e} is at most gtol={gtol:g}"
        if self.point.cost <= (64 * self.eps) ** 2 * self.first:
            return "objective", "the residual is zero, as far as rounding errors let one tell"
        return None

    def step(self) -> tuple[str, str] | None:
        """Try one step; return why to stop, if so."""
        point = self.point
        try:
            solved, level = self._solved()
        except Singular as reason:
            return self._no_step(str(reason))
        p, g = solved.step, point.system.gradient
        foretold = -float(g @ p) - float(np.sum(point.system.push(p) ** 2)) / 2
        values = self.problem.layout.moved(point.values, p)
        tried = self.problem.objective(values)
        gain = point.cost - tried
        ratio = gain / foretold if foretold > 0 and np.isfinite(tried) else -np.inf
        noise = 8 * self.eps * point.cost
        at_noise = foretold <= noise and abs(gain) <= 4 * noise
        good = np.isfinite(tried) and (self.strategy is None or ratio > _GOOD or (at_noise and gain >= 0))
        self._note(solved, level, tried, ratio, bool(good))
        self.rejections = 0 if good else self.rejections + 1
        if self.strategy is not None and level is not None:
            length = float(np.linalg.norm(p * point.system.scale))
            self.level = self.strategy.next(level, ratio, self.rejections, length)
        return self._judged(values, tried, foretold, solved, good=bool(good), at_noise=at_noise)

    def _solved(self) -> tuple[Solved, float | None]:
        if self.strategy is None:
            return self.solver.solve(self.point.system, None), None
        return self.strategy.step(self.point.system, self.solver, self.level)

    def _judged(
        self, values: Values, tried: float, foretold: float, solved: Solved, *, good: bool, at_noise: bool
    ) -> tuple[str, str] | None:
        before, length = self.point.cost, float(np.linalg.norm(solved.step))
        if good:
            self.point = self._at(values)
            if (rest := self.at_rest()) is not None:
                return rest
        elif self.strategy is None:
            return "diverged", "a whole Gauss-Newton step led to NaN or Inf; levenberg_marquardt is more careful"
        if self.strategy is None and tried > 1e8 * max(self.first, 1.0):
            return "diverged", "the objective grew without end; levenberg_marquardt is more careful"
        ftol, xtol = self.rules.ftol, self.rules.xtol
        if ftol is not None and good and abs(before - tried) <= ftol * before and foretold <= ftol * before:
            return "objective", f"the objective changes by no more than ftol={ftol:g} of itself"
        if at_noise and foretold >= 0:
            return "objective", "the objective cannot be told from its rounding errors any more"
        size = self.problem.layout.size_of(self.point.values)
        if xtol is not None and length <= xtol * (xtol + size):
            return "step", f"a step is no longer than xtol={xtol:g} of the parameters"
        return self._out_of_patience()

    def _out_of_patience(self) -> tuple[str, str] | None:
        if isinstance(self.strategy, Constant) and self.rejections:
            return "stalled", "a step led uphill, and with constant damping the next one would be the same"
        if self.rejections >= _REJECTIONS:
            return "stalled", f"{self.rejections} steps in a row led nowhere"
        if self.rules.max_nfev is not None and self.problem.evaluations >= self.rules.max_nfev:
            return "max_nfev", f"{self.rules.max_nfev} forward passes were not enough"
        return None

    def _no_step(self, reason: str) -> tuple[str, str] | None:
        todo = "hold something fixed with `fixed=`, or use levenberg_marquardt"
        if self.strategy is None:
            return "singular", f"{reason}; {todo}"
        self.rejections += 1
        level = self.level if self.level is not None else 1.0
        self._note(None, level, float("nan"), -np.inf, False, reason)
        if isinstance(self.strategy, Constant) or self.rejections >= _REJECTIONS:
            return "singular", f"{reason}; hold something fixed with `fixed=`, or damp more"
        self.level = self.strategy.next(level, -1.0, self.rejections, level)
        return None

    def _note(
        self, solved: Solved | None, level: float | None, tried: float, ratio: float, good: bool, note: str = ""
    ) -> None:
        now = perf_counter()
        solver = note if solved is None else f"{solved.solver} ({solved.note})" if solved.note else solved.solver
        self.log.append(
            StepRecord(
                step=len(self.log) + 1,
                objective=self.point.cost,
                tried=tried,
                optimality=self.point.optimality,
                length=0.0 if solved is None else float(np.linalg.norm(solved.step)),
                damping=level or 0.0,
                ratio=float(ratio),
                accepted=good,
                inner_residual=float("nan") if solved is None else solved.residual,
                inner_steps=0 if solved is None else solved.steps,
                solver=solver,
                seconds=now - self.started,
            )
        )
        self.started = now
