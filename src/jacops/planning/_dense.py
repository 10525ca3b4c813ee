"""The plan of an operator's `dense`."""

from __future__ import annotations

from typing import Any

from ..errors import InputTypeError, explain
from ..operators import Operator
from ..operators._dense import dense_plan
from ._base import Plan, planned_by, table


def plan_dense(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `Operator.dense`."""
    operator = arguments["self"]
    if not isinstance(operator, Operator):
        raise InputTypeError(explain("the first argument", f"a {type(operator).__name__}", "an operator is needed"))
    m, n = operator.shape
    found = dense_plan(operator, arguments["budget"], arguments["out"])
    why = "fewer vectors", "more vectors"
    routes = {
        "by columns": (n, found.peak if n <= m else None, why[n > m]),
        "by rows": (m, None if n <= m else found.peak, why[n <= m]),
    }
    chosen = "by columns" if n <= m else "by rows"
    return Plan(
        f"{type(operator).__name__}.dense",
        table(routes, chosen),
        found.result,
        found.startup,
        found.budget,
        found.chunk,
        "vectors to a pass",
    )


planned_by(plan_dense)(Operator.dense)
