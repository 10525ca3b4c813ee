"""Which kernel attention runs on, also where activation checkpoints compute it again in a backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from .restoring import Guard, ProcessSetting, ProcessState, restoring


def _kernel(name: str) -> tuple[Callable[[], bool], Callable[[bool], None]]:
    return getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}")


_KERNELS = {name: _kernel(name) for name in ("math", "flash", "mem_efficient", "cudnn", "overrideable")}
MATH = [name == "math" for name in _KERNELS]


def _enabled() -> list[bool]:
    return [is_enabled() for is_enabled, _ in _KERNELS.values()]


def _choose_attention(choice: Sequence[bool]) -> None:
    for (_, choose), enabled in zip(_KERNELS.values(), choice, strict=True):
        choose(enabled)


ATTENTION = ProcessState(_enabled, _choose_attention)


def math_attention() -> Guard:
    """Return a context with attention on the math kernel: the fused ones have no second derivative."""
    return ProcessSetting(ATTENTION, MATH)


def recompute_alike() -> None:
    """Let the checkpoints in whose forwards this runs compute attention again by the math kernel, if that is chosen.

    Those that are not reentrant keep what they run again in a local variable, and compare shapes and dtypes of what is
    saved for the backward pass; fused kernels save other tensors.
    """
    if _enabled() != MATH:
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "checkpoint" and "gen" in frame.f_code.co_varnames:
            kept = getattr(frame.f_locals.get("gen"), "gi_frame", None)
            found = None if kept is None else kept.f_locals.get("new_frame")
            run = getattr(found, "recompute_fn", None)
            if found is not None and run is not None and not hasattr(run, "__wrapped__"):
                found.recompute_fn = _with_math(run)
        frame = frame.f_back


def _with_math(run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    @restoring
    def again(*args: Any) -> Any:
        with math_attention():
            return run(*args)

    return again
