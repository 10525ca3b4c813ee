"""An index of projected gradients: exact where nothing is projected, unbiased where something is, resumed, refused."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import TorchTwiceDifferentiable, compute_influences, self_influences
from jacops._influence import _index_tiles
from jacops._influence._sketch import GradientSketch
from jacops._torch.layers.part import Rows
from jacops._torch.layers.parts import Lookup, Outer, Several
from jacops._torch.protocol import projected
from jacops.errors import (
    InputError,
    ModelStateError,
    NonFiniteError,
    SolveError,
    StoreMismatchError,
)
from jacops.influence import projected_index
from small import batches, draw, settled, small_net

X, Y = draw(12, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1])
TEST = [(draw(4, 3, seed=5), Y[:4]), (draw(3, 3, seed=6), Y[:3])]
DATA = batches(X, Y, 5, 4, 3)
KINDS = ["empirical_fisher", "ggn"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_index_tiles, "_TILE_BYTES", 0)  # as many rows as columns, or fewer where blocks are small
    monkeypatch.setattr(_index_tiles.IndexPlan, "step", 4)  # tiles across batches


def wrapped(model: nn.Module | None = None, loss: Any = F.cross_entropy) -> TorchTwiceDifferentiable:
    return TorchTwiceDifferentiable(model or small_net(), loss)


# ---- projections of factors ------------------------------------------------------------------------------------------

PARTS = {
    "an outer product": lambda: Outer(draw(3, 2, 1, 1, 5), draw(3, 1, 1, 4)),
    "positions": lambda: Outer(draw(3, 2, 6, 1, 5), draw(3, 6, 1, 4)),
    "groups": lambda: Outer(draw(3, 2, 6, 2, 5), draw(3, 6, 2, 4)),
    "turned": lambda: Outer(draw(3, 2, 6, 1, 5), draw(3, 6, 1, 4), turned=True),
    "turned groups": lambda: Outer(draw(3, 2, 6, 2, 5), draw(3, 6, 2, 4), turned=True),
    "another shape": lambda: Outer(draw(3, 2, 6, 1, 5), draw(3, 6, 1, 4), long=10),
    "nowhere": lambda: Outer(draw(3, 2, 0, 1, 5), draw(3, 0, 1, 4)),
    "a table": lambda: Lookup(draw(3, 2, 6, 1, 4), torch.randint(9, (3, 6)), 9),
    "rows": lambda: Rows(draw(3, 2, 5, 4)),
    "several": lambda: Several([Outer(draw(3, 2, 6, 1, 5), draw(3, 6, 1, 4)), Rows(draw(3, 2, 5, 4, seed=1))]),
}


@pytest.mark.parametrize("sides", ["left", "right", "both", "neither"])
@pytest.mark.parametrize("name", PARTS)
def test_factors_are_projected_as_their_rows_are(name: str, sides: str):
    part = PARTS[name]()
    _, _, long, wide = part.shape
    left = draw(long, 3, seed=7) if sides in ("left", "both") else None
    right = draw(wide, 2, seed=8) if sides in ("right", "both") else None
    rows = part.block(slice(0, long))
    expected = torch.einsum("nkfw,fa->nkaw", rows, left) if left is not None else rows
    expected = expected @ right if right is not None else expected
    torch.testing.assert_close(projected(part, left, right), expected)


def wide_net() -> nn.Module:
    return settled(nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 18), nn.Tanh(), nn.Linear(18, 3)))


def test_inner_products_are_right_on_average():
    model, x, y = wide_net(), draw(6, 20), torch.tensor([0, 1, 2, 0, 1, 2])
    G = jacops.sample_gradients(model, F.cross_entropy, x, y)  # noqa: N806
    grams = []
    for seed in range(100):
        rows = GradientSketch(G.domain, 5, seed).rows(G)
        grams.append(rows @ rows.T)
    mean, error = torch.stack(grams).mean(0), torch.stack(grams).std(0) / 10
    assert float(((mean - G.gram()) / error).abs().max()) < 3.5  # of 21 numbers
    assert float(error.max() / G.squared_norms().mean()) < 0.15  # so that a factor of 2 would show


def test_every_parameter_has_at_most_rank_squared_numbers_and_short_sides_stay():
    space = jacops.sample_gradients(wide_net(), F.cross_entropy, draw(2, 20), Y[:2]).domain
    sketch = GradientSketch(space, 4, 0)
    sizes = dict(zip(space.names, sketch.lengths, strict=True))
    assert sizes == {
        "0.weight": (4, 4), "0.bias": (16, 1), "2.weight": (4, 4), "2.bias": (16, 1), "4.weight": (3, 5),
        "4.bias": (3, 1),
    }  # fmt: skip
    assert not sketch.is_exact
    assert GradientSketch(space, 24, 0).is_exact
    one, other = GradientSketch(space, 4, 1), GradientSketch(space, 4, 0)
    assert not torch.equal(sketch.sides[0][0], one.sides[0][0])  # type: ignore[arg-type]
    assert torch.equal(sketch.sides[0][0], other.sides[0][0])  # type: ignore[arg-type]
    assert not torch.equal(sketch.sides[0][0][:18], sketch.sides[2][0])  # type: ignore[index]


# ---- where nothing is projected --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_projection_scores_are_exact(kind: Any, stored: bool, tmp_path: Path):
    if stored:
        pytest.importorskip("zarr")
    index = projected_index(wrapped(), DATA, rank=4, curvature=kind, store=tmp_path / "index" if stored else None)
    expected = compute_influences(wrapped(), DATA, test_data=TEST, curvature=kind, damping=0.3)
    found = index.influences(TEST, damping=0.3)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.leave_one_out(), expected.leave_one_out())
    values, indices = index.top(TEST, 3, damping=0.3)
    torch.testing.assert_close(values, expected.top(3)[0])
    assert torch.equal(indices, expected.top(3)[1])
    own = self_influences(wrapped(), DATA, curvature=kind, damping=0.3)
    torch.testing.assert_close(index.self_influences(damping=0.3), own)
    torch.testing.assert_close(index.influences(damping=0.3).values.diagonal(), own)


LOSSES: dict[str, Any] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]).double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gauss_newton_matrix_is_in_the_scale_of_the_objective(name: str):
    loss = LOSSES[name]
    index = projected_index(wrapped(loss=loss), DATA, rank=4, curvature="ggn", l2=0.1)
    expected = compute_influences(wrapped(loss=loss), DATA, test_data=TEST, curvature="ggn", damping=0.3, l2=0.1)
    torch.testing.assert_close(index.influences(TEST, damping=0.3).values, expected.values)


def test_sample_weights_count_in_curvature_shares_and_self_influences():
    data = [(x, y, torch.linspace(0.5, 2, len(x)).double()) for x, y in DATA]
    options: Any = {"unpack": lambda batch: batch}
    index = projected_index(wrapped(), data, rank=4, curvature="ggn", **options)
    expected = compute_influences(wrapped(), data, curvature="ggn", damping=0.3, **options)
    found = index.influences(damping=0.3)
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.leave_one_out(), expected.leave_one_out())
    own = self_influences(wrapped(), data, curvature="ggn", damping=0.3, **options)
    torch.testing.assert_close(index.self_influences(damping=0.3), own)
    with pytest.raises(InputError, match="`curvature` is 'empirical_fisher'.*sample weights"):
        projected_index(wrapped(), data, **options)


def test_drawn_labels_give_the_gauss_newton_matrix_on_average(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_index_tiles.IndexPlan, "step", 250)
    x = draw(400, 3, seed=4)
    data = batches(x, torch.zeros(400, dtype=torch.long), 250, 150)  # the data's own labels have no part in it
    index = projected_index(wrapped(), data, rank=4, curvature="monte_carlo_fisher")
    fisher = jacops.Problem(wrapped(), data=data).fisher("monte_carlo").dense()
    torch.testing.assert_close(index._curvature[0], fisher)  # the same draws, by the sample's place
    ggn = jacops.Problem(wrapped(), data=data).ggn().dense()
    assert float((index._curvature[0] - ggn).norm() / ggn.norm()) < 0.2


# ---- where something is ----------------------------------------------------------------------------------------------


def projected_case() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model, x = wide_net(), draw(80, 20)
    y = (x[:, :3] + 0.5 * draw(80, 3, seed=1)).argmax(1)
    return wrapped(model), batches(x[:60], y[:60], 40, 20), [(x[60:], y[60:])]


@pytest.mark.parametrize("kind", KINDS)
def test_projected_scores_are_close_and_closer_with_rank(kind: Any):
    model, train, test = projected_case()
    right = compute_influences(model, train, test_data=test, curvature=kind, damping=0.05).values
    near = []
    for rank in (2, 8, 16):
        found = projected_index(model, train, rank=rank, curvature=kind).influences(test, damping=0.05)
        near.append(float(torch.corrcoef(torch.stack([found.values.flatten(), right.flatten()]))[0, 1]))
    assert near[0] < near[1] < near[2]
    assert near[1] > 0.6
    assert near[2] > 0.9


def test_blocks_of_the_curvature_are_those_of_parameters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_index_tiles, "_TOGETHER", 20)
    index = projected_index(wrapped(), DATA, rank=4)
    G = jacops.Problem(wrapped(), data=DATA).sample_gradients().dense()  # noqa: N806
    A, start = torch.zeros(26, 26).double(), 0  # noqa: N806
    for size in (12, 4, 8, 2):
        part = slice(start, start + size)
        A[part, part] = G[:, part].T @ G[:, part] / 12
        start += size
    expected = G @ torch.linalg.solve(A + 0.3 * torch.eye(26).double(), G.T)
    torch.testing.assert_close(index.influences(damping=0.3).values, expected)
    assert "4 blocks" in repr(index)


def test_groups_and_layers_add_up():
    model, train, test = projected_case()
    index = projected_index(model, train, rank=3)
    whole = index.influences(test)
    layers = index.layer_influences(test)
    assert layers.names[0] == "0.weight"
    torch.testing.assert_close(layers.total(), whole.values)
    labels = np.arange(60) % 4
    groups = index.group_influences(labels, test)
    torch.testing.assert_close(groups.values[:, 1], whole.values[:, labels == 1].sum(1))
    torch.testing.assert_close(groups.leave_group_out(), groups.values / 60)


def test_damping_by_default_is_a_share_of_the_norm_and_said():
    index = projected_index(wrapped(), DATA, rank=4, curvature="ggn")
    norm = float(torch.linalg.matrix_norm(jacops.Problem(wrapped(), data=DATA).ggn().dense(), 2))
    found = index.influences(TEST)
    assert found.damping == pytest.approx(0.02 * norm, rel=0.02)
    assert found.info["damping_rule"].startswith("auto")
    torch.testing.assert_close(found.values, index.influences(TEST, damping=found.damping).values)


def test_a_query_passes_over_its_own_samples_alone():
    calls: list[int] = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_net()

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return self.body(x)

    index = projected_index(wrapped(Counted()), DATA)
    calls.clear()
    index.top(TEST, 2)
    assert sum(calls) <= 3 * 7  # and what proves that samples do not mix: none of the 12 training samples


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_a_killed_index_goes_on_and_a_finished_one_runs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("zarr")
    expected = projected_index(wrapped(), DATA, rank=2).influences(TEST).values
    made: list[int] = []
    real = _index_tiles.IndexPlan._tile

    def counted(self: Any, parts: Any, first: int) -> Any:
        if len(made) == 2 and not hasattr(counted, "over"):
            counted.over = True  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        made.append(first)
        return real(self, parts, first)

    monkeypatch.setattr(_index_tiles.IndexPlan, "_tile", counted)
    with pytest.raises(KeyboardInterrupt):
        projected_index(wrapped(), DATA, rank=2, store=tmp_path / "index")
    index = projected_index(wrapped(), DATA, rank=2, store=tmp_path / "index")
    assert made == [0, 4, 8]
    torch.testing.assert_close(index.influences(TEST).values, expected)

    class Silent(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model ran")

    monkeypatch.setattr(type(small_net()), "forward", Silent.forward)
    again = projected_index(wrapped(), DATA, rank=2, store=tmp_path / "index")
    monkeypatch.undo()
    torch.testing.assert_close(again.influences(TEST).values, expected)
    assert str(tmp_path / "index") in repr(again)


def test_a_tile_that_another_process_left_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from jacops.store import Store, StoredRun, read_store

    monkeypatch.setattr(_index_tiles, "_TILE_BYTES", 1)
    projected_index(wrapped(), DATA, rank=2, store=tmp_path / "index")
    expected, kept = read_store(tmp_path / "index", "rows"), Store.open(tmp_path / "index")
    assert kept.arrays["rows"].total > 1
    (tmp_path / "index" / "rows" / "done" / "1.0").unlink()
    with StoredRun.open(tmp_path / "index", kept.identity, kept.arrays, surroundings=kept.surroundings) as other:
        assert other.take("rows", (1, 0))
        closing = threading.Timer(0.3, other.close)
        closing.start()
        projected_index(wrapped(), DATA, rank=2, store=tmp_path / "index")
        assert not closing.is_alive()
    assert (read_store(tmp_path / "index", "rows") == expected).all()


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("model", {"model": lambda: settled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))}),
    "loss": ("model", {"loss": nn.CrossEntropyLoss()}),
    "data": ("training data", {"data": batches(X.flip(0), Y, 5, 4, 3)}),
    "rank": ("projection", {"rank": 3}),
    "seed": ("projection", {"projection_seed": 1}),
    "curvature": ("curvature", {"curvature": "ggn"}),
    "l2": ("l2", {"l2": 0.5}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_index_of_something_else_is_refused_by_what_differs(name: str, tmp_path: Path):
    pytest.importorskip("zarr")
    projected_index(wrapped(), DATA, rank=2, store=tmp_path / "index")
    field, changed = OTHERS[name]
    given: Any = dict(changed)
    model = wrapped(given.pop("model", small_net)(), given.pop("loss", F.cross_entropy))
    with pytest.raises(StoreMismatchError, match=field):
        projected_index(model, given.pop("data", DATA), store=tmp_path / "index", **{"rank": 2, **given})


def test_a_model_trained_on_is_refused():
    model = small_net()
    index = projected_index(wrapped(model), DATA)
    model[0].weight.data.mul_(1.1)
    with pytest.raises(ModelStateError, match="GradientIndex"):
        index.influences(TEST)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 2.5}, "`rank` is 2.5"),
        ({"projection_seed": -1}, "`projection_seed`"),
        ({"curvature": "hessian"}, "`curvature` is 'hessian'"),
    ],
)
def test_options_out_of_range_are_refused(option: Any, words: str):
    with pytest.raises(InputError, match=words):
        projected_index(wrapped(), DATA, **option)


@pytest.mark.parametrize("damping", [-1.0, "Auto", None, True])
def test_damping_out_of_range_is_refused(damping: Any):
    with pytest.raises(InputError, match="`damping`"):
        projected_index(wrapped(), DATA).influences(TEST, damping=damping)


def test_a_singular_curvature_and_a_coarse_model_are_refused():
    index = projected_index(wrapped(), DATA, rank=4)
    with pytest.raises(SolveError, match="singular.*damping"):
        index.influences(TEST, damping=0)
    with pytest.raises(InputError, match=r"bfloat16.*model.float\(\)"):
        projected_index(wrapped(small_net().bfloat16()), DATA)


def test_data_that_are_not_finite_are_named():
    x = X.clone()
    x[6, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="row"):
        projected_index(wrapped(), batches(x, Y, 5, 4, 3), reduction="mean")


def test_a_rank_whose_curvature_fits_no_memory_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_index_tiles, "_TOGETHER", 4)
    monkeypatch.setattr(_index_tiles, "_WIDEST", 9)
    projected_index(wrapped(), DATA, rank=3)
    with pytest.raises(InputError, match="`rank` is 4.*12 numbers.*at most 9.*at most 3"):
        projected_index(wrapped(), DATA, rank=4)


def test_a_loss_that_is_not_convex_has_no_gauss_newton_index():
    def waves(output: Tensor, y: Tensor) -> Tensor:
        return (2 * output).sin().sum(1).mean() + 0 * y.sum()

    with pytest.raises(InputError, match="`curvature` is 'ggn' of a loss that is not convex"):
        projected_index(wrapped(loss=waves), DATA, curvature="ggn")
    assert projected_index(wrapped(loss=waves), DATA).influences(TEST).shape == (7, 12)


def test_more_outputs_than_sweeps_are_refused_by_the_curvature(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_index_tiles, "_MOST_OUTPUTS", 1)
    with pytest.raises(InputError, match="`curvature` is 'ggn' with 2 outputs.*monte_carlo_fisher"):
        projected_index(wrapped(), DATA, curvature="ggn")


# ---- language models -------------------------------------------------------------------------------------------------


def test_language_models_go_in_as_they_are_and_padding_changes_nothing():
    pytest.importorskip("transformers")
    from test_language_models import batches as cut
    from test_language_models import gpt2, sequences

    model = gpt2()
    options: Any = {"curvature": "empirical_fisher", "parameters": ["transformer.h.1.attn.c_proj*", "lm_head*"]}
    index = projected_index(model, cut(sequences()), loss="model", rank=23, **options)
    found = index.influences(damping=0.1).values
    twice = TorchTwiceDifferentiable(model, "model")
    exact = compute_influences(twice, cut(sequences()), damping=0.1, solver="direct", **options).values
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    padded = projected_index(model, cut(sequences(width=12)), loss="model", rank=23, **options)
    torch.testing.assert_close(padded.influences(damping=0.1).values, found, rtol=1e-6, atol=1e-8)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def test_jax_models_have_the_index_of_their_torch_twins():
    pytest.importorskip("jax")
    from jax_cases import as_jax, double_precision, mse

    theirs, x, y = nn.Linear(3, 2, bias=False).double(), draw(6, 3), draw(6, 2, seed=1)
    with double_precision():
        ours = jacops.JaxTwiceDifferentiable(lambda w, x: x @ w.T, as_jax(theirs.weight.detach()), mse)
        data = [(as_jax(x), as_jax(y))]
        found = projected_index(ours, data, rank=2, curvature="ggn").influences(damping=0.2).values
        with pytest.raises(InputError, match="`curvature`.*JAX"):
            projected_index(ours, data, curvature="monte_carlo_fisher")
    twin = projected_index(wrapped(theirs, F.mse_loss), [(x, y)], rank=2, curvature="ggn")
    assert twin._plan.sketch.lengths == [(2, 2)]
    name = twin._plan.sketch.space.names[0]
    assert name != ours.objective.space.names[0]  # by which the numbers are drawn
    assert found.shape == (6, 6)
    exact = projected_index(wrapped(theirs, F.mse_loss), [(x, y)], rank=9, curvature="ggn").influences(damping=0.2)
    with double_precision():
        whole = projected_index(ours, data, rank=9, curvature="ggn").influences(damping=0.2)
    torch.testing.assert_close(whole.values, exact.values)
