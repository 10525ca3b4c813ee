"""The benchmarks run: tiny workloads give rows, verdicts, one table and one plot. What they take is not looked at."""

import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import jacops

pytest.importorskip("matplotlib")

from benchmarks import (
    bench_attribution,
    bench_curvature,
    bench_differentiable,
    bench_input_jacobians,
    bench_integrated,
    bench_parameter_jacobians,
    bench_products,
    bench_small_calls,
    by_hand,
    harness,
    machine,
    profiles,
    report,
)
from benchmarks.by_hand import HAND
from benchmarks.harness import BEST, FLOOR, Contender, Goal, Workload, measure, same
from benchmarks.models import Case, mlp

PEERS = ("curvlinops", "torch-secorder", "PyPose", "BackPACK", "TorchJD", "captum")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Take the machine's rates from next to nothing, and no more rounds than are asked for."""
    monkeypatch.setattr(machine, "SIDE", 16)
    monkeypatch.setattr(machine, "WRITTEN", 2**12)
    monkeypatch.setattr(harness, "MOST", 1)
    for module in (machine, harness):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))


def tiny() -> Iterator[Workload]:
    case = Case(mlp(3, 4, 2, act=nn.Tanh), 5, 3, 2)
    products = bench_products.Products(3, 4, 2, n=5)
    yield bench_input_jacobians.workload("A", "perceptron", mlp(3, 4, 2), torch.randn(5, 3), [Goal(FLOOR, faster=0.5)])
    yield bench_attribution.workload("H", "perceptron", mlp(3, 4, 2), torch.randn(5, 3))
    yield bench_parameter_jacobians.workload("B", "perceptron", lambda: mlp(3, 4, 2), torch.randn(5, 3), [])
    for cases in (bench_products.jacobian, bench_products.curvature):
        yield from cases(products)
    for cases in (bench_products.many_jacobian, bench_products.many_curvature):
        yield from cases(products, 3)
    yield bench_integrated.same_nodes("J1", "perceptron", mlp(3, 4, 2), torch.randn(5, 3), 8, [])
    yield bench_integrated.same_gap("J2", "perceptron", mlp(3, 4, 2), torch.randn(5, 3), [])
    yield bench_curvature.hessians("E1", "perceptron", case, [Goal(BEST, faster=1), Goal(mib=1e6)])
    yield bench_curvature.gauss_newton("E2", "perceptron", case, [])
    yield bench_differentiable.contractive(4, 5, 4, 3)
    yield bench_differentiable.penalty(5, 3, 4, 2)
    yield bench_differentiable.poisson(4, 2, 5, 1)
    yield bench_differentiable.meta(4, 3, 5, 2)
    yield bench_differentiable.hypergradient(4, 3, 4, 1)
    yield bench_curvature.hessian_diagonal("E4", "perceptron", case)
    yield bench_curvature.gauss_newton_diagonal("E5", "perceptron", case)
    yield bench_small_calls.inputs("M1", "perceptron", mlp(3, 4, 2), torch.randn(5, 3))
    toy = bench_small_calls.Toy(3, 4, 2, n=5)
    yield bench_small_calls.one_product(toy)
    yield bench_small_calls.kept_product(toy)
    yield bench_small_calls.dense("M6", "perceptron", mlp(3, 4, 2), torch.randn(5, 3))
    yield bench_small_calls.sparse(20)


@pytest.mark.filterwarnings("ignore")  # rivals warn
def test_tiny_workloads_answer_alike_and_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = report.run(tiny(), "tiny", rounds=1)
    assert not [(r.workload, r.rival, r.error) for r in rows if r.error and not r.rival.startswith(PEERS)]
    assert not [(r.workload, r.rival) for r in rows if r.error == "another answer"]
    written = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert len(written) == len(rows)
    assert all(line["gflops"] > 0 for line in written)
    paths = report.write(tmp_path)
    assert [p.name for p in paths] == ["table.md", "ratios.png"]
    assert paths[0].read_text().count("\n| ") == len(rows) + 1
    assert report.goals(report.newest(tmp_path)).count("\n") > 5


def test_a_later_run_replaces_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in ("torch: old", "torch: new"):
        rivals = {"jacops": lambda: torch.zeros(1), name: lambda: torch.zeros(1)}
        report.run(iter([Workload("X1", "nothing", rivals, same())]), "x", rounds=1)
    assert [r["rival"] for r in report.newest(tmp_path)] == ["jacops", "torch: new"]


def test_a_call_that_compiles_is_made_once_more_than_it_counts(monkeypatch):
    monkeypatch.setattr(harness, "ROUND", 0)
    calls = []
    for compiles in (False, True):
        measure(Workload("X", "", {"jacops": lambda: calls.append(1)}, compiles=compiles), rounds=1)
    assert len(calls) == 3 + 4


@pytest.mark.parametrize(
    ("tick", "many"), [(harness.ROUND / 3.5, 4), (2 * harness.ROUND, 1), (0.0, harness.MOST_CALLS)]
)
def test_a_round_repeats_a_quick_call(tick, many):
    calls = []
    contender = Contender("jacops", lambda: calls.append(1), map(tick.__mul__, itertools.count()).__next__)
    contender.run()
    assert len(calls) == many
    assert contender.times == contender.cold == [pytest.approx(tick)]


def test_a_call_of_ours_may_be_the_one_to_compare_with():
    rivals = {"jacops": lambda: torch.zeros(1), "jacops, again": lambda: torch.zeros(1)}
    goals = [Goal("jacops", faster=1e-9, ours="jacops, again")]
    rows, _ = measure(Workload("X", "", rivals, goals=goals), rounds=1)
    assert [goal["met"] for goal in rows[0].goals] == [True]


def test_rivals_that_fail_are_findings():
    def absent():
        raise ModuleNotFoundError(name="nowhere")

    rivals = {
        "jacops": lambda: torch.zeros(2),
        "torch: absent": absent,
        "torch: broken": lambda: torch.zeros(2) @ torch.zeros(3),
        "torch: wrong": lambda: torch.ones(2),
    }
    goals = [Goal("torch: absent", faster=2), Goal(BEST, faster=2)]
    rows, _ = measure(Workload("X", "", rivals, same(), goals=goals), rounds=1)
    ours, absent_row, broken, wrong = rows
    assert ours.error is None
    assert absent_row.error == "not installed: nowhere"
    assert broken.error.startswith("RuntimeError")
    assert wrong.error == "another answer"
    assert not any(row.goals for row in rows)


@pytest.mark.parametrize("path", sorted(Path(harness.__file__).parent.glob("bench_*.py")), ids=lambda p: p.stem)
def test_every_group_is_importable(path):
    wanted = {"bench_pose_graphs": "pypose", "bench_influence": "sklearn"}
    if path.stem in wanted:
        pytest.importorskip(wanted[path.stem])
    assert callable(importlib.import_module(f"benchmarks.{path.stem}").workloads)


def test_a_profile_splits_a_call_by_kinds_of_operations(monkeypatch):
    monkeypatch.setattr(profiles, "CALLS", 1)
    a = torch.ones(64, 64)
    rivals = {"jacops": lambda: a @ a, f"{HAND}sum": lambda: (a + a).clone(), "torch: left out": lambda: a}
    found = profiles.columns(Workload("X", "", rivals))
    assert list(found) == ["jacops", f"{HAND}sum"]
    assert found["jacops"]["matrix products"] > 0 == found["jacops"]["convolutions"]
    assert found[f"{HAND}sum"][profiles.REST] > 0 < found[f"{HAND}sum"]["copies, joining, filling"]
    assert len(list(profiles.table(Workload("X", "", rivals)))) == 2 + len(profiles.KINDS) + 3


def test_loops_by_hand_give_the_same():
    x, y = torch.randn(6, 3, 8, 8), torch.randn(6, 5)
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 4))
    assert same()(jacops.sample_jacobians(net, x).dense(), by_hand.parameter_rows(net, x))
    c = Case(mlp(5, 4, 3, act=nn.Tanh), 6, 5, 3)
    assert same()(jacops.ggn(c.model, cross_entropy, c.x, c.y).dense(), by_hand.gauss_newton_matrix(c))
    assert same()(jacops.compute_jacobian(c.model, y), by_hand.input_rows(c.model, y, 4)())
    vs = torch.randn(2, len(c.theta))
    assert same()(jacops.ggn(c.model, cross_entropy, c.x, c.y).apply(vs), by_hand.kept_ggnvp(c, vs)())
    assert same()(jacops.hessian(c.model, cross_entropy, c.x, c.y).apply(vs), by_hand.kept_hvp(c, vs)())
