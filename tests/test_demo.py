"""The demo: it runs without a network, its terminal summary fits 80 columns, its answers hold."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

ROOT = Path(__file__).parents[1]
# Runs the demo as `python examples/demo.py` would, on a machine whose network is gone.
OFFLINE = """
import runpy, socket, sys
def refuse(*_, **__): raise OSError("the demo asked for the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
sys.path.insert(0, sys.argv[1] + "/examples")
sys.argv = ["demo.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/demo.py", run_name="__main__")
"""


def run(path: Path, *options: str) -> str:
    command = [sys.executable, "-c", OFFLINE, str(ROOT), "--output", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8", cwd=path.parent)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def question(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return lambda name: importlib.import_module(f"questions.{name}")


def test_it_answers_three_questions_offline(tmp_path):
    path = tmp_path / "report.html"
    said = run(path, "--quick")
    page = path.read_text(encoding="utf-8")
    assert max(map(len, said.splitlines())) <= 80
    assert "report.html" in said
    for number, words in enumerate(("Which features", "Which training points", "Which step"), start=1):
        assert re.search(rf"^{number}\. {words}", said, re.MULTILINE)
        assert f"<h2>{words}" in page
    assert page.count("<img ") == 9
    assert page.count(">Certificate<") == 3
    assert "Timings and versions" in page


@pytest.mark.slow
def test_the_whole_demo_holds_what_it_says(tmp_path):
    said = run(tmp_path / "report.html")
    found = [int(share) for share in re.search(r"finds (\d+)% .*?(\d+)% by\s+plain", said, re.DOTALL).groups()]
    agreement = float(re.search(r"correlation ([\d.]+)", said).group(1))
    assert re.search(r"\d+ s in all", said)  # how many is for the benchmarks
    assert min(found) >= 80
    assert agreement > 0.9


def test_gauss_newton_ends_where_scipy_ends(question):
    fit = question("fit")
    t = torch.linspace(0, 8, 60, dtype=torch.float64)
    y = fit.Decay(fit.TRUTH)(t).detach() + 0.05 * torch.sin(17 * t)
    model = fit.Decay(fit.START)
    history = fit.gauss_newton(model, t, y)
    known = least_squares(
        lambda values: fit.residual_of(fit.Decay(tuple(values)), t, y).numpy(), fit.START, x_scale="jac", xtol=1e-15
    )
    residuals = [step.residual for step in history]
    assert residuals[-1] == pytest.approx(np.sqrt(2 * known.cost), rel=1e-10)
    assert all(later <= earlier * (1 + 1e-14) for earlier, later in zip(residuals, residuals[1:], strict=False))
    assert history[-1].gradient < 1e-8 * history[0].gradient


def test_gauss_newton_stays_at_an_optimum(question):
    fit = question("fit")
    t = torch.linspace(0, 8, 60, dtype=torch.float64)
    model = fit.Decay(fit.TRUTH)
    history = fit.gauss_newton(model, t, model(t).detach())
    assert [step.residual for step in history] == [0.0]


def test_found_by_counts_the_worst_scored_first(question):
    found_by = question("labels").found_by
    shares = found_by(np.array([0.1, 0.9, 0.5, 0.7]), np.array([False, True, False, True]))
    assert shares.tolist() == [0.5, 1.0, 1.0, 1.0]


def test_flipped_labels_are_a_tenth_and_really_wrong(question):
    digits = question("labels").load(200)
    assert digits.flipped.sum() == 20
    assert ((digits.given >= 0) & (digits.given <= 9)).all()
    assert (digits.given != digits.true).numpy().tolist() == digits.flipped.tolist()


def test_stress_of_perfect_and_collapsed_pictures(question):
    stress = question("features").stress
    rows = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rows @ torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    assert stress(turned, rows) == pytest.approx(0, abs=1e-12)
    assert stress(torch.zeros_like(rows), rows) == pytest.approx(1)


def test_training_leaves_the_encoder_centred_on_its_widest_axis(question):
    features = question("features")
    tumours = features.load()
    embedded = features.train(tumours, steps=20)(tumours.reduced).detach()
    assert embedded.mean(0).abs().max() < 1e-10
    covariance = embedded.T @ embedded
    assert abs(covariance[0, 1]) < 1e-9 * covariance[0, 0]
    assert covariance[0, 0] > covariance[1, 1]
