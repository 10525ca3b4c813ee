"""Solutions of low rank, weight by weight: against dense ones, and what they cost in numbers and passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import Problem, compute_influence_factors, compute_influences, self_influences
from jacops._influence import _run
from jacops._objective import Objective
from jacops._operators import _ranked_rows
from jacops._operators._ranked_rows import RankedRows
from jacops._passes import BatchPasses
from jacops._runtime.memory import Meter
from jacops._space import Space
from jacops._torch.layers import ranked as layers_ranked
from jacops.errors import InputError
from jacops.influence import group_influences, layer_influences, ranked, top_influences
from jacops.solvers import CG, EKFAC
from small import draw, settled

CLASSES, VOCABULARY = 3, 29


class Grouped(nn.Module):
    """Convolutions in groups, over many positions, and a weight with three axes that multiplies heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 16, 3, groups=2)
        self.heads = nn.Parameter(torch.randn(2, 8, 6))
        self.last = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        held = F.relu(self.second(F.relu(self.first(x.view(-1, 4, 5, 5))))).mean((2, 3)).view(-1, 2, 8)
        return self.last(torch.einsum("nhi,hio->nho", held, self.heads).flatten(1))


class Words(nn.Module):
    """An embedding whose table is used again at the output, or has a twin there."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(VOCABULARY, 10), nn.Linear(10, 10)
        self.out = nn.Linear(10, VOCABULARY, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.table(x)))).transpose(1, 2)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES))


def gpt2(tied: bool) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 12, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).double().eval()


def images(rows: int, seed: int) -> Any:
    return draw(rows, 100, seed=seed), torch.arange(rows) % CLASSES


def vectors(rows: int, seed: int) -> Any:
    return draw(rows, 12, seed=seed), torch.arange(rows) % CLASSES


def tokens(rows: int, seed: int) -> Any:
    ids = torch.randint(VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(seed))
    return ids, ids.roll(-1, 1)


def texts(rows: int, seed: int) -> Any:
    ids, _ = tokens(rows, seed)
    labels = ids.clone()
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


Case = tuple[Callable[[], nn.Module], Any, Callable[[int, int], Any]]
MODELS: dict[str, Case] = {
    "perceptron": (lambda: settled(perceptron()), F.cross_entropy, vectors),
    "convolutions": (lambda: settled(Grouped()), F.cross_entropy, images),
    "words": (lambda: settled(Words(False)), F.cross_entropy, tokens),
    "tied words": (lambda: settled(Words(True)), F.cross_entropy, tokens),
    "gpt2": (lambda: gpt2(False), "model", texts),
    "tied gpt2": (lambda: gpt2(True), "model", texts),
}


class Setting:
    """A model with its loss, its training and its test data."""

    def __init__(self, name: str = "perceptron") -> None:
        make, self.loss, batch = MODELS[name]
        self.model = make()
        self.train, self.test = [batch(5, 1), batch(3, 2)], [batch(4, 3), batch(3, 4)]

    def run(self, call: Any = compute_influences, rank: int | None = None, residual: bool = False, **more: Any) -> Any:
        solver = more.pop("solver", EKFAC(report_residual=residual, query_rank=rank))
        options: dict[str, Any] = {
            "test_data": self.test,
            "damping": 2.0 if residual else 0.05,
            "solver": solver,
            **more,
        }
        if call is self_influences:
            del options["test_data"]
        return call(self.model, self.train, loss=self.loss, **options)

    @property
    def gradients(self) -> Tensor:
        return Problem(self.model, self.loss, self.train).sample_gradients().dense()

    def solutions(self, rank: int | None = None) -> Tensor:
        return self.run(compute_influence_factors, rank).x


def close(found: Tensor, right: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == right.shape
    assert float((found - right).norm()) <= tolerance * float(right.norm())


def best(x: Tensor, space: Space, rank: int) -> Tensor:
    """The best approximation of every weight, by the singular value decomposition of its matrix."""
    parts = []
    for part in space.split(x):
        matrices = part.reshape(len(x), part.shape[1] if part.ndim > 1 else 1, -1)
        long, wide = matrices.shape[1:]
        if rank * (long + wide) < long * wide:
            left, values, right = torch.linalg.svd(matrices, full_matrices=False)
            matrices = left[:, :, :rank] @ (values[:, :rank, None] * right[:, :rank])
        parts.append(matrices.reshape(part.shape))
    return space.join(parts)


# ---- what the factors are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 70), (70, 60), (200, 50), (50, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_low_rank_come_back_to_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    space = Space(("w", "b"), (torch.Size(shape), torch.Size((7,))), (dtype, dtype), torch.device("cpu"))
    w = draw(3, shape[0], 4, seed=1) @ draw(3, 4, shape[1], seed=2)
    rows = torch.cat([w.flatten(1), draw(3, 7)], 1).to(dtype)
    held = RankedRows(space, 4)
    packed = held.packed(rows)
    assert packed.shape == (3, 4 * sum(shape) + 7) == (3, held.dim)
    close(held.dense(packed), rows, 1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.equal(held.dense(packed)[:, -7:], rows[:, -7:])


@pytest.mark.parametrize("sketched", [False, True])
def test_sketches_come_near_the_best_approximation_and_better_with_rank(
    sketched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ranked_rows, "_PAYS", 1 if sketched else 1000)
    space = Space(("w",), (torch.Size((80, 60)),), (torch.float64,), torch.device("cpu"))
    fall = torch.arange(1, 61).double() ** -0.5  # singular values that hardly fall
    rows = (torch.linalg.qr(draw(80, 60)).Q * fall @ torch.linalg.qr(draw(60, 60, seed=1)).Q).flatten()[None]
    errors = []
    for rank in (1, 2, 4, 8, 16, 32):
        error = float(RankedRows(space, rank).truncated(rows)[1][0])
        right = float((rows - best(rows, space, rank)).norm() / rows.norm())
        assert right * (1 - 1e-12) <= error <= (1.05 if sketched else 1 + 1e-12) * right
        errors.append(error)
    assert errors == sorted(errors, reverse=True)


def test_a_row_is_held_alike_whatever_rows_are_beside_it() -> None:
    space = Space(("w",), (torch.Size((80, 60)),), (torch.float64,), torch.device("cpu"))
    rows, held = draw(5, 4800), RankedRows(space, 3)
    close(held.dense(held.packed(rows))[2:3], held.dense(held.packed(rows[2:3])), 1e-12)


# ---- against dense solutions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["chosen", "by factors", "by blocks"])
def test_scores_are_those_of_solutions_truncated_by_their_singular_values(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "chosen":
        monkeypatch.setattr(layers_ranked, "_contracts", lambda *_: way == "by factors")
    at, rank = Setting(name), 2
    space, dense = Problem(at.model, at.loss, at.train).space, at.solutions()
    right, found = best(dense, space, rank), at.run(rank=rank)
    assert float((right - dense).norm()) > 1e-3 * float(dense.norm())
    close(at.solutions(rank), right)
    close(found.values, right @ at.gradients.T)
    close(found.info["truncation"], (right - dense).norm(dim=1) / dense.norm(dim=1), 1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_gives_dense_scores_and_the_error_falls_with_rank(name: str) -> None:
    at = Setting(name)
    dense, errors = at.run().values, []
    for rank in (1, 2, 3, 5, 200):
        found = at.run(rank=rank)
        errors.append(found.info["truncation"])
    close(found.values, dense, 1e-12)
    assert not errors[-1].any()
    assert all(bool((after <= before).all()) for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("name", MODELS)
def test_all_calls_agree(name: str) -> None:
    at, rank = Setting(name), 2
    found = at.run(rank=rank).values
    layers = at.run(layer_influences, rank)
    space, solutions = Problem(at.model, at.loss, at.train).space, at.solutions(rank)
    right = [
        a.flatten(1) @ b.flatten(1).T for a, b in zip(space.split(solutions), space.split(at.gradients), strict=True)
    ]
    close(layers.values, torch.stack(right, 2))
    values, indices = at.run(top_influences, rank, k=3)
    order = found.sort(dim=1, descending=True)
    close(values, order.values[:, :3])
    assert torch.equal(indices, order.indices[:, :3])
    groups = at.run(group_influences, rank, groups=[0, 1, 0, 0, 1, 0, 1, 1])
    close(groups.values[:, 1], found[:, [1, 4, 6, 7]].sum(1))
    at.test = at.train
    own = at.run(self_influences, rank)
    shares = at.run(rank=rank).shares.to(own) * 8
    close(own, at.run(rank=rank).values.diagonal() * shares**2)


@pytest.mark.parametrize("name", ["tied words", "gpt2", "tied gpt2"])
def test_tokens_add_up_to_samples_and_are_those_of_dense_solutions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jacops._influence import _tokens

    at = Setting(name)
    monkeypatch.setattr(_tokens, "_FORMED", 1)  # solutions are formed one by one
    found = at.run(rank=2, influence_type="token")
    tolerance = 1e-5 if at.loss == "model" else 1e-9  # transformers' own loss computes in float32
    close(found.values.sum(2), at.run(rank=2).values, tolerance)
    full = at.run(rank=200, influence_type="token")
    close(full.values, at.run(influence_type="token").values, tolerance)


def test_leverage_and_perturbations_take_truncated_solutions() -> None:
    at = Setting()
    right = at.run(rank=200, leverage=True).values
    close(right, at.run(leverage=True).values, 1e-12)
    assert 1e-3 < float((at.run(rank=1, leverage=True).values - right).norm() / right.norm()) < 1
    moved = at.run(rank=2, influence_type="perturbation").values
    problem = Problem(at.model, at.loss, at.train)
    parts = [problem.objective.mixed(b.x, b.y, at.solutions(2)) for b in problem.batches()]
    close(moved, torch.cat(parts, 1))


def test_jax_models_have_solutions_of_low_rank_too() -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    weights = {"a": draw(12, 10, seed=1).numpy() * 0.3, "b": draw(10, 9, seed=2).numpy() * 0.3}

    def model(params: Any, x: Any) -> Any:
        return jax.numpy.tanh(x @ params["a"]) @ params["b"]

    def loss(output: Any, y: Any) -> Any:
        return ((output - y) ** 2).mean()

    wrapped = jacops.JaxTwiceDifferentiable(model, weights, loss)
    train, test = ([(draw(6, 12, seed=s).numpy(), draw(6, 9, seed=s + 1).numpy())] for s in (1, 3))
    options: dict[str, Any] = {"test_data": test, "damping": 0.1}
    x = compute_influence_factors(wrapped, train, solver=EKFAC(query_rank=2), **options).x
    found = compute_influences(wrapped, train, solver=EKFAC(query_rank=2), **options)
    close(found.values, x @ Problem(wrapped, None, train).sample_gradients().dense().T)
    assert 0 < float(found.info["truncation"].max()) < 1


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_results_say_the_rank_and_the_error(tmp_path: Path) -> None:
    at = Setting()
    found = at.run(rank=2, residual=True)
    assert found.info["query_rank"] == 2
    assert found.info["truncation"].shape == (7,)
    worst = float(found.info["truncation"].max())
    assert f"rank 2 for each weight, relative change up to {worst:.1e}" in repr(found)
    found.save(tmp_path / "found.safetensors")
    again = jacops.load(tmp_path / "found.safetensors")
    assert torch.equal(again.info["truncation"], found.info["truncation"])
    assert repr(again) == repr(found)
    assert "query_rank" not in at.run().info
    ggn = Problem(at.model, at.loss, at.train).ggn()
    solution = EKFAC(query_rank=2).solve(ggn, at.gradients, damping=2.0)
    assert "rank 2 for each weight" in repr(solution)
    right = ggn.apply(solution.x) + 2.0 * solution.x - at.gradients  # the residual is that of what is returned
    close(solution.residual, right.norm(dim=1) / at.gradients.norm(dim=1), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**30])  # the latter has a unit of its own
def test_residuals_of_tiles_together_are_those_of_each_solution(
    scale: float, rank: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "_TILE_BYTES", 1)
    at = Setting()
    at.model = at.model.to(dtype)
    at.loss = lambda output, y: scale * F.cross_entropy(output, y)
    at.train, at.test = ([(x.to(dtype), y) for x, y in data] for data in (at.train, at.test))
    found = at.run(compute_influence_factors, rank, residual=True, damping=2.0 * scale)
    problem = Problem(at.model, at.loss, at.train)
    rows = problem.sample_gradients(at.test).dense().double()
    left = problem.ggn().apply(found.x).double() + 2.0 * scale * found.x.double() - rows
    right = left.norm(dim=1) / rows.norm(dim=1)
    close(torch.tensor(found.info["residual"], dtype=torch.float64), right, 1e-4 if dtype == torch.float32 else 1e-10)
    alone = EKFAC(query_rank=rank).solve(problem.ggn(), rows.to(dtype), damping=2.0 * scale)
    close(alone.residual, right, 1e-4 if dtype == torch.float32 else 1e-10)
    assert found.info["products"] == 7


@pytest.mark.parametrize("rank", [0, -1, 1.5, "4"])
def test_a_rank_is_a_whole_number_above_zero(rank: Any) -> None:
    with pytest.raises((InputError, TypeError), match="query_rank"):
        EKFAC(query_rank=rank)


def test_truncation_is_no_linear_map() -> None:
    at = Setting()
    ggn = Problem(at.model, at.loss, at.train).ggn()
    with pytest.raises(InputError, match=r"`solver`.*linear map.*Leave `query_rank` out"):
        jacops.inverse(ggn, EKFAC(query_rank=2), damping=0.1)
    with pytest.raises(InputError, match=r"`preconditioner`.*linear map.*Leave `query_rank` out"):
        CG(preconditioner=EKFAC(query_rank=2)).solve(ggn, at.gradients, damping=0.1)


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Sample gradients that were taken, and passes of curvature products over the training data."""
    found = {"gradients": 0, "passes": 0}
    gradients, passes = Objective.sample_gradients, BatchPasses.__call__

    def counted(self: Objective, x: Any, y: Any) -> Any:
        found["gradients"] += len(y)
        return gradients(self, x, y)

    def passed(self: BatchPasses) -> Any:
        found["passes"] += 1
        return passes(self)

    monkeypatch.setattr(Objective, "sample_gradients", counted)
    monkeypatch.setattr(BatchPasses, "__call__", passed)
    return found


def room(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let a tile be one row, and the budget so many bytes."""
    monkeypatch.setattr(_run, "_TILE_BYTES", 1)
    monkeypatch.setattr(_run, "budget_bytes", lambda budget, device: size)


def test_factors_meet_gradients_of_layers_without_the_entries_of_either() -> None:
    rows, many, rank, side = 16, 64, 2, 1000
    model = settled(nn.Sequential(nn.Linear(side, side, bias=False), nn.Tanh(), nn.Linear(side, 2, bias=False)))
    problem = Problem(model, F.cross_entropy, [(draw(rows, side), torch.arange(rows) % 2)])
    held = RankedRows(problem.space, rank)
    solutions = draw(many, held.dim)
    right = held.dense(solutions[:3]) @ problem.sample_gradients().dense().T
    with Meter() as meter:
        (found,) = problem.sample_gradients().apply_each([solutions], held)
    close(found[:3], right)
    assert meter.peak < 8 * side**2  # one solution, or one gradient, of 64 and 16
    with Meter() as meter:
        problem.sample_gradients().apply(held.dense(solutions[:4]))
    assert meter.peak > 8 * side**2


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_all_queries_share_one_pass_where_dense_ones_take_several(
    residual: bool, stored: bool, counts: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stored:
        pytest.importorskip("zarr")
    at = Setting()
    space = Problem(at.model, at.loss, at.train).space
    held = RankedRows(space, 1)
    assert 3 * held.dim < space.dim
    right = {rank: at.run(rank=rank, residual=residual).values for rank in (None, 1)}
    room(monkeypatch, int(3 * space.dim * 8 / _run._GROUP_SHARE))  # three dense solutions, of seven
    for rank, passes in ((None, 3), (1, 1)):
        counts["gradients"] = 0
        found = at.run(rank=rank, residual=residual, store=tmp_path / f"{rank}" if stored else None)
        assert counts["gradients"] == 8 * passes + 7
        close(found.values, right[rank])


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("call", [compute_influences, compute_influence_factors, self_influences, top_influences])
def test_residuals_of_all_tiles_that_fit_take_one_pass(
    call: Any, rank: int | None, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at, more = Setting(), {"k": 2} if call is top_influences else {}
    size = Problem(at.model, at.loss, at.train).space.dim * 8
    rows = 8 if call is self_influences else 7
    passes = {}
    for together in (1, 3, 100):
        room(monkeypatch, int(together * 3 * size / _run._SOLVE_SHARE))
        for residual in (False, True):
            counts["passes"] = 0
            at.run(call, rank, residual, **more)
            passes[together, residual] = counts["passes"]
    taken = {together: passes[together, True] - passes[together, False] for together in (1, 3, 100)}
    assert taken == {1: rows, 3: -(-rows // 3), 100: 1}


@pytest.mark.parametrize("rank", [None, 2])
def test_no_bit_of_a_stored_run_depends_on_how_many_tiles_are_solved_for_or_held_together(
    rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr")
    at, found = Setting(), []
    size = Problem(at.model, at.loss, at.train).space.dim * 8
    for together in (1, 2, 100):
        room(monkeypatch, int(together * 3 * size / _run._SOLVE_SHARE))
        run = at.run(rank=rank, residual=True, store=tmp_path / f"{together}")
        names = ("factors", "residual", "attainable", "influences", *(("truncation",) if rank else ()))
        kept = [torch.from_numpy(jacops.store.Store.open(tmp_path / f"{together}").read(name)) for name in names]
        found.append([run.values, torch.tensor(run.info["residual"]), *kept])
    plain = at.run(rank=rank, residual=True)
    for one in found:
        assert all(map(torch.equal, one, found[0]))
        # A store has the factors read again, whose layout in memory rounds otherwise.
        torch.testing.assert_close(one[0], plain.values, rtol=1e-10, atol=1e-12)
        if rank:
            torch.testing.assert_close(one[-1], plain.info["truncation"], rtol=1e-9, atol=1e-12)


def test_a_store_holds_factors_and_is_of_one_rank(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    at = Setting()
    first = at.run(rank=2, store=tmp_path / "run")
    held = RankedRows(Problem(at.model, at.loss, at.train).space, 2)
    assert jacops.store.Store.open(tmp_path / "run").read("factors").shape == (7, held.dim)
    again = at.run(rank=2, store=tmp_path / "run")
    assert torch.equal(again.values, first.values)
    assert again.info["query_rank"] == 2
    assert "rank 2 for each weight" in repr(again)
    assert torch.equal(ranked(tmp_path / "run", 2).values, first.values.topk(2).values)
    with pytest.raises(jacops.errors.StoreMismatchError, match="solver"):
        at.run(rank=3, store=tmp_path / "run")
