"""The memory of forming an operator: predicted, kept to, and never a second copy of the matrix."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from cases import F64
from jacops import Problem
from jacops._operators._data import BlockDiagonal, StackOver, SumOver
from jacops._planning import plan
from jacops._runtime.memory import Meter
from jacops._space import Space
from jacops._torch.routes import curvature, gauss_newton
from jacops.linalg import Diagonal, Identity, Matrix, Operator
from small import draw, settled

VERBS: dict[str, Callable[..., Any]] = {"hessian": jacops.hessian, "ggn": jacops.ggn}


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the route by layers for small models too."""
    for module in (curvature, gauss_newton):
        monkeypatch.setattr(module, "pays", lambda *_: True)


def curved(verb: str = "hessian", n: int = 8, widths: tuple[int, int] = (12, 20)) -> Any:
    model = settled(nn.Sequential(nn.Linear(widths[0], widths[1]), nn.Tanh(), nn.Linear(widths[1], 3)))
    return VERBS[verb](model, F.mse_loss, draw(n, widths[0]), draw(n, 3, seed=5))


def by_products(operator: Any) -> Tensor:
    return replace(operator, formed=None).dense()


def metered(operator: Operator) -> tuple[Tensor, float]:
    """Return a matrix, and the most bytes alive meanwhile in matrices of its size."""
    with Meter() as meter:
        matrix = operator.dense()
    return matrix, meter.peak / max(1, matrix.numel() * matrix.element_size())


# ---- composites form their parts in place --------------------------------------------------------------------------

COMPOSITES: dict[str, tuple[Callable[[Any], Operator], Callable[[Tensor], Tensor]]] = {
    "scaled": (lambda H: 2.0 * H, lambda A: 2 * A),
    "negative": (lambda H: -H, lambda A: -A),
    "damped": (lambda H: H + 0.1 * Identity(H.domain), lambda A: A + 0.1 * torch.eye(len(A), dtype=A.dtype)),
    "damped first": (lambda H: 0.1 * Identity(H.domain) + H, lambda A: A + 0.1 * torch.eye(len(A), dtype=A.dtype)),
    "twice": (lambda H: H + 0.5 * H, lambda A: 1.5 * A),
    "with a diagonal": (
        lambda H: H + Diagonal(torch.arange(float(H.shape[0]), dtype=F64), H.domain),
        lambda A: A + torch.arange(float(len(A)), dtype=F64).diag(),
    ),
}


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_is_formed_by_layers_without_a_second_matrix(name: str, verb: str) -> None:
    compose, expected = COMPOSITES[name]
    operator = curved(verb)
    matrix, most = metered(compose(operator))
    torch.testing.assert_close(matrix, expected(by_products(operator)))
    assert "through" in operator.formed.routes["dense"]
    assert most < 1.8


@pytest.mark.usefixtures("layers")
def test_sums_that_are_not_symmetric_are_formed_in_place_too() -> None:
    H, G = curved(), curved("ggn")
    other = Matrix(draw(*H.shape, seed=3), H.domain, H.codomain)
    A, B, C = by_products(H), by_products(G), other.matrix
    for operator, expected in (
        (other + H, C + A),
        ((H + other) + G, C + A + B),
        ((2.0 * (other + H)).T, 2 * (C.T + A)),
    ):
        matrix, most = metered(operator)
        torch.testing.assert_close(matrix, expected)
        assert most < 1.8


def test_a_matrix_is_written_where_it_belongs() -> None:
    A = Matrix(draw(300, 200))
    out = torch.full((300, 200), torch.nan, dtype=F64)
    with Meter() as meter:
        assert A.dense(out) is out
    assert meter.peak < 64  # the sum by which it is seen to be finite
    assert torch.equal(out, A.matrix)
    assert torch.equal(A.T.dense(), A.matrix.T)
    assert torch.equal((3.0 * A).dense(), 3 * A.matrix)
    torch.testing.assert_close((A + 2.0 * A).dense(), 3 * A.matrix)


def test_blocks_are_written_side_by_side() -> None:
    A, B = Matrix(draw(3, 3)), Matrix(draw(2, 2))
    whole = BlockDiagonal((A, B), Space.flat(5, "x", A.matrix))
    expected = torch.block_diag(A.matrix, B.matrix)
    torch.testing.assert_close(whole.dense(), expected)
    torch.testing.assert_close((whole + 2.0 * whole).dense(), 3 * expected)


# ---- sums over batches ---------------------------------------------------------------------------------------------


def batches(n: int = 23, each: int = 5) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = settled(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)))
    x, y = draw(n, 12), draw(n, 3, seed=5)
    return model, [(x[i : i + each], y[i : i + each]) for i in range(0, n, each)]


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("verb", VERBS)
def test_batches_need_no_second_matrix_also_where_the_route_is_new(verb: str) -> None:
    model, data = batches()
    problem = Problem(model, nn.MSELoss(), data, l2=0.3)
    operator = getattr(problem, verb)()
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    expected = by_products(VERBS[verb](model, F.mse_loss, x, y)) + 0.3 * torch.eye(operator.shape[0], dtype=F64)
    matrix, most = metered(operator)
    torch.testing.assert_close(matrix, expected)
    assert all("through" in part.formed.routes["dense"] for _, part in operator.parts())
    assert most < 1.8
    other = Matrix(draw(*operator.shape), operator.domain, operator.codomain)
    torch.testing.assert_close((other + 2.0 * operator).dense(), other.matrix + 2 * expected)


class Wrong:
    """Layers that add something of their own."""

    def __init__(self, right: Any, by: float = 1.0) -> None:
        self.right, self.by = right, by

    def working(self, most: int) -> float:
        return self.right.working(most)

    def add(self, matrix: Tensor, weight: float, most: int) -> str:
        said = self.right.add(matrix, weight, most)
        matrix[3, 5] += self.by
        return said


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("by", [1.0, torch.nan])
def test_a_batch_that_spoils_the_sum_has_it_started_again(by: float) -> None:
    model, data = batches()
    parts = [jacops.hessian(model, F.mse_loss, x, y) for x, y in data]
    right = parts[-1].formed.prepare
    broken = replace(parts[-1], formed=replace(parts[-1].formed, prepare=lambda: Wrong(right(), by)))
    total = SumOver(lambda: iter([(0.5, part) for part in [*parts[:-1], broken]]), parts[0].domain)
    torch.testing.assert_close(total.dense(), sum(0.5 * by_products(part) for part in parts))


@pytest.mark.usefixtures("layers")
def test_what_rounding_would_hide_goes_by_products() -> None:
    large, small = curved(), curved("ggn", n=9)
    total = SumOver(lambda: iter([(1e14, large), (1.0, small)]), large.domain)
    torch.testing.assert_close(total.dense(), 1e14 * by_products(large) + by_products(small))
    assert "because rounding of the sum would hide" in small.formed.routes["dense"]


def test_rows_of_batches_are_written_in_place() -> None:
    J = [Matrix(draw(n, 50, seed=n)) for n in (40, 60)]
    parts, rows = [(1.0, 0, J[0]), (2.0, 40, J[1])], Space.flat(100, "rows", J[0].matrix)
    stack = StackOver(lambda: iter(parts), J[0].domain, rows)
    matrix, most = metered(stack)
    torch.testing.assert_close(matrix, torch.cat([J[0].matrix, 2 * J[1].matrix]))
    assert most < 1.001


# ---- plans and budgets ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("verb", VERBS)
def test_working_memory_by_layers_is_counted_and_shrinks_with_the_room(verb: str) -> None:
    found = {n: plan(curved(verb, n).dense, budget="4GB") for n in (64, 8192)}
    assert all(p.chosen.name == "by layers" for p in found.values())
    assert found[8192].peak_bytes > found[64].peak_bytes + 2**23
    operator = curved(verb, 8192)
    roomy, tight = (operator.formed.begin(free) for free in (1e10, 0.0))
    assert tight.most < roomy.most
    assert tight.bytes < roomy.bytes
    within = roomy.bytes * 0.6
    torch.testing.assert_close(replace(operator, formed=_within(operator.formed, within)).dense(), operator.dense())


class _within:  # noqa: N801 - a function of a class
    """A way that has so many bytes."""

    def __init__(self, way: Any, free: float) -> None:
        self.way, self.free, self.routes, self.verdicts = way, free, way.routes, way.verdicts

    def begin(self, free: float) -> Any:
        prepared = self.way.begin(self.free)
        assert prepared.bytes <= self.free
        return prepared


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("name", ["hessian", "ggn", "problem", "damped"])
def test_what_does_not_fit_is_refused_before_it_is_allocated(name: str) -> None:
    model, data = batches(1024, 512)
    operators: dict[str, Callable[[], Operator]] = {
        "hessian": lambda: curved(n=1024),
        "ggn": lambda: curved("ggn", 1024),
        "problem": lambda: Problem(model, nn.MSELoss(), data).hessian(),
        "damped": lambda: curved(n=1024) + 0.1 * Identity(curved().domain),
    }
    operator = operators[name]()
    need = operator.shape[0] ** 2 * 8 + 12 * 2**20 + 2**16
    assert not plan(operator.dense, budget=need).fits
    with pytest.raises(jacops.errors.MemoryBudgetError, match="working memory"):
        operator.dense(budget=need)
    assert plan(operator.dense, budget="4GB").fits


def test_plans_of_operators_say_how() -> None:
    model, data = batches()
    A = Matrix(draw(30, 20))
    found = {
        "in memory": plan(A.dense, budget=30 * 20 * 8),
        "by columns": plan((A @ Matrix(draw(20, 10))).dense),
        "batch by batch": plan(Problem(model, nn.MSELoss(), data).ggn().dense),
        "layer by layer": plan(jacops.sample_gradients(model, F.mse_loss, *data[0]).dense),
        "by samples": plan(jacops.jacobian(model, data[0][0]).dense, budget="1GB"),
    }
    for name, told in found.items():
        assert told.chosen.name == name
        assert told.fits
        assert told.chosen.why


def test_shared_children_are_counted_once() -> None:
    A = Matrix(draw(30, 30))
    own = 30 * 30 * 8
    assert A.nbytes == own
    assert (A + A).nbytes == own
    assert (A.T @ A).nbytes == own
    assert ((2.0 * A) @ (A + Matrix(A.matrix))).nbytes == own
    assert BlockDiagonal((A, A), Space.flat(60, "x", A.matrix)).nbytes == own
    G = curved("ggn")
    assert G.nbytes == G.right.nbytes + G.left.right.nbytes


# ---- what is measured ----------------------------------------------------------------------------------------------

FRESH = """
import sys, torch, jacops
from jacops import plan
from torch import nn
from torch.nn.functional import mse_loss
def high(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
torch.set_num_threads(1)
torch.manual_seed(0)
name, budget, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model = nn.Sequential(nn.Linear(30, 80), nn.Tanh(), nn.Linear(80, 30), nn.Tanh(), nn.Linear(30, 5))
n = 2048
x, y = torch.randn(n, 30), torch.randn(n, 5)
data = [(x[i : i + 450], y[i : i + 450]) for i in range(0, n, 450)]
made = {"hessian": lambda: jacops.hessian(model, mse_loss, x, y), "ggn": lambda: jacops.ggn(model, mse_loss, x, y),
        "problem": lambda: jacops.Problem(model, nn.MSELoss(), data, l2=0.1).hessian(),
        "jacobian": lambda: jacops.jacobian(model, x)}
operator = made[name]()
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
before = high("VmRSS")
if what == "plan":
    told = plan(operator.dense, budget=budget)
    print(told.peak_bytes if told.fits else 0)
else:
    try:
        operator.dense(budget=budget)
    except jacops.errors.MemoryBudgetError:
        pass
    print(high("VmHWM") - before)
"""


def fresh(name: str, budget: float, what: str) -> int:
    command = [sys.executable, "-c", FRESH, name, str(int(budget)), what]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _has_resident_memory() -> bool:
    """Return whether the system reports resident memory, and lets the high-water mark start again."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return Path("/proc/self/status").exists()


@pytest.mark.skipif(not _has_resident_memory(), reason="the system does not report resident memory")
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("hessian", "ggn", "jacobian")), "problem"]
)
def test_measured_memory_is_what_was_predicted(name: str) -> None:
    assert 0.8 <= fresh(name, 2**33, "run") / fresh(name, 2**33, "plan") <= 1.25


@pytest.mark.slow
@pytest.mark.skipif(not _has_resident_memory(), reason="the system does not report resident memory")
@pytest.mark.parametrize("name", ["hessian", "ggn", "problem", "jacobian"])
def test_measured_memory_keeps_to_the_budget(name: str) -> None:
    own = fresh(name, 2**33, "run")
    for share in (0.5, 1.0, 2.0):
        assert fresh(name, share * own, "run") <= 1.1 * share * own
