"""Products with Hessians, node by node: every rule beside a second backward pass by hand, and where none applies."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import jacops
from cases import F64
from jacops._ladder.names import Question
from jacops._runtime import engine
from jacops._torch.sweeps import second_rules
from jacops._torch.sweeps.graph import inspect_graph
from jacops._torch.sweeps.second_nodes import HessianByNodes
from jacops._torch.sweeps.second_rules import SecondRule

Loss = Callable[[Any, Any], Tensor]


class Net(nn.Module):
    """A hidden layer, an operation on its values, and what `after` makes of them."""

    def __init__(self, operation: Callable[[Tensor], Tensor], after: nn.Module | None = None) -> None:
        super().__init__()
        self.operation, self.after = operation, after
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=F64) * 0.5)
        self.offset = nn.Parameter(torch.randn(6, generator=generator, dtype=F64) * 0.1)
        self.last = nn.Parameter(torch.randn(6, 3, generator=generator, dtype=F64) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, 3)`."""
        h = self.operation(F.linear(x, self.first, self.offset))
        return (h if self.after is None else self.after(h)) @ self.last


def by_hand(model: nn.Module, loss: Loss, x: Any, y: Any, v: Tensor) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss(model(x), y), params, create_graph=True, materialize_grads=True)
    parts = [part.reshape(p.shape) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    live = [(g, part) for g, part in zip(slopes, parts, strict=True) if g.requires_grad]
    found = torch.autograd.grad([g for g, _ in live], params, [p for _, p in live], materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def compare(model: nn.Module, loss: Loss, x: Any, y: Any, routed: bool = True) -> None:
    """Compare first, remembered and kept products, and require the route if it applies."""
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    H = jacops.hessian(model, loss, x, y)
    for seed in range(3):
        v = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)
        expected = by_hand(model, loss, x, y, v)
        for found in (jacops.hvp(model, loss, x, y, v), H @ v):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert ("graph of the loss" in H.lin.routes[Question.HESSIAN]) == routed, H.lin.routes
    V = torch.randn(size, 3, generator=torch.Generator().manual_seed(9), dtype=F64)
    expected = torch.stack([by_hand(model, loss, x, y, v) for v in V.T], 1)
    for large in (False, True):
        H = jacops.hessian(model, loss, x, y)
        lin: Any = H.lin
        lin.__dict__["_loss_bytes"] = 2**30 if large else 0  # which decides on one pass for all, or one for each
        for found in (H @ V, H @ V, jacops.hvp(model, loss, x, y, V)):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert ("graph of the loss" in lin.routes[Question.PULL]) == routed, lin.routes
        assert not routed or ("one batched pass" in lin.routes[Question.PULL]) != large, lin.routes


def squares(output: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(output, y)


x, y = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(1)), torch.ones(5, 3, dtype=F64)
labels = torch.tensor([0, 2, 1, 1, 0])

ENTRYWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": lambda t: torch.log(t.sigmoid()),
    "sqrt": lambda t: torch.sqrt(t.exp()),
    "rsqrt": lambda t: torch.rsqrt(t.exp()),
    "reciprocal": lambda t: 1 / t.exp(),
    "sin": torch.sin,
    "cos": torch.cos,
    "square": torch.square,
    "cube": lambda t: t**3,
    "power of a half": lambda t: t.exp() ** 0.5,
    "first power": lambda t: torch.tanh(t) ** 1,
    "gelu": F.gelu,
    "gelu by tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "softplus, steep": lambda t: F.softplus(t, beta=30.0, threshold=5.0),
    "logsigmoid": F.logsigmoid,
    "elu": lambda t: F.elu(t, 0.7),
    "elu in place": lambda t: F.elu_(t * 1.5),
    "selu": F.selu,
    "relu": lambda t: F.relu(t).tanh(),
    "leaky": lambda t: F.leaky_relu(t).tanh(),
    "leaky in place": lambda t: F.leaky_relu_(t * 1.5).tanh(),
    "threshold in place": lambda t: F.threshold(t * 1.5, 0.1, 0.2, inplace=True).tanh(),
    "hardtanh": lambda t: F.hardtanh(t).tanh(),
    "threshold": lambda t: F.threshold(t, 0.1, 0.2).tanh(),
    "abs": lambda t: t.abs().tanh(),
    "clamp": lambda t: t.clamp(-0.5, 0.5).tanh(),
    "negative": lambda t: torch.tanh(-t),
    "numbers": lambda t: torch.tanh((2 - t * 3) / 4 + 1).mul(2),
    "clone": lambda t: t.clone().tanh(),
    "masked": lambda t: torch.tanh(t).masked_fill(t > 0.3, 0.0),
    "masked, spread": lambda t: torch.tanh(t.mean(0)).masked_fill(t > 0.3, 0.0),
    "where": lambda t: torch.where(t > 0, t.tanh(), t.sin()),
    "softmax": lambda t: F.softmax(t, -1),
    "log softmax": lambda t: F.log_softmax(t, 1),
}
OF_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda t: t * torch.tanh(t),
    "its square": lambda t: t * t,
    "product, spread": lambda t: t * t.sum(0) + t.mean(0, keepdim=True).tanh(),
    "difference, spread": lambda t: torch.tanh(t - t.mean(1, keepdim=True)),
    "sums": lambda t: torch.tanh(t + t.sum() / 10 + t.mean()),
    "slices": lambda t: torch.cat([t[:, 1:], t[:, :1]], 1).tanh(),
    "select": lambda t: torch.stack([t[:, i] for i in (5, 4, 3, 2, 1, 0)], 1).tanh(),
    "index": lambda t: t[:, torch.tensor([0, 0, 1, 2, 3, 4])].tanh(),
    "index_select": lambda t: t.index_select(1, torch.tensor([0, 0, 1, 2, 3, 4])).tanh(),
    "gather": lambda t: t.gather(1, torch.tensor([[0, 0, 1, 2, 3, 4]]).expand(5, 6)).tanh(),
    "flip": lambda t: t.flip(1).roll(2, 1).tanh(),
    "turned": lambda t: t.t().tanh().transpose(0, 1).permute(1, 0).tanh().t(),
    "triangles": lambda t: (t.tril() + t.triu(1).tanh()).cumsum(1).tanh(),
    "reshaped": lambda t: t.reshape(3, 10).tanh().view(5, 6).unsqueeze(1).squeeze(1).unsqueeze(0).squeeze(),
    "squeezed": lambda t: t.unsqueeze(1).expand(5, 2, 6).sum(1).unsqueeze(2).squeeze((1, 2)).tanh(),
    "repeated": lambda t: t.repeat(2, 1).reshape(2, 5, 6).mean(0).tanh(),
    "padded": lambda t: F.pad(t, (1, 1))[:, 2:].tanh(),
    "diagonal": lambda t: torch.tanh(t + t[:, :5].diagonal().unsqueeze(1)),
    "quotients": lambda t: t / (1 + t * t) + t.exp() / t.exp().sum(1, keepdim=True) + 1 / (2 + t.sum(0)),
    "matrices": lambda t: torch.bmm(t.reshape(5, 2, 3), t.reshape(5, 3, 2)).reshape(5, 4).repeat(1, 2)[:, :6],
    "matrix of itself": lambda t: (t @ t.mT).tanh() @ t,
    "alias": lambda t: torch.ops.aten.alias(t).tanh(),
    "unsafe view": lambda t: torch.ops.aten._unsafe_view(t.tanh(), [30]).reshape(5, 6),
    "reshape alias": lambda t: torch.ops.aten._reshape_alias(t.tanh(), [30], [1]).reshape(5, 6),
    "scaled offset": lambda t: torch.addmm(t, t @ t.mT, t.tanh(), beta=0.5, alpha=2.0),
    "offset, spread": lambda t: torch.addmm(t.sum(0), t.tanh(), torch.eye(6, dtype=F64) * 0.3),
}


@pytest.mark.parametrize("operation", [*ENTRYWISE.values(), *OF_ROWS.values()], ids=[*ENTRYWISE, *OF_ROWS])
@pytest.mark.parametrize("loss", ["squares", "labels"])
def test_operations_have_the_second_derivative_of_two_sweeps(operation: Callable[[Tensor], Tensor], loss: str) -> None:
    compare(Net(operation), *((squares, x, y) if loss == "squares" else (F.cross_entropy, x, labels)))


@pytest.mark.parametrize("layer", [nn.PReLU(), nn.PReLU(6)], ids=str)
def test_prelu_at_any_values(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    compare(model, squares, x, y)
    with torch.no_grad():
        for p in model[0].parameters():
            p.zero_()  # where the derivative that torch has of this backward is another one than the backward
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
    w = torch.randn_like(v)
    found, other = (jacops.hvp(model, squares, x, y, u) for u in (v, w))
    torch.testing.assert_close(found @ w, other @ v)


class Images(nn.Module):
    """Convolutions of several kinds, pooling, and a layer after them."""

    def __init__(self, pool: nn.Module, transposed: bool, groups: int) -> None:
        super().__init__()
        second = nn.ConvTranspose2d if transposed else nn.Conv2d
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Tanh(),
            second(4, 2, 3, stride=2, groups=groups, bias=not transposed),
            nn.Sigmoid(),
            pool,
            nn.Flatten(),
            nn.LazyLinear(3),
        ]
        self.layers = nn.Sequential(*layers)
        self.layers(torch.zeros(1, 2, 7, 7))
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, 3)`."""
        return self.layers(x)


POOLS = [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)]


@pytest.mark.parametrize("pool", POOLS, ids=["max", "mean", "adaptive"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(pool: nn.Module, transposed: bool, groups: int) -> None:
    images = torch.randn(5, 2, 7, 7, dtype=F64, generator=torch.Generator().manual_seed(2))
    compare(Images(pool, transposed, groups), F.cross_entropy, images, labels)


def test_labels_of_pixels_and_texts() -> None:
    torch.manual_seed(0)
    pixels = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 1)).to(F64)
    compare(pixels, F.cross_entropy, torch.randn(2, 2, 5, 5, dtype=F64), torch.randint(3, (2, 3, 3)))
    texts = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    compare(texts, lambda z, t: F.cross_entropy(z.mT, t), torch.randn(2, 6, 4, dtype=F64), torch.randint(3, (2, 6)))


LOSSES: dict[str, tuple[Loss, Any]] = {
    "sum of squares": (lambda z, t: F.mse_loss(z, t, reduction="sum"), y),
    "squares of each": (lambda z, t: F.mse_loss(z, t, reduction="none").mean(), y),
    "squares of two that move": (lambda z, t: F.mse_loss(z[:, :2], z[:, 1:].tanh()), y),
    "a target that moves": (lambda z, t: F.mse_loss(t, z), y),
    "weights of classes": (lambda z, t: F.cross_entropy(z, t, torch.tensor([1.0, 2.0, 0.5], dtype=F64)), labels),
    "ignored": (lambda z, t: F.cross_entropy(z, t, ignore_index=1), labels),
    "smoothed": (lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1), labels),
    "sum": (lambda z, t: F.cross_entropy(z, t, reduction="sum"), labels),
    "shares": (lambda z, t: F.cross_entropy(z, t), y / 3),
    "penalised": (lambda z, t: F.cross_entropy(z, t) + 0.1 * z.square().mean(), labels),
    "absolute": (lambda z, t: F.l1_loss(z, t), y),
}


@pytest.mark.parametrize(("loss", "target"), LOSSES.values(), ids=LOSSES)
def test_losses(loss: Loss, target: Tensor) -> None:
    compare(Net(torch.tanh), loss, x, target)


def test_every_rule_is_compared_here() -> None:
    images = [Images(pool, False, 1) for pool in POOLS]
    data, pixels = torch.randn(5, 2, 7, 7, dtype=F64), nn.Conv2d(2, 3, 3).to(F64)
    made = [F.cross_entropy(model(data), labels) for model in images]
    made += [
        F.cross_entropy(pixels(data), torch.zeros(5, 5, 5, dtype=torch.long)),
    ]
    made += [squares(Net(operation)(x), y) for operation in [*ENTRYWISE.values(), *OF_ROWS.values()]]
    made += [squares(nn.Sequential(nn.Linear(4, 3), nn.PReLU()).to(F64)(x), y)]
    made += [loss(Net(torch.tanh)(x), target) for loss, target in LOSSES.values()]
    seen = {node.name() for loss in made for node in inspect_graph([loss]).nodes}
    assert set(second_rules._RULES) <= seen, set(second_rules._RULES) - seen


def test_a_wrong_rule_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(node: Any, c: Tensor, dc: Any, moving: Any, moved: Any, needs: Any) -> Any:
        return [c * moved if dc is None else node(dc)]

    rule = SecondRule(second_rules._backward, wrong, reads=True)
    monkeypatch.setitem(second_rules._RULES, "TanhBackward0", rule)
    compare(Net(torch.tanh), squares, x, y, routed=False)


class Tied(nn.Module):
    """Two weights of one shape, which change places by a flag."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(4, 4, dtype=F64)), nn.Parameter(torch.randn(4, 4, dtype=F64))
        self.swapped = self.hooked = self.squared = False

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, 4)`."""
        one, other = (self.b, self.a) if self.swapped else (self.a, self.b)
        h = torch.tanh(x @ one)
        return (h @ other).square() if self.squared else h @ other


def test_remembered_products_follow_the_graph_of_each_call() -> None:
    model, target, v = Tied(), torch.zeros(5, 4, dtype=F64), torch.randn(32, dtype=F64)

    def check() -> None:
        half = v[: sum(p.numel() for p in model.parameters() if p.requires_grad)]
        expected = by_hand(model, squares, x, target, half)
        for _ in range(2):
            torch.testing.assert_close(jacops.hvp(model, squares, x, target, half), expected)

    for name in ("swapped", "squared", "swapped", "squared"):
        check()
        setattr(model, name, not getattr(model, name))
    for p in model.parameters():
        p.data.mul_(0.5)
        check()
    model.a.requires_grad_(False)
    check()
    model.a = nn.Parameter(model.b.detach().clone())
    check()
    model.a = model.b
    check()


def test_products_in_other_modes_and_threads() -> None:
    model = Net(torch.tanh)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
    expected = by_hand(model, squares, x, y, v)
    jacops.hvp(model, squares, x, y, v)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        H = jacops.hessian(model, squares, x, y)
        with mode():
            torch.testing.assert_close(H @ v, expected)
            torch.testing.assert_close(H @ v.clone(), expected)
    H, found = jacops.hessian(model, squares, x, y), list[Tensor]()
    threads = [threading.Thread(target=lambda: found.extend(H @ v for _ in range(20))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    for product in found:
        torch.testing.assert_close(product, expected)


def test_an_interrupt_or_an_error_inside_of_a_batch_leaves_no_level_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, t = Net(torch.tanh), torch.ones(2, 3)
    H = jacops.hessian(model, squares, x, y)
    V = torch.randn(H.domain.dim, 3, dtype=F64)
    expected = H @ V
    plain, fails = HessianByNodes._product, [KeyboardInterrupt("stop"), RuntimeError("refused")]

    def failing(*args: Any) -> Any:
        plain(*args)
        raise fails.pop(0)

    monkeypatch.setattr(HessianByNodes, "_product", failing)
    with pytest.raises(KeyboardInterrupt):
        _ = H @ V
    assert torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(H @ V, expected)
    assert torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(torch.func.vmap(torch.sin)(t), t.sin())


def test_batches_without_torchs_private_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_maps", False)
    compare(Net(torch.tanh), squares, x, y)


def test_a_result_is_the_callers_own() -> None:
    model = Net(torch.tanh)
    H = jacops.hessian(model, squares, x, y)
    v = torch.randn(H.domain.dim, dtype=F64)
    first = H @ v
    kept = first.clone()
    first.zero_()
    torch.testing.assert_close(H @ v, kept, rtol=0, atol=0)


class Halved(torch.autograd.Function):
    """A Function of the user's."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        """Return half of `t`."""
        return t / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return half of the slope."""
        return grad / 2


HOOKS: dict[str, Callable[[Any], Any]] = {
    "of a tensor": lambda h: h.register_hook(lambda g: 2 * g),
    "of a node": lambda h: h.grad_fn.register_hook(lambda inputs, outputs: tuple(2 * g for g in inputs)),
    "before a node": lambda h: h.grad_fn.register_prehook(lambda outputs: tuple(2 * g for g in outputs)),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("checks", ["first", "never"])
def test_hooks_that_a_later_forward_registers(hook: Callable[[Tensor], Any], checks: Any) -> None:
    hooked = False

    def operation(t: Tensor) -> Tensor:
        h = torch.tanh(t)
        if hooked:
            hook(h)
        return h

    model, options = Net(operation), {"checks": checks}
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
    for hooked in (False, True, False, True):
        J, H = jacops.jacobian(model, x), jacops.hessian(model, squares, x, y, **options)
        torch.testing.assert_close(J @ v, J.dense() @ v)
        for found in (H @ v, jacops.hvp(model, squares, x, y, v, **options), (H @ v[:, None])[:, 0]):
            torch.testing.assert_close(found, by_hand(model, squares, x, y, v))
        assert ("graph of the loss" in H.lin.routes[Question.HESSIAN]) != hooked


def test_hooks_that_a_loss_registers() -> None:
    model, factors = Net(torch.tanh), [1.0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        h = torch.tanh(output)
        if factors[-1] != 1:
            h.register_hook(lambda g: factors[-1] * g)
        return squares(h, target)

    for factor in (1.0, 2.0, 1.0):
        factors.append(factor)
        found = jacops.ggn(model, loss, x, y)
        output = model(x).detach().requires_grad_()
        slope = torch.autograd.grad(loss(output, y), output, create_graph=True)[0]
        rows = [torch.autograd.grad(s, output, retain_graph=True)[0].flatten() for s in slope.flatten()]
        J = jacops.jacobian(model, x).dense()
        expected = J.mT @ torch.stack(rows) @ J
        v = torch.randn(len(expected), dtype=F64)
        torch.testing.assert_close(found @ v, expected @ v)


class Chosen(nn.Module):
    """As many rows as the input has entries that are not zero, which the graph shows nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.ones(1, 1, dtype=F64)), nn.Parameter(torch.randn(5, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(k, 5)`."""
        h = torch.tanh(x.nonzero()[:, 1:].to(F64).sin() * self.scale)
        return torch.tanh(torch.tanh(h) + self.offset)


@pytest.mark.parametrize("counts", [(1, 3, 2, 1), (3, 1, 3)])
def test_sizes_that_the_data_decide(counts: tuple[int, ...]) -> None:
    model, v = Chosen(), torch.randn(6, dtype=F64)
    for count in counts:
        chosen = torch.zeros(1, 5, dtype=torch.long)
        chosen[0, :count] = 1
        H = jacops.hessian(model, of_squares, chosen, y)
        expected = by_hand(model, of_squares, chosen, y, v)
        for found in (H @ v, jacops.hvp(model, of_squares, chosen, y, v), (H @ torch.stack([v, v], 1))[:, 1]):
            torch.testing.assert_close(found, expected)
        assert "graph of the loss" in H.lin.routes[Question.HESSIAN]


def of_squares(output: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(output, torch.zeros_like(output))


class Scaled(nn.Module):
    """A weight through one operation, to be evaluated at single values of it."""

    factor: Tensor

    def __init__(self, operation: Callable[[Tensor], Tensor], dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.operation, self.weight = operation, nn.Parameter(torch.tensor([0.3, -0.7], dtype=dtype))
        self.register_buffer("factor", torch.ones(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(2,)`."""
        return self.operation(self.weight * x) * self.factor


BENT: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "elu at zero": (F.elu, 0.0),
    "selu at zero": (F.selu, 0.0),
    "elu in place at zero": (lambda t: F.elu_(t * 1.0), 0.0),
    "softplus at its threshold": (lambda t: F.softplus(t, beta=2.0, threshold=1.0), 0.5),
}


@pytest.mark.parametrize(("operation", "value"), BENT.values(), ids=BENT)
def test_values_at_which_a_remembered_rule_is_special(operation: Callable[[Tensor], Tensor], value: float) -> None:
    model, one, v = Scaled(operation), torch.ones(2, dtype=F64), torch.tensor([1.0, 0.5], dtype=F64)

    def total(output: Tensor, y: Tensor) -> Tensor:
        return output.sum()

    for weight in ([0.3, -0.7], [value, -0.7]):
        model.weight.data.copy_(torch.tensor(weight))
        found = jacops.hvp(model, total, one, one, v)
        torch.testing.assert_close(found, by_hand(model, total, one, one, v), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_torchs_own_kernels(dtype: torch.dtype) -> None:
    model, one = Scaled(lambda t: F.gelu(t * 100, approximate="tanh"), dtype), torch.ones(2, dtype=dtype)
    H = jacops.hessian(model, of_squares, one, one)
    torch.testing.assert_close(H @ one, by_hand(model, of_squares, one, one, one))
    assert "graph of the loss" not in H.lin.routes[Question.HESSIAN]


def test_a_buffer_of_another_dtype_in_a_later_call() -> None:
    model, one = Scaled(torch.tanh, torch.float32), torch.ones(2)
    for dtype in (torch.float32, F64, torch.float32):
        model.factor = model.factor.to(dtype)
        H, expected = jacops.hessian(model, of_squares, one, one), by_hand(model, of_squares, one, one, one)
        for found in (H @ one, jacops.hvp(model, of_squares, one, one, one), (H @ one[:, None])[:, 0]):
            torch.testing.assert_close(found, expected)


def test_a_gradient_that_is_recorded_again_holds_no_errors_of_a_check() -> None:
    def operation(t: Tensor) -> Tensor:  # its cotangents have infinite slopes where they are zero
        return torch.logcumsumexp(t, 1)

    for seed in range(5):
        torch.manual_seed(seed)
        model = Net(operation)
        v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
        expected = by_hand(model, squares, x, y, v)
        H = jacops.hessian(model, squares, x, y)
        for found in (H @ v, jacops.hvp(Net(operation), squares, x, y, v), H @ v):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a Function": lambda t: Halved.apply(t).tanh(),  # pyright: ignore[reportAttributeAccessIssue]
    "a checkpoint": lambda t: checkpoint(torch.tanh, t, use_reentrant=False),  # pyright: ignore[reportReturnType]
    "two dtypes": lambda t: t.float().tanh().double(),
    "complex": lambda t: torch.fft.fft(t).abs(),
    "an operation without a rule": lambda t: torch.hypot(t.tanh(), t),
    "a norm": lambda t: F.layer_norm(t, (6,)),
    "several outputs": lambda t: torch.cat(t.tanh().split(3, 1)[::-1], 1),
}


@pytest.mark.parametrize("operation", OTHERS.values(), ids=OTHERS)
def test_graphs_that_it_does_not_apply_to(operation: Callable[[Tensor], Tensor]) -> None:
    model = Net(operation)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
    H = jacops.hessian(model, squares, x, y)
    for found in (H @ v, jacops.hvp(model, squares, x, y, v), H @ v):
        torch.testing.assert_close(found, by_hand(model, squares, x, y, v), rtol=1e-5, atol=1e-7)
    assert "graph of the loss" not in H.lin.routes[Question.HESSIAN]


def test_the_gradient_of_a_single_product_is_not_recorded() -> None:
    model, swept = Net(torch.tanh), []
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
    jacops.hvp(model, squares, x, y, v)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            swept.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        found = jacops.hvp(model, squares, x, y, v)
    by_nodes = swept[:]
    swept.clear()
    with Watch():
        expected = by_hand(model, squares, x, y, v)
    torch.testing.assert_close(found, expected)
    products = [sum(name.startswith(("aten.mm", "aten.addmm")) for name in names) for names in (by_nodes, swept)]
    assert products[0] < products[1], (by_nodes, swept)
