"""Recurrent layers step by step: as products of matrices, whose weights are seen and which have second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from .restoring import Guard, process_lock, restoring

RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
"""Functions that run a whole recurrence, by one kernel where there is one."""


class _StepByStep(Guard):
    """No kernel for whole recurrences while anybody records one.

    Torch keeps this choice for the whole process, so threads share it: the first to enter saves the caller's choice
    and the last to leave restores it.
    """

    _inside: ClassVar[set[Guard]] = set()
    _found: ClassVar[list[bool]] = []

    def change(self) -> None:
        with process_lock:
            if not self._inside:
                self._found[:] = [torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()]
            self._inside.add(self)
            _choose(False, False)

    def restore(self) -> None:
        with process_lock:
            if self._inside == {self}:
                _choose(*self._found)
            self._inside.discard(self)


def _choose(mkldnn: bool, cudnn: bool) -> None:
    torch._C._set_mkldnn_enabled(mkldnn)
    torch._C._set_cudnn_enabled(cudnn)


@restoring
def step_by_step(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a recurrence gives, recorded step by step."""
    with _StepByStep():
        return function(*args, **kwargs)
