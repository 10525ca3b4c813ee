"""Every error and warning of jacops, and the one way to build a message.

An error says four things: which argument, what came, what was needed, what to do. Each type is a child of
`JacopsError` and of the builtin a caller would expect, so both `except JacopsError` and `except ValueError` work.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


class JacopsError(Exception):
    """Anything jacops raises on purpose."""


class InputTypeError(JacopsError, TypeError):
    """An argument is of the wrong kind."""


class InputError(JacopsError, ValueError):
    """An argument has the wrong shape, dtype, device or range."""


class ModelStateError(JacopsError, ValueError):
    """The model as it stands makes the question ill-posed; the message names the module and the switch to flip."""


class NotDifferentiableError(JacopsError, RuntimeError):
    """There is no derivative to take: no graph, an integer output, a dropped second derivative."""


class NonFiniteError(JacopsError, ArithmeticError):
    """NaN or Inf was met; the message says where it was seen first."""


class DataError(JacopsError, ValueError):
    """A data loader ran dry, changed its order or its length, or repeats rows."""


class SolveError(JacopsError, RuntimeError):
    """A linear solve did not converge; `solution` holds how far it came.

    Attributes:
        solution: What the solver had when it stopped, with its status and true residuals.
    """

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


class MemoryBudgetError(JacopsError, MemoryError):
    """The result would not fit the memory budget; nothing was allocated."""


class MissingExtraError(JacopsError, ImportError):
    """An optional package is needed for this call.

    Args:
        extra: The pip extra that brings it, as in `pip install jacops[extra]`.
        package: The import name that is missing.
    """

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"this call needs the optional package '{package}': pip install 'jacops[{extra}]'")


class JacopsWarning(UserWarning):
    """A route was changed or an answer deserves a remark; the numbers are right all the same."""


def explain(argument: str, came: object, needed: str, todo: str = "") -> str:
    """Return one sentence or two: `argument` came as `came`, needed was `needed`, do `todo`."""
    return f"`{argument}` is {came}, but {needed}." + (f" {todo}" if todo else "")


def warn(message: str) -> None:
    """Warn once per call site of the user, whatever the depth inside jacops."""
    depth, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, JacopsWarning, stacklevel=depth)
