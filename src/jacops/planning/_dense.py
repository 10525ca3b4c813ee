"""The plan of an operator's `dense`."""

from __future__ import annotations

from typing import Any

from ..errors import InputTypeError
from ..operators import Operator
from ..operators._dense import DENSE, DenseLimits
from ._base import Plan, listed, planned_by


def plan_dense(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `Operator.dense`."""
    operator = arguments["self"]
    if not isinstance(operator, Operator):
        raise InputTypeError.of("the first argument", f"a {type(operator).__name__}", "an operator is needed")
    limits = DenseLimits(operator, arguments["budget"], arguments["out"])
    ask = limits.ask
    return listed(ask.leading, DENSE, limits.result, limits.startup, limits.budget, ask.held.unit)


planned_by(plan_dense)(Operator.dense)
