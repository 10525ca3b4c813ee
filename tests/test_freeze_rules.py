"""What `freeze=` makes of each function, against the same function written by hand with the constant part detached."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import jacops
from small import close, draw

Function = Callable[[Tensor], Tensor]
W = draw(6, 6, seed=1)
U = draw(6, 6, seed=2)
BIAS = draw(6, seed=3)
POSITIVE = draw(6, seed=4).abs() + 0.5


class Frozen(nn.Module):
    """A module of one function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Model(nn.Module):
    """The function between two linear layers, so that a wrong Jacobian shows whatever the function is."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(5, 24), Frozen(function), draw(32, 4, seed=5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(self.into(x).view(-1, 4, 6)).flatten(1)
        return found @ self.out[: found.shape[1]]


def model_of(function: Function) -> Model:
    torch.manual_seed(7)
    return Model(function).double().eval()


def slopes(model: nn.Module, x: Tensor) -> Tensor:
    rows = [torch.autograd.functional.jacobian(model, x[i : i + 1])[0, :, 0] for i in range(len(x))]
    return torch.stack(rows)


def gain(phi: Function) -> Function:
    """Return `phi` as a constant times its argument, and `phi(0)`."""

    def held(z: Tensor) -> Tensor:
        zero = phi(torch.zeros_like(z)).detach()
        return ((phi(z) - zero) / z).detach() * z + zero

    return held


def spread(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt().detach()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    pattern = (scores if mask is None else scores + mask).softmax(-1).detach()
    return pattern.nan_to_num() @ v


def projected(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ W, x @ U, x @ (W + U)


def grouped(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of 4 heads, and keys and values of 2."""
    q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in projected(x))
    return torch.cat([q, q[:, :1]], 1), k[:, :2], v[:, :2]


def with_grouped_heads(x: Tensor) -> Tensor:
    q, k, v = grouped(x)
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def grouped_by_hand(x: Tensor) -> Tensor:
    q, k, v = grouped(x)
    return attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def in_place(x: Tensor) -> Tensor:
    hidden = x * 2
    hidden += 1
    functional.silu(hidden, inplace=True)
    hidden.sigmoid_()
    return hidden


def written_norm(x: Tensor) -> Tensor:
    return POSITIVE * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def other_norms(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    first = (x - mean) / torch.sqrt(variance + 1e-5)
    return first + x * (x.square().mean(-1, keepdim=True) + 1) ** -0.5 + x * x.std(-1, keepdim=True).reciprocal()


def other_norms_by_hand(x: Tensor) -> Tensor:
    variance, mean = x.var(-1, keepdim=True), x.mean(-1, keepdim=True)
    first = (x - mean) / torch.sqrt(variance + 1e-5).detach()
    second = x * (1 / (x.square().mean(-1, keepdim=True) + 1).sqrt()).detach()
    return first + second + x * (1 / x.std(-1, keepdim=True)).detach()


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


MASK = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
SEEN = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4, [False, True, False, False]])
HIDDEN = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~SEEN, -torch.inf)
sdpa = functional.scaled_dot_product_attention
RULES: dict[str, tuple[Function, Function]] = {
    "layer norm": (
        lambda x: functional.layer_norm(x, (6,), POSITIVE, BIAS),
        lambda x: (x - x.mean(-1, keepdim=True)) / spread(x, (-1,)) * POSITIVE + BIAS,
    ),
    "layer norm of two axes": (
        lambda x: torch.layer_norm(x, (4, 6)),
        lambda x: (x - x.mean((-1, -2), keepdim=True)) / spread(x, (-1, -2)),
    ),
    "group norm": (
        lambda x: functional.group_norm(x, 2, POSITIVE[:4], BIAS[:4]),
        lambda x: (
            ((g := x.view(-1, 2, 12)) - g.mean(-1, keepdim=True)) / spread(g, (-1,))
        ).view_as(x) * POSITIVE[:4, None] + BIAS[:4, None],
    ),
    "instance norm": (
        lambda x: functional.instance_norm(x, weight=POSITIVE[:4]),
        lambda x: (x - x.mean(-1, keepdim=True)) / spread(x, (-1,)) * POSITIVE[:4, None],
    ),
    "batch norm by its statistics": (
        lambda x: functional.batch_norm(x, BIAS[:4], POSITIVE[:4], None, BIAS[:4]),
        lambda x: functional.batch_norm(x, BIAS[:4], POSITIVE[:4], None, BIAS[:4]),
    ),
    "rms norm": (
        lambda x: functional.rms_norm(x, (6,), POSITIVE, 1e-5),
        lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach() * POSITIVE,
    ),
    "rms norm without eps": (
        lambda x: functional.rms_norm(x, (6,)),
        lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt().detach(),
    ),
    "a norm written out": (
        written_norm,
        lambda x: POSITIVE * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6).detach(),
    ),
    "other norms written out": (other_norms, other_norms_by_hand),
    "normalize": (
        lambda x: functional.normalize(x, dim=-1),
        lambda x: x / x.norm(dim=-1, keepdim=True).detach(),
    ),
    "softmax": (lambda x: x.softmax(-1) * x, lambda x: x.softmax(-1).detach() * x),
    "softmax, as a function": (lambda x: functional.softmax(x, -1) @ W, lambda x: 0 * x + x.softmax(-1).detach() @ W),
    "softmax, written out": (
        lambda x: (e := torch.exp(x - x.amax(-1, keepdim=True))) / e.sum(-1, keepdim=True) * x,
        lambda x: x.softmax(-1).detach() * x,
    ),
    "attention": (lambda x: sdpa(*projected(x)), lambda x: attention(*projected(x))),
    "causal attention": (lambda x: sdpa(*projected(x), is_causal=True), lambda x: attention(*projected(x), mask=MASK)),
    "attention with a scale and an added mask": (
        lambda x: sdpa(*projected(x), attn_mask=MASK + 0.1, scale=0.3),
        lambda x: attention(*projected(x), mask=MASK + 0.1, scale=0.3),
    ),
    "attention with a query that sees nothing": (
        lambda x: sdpa(*projected(x), attn_mask=SEEN),
        lambda x: attention(*projected(x), mask=HIDDEN),
    ),
    "attention of grouped heads": (with_grouped_heads, grouped_by_hand),
    "gelu": (functional.gelu, gain(functional.gelu)),
    "gelu by tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        gain(lambda x: functional.gelu(x, approximate="tanh")),
    ),
    "gelu written out": (
        tanh_gelu,
        lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))).detach(),
    ),
    "silu": (functional.silu, gain(functional.silu)),
    "sigmoid": (functional.sigmoid, gain(torch.sigmoid)),
    "tanh": (Tensor.tanh, gain(torch.tanh)),
    "softplus": (lambda x: functional.softplus(x, 2.0), gain(lambda x: functional.softplus(x, 2.0))),
    "elu": (lambda x: functional.elu(x, 1.5), gain(lambda x: functional.elu(x, 1.5))),
    "mish": (functional.mish, gain(functional.mish)),
    "hardswish": (functional.hardswish, gain(functional.hardswish)),
    "logsigmoid": (functional.logsigmoid, gain(functional.logsigmoid)),
    "tanhshrink": (functional.tanhshrink, lambda x: x - gain(torch.tanh)(x)),
    "softsign": (functional.softsign, lambda x: x / (x.abs() + 1).detach()),
    "relu": (functional.relu, functional.relu),
    "leaky relu": (lambda x: functional.leaky_relu(x, 0.2), lambda x: functional.leaky_relu(x, 0.2)),
    "beside functions that choose another by a flag": (
        lambda x: functional.dropout(functional.max_pool1d(functional.silu(x), 2), 0.5, training=False),
        lambda x: functional.max_pool1d(gain(functional.silu)(x), 2),
    ),
    "in place": (in_place, lambda x: gain(torch.sigmoid)(gain(functional.silu)(x * 2 + 1))),
    "gate first": (lambda x: functional.silu(x @ W) * (x @ U), lambda x: functional.silu(x @ W).detach() * (x @ U)),
    "gate last": (lambda x: (x @ U) * functional.silu(x @ W), lambda x: functional.silu(x @ W).detach() * (x @ U)),
    "gate scaled": (
        lambda x: (x @ U) * (1 - 2 * torch.sigmoid(x @ W)).view(-1, 4, 6),
        lambda x: (x @ U) * (1 - 2 * torch.sigmoid(x @ W)).detach(),
    ),
    "gate of two activations": (
        lambda x: torch.tanh(x @ U) * torch.sigmoid(x @ W),
        lambda x: gain(torch.tanh)(x @ U) * torch.sigmoid(x @ W).detach(),
    ),
    "swish written out": (lambda x: x * torch.sigmoid(1.7 * x), lambda x: x * torch.sigmoid(1.7 * x).detach()),
    "glu": (
        lambda x: functional.glu(x @ W, -1),
        lambda x: (x @ W)[..., :3] * (x @ W)[..., 3:].sigmoid().detach(),
    ),
    "relu as a gate": (lambda x: (x @ U) * torch.relu(x @ W), lambda x: (x @ U) * torch.relu(x @ W).detach()),
    "product": (lambda x: (x @ W) * (x @ U), lambda x: (x @ W).detach() * (x @ U)),
    "product with itself": (lambda x: x * x, lambda x: x.detach() * x),
    "matrix product": (lambda x: (x @ W) @ (x @ U).mT, lambda x: (x @ W).detach() @ (x @ U).mT),
    "einsum": (
        lambda x: torch.einsum("bik,bjk->bij", x @ W, x @ U),
        lambda x: torch.einsum("bik,bjk->bij", (x @ W).detach(), x @ U),
    ),
    "product with an addend": (
        lambda x: torch.addcmul(x, x @ W, x @ U),
        lambda x: x + (x @ W).detach() * (x @ U),
    ),
    "product in place": (lambda x: (x @ W).mul_(x @ U), lambda x: (x @ W).detach() * (x @ U)),
    "quotient": (lambda x: (x @ W) / (x @ U), lambda x: (x @ W) / (x @ U).detach()),
    "one over": (lambda x: x * (1 / (1 + x.abs())), lambda x: x / (1 + x.abs()).detach()),
    "square": (lambda x: torch.square(x) + x**2, lambda x: 2 * x.detach() * x),
    "cube": (lambda x: x**3, lambda x: x.detach() ** 2 * x),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_function_is_linear_in_what_is_left_and_of_the_same_value(name: str) -> None:
    function, by_hand = RULES[name]
    model, x = model_of(function), draw(3, 5, seed=9)
    found = jacops.contributions(model, x, freeze=("Frozen",))
    expected = slopes(model_of(by_hand), x)
    close(found.output, model(x).detach(), 1e-12)
    close(found.jacobian, expected, 1e-11)
    close(found.values.sum(-1) + found.bias, model(x).detach(), 1e-12)
    assert found.method == "frozen"
    assert found.notes[0].startswith("frozen: ") or name.startswith("batch norm")
    assert len(found.notes) == 1  # nothing in it is curved
    close(jacops.compute_jacobian(model, x, freeze="inner"), expected, 1e-11)


def test_statistics_of_the_batch_are_held_as_they_are() -> None:
    class Batch(nn.BatchNorm1d):
        pass

    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.Unflatten(1, (2, 2)), Batch(2, track_running_stats=False), nn.Flatten()
    model, x = nn.Sequential(*layers).double().eval(), draw(3, 5)
    found = jacops.contributions(model, x, freeze="Batch", fallback="silent")

    def by_hand(x: Tensor) -> Tensor:
        hidden = layers[1](layers[0](x))
        return ((hidden - hidden.mean((0, 2), keepdim=True)) / spread(hidden, (0, 2))).flatten(1)

    close(found.jacobian, slopes(by_hand, x), 1e-11)  # pyright: ignore[reportArgumentType]
    close(found.values.sum(-1) + found.bias, torch.cat([model(x[i : i + 1]) for i in range(3)]).detach(), 1e-12)


GAINS = {
    name: pair[0] for name, pair in RULES.items() if name in ("gelu", "sigmoid", "tanh", "softplus", "elu", "mish")
}


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-12, 1e-9, 6e-6, 1e-5, 1e-3])
def test_near_zero_a_gain_is_the_slope(name: str, size: float) -> None:
    phi, z = GAINS[name], torch.tensor([[size], [-size]], dtype=torch.float64)
    found = jacops.contributions(Frozen(phi), z, freeze="Frozen")
    at = z.clone().requires_grad_()
    slope = torch.autograd.grad(phi(at / 2).sum(), at)[0] * 2
    close(found.jacobian[:, 0], slope, max(1e-10, size**2))
    close(found.values[:, 0] + found.bias, phi(z), 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_dtypes_keep_value_and_dtype(dtype: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.LayerNorm(6), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(x)
            return self.act(functional.scaled_dot_product_attention(hidden, hidden, hidden)).flatten(1)

    torch.manual_seed(0)
    model, x = Mixed().to(dtype), torch.randn(2, 4, 6).to(dtype)
    frozen = jacops.compute_jacobian(model, x, freeze="Mixed")
    exact = jacops.compute_jacobian(model.double(), x.double(), freeze="Mixed")
    assert frozen.dtype == dtype
    size = exact.abs().max()
    assert float((frozen.double() - exact).abs().max() / size) < 20 * torch.finfo(dtype).eps
