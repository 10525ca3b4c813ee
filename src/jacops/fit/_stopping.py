"""When a least-squares loop stops at the caller's request, and what is reported on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from types import NoneType
from typing import Any

from .._requirements import check_kind, check_number, check_positive
from ..errors import InputError, InputTypeError
from ._result import FitProgress, StepRecord, as_given
from ._state import FitPoint, Stop

# One fit and many go by the same numbers.
GOOD = 1e-4  # least ratio of actual to predicted reduction for a step to be taken
REJECTIONS = 32  # in a row: damping has then grown by 2 ** 528, or a radius fallen by 4 ** 32
ZERO = 64.0  # rounding errors of the first residual that are worth asking whether it is zero
NOISY = 3  # steps in a row at the rounding level that change nothing: one or two may by chance
FALLS = 0.8  # a predicted reduction that is less than this part of the last one has become less, not just rounded
_DEFAULT_TOLERANCE = 1e-8  # of `xtol`: looser ones stop a call without evidence for a minimum


@dataclass(frozen=True)
class StoppingCriteria:
    """When to stop.

    Attributes:
        ftol: Relative change of the objective.
        xtol: Relative length of a step.
        gtol: Scaled gradient.
        max_steps: Steps tried.
        max_nfev: Forward passes.
        max_seconds: Time since `began`.
        began: When the call began.
    """

    ftol: float | None
    xtol: float | None
    gtol: float | None
    max_steps: int
    max_nfev: int | None
    max_seconds: float | None = None
    began: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputTypeError: A rule is not a number.
            InputError: A rule is negative, or a count not positive.
        """
        for name in ("ftol", "xtol", "gtol"):
            value = getattr(self, name)
            check_kind(name, value, (float, int, NoneType), "a number or None is needed")
            if value is not None and not value >= 0:
                raise InputError.of(name, repr(value), "a number from zero on, or None, is needed")
        check_positive("max_steps", self.max_steps)
        if self.max_nfev is not None:
            check_positive("max_nfev", self.max_nfev)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds)

    def ask_for_less(self, rule: Any, predicted: Any, length: Any) -> Any:
        """Return whether the caller's tolerance is looser than that of success and met by an undamped step.

        Args:
            rule: The rule that is met, or of many problems, for each.
            predicted: The reduction that the step predicts, relative to the objective.
            length: The length of the step, relative to the parameters, both scaled.
        """
        ftol, gtol, xtol = self.ftol or 0.0, self.gtol or 0.0, self.xtol or 0.0
        found = (rule == "objective") & (predicted <= ftol)
        found |= (rule == "gradient") & (predicted <= gtol**2)
        return found | ((rule == "step") & (xtol > _DEFAULT_TOLERANCE) & (length <= xtol))

    def used_up(self, evaluations: int) -> tuple[str, str] | None:
        """Return which limit is reached and how to say it, if one is."""
        if self.max_nfev is not None and evaluations >= self.max_nfev:
            return "max_nfev", f"{self.max_nfev} forward passes were not enough"
        if self.max_seconds is not None and perf_counter() - self.began >= self.max_seconds:
            return "max_seconds", f"{self.max_seconds:g} seconds were not enough"
        return None


@dataclass(frozen=True)
class Observer:
    """What is reported to the caller.

    Attributes:
        callback: Called after each step that is taken.
        verbose: 0 for nothing, 1 for a summary at the end, 2 for a line per step too.
        kind: The form that parameters are handed out in.
        limited_by: What limits steps, as in the result.
    """

    callback: Callable[[FitProgress[Any]], Any] | None
    verbose: int
    kind: type | None
    limited_by: str

    def __post_init__(self) -> None:
        """Refuse what is no callback, and levels that there are not.

        Raises:
            InputTypeError: `callback` cannot be called, or `verbose` is no whole number.
            InputError: There is no such level.
        """
        if self.callback is not None and not callable(self.callback):
            raise InputTypeError.of("callback", f"a {type(self.callback).__name__}", "a function or None is needed")
        check_kind("verbose", self.verbose, int, "0, 1 or 2 is needed")
        if self.verbose not in (0, 1, 2):
            raise InputError.of("verbose", repr(self.verbose), "0, 1 or 2 is needed")

    def report(self, record: StepRecord) -> None:
        """Print the line of a step."""
        if self.verbose == 2:
            print(str(record).replace("damping", self.limited_by or "damping"), flush=True)

    def stop(self, point: FitPoint, record: StepRecord, passes: int) -> Stop | None:
        """Call the callback for a step that was taken; return the stop if it requests one."""
        if self.callback is None:
            return None
        x = as_given(point.values, self.kind)
        try:
            ends = self.callback(FitProgress(x, point.cost, point.optimality, record.step, passes, record))
        except StopIteration:
            ends = True
        return Stop("callback", "the callback stopped the fit") if ends is True else None
