"""The plans of Jacobians by tensors of the caller's and by parameters, from one forward pass."""

from __future__ import annotations

from typing import Any

from .._ladder.protocol import everything
from .._picks import picked
from .._torch.protocol import WHOLE, WholeAsk, record_closure, record_model
from .._trees import select
from ._base import Plan, listed


def plan_full_jacobian(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `full_jacobian`; `func` is called once."""
    func, outputs = arguments["func"], arguments["outputs"]
    picked = (lambda: select(func(), outputs)) if callable(func) and outputs is not None else func
    lin = record_closure(picked, arguments["params"], "full_jacobian", empty=True).lin
    placed, chunk_size = arguments["out"] is not None, arguments["chunk_size"]
    return _plan(WholeAsk(lin, arguments["budget"], layers=False, placed=placed, chunk_size=chunk_size))


def plan_modjac(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `modjac`; the model runs forward once, on a private copy, and backward for one cotangent."""
    lin = record_model(
        arguments["model"],
        arguments["input"],
        call="modjac",
        parameters=picked(arguments["model"], arguments["parameters"], default=everything),
        outputs=arguments["outputs"],
    ).lin
    columns = arguments["strategy"] == "forward-mode"
    placed, create_graph = arguments["out"] is not None, arguments["create_graph"]
    return _plan(WholeAsk(lin, arguments["budget"], columns, create_graph, placed=placed))


def _plan(ask: WholeAsk) -> Plan:
    return listed(ask, WHOLE, ask.result, ask.startup, ask.allowed, "vectors to a pass")
