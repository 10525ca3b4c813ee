"""Charts: held against matrix exponentials and logarithms, finite differences, and the laws of a group."""

import re
from collections.abc import Callable
from math import pi

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jacops.charts import SE2, SE3, SO2, SO3, GroupChart, Product, R, Sim3
from jacops.errors import InputError, InputTypeError

TURNS = {  # where rotations stand in the tangent
    SO2: slice(0, 1),
    SE2: slice(2, 3),
    SO3: slice(0, 3),
    SE3: slice(3, 6),
    Sim3: slice(3, 6),
    R(2): slice(0, 0),
    Product(SE3, R(1)): slice(3, 6),
    Product(R(2), Product(SO2, Sim3)): slice(2, 3),
}
EACH = pytest.mark.parametrize("chart", TURNS, ids=repr)
ANGLES = [0.0, 1e-300, 1e-12, 1e-8, 1e-5, 1e-3, 0.03, 0.0633, 0.5, 0.999, 1.001, 2.0, 3.0, pi - 1e-3, pi - 1e-9, pi]


def drawn(chart: GroupChart, *shape: int, scale: float = 0.8) -> Tensor:
    return scale * torch.randn(*shape, chart.tangent, dtype=torch.float64)


def with_angle(chart: GroupChart, angle: float) -> Tensor:
    """Tangent vectors (5, tangent) that turn by `angle`."""
    d = drawn(chart, 5)
    turn = d[:, TURNS[chart]]
    turn *= angle / turn.norm(dim=-1, keepdim=True)
    return d


def generator(chart: GroupChart, d: Tensor) -> np.ndarray:
    """The matrix in the Lie algebra, by hand."""
    if repr(chart).startswith("Product"):
        cuts = np.cumsum([0, *(part.tangent for part in chart.parts)])  # type: ignore[attr-defined]
        pieces = zip(chart.parts, cuts[:-1], cuts[1:], strict=True)  # type: ignore[attr-defined]
        return scipy.linalg.block_diag(*(generator(part, d[a:b]) for part, a, b in pieces))
    v, space = d.numpy(), chart.space
    turn = v[TURNS.get(chart, slice(0, 0))]
    A = np.zeros((space, space))
    if len(turn) == 1:
        A = np.array([[0, -turn[0]], [turn[0], 0]])
    elif len(turn) == 3:
        x, y, z = turn
        A = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    if chart is Sim3:
        A = A + v[6] * np.eye(3)
    if len(v) == len(turn):
        return A
    G = np.zeros((space + 1, space + 1))
    G[:-1, :-1], G[:-1, -1] = A, v[:space]
    return G


@EACH
@pytest.mark.parametrize("angle", ANGLES)
def test_exp_is_the_matrix_exponential(chart: GroupChart, angle: float) -> None:
    for d in with_angle(chart, angle):
        right = scipy.linalg.expm(generator(chart, d))
        # scipy's own exponential is off by as much where a scale makes the norm large
        near = 1e-12 * abs(right).max() if "Sim3" in repr(chart) else 4e-15
        np.testing.assert_allclose(chart.matrix(chart.exp(d)).numpy(), right, rtol=0, atol=near)


@EACH
@pytest.mark.parametrize("angle", ANGLES)
def test_log_is_the_inverse_of_exp(chart: GroupChart, angle: float) -> None:
    d = with_angle(chart, angle)
    back = chart.log(chart.exp(d))
    if angle == pi:  # both signs are right
        torch.testing.assert_close(chart.matrix(chart.exp(back)), chart.matrix(chart.exp(d)), rtol=0, atol=1e-14)
    else:
        torch.testing.assert_close(back, d, rtol=1e-13, atol=2e-15)


@EACH
@pytest.mark.parametrize("angle", ANGLES)
def test_first_and_second_derivatives_have_no_holes(chart: GroupChart, angle: float) -> None:
    d = with_angle(chart, angle)[:2]
    if angle == pi:
        d = d * (1 - 1e-7)  # away from the cut of the logarithm
    # log(exp(d)) = d: the first derivative is one and the second is zero, near the cut as well
    for row in d[: 1 if chart.tangent > 6 else 2]:
        J = torch.autograd.functional.jacobian(lambda v: chart.log(chart.exp(v)), row)
        torch.testing.assert_close(J, torch.eye(chart.tangent, dtype=J.dtype), rtol=0, atol=1e-12)
        H = torch.autograd.functional.hessian(lambda v: chart.log(chart.exp(v)).sum(), row)
        assert float(H.abs().max()) < 1e-10


@EACH
def test_derivatives_agree_with_differences(chart: GroupChart) -> None:
    for angle in (0.0, 1e-4, 0.03, 1.0, 3.0):
        d = with_angle(chart, angle)[0]
        assert torch.autograd.gradcheck(chart.exp, d.clone().requires_grad_())
        assert torch.autograd.gradgradcheck(chart.exp, d.clone().requires_grad_())
        x = chart.exp(d)
        assert torch.autograd.gradcheck(
            lambda v, x=x: chart.local(x, chart.retract(x, v)), drawn(chart).requires_grad_()
        )


@EACH
def test_storage_jacobian_is_the_derivative_of_the_retraction(chart: GroupChart) -> None:
    x = chart.exp(drawn(chart, 4, scale=2.0))
    for element, J in zip(x, chart.storage_jacobian(x), strict=True):
        zero = torch.zeros(chart.tangent, dtype=torch.float64)
        right = torch.autograd.functional.jacobian(lambda d, e=element: chart.retract(e, d), zero)
        torch.testing.assert_close(J, right, rtol=0, atol=1e-14)
    assert chart.storage_jacobian(x.reshape(2, 2, -1)).shape == (2, 2, chart.storage, chart.tangent)


@EACH
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-9, 2.0))
def test_the_laws_of_a_group(chart: GroupChart, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    a, b, c = (chart.exp(drawn(chart, 3, scale=scale)) for _ in range(3))
    M, close = chart.matrix, lambda p, q: torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    close(M(chart.compose(a, b)), M(a) @ M(b))
    close(M(chart.compose(chart.compose(a, b), c)), M(chart.compose(a, chart.compose(b, c))))
    close(M(chart.inverse(a)) @ M(a), torch.eye(M(a).shape[-1], dtype=torch.float64).expand_as(M(a)))
    close(M(chart.compose(a, chart.between(a, b))), M(b))
    close(M(chart.retract(a, chart.local(a, b))), M(b))
    close(M(chart.compose(chart.identity(3, dtype=torch.float64), a)), M(a))
    p = torch.randn(3, chart.space, dtype=torch.float64)
    close(chart.act(chart.compose(a, b), p), chart.act(a, chart.act(b, p)))
    error = chart.edge_error(c, a, b)
    close(M(chart.exp(error)), M(c) @ M(chart.inverse(a)) @ M(b))


@EACH
def test_errors_of_edges_have_the_derivatives_of_what_they_are_made_of(chart: GroupChart) -> None:
    torch.manual_seed(3)
    e, a, b = (chart.exp(0.7 * drawn(chart, 1)) for _ in range(3))
    steps = torch.zeros(2, 1, chart.tangent, dtype=torch.float64)

    def slope(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        moved = lambda d: function(e, chart.retract(a, d[0]), chart.retract(b, d[1]))  # noqa: E731
        return torch.autograd.functional.jacobian(moved, steps)

    right = slope(lambda e, a, b: chart.log(chart.compose(e, chart.between(a, b))))
    torch.testing.assert_close(slope(chart.edge_error), right, rtol=1e-12, atol=1e-12)


@EACH
def test_single_precision_is_as_good_as_it_can_be(chart: GroupChart) -> None:
    for angle in ANGLES[:-3]:
        d = with_angle(chart, max(angle, 1e-30)).float()
        torch.testing.assert_close(chart.log(chart.exp(d)), d, rtol=3e-5, atol=1e-6)


def test_storage_and_steps_are_those_of_pypose() -> None:
    pp = pytest.importorskip("pypose")
    for chart, name in ((SO3, "so3"), (SE3, "se3"), (Sim3, "sim3")):
        d, step = drawn(chart, 4), drawn(chart, 4)
        theirs = pp.LieTensor(d, ltype=getattr(pp, f"{name}_type")).Exp()
        moved = pp.LieTensor(step, ltype=getattr(pp, f"{name}_type")).Exp() @ theirs
        torch.testing.assert_close(chart.exp(d), theirs.tensor(), rtol=0, atol=1e-6)
        torch.testing.assert_close(chart.matrix(chart.retract(chart.exp(d), step)), moved.matrix(), rtol=0, atol=1e-6)


@EACH
def test_what_does_not_fit_is_refused_by_name(chart: GroupChart) -> None:
    x = chart.identity(3)
    with pytest.raises(InputError, match=r"`d` is of shape .*Nothing is broadcast"):
        chart.retract(x, torch.zeros(chart.tangent))
    with pytest.raises(
        InputError, match=rf"`x` is of shape .* {re.escape(chart.name)} needs a last axis of {chart.storage}"
    ):
        chart.log(torch.zeros(3, chart.storage + 1))
    with pytest.raises(InputError, match="`b` is of shape"):
        chart.compose(x, x[:1])
    with pytest.raises(InputTypeError, match="`x` is a list"):
        chart.inverse([1.0])  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="`x` is of dtype torch.int64"):
        chart.inverse(torch.zeros(3, chart.storage, dtype=torch.int64))


def test_quaternions_of_another_length_are_refused_and_can_be_corrected() -> None:
    x = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 2]])
    with pytest.raises(InputError, match=r"length 2 \(element 1\).*SO3.normalize"):
        SO3.check(x, "poses")
    SO3.check(SO3.normalize(x))
    SE3.check(SE3.normalize(torch.cat([torch.ones(2, 3), x], -1)))
    with pytest.raises(InputError, match="quaternion"):
        SE3.check(torch.full((1, 7), torch.nan))


@EACH
def test_empty_batches_are_fine(chart: GroupChart) -> None:
    x = chart.identity(0)
    assert chart.retract(x, torch.zeros(0, chart.tangent)).shape == (0, chart.storage)
    assert chart.log(x).shape == (0, chart.tangent)
    assert chart.storage_jacobian(x).shape == (0, chart.storage, chart.tangent)
