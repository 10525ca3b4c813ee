"""Charts that are no groups, products, similarities, charts of one's own, and the laws that they are held against."""

from math import pi

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jacops.charts import S2, SE2, SE3, SO2, SO3, Chart, GroupChart, Product, R, Sim3, check_laws
from jacops.errors import InputError, InputTypeError, JacopsError, NotDifferentiableError


class Positive(Chart):
    """Positive numbers, moved by factors."""

    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        return x * d.exp()

    def local(self, x: Tensor, y: Tensor) -> Tensor:
        return (y / x).log()


class Circle(Chart):
    """Unit vectors of the plane, with a derivative of its own."""

    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        turned = torch.cat([-x[..., 1:], x[..., :1]], -1)
        return d.cos() * x + d.sin() * turned

    def local(self, x: Tensor, y: Tensor) -> Tensor:
        across = x[..., :1] * y[..., 1:] - x[..., 1:] * y[..., :1]
        return torch.atan2(across, (x * y).sum(-1, keepdim=True))

    def normalize(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def storage_jacobian(self, x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1], x[..., 0]], -1).unsqueeze(-1)


POSITIVE, CIRCLE = Positive("positive", 1, 1), Circle("circle", 2, 1)
ALL = [SO2, SE2, SO3, SE3, Sim3, R(3), S2, Product(SE3, R(1)), Product(S2, SO2, S2), POSITIVE, CIRCLE]
ALL += [Product(POSITIVE, CIRCLE, Sim3)]
EACH = pytest.mark.parametrize("chart", ALL, ids=repr)


def elements(chart: Chart, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random elements of any chart."""
    if parts := getattr(chart, "parts", None):
        return torch.cat([elements(part, *shape, dtype=dtype) for part in parts], -1)
    numbers = torch.randn(*shape, chart.storage, dtype=dtype)
    if chart is POSITIVE:
        return numbers.exp()
    if chart is Sim3:
        numbers[..., 7:] = numbers[..., 7:].exp()
    return chart.normalize(numbers)


# ---- laws over all charts --------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_chart_keeps_the_laws(chart: Chart, dtype: torch.dtype) -> None:
    x = elements(chart, 2, 3, dtype=dtype)
    chart.check(x)
    check_laws(chart, x)
    check_laws(chart, x[:0])


@EACH
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-12, 1.5))
def test_steps_lead_there_and_back(chart: Chart, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    x, d = elements(chart, 3), size * torch.nn.functional.normalize(torch.randn(3, chart.tangent).double(), dim=-1)
    y = chart.retract(x, d)
    torch.testing.assert_close(chart.local(x, y), d, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(chart.retract(x, chart.local(x, y)), y, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(chart.normalize(y), y, rtol=0, atol=1e-14)


@EACH
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0])
def test_gradients_agree_with_differences(chart: Chart, size: float) -> None:
    x, d = elements(chart, 1), size * torch.randn(1, chart.tangent).double()
    y = chart.retract(x, d)
    assert torch.autograd.gradcheck(chart.retract, (x.requires_grad_(), d.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda v: chart.retract(x.detach(), v), d)
    assert torch.autograd.gradcheck(chart.local, (x.detach(), y.detach().requires_grad_()))


@EACH
def test_storage_jacobian_is_the_derivative_that_autograd_finds(chart: Chart) -> None:
    x = elements(chart, 2, 3).requires_grad_()
    found = chart.storage_jacobian(x)
    torch.testing.assert_close(found, Chart.storage_jacobian(chart, x), rtol=0, atol=1e-14)
    assert chart.magnitudes(x).shape == (2, 3, chart.tangent)
    assert not Chart.storage_jacobian(chart, x.detach()).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(Chart.storage_jacobian(chart, x), found, rtol=0, atol=1e-14)


# ---- similarities ----------------------------------------------------------------------------------------------


LIMITS = [0.0, 1e-300, 1e-12, 1e-8, 1e-4, 0.03, 0.7, 0.999, 1.001, 2.5, pi - 1e-9]


@pytest.mark.parametrize("angle", LIMITS)
def test_similarities_in_all_limits(angle: float) -> None:
    for sigma in [*LIMITS, *(-s for s in LIMITS[1:]), 4.0, -4.0]:
        d = similar(angle, sigma)
        x, y, z = d[3:6].tolist()
        G = np.zeros((4, 4))
        G[:3] = np.c_[np.array([[sigma, -z, y], [z, sigma, -x], [-y, x, sigma]]), d[:3].numpy()]
        right = scipy.linalg.expm(G)
        np.testing.assert_allclose(Sim3.matrix(Sim3.exp(d)).numpy(), right, rtol=0, atol=1e-12 * abs(right).max())
        torch.testing.assert_close(Sim3.log(Sim3.exp(d)), d, rtol=1e-13, atol=4e-15)


@pytest.mark.parametrize(("angle", "sigma"), [(0.0, 0.0), (0.0, 1e-8), (1e-8, 0.0), (0.0, 2.0), (0.7, 0.7), (1e-8, -2)])
def test_derivatives_of_similarities_have_no_holes(angle: float, sigma: float) -> None:
    d = similar(angle, sigma)
    J = torch.autograd.functional.jacobian(lambda v: Sim3.log(Sim3.exp(v)), d)
    torch.testing.assert_close(J, torch.eye(7, dtype=J.dtype), rtol=0, atol=1e-12)
    H = torch.autograd.functional.hessian(lambda v: Sim3.log(Sim3.exp(v)).sum(), d)
    assert float(H.abs().max()) < 1e-10


def similar(angle: float, sigma: float) -> Tensor:
    """A tangent vector of given angle and logarithm of the scale."""
    d = torch.randn(7, dtype=torch.float64)
    d[3:6] *= angle / d[3:6].norm()
    d[6] = sigma
    return d


def test_scales_that_are_not_positive_are_refused() -> None:
    x = Sim3.identity(3)
    Sim3.check(x)
    for wrong in (0.0, -1.0, torch.nan, torch.inf):
        x[1, 7] = wrong
        with pytest.raises(InputError, match=r"holding a scale of .* \(element 1\)"):
            Sim3.check(x)


# ---- directions ------------------------------------------------------------------------------------------------


def test_steps_on_the_sphere_are_angles() -> None:
    x, d = elements(S2, 100), torch.randn(100, 2).double()
    angles = torch.acos((x * S2.retract(x, d)).sum(-1).clamp(-1, 1))
    torch.testing.assert_close(angles, torch.acos(d.norm(dim=-1).cos()), rtol=0, atol=1e-7)
    B = S2.storage_jacobian(x)
    torch.testing.assert_close(B.mT @ B, torch.eye(2).double().expand(100, 2, 2), rtol=0, atol=1e-15)
    torch.testing.assert_close((B * x.unsqueeze(-1)).sum(1), torch.zeros(100, 2).double(), rtol=0, atol=1e-15)


def test_poles_and_opposite_points() -> None:
    x = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    check_laws(S2, x)
    step = S2.local(x, -x)
    torch.testing.assert_close(step.norm(dim=-1), torch.full((6,), pi).double())
    torch.testing.assert_close(S2.retract(x, step), -x, rtol=0, atol=1e-15)
    y = (-x + 0).requires_grad_()
    S2.local(x, y).sum().backward()
    assert y.grad is not None
    assert bool(y.grad.isfinite().all())
    with pytest.raises(InputError, match=r"holding a vector of length 2 \(element 1\)"):
        S2.check(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))


# ---- products --------------------------------------------------------------------------------------------------


def test_products_move_their_parts() -> None:
    whole = Product(SE3, S2, R(2))
    x, d = elements(whole, 4), torch.randn(4, 10).double()
    parts = [(SE3, slice(0, 7), slice(0, 6)), (S2, slice(7, 10), slice(6, 8)), (R(2), slice(10, 12), slice(8, 10))]
    moved = whole.retract(x, d)
    for part, stored, free in parts:
        assert torch.equal(moved[:, stored], part.retract(x[:, stored], d[:, free]))
        assert torch.equal(whole.magnitudes(x)[:, free], part.magnitudes(x[:, stored]))
    assert not isinstance(whole, GroupChart)
    assert isinstance(Product(SE3, R(2)), GroupChart)
    assert Product(SE3, R(2)) == Product(SE3, R(2))
    with pytest.raises(InputError, match="SE3 needs length one"):
        whole.check(2 * x)


def test_products_and_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="`charts` is empty"):
        Product()
    with pytest.raises(InputTypeError, match="`charts` is 3"):
        Product(SE3, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`n` is 0"):
        R(0)
    with pytest.raises(InputError, match="`tangent` is 0"):
        Positive("positive", 1, 0)
    with pytest.raises(InputError, match="`d` is of shape"):
        Product(S2, R(1)).retract(elements(Product(S2, R(1)), 2), torch.zeros(2, 4).double())


# ---- broken charts ---------------------------------------------------------------------------------------------


class NotZero(Positive):
    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        return x * d.exp() + 1e-3


class NotBack(Positive):
    def local(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * (y / x).log()


class Mixed(Positive):
    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        return x * (d + 0.5 * (d - d.mean())).exp()

    def local(self, x: Tensor, y: Tensor) -> Tensor:
        d = (y / x).log()
        return (d + 0.5 * d.mean()) / 1.5


class NoDerivative(Positive):
    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        return x * (d.norm(dim=-1, keepdim=True) * d / d.norm(dim=-1, keepdim=True)).nan_to_num().exp()


class WrongDerivative(Positive):
    def storage_jacobian(self, x: Tensor) -> Tensor:
        return 1.01 * x.unsqueeze(-1)


class Writing(Positive):
    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        moved = x.clone() * d.exp()
        x += 1e-12
        return moved


class Narrow(Positive):
    def local(self, x: Tensor, y: Tensor) -> Tensor:
        return (y / x).log()[..., 0]


class Detached(Positive):
    def retract(self, x: Tensor, d: Tensor) -> Tensor:
        return x * d.detach().exp()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NotZero, r"`retract\(x, 0\)` off `x` by 0.001"),
        (NotBack, r"`local\(x, retract\(x, d\)\)` for \|d\| <= 0.1 off `d` by 0.1"),
        (Mixed, "`retract` of elements alone off `retract` of them together"),
        (NoDerivative, "derivative at d = 0 that is not finite"),
        (WrongDerivative, "column 0 of `storage_jacobian` that is off central differences by"),
        (Writing, "writing into `x`"),
        (Narrow, r"`local` of shape \(3,\), but shape \(3, 1\) is needed"),
        (Detached, "`retract` does not depend on `d`"),
    ],
)
def test_a_broken_law_is_named(kind: type[Positive], words: str) -> None:
    broken = kind("broken", 1, 1)
    x = elements(POSITIVE, 3)
    with pytest.raises(JacopsError, match=words) as raised:
        check_laws(broken, x.clone())
    assert isinstance(raised.value, NotDifferentiableError if kind is Detached else InputError)
    assert "broken" in str(raised.value)


def test_what_is_no_chart_is_refused() -> None:
    with pytest.raises(InputTypeError, match="`chart` is a str"):
        check_laws("SE3", torch.zeros(1, 7))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="`x` is of dtype"):
        check_laws(R(1), torch.zeros(1, 1, dtype=torch.int64))
