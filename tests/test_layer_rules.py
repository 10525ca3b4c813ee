"""Every family of layer rules in all its uses: the numbers of plain autograd, and no sweep for a sample or a row.

The oracle runs each sample alone, one number of the output at a time, in float64. Seven samples or three: no other
axis of any model has either length.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

import jacops
import oracle
from jacops import Problem
from jacops._runtime import engine
from jacops._torch.routes import curvature, gauss_newton
from jacops._torch.routes.kronecker import RecordedBatch
from jacops.solvers import EKFAC
from small import Calls, draw, settled

F64 = torch.float64
Made = Callable[[], nn.Module]
Inputs = Callable[[int], Any]


@pytest.fixture(autouse=True)
def also_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the route by layers for these small models, too."""
    for module in (curvature, gauss_newton):
        monkeypatch.setattr(module, "pays", lambda *_: True)


class Picks(nn.Module):
    """A layer, a nonlinearity, and a few numbers of what comes out."""

    def __init__(self, layer: nn.Module, pick: Callable[[Any], Tensor] = lambda out: out):
        super().__init__()
        self.layer, self.pick = layer, pick

    def forward(self, *args: Any) -> Tensor:
        out = self.pick(self.layer(*args)).flatten(1)
        return torch.stack([out[:, ::2].sin().sum(1), out[:, 1::2].tanh().sum(1)], 1)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Bilinear(4, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x).tanh(), torch.cat([x, x[..., :2]], -1)).sin()


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Words(nn.Module):
    """Tokens, and positions that all samples share, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(8, 4, padding_idx=1), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.words(ids) + self.places(torch.arange(ids.shape[1]))).tanh().mean(1))


class Attends(nn.Module):
    """Attention by one projection, or by slices of it."""

    def __init__(self, itself: bool):
        super().__init__()
        self.layer, self.itself = nn.MultiheadAttention(4, 2, batch_first=True), itself

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x, x, x) if self.itself else (x, x.sin(), x.cos())
        return self.layer(q, k, v, need_weights=False)[0].mean(1)[:, :2]


class Packed(nn.Module):
    """A recurrence over sequences of different lengths."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.cell, self.head = kind(2, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)
        return self.head(out.sum(1))


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def first(out: Any) -> Tensor:
    return out[0]


def positive(layer: nn.Module) -> nn.Module:
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Softplus())
    return layer


def tied_low_rank(A: Tensor, B: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, W + B @ A).tanh(), W + B @ A)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv1d(2, 4, 2))


def points(*shape: int) -> Inputs:
    return lambda n: draw(n, *shape)


def einsum(equation: str, *shape: int) -> Made:
    return lambda: Picks(Calls(lambda w, x: torch.einsum(equation, x, w), shape))


def lengths(n: int) -> tuple[Tensor, Tensor]:
    return draw(n, 4, 2), torch.tensor([4, 2, 1, 3, 4, 2, 1])[:n]


MODELS: dict[str, tuple[Made, Inputs]] = {
    "linear": (lambda: Picks(nn.Linear(4, 6)), points(5, 4)),
    "linear, used twice": (lambda: Picks(Twice(nn.Linear(4, 4))), points(2, 4)),
    "convolution, 1 axis": (lambda: Picks(nn.Conv1d(2, 4, 2, dilation=2)), points(2, 6)),
    "convolution, 3 axes": (lambda: Picks(nn.Conv3d(2, 4, (1, 2, 2), padding=(0, 1, 0), groups=2)), points(2, 2, 2, 4)),
    "transposed, 1 axis": (lambda: Picks(nn.ConvTranspose1d(4, 2, 2, stride=2, output_padding=1)), points(4, 4)),
    "transposed, 2 axes": (lambda: Picks(nn.ConvTranspose2d(4, 2, 2, padding=1, groups=2)), points(4, 2, 4)),
    "transposed, 3 axes": (
        lambda: Picks(nn.ConvTranspose3d(2, 2, (1, 2, 2), stride=(1, 1, 2), dilation=(1, 2, 1))),
        points(2, 2, 2, 2),
    ),
    "transposed, room for more": (
        lambda: Picks(nn.ConvTranspose1d(4, 2, 2, stride=1, dilation=2, output_padding=1)),
        points(4, 4),
    ),
    "transposed, used twice": (lambda: Picks(Twice(nn.ConvTranspose1d(2, 2, 2))), points(2, 4)),
    "embedding": (Words, lambda n: torch.randint(8, (n, 5), generator=torch.Generator().manual_seed(0))),
    "layer norm": (lambda: Picks(Twice(nn.LayerNorm(4))), points(2, 4)),
    "group norm": (lambda: Picks(Twice(nn.GroupNorm(2, 4))), points(4, 2)),
    "rms norm": (lambda: Picks(Twice(nn.RMSNorm(4))), points(2, 4)),
    "batch norm": (lambda: Picks(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).eval()), points(2, 2, 2)),
    **{
        f"instance norm, {axes} axes": (
            lambda kind=kind: Picks(Twice(kind(4, affine=True))),
            points(4, *[2] * axes),
        )
        for axes, kind in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), start=1)
    },
    "instance norm by kept statistics": (
        lambda: Picks(nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval()),
        points(4, 2),
    ),
    "slope": (lambda: Picks(nn.Sequential(nn.Linear(4, 4), nn.PReLU())), points(2, 4)),
    "slopes": (lambda: Picks(Twice(nn.PReLU(4))), points(4, 2, 2)),
    "layer scale": (lambda: Picks(Calls(lambda w, x: x.sin() * w.view(1, -1, 1), (4,))), points(4, 2)),
    "bilinear": (Bilinear, points(4)),
    "bilinear, positions": (Bilinear, points(2, 4)),
    "weight norm": (lambda: Picks(Twice(parametrizations.weight_norm(nn.Linear(4, 4)))), points(2, 4)),
    "weight norm, along the other axis": (
        lambda: Picks(parametrizations.weight_norm(nn.Linear(4, 2), dim=1)),
        points(2, 4),
    ),
    "weight norm, old": (lambda: Picks(old_weight_norm()), points(2, 4)),
    "weight norm, recurrent": (
        lambda: Picks(parametrizations.weight_norm(nn.GRU(2, 2, batch_first=True), "weight_hh_l0"), first),
        points(4, 2),
    ),
    "spectral norm": (lambda: Picks(parametrizations.spectral_norm(nn.Linear(4, 4)).eval()), points(2, 4)),
    "orthogonal": (lambda: Picks(parametrizations.orthogonal(nn.Linear(4, 4))), points(2, 4)),
    "orthogonal, oblong": (lambda: Picks(parametrizations.orthogonal(nn.Linear(4, 2))), points(2, 4)),
    "positive": (lambda: Picks(positive(nn.Conv1d(2, 4, 2))), points(2, 4)),
    "low rank": (lambda: Picks(Calls(tied_low_rank, (1, 4), (4, 1), (4, 4))), points(2, 4)),
    "lstm": (lambda: Picks(nn.LSTM(2, 2, num_layers=2, batch_first=True), first), points(4, 2)),
    "lstm, projected": (lambda: Picks(nn.LSTM(2, 4, proj_size=2, batch_first=True), first), points(4, 2)),
    "gru": (lambda: Picks(nn.GRU(2, 2, bidirectional=True, batch_first=True), first), points(4, 2)),
    "lstm, packed": (lambda: Packed(nn.LSTM), lengths),
    "gru, packed": (lambda: Packed(nn.GRU), lengths),
    "recurrent cell": (lambda: Picks(Twice(nn.RNNCell(4, 4))), points(4)),
    "heads": (einsum("nd,hdk->nhk", 2, 4, 6), points(4)),
    "heads, positions": (einsum("ntd,hdk->nthk", 2, 4, 6), points(5, 4)),
    "heads, each its own": (einsum("nhd,hdk->nhk", 2, 4, 6), points(2, 4)),
    "heads, contracted": (einsum("nthk,hkd->ntd", 2, 4, 6), points(5, 2, 4)),
    "heads, weights first": (
        lambda: Picks(Calls(lambda w, x: torch.einsum("hdk,nhd->nhk", w, x), (2, 4, 6))),
        points(2, 4),
    ),
    "heads, repeated": (lambda: Picks(Calls(lambda w, x: x.unsqueeze(1) @ w, (2, 4, 6))), points(5, 4)),
    "attention to itself": (lambda: Attends(True), points(5, 4)),
    "attention": (lambda: Attends(False), points(5, 4)),
}
each = pytest.mark.parametrize("name", MODELS)


def case(name: str, n: int) -> tuple[nn.Module, Any, Tensor]:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = settled(make())
    x = inputs(n)
    with torch.no_grad():
        shape = oracle.called(model, x).shape
    return model, x, draw(*shape, seed=5)


def loss(output: Tensor, y: Tensor) -> Tensor:
    """Neither convex nor quadratic."""
    return (output - y).square().mean() + 0.3 * output.pow(3).mean()


def square(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean()


def sample(x: Any, i: int) -> Any:
    return oracle.alone(x, i)


def rows_of(numbers: Tensor, model: nn.Module) -> Tensor:
    """The gradient of each number by the parameters, one plain backward pass for each."""
    parameters = list(model.parameters())
    rows = []
    for number in numbers.flatten():
        grads = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(rows).detach()


def jacobian_of(model: nn.Module, x: Any, n: int) -> Tensor:
    return torch.cat([rows_of(oracle.called(model, sample(x, i)), model) for i in range(n)])


def ggn_of(J: Tensor, model: nn.Module, x: Any, y: Tensor) -> Tensor:
    output = oracle.called(model, x).detach()
    H = torch.autograd.functional.hessian(lambda o: square(o, y), output).reshape(len(J), len(J))
    return J.T @ H @ J


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-9 * max(1.0, float(expected.abs().max())))


# ---- the numbers -----------------------------------------------------------------------------------------------------


@each
def test_rows_are_the_oracles(name: str) -> None:
    model, x, y = case(name, 7)
    expected = jacobian_of(model, x, 7)
    found = jacops.sample_jacobians(model, x)
    assert found.without_rule == []
    assert "7 samples to a sweep" in found.route
    close(found.dense(), expected)
    close(jacops.modjac(model, x, flatten=True), expected)
    gradients = torch.cat([rows_of(loss(oracle.called(model, sample(x, i)), y[i : i + 1]), model) for i in range(7)])
    rows = jacops.sample_gradients(model, loss, x, y)
    assert rows.without_rule == []
    close(rows.dense(), gradients)
    close(rows.column_squares(), gradients.square().sum(0))


@each
def test_curvature_is_the_oracles(name: str) -> None:
    model, x, y = case(name, 7)
    expected = oracle.hessian(model, loss, x, y, copier=lambda model: model)
    close(jacops.hessian(model, loss, x, y).dense(), expected)
    close(jacops.linalg.diagonal(jacops.hessian(model, loss, x, y)), expected.diagonal())
    expected, operator = ggn_of(jacobian_of(model, x, 7), model, x, y), jacops.ggn(model, square, x, y)
    close(operator.dense(), expected)
    close(jacops.linalg.diagonal(operator), expected.diagonal())
    for route in ("dense", "diagonal"):
        assert "outputs of layers" in operator.formed.routes[route]
        assert "ordinary sweeps" not in operator.formed.routes[route]


@each
def test_ekfac_keeps_the_trace_of_what_it_stands_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = case(name, 7)
    by_sweeps, swept = RecordedBatch._by_sweeps, []

    def noting(batch: RecordedBatch, leaves: Any, seeds: Tensor) -> Any:
        swept.extend(leaves)
        return by_sweeps(batch, leaves, seeds)

    monkeypatch.setattr(RecordedBatch, "_by_sweeps", noting)
    exact = Problem(model, nn.MSELoss(), [(x, y)]).ggn()
    found = EKFAC().approximate(exact)
    total = ggn_of(jacobian_of(model, x, 7), model, x, y).trace()
    torch.testing.assert_close(found.eigenvalues.sum(), total, rtol=1e-9, atol=0)
    assert swept == []


# ---- the sweeps ------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[nn.Module, Any, Tensor], Any]] = {
    "sample_jacobians": lambda model, x, y: jacops.sample_jacobians(model, x),
    # A loss of its own, of which nothing is remembered.
    "sample_gradients": lambda model, x, y: jacops.sample_gradients(model, lambda o, y: loss(o, y), x, y),
    "modjac": lambda model, x, y: jacops.modjac(model, x),
    "hessian": lambda model, x, y: jacops.hessian(model, loss, x, y).dense(),
    "ggn": lambda model, x, y: jacops.ggn(model, square, x, y).dense(),
    "hessian's diagonal": lambda model, x, y: jacops.linalg.diagonal(jacops.hessian(model, loss, x, y)),
    "ggn's diagonal": lambda model, x, y: jacops.linalg.diagonal(jacops.ggn(model, square, x, y)),
    "ekfac": lambda model, x, y: EKFAC().approximate(Problem(model, nn.MSELoss(), [(x, y)]).ggn()),
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts backward passes, none of which the clock decides on."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    counted = [0]
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            return call(*args, **kwargs)

        return counts

    monkeypatch.setattr(torch.autograd, "grad", counting(grad))
    monkeypatch.setattr(engine, "_engine", None)  # so that all passes go by `grad`
    monkeypatch.setattr(torch.autograd, "backward", counting(backward))
    return counted


@each
def test_backward_passes_do_not_grow_with_samples(name: str, passes: list[int]) -> None:
    def count(use: Callable[[nn.Module, Any, Tensor], Any], n: int) -> int:
        model, x, y = case(name, n)
        passes[0] = 0
        use(model, x, y)
        return passes[0]

    counts = {use: (count(call, 3), count(call, 7)) for use, call in USES.items()}
    # Matrices and diagonals are looked at up to three times more where what is compared cancels to rounding, which
    # hangs on the data; a sweep for each sample would be four more.
    spare = {"ggn": 3, "hessian": 3, "ggn's diagonal": 3, "hessian's diagonal": 3}
    assert {use: both for use, both in counts.items() if both[1] - both[0] > spare.get(use, 0)} == {}


# ---- what no rule describes ------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """An operation of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x**3 * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 3 * x**2 * w * grad, (grad * x**3).sum(tuple(range(x.ndim - 1)))


def normed(gain: Tensor, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, gain, training=True)


UNCOVERED: dict[str, tuple[Made, Inputs]] = {
    "an exponent": (lambda: Picks(Calls(lambda W, p, x: (x @ W).exp() ** p, (4, 4), (4,))), points(2, 4)),
    "an operation of one's own": (
        lambda: Picks(Calls(lambda W, w, x: Cube.apply(x @ W, w), (4, 4), (4,))),
        points(2, 4),
    ),
}
REFUSED: dict[str, tuple[Made, Inputs]] = {
    "statistics of the batch": (lambda: Calls(normed, (4,)), points(4)),
    "statistics of the batch, three axes": (lambda: Calls(normed, (4,)), points(4, 2)),
    "an entry per sample": (lambda: Calls(lambda w, x: x.sin() + w, (7, 4)), points(4)),
    "an entry per sample, in front": (lambda: Calls(lambda w, x: (x.sin() * w).mean(0), (7, 4)), points(7, 4)),
    "repeated for each sample": (lambda: Calls(lambda w, x: x.sin() * w.repeat(7, 1), (1, 4)), points(4)),
    "expanded for each sample": (lambda: Calls(lambda w, x: x.sin() * w.expand(7, 4).exp(), (4,)), points(4)),
    "a factor at a sum": (lambda: Calls(lambda w, x: torch.add(x.sin(), w, alpha=2), (4,)), points(4)),
    "factors at a product": (
        lambda: Calls(lambda W, b, x: torch.addmm(b, x, W, beta=0.5, alpha=3), (4, 2), (2,)),
        points(4),
    ),
    "scaled by frequency": (
        lambda: Calls(lambda W, x: F.embedding(x.long().abs() % 3, W, scale_grad_by_freq=True), (3, 2)),
        points(4),
    ),
    "samples second": (lambda: Calls(lambda W, x: (x.transpose(0, 1) @ W).sin().mean(0), (4, 2)), points(2, 4)),
    "samples mixed by the weight": (lambda: Calls(lambda W, x: W @ x, (7, 7)), points(4)),
    "heads that are samples": (lambda: Calls(lambda W, x: torch.bmm(x, W), (7, 4, 2)), points(5, 4)),
    "a column by itself": (lambda: Calls(lambda W, x: x @ W[:, :1] * W[0, 1:], (4, 3)), points(4)),
    "a kernel that is turned": (
        lambda: Calls(lambda W, x: F.conv1d(x, W.transpose(0, 1).flip(2)), (2, 4, 2)),
        points(2, 4),
    ),
}


@pytest.mark.parametrize("name", UNCOVERED)
@pytest.mark.filterwarnings("ignore:.*:jacops.JacopsWarning")
def test_the_rest_is_swept_within_the_same_object(name: str) -> None:
    make, inputs = UNCOVERED[name]
    model, x = settled(make()), inputs(5)
    y, J = draw(5, 2, seed=5), jacobian_of(model, x, 5)
    close(jacops.sample_jacobians(model, x).dense(), J)
    close(jacops.modjac(model, x, flatten=True), J)
    expected = oracle.hessian(model, loss, x, y)
    close(jacops.hessian(model, loss, x, y).dense(), expected)
    close(jacops.linalg.diagonal(jacops.hessian(model, loss, x, y)), expected.diagonal())
    close(jacops.ggn(model, square, x, y).dense(), ggn_of(J, model, x, y))
    found = EKFAC().approximate(Problem(model, nn.MSELoss(), [(x, y)]).ggn())
    torch.testing.assert_close(found.eigenvalues.sum(), ggn_of(J, model, x, y).trace(), rtol=1e-9, atol=0)


def test_only_what_has_no_rule_is_swept() -> None:
    make, inputs = UNCOVERED["an exponent"]
    found = jacops.sample_jacobians(settled(make()), inputs(5))
    assert found.without_rule == ["layer.weights.1"]
    assert "without a rule: layer.weights.1" in repr(found)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*:jacops.JacopsWarning")
def test_an_operation_that_only_looks_like_it_gives_no_wrong_numbers(name: str) -> None:
    make, inputs = REFUSED[name]
    model, x = settled(make()), inputs(7)
    close(jacops.modjac(model, x, flatten=True), rows_of(model(x), model))
    y = draw(*model(x).shape, seed=3)
    close(jacops.hessian(model, loss, x, y).dense(), oracle.hessian(model, loss, x, y))


@pytest.mark.parametrize("name", ["linear", "lstm", "weight norm", "convolution, 3 axes"])
def test_single_precision_is_covered_too(name: str) -> None:
    model, x, _ = case(name, 7)
    expected = jacops.sample_jacobians(model, x).dense().float()
    found = jacops.sample_jacobians(model.float(), x.float())
    assert found.coverage == 1
    torch.testing.assert_close(found.dense(), expected, rtol=1e-3, atol=1e-4)
