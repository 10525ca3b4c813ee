"""What a recording puts in the place of fused kernels, and the gradients that activation checkpoints lose."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .attention import recompute_alike
from .norms import norm_rules
from .recurrence import RECURRENT, step_by_step
from .restoring import Guard, Setting
from .side_effects import SideEffectWatch, tensors_in

_written_out: ContextVar[bool] = ContextVar("_written_out", default=False)


def norms_written_out() -> Guard:
    """Return a context in which norms are recorded as elementary operations, which have derivatives of any order."""
    return Setting(_written_out.get, _written_out.set, True)


def writes_norms_out() -> bool:
    """Return whether this runs in such a context."""
    return _written_out.get()


def reentrant_checkpoint() -> Any | None:
    """Return the context of the reentrant checkpoint whose forward this runs in; None outside of one.

    Torch's own and the copies of it in other packages all pass the function as `run_function`. Within another one it
    is the outermost that counts: the inner one runs again, with gradients, in the backward of that.
    """
    frame, ctx = sys._getframe(2), None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and {"ctx", "run_function"} <= set(code.co_varnames[: code.co_argcount]):
            ctx = frame.f_locals.get("ctx")
        frame = frame.f_back
    return ctx


def _checkpoint_records_nothing() -> bool:
    """Return whether this runs in the forward of a reentrant checkpoint none of whose arguments requires grad."""
    ctx = reentrant_checkpoint()
    return ctx is not None and not any(getattr(ctx, "needs_input_grad", (True,)))


class RightKernels(TorchFunctionMode):
    """Write out fused kernels whose derivatives torch gets wrong, or which hide where weights enter.

    Weight norm has a wrong second one (its gradgradcheck fails). Norms by statistics of the input have a wrong third
    one, since their second takes these statistics for constants; they are written out where that is requested.

    Args:
        watch: Where it is noted that something is written out.

    Attributes:
        lost: By identity, the tensors whose gradient an activation checkpoint loses. A reentrant one records no node
            where none of its arguments requires grad, so that the graph does not show that it was there.
    """

    def __init__(self, watch: SideEffectWatch | None) -> None:
        super().__init__()
        self.lost: dict[int, Tensor] = {}
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            asked = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
            if asked and _checkpoint_records_nothing():
                self.lost |= {id(t): t for t in asked}
        if func in _REPLACED:
            if self._watch is not None:
                self._watch.replaces = True
            if func is torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
                v, g, *dim = args
                return v * (g / torch.norm_except_dim(v, 2, *dim))
            if func in RECURRENT:
                return step_by_step(func, args, kwargs or {})
            recompute_alike()
        if _written_out.get() and func in (rules := norm_rules()):
            result = rules[func](*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if result is None else result
        return func(*args, **(kwargs or {}))


# No mode sees what the second one calls: torch's functions in Python are passed to it as a whole.
_ATTENTION = {functional.scaled_dot_product_attention, functional.multi_head_attention_forward}
_REPLACED = RECURRENT | _ATTENTION | {torch._weight_norm}  # pyright: ignore[reportPrivateImportUsage]
