"""Recurrent layers step by step: as products of matrices, whose weights are seen and which have second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .restoring import ProcessSetting, ProcessState, restoring

RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
"""Functions that run a whole recurrence, by one kernel where there is one."""


def _choose(kernels: Sequence[bool]) -> None:
    torch._C._set_mkldnn_enabled(kernels[0])
    torch._C._set_cudnn_enabled(kernels[1])


# Kernels for whole recurrences.
_KERNELS = ProcessState(lambda: (torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()), _choose)


@restoring
def step_by_step(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a recurrence gives, recorded step by step."""
    with ProcessSetting(_KERNELS, (False, False)):
        return function(*args, **kwargs)
