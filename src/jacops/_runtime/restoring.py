"""Restoring torch's global state, also after an interrupt between any two lines.

A `with` statement alone does not: a KeyboardInterrupt can be raised in `__enter__` after the state has changed, or
before the first line of `__exit__`. So every guard registers itself, with the state that it saved, before it changes
anything, and every function that uses guards is decorated with `restoring`, which restores what is still registered.
It does so twice, since an interrupt may stop the first attempt; `restore` is therefore idempotent.
"""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from threading import get_ident
from typing import Any, Literal, ParamSpec, Self, TypeVar

import numpy as np
import torch
import torch.utils._python_dispatch as dispatch_modes
from torch import Tensor
from torch._C import (  # pyright: ignore[reportMissingModuleSource]
    _get_dispatch_stack_at,  # pyright: ignore[reportAttributeAccessIssue]
    _len_torch_dispatch_stack,  # pyright: ignore[reportAttributeAccessIssue]
    _len_torch_function_stack,  # pyright: ignore[reportAttributeAccessIssue]
    _pop_torch_dispatch_stack,  # pyright: ignore[reportAttributeAccessIssue]
    _pop_torch_function_stack,  # pyright: ignore[reportAttributeAccessIssue]
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _Entered(threading.local):
    """The guards of a thread that have been entered and not restored yet, in order."""

    def __init__(self) -> None:
        self.guards: list[Guard] = []


_entered = _Entered()


class Guard(ABC):
    """A context manager that saves a state, changes it, and restores it once."""

    def __enter__(self) -> Self:
        self.save()
        _entered.guards.append(self)
        self.change()
        return self

    def __exit__(self, *_: object) -> None:
        guards = _entered.guards
        if guards and guards[-1] is self:
            self.restore()
            guards.pop()
        elif self in guards:  # a suspended generator holds a later one
            self.restore()
            guards.remove(self)

    def save(self) -> None:
        """Keep the state to restore; nothing is changed yet."""
        return

    @abstractmethod
    def change(self) -> None:
        """Change the state."""

    @abstractmethod
    def restore(self) -> None:
        """Restore the saved state; called again where an interrupt stopped the first call."""


class Guards(Guard):
    """Several guards entered in order and restored in reverse order."""

    def __init__(self, *guards: Guard) -> None:
        self._guards = guards

    def __enter__(self) -> Self:
        for guard in self._guards:
            guard.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__()

    def change(self) -> None:
        """Do nothing: each guard is registered itself."""

    restore = change


# Taken for a few assignments at a time and never while other code runs. It is reentrant so that `restoring` can
# release it: `release` raises where this thread does not own it.
process_lock = threading.RLock()
function_modes: Callable[[], int] = _len_torch_function_stack  # how many function modes are entered


def modes_at_work() -> bool:
    """Return whether a function mode or a dispatch mode is active."""
    return bool(function_modes() or _len_torch_dispatch_stack())


# Torch keeps these beside the stack of dispatch modes and sets them back in `__exit__` only.
_FLAGS = tuple(name for name, value in vars(dispatch_modes).items() if name.startswith("_is_in_") and value is False)
_set_flag_in_torch = getattr(dispatch_modes, "set_is_in_mode_without_ignore_compile_internals", None)


def leave_function_modes(many: int) -> None:
    """Leave function modes until `many` are entered."""
    while function_modes() > many:
        _pop_torch_function_stack()


def _flags() -> list[bool]:
    return [getattr(dispatch_modes, name) for name in _FLAGS]


def _restore(guards: int, functions: int, dispatch: int, grad: bool, flags: Sequence[bool] | None) -> None:
    """Restore a thread's cheap global states, the modes first: what follows must not go through a mode that was left.

    Args:
        guards: How many guards were entered.
        functions: How many function modes were.
        dispatch: How many dispatch modes were.
        grad: The gradient mode.
        flags: Torch's flags about dispatch modes; None where there was no such mode.
    """
    leave_function_modes(functions)
    while _len_torch_dispatch_stack() > dispatch:
        mode = _get_dispatch_stack_at(_len_torch_dispatch_stack() - 1)
        _pop_torch_dispatch_stack(getattr(mode, "_mode_key", None))  # torch keeps some modes of its own by key
    for name, flag in zip(_FLAGS, flags or [False] * len(_FLAGS), strict=True):
        setattr(dispatch_modes, name, flag)
    if _set_flag_in_torch is not None:
        _set_flag_in_torch(getattr(dispatch_modes, "_is_in_any_mode_without_ignore_compile_internals", False))
    _release_lock()
    entered = _entered.guards
    while len(entered) > guards:
        entered[-1].restore()
        entered.pop()
    if torch.is_grad_enabled() is not grad:
        torch.set_grad_enabled(grad)


def _release_lock() -> None:
    try:
        while True:
            process_lock.release()
    except RuntimeError:  # not owned
        return


def restoring(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return `function`, after which torch's state is restored however it ends, by an interrupt at any line too."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        guards, functions, dispatch = len(_entered.guards), function_modes(), _len_torch_dispatch_stack()
        grad, flags = torch.is_grad_enabled(), _flags() if dispatch else None
        try:
            try:
                return function(*args, **kwargs)
            except BaseException:
                _restore(guards, functions, dispatch, grad, flags)
                raise
        except BaseException:
            _restore(guards, functions, dispatch, grad, flags)
            raise

    return call


class Setting(Guard):
    """A setting that has another value inside.

    Args:
        read: Returns the setting.
        write: Changes it.
        value: What it is inside.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> None:
        self._read, self._write, self._value = read, write, value

    def save(self) -> None:
        """Keep the setting."""
        self._found = self._read()

    def change(self) -> None:
        """Change it."""
        self._write(self._value)

    def restore(self) -> None:
        """Put it back."""
        self._write(self._found)


class ProcessState:
    """A state of the whole process, which threads share.

    The first guard to enter saves the caller's state, and the last to leave restores it.

    Args:
        read: Returns the state.
        write: Changes it.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self.read, self.write = read, write
        self._found: Any = None
        self._inside: dict[Guard, int] = {}  # with the thread of each

    def enter(self, guard: Guard, value: Any = None) -> None:
        """Note that a guard is inside, and change the state to a value if there is one."""
        with process_lock:
            if not self._inside:
                self._found = self.read()
            self._inside[guard] = get_ident()
            if value is not None:
                self.write(value)

    def leave(self, guard: Guard) -> None:
        """Note that a guard is left; done again it changes nothing."""
        with process_lock:
            if len(self._inside) == 1 and guard in self._inside:
                self.write(self._found)
            self._inside.pop(guard, None)

    def is_entered(self) -> bool:
        """Return whether a guard of this thread is inside."""
        return get_ident() in [*self._inside.values()]


class ProcessSetting(Guard):
    """A state of the whole process that has another value while any thread is inside."""

    def __init__(self, state: ProcessState, value: Any) -> None:
        self._state, self._value = state, value

    def change(self) -> None:
        """Change the state."""
        self._state.enter(self, self._value)

    def restore(self) -> None:
        """Put it back, if no other guard is inside."""
        self._state.leave(self)


class GradientsKept(Guard):
    """Tensors whose `.grad` is None inside and what it was before afterwards.

    Args:
        kept: The tensors, whose `.grad` is restored.
        cleared: Tensors whose `.grad` is None afterwards.
    """

    def __init__(self, kept: Iterable[Tensor], cleared: Iterable[Tensor] = ()) -> None:
        self._kept = [(tensor, tensor.grad) for tensor in kept]
        self._cleared = list(cleared)

    def change(self) -> None:
        """Set `.grad` to None."""
        for tensor, _ in self._kept:
            tensor.grad = None

    def restore(self) -> None:
        """Put the gradients back."""
        for tensor in self._cleared:
            tensor.grad = None
        for tensor, grad in self._kept:
            tensor.grad = grad


class Hooks(Guard):
    """Hooks that are removed afterwards.

    Args:
        register: Functions that register one hook each and return its handle.
    """

    def __init__(self, register: Iterable[Callable[[], Any]]) -> None:
        self._register, self._handles = list(register), []

    def change(self) -> None:
        """Register the hooks."""
        for register in self._register:
            self._handles.append(register())

    def restore(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()


class WarningsIgnored(Guard):
    """Warnings that match are ignored inside.

    Args:
        message: A regular expression for the start of the message; all warnings by default.
        category: The kind of warning.
    """

    def __init__(self, message: str = "", category: type[Warning] = Warning) -> None:
        self._filter = (message, category)
        self._context = warnings.catch_warnings()

    def change(self) -> None:
        """Add the filter."""
        self._context.__enter__()
        warnings.filterwarnings("ignore", *self._filter)

    def restore(self) -> None:
        """Put the filters back."""
        try:
            self._context.__exit__(None, None, None)
        except (RuntimeError, AttributeError):  # an interrupt came before the filters were saved
            return


class NumericWarningsIgnored(Setting):
    """NumPy's warnings of these kinds (`"over"`, `"invalid"` …) are ignored inside."""

    def __init__(self, *kinds: Literal["over", "invalid", "divide", "under"]) -> None:
        super().__init__(np.geterr, lambda actions: np.seterr(**actions), dict.fromkeys(kinds, "ignore"))
