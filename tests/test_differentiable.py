"""`create_graph=True`: every result against plain autograd in float64, by weights, inputs, vectors and numbers."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import jacops
from jacops.errors import JacopsWarning, NotDifferentiableError
from jacops.solvers import solve
from small import draw


class Norm(nn.LayerNorm):
    """Layer normalisation in elementary operations: torch's own kernel has a wrong third derivative."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class Centred(nn.Module):
    """A model in which samples mix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * (1 + x.square().mean())


def perceptron(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Norm(4) if norm else nn.Softplus(), nn.Linear(4, 2)).double()


def frozen() -> nn.Module:
    model = perceptron()
    next(model.parameters()).requires_grad_(False)
    return model


def computed() -> jacops.Function:
    """A function whose tensors were computed from others, one of them from another of its own."""
    first = draw(3, 4, seed=4).requires_grad_()
    weight = torch.sin(first)
    params = {"a": weight, "b": 0.5 * weight[:2].T.contiguous(), "c": draw(2, seed=5)}
    model = jacops.Function(lambda p, x: torch.tanh(x @ p["a"]) @ p["b"] + p["c"] * x.sum(1, keepdim=True), params)
    model.start = first  # pyright: ignore[reportArgumentType]
    return model


def wide() -> nn.Module:
    """More outputs than inputs, so that pushes pay."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 9)).double()


MODELS: dict[str, Callable[[], Any]] = {
    "perceptron": perceptron,
    "frozen": frozen,
    "norm": lambda: perceptron(norm=True),
    "mixing": lambda: (torch.manual_seed(0), Centred().double())[1],
    "computed": computed,
    "wide": wide,
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def rows(values: Tensor, wrt: Sequence[Tensor]) -> Tensor:
    """Return the derivative of every number by tensors, `(numbers, entries)`, with its graph."""
    options: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
    return torch.stack([flat(torch.autograd.grad(value, wrt, **options)) for value in values.reshape(-1)])


class Case:
    """A model on some samples; what is by hand takes views, so that only the model's own uses count."""

    def __init__(self, name: str) -> None:
        self.model, self.x = MODELS[name](), draw(5, 3).requires_grad_()
        self.eval = name == "mixing"
        out = self.model(self.x).shape[1]
        self.y = draw(5, out, seed=1)
        self.total = sum(p.numel() for p in weights(self.model).values())
        self.v, self.u = draw(self.total, seed=2).requires_grad_(), draw(5, 3, seed=3).requires_grad_()
        start = getattr(self.model, "start", None)
        self.wrt = [self.x, self.v, self.u, *([start] if start is not None else weights(self.model).values())]

    def views(self) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
        own = {name: p.view_as(p) for name, p in weights(self.model).items()}
        return list(own.values()), lambda x: torch.func.functional_call(self.model, own, (x,))

    def input_rows(self, order: int) -> Tensor:
        """Return derivatives by the input, `(n, out, *in)`, from every sample alone."""
        found = []
        for one in self.x:
            leaf = one.view_as(one).unsqueeze(0)
            value = self.model(leaf)[0]
            for _ in range(order):
                value = rows(value, [leaf]).view(*value.shape, 3)
            found.append(value)
        return torch.stack(found)

    def hessian(self) -> Tensor:
        own, model = self.views()
        return rows(rows(mse_loss(model(self.x), self.y), own), own)

    def jacobian(self) -> Tensor:
        own, model = self.views()
        return rows(model(self.x), own)

    def per_sample(self, loss: bool) -> Tensor:
        own, model = self.views()
        pairs = ((model(self.x[i : i + 1]), self.y[i : i + 1]) for i in range(5))
        return torch.cat([rows(mse_loss(z, y) if loss else z, own) for z, y in pairs])

    def ggn(self) -> Tensor:
        jacobian = self.jacobian()
        return jacobian.T @ jacobian * (2 / self.y.numel())


def asked(call: Callable[..., Any]) -> Callable[[Case], Any]:
    return lambda case: call(case, {"create_graph": True, "fallback": "silent"})


def directional(case: Case) -> Tensor:
    return torch.einsum("noijk,ni,nj,nk->no", case.input_rows(3), case.u, case.u, case.u)


CALLS: dict[str, tuple[Callable[[Case], Any], Callable[[Case], Tensor]]] = {
    "compute_jacobian": (
        asked(lambda c, o: jacops.compute_jacobian(c.model, c.x, **o)),
        lambda c: c.input_rows(1),
    ),
    "compute_jacobian in parts": (
        asked(lambda c, o: jacops.compute_jacobian(c.model, c.x, 2, progress=False, **o)),
        lambda c: c.input_rows(1),
    ),
    "input_hessian": (asked(lambda c, o: jacops.input_hessian(c.model, c.x, **o)), lambda c: c.input_rows(2)),
    "laplacian": (
        asked(lambda c, o: jacops.laplacian(c.model, c.x, **o)),
        lambda c: c.input_rows(2).diagonal(dim1=2, dim2=3).sum(2),
    ),
    "directional_derivative": (
        asked(lambda c, o: jacops.directional_derivative(c.model, c.x, c.u, 3, **o)),
        directional,
    ),
    "hvp": (
        asked(lambda c, o: jacops.hvp(c.model, mse_loss, c.x, c.y, c.v, **o)),
        lambda c: c.hessian() @ c.v,
    ),
    "hessian": (asked(lambda c, o: jacops.hessian(c.model, mse_loss, c.x, c.y, **o).dense()), Case.hessian),
    "ggnvp": (asked(lambda c, o: jacops.ggnvp(c.model, mse_loss, c.x, c.y, c.v, **o)), lambda c: c.ggn() @ c.v),
    "jacobian": (asked(lambda c, o: jacops.jacobian(c.model, c.x, **o) @ c.v), lambda c: c.jacobian() @ c.v),
    "sample_gradients": (
        asked(lambda c, o: jacops.sample_gradients(c.model, mse_loss, c.x, c.y, **o).dense()),
        lambda c: c.per_sample(loss=True),
    ),
    "norms of sample_gradients": (
        asked(lambda c, o: jacops.sample_gradients(c.model, mse_loss, c.x, c.y, **o).norms()),
        lambda c: c.per_sample(loss=True).norm(dim=1),
    ),
    "products with sample_gradients": (
        asked(lambda c, o: jacops.sample_gradients(c.model, mse_loss, c.x, c.y, **o).T @ draw(5, seed=7)),
        lambda c: draw(5, seed=7) @ c.per_sample(loss=True),
    ),
    "empirical_fisher": (
        asked(lambda c, o: jacops.linalg.empirical_fisher(c.model, mse_loss, c.x, c.y, **o) @ c.v),
        lambda c: c.per_sample(loss=True).T @ (c.per_sample(loss=True) @ c.v) / 5,
    ),
    "sample_jacobians": (
        asked(lambda c, o: jacops.sample_jacobians(c.model, c.x, **o) @ c.v),
        lambda c: c.per_sample(loss=False) @ c.v,
    ),
    "tangent kernel": (
        asked(lambda c, o: jacops.sample_jacobians(c.model, c.x, **o).gram()),
        lambda c: c.per_sample(loss=False) @ c.per_sample(loss=False).T,
    ),
    "solve": (
        asked(lambda c, o: solve(jacops.ggn(c.model, mse_loss, c.x, c.y, **o), c.v, damping=0.5, create_graph=True).x),
        lambda c: torch.linalg.solve(c.ggn() + 0.5 * torch.eye(c.total).double(), c.v).unsqueeze(0),
    ),
}


def same_gradients(found: Tensor, right: Tensor, wrt: Sequence[Tensor], rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found.detach(), right.detach(), rtol=rtol, atol=1e-10)
    weight = draw(*right.shape, seed=9)
    options: dict[str, Any] = {"materialize_grads": True, "retain_graph": True}
    pairs = [torch.autograd.grad((t * weight).sum() + t.square().sum(), wrt, **options) for t in (found, right)]
    assert any(bool(g.abs().max() > 1e-3) for g in pairs[1])  # there is something to compare
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_results_are_those_of_plain_autograd(name: str, model: str) -> None:
    case = Case(model)
    call, by_hand = CALLS[name]
    same_gradients(call(case), by_hand(case), case.wrt)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_the_callers_mode_does_not_matter(name: str, mode: Callable[[], Any]) -> None:
    case = Case("perceptron")
    call, by_hand = CALLS[name]
    with mode():
        found = call(case)
        assert not torch.is_grad_enabled()
    same_gradients(found, by_hand(case), case.wrt)


@pytest.mark.parametrize("name", CALLS)
def test_without_create_graph_nothing_requires_grad(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("perceptron")
    plain = CALLS[name][0].__closure__[0].cell_contents  # pyright: ignore[reportOptionalSubscript]
    if name == "solve":
        found = solve(jacops.ggn(case.model, mse_loss, case.x, case.y), case.v, damping=torch.tensor(0.5)).x
    else:
        found = plain(case, {"fallback": "silent"})
    assert not found.requires_grad
    torch.testing.assert_close(found, CALLS[name][0](case).detach(), rtol=1e-8, atol=1e-12)


class Once(torch.autograd.Function):
    """A square whose derivative is given once."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.linear(x))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_differentiated_twice_names_the_function(name: str) -> None:
    case = Case("perceptron")
    case.model, case.v, case.y = Squared(), draw(8), draw(5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        with pytest.raises(NotDifferentiableError, match="Once"):
            CALLS[name][0](case)
