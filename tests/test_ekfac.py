"""EK-FAC held against the exact curvature: what must be equal is equal to rounding, what is approximate says so."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import layer_cases
from jacops import Problem
from jacops._operators._eigen_blocks import EigenBlocks
from jacops._sharing import FirstPass
from jacops.errors import InputError, NonFiniteError
from jacops.solvers import CG, EKFAC, Direct, Status, _kronecker_passes
from jacops.testing import check_operator
from small import Calls, draw, settled
from zoo import BY_NAME

F64 = torch.float64
CROSS_ENTROPY = nn.CrossEntropyLoss()
POOR = pytest.mark.filterwarnings("ignore:.*approximate solutions have a relative residual")  # worse than zero


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.inner[0](x), "logits": self.inner(x)}


def mlp() -> nn.Module:
    return layer_cases.mlp(3, 4, 3)


IDS = layer_cases.words(9, 3, 5)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, draw(9, 3)),
    **{
        name: layer_cases.MODELS[name]
        for name in (
            *("without bias", "mixed tokens", "called twice", "words", "convolutions", "depthwise", "tied embedding"),
            *("lstm", "turned and used both ways", "no layer at all"),
        )
    },
}


def targets(many: int = 9, classes: int = 3) -> Tensor:
    return torch.arange(many) * 2 % classes


def problem(name: str, *, loss: Any = CROSS_ENTROPY, cuts: tuple[int, ...] = (5, 8), **options: Any) -> Problem:
    make, x = MODELS[name]
    parts = zip(x.tensor_split(cuts), targets().tensor_split(cuts), strict=True)
    return Problem(settled(make()).eval(), loss, list(parts), **options)


def basis(found: EigenBlocks) -> Tensor:
    """Return the eigenvectors as columns."""
    return found.coordinates(torch.eye(found.space.dim, dtype=found.space.dtype))


# ---- the laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_eigenvalues_are_the_diagonal_of_the_exact_matrix_in_the_eigenbasis(name: str) -> None:
    exact = problem(name).ggn()
    found = EKFAC().approximate(exact)
    Q = basis(found)
    torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=F64), rtol=0, atol=1e-12)
    diagonal = (Q * (exact.dense() @ Q)).sum(0)
    torch.testing.assert_close(found.eigenvalues, diagonal, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.eigenvalues.sum(), exact.dense().trace(), rtol=1e-12, atol=0)
    check_operator(found)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_outside_kronecker_form_are_the_exact_blocks(name: str) -> None:
    exact = problem(name).ggn()
    found = EKFAC().approximate(exact)
    for block in found.blocks:
        if block.form == "exact":
            (where,) = block.where
            torch.testing.assert_close(found.dense()[where, where], exact.dense()[where, where])


@pytest.mark.parametrize("name", ["mlp", "words", "convolutions", "tied embedding", "lstm"])
def test_uneven_batches_are_the_whole_in_one_batch(name: str) -> None:
    whole = EKFAC().approximate(problem(name, cuts=()).ggn())
    parts = EKFAC().approximate(problem(name, cuts=(1, 6)).ggn())
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "words", "convolutions", "lstm"])
def test_little_memory_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = EKFAC().approximate(problem(name).ggn()).dense()
    for limit, value in (("_KEPT_ENTRIES", 0), ("_SWEEP_ENTRIES", 1), ("_FEW", 2)):
        monkeypatch.setattr(_kronecker_passes, limit, value)
    torch.testing.assert_close(EKFAC().approximate(problem(name).ggn()).dense(), plenty, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "words", "lstm"])
def test_wide_sides_keep_their_axes_and_the_trace(name: str) -> None:
    exact = problem(name).ggn()
    found = EKFAC(widest=3).approximate(exact)
    assert any(block.form == "kronecker" and block.left is None for block in found.blocks)
    torch.testing.assert_close(found.eigenvalues.sum(), exact.dense().trace(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum")])
def test_a_linear_model_under_squared_error_is_inverted_exactly(bias: bool, loss: nn.Module) -> None:
    x, y = draw(9, 3), draw(9, 2, seed=1)
    A = Problem(settled(nn.Linear(3, 2, bias=bias)), loss, [(x[:4], y[:4]), (x[4:], y[4:])]).ggn()
    rows = draw(3, A.shape[0], seed=2)
    for recipe in (EKFAC(), EKFAC(corrected=False), EKFAC(weighted=False), EKFAC(corrected=False, weighted=False)):
        solution = recipe.solve(A, rows)
        torch.testing.assert_close(solution.x, Direct().solve(A, rows).x)
        assert solution.worst < 1e-12


def test_kfac_is_the_product_of_the_factors() -> None:
    x, y = draw(9, 3), targets()
    model = settled(nn.Linear(3, 3))
    A = Problem(model, CROSS_ENTROPY, [(x[:2], y[:2]), (x[2:], y[2:])]).ggn()
    found = EKFAC(corrected=False, weighted=False).approximate(A).dense()
    p = model(x).softmax(1).detach()
    S = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    a = torch.cat([x, torch.ones(9, 1, dtype=F64)], 1)
    expected = torch.einsum("ij,kl->ikjl", S, a.T @ a / 9)
    torch.testing.assert_close(found[:9, :9], expected[:, :3, :, :3].reshape(9, 9))
    torch.testing.assert_close(found[9:, 9:], expected[:, 3, :, 3])
    torch.testing.assert_close(found[:9, 9:], expected[:, :3, :, 3].reshape(9, 3))


def test_weighted_factors_alone_keep_the_trace_too() -> None:
    for name in ("mlp", "without bias"):
        exact = problem(name).ggn()
        trace = EKFAC(corrected=False).approximate(exact).eigenvalues.sum()
        torch.testing.assert_close(trace, exact.dense().trace(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", ["words", "convolutions", "lstm", "tied embedding"])
def test_the_correction_brings_the_matrix_closer(name: str, weighted: bool) -> None:
    exact = problem(name).ggn()
    off = [
        (EKFAC(corrected=c, weighted=weighted).approximate(exact).dense() - exact.dense()).norm() for c in (True, False)
    ]
    assert off[0] < off[1] < exact.dense().norm() * 1.5


@POOR
@pytest.mark.parametrize("damping", [0.3, 1e-4])
def test_damping_is_added_to_the_eigenvalues(damping: float) -> None:
    A = problem("words").ggn()
    prepared = EKFAC().prepare(A, damping)
    rows = draw(2, A.shape[0])
    damped = prepared.curvature.dense() + damping * torch.eye(A.shape[0], dtype=F64)
    torch.testing.assert_close(prepared.solve(rows).x, torch.linalg.solve(damped, rows.T).T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(prepared.preconditioner.dense() @ damped, torch.eye(A.shape[0], dtype=F64))


def test_weight_decay_is_damping_of_its_parameters() -> None:
    plain, ridge = problem("convolutions").ggn(), problem("convolutions", l2=0.2).ggn()
    rows = draw(2, plain.shape[0])
    torch.testing.assert_close(EKFAC().solve(ridge, rows).x, EKFAC().solve(plain, rows, damping=0.2).x)
    some = problem("mlp", l2={"*.weight": 0.2}).ggn()
    torch.testing.assert_close(EKFAC().approximate(some).eigenvalues.sum(), some.dense().trace())


# ---- which curvature ---------------------------------------------------------------------------------------------

IGNORING = torch.tensor([0, 1, -100, 2, 1, -100, 0, 2, 1])
LOSSES: dict[str, tuple[Any, Tensor]] = {
    "weighted classes": (nn.CrossEntropyLoss(weight=draw(3, seed=4).abs()), targets()),
    "ignored targets": (nn.CrossEntropyLoss(), IGNORING),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), targets()),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), targets()),
    "logistic": (nn.BCEWithLogitsLoss(), draw(9, 3).sigmoid()),
    "logistic by element": (nn.BCEWithLogitsLoss(pos_weight=draw(3).exp()), draw(9, 3).sigmoid()),
    "huber": (nn.HuberLoss(), draw(9, 3)),
    "own, not by element": (lambda o, y: ((o - y).square().sum(1) + 1).sqrt().mean(), draw(9, 3)),
    "linear": (lambda o, y: (o * y).mean(), draw(9, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fisher", ["exact", "monte_carlo"])
def test_curvature_is_the_losss(name: str, fisher: Any) -> None:
    loss, y = LOSSES[name]
    x, cuts = MODELS["mlp"][1], (2, 7)
    data = list(zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True))
    exact = Problem(settled(mlp()), loss, data).ggn()
    found = EKFAC(fisher=fisher, draws=1500).approximate(exact)
    tolerance = 1e-10 if fisher == "exact" else 0.04
    torch.testing.assert_close(found.eigenvalues.sum(), exact.dense().trace(), rtol=tolerance, atol=1e-14)


def test_positions_of_a_sequence_have_labels_of_their_own() -> None:
    model = settled(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Unflatten(2, (3, 2))))
    data = [(IDS, torch.randint(0, 3, (9, 3, 2), generator=torch.Generator().manual_seed(1)))]
    model.append(Calls(lambda h: h.movedim(2, 1)))
    exact = Problem(model, CROSS_ENTROPY, data).ggn()
    for recipe, tolerance in ((EKFAC(), 1e-10), (EKFAC(fisher="monte_carlo", draws=1000), 0.04)):
        trace = recipe.approximate(exact).eigenvalues.sum()
        torch.testing.assert_close(trace, exact.dense().trace(), rtol=tolerance, atol=0)


def test_sample_weights_count() -> None:
    x, y, weights = draw(9, 3), targets(), draw(9, seed=3).abs()
    exact = Problem(
        settled(mlp()), CROSS_ENTROPY, [(x[:4], y[:4], weights[:4]), (x[4:], y[4:], weights[4:])], unpack=tuple
    ).ggn()
    torch.testing.assert_close(EKFAC().approximate(exact).eigenvalues.sum(), exact.dense().trace())


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, nn.CrossEntropyLoss(reduction="sum")])
def test_the_operator_says_which_fisher_matrix(loss: nn.Module) -> None:
    own = problem("convolutions", loss=loss)
    trace = EKFAC().approximate(own.fisher("empirical")).eigenvalues.sum()
    expected = own.sample_gradients().dense().square().sum() / (9 if loss.reduction == "mean" else 1)
    torch.testing.assert_close(trace, expected)
    assert not torch.allclose(trace, own.ggn().dense().trace(), rtol=1e-2)


def test_draws_are_seeded_and_leave_the_global_state_alone() -> None:
    A, before = problem("mlp").ggn(), torch.get_rng_state()
    first, again, other = (EKFAC("monte_carlo", seed=s).approximate(A).dense() for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_many_outputs_are_drawn() -> None:
    model, y = settled(nn.Linear(3, 80)), targets(9, 80)
    A = Problem(model, CROSS_ENTROPY, [(draw(9, 3), y)]).ggn()
    torch.testing.assert_close(EKFAC().approximate(A).dense(), EKFAC("monte_carlo").approximate(A).dense())
    assert not torch.allclose(EKFAC().approximate(A).dense(), EKFAC("exact").approximate(A).dense(), rtol=1e-3)


def test_outputs_that_the_loss_does_not_read_cost_nothing() -> None:
    def of_logits(output: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"], y)

    x, y = MODELS["mlp"][1], targets()
    found = EKFAC(fisher="exact").approximate(Problem(settled(TwoOutputs()), of_logits, [(x, y)]).ggn())
    plain = EKFAC(fisher="exact").approximate(Problem(settled(mlp()), CROSS_ENTROPY, [(x, y)]).ggn())
    torch.testing.assert_close(found.eigenvalues, plain.eigenvalues)


# ---- accuracy, and what is reported ------------------------------------------------------------------------------


@POOR
def test_influences_of_a_trained_net_follow_the_exact_ones() -> None:
    x, model = draw(80, 5), settled(nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)))
    y = (x[:, :3] + 0.3 * draw(80, 3, seed=5)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        CROSS_ENTROPY(model(x), y).backward()
        optimizer.step()
    own = Problem(model, CROSS_ENTROPY, [(x[:60], y[:60])])
    G_train, G_test = own.sample_gradients().dense(), own.sample_gradients([(x[60:], y[60:])]).dense()
    exact = Direct().solve(own.ggn(), G_test, 0.1).x @ G_train.T
    scores = {c: EKFAC(corrected=c).solve(own.ggn(), G_test, 0.1).x @ G_train.T for c in (True, False)}
    r = {c: float(torch.corrcoef(torch.stack([s.flatten(), exact.flatten()]))[0, 1]) for c, s in scores.items()}
    assert r[True] > 0.85
    assert r[True] > r[False]


class SmallTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.table, self.blocks = nn.Embedding(60, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(ids))).mean(1))


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 5)),
    )


COVERED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), draw(6, 8)),
    "cnn": (small_cnn, draw(6, 1, 8, 8)),
    "transformer": (SmallTransformer, IDS[:6]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", COVERED)
def test_at_least_95_percent_are_in_kronecker_form(name: str, dtype: torch.dtype) -> None:
    make, x = COVERED[name]
    model = settled(make()).to(dtype).eval()
    A = Problem(model, CROSS_ENTROPY, [(x.to(dtype) if x.is_floating_point() else x, targets(6, 5))]).ggn()
    prepared = EKFAC(report_residual=False).prepare(A, 0.1)
    solution = prepared.solve(draw(1, A.shape[0], dtype=dtype))
    coverage = solution.info["coverage"]
    assert sum(coverage.values()) == A.shape[0]
    assert coverage["kronecker"] >= 0.95 * A.shape[0]
    assert f"{100 * coverage['kronecker'] / A.shape[0]:.1f} % in Kronecker form" in repr(prepared.curvature)


def test_what_is_too_large_to_be_exact_is_diagonal() -> None:
    exact = problem("words").ggn()
    found = EKFAC(exact_up_to=4).approximate(exact)
    assert found.coverage["diagonal"] > 0
    assert "diagonal" in repr(found)
    for block in found.blocks:
        if block.form == "diagonal":
            torch.testing.assert_close(block.values.flatten(), exact.dense().diagonal()[block.where[0]])


def test_frozen_parameters_stay_out() -> None:
    model = settled(mlp())
    model[0].weight.requires_grad_(False)
    A = Problem(model, CROSS_ENTROPY, [(MODELS["mlp"][1], targets())]).ggn()
    found = EKFAC().approximate(A)
    assert found.shape == (4 + 12 + 3, 4 + 12 + 3)
    torch.testing.assert_close(found.eigenvalues.sum(), A.dense().trace())
    torch.testing.assert_close(found.dense()[:4, :4], A.dense()[:4, :4])  # a bias alone is exact


def test_the_residual_is_the_true_one_and_can_be_left_out() -> None:
    A = problem("mlp").hessian()
    rows = draw(3, A.shape[0])
    solution = EKFAC().solve(A, rows, 0.5)
    left = rows - solution.x @ A.dense() - 0.5 * solution.x
    torch.testing.assert_close(solution.residual, left.norm(dim=1) / rows.norm(dim=1))
    assert set(solution.status) == {Status.APPROXIMATE}
    assert solution.info["approximate"]
    blind = EKFAC(report_residual=False).solve(A, rows, 0.5)
    torch.testing.assert_close(blind.x, solution.x)
    assert bool(blind.residual.isnan().all())
    assert set(blind.status) == {Status.UNCHECKED}
    assert blind.info["products"] == 0


def test_rows_that_are_not_finite_are_reported() -> None:
    A = problem("mlp").ggn()
    rows = draw(2, A.shape[0])
    rows[1, 3] = torch.nan
    for recipe, good in ((EKFAC(), Status.APPROXIMATE), (EKFAC(report_residual=False), Status.UNCHECKED)):
        assert recipe.solve(A, rows, 0.1).status == (good, Status.NONFINITE_INPUT)


def test_directions_without_curvature_need_damping() -> None:
    A = problem("mlp").ggn()  # a softmax does not feel a shift of all its scores
    for recipe in (EKFAC(), EKFAC(report_residual=False)):
        assert set(recipe.solve(A, draw(2, A.shape[0])).status) == {Status.SINGULAR}
    with pytest.raises(jacops.errors.SolveError, match="Raise `damping`"):
        jacops.solvers.solve(A, draw(A.shape[0]), EKFAC())


def test_it_preconditions_conjugate_gradients() -> None:
    x = draw(20, 12) * torch.logspace(0, 3, 12, dtype=F64)
    A = Problem(settled(nn.Linear(12, 2)), nn.MSELoss(), [(x, draw(20, 2))]).ggn()
    rows = draw(1, A.shape[0])
    plain, own = (CG(preconditioner=kind, tolerance=1e-6).solve(A, rows, 1e-3) for kind in (None, EKFAC()))
    torch.testing.assert_close(own.x, Direct().solve(A, rows, 1e-3).x, rtol=1e-4, atol=1e-4)
    assert own.converged
    assert own.iterations[0] <= 2 < plain.iterations[0]


def test_float32_is_float64_to_rounding() -> None:
    wide = EKFAC().approximate(problem("words").ggn())
    make, ids = MODELS["words"]
    narrow = EKFAC().approximate(Problem(settled(make()).float(), CROSS_ENTROPY, [(ids, targets())]).ggn())
    assert narrow.eigenvalues.dtype == torch.float32
    torch.testing.assert_close(narrow.eigenvalues.sum().double(), wide.eigenvalues.sum(), rtol=1e-5, atol=0)


# ---- proofs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["batched", "always"])
def test_gradients_that_disagree_with_plain_sweeps_are_not_used(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jacops._torch.sweeps.batched import EdgeAsk

    truth = EdgeAsk.sweep

    def lying(ask: Any, rows: Any, batched: bool = False) -> Any:
        found = truth(ask, rows, batched)
        return [c if c is None else 1.01 * c for c in found] if batched or lie == "always" else found

    exact = problem("mlp").ggn()
    monkeypatch.setattr(EdgeAsk, "sweep", lying)
    found = EKFAC().approximate(exact)
    torch.testing.assert_close(found.eigenvalues.sum(), exact.dense().trace(), rtol=1e-10, atol=0)
    assert (found.coverage["kronecker"] > 0) == (lie == "batched")


def test_the_model_is_left_alone() -> None:
    own = problem("convolutions")
    before = {k: v.clone() for k, v in own.objective.model.state_dict().items()}
    EKFAC().approximate(own.ggn())
    assert all(torch.equal(v, before[k]) for k, v in own.objective.model.state_dict().items())
    assert all(p.grad is None for p in own.objective.model.parameters())


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_an_operator_without_a_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"Problem\(model, loss, data\)"):
        EKFAC().prepare(jacops.linalg.Matrix(torch.eye(3, dtype=F64), symmetric=True), 0.1)


@pytest.mark.parametrize("options", [{"fisher": "true"}, {"draws": 0}])
def test_unknown_options_are_refused(options: Any) -> None:
    with pytest.raises(InputError):
        EKFAC(**options)


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (lambda o, y: (o - o.mean(0)).square().mean(), "mixes samples"),
        (lambda o, y: (o.cos() * y.unsqueeze(1)).mean(), "not convex"),
        (lambda o, y: (o.sum(1).cos() * (1 + y)).mean(), "not convex"),
    ],
)
def test_losses_without_positive_curvature_by_samples_are_refused(loss: Any, names: str) -> None:
    A = problem("mlp").ggn()
    own = Problem(settled(mlp()), loss, [(MODELS["mlp"][1], targets())])
    object.__setattr__(A, "problem", _unchecked(own))
    with pytest.raises(InputError, match=names):
        EKFAC().approximate(A)


def _unchecked(own: Problem) -> Problem:
    """Return a problem whose loss is not held against its reduction."""
    own.known = FirstPass(float(own.rows), own.rows, convex=False)
    return own


def test_data_that_are_not_finite_are_named() -> None:
    x = draw(9, 3)
    A = Problem(settled(mlp()), CROSS_ENTROPY, [(x, targets())]).ggn()
    bad = x.clone()
    bad[4, 1] = torch.inf
    own = Problem(settled(mlp()), CROSS_ENTROPY, [(bad, targets())])
    object.__setattr__(A, "problem", _unchecked(own))
    with pytest.raises(NonFiniteError):
        EKFAC().approximate(A)


# ---- the awkward zoo -----------------------------------------------------------------------------------------------

AWKWARD = (
    *("mlp_groupnorm", "prelu", "odd_parameters", "unused_parameter", "tied_weights", "called_twice", "fft", "hooked"),
    *("conv_batchnorm_eval", "self_attention", "multihead_attention", "transformer_layer", "gru", "embedding_sparse"),
    *("embedding_bag", "weight_norm", "checkpoint_reentrant", "checkpoint", "inplace_add", "custom_function", "item"),
    *("boolean_index", "tuple_output", "dict_input", "model_output", "own_closure", "frozen", "gpt2", "bert"),
)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models_keep_the_trace(name: str) -> None:
    if name in ("gpt2", "bert"):
        pytest.importorskip("transformers")
    case = BY_NAME[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = Problem(case.model(F64), case.loss, [(case.x(F64), case.y(F64))]).ggn()
        found, expected = EKFAC().approximate(exact), exact.dense().trace()
    torch.testing.assert_close(found.eigenvalues.sum(), expected, rtol=1e-9, atol=1e-14)
    assert sum(found.coverage.values()) == exact.shape[0]


def test_large_batches_are_not_kept_and_values_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    data = list(zip(torch.randn(64, 6).double().split(8), torch.randint(4, (64,)).split(8), strict=True))
    found, held = list[Tensor](), list[int]()
    for most in (2**26, 0):
        monkeypatch.setattr("jacops._problem._KEPT_FOR_FEW", most)
        problem = Problem(model, F.cross_entropy, data)
        found.append(EKFAC().approximate(problem.ggn()).eigenvalues)
        held.append(len(problem._kept))
    assert held == [8, 0]
    assert torch.equal(*found)
