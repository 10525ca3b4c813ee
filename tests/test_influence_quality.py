"""The table of influence quality: trainings are read again for the same case alone, and rivals answer by files."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks import datamodelling, influence_quality
from benchmarks.datamodelling import Case, digits, kept, score
from benchmarks.influence_quality import Question, Rival
from benchmarks.networks import mlp


def small() -> nn.Module:
    return nn.Linear(64, 10)


TINY = Case("small", small, digits, cross_entropy, rows=20, epochs=4, rate=3e-3, tested=6, many=5)


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(datamodelling, "MEMBERS", 2)


def test_what_training_gave_is_read_again_but_not_for_another_case(tmp_path, monkeypatch):
    first = kept(TINY, tmp_path)
    assert first.losses.shape == (5, 6)
    assert (len(first.states), len(first.members)) == (4, 2)
    for name, value in first.states[-1].items():
        torch.testing.assert_close(value, first.members[0][name], rtol=0, atol=0)
    trained = []
    monkeypatch.setattr(Case, "retrained", lambda case: trained.append(case) or torch.zeros(case.many, case.tested))
    assert torch.equal(kept(replace(TINY), tmp_path).losses, first.losses)
    assert not trained
    others = [replace(TINY, **change) for change in ({"rows": 22}, {"rate": 1e-2}, {"make": mlp}, {"many": 4})]
    for other in others:
        kept(other, tmp_path)
    assert trained == others


def test_the_command_scores_every_method_of_ours_and_says_which_rivals_are_left_out(tmp_path, capsys):
    influence_quality.table([TINY], None, tmp_path)
    written = (tmp_path / "influence_quality.md").read_text()
    assert capsys.readouterr().out == written
    rows = [line.split(" | ") for line in written.splitlines() if line.startswith("| jacops")]
    assert [row[1] for row in rows] == list(influence_quality.OURS)
    values = [row[2] for row in rows if "refused" not in row[2]]
    assert len(values) >= len(rows) - 3  # the Hessian may be indefinite here
    assert all(-1 <= float(value.split(" ± ")[0]) <= 1 for value in values)
    for peer in ("kronfluence", "dattri", "pyDVL"):
        assert f"{peer} is left out" in written


def test_a_prediction_that_is_the_truth_scores_one():
    halves, values = TINY.halves, torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(score(values, halves, -halves @ values.T), torch.ones(6).double())
    torch.testing.assert_close(score(values, halves, halves @ values.T), -torch.ones(6).double())


def test_a_rival_gets_weights_and_data_as_files_and_its_failure_is_a_reason(tmp_path):
    question = Question(TINY, kept(TINY, tmp_path))
    python = tmp_path / "python"
    code = f"""#!{sys.executable}
import json, sys
import numpy as np
folder = sys.argv[-1]
request = json.load(open(folder + "/request.json"))
data = np.load(folder + "/data.npz")
for number, asked in enumerate(request["asked"]):
    if asked["method"] == "broken":
        np.savez(folder + f"/answer-{{number}}.npz", failed="no such method")
    elif asked["method"] == "fatal":
        sys.exit("out of memory")
    else:
        scores = data["u"] @ data["x"].T * asked["settings"]["damping"]
        np.savez(folder + f"/answer-{{number}}.npz", scores=scores, seconds=2.0)
"""
    python.write_text(code)
    python.chmod(0o755)
    rivals = [Rival("dattri", "products", "any", damped="damping"), Rival("dattri", "none", "broken")]
    found, failed, killed = influence_quality.ask([*rivals, Rival("dattri", "none", "fatal")], question, python)
    (x, _), (u, _) = TINY.data
    torch.testing.assert_close(found[0], u @ x.T * question.damping)
    assert found[1] == 2
    assert (failed, killed) == ("failed: no such method", "failed: out of memory")
