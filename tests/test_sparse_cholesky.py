"""Sparse Cholesky by fronts, normal matrices in blocks, and fits on them, against dense NumPy."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_graphs import garage_graph, grid_graph, sphere_graph, synthetic_bundle, walk_graph
from torch import Tensor, nn

from jacops._extras.graph_problems import PoseGraphResidual
from jacops._runtime.blas import _blas_libraries, one_blas_thread
from jacops.charts import SE2, SE3
from jacops.errors import JacopsWarning, SolveError
from jacops.fit import SparseCholesky, gauss_newton, levenberg_marquardt
from jacops.fit._multifrontal import FrontalAnalysis
from jacops.fit._normal import NormalPattern
from jacops.fit._row_blocks import RowBlocks, Stack
from jacops.fit._system import LinearizedFit


def stacked(rng: np.random.Generator, many: int, most: int) -> RowBlocks:
    """Blocks of random heights over random units, all of which are met."""
    widths, count = rng.integers(1, 5, many), many + int(rng.integers(0, 60))
    units = [np.sort(rng.choice(many, min(many, int(rng.integers(1, most))), replace=False)) for _ in range(count)]
    units[:many] = [np.unique(np.r_[own, number]) for number, own in enumerate(units[:many])]
    ends = np.r_[0, np.cumsum([len(own) for own in units])]
    heights = rng.integers(1, 4, count)
    return RowBlocks.of(Stack(heights, ends, np.concatenate(units), 0 * heights).merged(), widths, widths)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 6))
def test_normal_matrices_and_their_factors_are_those_of_numpy(seed: int, many: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = stacked(rng, many, most)
    data = rng.normal(size=len(blocks.columns))
    J, normal = blocks.matrix(data).toarray(), NormalPattern.of(blocks)
    entries = normal.product(data)
    np.testing.assert_allclose(normal.full(entries).toarray(), J.T @ J, atol=1e-12)
    entries[normal.diagonal] += 1.0
    A = J.T @ J + np.eye(J.shape[1])
    factor = normal.analysis.factorised(entries)
    assert np.log(factor.pivots).sum() == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-10, abs=1e-10)
    for b in (rng.normal(size=len(A)), rng.normal(size=(len(A), 3))):
        np.testing.assert_allclose(factor.solve(b), np.linalg.solve(A, b), rtol=1e-9, atol=1e-10)


def bundle_blocks(rng: np.random.Generator, cameras: int, points: int, fixed: int) -> RowBlocks:
    """Observations of two rows: a camera, of nine or some of six columns, and a point; some points are fixed."""
    widths = np.r_[np.where(np.arange(cameras) % 5, 9, 6), np.full(points, 3)]
    units = []
    for point in range(points):
        seen = np.sort(rng.choice(cameras, int(rng.integers(2, 5)), replace=True))  # some cameras see it twice
        units += [np.array([camera, cameras + point] if point >= fixed else [camera]) for camera in seen]
    units += [np.array([unit]) for unit in range(len(widths))]
    ends = np.r_[0, np.cumsum([len(own) for own in units])]
    heights = np.r_[np.full(len(units) - len(widths), 2), widths]
    return RowBlocks.of(Stack(heights, ends, np.concatenate(units), 0 * heights).merged(), widths, widths)


@pytest.mark.parametrize(("cameras", "points", "fixed"), [(4, 120, 0), (12, 150, 20), (40, 400, 5)])
def test_equal_leaves_are_eliminated_as_numpy_does(cameras: int, points: int, fixed: int, loops: str) -> None:
    rng = np.random.default_rng(cameras)
    blocks = bundle_blocks(rng, cameras, points, fixed)
    data, normal = rng.normal(size=len(blocks.columns)), NormalPattern.of(blocks)
    J, entries = blocks.matrix(data).toarray(), normal.product(data)
    A = J.T @ J
    np.testing.assert_allclose(normal.full(entries).toarray(), A, atol=1e-12)
    analysis = normal.analysis
    # Points, whose fronts have three columns, go in batches where loops cost Python.
    batched = sum(len(leaves.columns) for leaves in analysis.leaves if leaves.wide == 3)
    assert batched > points / 4 if loops == "scipy" else not analysis.leaves
    factor = analysis.factorised(entries)
    assert np.log(factor.pivots).sum() == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-10)
    for b in (rng.normal(size=len(A)), rng.normal(size=(len(A), 4))):
        np.testing.assert_allclose(factor.solve(b), np.linalg.solve(A, b), rtol=1e-8, atol=1e-10)
    entries[normal.diagonal[-1]] = 0.0  # of a point
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        analysis.factorised(entries)


@pytest.mark.parametrize("most", [1, 400])
def test_products_in_chunks_are_those_at_once(most: int, monkeypatch: pytest.MonkeyPatch, loops: str) -> None:
    rng = np.random.default_rng(0)
    blocks = bundle_blocks(rng, 6, 50, 0)
    data, b = rng.normal(size=len(blocks.columns)), rng.normal(size=blocks.shape[1])
    expected = NormalPattern.of(blocks).product(data)
    monkeypatch.setattr("jacops.fit._squares.CHUNK", most)
    normal = NormalPattern.of(blocks)
    entries = normal.product(data)
    np.testing.assert_allclose(entries, expected, rtol=1e-13, atol=1e-13)
    A = normal.full(entries).toarray()
    np.testing.assert_allclose(normal.analysis.factorised(entries).solve(b), np.linalg.solve(A, b), rtol=1e-9)


GRAPHS: dict[str, Any] = {
    "chain": lambda n: [(i, i + 1) for i in range(n - 1)],
    "ring": lambda n: [(i, (i + 1) % n) for i in range(n)],
    "star": lambda n: [(0, i) for i in range(1, n)],
    "two components": lambda n: [(i, i + 1) for i in range(n - 1) if i != n // 2],
    "no edges": lambda n: [],
    "grid": lambda n: [(i, i + s) for i in range(n) for s in (1, 20) if i + s < n],
    "everything": lambda n: [(i, j) for i in range(min(n, 60)) for j in range(i)],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_all_shapes_are_factorised(name: str, loops: str) -> None:
    n = 400
    pairs = np.array([*GRAPHS[name](n), *((i, i) for i in range(n))])
    rows = np.repeat(np.arange(len(pairs)), 2)
    J = sp.csr_array((np.ones(2 * len(pairs)), (rows, pairs.reshape(-1))), shape=(len(pairs), n))
    J.data[:] = np.random.default_rng(0).normal(size=J.nnz) + 2
    system = LinearizedFit(J, np.ones(len(pairs)), np.arange(n))
    dense = J.toarray()
    step = SparseCholesky().solve(system, np.full(n, 0.1)).step
    np.testing.assert_allclose(
        step,
        -np.linalg.solve(dense.T @ dense + 0.1 * np.eye(n), dense.T @ np.ones(len(J.toarray()))),
        rtol=1e-9,
        atol=1e-11,
    )


def test_long_chains_with_dominant_diagonals_keep_their_fill(loops: str) -> None:
    # Numbers of a factorisation underflow along such a chain; a pattern that is read from them lacks entries.
    n = 5000
    loop = sp.csr_array((np.ones(2), ([0, 0], [0, n - 1])), shape=(1, n))
    J = sp.vstack(
        [
            1e3 * sp.eye_array(n),
            sp.diags_array([np.ones(n - 1), -np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n)),
            loop,
        ]
    ).tocsr()
    system = LinearizedFit(J, np.arange(J.shape[0]) / n, np.arange(n))
    assert SparseCholesky().solve(system, None).residual < 1e-13


def test_entries_that_vanish_keep_their_place() -> None:
    rng = np.random.default_rng(0)
    blocks = stacked(rng, 12, 4)
    data, normal = rng.normal(size=len(blocks.columns)), NormalPattern.of(blocks)
    data[::3] = 0.0
    J = blocks.matrix(data).toarray()
    np.testing.assert_allclose(normal.full(normal.product(data)).toarray(), J.T @ J, atol=1e-13)


def test_a_matrix_that_is_not_positive_is_refused(loops: str) -> None:
    with pytest.raises(SolveError, match=r"changes no residual in 1 direction.*fixed=\{'x': 0\}"):
        gauss_newton(lambda x: x[1:] - x[:-1], params=torch.arange(9.0).double(), jacobian="sparse", gtol=None)


def test_blas_threads_are_restored() -> None:
    before = [library.get_num_threads() for library in _blas_libraries()]
    with contextlib.suppress(KeyboardInterrupt), one_blas_thread():
        assert {library.get_num_threads() for library in _blas_libraries()} == {1}
        raise KeyboardInterrupt
    assert [library.get_num_threads() for library in _blas_libraries()] == before


# ---- fits ----------------------------------------------------------------------------------------------------------

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Mixed(nn.Module):
    """Poses on charts, points, scales: outputs of several widths that depend on some of each."""

    def __init__(self) -> None:
        super().__init__()
        self.poses = nn.Parameter(
            torch.cat([noise(6, 3), torch.nn.functional.normalize(noise(6, 4, seed=1), dim=-1)], -1)
        )
        self.points, self.flat = nn.Parameter(noise(9, 3, seed=2)), nn.Parameter(noise(5, 3, seed=3))
        self.scale = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self) -> dict[str, Tensor]:
        which, point = torch.arange(18) % 6, torch.arange(18) % 9
        seen = SE3.act(self.poses[which], self.points[point])
        odometry = SE2.log(SE2.between(self.flat[:-1], self.flat[1:]))
        return {
            "seen": seen * self.scale[0] - 1,
            "odometry": odometry - 0.1,
            "prior": self.points[:, 0] * self.scale[1],
            "where": self.poses[:, :3],
            "first": self.flat[0] - 0.3,
        }


SEEN = torch.diag_embed(noise(18, 3).abs() + 0.1)
KERNELS = {"seen": "soft_l1", "odometry": None, "prior": "cauchy", "where": None, "first": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fixed": {"fixed": {"poses": 0, "points": torch.tensor([[True, False, False]] * 9), "scale": 1}},
    "weights": {"weight": {"seen": SEEN, "odometry": None, "prior": noise(9).abs(), "where": 0.5, "first": None}},
    "huber": {"kernel": "huber", "f_scale": 0.5},
    "triggs": {"kernel": "cauchy", "corrector": "triggs"},
    "kernels of some": {"kernel": KERNELS},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_jacobians_in_blocks_are_the_dense_ones(name: str) -> None:
    options = {
        "manifolds": {"poses": SE3, "flat": SE2},
        "inplace": False,
        "strategy": "nielsen",
        "on_failure": "return",
        **OPTIONS[name],
    }
    dense, sparse = (
        levenberg_marquardt(Mixed(), jacobian=form, max_steps=1, **options) for form in ("dense", "sparse")
    )
    np.testing.assert_allclose(sparse.jac.toarray(), dense.jac, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(sparse.grad, dense.grad, rtol=1e-9, atol=1e-11)
    for key, value in dense.x.items():
        torch.testing.assert_close(sparse.x[key], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "make", [lambda: sphere_graph(6, 10), lambda: walk_graph(150, 60, side=4), lambda: garage_graph(90, 30)]
)
def test_pose_graphs_end_where_superlu_ends(make: Any, loops: str) -> None:
    graph = make()
    options = {
        "manifolds": {"poses": graph.chart},
        "weight": graph.information,
        "fixed": {"poses": 0},
        "inplace": False,
    }
    own, other = (
        levenberg_marquardt(graph.residual(), jacobian="sparse", strategy="trust_region", solver=solver, **options)
        for solver in ("sparse_cholesky", "splu")
    )
    assert own.success
    assert own.cost == pytest.approx(other.cost, rel=1e-9)
    torch.testing.assert_close(own.x["poses"], other.x["poses"], rtol=1e-6, atol=1e-6)


def test_structure_is_kept_for_the_next_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    old = NormalPattern.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(NormalPattern, "of", classmethod(lambda cls, blocks: made.append(1) or old(cls, blocks)))
    graph = walk_graph(120, 40, side=3)
    model = graph.residual()
    options = {"manifolds": {"poses": SE2}, "weight": graph.information, "jacobian": "sparse", "inplace": False}
    costs = [levenberg_marquardt(model, fixed={"poses": held}, **options).cost for held in (0, 0, 1, 0)]
    assert costs == pytest.approx([costs[0]] * 4, rel=1e-8)
    assert len(made) == 3  # one for each layout that is met anew


def test_a_free_frame_costs_a_vain_factorisation_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, run = [], FrontalAnalysis.factorised
    monkeypatch.setattr(FrontalAnalysis, "factorised", lambda self, entries: made.append(1) or run(self, entries))
    graph = grid_graph(4, 5)
    model, counts = graph.residual(), []
    for _ in range(3):
        made.clear()
        options = {"manifolds": {"poses": SE2}, "jacobian": "sparse", "inplace": False, "strategy": "trust_region"}
        counts.append((levenberg_marquardt(model, weight=graph.information, **options).cost, len(made)))
    (first, most), *others = counts
    assert all(cost == pytest.approx(first, rel=1e-8) and many < most for cost, many in others)


def test_a_start_is_recorded_once_for_a_plan_that_is_kept() -> None:
    graph = grid_graph(4, 5)
    runs = []

    class Counted(PoseGraphResidual):
        def forward(self) -> Any:
            runs.append(1)
            return super().forward()

    model, counts = Counted(graph), []
    for _ in range(3):
        runs.clear()
        options = {"manifolds": {"poses": SE2}, "weight": graph.information, "fixed": {"poses": 0}, "max_steps": 1}
        levenberg_marquardt(model, jacobian="sparse", inplace=False, on_failure="return", **options)
        counts.append(len(runs))
    assert counts == [4, 2, 2]  # outputs, rows, lifted, and a trial; then the start and a trial


def test_bundles_end_where_dense_ones_end(loops: str) -> None:
    bundle = synthetic_bundle(4, 30)
    options = {"inplace": False, "fixed": {"cameras": torch.tensor([[True] * 9] + [[False] * 9] * 3)}}
    dense, sparse = (levenberg_marquardt(bundle.residual(), jacobian=form, **options) for form in ("dense", "sparse"))
    assert sparse.cost == pytest.approx(dense.cost, rel=1e-8)


class Sorted(nn.Module):
    """Distances of neighbours after sorting: who is next to whom changes with every step."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.p, self.computed = nn.Parameter(noise(300)), computed

    def forward(self) -> tuple[Tensor, Tensor]:
        p = self.p * 1 if self.computed else self.p
        ahead = p[self.p.detach().argsort()]
        return ahead[1:] - ahead[:-1] - 0.05, (p - noise(300, seed=1)) * 0.3


@pytest.mark.parametrize("computed", [False, True])
def test_indices_that_move_with_the_point_are_probed_at_every_step(computed: bool) -> None:
    options: dict[str, Any] = {"inplace": False, "on_failure": "return", "max_steps": 8}
    dense = levenberg_marquardt(Sorted(computed), jacobian="dense", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)  # that the pattern was detected again
        sparse = levenberg_marquardt(Sorted(computed), jacobian="sparse", **options)
    assert [step.objective for step in sparse.log] == pytest.approx([step.objective for step in dense.log], rel=1e-9)
    assert len(dense.log) > 3
