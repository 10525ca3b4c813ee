"""What influences cost: sample gradients that are taken, numbers that are held, factors that are fitted once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import Problem, TorchTwiceDifferentiable, compute_influences
from jacops._influence import _run
from jacops._objective import Objective
from jacops._runtime.memory import Meter
from jacops._torch.model.own_loss import ModelLoss
from jacops.errors import InputError
from jacops.solvers import EKFAC, _kronecker_passes, _running_sums
from jacops.solvers._running_sums import Running, SideSum
from jacops.store import digest_function
from small import draw, settled, small_net

X, Y = draw(12, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1])
TRAIN = [(X[:5], Y[:5]), (X[5:], Y[5:])]
TEST = [(draw(4, 3, seed=5), Y[:4]), (draw(3, 3, seed=6), Y[:3])]
UNCHECKED = EKFAC(report_residual=False)


def influences(**options: Any) -> jacops.results.Influences:
    wrapped = TorchTwiceDifferentiable(small_net(), F.cross_entropy)
    settings: dict[str, Any] = {"test_data": TEST, "curvature": "ggn", "damping": 0.5, "solver": UNCHECKED, **options}
    return compute_influences(wrapped, TRAIN, **settings)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples whose gradients were taken, call by call."""
    rows: list[int] = []
    real = Objective.sample_gradients

    def counted(self: Objective, x: Any, y: Any) -> Any:
        rows.append(len(x))
        return real(self, x, y)

    monkeypatch.setattr(Objective, "sample_gradients", counted)
    return rows


# ---- passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_queries_share_one_pass_however_few_are_solved_for_together(
    stored: bool, taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stored:
        pytest.importorskip("zarr")
    expected = influences().values
    taken.clear()
    monkeypatch.setattr(_run, "_TILE_BYTES", 1)
    found = influences(store=tmp_path / "run" if stored else None)
    assert sum(taken) == 12 + 7
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=0)
    assert len(found.info["residual"]) == 7


@pytest.mark.parametrize(("rows", "groups"), [(1, 7), (2, 4), (3, 3), (7, 1), (100, 1)])
@pytest.mark.parametrize("stored", [False, True])
def test_there_are_as_many_passes_as_groups_that_fit_into_memory(
    rows: int, groups: int, stored: bool, taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stored:
        pytest.importorskip("zarr")
    expected = influences().values
    taken.clear()
    monkeypatch.setattr(_run, "_TILE_BYTES", 1)
    monkeypatch.setattr(_run, "budget_bytes", lambda budget, device: int(rows * 26 * 8 / _run._GROUP_SHARE))
    found = influences(store=tmp_path / "run" if stored else None)
    assert sum(taken) == groups * 12 + 7
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("option", [{"leverage": True}, {"influence_type": "perturbation"}, {"on_failure": "return"}])
def test_groups_of_tiles_give_what_one_tile_gives(option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = influences(**option).values
    monkeypatch.setattr(_run, "_TILE_BYTES", 2 * 26 * 8)
    torch.testing.assert_close(influences(**option).values, expected, rtol=1e-10, atol=1e-14)


# ---- sums --------------------------------------------------------------------------------------------------------


def test_single_precision_is_summed_to_its_last_digits() -> None:
    parts = [draw(3, 40, seed=seed).float().square() for seed in range(2000)]
    running = Running()
    for part in parts:
        running.add(part.clone(), 0.1)
    exact = torch.stack([(0.1 * part).double() for part in parts]).sum(0)
    torch.testing.assert_close(running.value().double(), exact, rtol=1.2e-7, atol=0)  # twice the rounding of a number
    twice = running.plus(running).times(0.5)
    torch.testing.assert_close(twice.value(), running.value(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("many", [1, 5, 6, 7, 20])
def test_strips_are_the_symmetric_matrix(many: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_running_sums, "_STRIP", 6)
    parts = [draw(2, 9, many, seed=seed).to(dtype) for seed in range(3)]
    found = SideSum(widest=20)
    for part in parts:
        found.add(part, 0.5)
    exact = torch.stack([0.5 * part.double().mT @ part.double() for part in parts]).sum(0)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.matrix().double(), exact, **close)
    torch.testing.assert_close(found.plus(found.times(2.0)).matrix().double(), 3 * exact, **close)
    assert found.trace() == pytest.approx(float(exact.diagonal(dim1=1, dim2=2).sum()), rel=1e-5)


def test_narrow_strips_change_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EKFAC().approximate(Problem(small_net(), F.cross_entropy, TRAIN).ggn())
    monkeypatch.setattr(_running_sums, "_STRIP", 2)
    again = EKFAC().approximate(Problem(small_net(), F.cross_entropy, TRAIN).ggn())
    torch.testing.assert_close(again.dense(), plain.dense(), rtol=1e-10, atol=1e-14)


def test_a_decomposition_that_fails_in_single_precision_is_made_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(small_net().float(), F.cross_entropy, [(x.float(), y) for x, y in TRAIN])
    plain, real = EKFAC().approximate(problem.ggn()), torch.linalg.eigh

    def failing(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")  # pyright: ignore[reportPrivateImportUsage]
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    again = EKFAC().approximate(problem.ggn())
    assert again.blocks[0].left is not None
    assert again.blocks[0].left.dtype == torch.float32
    torch.testing.assert_close(again.dense(), plain.dense(), rtol=1e-3, atol=1e-5)


def test_a_fit_holds_two_fifths_of_what_sums_and_bases_in_double_take() -> None:
    widths, rows = (400, 800, 400, 400), 16
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    model = settled(nn.Sequential(*layers[:2], nn.Tanh(), *layers[2:])).float()
    problem = Problem(model, nn.MSELoss(), [(draw(rows, 400, seed=s).float(), draw(rows, 400).float()) for s in (0, 1)])
    operator = problem.ggn()
    with Meter() as meter:
        EKFAC(fisher="empirical").approximate(operator)
    sides = sum((layer.in_features + 1) ** 2 + layer.out_features**2 for layer in layers)
    entries = sum((layer.in_features + 1) * layer.out_features for layer in layers)
    double = 8 * (2 * sides + entries) + 4 * (sides + entries)  # sums, bases, eigenvalues, and the result in single
    assert meter.peak <= 0.4 * double


# ---- factors fitted once -----------------------------------------------------------------------------------------


@pytest.fixture
def fitted(tmp_path: Path) -> Any:
    EKFAC().approximate(Problem(small_net(), F.cross_entropy, TRAIN).ggn()).save(tmp_path / "factors")
    return jacops.load(tmp_path / "factors")


def test_saved_factors_answer_other_queries_without_a_fit(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [influences(test_data=part).values for part in (TEST, TEST[1:])]

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a fit")

    monkeypatch.setattr(_kronecker_passes.Passes, "pieces", refused)
    for part, values in zip((TEST, TEST[1:]), expected, strict=True):
        found = influences(test_data=part, solver=EKFAC(factors=fitted, report_residual=False))
        assert torch.equal(found.values, values)


@pytest.mark.parametrize("change", ["weights", "loss"])
def test_factors_of_another_model_are_refused(change: str, fitted: Any) -> None:
    model: nn.Module = small_net()
    if change == "weights":
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1e-6
    loss: Any = nn.CrossEntropyLoss(label_smoothing=0.1) if change == "loss" else F.cross_entropy
    operator = Problem(model, loss, TRAIN).ggn()
    with pytest.raises(InputError, match=r"`factors`.*of another model.*Fit them again"):
        EKFAC(factors=fitted).prepare(operator, 0.5)
    unchecked = dataclasses.replace(fitted, model="")
    assert EKFAC(factors=unchecked, report_residual=False).prepare(operator, 0.5).curvature is unchecked


class WithLoss(nn.Module):
    """A model with a loss of its own, as transformers' models have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    @staticmethod
    def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": self.loss_function(logits, labels)}


def test_a_loss_has_one_digest_before_and_after_it_was_verified() -> None:
    model = WithLoss()
    loss = ModelLoss(model)
    before = digest_function(loss)
    loss.check(model, X, Y, model(X))
    assert loss.verified
    assert digest_function(loss) == before
