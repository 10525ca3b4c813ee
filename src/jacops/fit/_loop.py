"""The loop: linearise, step, compare, until a stop rule is met."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import numpy as np

from .._progress import track
from .._runtime.restoring import NumericWarningsIgnored, restoring
from ..errors import NonFiniteError
from ._certificate import MOST_REDUCTION, Certificate, certificate, small_reduction
from ._freedom import what_to_hold
from ._layout import Values
from ._problem import FitProblem
from ._result import StepRecord
from ._second_order import by_curvature
from ._sequences import Sequences, sum_of_steps
from ._solvers import StepSolver
from ._state import NOISE, FitPoint, Outcome, Stop, Trial
from ._stopping import FALLS, GOOD, NOISY, REJECTIONS, ZERO, Observer, StoppingCriteria
from ._strategies import Constant, Strategy, TrustRegion
from ._system import LinearizedFit, Singular, Solved
from ._undamped import is_undamped, predicted_reduction, remember, undamped

_EXCURSION = 8  # steps through a curved valley; each must halve the objective, so together gain a factor of 256
_CAREFUL = "use levenberg_marquardt, which damps steps"


@restoring
def run(
    problem: FitProblem,
    solver: StepSolver,
    strategy: Strategy | None,
    rules: StoppingCriteria,
    observer: Observer,
    *,
    progress: bool | None,
) -> Outcome:
    """Run steps until a rule is met; without a strategy every Gauss-Newton step is taken whole."""
    # Numbers that are not finite are looked for, and end a step.
    with NumericWarningsIgnored("divide", "over", "under", "invalid"):
        loop = _Loop(problem, solver, strategy, rules, observer)
        stop = loop.settled(loop.at_rest(), None)
        if stop is None:
            for _ in track(range(rules.max_steps), problem.call, enabled=progress):
                stop = loop.step()
                if stop is not None or len(loop.log) >= rules.max_steps:
                    break
        stop = stop or loop.unmet("max_steps", f"{rules.max_steps} steps were not enough")
        # More than rounding of sums over millions of residuals.
        if strategy is None and loop.point.cost > (1 + 1e-6) * loop.first + loop.point.floor:
            stop = Stop("diverged", f"the objective ended above its start; {_CAREFUL}")
        return Outcome(loop.point, stop, loop.log)


class _Loop:
    def __init__(
        self,
        problem: FitProblem,
        solver: StepSolver,
        strategy: Strategy | None,
        rules: StoppingCriteria,
        observer: Observer,
    ) -> None:
        self.problem, self.solver, self.strategy, self.rules, self.observer = problem, solver, strategy, rules, observer
        self.bounds = problem.bounds
        self.started = perf_counter()
        self.point = self._at(problem.values())
        self.first = self.point.cost
        self.damping = strategy.begin() if strategy else None
        self.rejections = self.at_noise = 0
        self.insist = False
        self.refused: Certificate | None = None
        self.refusals, self.next_excursion, self.failed_excursions = 0, 1, 0
        self.log: list[StepRecord] = []
        self.sequence = Sequences.begin((problem.layout.columns,))

    def _at(self, values: Values, *, aside: bool = False) -> FitPoint:
        cost, system, raw = self.problem.linearised(values)
        self.problem.scaling.apply(system, keep=not aside)
        point = FitPoint(values, cost, system, raw, self.problem.layout.magnitudes(values))
        return point if self.bounds is None else self.bounds.at(point)

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(self) -> Stop | None:
        """Try one step; return why to stop, if so."""
        insisted, self.insist = self.insist, False
        try:
            solved, damping = self._solved(insisted)
            while self.bounds and (face := self.bounds.narrowed(self.point, solved.step)) is not None:
                self.point = face
                solved, damping = self._solved(insisted)
        except Singular as reason:
            return self._no_step(str(reason))
        trial = self._accepted(self._tried(solved if insisted else self._further(solved), damping, insisted))
        self._note(trial.solved, damping, trial)
        self._adapt(trial)
        stop = self._judged(trial)
        stopped = self.observer.stop(self.point, self.log[-1], self.problem.evaluations) if trial.good else None
        return stop or stopped

    def _solved(self, insisted: bool) -> tuple[Solved, float | None]:
        system = self.point.system
        if insisted:
            return self._extrapolated() or undamped(system, self.solver), self.damping
        if self.strategy is not None:
            return self.strategy.step(system, self.solver, self.damping)
        solved = system.memory.get("undamped")
        if solved is None:
            try:
                solved = self.solver.solve(system, None)
            except Singular:
                if not (system.is_sparse and self.problem.may_be_dense):
                    raise
                solved = undamped(system, self.solver)  # the shortest step, as with a dense Jacobian
        remember(system, solved)
        return solved, None

    def _further(self, solved: Solved) -> Solved:
        """Return as many undamped steps at once as lead to the end of a geometric sequence, where they form one."""
        system, newton = self.point.system, self.point.system.memory.get("newton")
        if not isinstance(self.strategy, TrustRegion) or newton is None or not self.sequence.last.any():
            return solved
        share = predicted_reduction(system, newton.step) / self.point.cost if self.point.cost > 0 else np.inf
        given = self._in_all_columns(newton.step), self.point.whole.scale
        factor = float(self.sequence.factor(*given, share, solved is newton))
        further = replace(newton, step=newton.step * factor, note=f"{factor:.2g} steps", factor=factor)
        if factor == 1 or (self.bounds is not None and self.bounds.within(self.point, further) is not further):
            return solved
        return further

    def _in_all_columns(self, step: np.ndarray) -> np.ndarray:
        return step if self.point.face is None else self.point.face.full(step)

    def _tried(self, solved: Solved, damping: float | None, insisted: bool, point: FitPoint | None = None) -> Trial:
        point = self.point if point is None else point
        if insisted or solved is point.system.memory.get("undamped"):
            point.system.memory["tried"] = True
        if self.bounds is not None:
            solved = self.bounds.within(point, solved)
        predicted = solved.factor * predicted_reduction(point.system, solved.step / solved.factor)
        values = point.moved(self.problem.layout, solved.step)
        values = values if self.bounds is None else self.bounds.clamped(values)
        tried = self.problem.objective(values)
        gain = point.cost - tried
        known = 0 < predicted < np.inf and np.isfinite(tried)
        noise = NOISE * 2 * point.system.eps * point.cost
        if known and gain <= GOOD * predicted:
            noise = point.noise
        # Both values of the objective may be off by that noise; a margin of two.
        at_noise = bool(predicted <= noise and abs(gain) <= 4 * noise)
        ratio = gain / predicted if known else -np.inf
        return Trial(solved, damping, values, tried, predicted, ratio, at_noise, insisted)

    def _accepted(self, trial: Trial) -> Trial:
        """Return a trial with the decision about it."""
        good = np.isfinite(trial.tried) and (
            (self.strategy is None and not trial.insisted)
            or (trial.insisted and self._is_zero and trial.tried < self.point.cost)
            or trial.ratio > GOOD
            or (trial.at_noise and trial.tried <= self.point.cost)
        )
        undamped_step = trial.solved is self.point.system.memory.get("undamped")
        if good or not undamped_step or not np.isfinite(trial.tried):
            return replace(trial, good=bool(good))
        if trial.at_noise:
            return self._compared(trial, self._certificate_at(self.point))
        able = trial.insisted and self.bounds is None and self.refusals >= self.next_excursion
        return self._excursion(trial) if able else trial

    def _compared(self, trial: Trial, before: Certificate) -> Trial:
        """Return a trial judged by what undamped steps predict, where objectives differ by rounding only."""
        point = self._at(trial.values)
        there = self._certificate_at(point)
        good = bool(there.reason) or there.predicted * point.cost < FALLS * before.predicted * self.point.cost
        return replace(trial, good=good, point=point if good else None)

    def _excursion(self, trial: Trial) -> Trial:
        """Return what further undamped steps lead to from a trial that is worse, while each improves on the last.

        In a narrow curved valley all steps that lower the objective are short; the long one along the valley, and one
        or two back down into it, are not (the watchdog technique: Chamberlain, Powell, Lemarechal and Pedersen, 1982).
        """
        first, damping = trial, self.damping
        most = self.rules.max_nfev or np.inf
        for _ in range(min(_EXCURSION, self.rules.max_steps - len(self.log) - 1)):
            if self.problem.evaluations >= most:
                break
            try:
                point = self._at(trial.values, aside=True)
                solved = undamped(point.system, self.solver)
            except (Singular, NonFiniteError):
                break
            self._note(trial.solved, damping, trial)
            last, trial = trial.tried, self._tried(solved, damping, insisted=True, point=point)
            if trial.tried < self.point.cost:
                return replace(trial, good=True)
            if not trial.tried < last / 2:
                break
        self.failed_excursions += 1
        self.next_excursion = self.refusals + 2**self.failed_excursions
        return first if trial is first else replace(trial, good=False)

    def _adapt(self, trial: Trial) -> None:
        aside = trial.insisted or trial.solved.factor != 1
        self.rejections = 0 if trial.good else self.rejections + (not aside)
        step = self._in_all_columns(trial.solved.step)
        whole = _is_whole(self.point.system, trial.solved)
        self.sequence.note(step if whole else np.zeros_like(step), trial.solved.factor, trial.good)
        if self.strategy is None or trial.damping is None:
            return
        length = float(np.linalg.norm(trial.solved.step * self.point.system.scale))
        if aside:
            if trial.good or not self.rejections:
                self.damping = float(self.strategy.after_undamped(trial.damping, trial.good, length))
        else:
            self.damping = float(self.strategy.next(trial.damping, trial.ratio, self.rejections, length))

    # ---- when to stop ------------------------------------------------------------------------------------------

    def at_rest(self) -> tuple[str, str] | None:
        """Return the rule that is met by the point itself, if one is."""
        optimality, gtol = self.point.optimality, self.rules.gtol
        if gtol is not None and optimality <= gtol:
            return "gradient", f"the scaled gradient {optimality:.1e} is at most gtol={gtol:g}"
        if self._is_zero:
            return "objective", "the objective is zero to the rounding of its first value"
        return None

    @property
    def _is_zero(self) -> bool:
        """Whether the objective is zero to the rounding of its first value."""
        return self.point.cost <= (ZERO * self.point.system.eps) ** 2 * self.first

    def _extrapolated(self) -> Solved | None:
        r"""Return the limit of undamped steps that shrink by a constant factor towards a zero; None where they do not.

        Near a zero of some order along a direction, where the Jacobian vanishes, such steps do.
        """
        system = self.point.system
        if not self.sequence.last.any() or not self._is_zero or self.bounds is not None:
            return None
        try:
            step = undamped(system, self.solver).step
        except Singular:
            return None
        factor = float(sum_of_steps(self.sequence.last, step))
        return (
            system.solved(step * factor, None, "undamped", note=f"extrapolated by {factor:.2g}") if factor > 1 else None
        )

    def _judged(self, trial: Trial) -> Stop | None:
        before = self.point
        if trial.good:
            self.point = trial.point or self._at(trial.values)
        elif self.strategy is None and not trial.insisted:
            return Stop("diverged", f"a whole Gauss-Newton step led to NaN or Inf; {_CAREFUL}")
        # Plain Gauss-Newton may overshoot and return; from 1e8 times its start that is not to be expected.
        if self.strategy is None and trial.tried > 1e8 * max(self.first, 1.0):
            return Stop("diverged", f"the objective grew without end; {_CAREFUL}")
        rule = (self.at_rest() if trial.good else None) or self._rule(before, trial)
        stop = self.settled(rule, self._evidence(before, trial)) if rule is not None else None
        return stop or self._no_progress(trial, rule) or self._out_of_patience()

    def _rule(self, before: FitPoint, trial: Trial) -> tuple[str, str] | None:
        ftol, xtol, scale = self.rules.ftol, self.rules.xtol, before.system.scale
        change = max(abs(before.cost - trial.tried), trial.predicted) if trial.good else np.inf
        if ftol is not None and change <= ftol * before.cost:
            return "objective", f"the objective changes by no more than ftol={ftol:g} of itself"
        if trial.at_noise and trial.predicted >= 0:
            return "objective", "the objective is no longer distinguishable from its rounding errors"
        length, size = np.linalg.norm(trial.solved.step * scale), np.linalg.norm(before.magnitudes * scale)
        if xtol is not None and length <= xtol * size:
            return "step", f"a step is no longer than xtol={xtol:g} of the scaled parameters"
        return None

    def _evidence(self, before: FitPoint, trial: Trial) -> Certificate | None:
        """Return the certificate that an undamped step gave which was then taken and did what it predicted."""
        share = trial.predicted / before.cost if before.cost > 0 else np.inf
        # Within a factor of four the quadratic model holds; trust regions use the same quarter.
        as_predicted = trial.good and (trial.at_noise or 0.25 < trial.ratio < 4)
        if not (as_predicted and 0 <= share <= MOST_REDUCTION and is_undamped(before.system, trial.solved)):
            return None
        return small_reduction(share)

    def _certificate_at(self, point: FitPoint) -> Certificate:
        if self.bounds is not None and self.bounds.holds(point):
            return Certificate(0.0, "every parameter is at a bound that the gradient leads out of")
        found = certificate(point.system, point.cost, self.solver, point.magnitudes)
        return found if self.bounds is None else self.bounds.judged(point, found)

    def settled(self, rule: tuple[str, str] | None, evidence: Certificate | None) -> Stop | None:
        """Return the stop for a rule that is met, if there is evidence for a minimum or the rule requires less."""
        if rule is None:
            return None
        found = evidence or self._certificate_at(self.point)
        status, message = rule
        found, stuck = by_curvature(self.problem, self.point, found, self.refusals)
        if stuck:
            return Stop("stalled", stuck, found)
        if found.reason:
            return Stop(status, f"{message}; {found.reason}", found)
        if self.rules.ask_for_less(status, found.predicted, found.length):
            return Stop(status, f"{message}; {_left(found)}", found)
        if self.refused is not None and found.predicted < FALLS * self.refused.predicted:
            self.at_noise = 0
        self.refused = found
        self.refusals += 1
        able = self.strategy is not None and self.strategy.may_be_undamped
        able = able or self._extrapolated() is not None
        self.insist = able and np.isfinite(found.predicted) and "tried" not in self.point.system.memory
        return None

    def _no_progress(self, trial: Trial, rule: tuple[str, str] | None) -> Stop | None:
        close = trial.at_noise or (self.refused is not None and bool(self.refused.at_rounding))
        self.at_noise = self.at_noise + 1 if close and rule is not None else 0
        if self.insist or self.at_noise < NOISY:
            return None
        return self._exhausted("the objective is no longer distinguishable from its rounding errors")

    def _out_of_patience(self) -> Stop | None:
        if self.insist:
            return None
        if isinstance(self.strategy, Constant) and self.rejections:
            return self.unmet("stalled", "a step led uphill, and with constant damping the next one would be the same")
        if self.rejections >= REJECTIONS:
            return self._exhausted(f"{self.rejections} steps in a row gave no reduction")
        limit = self.rules.used_up(self.problem.evaluations)
        return None if limit is None else self.unmet(*limit)

    def _exhausted(self, message: str) -> Stop:
        """Return the stop of steps that change nothing: by rounding, or for no reason that is known."""
        found = by_curvature(self.problem, self.point, self._certificate_at(self.point))[0]
        if found.reason:
            return Stop("gradient", f"{message}; {found.reason}", found)
        if not found.at_rounding:
            return self.unmet("stalled", message)
        return Stop("objective", f"{message}; {found.at_rounding}", replace(found, reason=found.at_rounding))

    def unmet(self, status: str, message: str) -> Stop:
        """Return a stop without evidence, with what the last certificate said."""
        found = self.refused
        return Stop(status, message) if found is None else Stop(status, f"{message}; {_left(found)}", found)

    def _no_step(self, reason: str) -> Stop | None:
        if self.strategy is None:
            todo = f"{self._what_to_hold()}, or use levenberg_marquardt"
            return self.unmet("singular", f"{reason}; {todo}")
        self.rejections += 1
        damping = self.damping if self.damping is not None else 1.0
        self._note(None, damping, None, reason)
        if isinstance(self.strategy, Constant) or self.rejections >= REJECTIONS:
            todo = f"{self._what_to_hold()}, or damp more"
            return self.unmet("singular", f"{reason}; {todo}")
        self.damping = float(self.strategy.next(damping, -1.0, self.rejections, damping))
        return None

    def _what_to_hold(self) -> str:
        face = self.point.face
        taken = None if face is None else face.free.nonzero()[0]
        return what_to_hold(self.point.system, self.problem.layout.named, taken)

    def _note(self, solved: Solved | None, damping: float | None, trial: Trial | None, note: str = "") -> None:
        now, nan = perf_counter(), float("nan")
        solver = note if solved is None else f"{solved.solver} ({solved.note})" if solved.note else solved.solver
        self.log.append(
            StepRecord(
                step=len(self.log) + 1,
                objective=self.point.cost,
                tried=trial.tried if trial else nan,
                optimality=self.point.optimality,
                length=float(np.linalg.norm(solved.step)) if solved else 0.0,
                damping=0.0 if trial and trial.insisted else damping or 0.0,
                ratio=float(trial.ratio) if trial else -np.inf,
                accepted=trial.good if trial else False,
                inner_residual=solved.residual if solved else nan,
                inner_steps=solved.steps if solved else 0,
                solver=solver,
                seconds=now - self.started,
                predicted=trial.predicted if trial else nan,
            )
        )
        self.started = now
        self.observer.report(self.log[-1])


def _left(found: Certificate) -> str:
    if not np.isfinite(found.predicted):
        return "no undamped step could be computed to judge this point by"
    return f"an undamped step predicts a reduction of {found.predicted:.1e} of the objective where it was last computed"


def _is_whole(system: LinearizedFit, solved: Solved) -> bool:
    return any(solved is system.memory.get(name) for name in ("newton", "undamped", "whole"))
