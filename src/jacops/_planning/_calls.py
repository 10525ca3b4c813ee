"""The plans of calls: of Jacobians by samples, by tensors of the caller's and by parameters, and of `dense`."""

from __future__ import annotations

from typing import Any

from .._array_inputs import from_arrays
from .._ladder.protocol import everything
from .._operators import Operator
from .._operators._dense import DENSE, DenseLimits
from .._picks import picked
from .._torch.protocol import (
    BY_SAMPLES,
    WHOLE,
    FollowedModel,
    ModelRun,
    Samples,
    WholeAsk,
    planned,
    record_closure,
)
from .._trees import select
from ..errors import InputTypeError
from ._base import Plan, listed, planned_by


def plan_samples(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `compute_jacobian`, from runs of one and of two samples."""
    return _by_samples("compute_jacobian", arguments["x"], arguments)


def plan_contributions(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `contributions`, from runs of one and of two samples."""
    model, options = arguments["model"], arguments["options"]
    return _by_samples("contributions", from_arrays(arguments["x"], model), {**arguments, **options})


def _by_samples(call: str, x: Any, arguments: dict[str, Any]) -> Plan:
    named = ("outputs", "target", "shared", "at", "freeze", "checks", "fallback", "batch_size")
    options = {name: arguments[name] for name in named if name in arguments}
    samples = Samples(arguments["model"], x, call=call, **options)
    if call == "contributions":
        samples.beside = FollowedModel.beside(samples)
    allocated, mode = arguments.get("out") is None, arguments.get("mode", "auto")
    found = planned(samples, arguments.get("budget"), mode, allocated)
    return listed(found, BY_SAMPLES, found.result, found.startup, found.budget, "samples to a sweep")


def plan_full_jacobian(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `full_jacobian`; `func` is called once."""
    func, outputs = arguments["func"], arguments["outputs"]
    picked = (lambda: select(func(), outputs)) if callable(func) and outputs is not None else func
    lin = record_closure(picked, arguments["params"], "full_jacobian", empty=True).lin
    placed, chunk_size = arguments["out"] is not None, arguments["chunk_size"]
    return _plan(WholeAsk(lin, arguments["budget"], layers=False, placed=placed, chunk_size=chunk_size))


def plan_modjac(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `modjac`; the model runs forward once, on a private copy, and backward for one cotangent."""
    model, outputs = arguments["model"], arguments["outputs"]
    picks = picked(model, arguments["parameters"], default=everything)
    lin = ModelRun(model, arguments["input"], call="modjac", parameters=picks, outputs=outputs).recorded().lin
    columns = arguments["strategy"] == "forward-mode"
    placed, create_graph = arguments["out"] is not None, arguments["create_graph"]
    return _plan(WholeAsk(lin, arguments["budget"], columns, create_graph, placed=placed))


def _plan(ask: WholeAsk) -> Plan:
    return listed(ask, WHOLE, ask.result, ask.startup, ask.allowed, "vectors to a pass")


def plan_dense(arguments: dict[str, Any]) -> Plan:
    """Return the plan of `Operator.dense`."""
    operator = arguments["self"]
    if not isinstance(operator, Operator):
        raise InputTypeError.of("the first argument", f"a {type(operator).__name__}", "an operator is needed")
    limits = DenseLimits(operator, arguments["budget"], arguments["out"])
    ask = limits.ask
    return listed(ask.leading, DENSE, limits.result, limits.startup, limits.budget, ask.held.unit)


planned_by(plan_dense)(Operator.dense)
