"""The plans of Jacobians by tensors of the caller's and by parameters, from one forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .._torch.protocol import (
    Linearization,
    MatrixPlan,
    layer_route,
    layers_plan,
    matrix_plan,
    record_closure,
    record_model,
)
from ..trees import select
from ._base import Plan, Route, table


def plan_full_jacobian(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `full_jacobian`; `func` is called once."""
    func, outputs = arguments["func"], arguments["outputs"]
    picked = (lambda: select(func(), outputs)) if callable(func) and outputs is not None else func
    lin = record_closure(picked, arguments["params"], "full_jacobian", empty=True).lin
    found = matrix_plan(lin, arguments["budget"], chunk_size=arguments["chunk_size"], out=arguments["out"] is not None)
    return _plan("full_jacobian", lin, found, None)


def plan_modjac(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `modjac`; the model runs forward once, on a private copy, and backward for one cotangent."""
    trainable = arguments["trainable_only"]
    lin = record_model(
        arguments["model"],
        arguments["input"],
        call="modjac",
        parameters=lambda name, p: p.requires_grad or not trainable,
        outputs=arguments["outputs"],
    ).lin
    forward, budget, out = arguments["strategy"] == "forward-mode", arguments["budget"], arguments["out"] is not None
    found = matrix_plan(lin, budget, forward, out=out)
    if forward:
        return _plan("modjac", lin, found, "asked for by `strategy=`")
    route = None if arguments["create_graph"] else layer_route(lin)
    layers = layers_plan(route, budget, out, found.startup) if route else None
    plain = _plan("modjac", lin, found, "asked for by `strategy=`")
    if layers is None:
        reason = (
            "more than the budget" if route else "samples mix, or a parameter enters by an operation without a rule"
        )
        return replace(plain, routes=(*plain.routes, Route("by layers", None, None, reason)))
    own = Route("by layers", layers.sweeps, layers.peak, "all samples to a sweep", chosen=True)
    others = [replace(other, chosen=False) for other in plain.routes]
    others[0] = replace(others[0], why="more sweeps")
    return replace(plain, routes=(own, *others), chunk=layers.together, unit="sweeps to a write")


def _plan(call: str, lin: Linearization, found: MatrixPlan, asked: str | None) -> Plan:
    rows, columns = lin.codomain.dim, lin.domain.dim + 1
    reason = asked or "fewer sweeps"
    other = "not asked for by `strategy=`" if asked else "more sweeps"
    routes: dict[str, tuple[int | None, int | None, str]] = {
        "reverse": (rows, found.peak(False), other if found.columns else reason),
        "forward": (columns, found.peak(True), reason if found.columns else other),
    }
    chosen = "forward" if found.columns else "reverse"
    return Plan(
        call, table(routes, chosen), found.result, found.startup, found.budget, found.chunk, "vectors to a pass"
    )
