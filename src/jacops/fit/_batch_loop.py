"""The loop over many problems: all step at once, each by its own damping, and each stops by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .._progress import track
from .._runtime.restoring import NumericWarningsIgnored, restoring
from ._batch_model import FEW
from ._batch_points import AT_ROUNDING, BY_CURVATURE, Points, by_column, row_norms
from ._batch_problem import BatchProblem
from ._layout import Values
from ._second_order import is_due
from ._sequences import Sequences
from ._stopping import FALLS, GOOD, NOISY, REJECTIONS, ZERO, StoppingCriteria
from ._strategies import Constant, Strategy, TrustRegion
from ._system import positive

MET = ("gradient", "objective", "step")  # the rules


@dataclass(eq=False)
class Ended:
    """How problems ended, each array over all of them.

    Attributes:
        values: Their parameters.
        cost: Their objectives.
        optimality: Their scaled gradients.
        status: Why they stopped.
        reason: The evidence for a minimum, by number in `REASONS`.
        predicted: What an undamped step predicts, relative to the objective; NaN where that is not known.
        steps: Steps tried.
        raw: Outputs minus targets.
        evaluations: Forward passes.
        linearisations: Jacobians.
        route: How Jacobians were taken.
    """

    values: Values
    cost: np.ndarray
    optimality: np.ndarray
    status: np.ndarray
    reason: np.ndarray
    predicted: np.ndarray
    steps: np.ndarray
    raw: np.ndarray
    evaluations: int = 0
    linearisations: int = 0
    route: str = ""

    @classmethod
    def joined(cls, parts: Sequence[Ended]) -> Ended:
        """Return the ends of several batches as those of one."""
        names = parts[0].values
        arrays = {
            f.name: np.concatenate([getattr(part, f.name) for part in parts])
            for f in fields(cls)
            if isinstance(getattr(parts[0], f.name), np.ndarray)
        }
        return cls(
            values={name: torch.cat([part.values[name] for part in parts]) for name in names},
            evaluations=sum(part.evaluations for part in parts),
            linearisations=sum(part.linearisations for part in parts),
            route=parts[0].route,
            **arrays,
        )


@dataclass(eq=False)
class _States:
    """The problems that are still worked on, each array over them: which they are, and what they remember."""

    number: np.ndarray
    first: np.ndarray
    largest: np.ndarray
    damping: np.ndarray
    rejections: np.ndarray
    noisy: np.ndarray
    refused: np.ndarray
    refusals: np.ndarray
    insist: np.ndarray
    tried: np.ndarray
    steps: np.ndarray
    status: np.ndarray
    sequences: Sequences

    def some(self, which: np.ndarray) -> _States:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: value[which] for name, value in own.items() if isinstance(value, np.ndarray)}
        return _States(**arrays, sequences=self.sequences.some(which))


@dataclass(eq=False)
class _Trial:
    """A step of every problem."""

    step: np.ndarray
    length: np.ndarray
    tried: np.ndarray
    predicted: np.ndarray
    ratio: np.ndarray
    at_noise: np.ndarray
    insisted: np.ndarray
    factor: np.ndarray
    good: np.ndarray


@restoring
def run_batch(
    problem: BatchProblem, values: Values, strategy: Strategy, rules: StoppingCriteria, progress: bool | None
) -> Ended:
    """Run steps until every problem has stopped."""
    with NumericWarningsIgnored("divide", "over", "under", "invalid"):
        loop = _BatchLoop(problem, values, strategy, rules)
        for _ in track(range(rules.max_steps), problem.problems.function.call, enabled=progress):
            if not loop.going:
                break
            loop.step()
        loop.stop_all("max_steps")
        return loop.ended


class _BatchLoop:
    def __init__(self, problem: BatchProblem, values: Values, strategy: Strategy, rules: StoppingCriteria) -> None:
        self.problem, self.strategy, self.rules = problem, strategy, rules
        many = problem.many
        cost = problem.objectives(values)
        self.ended = Ended(
            {name: value.clone() for name, value in values.items()},
            np.where(np.isfinite(cost), cost, np.nan),
            np.full(many, np.nan),
            np.where(np.isfinite(cost), "", "nonfinite").astype(object),
            np.zeros(many, dtype=int),
            np.full(many, np.nan),
            np.zeros(many, dtype=int),
            np.full((many, sum(t.rows for t in problem.terms) // many), np.nan),
        )
        self.going = self._begin(np.isfinite(cost).nonzero()[0], values)

    def _begin(self, number: np.ndarray, values: Values) -> bool:
        """Linearise the problems at their start, without those whose Jacobian is not finite; return whether any is."""
        while len(number):
            self.problem, picked = self._some(number), torch.from_numpy(number)
            points, largest = self.problem.points({n: v[picked.to(v.device)] for n, v in values.items()}, None)
            finite = points.is_finite
            if finite.all():
                break
            self.ended.status[number[~finite]] = "nonfinite"
            number = number[finite]
        else:
            return False
        many, first = len(number), self.strategy.begin()
        self.points = points
        self.states = _States(
            number=number,
            first=points.cost.copy(),
            largest=largest,
            damping=np.full(many, np.nan if first is None else first),
            rejections=np.zeros(many, dtype=int),
            noisy=np.zeros(many, dtype=int),
            refused=np.full(many, np.inf),
            refusals=np.zeros(many, dtype=int),
            insist=np.zeros(many, dtype=bool),
            tried=np.zeros(many, dtype=bool),
            steps=np.zeros(many, dtype=int),
            status=np.full(many, "", dtype=object),
            sequences=Sequences.begin(largest.shape),
        )
        self.going = True
        self._settle(self._at_rest())
        self._finish()
        return self.going

    def _some(self, number: np.ndarray) -> BatchProblem:
        """Return the problems of these numbers; those that are left last are requested first."""
        return self.problem if len(number) == self.problem.many else self.problem.some(number)

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Try one step of every problem that goes on."""
        states, before = self.states, self.points
        trial, values = self._tried()
        states.steps += states.status == ""
        self._adapt(trial)
        if trial.good.any():
            self._move(trial, values)
        rule = self._rules(before, trial)
        self._settle(rule)
        self._patience(trial, rule)
        self._finish()

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps, and which of them are the undamped ones."""
        states, points = self.states, self.points
        newton = points.newton[0]
        if isinstance(self.strategy, TrustRegion):
            length = row_norms(newton * points.lengths)
            states.damping = np.where(np.isnan(states.damping), length, states.damping)
            whole = states.insist | (length <= states.damping)
            return points.bent(whole, states.damping), whole
        path = points.damped(states.damping[:, None] * np.square(points.unit * points.lengths))
        return np.where(states.insist[:, None], newton, path), states.insist

    def _tried(self) -> tuple[_Trial, Values]:
        states, points = self.states, self.points
        step, whole = self._steps()
        factor = self._factors(whole)
        states.tried |= whole & (factor == 1)
        step = np.where((factor == 1)[:, None], step, points.newton[0] * factor[:, None])
        goes = (states.status == "") & by_column(np.isfinite(step)).all(0)
        step = self._within(np.where(goes[:, None], step, 0.0))
        predicted = np.where(factor == 1, points.predicted(step), points.whole * factor)
        values = self.problem.moved(points.values, step)
        tried = self.problem.objectives(values)
        gain = points.cost - tried
        known = (predicted > 0) & np.isfinite(tried) & np.isfinite(predicted)
        ratio = np.where(known, gain / np.where(known, predicted, 1.0), -np.inf)
        at_noise = (predicted <= points.noise) & (np.abs(gain) <= 4 * points.noise)
        good = goes & np.isfinite(tried) & ((ratio > GOOD) | (at_noise & (tried <= points.cost)))
        length = row_norms(step * points.lengths)
        return _Trial(step, length, tried, predicted, ratio, at_noise, states.insist.copy(), factor, good), values

    def _factors(self, whole: np.ndarray) -> np.ndarray:
        """Return by what the undamped steps are multiplied, 1 where they form no known sequence."""
        states, points = self.states, self.points
        if not isinstance(self.strategy, TrustRegion) or not states.sequences.last.any():
            return np.ones(len(whole))
        full = points.newton[0]
        factor = states.sequences.factor(full, points.lengths, points.whole / positive(points.cost), whole)
        able = ~states.insist
        if points.room is not None:
            further = full * factor[:, None]
            able &= by_column((points.room[0] <= further) & (further <= points.room[1])).all(0)
        return np.where(able, factor, 1.0)

    def _within(self, step: np.ndarray) -> np.ndarray:
        """Return steps that stay in the box: projected onto it, or cut where they leave, whichever predicts more."""
        if self.points.room is None:
            return step
        down, up = self.points.room
        projected = np.clip(step, down, up)
        room = np.where(step < 0, down, up) / np.where(step != 0, step, 1.0)
        cut = np.minimum(1.0, by_column(np.where(step != 0, room, 1.0)).min(0, initial=1.0))[:, None] * step
        better = self.points.predicted(projected) >= self.points.predicted(cut)
        return np.where(better[:, None], projected, cut)

    def _adapt(self, trial: _Trial) -> None:
        """Set the next damping or radius."""
        states, good, further = self.states, trial.good, trial.factor != 1
        newton = self.points.newton[0]
        whole = np.asarray(by_column(trial.step == newton).all(0))
        states.sequences.note(np.where(whole[:, None], newton, 0.0), trial.factor, good)
        states.rejections = np.where(good, 0, states.rejections + ~(trial.insisted | further))
        strategy: Any = self.strategy  # those of BUILT_IN take arrays
        usual = strategy.next(states.damping, trial.ratio, states.rejections, trial.length)
        after = strategy.after_undamped(states.damping, good, trial.length)
        after = np.where(good | (states.rejections == 0), after, states.damping)
        states.damping = np.where(trial.insisted | further, after, usual)
        states.insist = np.zeros_like(states.insist)

    def _move(self, trial: _Trial, values: Values) -> None:
        """Linearise where steps were taken; a problem whose Jacobian is not finite there ends."""
        states, good = self.states, torch.from_numpy(trial.good)
        chosen = {
            n: torch.where(good.to(v.device).view(-1, *[1] * (v.ndim - 1)), values[n], v)
            for n, v in self.points.values.items()
        }
        self.points, states.largest = self.problem.points(chosen, states.largest)
        states.tried &= ~trial.good
        finite = self.points.is_finite
        if not finite.all():
            self.points.silence(~finite)
            states.largest = np.where(finite[:, None], states.largest, 0.0)
            states.status[~finite & (states.status == "")] = "nonfinite"

    # ---- when to stop ------------------------------------------------------------------------------------------

    def _at_rest(self) -> np.ndarray:
        """Return the rule that is met by each point itself, empty where there is none."""
        points, gtol = self.points, self.rules.gtol
        zero = points.cost <= (ZERO * points.eps) ** 2 * self.states.first
        found = np.where(zero, "objective", "").astype(object)
        if gtol is not None:
            found[points.optimality <= gtol] = "gradient"
        return found

    def _rules(self, before: Points, trial: _Trial) -> np.ndarray:
        ftol, xtol = self.rules.ftol, self.rules.xtol
        found = np.full(len(trial.good), "", dtype=object)
        size = row_norms(before.magnitudes * before.lengths)
        if xtol is not None:
            found[trial.length <= xtol * size] = "step"
        found[trial.at_noise & (trial.predicted >= 0)] = "objective"
        if ftol is not None:
            change = np.maximum(np.abs(before.cost - trial.tried), trial.predicted)
            found[trial.good & (change <= ftol * before.cost)] = "objective"
        rest = self._at_rest()
        return np.where(trial.good & (rest != ""), rest, found)

    def _settle(self, rule: np.ndarray) -> None:
        """Stop the problems that meet a rule with evidence for a minimum, or whose rule requires less."""
        met = (rule != "") & (self.states.status == "")
        if not met.any():
            return
        states, points = self.states, self.points
        reason, predicted, _ = points.evidence
        flat = ~by_column(points.norms).any(0) & (reason == 0)
        asked = points.doubted(met) & ((reason > 0) | is_due(states.refusals))
        is_minimum, falls = self.problem.minima_and_saddles(points, asked)
        self._found_by_curvature(is_minimum & (reason == 0))
        reason = np.where(is_minimum & (reason == 0), BY_CURVATURE, reason)
        flat = (flat & ~is_minimum) | (falls & (reason > 0))
        size = row_norms(points.magnitudes * points.lengths)
        length = row_norms(points.newton[0] * points.lengths) / size
        loose = self.rules.ask_for_less(rule, predicted, length)
        stops = met & ((reason > 0) | loose) & ~flat
        states.status[stops] = rule[stops]
        states.status[met & flat] = "stalled"
        refused = met & ~stops & ~flat
        states.noisy[refused & (predicted < FALLS * states.refused)] = 0
        states.refused = np.where(refused, predicted, states.refused)
        states.refusals = states.refusals + refused
        if self.strategy.may_be_undamped:
            states.insist = refused & np.isfinite(predicted) & ~states.tried

    def _found_by_curvature(self, which: np.ndarray) -> None:
        self.ended.reason[self.states.number[which]] = BY_CURVATURE

    def _patience(self, trial: _Trial, rule: np.ndarray) -> None:
        """Stop the problems whose steps change nothing, and all where a limit is reached."""
        states = self.states
        close = trial.at_noise & (rule != "")
        states.noisy = np.where(close, states.noisy + 1, 0)
        idle = (states.status == "") & ~states.insist
        worn = idle & ((states.noisy >= NOISY) | (states.rejections >= REJECTIONS))
        if isinstance(self.strategy, Constant):
            worn |= idle & (states.rejections > 0)
        if worn.any():
            at_rounding = self.points.evidence[2] & worn
            is_minimum = self.problem.minima_and_saddles(self.points, self.points.doubted(worn))[0]
            self._found_by_curvature(is_minimum)
            states.status[worn] = np.where(is_minimum, "gradient", "stalled")[worn]
            states.status[at_rounding] = "objective"
            self.ended.reason[states.number[at_rounding]] = AT_ROUNDING
        limit = self.rules.used_up(self.problem.problems.evaluations)
        if limit is not None:
            states.status[states.status == ""] = limit[0]

    def stop_all(self, status: str) -> None:
        """Stop what still goes on."""
        if self.going:
            self.states.status[self.states.status == ""] = status
            self._finish()
        run = self.problem.problems
        self.ended.evaluations, self.ended.linearisations = run.evaluations, run.linearisations
        self.ended.route = run.route

    def _finish(self) -> None:
        """Write down problems that have stopped, and go on with the others alone where these are few."""
        stopped = self.states.status != ""
        if not stopped.any():
            return
        self._record((stopped & (self.ended.status[self.states.number] == "")).nonzero()[0])
        going = (~stopped).nonzero()[0]
        self.going = bool(len(going))
        if self.going and len(stopped) > FEW and 2 * len(going) <= len(stopped):
            self.states, self.points = self.states.some(going), self.points.some(going)
            self.problem = self.problem.some(going)

    def _record(self, which: np.ndarray) -> None:
        """Write down where problems have stopped."""
        if not len(which):
            return
        states, points, ended = self.states, self.points, self.ended
        number, status = states.number[which], states.status[which]
        picked, places = torch.from_numpy(which), torch.from_numpy(number)
        for name, value in points.values.items():
            ended.values[name][places.to(value.device)] = value[picked.to(value.device)]
        reason, predicted, _ = points.evidence
        met = np.isin(status, MET) & (ended.reason[number] == 0)
        ended.status[number] = status
        ended.reason[number] = np.where(met, reason[which], ended.reason[number])
        ended.predicted[number] = np.where(status == "nonfinite", np.nan, predicted[which])
        ended.cost[number], ended.optimality[number] = points.cost[which], points.optimality[which]
        ended.steps[number], ended.raw[number] = states.steps[which], points.raw[which]
