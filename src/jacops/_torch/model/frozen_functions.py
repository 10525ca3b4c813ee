"""Functions of torch with a part of them held constant, by the rules of `frozen_rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..._runtime.agreement import few_operations_tolerance
from ..._runtime.contexts import random_state_kept
from ..._runtime.restoring import restoring
from ..._runtime.side_effects import held_constant, unwatched
from ...errors import ModelStateError
from .frozen_rules import BOUNDED, KEEPING, PIECEWISE, RULES, SMOOTH, Frozen
from .function_call import FunctionCall, dependent, out_of_place

_COARSE = 5e-2  # six roundings of bfloat16 (2**-7 each): attention rounds scores, patterns and their sums


def _rule(call: FunctionCall) -> Callable[[FunctionCall], Frozen] | None:
    home = getattr(call.func, "__module__", None)  # methods of tensors have none
    return RULES.get(call.name) if home is None or home.partition(".")[0] == "torch" else None


def applied(call: FunctionCall) -> Frozen:
    """Return what a call gives with its nonlinear part held constant, and what that is."""
    rule = _rule(call)
    if rule is None:
        return call.run(), None
    result, what = rule(call)
    if call.in_place and result is not call.first:
        result = call.first.copy_(result)
    return result, what


@restoring
def unfrozen(call: FunctionCall) -> Any:
    """Return what a call gives as it is, out of place and with the same random draws; None where there is no rule."""
    if _rule(call) is None:
        return None
    with unwatched(), held_constant(), random_state_kept():
        return out_of_place(call.func)(*call.args, **call.kwargs)


def check_values(call: FunctionCall, result: Any, otherwise: Any) -> None:
    """Refuse a result with a part held constant that differs from the function's own by more than rounding.

    Raises:
        ModelStateError: It does.
    """
    for one, other in zip(tree_leaves(result), tree_leaves(otherwise), strict=True):
        most = few_operations_tolerance(other.dtype, _COARSE)
        with unwatched(), held_constant():
            size = float(other.abs().masked_fill(~torch.isfinite(other), 0).max()) if other.numel() else 0.0
            same = one.shape == other.shape and torch.allclose(one, other, most, most * size, equal_nan=True)
        if not same or one.dtype != other.dtype:
            came = f"naming a module that calls {call.name} in a way that is not known here"
            raise ModelStateError.of("freeze", came, "with a part held constant it gives other values", "Leave it out.")


def note_gates(call: FunctionCall, result: Any) -> None:
    """Note by how much the results of a call are gates."""
    made = dependent(result)
    if not made:
        return
    level = 2 if call.name in BOUNDED else 1 if call.name in SMOOTH | PIECEWISE else 0
    if not level and call.name in KEEPING:
        level = min((call.gate(t) for t in dependent((call.args, call.kwargs))), default=0)
    for tensor in made:
        call.gates[tensor] = level
