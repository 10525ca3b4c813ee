"""Covariances of chosen parameters from the sparse factor, against the dense inverse in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_graphs import grid_graph, sphere_graph, synthetic_bundle, walk_graph
from torch import Tensor

from jacops.charts import SE2
from jacops.errors import InputError, InputTypeError, SolveError
from jacops.fit import LeastSquaresResult, gauss_newton, levenberg_marquardt
from jacops.fit._freedom import free_directions
from jacops.fit._marginals import SparseInverse, _paths
from jacops.fit._normal import NormalPattern
from test_sparse_cholesky import bundle_blocks, stacked

F64 = torch.float64


# ---- entries of the inverse ------------------------------------------------------------------------------------------


def compared(blocks: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data, normal = rng.normal(size=len(blocks.columns)), NormalPattern.of(blocks)
    entries = normal.product(data)
    entries[normal.diagonal] += 1.0
    expected = np.linalg.inv(normal.full(entries).toarray())
    found, size = SparseInverse(normal.analysis.factorised(entries)), len(expected)
    every = np.arange(size)
    np.testing.assert_allclose(found.entries(every, every), np.diag(expected), rtol=1e-10, atol=1e-12)
    i, j = rng.integers(0, size, (2, 300))
    np.testing.assert_allclose(found.entries(i, j), expected[i, j], atol=1e-11)
    few = rng.integers(0, size, 2)
    np.testing.assert_allclose(found.entries(few, few), np.diag(expected)[few], rtol=1e-10, atol=1e-12)
    some = rng.permutation(size)[:25]
    np.testing.assert_allclose(found.joint(some), expected[np.ix_(some, some)], atol=1e-11)
    assert found.entries(every[:0], every[:0]).shape == (0,)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6))
def test_chosen_entries_are_those_of_the_inverse(seed: int, many: int, most: int) -> None:
    compared(stacked(np.random.default_rng(seed), many, most), seed)


@pytest.mark.parametrize(("cameras", "points", "fixed"), [(4, 120, 0), (12, 150, 20)])
def test_entries_of_batches_of_leaves_are_those_of_the_inverse(
    cameras: int, points: int, fixed: int, loops: str
) -> None:
    compared(bundle_blocks(np.random.default_rng(cameras), cameras, points, fixed), cameras)


@pytest.mark.parametrize("most", [1, 400])
def test_batches_in_chunks_are_those_at_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jacops.fit._compiled", None)
    monkeypatch.setattr("jacops.fit._squares.CHUNK", most)
    compared(bundle_blocks(np.random.default_rng(5), 6, 50, 0), 5)


def test_only_fronts_between_chosen_columns_and_the_root_are_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jacops.fit._compiled", None)
    graph = walk_graph(400, 100)
    fit = fitted(graph, fixed={"poses": 0})
    visited: list[int] = []

    def counted(fronts: Any, some: np.ndarray) -> np.ndarray:
        visited.append(int(_paths(fronts, some).sum()))
        return _paths(fronts, some)

    monkeypatch.setattr("jacops.fit._marginals._paths", counted)
    fit.marginals("poses", [7])
    fit.covariance("poses", [7])
    fit.marginals("poses")
    assert visited[0] == visited[1] < visited[2] / 2


# ---- results ---------------------------------------------------------------------------------------------------------


def fitted(graph: Any, jacobian: str = "sparse", **options: Any) -> LeastSquaresResult[Any]:
    given = {"manifolds": {"poses": graph.chart}, "weight": graph.weights, "jacobian": jacobian, **options}
    return levenberg_marquardt(graph.residual(), progress=False, inplace=False, **given)


def inverse(fit: LeastSquaresResult[Any]) -> np.ndarray:
    """The inverse of the normal matrix by the pseudo-inverse of the Jacobian, which does not square its condition."""
    assert fit.jac is not None
    J = fit.jac if isinstance(fit.jac, np.ndarray) else fit.jac.toarray()
    scale = np.linalg.norm(J, axis=0)
    root = np.linalg.pinv(J / scale, rcond=1e-14) / scale[:, None]
    return root @ root.T


def padded(values: np.ndarray, fixed: list[int], width: int) -> np.ndarray:
    """Covariances with zeros for rows that are fixed."""
    size = len(values) + width * len(fixed)
    moves = np.ones(size, bool)
    for row in fixed:
        moves[row * width : (row + 1) * width] = False
    found = np.zeros((size, size))
    found[np.ix_(moves, moves)] = values
    return found


CASES = {
    "plane, sparse": (lambda: grid_graph(8, 6), "sparse", [0]),
    "plane, dense": (lambda: grid_graph(5, 4), "dense", [0]),
    "plane, two held": (lambda: walk_graph(150, 60), "sparse", [3, 90]),
    "space, sparse": (lambda: sphere_graph(6, 8), "sparse", [0]),
}


@pytest.mark.parametrize("name", CASES)
def test_marginals_are_blocks_of_the_dense_inverse(name: str, loops: str) -> None:
    make, jacobian, fixed = CASES[name]
    graph = make()
    fit, w, n = fitted(graph, jacobian, fixed={"poses": fixed}), graph.chart.tangent, len(graph.poses)
    expected = padded(inverse(fit), fixed, w).reshape(n, w, n, w)
    close: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9 * np.abs(expected).max()}
    diagonal = expected[np.arange(n), :, np.arange(n)]
    np.testing.assert_allclose(fit.marginals("poses", absolute=True), diagonal, **close)
    for rows in ([3, 17], [17, 3, 17], np.arange(n) % 2 == 0, torch.tensor([5]), slice(2, 9)):
        index = np.arange(n)[rows if isinstance(rows, slice) else np.asarray(rows)]
        np.testing.assert_allclose(fit.marginals("poses", rows, absolute=True), diagonal[index], **close)
        whole = expected[index][:, :, index].reshape(len(index) * w, -1)
        np.testing.assert_allclose(fit.covariance("poses", rows, absolute=True), whole, **close)
    a, b = [1, 4, n - 1, 0], [2, n - 1, 4, 5]
    np.testing.assert_allclose(fit.marginals("poses", a, against=b, absolute=True), expected[a, :, b], **close)
    np.testing.assert_array_equal(fit.marginals(None, 4, against={"poses": [4]}), fit.marginals(rows=[4]))
    assert not fit.marginals("poses", fixed).any()
    assert fit.covariance().shape == (n * w - len(fixed) * w,) * 2
    rows, size = fit.jac.shape  # type: ignore[union-attr]
    scaled = diagonal * (2 * fit.cost / (rows - size))
    np.testing.assert_allclose(fit.marginals("poses"), scaled, rtol=1e-7, atol=1e-9 * np.abs(scaled).max())
    assert (np.linalg.eigvalsh(fit.covariance("poses", range(9))) > -1e-12 * np.abs(scaled).max()).all()


def test_cameras_and_points_of_a_bundle(loops: str) -> None:
    bundle = synthetic_bundle(5, 60)
    options: dict[str, Any] = {"jacobian": "sparse", "progress": False, "inplace": False}
    # Two cameras' poses and all intrinsics: without them the frame, its size and what a lens trades for it are free.
    fixed = {"cameras": [0, 1]}
    fit = levenberg_marquardt(bundle.residual(), fixed=fixed, **options)
    expected = padded(inverse(fit), [0, 1], 9)
    scale = np.sqrt(np.maximum(np.diag(expected), 1e-300))
    columns = {"cameras": np.arange(45).reshape(5, 9), "points": 45 + np.arange(180).reshape(60, 3)}
    for name, rows in (("cameras", [2, 4]), ("points", [0, 59])):
        for k, block in zip(rows, fit.marginals(name, rows, absolute=True), strict=True):
            own = columns[name][k]
            np.testing.assert_allclose(
                block / np.outer(scale[own], scale[own]),
                (expected[np.ix_(own, own)]) / np.outer(scale[own], scale[own]),
                atol=1e-5,
            )
    found = fit.marginals("cameras", [2, 3], against={"points": [7, 8]}, absolute=True)
    assert found.shape == (2, 9, 3)
    both = fit.covariance({"cameras": [2], "points": 7}, absolute=True)
    np.testing.assert_allclose(both[:9, 9:], found[0], rtol=1e-6, atol=1e-9 * np.abs(found).max())
    np.testing.assert_allclose(fit.marginals("points")[7], fit.covariance("points", 7), rtol=1e-6)


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_plain_parameters_go_by_the_first_axis(jacobian: str) -> None:
    torch.manual_seed(0)
    A = torch.randn(40, 7, dtype=F64)
    start = {"a": torch.zeros(2, 3, dtype=F64), "b": torch.zeros((), dtype=F64)}
    fixed = {"a": torch.tensor([[False, True, False], [False, False, False]])}

    def model(a: Tensor, b: Tensor) -> Tensor:
        return A @ torch.cat([a.reshape(-1), b[None]])

    fit = gauss_newton(model, target=torch.randn(40).double(), params=start, jacobian=jacobian, fixed=fixed)
    kept = [0, 2, 3, 4, 5, 6]
    expected = np.zeros((7, 7))
    expected[np.ix_(kept, kept)] = np.linalg.inv((A.T @ A).numpy()[np.ix_(kept, kept)])
    rows = fit.marginals("a", absolute=True)
    np.testing.assert_allclose(rows, np.stack([expected[:3, :3], expected[3:6, 3:6]]), atol=1e-12)
    np.testing.assert_allclose(fit.marginals("b", absolute=True), expected[None, 6:, 6:], atol=1e-12)
    np.testing.assert_allclose(
        fit.covariance(["b", "a"], absolute=True), expected[np.ix_(o := [6, *range(6)], o)], atol=1e-12
    )
    np.testing.assert_allclose(
        fit.marginals("a", [1], against={"b": [0]}, absolute=True)[0], expected[3:6, 6:], atol=1e-12
    )


def test_a_loaded_result_keeps_which_columns_belong_to_which_parameter(tmp_path: Path) -> None:
    fit = fitted(grid_graph(5, 4), fixed={"poses": 0})
    fit.save(tmp_path / "fit")
    found = LeastSquaresResult.load(tmp_path / "fit").marginals("poses")  # ordered anew, so that rounding differs
    np.testing.assert_allclose(found, fit.marginals("poses"), rtol=1e-9, atol=1e-15)


# ---- what has no covariance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
@pytest.mark.parametrize(("make", "free"), [(lambda: grid_graph(6, 5), 3), (lambda: sphere_graph(4, 6), 6)])
def test_a_free_frame_is_named_with_what_to_hold(jacobian: str, make: Any, free: int) -> None:
    graph = make()
    fit = fitted(graph, jacobian, on_failure="return")
    words = (
        rf"no full rank.*a joint move of 'poses' changes no residual in {free} directions.*fixed=\{{'poses': (\d+)\}}"
    )
    with pytest.raises(SolveError, match=words) as caught:
        fit.marginals("poses")
    with pytest.raises(SolveError, match=words):
        fit.covariance("poses", [1])
    held = int(str(caught.value).rsplit("'poses': ", 1)[1].split("}")[0])
    assert fitted(graph, jacobian, fixed={"poses": held}).marginals("poses").shape[0] == len(graph.poses)


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_parts_that_nothing_ties_together_are_all_named(jacobian: str) -> None:
    graph = grid_graph(5, 4)
    many = len(graph.poses)

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(
            SE2.log(SE2.compose(SE2.inverse(graph.measured), SE2.between(own[graph.source], own[graph.target])))
            for own in x.split(many)
        )  # type: ignore[return-value]

    start, options = graph.poses.repeat(2, 1), {"manifolds": SE2, "jacobian": jacobian, "progress": False}
    fit = levenberg_marquardt(two, params=start, on_failure="return", **options)  # type: ignore[arg-type]
    words = r"in 6 directions, in 2 parts that share no residual.*fixed=\{'x': \[(\d+), (\d+)\]\}"
    with pytest.raises(SolveError, match=words) as caught:
        fit.marginals("x")
    held = [int(k) for k in str(caught.value).rsplit("[", 1)[1].split("]")[0].split(",")]
    assert held[0] < many <= held[1]
    assert fit.success or fit.status
    found = levenberg_marquardt(two, params=start, fixed={"x": held}, **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.marginals()[held], 0)


def test_a_determined_chain_is_not_taken_for_free() -> None:
    """Its smallest singular value is 1e-4 of its largest: variances grow along it as they do along a random walk."""
    n = 4000
    fit = levenberg_marquardt(
        lambda x: (x[:1], x[1:] - x[:-1] - 1), params=torch.zeros(n, dtype=F64), jacobian="sparse", progress=False
    )
    variances = fit.marginals("x", absolute=True)[:, 0, 0]
    np.testing.assert_allclose(variances, np.arange(1, n + 1), rtol=1e-8)
    assert not free_directions(fit._system, 1e-8)  # type: ignore[arg-type]


WRONG = [
    (lambda fit: fit.marginals("pose"), InputError, "`name`.*'pose'.*'poses'"),
    (lambda fit: fit.marginals(3), InputTypeError, "`name`"),
    (lambda fit: fit.marginals("poses", [20]), InputError, r"`rows`.*20"),
    (lambda fit: fit.marginals("poses", [True]), InputError, "`rows`"),
    (lambda fit: fit.marginals("poses", [0.5]), InputError, "`rows`"),
    (lambda fit: fit.marginals("poses", [[1, 2]]), InputError, "`rows`"),
    (lambda fit: fit.marginals("poses", [1, 2], against=[3]), InputError, "`against`.*1 rows.*2"),
    (lambda fit: fit.marginals("poses", [1], against={"x": [3]}), InputError, "`name`.*'x'"),
    (lambda fit: fit.marginals("poses", against={}), InputError, "`against`"),
    (lambda fit: fit.covariance([0], rows=[1]), InputError, "`rows`"),
    (lambda fit: fit.covariance(["poses"], rows=[1]), InputError, "`rows`"),
    (lambda fit: fit.covariance([57]), InputError, "`columns`"),
    (lambda fit: fit.covariance([0.5]), InputError, "`columns`"),
    (lambda fit: fit.covariance(["poses", 1]), InputTypeError, "`name`"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_selections_are_named(number: int) -> None:
    call, error, words = WRONG[number]
    with pytest.raises(error, match=words):
        call(fitted(grid_graph(5, 4), fixed={"poses": 0}))
