"""Results of fits: how equations were solved, copies, pickles, and Jacobians whose columns are partly fixed."""

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from examples.synthetic_graphs import synthetic_bundle, walk_graph
from torch import Tensor, nn

from jacops.fit import LeastSquaresResult, levenberg_marquardt
from jacops.sparse._taint import zeros_in


def graph_fit(**more: Any) -> LeastSquaresResult[dict[str, Tensor]]:
    graph = walk_graph(60, 15, straight=5, side=4, noise=0.01)
    given = {"manifolds": {"poses": graph.chart}, "weight": graph.information, "fixed": {"poses": 0}}
    return levenberg_marquardt(graph.residual(), **given, progress=False, jacobian="sparse", **more)


def test_points_of_a_bundle_are_said_to_be_eliminated_first(capsys: pytest.CaptureFixture[str]) -> None:
    model = synthetic_bundle(8, 100).residual()
    fit = levenberg_marquardt(model, fixed={"cameras": 0}, jacobian="sparse", progress=False, verbose=1)
    found = re.search(r"([0-9]+) blocks of 3 columns eliminated first \(Schur complement\), then", fit.equations)
    assert found is not None
    assert 60 < int(found[1]) <= 100
    assert f" s, by {fit.equations}" in repr(fit)
    assert fit.equations in capsys.readouterr().out


def test_fronts_of_a_pose_graph_are_counted() -> None:
    assert re.search(r"sparse_cholesky.*: [0-9]+ dense fronts? of up to [0-9]+ rows", graph_fit().equations)
    assert "front" not in graph_fit(solver="splu").equations


def test_a_dense_fit_names_its_solver() -> None:
    fit = levenberg_marquardt(lambda x: x - 1, params=torch.zeros(2).double(), progress=False)
    assert fit.equations == "qr (auto: dense and small)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fit: pickle.loads(pickle.dumps(fit))])
def test_results_of_sparse_fits_are_copied(copied: Any) -> None:
    fit = graph_fit()
    fit.covariance(absolute=True)  # which keeps factors
    again = copied(fit)
    assert torch.equal(again.x["poses"], fit.x["poses"])
    assert repr(again) == repr(fit)
    np.testing.assert_allclose(again.covariance(absolute=True), fit.covariance(absolute=True), rtol=1e-9, atol=1e-12)
    graph = walk_graph(60, 15, straight=5, side=4, noise=0.01)
    model = graph.residual()
    for plan in (fit.plan, again.plan):
        found = plan.evaluate(model, None)
        assert found.error_bound < 1e-9 * abs(found.matrix).max()
    np.testing.assert_array_equal(again.plan.evaluate(model, None).matrix.toarray(), found.matrix.toarray())
    assert again.plan.pattern.nnz == fit.plan.pattern.nnz


class Local(nn.Module):
    """Residuals that each depend on some numbers of a table and on an entry of a vector."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(40, 4, generator=draw, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(50, generator=draw, dtype=torch.float64))
        self.rows = torch.randint(40, (90, 2), generator=draw)
        self.entry = torch.randint(50, (90,), generator=draw)

    def forward(self) -> tuple[Tensor, Tensor]:
        a, b = self.table[self.rows[:, 0]], self.table[self.rows[:, 1]]
        first = torch.stack([a[:, 0] * b[:, 3] - 1, (a[:, 2] - b[:, 1]) * self.vector[self.entry].cos()], 1)
        return first, self.vector[1:] - self.vector[:-1].sin()


@pytest.mark.parametrize("seed", range(4))
def test_sparse_jacobians_with_fixed_entries_equal_dense_ones(seed: int) -> None:
    draw = torch.Generator().manual_seed(100 + seed)
    fixed = {"table": torch.rand(40, 4, generator=draw) < 0.2, "vector": torch.rand(50, generator=draw) < 0.2}
    given: dict[str, Any] = {"fixed": fixed, "max_steps": 1, "on_failure": "return", "progress": False}
    weight = (torch.tensor([[[2.0, 0.3], [0.3, 1.0]]]).double(), 0.5)
    sparse, dense = (levenberg_marquardt(Local(seed), weight=weight, jacobian=j, **given) for j in ("sparse", "dense"))
    np.testing.assert_allclose(sparse.jac.toarray(), dense.jac, rtol=1e-12, atol=1e-12)


def test_zeros_are_found_in_every_kind_of_tensor() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, float("nan"), 5e-324], dtype=torch.float64)
    right = [True, True, False, False, False]
    assert zeros_in(x).tolist() == right
    assert zeros_in(torch.complex(x, x).conj()).tolist() == right
    assert zeros_in(torch.complex(x, x).conj().imag).tolist() == right
    narrow = torch.tensor([0.0, 1.0])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool):
        assert zeros_in(narrow.to(dtype).requires_grad_(dtype.is_floating_point)).tolist() == [True, False]
    assert zeros_in(torch.zeros(2)[None].expand(3, 2)).tolist() == [[True, True]] * 3
