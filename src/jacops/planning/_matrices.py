"""The plans of Jacobians by tensors of the caller's and by parameters, from one forward pass."""

from __future__ import annotations

from typing import Any

from .._backends._torch.matrix_plan import MatrixPlan, matrix_plan
from .._backends._torch.record import record_closure, record_model
from .._backends._torch.tape import Tape
from ..trees import select
from ._base import Plan, table


def plan_full_jacobian(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `full_jacobian`; `func` is called once."""
    func, outputs = arguments["func"], arguments["outputs"]
    picked = (lambda: select(func(), outputs)) if callable(func) and outputs is not None else func
    tape = record_closure(picked, arguments["params"], "full_jacobian", empty=True).tape
    found = matrix_plan(tape, arguments["budget"], chunk_size=arguments["chunk_size"], out=arguments["out"] is not None)
    return _plan("full_jacobian", tape, found, None)


def plan_modjac(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `modjac`; the model runs forward once, on a private copy."""
    trainable = arguments["trainable_only"]
    tape = record_model(
        arguments["model"],
        arguments["input"],
        call="modjac",
        parameters=lambda name, p: p.requires_grad or not trainable,
        outputs=arguments["outputs"],
    ).tape
    forward = arguments["strategy"] == "forward-mode"
    found = matrix_plan(tape, arguments["budget"], forward, out=arguments["out"] is not None)
    return _plan("modjac", tape, found, "asked for by `strategy=`")


def _plan(call: str, tape: Tape, found: MatrixPlan, asked: str | None) -> Plan:
    rows, columns = tape.codomain.dim, tape.domain.dim + 1
    reason = asked or "fewer sweeps"
    other = "not asked for by `strategy=`" if asked else "more sweeps"
    routes: dict[str, tuple[int | None, int | None, str]] = {
        "reverse": (rows, found.peak(False), other if found.columns else reason),
        "forward": (columns, found.peak(True), reason if found.columns else other),
    }
    if asked and not found.columns:
        routes["reverse"] = rows, found.peak(False), "at most; fewer where samples share sweeps by layers"
    chosen = "forward" if found.columns else "reverse"
    return Plan(
        call, table(routes, chosen), found.result, found.startup, found.budget, found.chunk, "vectors to a pass"
    )
