"""Two checkouts are compared row by row: answers, findings and the exit status. What calls take is not looked at."""

import io
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from benchmarks import compare, worker
from benchmarks.compare import Row
from benchmarks.groups import select
from scipy.sparse import eye_array

SHARED = """
import torch

__version__ = "0"

class Operator:
    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    @property
    def T(self):
        return Operator(self.tensor.T)

    def __matmul__(self, v):
        return self.tensor @ v

def matrix():
    return Operator(torch.ones(3, 2))

def ones():
    return [torch.ones(2), torch.zeros(())]
"""
OLD = """
def changed():
    return torch.ones(2)

def mended():
    raise RuntimeError("broken inside")

def broken():
    return torch.ones(2)
"""
NEW = """
def changed():
    return torch.full((2,), 2.0)

def mended():
    return torch.ones(2)

def broken():
    raise RuntimeError("broken inside")

def added():
    return torch.ones(2)

def ones(keyword=None):
    return [torch.ones(2), torch.zeros(())]
"""
ROWS = """
import importlib

import jacops
import torch
from .harness import Workload, same

def rival():
    raise RuntimeError("only calls of ours are compared")

def workloads():
    print("what a benchmark prints is no reply")
    names = ("matrix", "ones", "changed", "mended", "broken", "added")
    calls = {f"jacops: {name}": lambda name=name: getattr(jacops, name)() for name in names}
    calls["jacops: keyword"] = lambda: jacops.ones(keyword=1)
    calls["jacops: object"] = lambda: object()
    calls["jacops: peer"] = lambda: importlib.import_module("a_missing_package")
    yield Workload("X1", "", {**calls, "torch: rival": rival}, None)
    yield Workload("X2", "", {"jacops: left out": rival}, None)
    jacops.added()
    yield Workload("X3", "", {"jacops: ones": jacops.ones}, same())
"""
FINDINGS = {
    "jacops: matrix": "",
    "jacops: ones": "",
    "jacops: object": "",
    "jacops: changed": "another answer",
    "jacops: peer": "left out: a_missing_package is not installed",
    "jacops: mended": "fails in old: RuntimeError: broken inside",
    "jacops: broken": "fails: RuntimeError: broken inside",
    "jacops: added": "new: AttributeError: module 'jacops' has no attribute 'added'",
    "jacops: keyword": "new: TypeError: ones() got an unexpected keyword argument 'keyword'",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Measure next to nothing, and accept it."""
    for name, value in {"ROUND": 0.0, "MORE": 1, "LIMIT": math.inf, "QUICK_LIMIT": math.inf}.items():
        monkeypatch.setattr(compare, name, value)


@pytest.fixture
def checkouts(tmp_path):
    """Two small checkouts, of which the new one has benchmarks with one group, `tiny`."""
    for name, text in (("old", OLD), ("new", NEW)):
        (tmp_path / name / "src" / "jacops").mkdir(parents=True)
        (tmp_path / name / "src" / "jacops" / "__init__.py").write_text(SHARED + text)
    rows = tmp_path / "new" / "benchmarks"
    rows.mkdir()
    for name in ("__init__", "harness", "machine"):
        (rows / f"{name}.py").write_text((Path(compare.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    (rows / "bench_tiny.py").write_text(ROWS)
    return tmp_path / "old", tmp_path / "new"


def test_each_row_is_compared_or_gets_a_finding(checkouts, capsys):
    old, new = checkouts
    assert compare.main([str(old), str(new / "src"), "tiny:X1,X3", "--rounds", "2"]) == 1
    printed = capsys.readouterr().out.splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed if line.startswith("|")][2:]
    found = {call: verdict for case, call, *_, verdict, _, _ in lines if case == "X1"}
    assert found == {call: finding or "within" for call, finding in FINDINGS.items()}
    assert [line[6] for line in lines if line[0] == "X3"] == [FINDINGS["jacops: added"]]
    assert all(line[7] and line[8] and line[2] and line[3] for line in lines if line[6] == "within")


def test_rows_that_are_within_pass(checkouts):
    new = str(checkouts[1])
    assert compare.main([new, new, "tiny:X3"]) == 0


def row_of(*ratios, old=1.0):
    return Row("X1", "call", [old] * len(ratios), [old * ratio for ratio in ratios])


def test_a_row_over_its_limit_is_measured_again(monkeypatch):
    ratios = {"twice": [[2.0], [1.0, 1.0]], "thrice": [[2.0], [1.5, 1.5], [1.0, 1.0]], "once": [[1.0]]}

    def measured(old, new, group, cases, rounds, known=None):
        rows = [Row("X1", call) for call in ratios] if known is None else known.values()
        for row in rows:
            more = ratios[row.call].pop(0)
            assert len(more) == rounds
            row.old, row.new, row.often = row.old + [1.0] * rounds, row.new + more, row.often + 1
            yield row

    monkeypatch.setattr(compare, "LIMIT", 1.05)
    monkeypatch.setattr(compare, "rows_once", measured)
    monkeypatch.setattr(compare, "Checkout", lambda *_: nullcontext())
    rows = {row.call: row for row in compare.compare([Path()] * 3, "tiny", [], 1, 2)}
    assert not any(ratios.values())
    assert "within |" in str(rows["once"])
    assert not rows["twice"].bad
    assert "| 1.000 (1.00 to 2.00) | 1.05 | within (2 measurements) |" in str(rows["twice"])
    assert rows["thrice"].bad
    assert "| 1.500 (1.00 to 2.00) | 1.05 | **over** (3 measurements) |" in str(rows["thrice"])


def test_rounds_go_on_while_noise_leaves_the_verdict_open(monkeypatch):
    class Side:
        def __init__(self, *seconds):
            self.seconds = iter(seconds)

        def ask(self, command, *_):
            return True if command == "agrees" else 1.0 if command == "first" else next(self.seconds)

    monkeypatch.setattr(compare, "LIMIT", 1.05)
    monkeypatch.setattr(compare, "MORE", 4)
    for later, wanted in (
        ([1.0] * 9, 9),
        ([1.0, 1.2] * 18, 36),
        ([1.2] + [1.0] * 35, 9),
        ([1.0, 1.2] * 4 + [1.0] * 28, 16),  # the fifth largest of 16 is within
    ):
        row = Row("X", "call")
        compare.measure(row, Side(*[1.0] * 37), Side(1.0, *later), 9)
        assert len(row.old) == len(row.new) == wanted


def test_the_interval_is_that_of_a_sign_test():
    assert row_of(*[1.0 + i / 8 for i in range(9)]).interval == (1.125, 1.875)
    assert row_of(1.0).interval == (1.0, 1.0)


def test_quick_rows_have_a_wider_limit(monkeypatch):
    monkeypatch.setattr(compare, "LIMIT", 1.05)
    monkeypatch.setattr(compare, "QUICK_LIMIT", 1.15)
    assert row_of(1.1, old=6e-3).over
    assert not row_of(1.1, old=4e-3).over


def test_a_process_that_ends_ends_the_comparison(checkouts):
    old = checkouts[0] / "src"
    (old / "jacops" / "__init__.py").write_text("import os; os._exit(3)")
    with compare.Checkout(old, checkouts[1]) as side, pytest.raises(SystemExit, match="ended with 3"):
        side.open("tiny", [])


def test_another_jacops_than_asked_for_is_refused(checkouts, tmp_path):
    with compare.Checkout(tmp_path, checkouts[1]) as side, pytest.raises(SystemExit, match="imported from"):
        side.open("tiny", [])
    with pytest.raises(SystemExit, match="holds no package jacops"):
        compare.source_of(tmp_path)


def test_matrices_are_compared_by_products():
    rows, columns = worker.as_tensors(eye_array(3).tocsr())
    assert torch.equal(rows, columns)
    assert torch.allclose(rows, torch.arange(3.0, dtype=torch.float64).sin())


def test_errors_are_replies():
    replies = io.StringIO()
    worker.serve(worker.Worker(), iter(['["advance"]', '["nonsense"]']), replies.write)
    first, second = map(json.loads, replies.getvalue().splitlines())
    assert first == {"value": None}
    assert second["error"].startswith("AttributeError")


def test_groups_are_selected_by_name():
    assert select(["products:C1,D3", "curvature"]) == [("products", ["C1", "D3"]), ("curvature", [])]
    assert ("influence", []) in select([])
    with pytest.raises(SystemExit, match="no benchmark 'nothing'"):
        select(["nothing"])
