"""The strongest training samples, groups and layers: of the whole matrix of influences, without holding it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops import TorchTwiceDifferentiable, compute_influences
from jacops._influence import _run
from jacops.errors import InputError, InputTypeError, ModelStateError, StoreIncompleteError
from jacops.influence import group_influences, grouped, layer_influences, ranked, top_influences
from small import batches, draw, settled, small_net

X, Y = draw(12, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1])
TEST = [(draw(4, 3, seed=5), Y[:4]), (draw(3, 3, seed=6), Y[:3])]
DATA = batches(X, Y, 5, 4, 3)
SETTINGS: dict[str, Any] = {"damping": 0.5, "curvature": "ggn", "test_data": TEST}
GROUPS = ["b", "a", "b", "c", "a", "a", "b", "c", "c", "b", "a", "b"]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "_TILE_BYTES", 3 * 26 * 8)  # three test samples to a tile: across batches, one left over


def wrapped(model: nn.Module | None = None, loss: Any = F.cross_entropy) -> TorchTwiceDifferentiable:
    return TorchTwiceDifferentiable(model or small_net(), loss)


def by_hand() -> tuple[Tensor, Tensor, Tensor]:
    """Return the influences, the solutions and the training gradients by dense float64 matrices."""
    model = small_net()
    rows = [oracle.gradient(model, F.cross_entropy, X[i : i + 1], Y[i : i + 1]) for i in range(12)]
    tests = [
        oracle.gradient(model, F.cross_entropy, x[i : i + 1], y[i : i + 1]) for x, y in TEST for i in range(len(x))
    ]
    A = jacops.ggn(model, F.cross_entropy, X, Y).dense() + 0.5 * torch.eye(26).double()  # noqa: N806
    G, factors = torch.stack(rows), torch.linalg.solve(A, torch.stack(tests).T).T  # noqa: N806
    return factors @ G.T, factors, G


# ---- the strongest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_the_strongest_are_those_of_the_whole_matrix(which: Any, k: int):
    whole, _, _ = by_hand()
    key = {"largest": whole, "smallest": -whole, "magnitude": whole.abs()}[which]
    order = key.argsort(1, descending=True)[:, :k]
    values, indices = found = top_influences(wrapped(), DATA, k, which=which, **SETTINGS)
    assert torch.equal(indices, order)
    torch.testing.assert_close(values, whole.gather(1, order))
    assert len(found) == 7
    assert found.info["damping"] == 0.5
    assert f"7 × {k} of 12" in repr(found)


def test_a_pass_holds_the_influences_of_one_batch(monkeypatch: pytest.MonkeyPatch):
    widest: list[int] = []
    real = jacops.linalg.LayerFactors.times

    def noted(self: Any, vectors: Any, like: Tensor) -> Tensor:
        result = real(self, vectors, like)
        widest.append(result.numel())
        return result

    monkeypatch.setattr(jacops.linalg.LayerFactors, "times", noted)
    top_influences(wrapped(), DATA, 2, **SETTINGS)
    assert sorted(set(widest)) == [21, 28, 35]  # seven test samples, times a batch


def test_of_equal_ones_the_first_are_taken_however_the_data_are_cut():
    doubled = torch.cat([X, X]), torch.cat([Y, Y])
    # In batches of one size equal samples have the same bits; in others their gradients may differ by a rounding.
    for size in (12, 6, 4):
        found = top_influences(wrapped(), batches(*doubled, *[size] * (24 // size)), 5, **SETTINGS).indices
        assert torch.equal(found[:, 0] + 12, found[:, 1])
        assert torch.equal(found[:, 2] + 12, found[:, 3])


def test_the_ends_of_a_result_are_its_largest_and_smallest():
    found = compute_influences(wrapped(), DATA, **SETTINGS)
    values, indices = found.bottom(3)
    assert torch.equal(values, found.values.sort(1).values[:, :3])
    assert torch.equal(values, found.values.gather(1, indices))
    for which, end in (("largest", found.top(3)), ("smallest", found.bottom(3))):
        assert torch.equal(ranked(found, 3, which=which).indices, end[1])
    assert torch.equal(ranked(found.values, 3).values, found.top(3)[0])
    with pytest.raises(InputError, match="`k`"):
        found.bottom(13)


def test_a_stored_run_is_ranked_and_grouped_tile_by_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("zarr")
    found = compute_influences(wrapped(), DATA, store=tmp_path / "run", **SETTINGS)
    read: list[tuple[str, tuple[int, ...]]] = []
    real = jacops.store.Store.tile

    def noted(self: Any, name: str, index: tuple[int, ...]) -> np.ndarray:
        read.append((name, index))
        return real(self, name, index)

    monkeypatch.setattr(jacops.store.Store, "tile", noted)
    assert torch.equal(ranked(tmp_path / "run", 4).values, found.top(4)[0])
    assert [index for name, index in read if name == "influences"] == [(0, 0), (1, 0), (2, 0)]
    sums = grouped(str(tmp_path / "run"), GROUPS)
    torch.testing.assert_close(sums.values, grouped(found, GROUPS).values)
    torch.testing.assert_close(sums.leave_group_out(), grouped(found, GROUPS).leave_group_out())


def test_an_unfinished_store_and_other_things_are_refused(tmp_path: Path):
    pytest.importorskip("zarr")
    grids = {"influences": jacops.store.Grid((2, 3), tile=(1, 3)), "shares": jacops.store.Grid((3,), tile=(3,))}
    with jacops.store.StoredRun.open(tmp_path / "part", {"a": "b"}, grids) as run:
        run.write("shares", (0,), np.ones(3))
    with pytest.raises(StoreIncompleteError):
        ranked(tmp_path / "part", 1)
    with jacops.store.StoredRun.open(tmp_path / "other", {"a": "b"}, {"gram": grids["shares"]}) as run:
        run.write("gram", (0,), np.ones(3))
        run.complete()
    with pytest.raises(InputError, match="`scores`.*compute_influences"):
        ranked(tmp_path / "other", 1)
    with pytest.raises(InputTypeError, match="`scores` is an int"):
        ranked(3, 1)
    with pytest.raises(InputTypeError, match="`scores` is a Tensor"):
        grouped(torch.ones(2, 12), GROUPS)
    with pytest.raises(InputError, match=r"`scores`.*\(2, 3, 4\)"):
        ranked(torch.ones(2, 3, 4), 1)


@pytest.mark.parametrize("k", [0, 13, -1, True, 2.0])
def test_k_is_a_number_of_training_samples(k: Any):
    with pytest.raises(InputError, match="`k`"):
        top_influences(wrapped(), DATA, k, **SETTINGS)


def test_which_is_a_known_word():
    with pytest.raises(InputError, match="`which` is 'biggest'"):
        top_influences(wrapped(), DATA, 2, which="biggest", **SETTINGS)  # pyright: ignore


def test_a_plain_model_takes_its_loss():
    expected = top_influences(wrapped(), DATA, 2, **SETTINGS)
    found = top_influences(small_net(), DATA, 2, loss=F.cross_entropy, **SETTINGS)
    assert torch.equal(found.values, expected.values)


def test_a_ranking_becomes_a_table():
    pytest.importorskip("pandas")
    found = top_influences(wrapped(), DATA, 2, **SETTINGS)
    table = found.to_pandas(train=[f"doc{i}" for i in range(12)])
    assert list(table.columns) == ["test", "rank", "train", "influence"]
    assert table["train"][0] == f"doc{int(found.indices[0, 0])}"
    assert len(table) == 14


def test_results_are_saved_and_read(tmp_path: Path):
    found = [
        top_influences(wrapped(), DATA, 2, **SETTINGS),
        group_influences(wrapped(), DATA, GROUPS, **SETTINGS),
        layer_influences(wrapped(), DATA, **SETTINGS),
    ]
    for number, result in enumerate(found):
        result.save(tmp_path / f"{number}.safetensors")
        again = jacops.load(tmp_path / f"{number}.safetensors")
        assert torch.equal(again.values, result.values)
        assert repr(again) == repr(result)
        assert np.asarray(result).shape == tuple(result.values.shape)


def test_a_model_that_changes_on_the_way_is_refused():
    model = small_net()

    def changing() -> Any:
        class Loader(list):  # type: ignore[type-arg]
            passes = 0

            def __iter__(self) -> Any:
                Loader.passes += 1
                if Loader.passes > 1:
                    model[0].weight.data.mul_(1.5)
                return super().__iter__()

        return Loader(DATA)

    with pytest.raises(ModelStateError):
        top_influences(wrapped(model), DATA, 2, input_data=changing(), **SETTINGS)


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_add_up_their_samples():
    whole, _, _ = by_hand()
    found = group_influences(wrapped(), DATA, GROUPS, **SETTINGS)
    assert found.names == ["a", "b", "c"]
    assert found.counts.tolist() == [4, 5, 3]
    for g, name in enumerate(found.names):
        own = [i for i, group in enumerate(GROUPS) if group == name]
        torch.testing.assert_close(found.values[:, g], whole[:, own].sum(1))
        torch.testing.assert_close(found.leave_group_out()[:, g], whole[:, own].sum(1) / 12)
    torch.testing.assert_close(found.values.sum(1), whole.sum(1))
    for part in ("a (4), b (5), c (3)", "7 × 3 groups"):
        assert part in repr(found)


def test_the_weights_of_samples_count_where_groups_are_left_out():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]).double())
    found = group_influences(wrapped(loss=loss), DATA, Y, **SETTINGS)
    single = compute_influences(wrapped(loss=loss), DATA, **SETTINGS).leave_one_out()
    expected = torch.stack([single[:, label == Y].sum(1) for label in (0, 1)], 1)
    torch.testing.assert_close(found.leave_group_out(), expected)


def test_leaving_out_a_group_predicts_training_without_it():
    """To first order: the change of a ridge regression's test losses, for a group of two of forty samples."""
    x, y = draw(40, 3), draw(40, 1, seed=1)
    test = (draw(5, 3, seed=2), draw(5, 1, seed=3))

    def trained(kept: Tensor) -> nn.Linear:
        model = settled(nn.Linear(3, 1, bias=False))
        A = 2 * x[kept].T @ x[kept] / 40 + torch.eye(3).double()  # noqa: N806 - the sum's weights stay 1/40
        model.weight.data.copy_(torch.linalg.solve(A, 2 * x[kept].T @ y[kept] / 40).T)
        return model

    groups = [0] * 38 + [1] * 2
    everything = torch.arange(40)
    model, options = wrapped(trained(everything), F.mse_loss), {"l2": 1.0, "curvature": "ggn", "damping": 0.0}
    found = group_influences(model, [(x, y)], groups, test_data=[test], **options)
    losses = [((trained(kept)(test[0]) - test[1]) ** 2).squeeze(1) for kept in (everything, everything[:38])]
    real, predicted = (losses[1] - losses[0]).detach(), found.leave_group_out()[:, 1]
    assert float(torch.corrcoef(torch.stack([real, predicted]))[0, 1]) > 0.99


@pytest.mark.parametrize("groups", [["a"] * 11, [0.5] * 12, torch.zeros(12, 2), None])
def test_groups_are_one_label_for_each_sample(groups: Any):
    with pytest.raises(InputError, match="`groups`"):
        group_influences(wrapped(), DATA, groups, **SETTINGS)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_the_parts_of_layers_are_those_of_the_gradients_and_add_up():
    whole, factors, G = by_hand()  # noqa: N806
    found = layer_influences(wrapped(), DATA, **SETTINGS)
    assert found.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    start = 0
    for i, size in enumerate((12, 4, 8, 2)):
        part = slice(start, start + size)
        torch.testing.assert_close(found.values[:, :, i], factors[:, part] @ G[:, part].T)
        start += size
    torch.testing.assert_close(found.total(), whole)
    modules = found.by_module()
    assert modules.names == ["0", "2"]
    torch.testing.assert_close(modules.values[:, :, 0], found.values[:, :, :2].sum(2))
    assert "2.bias" in repr(found)


def test_a_picked_layer_has_the_influences_of_that_layer_alone():
    found = layer_influences(wrapped(), DATA, parameters="2.*", **SETTINGS)
    whole = compute_influences(wrapped(), DATA, parameters="2.*", **SETTINGS)
    assert found.names == ["2.weight", "2.bias"]
    torch.testing.assert_close(found.total(), whole.values)


def test_modules_are_cut_at_a_depth():
    names = ["a.0.w", "a.0.b", "a.1.w", "b.w"]
    found = jacops.results.LayerInfluences(draw(2, 3, 4), names)
    assert found.by_module().names == ["a.0", "a.1", "b"]
    assert found.by_module(1).names == ["a", "b"]
    torch.testing.assert_close(found.by_module(1).total(), found.total())
