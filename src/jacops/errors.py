"""The errors and warnings of jacops.

An error states four things: the argument, its value, what is needed, and what to do. Each type is a child of
`JacopsError` and of the builtin a caller would expect, so both `except JacopsError` and `except ValueError` work.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

# fmt: off
__all__ = [
    "DataError", "InputError", "InputTypeError", "JacopsError", "JacopsWarning", "MemoryBudgetError",
    "MissingExtraError", "ModelStateError", "NonFiniteError", "NotDifferentiableError", "PeerFailedError",
    "SolveError", "StoreDamagedError", "StoreError", "StoreFileError", "StoreIncompleteError",
    "StoreMismatchError",
]
# fmt: on
_PACKAGE = str(Path(__file__).parent)


class JacopsError(Exception):
    """Base class of the errors of jacops."""

    @classmethod
    def of(cls, argument: str, came: object, needed: str, todo: str = "") -> Self:
        """Return the error with the message that `explain` builds from these."""
        return cls(explain(argument, came, needed, todo))


class InputTypeError(JacopsError, TypeError):
    """An argument is of the wrong kind."""


class InputError(JacopsError, ValueError):
    """An argument has the wrong shape, dtype, device or range."""


class ModelStateError(JacopsError, ValueError):
    """The derivative is not defined for the model in its current mode; the message names module and remedy."""


class NotDifferentiableError(JacopsError, RuntimeError):
    """There is no derivative to take: no graph, an integer output, a dropped second derivative."""


class NonFiniteError(JacopsError, ArithmeticError):
    """NaN or Inf was found; the message states where it was found first."""


class DataError(JacopsError, ValueError):
    """A data loader is empty, changed its order or length, or repeats rows."""


class SolveError(JacopsError, RuntimeError):
    """A linear solve did not converge; `solution` has the result so far.

    Attributes:
        solution: What the solver had when it stopped, with its status and true residuals.
    """

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


class MemoryBudgetError(JacopsError, MemoryError):
    """The result would not fit the memory budget; nothing was allocated."""


class PeerFailedError(JacopsError, RuntimeError):
    """Another rank of a `torch.distributed` group failed, did not make a call, or made a different one.

    Attributes:
        ranks: Which, where that is known.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class StoreError(JacopsError, RuntimeError):
    """A stored run cannot be continued or read.

    Attributes:
        path: The store.
    """

    def __init__(self, path: object, message: str) -> None:
        super().__init__(f"store {str(path)!r}: {message}")
        self.path = str(path)


class StoreMismatchError(StoreError):
    """The store belongs to another computation.

    Attributes:
        differences: What the store has and what this run has, for every field that differs; None where one lacks it.
    """

    def __init__(self, path: object, differences: Mapping[str, tuple[str | None, str | None]]) -> None:
        what = [
            f"{name}: the store has {_cut(there)}, this run has {_cut(here)}"
            for name, (there, here) in differences.items()
        ]
        super().__init__(path, f"it belongs to another run. {'; '.join(what)}. Nothing was changed; take a new folder.")
        self.differences = dict(differences)


class StoreDamagedError(StoreError):
    """A part of a store differs from what its run wrote.

    Attributes:
        array: The array, or None where the store's own metadata is damaged.
        index: The tile, or None where the array's metadata is damaged.
        reason: How it differs.
    """

    def __init__(
        self, path: object, reason: str, array: str | None = None, index: tuple[int, ...] | None = None
    ) -> None:
        place = (
            "its metadata" if array is None else f"array {array!r}" if index is None else f"tile {array}{list(index)}"
        )
        todo = "" if index is None else " Run it again: the writer computes damaged tiles again."
        super().__init__(path, f"{place} is damaged: {reason}.{todo}")
        self.array, self.index, self.reason = array, index, reason


class StoreIncompleteError(StoreError):
    """A run has not finished, and partial results were not requested.

    Attributes:
        missing: For every array that lacks some, how many tiles.
    """

    def __init__(self, path: object, missing: Mapping[str, int]) -> None:
        what = ", ".join(f"{count} tiles of {name!r}" for name, count in missing.items()) or "its last mark"
        super().__init__(path, f"the run has not finished: it lacks {what}. Resume it, or read with partial=True.")
        self.missing = dict(missing)


class StoreFileError(StoreError, OSError):
    """A file system error (disk full, read-only, no permission, missing). Finished tiles are kept; run the call again.

    Attributes:
        file: The file inside the store.
        array: The array being worked on, if any.
        index: The tile being worked on, if any.
    """

    def __init__(
        self, path: object, file: str, reason: str, array: str | None = None, index: tuple[int, ...] | None = None
    ) -> None:
        tile = f"tile {array}{list(index)}, " if array is not None and index is not None else ""
        super().__init__(path, f"{tile}file {file!r}: {reason}. Finished tiles are kept; the same run resumes.")
        self.file, self.array, self.index = file, array, index


def _cut(text: str | None) -> str:
    return "nothing" if text is None else repr(text if len(text) <= 64 else text[:61] + "...")


class MissingExtraError(JacopsError, ImportError):
    """An optional package is needed for this call.

    Args:
        extra: The pip extra that brings it, as in `pip install jacops[extra]`.
        package: The import name that is missing.
    """

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"this call needs the optional package '{package}': pip install 'jacops[{extra}]'")


class JacopsWarning(UserWarning):
    """A route failed and another was used, or a result has a remark; the result is correct."""


def explain(argument: str, came: object, needed: str, todo: str = "") -> str:
    """Return one sentence or two: `argument` came as `came`, needed was `needed`, do `todo`."""
    words = "None" if came == "a NoneType" else re.sub(r"^a (?=[aeioAEIO]|nd)", "an ", str(came))  # of a type's name
    return f"`{argument}` is {words}, but {needed}." + (f" {todo}" if todo else "")


def warn(message: str) -> None:
    """Warn once per call site of the user, whatever the depth inside jacops."""
    depth, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, JacopsWarning, stacklevel=depth)
