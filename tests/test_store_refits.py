"""A finished store is read: no model is evaluated, no solver prepared; and what was known of the solves comes back."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("zarr")

import jacops
from jacops import TorchTwiceDifferentiable, compute_influences
from jacops._influence import _run
from jacops.errors import JacopsError, JacopsWarning, SolveError, StoreDamagedError, StoreMismatchError
from jacops.solvers import CG, EKFAC, MINRES, Lanczos, Nystrom, _auto
from jacops.store import Grid, Store, StoredRun

CALLS: Counter[str] = Counter()


class Counted(nn.Module):
    """A net that counts its forwards, copies included."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        CALLS["forwards"] += 1
        return self.second(torch.tanh(self.first(x)))


class Passes(list[Any]):
    """Batches that count how often they are read."""

    def __iter__(self) -> Any:
        CALLS["passes"] += 1
        return super().__iter__()


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Counted().to(dtype)


def data(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Passes:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    y = torch.arange(rows) % 3
    return Passes(zip(x.split(8), y.split(8), strict=True))


def run(store: Path | None, model: nn.Module | None = None, **options: Any) -> jacops.results.Influences:
    settings: dict[str, Any] = {"curvature": "ggn", "damping": 1.0, "test_data": data(7, 1), **options}
    train = settings.pop("train", None) or data(20, 0)
    return compute_influences(
        TorchTwiceDifferentiable(model or net(), settings.pop("loss", F.cross_entropy)), train, store=store, **settings
    )


METHODS: dict[str, Any] = {
    "auto": "auto",
    "direct": "direct",
    "cg": CG("nystrom"),
    "ekfac": EKFAC(),
    "ekfac unchecked": EKFAC(report_residual=False),
    "k-fac of drawn labels": EKFAC(fisher="monte_carlo", corrected=False),
    "lanczos": Lanczos(rank=6),
    "lanczos unchecked": Lanczos(rank=6, report_residual=False),
    "nystrom unchecked": Nystrom(rank=6, report_residual=False),
}
PER_RUN = {"seconds", "store"}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_store_answers_without_the_model(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"solver": METHODS[method]}
    first = run(tmp_path / "s", **options)
    CALLS.clear()
    train, test = data(20, 0), data(7, 1)
    again = run(tmp_path / "s", train=train, test_data=test, **options)
    assert CALLS["forwards"] == 0
    assert CALLS["passes"] == 2  # each data set once, for its digest
    plain = run(None, **options)
    for other in (first, plain):
        assert torch.equal(again.values, other.values)
        assert torch.equal(again.shares, other.shares)
        assert torch.equal(again.leave_one_out(), other.leave_one_out())
        assert set(again.info) - PER_RUN == set(other.info) - PER_RUN
        for name in set(again.info) - PER_RUN:
            assert same(again.info[name], other.info[name]), name
        assert repr(again) == repr(other)


@pytest.mark.parametrize(
    ("method", "status", "words"),
    [
        (EKFAC(), "approximate", "approximate, worst residual"),
        (EKFAC(report_residual=False), "unchecked", "unchecked, no residual computed"),
        (Nystrom(rank=6), "approximate", "approximate, worst residual"),
        ("direct", "converged", "converged, worst residual"),
    ],
    ids=["ekfac", "ekfac unchecked", "nystrom", "direct"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_words_for_how_solves_ended_go_through_a_store(
    method: Any, status: str, words: str, dtype: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"solver": method, "test_data": data(7, 1, dtype)}
    for _ in range(2):
        found = run(tmp_path / "s", net(dtype), train=data(20, 0, dtype), **options)
        assert found.values.dtype == dtype
        assert found.info["status"] == status
        assert found.info["statuses"] == [status] * 7
        assert found.info["success"]
        assert found.info["converged"] == (status == "converged")
        assert found.info["approximate"] == (status in ("approximate", "unchecked"))
        assert words in repr(found)


def test_a_store_that_lacks_influences_only_is_finished_without_the_solver(tmp_path: Path, monkeypatch: Any) -> None:
    path, options = tmp_path / "s", {"solver": EKFAC(report_residual=False)}
    whole = run(path, **options)
    (path / "influences" / "done" / "0.0").unlink()
    monkeypatch.setattr(EKFAC, "prepare", lambda *_: pytest.fail("the solver was prepared"))
    assert torch.equal(run(path, **options).values, whole.values)
    CALLS.clear()
    run(path, **options)
    assert CALLS["forwards"] == 0


def test_solutions_of_a_finished_store_are_neither_read_nor_missed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    whole = run(path)
    for chunk in (path / "factors" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"")
    CALLS.clear()
    assert torch.equal(run(path).values, whole.values)
    assert CALLS["forwards"] == 0


@pytest.mark.parametrize("array", ["influences", "status", "residual", "report", "shares", "iterations", "attainable"])
def test_a_damaged_tile_is_computed_again_with_a_warning(array: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    whole = run(path)
    chunk = next(file for file in (path / array / "c").rglob("*") if file.is_file())
    raw = bytearray(chunk.read_bytes())
    raw[0] ^= 255
    chunk.write_bytes(bytes(raw))
    with pytest.warns(JacopsWarning, match=rf"tile {array}\[.*damaged.*computed again"):
        again = run(path)
    assert torch.equal(again.values, whole.values)
    assert again.info["statuses"] == whole.info["statuses"]
    CALLS.clear()
    assert torch.equal(run(path).values, whole.values)
    assert CALLS["forwards"] == 0


@pytest.mark.parametrize(
    ("array", "block"),
    [
        ("status", lambda old: np.full_like(old, 200)),
        ("report", lambda old: np.zeros_like(old)),
        ("report", lambda old: np.full_like(old, ord("["))),
        ("report", lambda old: np.frombuffer(b"[]".ljust(old.size), np.uint8)[None]),
        ("report", lambda old: np.frombuffer(b'{"method": NaN}'.ljust(old.size), np.uint8)[None]),
        ("report", lambda old: np.frombuffer(b"\xff\xfe".ljust(old.size), np.uint8)[None]),
    ],
    ids=["unknown status", "no report", "brackets", "list", "not a number", "bytes"],
)
def test_crafted_statuses_and_reports_are_typed_errors(array: str, block: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    run(path)
    kept = Store.open(path)
    index = (0,) if array == "status" else (0, 0)
    crafted = block(kept.tile(array, index))
    grids = {name: Grid(g.shape, g.tile, g.dtype, finite=False) for name, g in kept.arrays.items()}
    with StoredRun.open(path, kept.identity, grids, surroundings=kept.surroundings) as writer:
        writer.write(array, index, crafted)
        writer.complete()
    with pytest.raises(StoreDamagedError, match=array):
        run(path)


@pytest.mark.parametrize("position", range(0, 1500, 97))
def test_a_header_with_any_byte_changed_is_a_typed_error_or_the_same_run(position: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    whole = run(path)
    raw = bytearray((path / "zarr.json").read_bytes())
    raw[position % len(raw)] ^= 1 << (position % 7)
    (path / "zarr.json").write_bytes(bytes(raw))
    try:
        found = run(path)
    except (JacopsError, JacopsWarning):
        return
    assert torch.equal(found.values, whole.values)


def forget_a_tile(path: Path, number: int) -> None:
    for name in ("factors", "status", "iterations", "residual", "attainable", "error_bound", "report", "influences"):
        for mark in (path / name / "done").glob(f"{number}*"):
            mark.unlink()


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("method", [*METHODS, "minres", "cg by rows", "cg by ekfac"])
@pytest.mark.filterwarnings("ignore::jacops.errors.JacopsWarning")  # of poor approximations
def test_a_tile_computed_alone_has_the_bits_of_one_among_others(
    method: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "_TILE_BYTES", 3 * 43 * 8)  # three rows to a tile, one in the last
    more = {"minres": MINRES(), "cg by rows": CG(block=False), "cg by ekfac": CG(preconditioner=EKFAC())}
    options: dict[str, Any] = {"solver": {**METHODS, **more}[method], "damping": "auto"}
    whole = run(tmp_path / "s", **options)
    factors = Store.open(tmp_path / "s").read("factors")
    forget_a_tile(tmp_path / "s", number)
    assert torch.equal(run(tmp_path / "s", **options).values, whole.values)
    assert np.array_equal(Store.open(tmp_path / "s").read("factors"), factors)


@pytest.mark.parametrize("number", [0, 2])
def test_what_auto_tried_for_the_first_tile_is_taken_for_all(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "_TILE_BYTES", 3 * 303 * 8)
    draw, y = torch.Generator().manual_seed(0), torch.arange(400) % 3
    x = torch.randn(400, 100, generator=draw, dtype=torch.float64) * 10.0 ** -torch.linspace(0, 5, 100)
    model = nn.Linear(100, 3).double()
    nn.init.zeros_(model.weight)

    def found() -> jacops.results.Influences:
        options: dict[str, Any] = {"test_data": [(x[:7], y[:7])], "loss": F.cross_entropy, "damping": 1e-4}
        return compute_influences(model, [(x, y)], store=tmp_path / "s", **options)

    whole = found()
    assert whole.info["chosen"].startswith("block CG")
    forget_a_tile(tmp_path / "s", number)
    trials: list[int] = []
    real = _auto._PreparedAuto._attempt
    monkeypatch.setattr(_auto._PreparedAuto, "_attempt", lambda self, rows: trials.append(1) or real(self, rows))
    again = found()
    assert torch.equal(again.values, whole.values)
    assert (again.info["chosen"], trials) == (whole.info["chosen"], [])


def test_other_work_is_refused_before_the_solver_is_prepared(tmp_path: Path, monkeypatch: Any) -> None:
    run(tmp_path / "s", solver=EKFAC())
    monkeypatch.setattr(EKFAC, "prepare", lambda *_: pytest.fail("the solver was prepared"))
    with pytest.raises(StoreMismatchError, match="damping"):
        run(tmp_path / "s", solver=EKFAC(), damping=2.0)


def test_a_solve_that_fails_leaves_nothing_that_reads_as_finished(tmp_path: Path) -> None:
    with pytest.raises(SolveError):
        run(tmp_path / "s", damping=0.0)
    with pytest.raises(SolveError):  # and again, not answered from what is there
        run(tmp_path / "s", damping=0.0)
    assert not Store.open(tmp_path / "s").is_complete


def test_what_cannot_be_solved_at_all_leaves_no_store(tmp_path: Path) -> None:
    with pytest.raises(JacopsError):
        run(tmp_path / "s", loss=lambda output, y: output.mean(0).max(), solver=EKFAC())
    assert not (tmp_path / "s").exists()


def test_status_codes_are_explained_in_the_store(tmp_path: Path) -> None:
    run(tmp_path / "s", solver=EKFAC(report_residual=False))
    kept = Store.open(tmp_path / "s")
    codes = dict(part.split(" ") for part in kept.identity["status codes"].split(", "))
    assert {codes[str(code)] for code in kept.read("status").tolist()} == {"unchecked"}
    report = json.loads(kept.read("report")[0].tobytes())
    assert report["method"] == "ekfac"


def test_jax_models_are_read_from_a_finished_store_too(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    calls: list[int] = []

    def apply(params: Any, x: Any) -> Any:
        calls.append(1)
        return x @ params["w"]

    def loss(output: Any, y: Any) -> Any:
        return ((output - y) ** 2).mean()

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    wrapped = jacops.JaxTwiceDifferentiable(apply, {"w": rng.normal(size=(3, 2)).astype(np.float32)}, loss)
    first = compute_influences(wrapped, [(x, y)], damping=1.0, store=tmp_path / "s")
    calls.clear()
    again = compute_influences(wrapped, [(x, y)], damping=1.0, store=tmp_path / "s")
    assert not calls
    assert torch.equal(again.values, first.values)
    assert again.info["statuses"] == first.info["statuses"]
