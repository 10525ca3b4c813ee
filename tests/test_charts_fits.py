"""Least squares on every chart: dense and sparse alike, with what the result says of magnitudes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jacops.charts import S2, SE3, Chart, GroupChart, Product, R, Sim3
from jacops.errors import InputError, InputTypeError
from jacops.fit import levenberg_marquardt
from jacops.fit._layout import layout_of
from jacops.fit._problem import FitProblem
from test_charts_manifolds import ALL, CIRCLE, POSITIVE, Narrow, elements

EACH = pytest.mark.parametrize("chart", ALL, ids=repr)


class Seen(nn.Module):
    """Elements seen through smooth functions of their stored numbers, each by two rows of them."""

    def __init__(self, chart: Chart, start: Tensor) -> None:
        super().__init__()
        self.x, self.offset = nn.Parameter(start), nn.Parameter(torch.zeros(2).double())
        torch.manual_seed(7)
        self.register_buffer("index", torch.arange(len(start)).repeat_interleave(2))
        self.register_buffer("A", torch.randn(2 * len(start), chart.storage + 2, chart.storage).double())

    def forward(self) -> Tensor:
        seen = (self.A @ self.x[self.index].unsqueeze(-1)).squeeze(-1)
        return seen + 0.1 * seen.sin() + self.offset.sum()


def problem(model: nn.Module, jacobian: str, **options: object) -> FitProblem:
    given = {"manifolds": None, "fixed": None, "target": None, "weight": None, "sqrt_weight": None, "kernel": None}
    return FitProblem(
        model, None, "test", {**given, "f_scale": 1.0, "corrector": "triggs", "jacobian": jacobian, **options}
    )


@EACH
def test_jacobians_agree_with_differences_along_the_retraction(chart: Chart) -> None:
    matrices = []
    for jacobian in ("dense", "sparse"):
        torch.manual_seed(0)
        found = problem(Seen(chart, elements(chart, 3)), jacobian, manifolds={"x": chart}, fixed={"x": 1})
        values = found.values()
        _, system, _ = found.linearised(values)
        matrices.append(system.J if jacobian == "dense" else system.J.toarray())
    np.testing.assert_allclose(*matrices, rtol=0, atol=1e-12)
    J = matrices[0]
    assert J.shape[1] == 2 * chart.tangent + 2
    for column in range(J.shape[1]):
        step, ends = np.zeros(J.shape[1]), []
        step[column] = 1e-6
        for sign in (1, -1):
            found._set(found.layout.moved(values, sign * step))
            ends.append(found._forward().detach().reshape(-1).numpy())
        np.testing.assert_allclose(J[:, column], (ends[0] - ends[1]) / 2e-6, atol=1e-7)


@EACH
def test_elements_are_found_dense_and_sparse(chart: Chart) -> None:
    torch.manual_seed(1)
    true = elements(chart, 4)
    start = chart.retract(true, 0.1 * torch.randn(4, chart.tangent).double())
    target = Seen(chart, true)().detach()
    fits: list[Any] = []
    for jacobian in ("dense", "sparse"):
        model = Seen(chart, start.clone())
        fit = levenberg_marquardt(
            model, target=target, manifolds={"x": chart}, fixed={"offset": slice(None)}, jacobian=jacobian
        )
        assert fit.success
        fits.append(fit)
        chart.check(fit.x["x"])
        torch.testing.assert_close(
            chart.local(true, fit.x["x"]), torch.zeros(4, chart.tangent).double(), rtol=0, atol=1e-8
        )
    torch.testing.assert_close(fits[0].x["x"], fits[1].x["x"], rtol=0, atol=1e-10)


@EACH
def test_magnitudes_are_those_of_the_chart(chart: Chart) -> None:
    x = elements(chart, 3)
    layout = layout_of({"x": x, "offset": torch.tensor([-2.0])}, {"x": chart}, {"x": 1})
    found = layout.magnitudes({"x": x, "offset": torch.tensor([-2.0])})
    right = chart.magnitudes(x)[[0, 2]].reshape(-1).numpy()
    np.testing.assert_array_equal(found, [*right, 2.0])
    assert (found >= 0).all()


def test_magnitudes_of_similarities_and_products() -> None:
    x = Product(Sim3, R(2), S2, POSITIVE, CIRCLE)
    values = torch.cat([torch.tensor([3.0, 4, 0, 0, 0, 0, 1, 9, -5, 6, 0, 0, 1, 7, 0, 1])]).double()
    x.check(values)
    assert x.magnitudes(values).tolist() == [5, 5, 5, 1, 1, 1, 1, 5, 6, 1, 1, 7, 1]


def test_charts_that_do_not_fit_are_refused_before_anything_is_run() -> None:
    def fit(**options: Any) -> None:
        levenberg_marquardt(lambda x: x, **options)

    with pytest.raises(InputError, match=r"`manifolds` is narrow with `local` of shape \(2,\)"):
        fit(params=torch.ones(2, 1).double(), manifolds=Narrow("narrow", 1, 1))
    with pytest.raises(InputError, match="holding a vector of length"):
        fit(params=torch.ones(2, 3), manifolds=S2)
    with pytest.raises(InputError, match="SE3 needs length one"):
        fit(params=torch.ones(2, 8), manifolds=Product(SE3, R(1)))
    with pytest.raises(InputTypeError, match="a chart such as"):
        fit(params=torch.ones(2, 8), manifolds=GroupChart)
