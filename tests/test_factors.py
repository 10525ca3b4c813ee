"""Sample gradients and Jacobians kept as factors: the rows are the oracle's, and what is asked of them is theirs."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import jacops.testing
import oracle
import zoo
from cases import F64
from jacops import JacopsWarning
from jacops._operators import LayerFactors
from jacops._per_sample import sample_gradients, sample_jacobians
from jacops._runtime import engine
from jacops._torch.layers import part
from jacops._torch.routes import by_sample
from jacops.errors import InputError, ModelStateError, NotDifferentiableError
from jacops.linalg import Identity
from layer_cases import model_of
from oracle import alone, called, in_double, leaves, mapped
from small import Calls, draw, settled
from zoo import BY_NAME, ZOO


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=tolerance * max(scale, 1e-12))


# ---- the zoo -------------------------------------------------------------------------------------------------------

REFUSED = {case.name for case in ZOO if case.mode == "train" and case.name.endswith("_train")} - {
    "spectral_norm_train",
    "spectral_norm_hook_train",
} | {"mixed_modes", "batch_summed", "scalar_output", "all_frozen", "no_parameters", "constant_output"}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def rows_by_oracle(case: zoo.Case, model: nn.Module, x: Any, number: Callable[[Any, int], Tensor]) -> Tensor:
    """The rows of every sample alone, `number(output, sample)` by the trainable parameters."""
    found, many = [], leaves(x)[0].shape[0]
    for i in range(many):
        with oracle.same_draws(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = case.copy(model).double()
            wrt = [p for p in twin.parameters() if p.requires_grad]
            output = number(called(twin, mapped(in_double, alone(x, i))), i)
            blocks = oracle.rows(output.reshape(-1), wrt, oracle.row_by_backward if case.by_backward else oracle.row)
        found.append(torch.cat([b.reshape(output.numel(), -1) for b in blocks], 1))
    return torch.cat(found)


@pytest.mark.parametrize("name", [case.name for case in ZOO])
@pytest.mark.parametrize("what", ["gradients", "jacobians"])
def test_zoo_rows_are_the_oracles(name: str, what: str) -> None:
    case = BY_NAME[name]
    model, x, y = case.model(), case.x(), case.y()

    def asked() -> LayerFactors:
        with zoo.seeded(), warnings.catch_warnings():
            warnings.simplefilter("ignore", JacopsWarning)  # of samples that mix
            if what == "gradients":
                return sample_gradients(model, case.loss, x, y)
            return sample_jacobians(model, x, outputs=case.pick)

    if name in REFUSED and not (what == "jacobians" and name in ("batch_summed", "scalar_output")):
        with pytest.raises((ModelStateError, InputError, NotDifferentiableError)):
            asked()
        return
    with zoo.seeded():
        if what == "gradients":
            target = in_double(y)
            expected = rows_by_oracle(case, model, x, lambda output, i: case.loss(output, target[i : i + 1]))
        else:
            expected = rows_by_oracle(case, model, x, lambda output, i: case.pick(output))
    dtype = next(model.parameters()).dtype
    for _ in range(2):  # checked, and remembered
        close(asked().dense(), expected, TOLERANCE[dtype])
    assert all(p.grad is None for p in model.parameters())


# ---- models of every kind of use -------------------------------------------------------------------------------------


MODELS = (
    *("mlp", "turned", "used twice", "used both ways", "unused", "few tokens", "many tokens", "convolutions"),
    *("depthwise", "tied tokens", "tokens", "samples second", "table", "one sample"),
)


def factors_of(name: str, what: str) -> tuple[LayerFactors, Tensor]:
    """The operator, and its matrix by the oracle."""
    model, x = model_of(name)
    if what == "jacobians":
        (blocks,) = oracle.parameter_jacobian(model, x)
        output = model(x)
        return sample_jacobians(model, x), torch.cat([b.reshape(output.numel(), -1) for b in blocks], 1)
    y = draw(*model(x).shape, seed=5)
    expected = [oracle.gradient(model, F.mse_loss, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    return sample_gradients(model, F.mse_loss, x, y), torch.stack(expected)


each = pytest.mark.parametrize("name", MODELS)
both = pytest.mark.parametrize("what", ["gradients", "jacobians"])


@each
@both
@pytest.mark.parametrize("temporary", [1, 2**25])
def test_what_is_asked_of_rows_is_what_the_oracles_rows_say(
    name: str, what: str, temporary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "_TEMPORARY", temporary)
    found, expected = factors_of(name, what)
    m, n = expected.shape
    close(found.dense(), expected)
    close(found.dense(out=torch.full((m, n + 2), torch.nan, dtype=F64)[:, 1:-1]), expected)
    for many in (1, 3, 40):
        V, U = draw(n, many), draw(m, many, seed=2)
        close(found @ V, expected @ V)
        close(found.T @ U, expected.T @ U)
    close(found.gram(), expected @ expected.T)
    close(found.norms(), expected.norm(dim=1))
    close(found.squared_norms(), expected.square().sum(1))
    close(found.column_squares(), expected.square().sum(0))
    jacops.testing.check_operator(found)


@each
def test_nearly_every_parameter_enters_by_a_rule(name: str) -> None:
    found, _ = factors_of(name, "gradients")
    assert found.without_rule == []
    assert found.coverage > 0.99
    assert "to a sweep" in found.route
    assert found.nbytes <= found.dense_nbytes + 8 * found.shape[0] * 40


def test_the_repr_says_what_is_held_and_how_it_came() -> None:
    found, _ = factors_of("convolutions", "jacobians")
    said = repr(found)
    for words in ("27 × ", "held", "dense", "factored: ", "9 samples to a sweep"):
        assert words in said


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_eight_hundred_rows_of_three_hundred_thousand_take_few_megabytes() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 50)), draw(16, 512, dtype=torch.float32)
    J = sample_jacobians(model, x)
    assert J.shape == (16 * 50, 288_306)
    assert J.dense_nbytes > 879 * 2**20
    assert J.nbytes <= 4 * 2**20
    picked = torch.tensor([0, 333, 799])
    rows = J.T @ torch.eye(800)[:, picked]
    for row, index in zip(rows.T, picked.tolist(), strict=True):
        (blocks,) = oracle.parameter_jacobian(
            nn.Sequential(model, Calls(lambda out, entry=index % 50: out[:, entry])), x[index // 50][None]
        )
        close(row.double(), torch.cat([b.flatten() for b in blocks]), 1e-6)


def test_gradients_of_a_million_parameters_are_held_as_factors() -> None:
    model = nn.Sequential(nn.Linear(64, 960), nn.ReLU(), nn.Linear(960, 960), nn.ReLU(), nn.Linear(960, 10))
    x, y = draw(150, 64, dtype=torch.float32), torch.arange(150) % 10
    G = sample_gradients(model, F.cross_entropy, x, y)
    entries = (64 + 960 + 960) + (960 + 960 + 10)  # operands, and cotangents that weights and biases share
    assert G.nbytes == 150 * 4 * entries
    loss = F.cross_entropy(model(x[7:8]), y[7:8])
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    close((G.T @ torch.eye(150)[7]), expected, 1e-5)


def test_what_the_caller_does_to_the_input_later_changes_nothing() -> None:
    model, x = model_of("mlp")
    G = sample_gradients(model, F.mse_loss, x, torch.zeros(6, 3, dtype=F64))
    before = G.dense()
    x.mul_(0)
    with torch.no_grad():
        model[0].weight.mul_(0)
    assert torch.equal(G.dense(), before)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("working", [1, 3000, 2**26])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "tied tokens", "samples second"])
@both
def test_batches_of_any_size_give_the_same_rows(
    name: str, what: str, working: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sample, "_WORKING", working)
    found, expected = factors_of(name, what)
    close(found.dense(), expected)


def test_a_remembered_call_takes_one_sweep_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of("mlp")
    y, sweeps = torch.zeros(6, 3, dtype=F64), []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: sweeps.append(1) or original(*a, **k))
    monkeypatch.setattr(engine, "_engine", None)  # so that all passes go by `grad`
    counts = []
    for _ in range(3):
        sweeps.clear()
        sample_gradients(model, F.mse_loss, x, y)
        counts.append(len(sweeps))
    assert counts[1:] == [2, 2]  # the losses' and the model's
    assert counts[0] > 2


# ---- losses ----------------------------------------------------------------------------------------------------------


def scores() -> nn.Module:
    """Scores of three classes at four positions, (n, 3, 4)."""
    return nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (3, 4)))


def reading(output: Tensor, y: Tensor) -> Tensor:
    """Not to be vectorised: it reads a value."""
    return F.mse_loss(output, y) * (2.0 if float(output.detach().sum()) > 0 else 1.0)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=F64)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
LOSSES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "mean": (lambda: nn.Linear(5, 3), nn.CrossEntropyLoss(), LABELS),
    "sum": (lambda: nn.Linear(5, 3), nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "class weights": (lambda: nn.Linear(5, 3), nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "weights and sum": (lambda: nn.Linear(5, 3), nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), LABELS),
    "smoothed": (lambda: nn.Linear(5, 3), nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "ignored tokens": (scores, nn.CrossEntropyLoss(ignore_index=1), torch.arange(24).view(6, 4) % 3),
    "probabilities": (lambda: nn.Linear(5, 3), nn.CrossEntropyLoss(), draw(6, 3).softmax(1)),
    "mse": (lambda: nn.Linear(5, 3), F.mse_loss, draw(6, 3)),
    "reading a value": (lambda: nn.Linear(5, 3), reading, draw(6, 3)),
    "user's own": (lambda: nn.Linear(5, 3), lambda out, y: (out - y).abs().pow(1.5).sum().sqrt(), draw(6, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_rows_loss_is_the_loss_of_that_row_alone(name: str) -> None:
    make, loss, y = LOSSES[name]
    model, x = settled(make()), draw(6, 5)
    expected = torch.stack([oracle.gradient(model, loss, x[i : i + 1], y[i : i + 1]) for i in range(6)])
    for _ in range(2):
        found = sample_gradients(model, loss, x, y)
        close(found.dense(), expected)
        assert "6 samples to a sweep" in found.route


# ---- samples that mix ------------------------------------------------------------------------------------------------


def hidden(between: Callable[[Tensor], Tensor]) -> nn.Module:
    """Something done between two layers."""
    return settled(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Calls(between), nn.Linear(4, 2)))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda a: a - a.mean(0),
    "detached mean": lambda a: a - a.mean(0).detach(),
    "a little": lambda a: a + 1e-9 * a.mean(0),
    "turned round": lambda a: a.flip(0),
    "random": lambda a: F.dropout(a, 0.5),
    "reading": lambda a: a * float(a.detach().sum()),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("many", [2, 3, 6])
def test_samples_that_mix_are_taken_alone_and_said_so(name: str, many: int) -> None:
    model, x, y = hidden(MIXING[name]), draw(many, 5), draw(many, 2, seed=3)
    with zoo.seeded():
        expected = torch.stack([oracle.gradient(model, F.mse_loss, x[i : i + 1], y[i : i + 1]) for i in range(many)])
    for _ in range(2):
        with zoo.seeded(), pytest.warns(JacopsWarning, match="every sample was differentiated alone"):
            found = sample_gradients(model, F.mse_loss, x, y)
        close(found.dense(), expected)
        assert "one sample at a time" in found.route
        assert "0.weight" in found.factored  # of each sample's own graph
    with zoo.seeded(), pytest.raises(NotDifferentiableError, match="fallback='error'"):
        sample_gradients(model, F.mse_loss, x, y, fallback="error")


def test_samples_in_another_order_inside_are_never_taken_for_each_other() -> None:
    turn = Calls(lambda x: x.flip(0))
    for many in (2, 3, 5):
        model, x, y = settled(nn.Sequential(turn, nn.Linear(5, 2), turn)), draw(many, 5), draw(many, 2, seed=3)
        expected = torch.stack([oracle.gradient(model, F.mse_loss, x[i : i + 1], y[i : i + 1]) for i in range(many)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JacopsWarning)
            close(sample_gradients(model, F.mse_loss, x, y).dense(), expected)


def test_equal_rows_prove_nothing_for_later_ones() -> None:
    model, y = hidden(lambda a: a - a.mean(0).detach()), torch.zeros(6, 2, dtype=F64)
    same = draw(1, 5).expand(6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        sample_gradients(model, F.mse_loss, same, y)
        x = draw(6, 5)
        found = sample_gradients(model, F.mse_loss, x, y)
    close(found.dense()[3], oracle.gradient(model, F.mse_loss, x[3:4], y[3:4]))


def test_a_row_that_is_not_finite_spoils_only_itself_and_is_not_held_against_the_model() -> None:
    model, x = model_of("mlp")
    y, bad = torch.zeros(6, 3, dtype=F64), x.clone()
    bad[2, 0] = torch.nan
    found = sample_gradients(model, F.mse_loss, bad, y, check_finite=False).dense()
    assert torch.isfinite(found).all(1).tolist() == [True, True, False, True, True, True]
    assert "6 samples to a sweep" in sample_gradients(model, F.mse_loss, x, y).route


# ---- edges -----------------------------------------------------------------------------------------------------------


def test_no_samples_are_no_rows() -> None:
    model, x = model_of("mlp")
    none = sample_gradients(model, F.mse_loss, x[:0], torch.zeros(0, 3, dtype=F64))
    n = none.shape[1]
    assert none.dense().shape == (0, n)
    assert none.gram().shape == (0, 0)
    assert not none.column_squares().any()
    assert not (none.T @ torch.zeros(0, dtype=F64)).any()
    assert sample_jacobians(model, x[:0]).shape == (0, n)


def test_the_same_masks_for_all_samples() -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double().train(), draw(4, 5)
    y, before = draw(4, 2, seed=3), torch.get_rng_state()
    with pytest.raises(ModelStateError, match="Dropout"):
        sample_jacobians(model, x)
    G = sample_gradients(model, F.mse_loss, x, y, randomness="same", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        for i, row in enumerate(G.dense()):
            torch.manual_seed(3)
            loss = F.mse_loss(model(x[i : i + 1]), y[i : i + 1])
            close(row, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert sample_jacobians(model, x, seed=3).shape == (8, G.shape[1])


def test_several_outputs_need_a_choice() -> None:
    model = Calls(lambda W, x: {"a": x @ W, "b": (x @ W).sum(1)}, (5, 3))
    with pytest.raises(InputError, match="outputs="):
        sample_jacobians(model, draw(4, 5))
    assert sample_jacobians(model, draw(4, 5), outputs="b").shape == (4, 15)
    assert sample_jacobians(model, draw(4, 5), outputs=lambda out: out["a"][:, 1]).shape == (4, 15)


def test_autocast_goes_by_plain_rows() -> None:
    model, x, y = nn.Linear(5, 3), draw(4, 5, dtype=torch.float32), torch.zeros(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample_gradients(model, F.mse_loss, x, y)
    assert found.coverage == 0
    assert found.dense().dtype is torch.float32


def test_the_empirical_fisher_is_solved_in_sample_space() -> None:
    model, x = model_of("mlp")
    y, b = draw(6, 3, seed=5), draw(model[0].weight.numel() + 8 + 27)
    G = sample_gradients(model, F.mse_loss, x, y)
    fisher = jacops.linalg.empirical_fisher(model, F.mse_loss, x, y)
    damped = (fisher + 0.1 * Identity(fisher.domain)).dense()
    inner = 6 * 0.1 * torch.eye(6, dtype=F64) + G.gram()
    dual = (b - G.T @ torch.linalg.solve(inner, G @ b)) / 0.1
    close(dual, torch.linalg.solve(damped, b))


def test_every_operator_has_a_gram_matrix() -> None:
    model, x = model_of("mlp")
    J = jacops.jacobian(model, x)
    close(J.gram(), J.dense() @ J.dense().T)
    close(J.gram(), sample_jacobians(model, x).gram())
