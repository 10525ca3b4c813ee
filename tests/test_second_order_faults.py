"""Second and higher input derivatives where sweeps shared by all outputs go wrong: right values, or an error."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import jacops
from jacops.errors import JacopsWarning, NotDifferentiableError
from small import draw

Function = Callable[[Tensor], Tensor]


def plain_hessians(f: Function, x: Tensor) -> Tensor:
    """`(n, out, in, in)` by plain nested autograd: one sample, one output and one slope alone."""

    def one(row: Tensor, k: int) -> Tensor:
        return torch.autograd.functional.hessian(lambda z: f(z[None]).reshape(-1)[k], row)

    outputs = f(x[:1]).numel()
    return torch.stack([torch.stack([one(row, k) for k in range(outputs)]) for row in x])


def along(hessians: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("nkij,ni,nj->nk", hessians, v, v)


def third_by_differences(f: Function, x: Tensor, v: Tensor, step: float = 1e-4) -> Tensor:
    """Central differences of plain second derivatives along v."""
    ahead, behind = (along(plain_hessians(f, x + sign * step * v), v) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    actual = actual.reshape(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def quiet(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        return call(*args, **options)


W = draw(3, 3, seed=5)

# The backward of logcumsumexp takes the logarithm of its cotangent: it is not linear where others are zero.
LOGARITHMIC: dict[str, Function] = {
    "plain": lambda x: x.logcumsumexp(-1).sin(),
    "flipped": lambda x: x.flip(-1).logcumsumexp(-1).tanh(),
    "padded": lambda x: functional.pad(x, (1, 1)).logcumsumexp(-1)[:, 1:3].cos(),
    "sliced": lambda x: x.logcumsumexp(-1)[:, ::2].sin(),
    "after a rectifier": lambda x: (x @ W).relu().logcumsumexp(-1).sin(),
    "before a rectifier": lambda x: x.logcumsumexp(-1).relu().square(),
    "twice": lambda x: (x.logcumsumexp(-1).sin() @ W).logcumsumexp(-1).sin(),
    "one output": lambda x: x.logcumsumexp(-1).sin().sum(-1),
    "several axes": lambda x: torch.stack([x, x.sin()], 1).logcumsumexp(1).sin(),
    "mixing samples": lambda x: (x * x.mean(0).detach()).logcumsumexp(-1).sin(),
}


@pytest.mark.parametrize("f", LOGARITHMIC.values(), ids=LOGARITHMIC)
def test_a_backward_that_is_not_linear_in_its_cotangent_gives_the_derivatives_of_every_output_alone(
    f: Function,
) -> None:
    x, v = draw(3, 3), draw(3, 3, seed=1)
    expected = plain_hessians(f, x)
    close(quiet(jacops.input_hessian, f, x), expected)
    close(quiet(jacops.laplacian, f, x), expected.diagonal(dim1=-1, dim2=-2).sum(-1))
    close(quiet(jacops.directional_derivative, f, x, v, 2), along(expected, v))


@pytest.mark.parametrize("checks", ["first", "always", "strict"])
def test_the_second_call_is_as_right_as_the_first(checks: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double().requires_grad_(False)
    gate = torch.zeros((), dtype=torch.float64)
    f = lambda x: net(x) + gate * net(x).logcumsumexp(-1).sin()  # noqa: E731
    x = draw(4, 3)
    for value in (0.0, 1.0, 1.0):
        gate.fill_(value)
        close(quiet(jacops.input_hessian, f, x, checks=checks), plain_hessians(f, x))


def test_the_result_is_reported_as_fallback_asks() -> None:
    f, x = LOGARITHMIC["plain"], draw(3, 3)
    with pytest.warns(JacopsWarning, match=r"input_hessian.*logcumsumexp.*every output was differentiated alone"):
        jacops.input_hessian(f, x)
    with pytest.raises(NotDifferentiableError, match=r"laplacian.*fallback='error'"):
        jacops.laplacian(f, x, fallback="error")
    close(jacops.input_hessian(f, x, fallback="silent"), plain_hessians(f, x))


def test_many_samples_and_single_precision() -> None:
    f = LOGARITHMIC["plain"]
    x = draw(200, 3)
    with torch.no_grad():
        close(quiet(jacops.input_hessian, f, x, 150)[::40], plain_hessians(f, x[::40]))
    single = quiet(jacops.input_hessian, f, x[:20].float())
    close(single.double(), plain_hessians(f, x[:20]), 1e-4)


def test_several_inputs_and_outputs() -> None:
    def f(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"first": (a * b).logcumsumexp(-1).sin(), "second": (a + b).square().sum(-1)}

    a, b = draw(3, 2), draw(3, 2, seed=1)
    found = quiet(jacops.input_hessian, f, (a, b))["first"]
    joint = plain_hessians(lambda z: f(z[:, :2], z[:, 2:])["first"], torch.cat([a, b], 1))
    for i in range(2):
        for j in range(2):
            close(found[i][j], joint[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])


def test_what_plain_autograd_gets_wrong_too_is_refused_by_the_operation() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    f = lambda x: ((x.logcumsumexp(-1) * mask) @ W).sin()  # noqa: E731
    x = draw(3, 3)
    for g in (f, lambda x: f(x).sum(-1)):
        for call in (jacops.input_hessian, jacops.laplacian, lambda g, x: jacops.directional_derivative(g, x, x, 2)):
            with pytest.raises(NotDifferentiableError, match="central differences.*logcumsumexp"):
                quiet(call, g, x)


def test_a_dropped_infinity_that_changes_nothing_is_no_reason_to_refuse() -> None:
    f = lambda x: torch.where(x > 0, x.clamp(min=0).square().add(1e-300).sqrt(), x.new_zeros(())) * x  # noqa: E731
    x = draw(4, 3)
    close(jacops.input_hessian(f, x), plain_hessians(f, x))


class Squared(torch.autograd.Function):
    """x², with a backward that returns the square of what it should by its cotangent's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad * grad.abs()


class Hooked(nn.Module):
    """A net whose backward passes are changed by a hook."""

    def __init__(self, hook: Function) -> None:
        super().__init__()
        self.first, self.last, self.hook = nn.Linear(3, 4).double(), nn.Linear(4, 3).double(), hook

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(self.hook)
        return self.last(hidden).tanh()


@pytest.mark.parametrize(
    "hook",
    [lambda g: g.clamp(-0.02, 0.02), lambda g: g / (1 + g.abs()), lambda g: g.sign() * g.square()],
    ids=["clipped", "normalized", "squared"],
)
def test_hooks_that_are_not_linear_are_refused_or_change_nothing(hook: Function) -> None:
    torch.manual_seed(0)
    model, x = Hooked(hook), draw(4, 3)
    ahead, behind = (
        torch.stack(
            [torch.autograd.functional.jacobian(lambda z: model(z[None])[0], row) for row in x + sign * 1e-5 * x]
        )
        for sign in (1, -1)
    )
    expected = torch.einsum("nki,ni->nk", ahead - behind, x) / 2e-5
    refused = 0
    for order in (2, None):
        try:
            found = (
                quiet(jacops.directional_derivative, model, x, x, order)
                if order
                else along(quiet(jacops.input_hessian, model, x), x)
            )
        except NotDifferentiableError:
            refused += 1
        else:
            close(found, expected, 1e-6)
    assert refused


def test_hooks_that_are_linear_change_nothing_else() -> None:
    torch.manual_seed(0)
    model, x = Hooked(lambda g: 2 * g), draw(4, 3)
    close(jacops.input_hessian(model, x), plain_hessians(model, x))


def test_a_custom_backward_that_is_not_linear_is_refused() -> None:
    for call in (jacops.input_hessian, lambda m, x: jacops.directional_derivative(m, x, x, 2)):
        with pytest.raises(NotDifferentiableError, match="Squared"):
            quiet(call, lambda x: Squared.apply(x.sin()).cos() @ W, draw(4, 3))


# Norms by statistics of their input: torch's kernels take these for constants in the third derivative.


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, outputs: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8).double(), norm.double(), nn.Linear(8, outputs).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if isinstance(self.norm, nn.InstanceNorm1d | nn.GroupNorm | nn.BatchNorm1d):
            hidden = self.norm(hidden.view(-1, 2, 4)).flatten(1)
        else:
            hidden = self.norm(hidden)
        return self.last(hidden).sin()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(8),
    "layer without weights": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "instance": lambda: nn.InstanceNorm1d(2, affine=True),
    "group": lambda: nn.GroupNorm(1, 2),
    "batch": lambda: nn.BatchNorm1d(2),
    "rms": lambda: nn.RMSNorm(8),
}


@pytest.mark.parametrize("outputs", [2, 12])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_have_right_derivatives_of_second_and_third_order(norm: Callable[[], nn.Module], outputs: int) -> None:
    torch.manual_seed(1)
    model, x, v = Normed(norm(), outputs).eval(), draw(2, 3), draw(2, 3, seed=1)
    expected = plain_hessians(model, x)
    close(jacops.input_hessian(model, x), expected)
    close(jacops.directional_derivative(model, x, v, 2), along(expected, v))
    close(jacops.directional_derivative(model, x, v, 3), third_by_differences(model, x, v), 1e-5)


def test_a_third_derivative_that_torch_gets_wrong_is_refused() -> None:
    f = lambda x: torch.native_layer_norm(x, (3,), None, None, 0.1)[0].sin()  # noqa: E731
    x, v = draw(3, 3), draw(3, 3, seed=1)
    close(quiet(jacops.directional_derivative, f, x, v, 2), along(plain_hessians(f, x), v))
    with pytest.raises(NotDifferentiableError, match="central differences"):
        jacops.directional_derivative(f, x, v, 3)


def test_models_of_many_outputs_share_sweeps_in_directional_derivatives() -> None:
    sizes: list[int] = []
    wide = draw(3, 12, seed=2)

    def f(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return (x @ wide).tanh()

    x, v = draw(20, 3), draw(20, 3, seed=1)
    for order in (2, 3):
        jacops.directional_derivative(f, x, v, order)
        sizes.clear()
        jacops.directional_derivative(f, x, v, order)
        assert min(sizes) == 20


# One operation each: derivatives by shared sweeps against one output alone.

POSITIVE = draw(2, 4).abs() + 0.5
MATRIX = torch.eye(2, dtype=torch.float64) * 2
OPERATIONS: dict[str, Function] = {
    "cumprod": lambda x: x.cumprod(-1),
    "prod with a zero": lambda x: torch.cat([x[:, :3], 0 * x[:, 3:]], 1).prod(-1, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "norm": lambda x: torch.stack([x.norm(p, -1) for p in (1, 2, 3, torch.inf)], -1),
    "normalize": lambda x: functional.normalize(x, dim=-1),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "std and var": lambda x: torch.stack([x.std(-1), x.var(-1)], -1),
    "cummax": lambda x: x.cummax(-1).values,
    "sort": lambda x: x.sort(-1).values.cumsum(-1),
    "topk": lambda x: x.topk(2, -1).values,
    "median": lambda x: x.median(-1, keepdim=True).values * x,
    "quotient": lambda x: x / (1 + x.square().sum(-1, keepdim=True)),
    "powers": lambda x: x**1.5 + x ** x.flip(-1),
    "roots": lambda x: x.sqrt() + x.rsqrt(),
    "logarithms": lambda x: x.log() + x.log1p() + x.log2(),
    "gamma": lambda x: x.lgamma() + x.digamma(),
    "special": lambda x: torch.special.i0e(x) + torch.special.ndtri(x.sigmoid()) + torch.special.xlogy(x, x.flip(-1)),
    "angles": lambda x: torch.atan2(x, x.flip(-1)) + torch.hypot(x, x.flip(-1)) + x.tanh().asin(),
    "remainder": lambda x: torch.remainder(x, 0.7) * x + torch.fmod(x, 0.3) * x,
    "copysign": lambda x: torch.copysign(x, x.flip(-1)) * x,
    "determinant": lambda x: (x.view(-1, 2, 2) + 3 * MATRIX).det()[:, None],
    "log determinant": lambda x: (x.view(-1, 2, 2) + 3 * MATRIX).slogdet()[1][:, None],
    "inverse": lambda x: (x.view(-1, 2, 2) + 3 * MATRIX).inverse().flatten(1),
    "solve": lambda x: torch.linalg.solve(x.view(-1, 2, 2) + 3 * MATRIX, x[:, :2]),
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x.view(-1, 2, 2) + x.view(-1, 2, 2).mT + MATRIX.cumsum(0)),
    "singular values": lambda x: torch.linalg.svdvals(x.view(-1, 2, 2) + MATRIX.cumsum(0)),
    "matrix exponential": lambda x: torch.linalg.matrix_exp(x.view(-1, 2, 2)).flatten(1),
    "trapezoid": lambda x: torch.trapezoid(x.square(), x, dim=-1)[:, None],
    "covariance": lambda x: torch.cov(x[0].view(2, 2)).flatten()[None] if len(x) == 1 else _each(torch.cov, x),
    "interpolation": lambda x: functional.interpolate(x[:, None], 7, mode="linear").flatten(1),
    "circular padding": lambda x: functional.pad(x[:, None], (1, 2), mode="circular").flatten(1),
    "grid_sample": lambda x: functional.grid_sample(
        x.view(-1, 1, 2, 2), x.view(-1, 1, 2, 2).sin() / 2, align_corners=False
    ).flatten(1),
    "convolution": lambda x: functional.conv1d(x[:, None].exp(), POSITIVE[:1, None, :2]).flatten(1),
    "unfold": lambda x: x.unfold(1, 2, 1).prod(-1),
    "masked": lambda x: torch.where(x > 1, x.log(), x.square()).masked_fill(x > 1.4, 0.5),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(1, torch.tensor([[0, 1, 1, 3]]).expand(len(x), 4), x.exp()),
    "cosine similarity": lambda x: functional.cosine_similarity(x[:, :2], x[:, 2:], -1)[:, None],
    "losses": lambda x: torch.stack(
        [functional.huber_loss(x, x.flip(-1), reduction="none"), functional.kl_div(x, x.flip(-1), reduction="none")], -1
    ).sum(1),
}


def _each(operation: Function, x: Tensor) -> Tensor:
    return torch.stack([operation(row.view(2, 2)).flatten() for row in x])


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_derivatives_of_every_output_alone(name: str) -> None:
    f = lambda x: OPERATIONS[name](x).sin()  # noqa: E731
    x, v = POSITIVE, draw(2, 4, seed=1)
    expected = plain_hessians(f, x)
    close(quiet(jacops.input_hessian, f, x), expected, 1e-7)
    close(quiet(jacops.directional_derivative, f, x, v, 2), along(expected, v), 1e-7)
    third = third_by_differences(f, x, v, 1e-5)
    close(quiet(jacops.directional_derivative, f, x, v, 3), third, 1e-4)
