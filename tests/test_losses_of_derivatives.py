"""Losses that hold derivatives, as they are trained: against plain autograd in float64, in at most twice its sweeps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import jacops
from jacops._runtime import engine
from jacops.errors import InputError, ModelStateError, NotDifferentiableError
from jacops.linalg import Identity, Matrix, diagonal, eigenpairs, eye, trace
from jacops.solvers import inverse, solve
from small import draw

FORWARDS: list[int] = []  # the rows of every forward


class Counted(nn.Sequential):
    """Layers that note the rows of their forwards."""

    def forward(self, input: Tensor) -> Tensor:
        FORWARDS.append(len(input))
        return super().forward(input)


def net(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
    return Counted(*layers[:-1]).double()


class Costs(NamedTuple):
    """What a call took: forwards, and backward sweeps, of which a batched pass is several."""

    forwards: int
    sweeps: int


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Costs]]:
    """Return a function that runs another, and returns its result with what it took."""
    sweeps, plain = [], torch.autograd.grad

    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        many = [len(rows) for rows in grad_outputs or () if rows is not None] if kwargs.get("is_grads_batched") else [1]
        sweeps.append(many[0])
        return plain(outputs, inputs, grad_outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(engine, "_engine", None)  # so that all passes go by `grad`

    def run(call: Callable[[], Any]) -> tuple[Any, Costs]:
        FORWARDS.clear()
        sweeps.clear()
        found = call()
        return found, Costs(len(FORWARDS), sum(sweeps))

    return run


def gradient(loss: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, wrt, materialize_grads=True))


def rows(values: Tensor, x: Tensor) -> Tensor:
    """Return the Jacobian of every sample, by a sweep for each output."""
    return torch.stack([torch.autograd.grad(v.sum(), x, create_graph=True)[0] for v in values.unbind(1)], 1)


def contractive(model: nn.Module, x: Tensor, jacobian: Callable[[Tensor], Tensor]) -> Tensor:
    encoder, decoder = model[0], model[1]  # pyright: ignore[reportIndexIssue]
    return mse_loss(decoder(encoder(x)), x) + 0.1 * jacobian(x).square().sum((1, 2)).mean()


def autoencoder() -> nn.Module:
    return nn.ModuleList([net(6, 8, 3), net(3, 8, 6)])


def autoencoder_losses(by_hand: bool) -> tuple[Callable[[], list[Tensor]], nn.Module]:
    """A contractive autoencoder (Rifai et al., 2011)."""
    model, x = autoencoder(), draw(12, 6)

    def by_autograd(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return rows(model[0](x), x)  # pyright: ignore[reportIndexIssue]

    def by_library(x: Tensor) -> Tensor:
        return jacops.compute_jacobian(model[0], x, create_graph=True)  # pyright: ignore[reportIndexIssue]

    loss = by_autograd if by_hand else by_library
    return lambda: gradient(contractive(model, x, loss), list(model.parameters())), model


def penalty_losses(by_hand: bool) -> tuple[Callable[[], list[Tensor]], nn.Module]:
    """A classifier with the norm of its Jacobian in the loss (Hoffman, Roberts and Yaida, 2019)."""
    model, x, y = net(5, 9, 4), draw(10, 5).requires_grad_(), torch.arange(10) % 4

    def loss() -> Tensor:
        own = rows(model(x), x) if by_hand else jacops.compute_jacobian(model, x, create_graph=True)
        return cross_entropy(model(x), y) + 0.01 * own.square().sum()

    return lambda: gradient(loss(), [x, *model.parameters()]), model


def poisson_losses(by_hand: bool) -> tuple[Callable[[], list[Tensor]], nn.Module]:
    """One step of a physics-informed network: the residual of a Poisson equation (Raissi et al., 2019)."""
    model, x = net(2, 8, 8, 1), draw(11, 2)
    source = torch.sin(x.sum(1, keepdim=True))

    def by_autograd() -> Tensor:
        place = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(place).sum(), place, create_graph=True)
        parts = [torch.autograd.grad(slope[:, j].sum(), place, create_graph=True)[0][:, j] for j in range(2)]
        return torch.stack(parts).sum(0).unsqueeze(1)

    def step() -> list[Tensor]:
        found = by_autograd() if by_hand else jacops.laplacian(model, x, create_graph=True)
        before = [p.detach().clone() for p in model.parameters()]
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        grads = gradient((found - source).square().mean(), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        optimiser.step()
        after = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        return after

    return step, model


def meta_losses(by_hand: bool) -> tuple[Callable[[], list[Tensor]], nn.Module]:
    """Two inner steps of model-agnostic meta-learning (Finn, Abbeel and Levine, 2017), and the outer gradient."""
    model, (x, y), (test_x, test_y) = (
        net(3, 6, 2),
        (draw(7, 3), draw(7, 2, seed=1)),
        (draw(5, 3, seed=2), draw(5, 2, seed=3)),
    )

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_call(model, params, (x,)), y)

    def slopes(params: dict[str, Tensor]) -> Any:
        if by_hand:
            return torch.autograd.grad(loss(params, x, y), list(params.values()), create_graph=True)
        one = torch.ones((), dtype=torch.float64)
        return jacops.model_vjp(jacops.Function(loss, params), (x, y), one, create_graph=True)

    def outer() -> list[Tensor]:
        params: dict[str, Any] = dict(model.named_parameters())
        for _ in range(2):
            pairs = zip(params.items(), slopes(params), strict=True)
            params = {name: p - 0.1 * g for (name, p), g in pairs}
        return gradient(loss(params, test_x, test_y), list(model.parameters()))

    return outer, model


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Return the solution of a positive definite system, to 1e-12."""
    x, rest = torch.zeros_like(b), b.clone()
    direction = rest.clone()
    while float(rest.norm()) > 1e-12 * float(b.norm()):
        image = product(direction)
        step = (rest @ rest) / (direction @ image)
        x, new = x + step * direction, rest - step * image
        direction, rest = new + (new @ new) / (rest @ rest) * direction, new
    return x


def implicit_losses(by_hand: bool, dense: bool = True) -> tuple[Callable[[], list[Tensor]], nn.Module]:
    """The hypergradient of weight decay, through the step of Gauss and Newton that it damps.

    By hand it is solved for densely, which autograd differentiates, or as the library does it: with the implicit
    function theorem, and conjugate gradients whose products are two backward passes over a recorded one.
    """
    model, x, y = net(3, 4, 1), draw(9, 3), draw(9, 1, seed=1)
    decay = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weights = list(model.parameters())

    def dense_step(slope: Tensor) -> Tensor:
        output = model(x)
        jacobian = torch.stack([flat(torch.autograd.grad(z, weights, create_graph=True)) for z in output[:, 0]])
        return torch.linalg.solve(jacobian.T @ jacobian * (2 / 9) + decay * torch.eye(len(slope)).double(), slope)

    def iterated_step(slope: Tensor) -> Tensor:
        output, u = model(x), torch.zeros(9, 1).double().requires_grad_()
        pulled = flat(torch.autograd.grad(output, weights, u, create_graph=True))

        def product(v: Tensor, kept: bool = False) -> Tensor:
            (change,) = torch.autograd.grad(pulled, u, v, retain_graph=True, create_graph=kept)
            image = torch.autograd.grad(output, weights, change * (2 / 9), retain_graph=True, create_graph=kept)
            return flat(image) + decay * v if kept else (flat(image) + decay * v).detach()

        step = conjugate_gradients(product, slope.detach())
        residual = slope - product(step, kept=True)
        residual.register_hook(lambda grad: conjugate_gradients(product, grad))
        return step + residual - residual.detach()

    def library_step(slope: Tensor) -> Tensor:
        curvature = jacops.ggn(model, mse_loss, x, y, create_graph=True)
        return solve(curvature, slope, jacops.solvers.CG(tolerance=1e-12), damping=decay, create_graph=True).x[0]

    def loss() -> Tensor:
        slope = flat(torch.autograd.grad(mse_loss(model(x), y), weights, create_graph=True))
        slope = slope + decay * flat(weights)
        step = (dense_step if dense else iterated_step)(slope) if by_hand else library_step(slope)
        moved = torch.split(flat(weights) - step, [p.numel() for p in weights])
        params = {n: m.view_as(p) for (n, p), m in zip(model.named_parameters(), moved, strict=True)}
        return mse_loss(functional_call(model, params, (draw(6, 3, seed=4),)), draw(6, 1, seed=5))

    return lambda: gradient(loss(), [decay, *weights]), model


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


LOSSES = [autoencoder_losses, penalty_losses, poisson_losses, meta_losses, implicit_losses]


@pytest.mark.parametrize("losses", LOSSES)
def test_training_with_derivatives_in_the_loss(losses: Any, count: Any) -> None:
    right, by_hand = count(losses(by_hand=True)[0])
    if losses is implicit_losses:
        _, by_hand = count(losses(by_hand=True, dense=False)[0])
    call, _model = losses(by_hand=False)
    call()  # what is proved once of a model is remembered with it
    found, own = count(call)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert max(float(g.abs().max()) for g in right) > 1e-3
    assert own.forwards <= 2 * by_hand.forwards, (own, by_hand)
    assert own.sweeps <= 2 * by_hand.sweeps, (own, by_hand)


# ---- solutions ---------------------------------------------------------------------------------------------------


def system(symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    matrix = draw(6, 6)
    matrix = matrix @ matrix.T + torch.eye(6).double() if symmetric else matrix + 4 * torch.eye(6).double()
    damping = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    return matrix.requires_grad_(), draw(3, 6, seed=1).requires_grad_(), damping


def as_operator(matrix: Tensor, symmetric: bool) -> Matrix:
    return Matrix(matrix, symmetric=symmetric, positive=symmetric)


WAYS: dict[str, Callable[[Any, Tensor, Tensor, Any], Tensor]] = {
    "damping": lambda A, b, s, solver: solve(A, b, solver, damping=s, create_graph=True).x,
    "identity": lambda A, b, s, solver: solve(A + s * Identity(A.domain), b, solver, create_graph=True).x,
    "eye": lambda A, b, s, solver: solve(A + s * eye, b, solver, create_graph=True).x,
    "inverse": lambda A, b, s, solver: (inverse(A, solver, damping=s, create_graph=True) @ b.T).T,
    "transposed": lambda A, b, s, solver: (inverse(A.T, solver, damping=s, create_graph=True).T @ b.T).T,
}


@pytest.mark.parametrize(("solver", "symmetric"), [("direct", False), ("auto", False), ("direct", True), ("cg", True)])
@pytest.mark.parametrize("way", WAYS)
def test_a_solution_is_differentiable_by_all_that_it_is_made_of(way: str, solver: str, symmetric: bool) -> None:
    matrix, b, s = system(symmetric)
    recipe = jacops.solvers.CG(tolerance=1e-13) if solver == "cg" else solver
    found = WAYS[way](as_operator(matrix, symmetric), b, s, recipe)
    right = torch.linalg.solve(matrix + s * torch.eye(6).double(), b.T).T
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-9)
    weight = draw(3, 6, seed=2)
    pairs = [gradient((x * weight).sum() + x.square().sum(), [b, s, matrix]) for x in (found, right)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_backward_solves_once_and_multiplies_once() -> None:
    matrix, b, _ = system(symmetric=True)
    operator = inverse(as_operator(matrix, True), jacops.solvers.CG(), create_graph=True)
    x = operator.solve(b).x
    solves, plain = [], type(operator.prepared).solve
    before = operator.prepared.system.products
    operator.prepared.solve = lambda rows: (solves.append(len(rows)), plain(operator.prepared, rows))[1]  # pyright: ignore
    gradient(x.sum(), [matrix, b])
    assert solves == [3]
    assert operator.prepared.system.products > before


def test_the_derivative_of_a_solution_is_given_once() -> None:
    matrix, b, _ = system(symmetric=True)
    x = solve(as_operator(matrix, True), b, create_graph=True).x
    with pytest.raises(NotDifferentiableError, match="ImplicitSolution"):
        torch.autograd.grad(x.sum(), matrix, create_graph=True)
    assert not solve(as_operator(matrix, True), b, damping=torch.tensor(0.5)).x.requires_grad


# ---- models ------------------------------------------------------------------------------------------------------


def test_a_hidden_layer_leads_back_to_the_layers_before_it() -> None:
    model, x = net(3, 4, 4, 2), draw(5, 3).requires_grad_()
    found = jacops.compute_jacobian(model, x, at="1", create_graph=True)
    hidden = model[:2](x)  # pyright: ignore[reportIndexIssue]
    leaf = hidden.view_as(hidden)
    right = rows(model[2:](leaf), leaf)  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(found, right)
    wrt = [x, *model.parameters()]
    for one, other in zip(gradient(found.square().sum(), wrt), gradient(right.square().sum(), wrt), strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_that_are_not_differentiated_receive_gradients_too() -> None:
    model, x = net(3, 4, 2), draw(5, 3)
    found = jacops.modjac(model, x, parameters="2.*", create_graph=True, flatten=True)
    last = list(model.parameters())[2:]
    right = torch.stack([flat(torch.autograd.grad(z, last, create_graph=True)) for z in model(x).reshape(-1)])
    wrt = list(model.parameters())
    for one, other in zip(gradient(found.pow(3).sum(), wrt), gradient(right.pow(3).sum(), wrt), strict=True):
        torch.testing.assert_close(one, other)


def test_random_layers_draw_the_same() -> None:
    model, x, y, v = (
        nn.Sequential(net(3, 8), nn.Dropout(0.5), net(8, 2)),
        draw(6, 3),
        draw(6, 2, seed=1),
        draw(50, seed=2),
    )
    wrt = list(model.parameters())
    torch.manual_seed(5)
    found = jacops.hvp(model, mse_loss, x, y, v, create_graph=True)
    torch.manual_seed(5)
    slope = flat(torch.autograd.grad(mse_loss(model(x), y), wrt, create_graph=True))
    right = flat(torch.autograd.grad(slope @ v, wrt, create_graph=True, materialize_grads=True))
    torch.testing.assert_close(found, right)
    for one, other in zip(gradient(found.pow(3).sum(), wrt), gradient(right.pow(3).sum(), wrt), strict=True):
        torch.testing.assert_close(one, other)


def test_samples_draw_the_same_masks_with_a_graph() -> None:
    model, x, y = nn.Sequential(net(3, 8), nn.Dropout(0.5), net(8, 2)), draw(6, 3), draw(6, 2, seed=1)
    options: dict[str, Any] = {"randomness": "same", "seed": 3}
    plain = jacops.sample_gradients(model, mse_loss, x, y, **options).dense()
    kept = jacops.sample_gradients(model, mse_loss, x, y, create_graph=True, **options).dense()
    torch.testing.assert_close(kept.detach(), plain)


def test_batch_statistics_are_those_of_eval_mode() -> None:
    model, x = nn.Sequential(net(3, 4), nn.BatchNorm1d(4).double(), net(4, 2)), draw(5, 3)
    model(draw(20, 3, seed=3))
    found = jacops.compute_jacobian(model, x, create_graph=True)
    assert model.training
    model.eval()
    place = x.clone().requires_grad_()
    right, wrt = rows(model(place), place), list(model.parameters())
    for one, other in zip(gradient(found.pow(3).sum(), wrt), gradient(right.pow(3).sum(), wrt), strict=True):
        torch.testing.assert_close(one, other)


def test_an_operator_with_a_graph_is_spoiled_by_a_step() -> None:
    model, x, y = net(3, 4, 2), draw(5, 3), draw(5, 2, seed=1)
    H = jacops.hessian(model, mse_loss, x, y, create_graph=True)
    with torch.no_grad():
        model[2].weight.add_(1.0)  # pyright: ignore
    with pytest.raises(NotDifferentiableError, match="modified by an inplace operation"):
        H @ draw(26)


@pytest.mark.parametrize("option", [{"mode": "split"}, {"compile": True}, {"out": torch.empty(5, 2, 3)}])
def test_results_written_in_place_have_no_graph(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="create_graph=True"):
        jacops.compute_jacobian(net(3, 4, 2), draw(5, 3), create_graph=True, **option)


def test_matrices_written_in_place_have_no_graph() -> None:
    J = jacops.jacobian(net(3, 4, 2), draw(5, 3), create_graph=True)
    with pytest.raises(InputError, match="not written in place"):
        J.dense(out=torch.empty(J.shape, dtype=torch.float64))


def test_script_modules_have_no_graph_to_their_parameters() -> None:
    model = torch.jit.script(nn.Linear(3, 2).double())
    for call in (jacops.compute_jacobian, jacops.sample_jacobians, jacops.jacobian):
        with pytest.raises(ModelStateError, match="create_graph=True"):
            call(model, draw(5, 3), create_graph=True)


def test_numbers_that_sum_up_an_operator_have_no_graph() -> None:
    model, x = net(3, 4, 2), draw(5, 3)
    J, plain = jacops.jacobian(model, x, create_graph=True), jacops.jacobian(model, x)
    A, right = J.T @ J, plain.T @ plain
    assert float(trace(A)) == pytest.approx(float(trace(right)))
    torch.testing.assert_close(diagonal(A), diagonal(right))
    torch.testing.assert_close(eigenpairs(A, 2).values, eigenpairs(right, 2).values)
    assert not solve(A, draw(26), damping=0.5).x.requires_grad
    assert (A.to_scipy() @ draw(26).numpy()).shape == (26,)
