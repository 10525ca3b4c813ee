"""`benchmarks.gpu_check` runs without a device in its tiny sizes, and finds what is wrong."""

import math
import time

import pytest
import torch
from benchmarks import gpu_check
from benchmarks.gpu_check import Clock, Row, relative, row_passes


@pytest.fixture
def clock() -> Clock:
    return Clock(torch.device("cpu"), 0.0)


def test_every_row_passes_in_tiny_sizes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check.Clock, "best", lambda self, call: 1.0 if call() is not None else math.nan)
    assert gpu_check.main(["--device", "cpu", "--tiny"]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    passed = [line for line in lines if line.startswith("ok ")]
    assert len(passed) >= 20
    assert all("error nan" not in line and "error " in line for line in passed)
    assert lines[-1].startswith("PASS in ")
    for rival in ("torch.func", "curvlinops", "kronfluence"):
        told_of = [line for line in lines if f"/ {rival}" in line]
        assert told_of, rival
        assert all("ratio" in line or "not installed" in line for line in told_of), told_of


ONE = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "found", [ONE * 1.1, ONE * math.nan, ONE[:2], None], ids=["another answer", "NaN", "another shape", "an exception"]
)
def test_a_row_that_is_wrong_or_has_no_error_fails(found: torch.Tensor | None, clock: Clock, capsys):
    assert row_passes(Row("right", lambda: ONE, relative(lambda: ONE)), clock)
    assert not row_passes(Row("wrong", lambda: found, relative(lambda: ONE)), clock)
    assert not row_passes(Row("without an error", lambda: ONE, lambda answer: math.nan), clock)
    assert capsys.readouterr().out.count("ok ") == 1


def test_rivals_that_fail_or_are_missing_are_reported(clock: Clock, capsys: pytest.CaptureFixture[str]):
    def missing() -> None:
        raise ModuleNotFoundError("no such package", name="rival")

    rivals = {"missing": missing, "failing": lambda: 1 / 0, "there": lambda: time.sleep(0)}
    assert row_passes(Row("right", lambda: ONE, relative(lambda: ONE), rivals=rivals), clock)
    words = capsys.readouterr().out
    assert "not installed: rival" in words
    assert "fails: ZeroDivisionError" in words
    assert "ratio" in words


def test_rows_that_are_not_reached_are_no_success(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main(["--device", "cpu", "--tiny", "--seconds", "-1"]) == len(gpu_check.GROUPS)
    assert "NOT REACHED" in capsys.readouterr().out
