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
    name, products = found.way.name, {"by columns": n, "by rows": m}
    few = "by columns" if n <= m else "by rows"
    routes: dict[str, tuple[int | None, int | None, str]] = {
        way: (sweeps, None, "fewer vectors" if way == few else "more vectors") for way, sweeps in products.items()
    }
    if name in products:
        routes[name] = products[name], found.peak, routes[name][2]
    else:
        routes = {name: (None, found.peak, _WHY.get(name, "")), **routes}
    told = f"{type(operator).__name__}.dense"
    way, routes_told = found.way, table(routes, name)
    return Plan(told, routes_told, found.result, found.startup, found.budget, way.chunk, way.unit)


_WHY = {
    "by layers": "fewest sweeps: one per number at the layers' outputs",
    "in memory": "the entries are there",
    "batch by batch": "one pass over the data",
    "layer by layer": "each parameter writes its columns",
}


planned_by(plan_dense)(Operator.dense)
