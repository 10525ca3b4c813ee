"""Routes: one tuple a question; what is added to it is planned, described, checked, left and tried again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
import oracle
from cases import F64
from jacops._ladder.failures import RouteFailedError
from jacops._ladder.plan import Cost, Memory
from jacops._planning import _calls
from jacops._torch.routes import whole_matrix
from jacops._torch.routes.whole import BlocksMatchPlain
from jacops._torch.routes.whole_ask import WholeAsk, WholeBlocks
from jacops._torch.samples import batch, plan, routes
from jacops._torch.samples.ask import BatchAsk
from jacops._torch.samples.batch import Samples
from jacops._torch.samples.independent import SamplesIndependent
from jacops._torch.samples.sweeps import sweep
from jacops._torch.sweeps import linearization, pulls
from jacops._torch.sweeps.ask import SweepAsk
from jacops._torch.sweeps.linearization import Linearization
from small import close, draw


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)


class Table:
    """A route of a test's own to Jacobians of samples: sweeps, scaled by what `factor` says."""

    name, claims, leaving = "table", (SamplesIndependent(decisive=False),), "noted"

    def __init__(self, factor: float = 1.0, refusal: str | None = None) -> None:
        self.factor, self.refusal, self.taken = factor, refusal, 0

    def refuses(self, ask: BatchAsk) -> str | None:
        return ask.apart if ask.apart is not None else self.refusal

    def cost(self, ask: BatchAsk) -> Cost:
        return Cost(1, lambda: ask.memory("reverse") or Memory(0, 0))

    def describe(self, ask: BatchAsk) -> str:
        return "read from a table"

    def value(self, ask: BatchAsk) -> Linearization:
        self.taken += 1
        sweep(ask.lin, ask.result.blocks, ask.where, "reverse")
        for row in ask.result.blocks:
            for block in row:
                block[ask.where] *= self.factor
        return ask.lin


def with_route(monkeypatch: pytest.MonkeyPatch, route: object) -> None:
    tuple_with_it = (route, *routes.BY_SAMPLES)
    for module in (batch, plan, _calls):
        monkeypatch.setattr(module, "BY_SAMPLES", tuple_with_it)


def described(model: nn.Module, x: Tensor, **options: Any) -> str:
    return Samples(model, x, call="compute_jacobian", **options).jacobians(1024).route


def test_a_route_that_is_added_is_planned_and_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with_route(monkeypatch, Table())
    model, x = net(), draw(6, 4)
    found = jacops.plan(jacops.compute_jacobian, model, x)
    assert found.chosen.name == "table"
    assert "→ table" in repr(found)
    close(jacops.compute_jacobian(model, x), oracle.input_jacobian(model, x))
    assert "read from a table" in described(model, x)


def test_a_route_that_does_not_apply_says_so_in_plan_and_description(monkeypatch: pytest.MonkeyPatch) -> None:
    with_route(monkeypatch, Table(refusal="the table is empty"))
    model, x = net(), draw(6, 4)
    assert "the table is empty" in repr(jacops.plan(jacops.compute_jacobian, model, x))
    close(jacops.compute_jacobian(model, x), oracle.input_jacobian(model, x))
    assert "the table is empty" in described(model, x)


def test_wrong_numbers_are_caught_and_left_and_the_reason_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Table(factor=1.01)
    with_route(monkeypatch, route)
    model, x = net(), draw(6, 4)
    with pytest.warns(
        jacops.JacopsWarning, match=r"compute_jacobian: samples mix: .* off by .* Route used: reverse, 3 pulls"
    ):
        found = jacops.compute_jacobian(model, x)
    close(found, oracle.input_jacobian(model, x))
    assert "reverse, 3 pulls (because samples mix: their shared sweep is off by" in described(model, x)
    assert route.taken == 1  # and not again
    with pytest.raises(jacops.errors.NotDifferentiableError, match="fallback='error'"):
        jacops.compute_jacobian(net(), x, fallback="error")


@pytest.mark.parametrize("first", ["silent", "error"])
def test_a_wrong_route_is_an_error_in_later_calls_too_where_leaving_it_is_forbidden(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    route = Table(factor=1.01)
    with_route(monkeypatch, route)
    model, x = net(), draw(6, 4)
    if first == "silent":
        jacops.compute_jacobian(model, x, fallback="silent")
    else:
        with pytest.raises(jacops.errors.NotDifferentiableError, match="fallback='error'"):
            jacops.compute_jacobian(model, x, fallback="error")
    with pytest.raises(
        jacops.errors.NotDifferentiableError, match="their shared sweep is off by .* and fallback='error'"
    ):
        jacops.compute_jacobian(model, x, fallback="error")
    assert route.taken == 1
    route.refusal = "the table is empty"  # it does not apply, so that nothing is left
    close(jacops.compute_jacobian(model, x, fallback="error"), oracle.input_jacobian(model, x))


class Unprepared(Table):
    """A route whose preparation fails."""

    def refuses(self, ask: BatchAsk) -> str | None:
        self.taken += 1
        raise RouteFailedError("the table cannot be opened")


def test_a_route_that_cannot_be_prepared_is_left_for_later_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Unprepared()
    with_route(monkeypatch, route)
    model, x = net(), draw(6, 4)
    for _ in range(3):
        close(jacops.compute_jacobian(model, x), oracle.input_jacobian(model, x))
        assert "the table cannot be opened" in described(model, x)
    assert route.taken == 1


def test_a_route_is_tried_again_once_its_cause_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Table(factor=2.0)
    with_route(monkeypatch, route)
    model, x = net(), draw(6, 4)
    expected = oracle.input_jacobian(model, x)
    with pytest.warns(jacops.JacopsWarning, match="off by"):
        jacops.compute_jacobian(model, x)
    route.factor = 1.0
    for _ in range(40):
        close(jacops.compute_jacobian(model, x), expected)
    assert route.taken > 1
    assert "read from a table" in described(model, x)


class WholeTable:
    """The same for whole Jacobians by parameters."""

    name, claims, leaving = "table", (BlocksMatchPlain(),), "noted"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def refuses(self, ask: WholeAsk) -> str | None:
        return None

    def cost(self, ask: WholeAsk) -> Cost:
        return Cost(1, lambda: ask.sweeping(False))

    def describe(self, ask: WholeAsk) -> str:
        return "read from a table"

    def value(self, ask: WholeAsk) -> WholeBlocks:
        blocks = whole_matrix.jacobian_blocks(ask.lin)
        return WholeBlocks([[self.factor * block for block in row] for row in blocks])


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_whole_jacobians_take_an_added_route_where_it_is_right(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    added = (WholeTable(factor), *whole_matrix.WHOLE)
    model, x = net(), draw(6, 4)
    sweeps = jacops.modjac(model, x)
    monkeypatch.setattr(_calls, "WHOLE", added)
    assert jacops.plan(jacops.modjac, model, x).chosen.name == "table"
    jacobian_blocks = whole_matrix.jacobian_blocks

    def by_sweeps(lin: Linearization) -> list[list[Tensor]]:
        with monkeypatch.context() as inner:
            inner.setattr(whole_matrix, "WHOLE", added[1:])
            return jacobian_blocks(lin)

    monkeypatch.setattr(whole_matrix, "WHOLE", added)
    monkeypatch.setattr(whole_matrix, "jacobian_blocks", by_sweeps)
    if factor == 1.0:
        close(jacops.modjac(model, x), sweeps)
    else:
        with pytest.warns(jacops.JacopsWarning, match="modjac: the blocks disagree .*Route used"):
            close(jacops.modjac(model, x), sweeps)


class Doubled:
    """A batched pull that is wrong."""

    name, claims, leaving = "doubled", (pulls.MatchesPlain(),), "noted"

    def refuses(self, ask: SweepAsk) -> str | None:
        return "" if ask.many == 1 else None

    def cost(self, ask: SweepAsk) -> Cost:
        return Cost(1)

    def describe(self, ask: SweepAsk) -> str:
        return "doubled"

    def value(self, ask: SweepAsk) -> list[Tensor]:
        return [2 * rows for rows in pulls.PlainPull().value(ask)]


def test_operators_show_why_a_pull_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearization.Linearization, "pulls", (Doubled(), *pulls.PULLS))
    model, x = net(), draw(6, 4)
    J = jacops.jacobian(model, x)
    rows = draw(4, J.shape[0])
    with pytest.warns(jacops.JacopsWarning, match="disagrees with the plain one"):
        found = (J.T @ rows.T).T
    monkeypatch.undo()
    close(found, (jacops.jacobian(net(), x).T @ rows.T).T)
    assert "because a doubled backward pass disagrees" in repr(J)
