"""The plan of an operator's `dense`."""

from __future__ import annotations

from typing import Any

from .._operators import Operator
from .._operators._dense import DenseLimits
from ..errors import InputTypeError
from ._base import Plan, planned_by, table


def plan_dense(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `Operator.dense`."""
    operator = arguments["self"]
    if not isinstance(operator, Operator):
        raise InputTypeError.of("the first argument", f"a {type(operator).__name__}", "an operator is needed")
    m, n = operator.shape
    limits = DenseLimits.of(operator, arguments["budget"], arguments["out"])
    route = operator._fill_route(limits.room)
    name, products, peak = route.name, {"by columns": n, "by rows": m}, limits.peak(route)
    few = "by columns" if n <= m else "by rows"
    routes: dict[str, tuple[int | None, int | None, str]] = {
        way: (sweeps, None, "fewer vectors" if way == few else "more vectors") for way, sweeps in products.items()
    }
    if name in products:
        routes[name] = products[name], peak, routes[name][2]
    else:
        routes = {name: (None, peak, _WHY.get(name, "")), **routes}
    told = f"{operator.name}.dense"
    rows = table(routes, name)
    return Plan(told, rows, limits.result, limits.startup(route), limits.budget, route.chunk, route.unit)


_WHY = {
    "by layers": "fewest sweeps: one per number at the layers' outputs",
    "in memory": "the entries are there",
    "batch by batch": "one pass over the data",
    "layer by layer": "each parameter writes its columns",
}


planned_by(plan_dense)(Operator.dense)
