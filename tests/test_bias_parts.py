"""Contributions: `f(x) = J x + b` for every piecewise-linear operation, and no other one passed over in silence.

The oracle is plain: `b = f(x) - J x` with `J` by `torch.autograd.grad`, one number of the output at a time, in float64.
The library computes `b` from the operations of the forward alone, so agreement means something on both sides.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops import JacopsWarning, compute_jacobian, contributions
from jacops.errors import InputError, InputTypeError
from jacops.results import Contributions
from small import draw, settled

C = torch.linspace(-1, 1, 6, dtype=torch.float64)
ROWS = torch.tensor([0, 2])


class Between(nn.Module):
    """An operation between two affine layers, on six hidden units."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.operation, self.last = nn.Linear(5, 6), operation, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


def between(operation: Callable[[Tensor], Tensor]) -> nn.Module:
    return settled(Between(operation)).eval()


def statement(write: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """What a function does that writes into its argument and whose result is dropped."""

    def operation(h: Tensor) -> Tensor:
        h = h.clone()
        write(h)
        return h

    return operation


def without_grad(write: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def operation(h: Tensor) -> Tensor:
        h = h.clone()
        with torch.no_grad():
            write(h)
        return h

    return operation


def assigned(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 1] = 0.3
    h[:, 2:4] = C[:2]
    h[:, 4] += h[:, 0]
    return h


def into_constant(h: Tensor) -> Tensor:
    whole = torch.ones(len(h), 6, dtype=h.dtype)
    corner = whole[:, :3]
    corner.copy_(h[:, 3:])
    whole[:, 5] = h[:, 0]
    return whole + corner.repeat(1, 2)


def normalised(h: Tensor) -> Tensor:
    """LayerNorm with a scale that is detached: affine for every derivative."""
    centred = h - h.mean(1, keepdim=True)
    return centred / (centred.var(1, keepdim=True) + 1e-5).sqrt().detach() * C + 1


def rows(h: Tensor, width: int = 6) -> Tensor:
    return C[:width].repeat(len(h), 1)


def index_of(h: Tensor, *columns: int) -> Tensor:
    return torch.tensor(columns).repeat(len(h), 1)


def unpooled(h: Tensor) -> Tensor:
    pooled, where = F.max_pool1d(h[:, None], 2, return_indices=True)
    return F.max_unpool1d(pooled, where, 2)[:, 0]


PIECEWISE_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": F.relu,
    "relu6": lambda h: F.relu6(7 * h),
    "leaky_relu": lambda h: F.leaky_relu(h, 0.2),
    "prelu": nn.PReLU(6),
    "rrelu in eval": nn.RReLU(),
    "abs": torch.abs,
    "clamp": lambda h: h.clamp(-0.2, 0.3),
    "clamp_min": lambda h: h.clamp_min(-0.1),
    "clamp_max": lambda h: h.clamp_max(0.2),
    "clip by tensors": lambda h: torch.clip(h, -C.abs(), C.abs()),
    "hardtanh": lambda h: F.hardtanh(h, -0.3, 0.4),
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": lambda h: F.hardshrink(h, 0.2),
    "softshrink": lambda h: F.softshrink(h, 0.2),
    "threshold": lambda h: F.threshold(h, 0.1, 0.7),
    "torch.max(x, c)": lambda h: torch.max(h, C),
    "torch.min(x, c)": lambda h: torch.min(h, C),
    "maximum": lambda h: torch.maximum(h, C),
    "fmin": lambda h: torch.fmin(h, C),
    "maxout": lambda h: torch.maximum(h, h.flip(1) + 0.1),
    "max along an axis": lambda h: h + h.max(1, keepdim=True).values,
    "amax": lambda h: h - h.amax(1, keepdim=True) + 1,
    "aminmax": lambda h: h - h.aminmax(dim=1, keepdim=True).min,
    "median": lambda h: h - h.median(1, keepdim=True).values + 0.1,
    "kthvalue": lambda h: h + h.kthvalue(2, 1, keepdim=True).values,
    "quantile": lambda h: h - h.quantile(0.3, dim=1, keepdim=True),
    "cummax": lambda h: h.cummax(1).values,
    "cumsum": lambda h: h.cumsum(1),
    "sort": lambda h: h.sort(1).values,
    "topk": lambda h: h.topk(6, 1).values * C,
    "max_pool1d": lambda h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "max_unpool1d": unpooled,
    "avg_pool1d": lambda h: F.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h[:, None], 3).repeat(1, 1, 2)[:, 0],
    "interpolate": lambda h: F.interpolate(h[:, None], size=6, mode="linear")[:, 0] + 1,
    "1-norm": lambda h: h + h.norm(p=1, dim=1, keepdim=True),
    "infinity norm": lambda h: h + torch.linalg.vector_norm(h, ord=torch.inf, dim=1, keepdim=True),
    "cdist, p=1": lambda h: h + torch.cdist(h[:, :, None], h[:, :1, None] * 0 + 0.2, p=1)[:, :, 0],
    "l1_loss": lambda h: F.l1_loss(h, rows(h), reduction="none"),
    "where": lambda h: torch.where(h > 0, h, C),
    "gate": lambda h: h * (h > 0.1) + 0.2,
    "masked_fill": lambda h: h.masked_fill(h > 0.2, 0.3),
    "masked_fill by -inf": lambda h: h + h.masked_fill(C > 0, -torch.inf).max(1, keepdim=True).values,
    "masked_scatter": lambda h: h.masked_scatter(h > 0, torch.full_like(h, 0.3)),
    "index_fill": lambda h: h.index_fill(1, ROWS, 0.5),
    "index_add": lambda h: h.index_add(1, ROWS, rows(h, 2), alpha=2),
    "index_copy": lambda h: h.index_copy(1, ROWS, rows(h, 2)),
    "index_put": lambda h: h.index_put((torch.arange(len(h)), torch.zeros(len(h)).long()), C[1], accumulate=True),
    "scatter": lambda h: h.scatter(1, index_of(h, 0, 3), 0.5),
    "scatter, a tensor": lambda h: h.scatter(1, index_of(h, 0, 3), rows(h, 2)),
    "scatter_add": lambda h: h.scatter_add(1, index_of(h, 0, 0), rows(h, 2)),
    "scatter_reduce": lambda h: h.scatter_reduce(1, index_of(h, 0, 0), rows(h, 2), "amax"),
    "slice_scatter": lambda h: torch.slice_scatter(h, rows(h, 2), 1, 0, 2),
    "select_scatter": lambda h: torch.select_scatter(h, torch.ones(len(h)).double(), 1, 0),
    "lerp": lambda h: torch.lerp(h, C, 0.3),
    "lerp, a tensor": lambda h: torch.lerp(h, C, C.abs()),
    "addcmul": lambda h: torch.addcmul(C, h, C, value=0.5),
    "addcdiv": lambda h: torch.addcdiv(C, h, C + 2),
    "addmm": lambda h: torch.addmm(C, h, torch.outer(C, C), beta=0.5, alpha=2),
    "rsub": lambda h: 1 - h,
    "divided by constants": lambda h: h / (C + 2) + 1,
    "einsum": lambda h: torch.einsum("ni,ij->nj", h, torch.outer(C, C)) + C,
    "stack": lambda h: torch.stack([h, rows(h)], 1).sum(1),
    "cat": lambda h: torch.cat([h[:, :3], rows(h, 3)], 1),
    "split": lambda h: torch.cat([part + i for i, part in enumerate(h.split(2, 1))], 1),
    "pad": lambda h: F.pad(h[:, :4], (1, 1), value=0.4),
    "reflected": lambda h: F.pad(h[:, None, 1:5], (1, 1), mode="reflect")[:, 0] + 1,
    "circular": lambda h: F.pad(h[:, None, 1:5], (1, 1), mode="circular")[:, 0] + 1,
    "hinge_embedding_loss": lambda h: F.hinge_embedding_loss(h, rows(h).sign(), margin=0.5, reduction="none"),
    "multi_margin_loss": lambda h: h + F.multi_margin_loss(h, torch.zeros(len(h)).long(), reduction="none")[:, None],
    "into an empty tensor": lambda h: torch.empty_like(h).copy_(h).clamp_(max=0.1),
    "roll and flip": lambda h: h.roll(1, 1).flip(1) + 1,
    "unfold": lambda h: h.unfold(1, 2, 1).sum(-1).repeat(1, 2)[:, :6] + 1,
    "fft": lambda h: torch.fft.irfft(2 * torch.fft.rfft(h), n=6) + 1,
    "complex": lambda h: torch.view_as_real(torch.complex(h, 2 * h + 1) * (1 + 2j))[..., 1].relu(),
    "floor": lambda h: h.floor() + h,
    "round": lambda h: h.round() + h,
    "frac": torch.frac,
    "remainder": lambda h: h % 0.3,
    "fmod": lambda h: torch.fmod(h, 0.3),
    "copysign": lambda h: torch.copysign(h, C) + 0.2,
    "nan_to_num": torch.nan_to_num,
    "batch norm in eval": nn.BatchNorm1d(6),
    "embedding added": lambda h: h + F.embedding(torch.zeros(len(h)).long(), torch.outer(C, C)),
    "smooth_l1 where it is linear": lambda h: F.smooth_l1_loss(100 * h, rows(h), reduction="none"),
    "a constant smoothed": lambda h: h * torch.sigmoid(C) + C.exp(),
    "layer norm, scale detached": normalised,
    "straight-through rounding": lambda h: h + (h.round() - h).detach(),
    "clamp_ as a statement": statement(lambda h: h.clamp_(-0.2, 0.3)),
    "masked_fill_ as a statement": statement(lambda h: h.masked_fill_(h > 0, 0.3)),
    "hardtanh_ as a statement": statement(lambda h: F.hardtanh_(h, -0.2, 0.2)),
    "relu_ as a statement": statement(F.relu_),
    "add_ as a statement": statement(lambda h: h.add_(C)),
    "addmm_ as a statement": statement(lambda h: h.addmm_(h.detach() * 0, torch.outer(C, C))),
    "lerp_ as a statement": statement(lambda h: h.lerp_(C, 0.3)),
    "unsqueeze_ as a statement": lambda h: statement(lambda g: g.unsqueeze_(1))(h)[:, 0] + 1,
    "x.mul_(2).t()": lambda h: statement(lambda g: g.t().mul_(2).add_(1))(h),
    "out of a slice": statement(lambda h: h[:, 1:3].clamp_(0, 0.1)),
    ".data": statement(lambda h: h.data.clamp_(-0.2, 0.3)),
    "no_grad": without_grad(lambda h: h.clamp_(-0.2, 0.3)),
    "assignment": assigned,
    "into a constant": into_constant,
    "checkpoint": lambda h: torch.utils.checkpoint.checkpoint(F.hardsigmoid, h, use_reentrant=False),
    "vmap": lambda h: torch.func.vmap(lambda row: row.clamp(-0.1, 0.2) + 1)(h),
}


def bias_of(model: nn.Module, x: Tensor) -> Tensor:
    """What is left of the output when `J x` is taken off, by plain autograd."""
    jacobian = oracle.input_jacobian(model, x)
    return model(x).detach() - (jacobian * x[:, None]).sum(-1)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    scale = float(expected.abs().max()) or 1.0
    assert float((actual.double() - expected.double()).abs().max()) <= rtol * scale


def warned(model: nn.Module, x: Tensor, **options: Any) -> tuple[Contributions, str]:
    """What comes back, and what was said."""
    with pytest.warns(JacopsWarning, match="contributions") as found:
        parts = contributions(model, x, **options)
    return parts, " ".join(str(w.message) for w in found)


def exact(model: nn.Module, x: Tensor, rtol: float = 1e-10, **options: Any) -> Contributions:
    """Nothing is said, everything agrees with the oracle, nothing of the caller's moved."""
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", JacopsWarning)
        found = contributions(model, x, **options)
    close(found.output, model(x).detach(), 1e-14)
    close(found.bias, bias_of(model, x), rtol)
    close(found.values, oracle.input_jacobian(model, x) * x[:, None], rtol)
    assert found.verification.relative_error <= max(rtol, 1e-9)
    assert found.slope_error <= max(rtol, 1e-9)
    assert found.notes == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


# ---- every operation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_a_piecewise_linear_operation_is_exact_and_nothing_is_noted(name: str):
    exact(between(PIECEWISE_LINEAR[name]), draw(7, 5, seed=3))


@pytest.mark.parametrize("seed", range(12))
def test_compositions_of_piecewise_linear_operations_are_exact(seed: int):
    picked = torch.randperm(len(PIECEWISE_LINEAR), generator=torch.Generator().manual_seed(seed))[:4].tolist()
    operations = [list(PIECEWISE_LINEAR.values())[i] for i in picked]
    scales = [0.5 + i / 4 for i in range(4)]

    def composed(h: Tensor) -> Tensor:
        for scale, operation in zip(scales, operations, strict=True):
            h = scale * operation(h) + 0.1 * C
        return h

    exact(between(composed), draw(5, 5, seed=50 + seed))


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("gelu", "silu", "mish", "tanh", "sigmoid", "softplus", "elu", "celu")},
    **{name: getattr(F, name) for name in ("selu", "logsigmoid", "softsign", "hardswish", "tanhshrink", "normalize")},
    "softmax": lambda h: h.softmax(1),
    "log_softmax": lambda h: h.log_softmax(1),
    "softmin": lambda h: F.softmin(h, 1),
    "exp": torch.exp,
    "log": lambda h: (h.abs() + 1).log(),
    "sqrt": lambda h: (h.abs() + 1).sqrt(),
    "rsqrt": lambda h: (h.abs() + 1).rsqrt(),
    "reciprocal": lambda h: (h.abs() + 1).reciprocal(),
    "div": lambda h: h / (h.abs() + 1),
    "sin": torch.sin,
    "erf": torch.erf,
    "sinc": torch.sinc,
    "pow": lambda h: h**3,
    "square": torch.square,
    "mul": lambda h: h * h.flip(1),
    "prod": lambda h: h + h.prod(1, keepdim=True),
    "bmm": lambda h: torch.bmm(h[:, :, None], h[:, None]).sum(2),
    "logsumexp": lambda h: h + h.logsumexp(1, keepdim=True),
    "logcumsumexp": lambda h: h.logcumsumexp(1),
    "logaddexp": lambda h: torch.logaddexp(h, C),
    "std": lambda h: h / h.std(1, keepdim=True),
    "cosine_similarity": lambda h: h + F.cosine_similarity(h, C[None])[:, None],
    "layer_norm": lambda h: F.layer_norm(h, (6,)),
    "group_norm": lambda h: F.group_norm(h[:, :, None], 2)[:, :, 0],
    "instance_norm": lambda h: F.instance_norm(h[:, None])[:, 0],
    "rms_norm": lambda h: F.rms_norm(h, (6,)),
    "smooth_l1_loss": lambda h: F.smooth_l1_loss(h, rows(h), reduction="none"),
    "renorm": lambda h: torch.renorm(h, 2, 0, 0.5),
    "bilinear": lambda h: F.bilinear(h, h, torch.ones(6, 6, 6, dtype=h.dtype)),
    "scaled_dot_product_attention": lambda h: F.scaled_dot_product_attention(*3 * [h.reshape(-1, 3, 2)]).flatten(1),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_operation_is_named_and_the_identity_warns(name: str):
    model, x = between(SMOOTH[name]), draw(7, 5, seed=3)
    found, said = warned(model, x)
    assert name in found.notes[0]
    assert name in said
    close(found.output, model(x).detach(), 1e-14)
    # The bias part is not what is left over: it uses neither the output nor the Jacobian.
    assert float((found.bias - bias_of(model, x)).abs().max()) > 1e-6
    assert found.slope_error <= 1e-9  # and yet the Jacobian is right


def test_the_euclidean_norm_is_named_though_the_identity_holds():
    model, x = between(lambda h: h.norm(dim=1, keepdim=True).expand(len(h), 6)), draw(7, 5)
    found = contributions(model, x)
    assert "norm" in found.notes[0]
    close(found.bias, bias_of(model, x))


def test_a_smooth_operation_that_no_derivative_reaches_is_not_named():
    exact(between(lambda h: h * h.detach().exp() + h.detach().tanh()), draw(7, 5))
    exact(between(lambda h: h + 0.0 * 1 + (h > h.detach().softmax(1)).double()), draw(7, 5))


def test_a_smooth_operation_in_one_sample_only_is_seen():
    x = draw(7, 5)
    model = between(lambda h: torch.where(h[:, :1] == h[:, :1].max(), h, h))
    exact(model, x[:1])
    model = between(lambda h: F.softplus(h, threshold=1e-3))
    model.first.bias.data += 5  # every unit far in the linear part …
    exact(model, x)
    x[4] *= 6  # … but for one sample
    found, _ = warned(model, x)
    assert "softplus" in found.notes[0]


# ---- modules that Python does not see, and custom Functions ------------------------------------------------------


def network() -> nn.Sequential:
    return settled(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Hardtanh(-0.3, 0.4), nn.Linear(6, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["trace", "script", "trace with statements", "fx", "export", "script function"])
def test_traced_and_scripted_models_are_exact(kind: str):
    net, x = network(), draw(7, 5)
    if kind == "script function":
        function = torch.jit.script(hard)
        for _ in range(4):  # until it is optimised, and its operations run out of sight of autograd
            function(draw(7, 6).requires_grad_()).sum().backward()
        model = between(function)
    elif kind == "trace with statements":
        model = torch.jit.trace(between(PIECEWISE_LINEAR["clamp_ as a statement"]), x)
    elif kind == "export":
        model = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    else:
        model = {"fx": torch.fx.symbolic_trace, "script": torch.jit.script}.get(kind, lambda m: torch.jit.trace(m, x))(
            net
        )
    found = contributions(model, x)
    assert found.notes == ()
    written = PIECEWISE_LINEAR["clamp_ as a statement"]
    reference = between(hard) if kind == "script function" else between(written) if "statements" in kind else net
    close(found.bias, bias_of(reference, x))
    close(found.output, reference(x).detach(), 1e-14)


def hard(h: Tensor) -> Tensor:
    y = h * 2.0 + 1.0
    return y.clamp(0.0, 1.0) + h


class Clipped(torch.autograd.Function):
    """Twice the positive part plus a tenth, with a backward of its own."""

    factor = 2.0

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return 2 * h.clamp(min=0) + 0.1

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return cls.factor * grad * (h > 0)


class Wrong(Clipped):
    factor = 2.02


class InNumpy(Clipped):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.from_numpy(2 * h.detach().numpy().clip(0) + 0.1)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_a_custom_function_is_exact():
    exact(between(Clipped.apply), draw(7, 5))


@pytest.mark.parametrize("function", [Wrong, Rounded])
def test_a_backward_that_is_not_the_derivative_fails_both_checks(function: type[torch.autograd.Function]):
    found, said = warned(between(function.apply), draw(7, 5))
    assert "output and features + bias differ" in said
    assert "the output's changes and the Jacobian differ" in said
    assert found.verification.relative_error > 1e-3
    assert found.slope_error > 1e-3


def test_one_sample_with_a_wrong_derivative_is_named():
    class Late(Clipped):
        @classmethod
        def backward(cls, ctx: Any, grad: Tensor) -> Tensor:
            (h,) = ctx.saved_tensors
            return 2 * grad * (h > 0) * torch.where(h.abs().sum(1, keepdim=True) > 1e3, 1.01, 1.0)

    x = draw(300, 5)
    x[217] *= 1e4
    _, said = warned(between(Late.apply), x)
    assert "row 217" in said


def test_what_is_computed_out_of_sight_is_named():
    found, _ = warned(between(InNumpy.apply), draw(7, 5))
    assert "InNumpy (not examined)" in found.notes[0]


# ---- points where derivatives jump, scales, dtypes ---------------------------------------------------------------


@pytest.mark.parametrize("operation", [F.relu, torch.abs, lambda h: F.hardtanh(h.relu(), 0, 0.3), F.hardshrink])
def test_samples_at_a_kink_raise_no_alarm(operation: Callable[[Tensor], Tensor]):
    x = draw(40, 5)
    x[:30] = 0
    x[30:36, :4] = 0
    model = between(operation)
    model.first = settled(nn.Linear(5, 6, bias=False))
    found = exact(model, x)
    close(found.bias[:30], model(x[:30]).detach())


def test_ties_in_a_maximum_raise_no_alarm():
    exact(between(lambda h: F.max_pool1d(h.relu()[:, None], 3, 1, 1)[:, 0]), draw(20, 5))


def test_a_sum_of_thousands_of_kinks_is_not_taken_for_a_curve():
    slopes, offsets = draw(1, 20_000, seed=1), draw(20_000, seed=2)
    model = between(lambda h: h + torch.linalg.vector_norm(h[:, :1] * slopes + offsets, ord=1, dim=1)[:, None] / 1e4)
    exact(model, draw(3, 5))


def test_samples_of_very_different_sizes_are_exact():
    x = draw(8, 5) * 10.0 ** torch.arange(-8, 8, 2)[:, None]
    found = exact(network(), x)
    for row, bias in enumerate(bias_of(network(), x)):
        close(found.bias[row], bias, 1e-10 * max(1.0, float(x[row].abs().max())))


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)], ids=str
)
def test_lower_precisions_are_right_to_their_rounding_and_smooth_operations_are_still_named(
    dtype: torch.dtype, rtol: float
):
    x = draw(40, 5).to(dtype)
    double = between(F.hardsigmoid)
    found = contributions(copy.deepcopy(double).to(dtype), x)
    assert found.notes == ()
    assert found.bias.dtype == found.output.dtype == dtype
    close(found.bias, bias_of(double, x.double()), rtol)
    smooth, _ = warned(between(F.gelu).to(dtype), x)
    assert "gelu" in smooth.notes[0]


def test_a_convolutional_network_is_exact():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.more = (
                nn.Conv2d(1, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 3, padding=1),
            )
            self.last = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu_(self.norm(self.conv(x.reshape(-1, 1, 6, 6))))
            h = h + F.leaky_relu(self.more(h), 0.1)
            return self.last(F.max_pool2d(h, 2).flatten(1))

    model = settled(Residual()).eval()
    model.norm.running_mean.copy_(draw(4))
    model.norm.running_var.copy_(draw(4).abs() + 0.5)
    exact(model, draw(4, 36))
    exact(model.to(memory_format=torch.channels_last), draw(4, 36))


def test_reused_modules_and_recurrent_networks_are_exact():
    layer = nn.Linear(5, 5)
    exact(settled(nn.Sequential(layer, nn.Hardshrink(0.1), layer, nn.Hardshrink(0.1), layer)), draw(7, 5))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.RNN(3, 4, batch_first=True, nonlinearity="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.cells(x.reshape(-1, 4, 3))[0][:, -1]

    exact(settled(Last()), draw(7, 12))


def test_models_whose_samples_mix_or_that_draw_are_taken_one_at_a_time():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) - 0.5 * x.mean(0)[:3]).clamp(-0.2, 0.4)

    model, x = settled(Mixing()), draw(6, 5)
    found, said = warned(model, x)
    assert "samples mix" in said
    alone = torch.cat([model(x[i : i + 1]) for i in range(6)]).detach()
    close(found.output, alone, 1e-14)
    close(found.bias, alone - found.values.sum(-1))
    noisy, _ = warned(between(lambda h: F.dropout(h, 0.5, training=True) + torch.rand_like(h)), x)
    assert noisy.verification.relative_error < 1e-12


def test_a_forward_that_writes_into_its_weights_leaves_the_callers_alone():
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.1, 0.1)
            return self.layer(x).relu()

    model, x = settled(Capped()), draw(6, 5)
    before = model.layer.weight.detach().clone()
    found = contributions(model, x)
    assert torch.equal(model.layer.weight, before)
    close(found.bias, bias_of(copy.deepcopy(model), x))


# ---- at= and outputs= --------------------------------------------------------------------------------------------


def test_at_a_hidden_layer_everything_is_of_that_layer():
    net, x = network(), draw(7, 5)
    found = contributions(net, x, at="1")
    hidden = net[:2](x).detach()
    tail = net[2:]
    close(found.values, oracle.input_jacobian(tail, hidden) * hidden[:, None])
    close(found.bias, bias_of(tail, hidden))
    close(found.output, net(x).detach(), 1e-14)
    assert found.verification.relative_error < 1e-12
    assert found.notes == ()


def test_at_a_pair_output_and_bias_are_the_targets():
    net, x = network(), draw(7, 5)
    found = contributions(net, x, at=(None, "3"))
    close(found.output, net[:4](x).detach(), 1e-14)
    close(found.bias, bias_of(net[:4], x))
    between_layers = contributions(net, x, at=("0", "2"))
    hidden = net[0](x).detach()
    close(between_layers.bias, bias_of(net[1:3], hidden))
    close(between_layers.values.sum(-1) + between_layers.bias, net[:3](x).detach())


def test_at_a_layer_with_several_axes_values_have_them():
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(18, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x.reshape(-1, 1, 3, 3)).clamp(max=0.3).flatten(1))

    model, x = settled(Image()), draw(4, 9)
    found = contributions(model, x, at="conv")
    assert found.values.shape == (4, 3, 2, 3, 3)
    assert jacops.reduce_contributions(found.values).shape == (4, 2, 3, 3)
    close(found.values.flatten(2).sum(-1) + found.bias, model(x).detach())
    assert "2x3x3 features" in repr(found)


@pytest.mark.parametrize(
    "outputs", [[1, 0], slice(1, 2), lambda output: output.clamp(max=0.1)[:, 1:]], ids=["list", "slice", "function"]
)
def test_outputs_reach_every_part(outputs: Any):
    net, x = network(), draw(7, 5)
    found = contributions(net, x, outputs=outputs)
    picked = outputs(net(x)) if callable(outputs) else net(x)[:, outputs]
    close(found.output, picked.detach(), 1e-14)
    close(found.values.sum(-1) + found.bias, picked.detach())
    assert found.verification.relative_error < 1e-12


@pytest.mark.parametrize(
    "call",
    [compute_jacobian, contributions, lambda model, x, at: jacops.jacobian(model, x, wrt="inputs", at=at)],
    ids=["compute_jacobian", "contributions", "jacobian"],
)
@pytest.mark.parametrize("at", [("2", "0"), ("4", "1")])
def test_at_backwards_is_an_error_that_names_both(call: Callable[..., Any], at: tuple[str, str]):
    with pytest.raises(InputError, match="returns before") as error:
        call(network(), draw(7, 5), at=at)
    assert all(f"'{path}'" in str(error.value) for path in at)
    assert repr((at[1], at[0])) in str(error.value)


LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS.tolist(), LABELS.numpy(), LABELS[:, None]], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("name", ["compute_jacobian", "sample_jacobians", "modjac", "jacobian"])
def test_labels_as_outputs_are_warned_of(name: str, labels: Any):
    with pytest.warns(JacopsWarning, match=f"{name}: `outputs` holds 7 indices for 7 samples"):
        getattr(jacops, name)(network(), draw(7, 5), outputs=labels)


@pytest.mark.parametrize("columns", [[0, 1], torch.tensor([0, 1]), np.array([1]), 1, slice(0, 1)], ids=str)
def test_columns_as_outputs_are_not_warned_of(columns: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_jacobian(network(), draw(7, 5), outputs=columns)
        compute_jacobian(network(), draw(2, 5), outputs=[1, 0])


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    net, x = network(), draw(7, 5)
    with pytest.raises(InputTypeError, match=r"contributions.*`outputs`"):
        contributions(net, x, output=[1])
    with pytest.raises(InputError, match="`features` is given, but they go with `projection`"):
        contributions(net, x, features=x)
    projection = jacops.results.Projection(torch.eye(5).double(), torch.zeros(5).double())
    with pytest.raises(InputError, match="hidden layer"):
        contributions(net, x, projection=projection, features=x, at="0")
    with pytest.raises(InputError, match=r"with `projection` a tensor \(n, in\) is needed"):
        contributions(nn.Flatten(), x[:, None], projection=projection, features=x)


def test_with_a_projection_the_identity_is_by_the_features():
    net, features = network(), draw(7, 8)
    projection = jacops.results.Projection(draw(5, 8, seed=1), draw(8, seed=2))
    found = contributions(net, projection(features), projection=projection, features=features)
    close(found.values.sum(-1) + found.bias, net(projection(features)).detach())
    assert found.notes == ("contributions are of features minus their mean",)
    _, said = warned(net, projection(features), projection=projection, features=features + 1e-5)
    assert "output and features + bias differ" in said


# ---- torch's own list of operations ------------------------------------------------------------------------------

ROUNDING = {"half", "bfloat16", "float"}  # they round to a lower precision, by more than the bound of the others


class OfDatabase(nn.Module):
    """An operation of torch's test suite behind an affine map that leads to the sample it gives."""

    def __init__(self, function: Callable[[Tensor], Any], at: Tensor, x: Tensor) -> None:
        super().__init__()
        self.function, self.shape = function, at.shape
        self.register_buffer("weight", draw(at.numel(), at.numel(), seed=1))
        self.register_buffer("bias", at.reshape(1, -1) - x @ self.weight)

    def forward(self, x: Tensor) -> Tensor:
        output = self.function((x @ self.weight + self.bias).reshape(self.shape))
        parts = output if isinstance(output, tuple | list) else [output]
        kept = [p.reshape(-1) for p in parts if isinstance(p, Tensor) and p.is_floating_point() and not p.is_sparse]
        return torch.cat(kept)[None]


def database_cases(op: Any) -> list[tuple[OfDatabase, Tensor]]:
    cases = []
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=False):
        at = sample.input
        if not (isinstance(at, Tensor) and at.layout is torch.strided and 0 < at.numel() <= 64):
            continue
        x = draw(1, at.numel(), seed=2)
        model = OfDatabase(lambda h, s=sample: op.op(h, *s.args, **s.kwargs), at.detach(), x)
        cases.append((model, x))
    return cases[:3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_operation_of_torch_loses_its_bias_part_unnamed():
    from torch.testing._internal.common_methods_invocations import op_db

    holes, held = [], 0
    for op in op_db:
        if torch.float64 not in op.dtypes or not op.supports_autograd or op.name in ROUNDING:
            continue
        try:
            cases = database_cases(op)
        except Exception:
            continue
        for model, x in cases:
            try:
                output = model(x)
                if not 0 < output.numel() <= 200 or not output.isfinite().all():
                    continue
                found = contributions(model, x, fallback="silent")
                bias = bias_of(model, x)
            except Exception:
                continue
            scale = float(output.abs().max() + found.values.abs().sum(-1).max())
            held += not found.notes
            if not found.notes and not float((found.bias - bias).abs().max()) <= 1e-10 * scale:
                holes.append(op.name)
    assert holes == []
    assert held > 500
