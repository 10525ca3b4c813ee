"""Losses that hold derivatives: one gradient of each, beside the same sweeps written by hand with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import jacops

from .harness import Goal, Workload, same
from .models import flat, mlp

HAND = "torch.autograd: by hand"
GOALS = [Goal(HAND, faster=0.5)]
RESIDUAL = 1e-8  # to which both solve for the step of K5, relative to the right-hand side


def gradient(loss: Tensor, wrt: Sequence[Tensor]) -> Tensor:
    """Return the gradient by all of these as one vector."""
    return flat(torch.autograd.grad(loss, wrt, materialize_grads=True))


def rows(model: nn.Module, x: Tensor) -> Tensor:
    """Return the Jacobian of every sample with its graph, by a sweep for each output."""
    leaf = x.detach().requires_grad_()
    output = model(leaf)
    slopes = [torch.autograd.grad(v.sum(), leaf, create_graph=True)[0] for v in output.unbind(1)]
    return torch.stack(slopes, 1)


def two(name: str, what: str, ours: str, call: Callable[[Any], Tensor], ways: Sequence[Any], close: float) -> Workload:
    """Return the workload of a loss that the library's way and the other one go into."""
    rivals = {f"jacops: {ours}": lambda: call(ways[0]), HAND: lambda: call(ways[1])}
    return Workload(name, what, rivals, same(close), goals=GOALS)


def contractive(n: int, *widths: int) -> Workload:
    """Return K1: a contractive autoencoder (Rifai et al., 2011)."""
    encoder, decoder = mlp(*widths, act=nn.Tanh), mlp(*widths[::-1], act=nn.Tanh)
    x, wrt = torch.rand(n, widths[0]), [*encoder.parameters(), *decoder.parameters()]

    def call(jacobian: Callable[[], Tensor]) -> Tensor:
        penalty = jacobian().square().sum((1, 2)).mean()
        return gradient(mse_loss(decoder(encoder(x)), x) + 0.1 * penalty, wrt)

    ways = (lambda: jacops.compute_jacobian(encoder, x, create_graph=True), lambda: rows(encoder, x))
    return two("K1", "contractive autoencoder", "compute_jacobian", call, ways, 1e-4)


def penalty(n: int, *widths: int) -> Workload:
    """Return K2: a classifier with the norm of its Jacobian in the loss (Hoffman, Roberts and Yaida, 2019)."""
    model, x, y = mlp(*widths, act=nn.Tanh), torch.randn(n, widths[0]), torch.arange(n) % widths[-1]

    def call(jacobian: Callable[[], Tensor]) -> Tensor:
        return gradient(cross_entropy(model(x), y) + 0.01 * jacobian().square().sum() / n, list(model.parameters()))

    ways = (lambda: jacops.compute_jacobian(model, x, create_graph=True), lambda: rows(model, x))
    return two("K2", "Jacobian penalty", "compute_jacobian", call, ways, 1e-4)


def poisson(n: int, *widths: int) -> Workload:
    """Return K3: the residual of a Poisson equation, as physics-informed networks have it (Raissi et al., 2019)."""
    model, x = mlp(*widths, act=nn.Tanh), torch.rand(n, widths[0])
    source = torch.sin(x.sum(1, keepdim=True))

    def by_hand() -> Tensor:
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        second = [torch.autograd.grad(s.sum(), leaf, create_graph=True)[0][:, j] for j, s in enumerate(slope.unbind(1))]
        return torch.stack(second).sum(0).unsqueeze(1)

    def call(laplacian: Callable[[], Tensor]) -> Tensor:
        return gradient((laplacian() - source).square().mean(), list(model.parameters()))

    ways = (lambda: jacops.laplacian(model, x, create_graph=True), by_hand)
    return two("K3", "residual of a Poisson equation", "laplacian", call, ways, 1e-4)


def meta(n: int, *widths: int) -> Workload:
    """Return K4: two inner steps of model-agnostic meta-learning (Finn, Abbeel and Levine, 2017)."""
    model = mlp(*widths, act=nn.Tanh)
    (x, y), (test_x, test_y) = ((torch.randn(n, widths[0]), torch.randn(n, widths[-1])) for _ in range(2))
    one = torch.ones(())

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_call(model, params, (x,)), y)

    def by_hand(params: dict[str, Tensor]) -> Any:
        return torch.autograd.grad(loss(params, x, y), list(params.values()), create_graph=True)

    def call(slopes: Callable[[dict[str, Tensor]], Any]) -> Tensor:
        params: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(2):
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), slopes(params), strict=True)}
        return gradient(loss(params, test_x, test_y), list(model.parameters()))

    def closure(params: dict[str, Tensor]) -> Any:
        return jacops.vjp(lambda: loss(params, x, y), params.values(), one, create_graph=True)

    def function(params: dict[str, Tensor]) -> Any:
        return jacops.model_vjp(jacops.Function(loss, params), (x, y), one, create_graph=True)

    found = two("K4", "two steps of MAML", "vjp, closure", call, (closure, by_hand), 1e-4)
    return replace(found, rivals={**found.rivals, "jacops: model_vjp of a Function": lambda: call(function)})


def solved(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Return the solution of a positive definite system by conjugate gradients."""
    x, rest = torch.zeros_like(b), b.clone()
    direction, size = rest.clone(), rest @ rest
    least = RESIDUAL**2 * float(size)
    while float(size) > least:
        image = product(direction)
        step = size / (direction @ image)
        x, rest, before = x + step * direction, rest - step * image, size
        size = rest @ rest
        direction = rest + size / before * direction
    return x


def hypergradient(n: int, *widths: int) -> Workload:
    """Return K5: the gradient by weight decay through the Gauss-Newton step that it damps, by the implicit function.

    By hand the products of conjugate gradients are two sweeps over a recorded one, forward and backward.
    """
    model = mlp(*widths, act=nn.Tanh).double()
    (x, y), (test_x, test_y) = (
        (torch.randn(n, widths[0]).double(), torch.randn(n, widths[-1]).double()) for _ in range(2)
    )
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weights: list[Tensor] = list(model.parameters())

    def ours(slope: Tensor) -> Tensor:
        G = jacops.ggn(model, mse_loss, x, y, create_graph=True)
        return jacops.solve(G, slope, jacops.solvers.CG(tolerance=RESIDUAL), damping=decay, create_graph=True).x[0]

    def by_hand(slope: Tensor) -> Tensor:
        output = model(x)
        u = torch.zeros_like(output, requires_grad=True)
        pulled = flat(torch.autograd.grad(output, weights, u, create_graph=True))

        def product(v: Tensor, kept: bool = False) -> Tensor:
            (change,) = torch.autograd.grad(pulled, u, v, retain_graph=True, create_graph=kept)
            scaled = change * (2 / output.numel())
            image = flat(torch.autograd.grad(output, weights, scaled, retain_graph=True, create_graph=kept))
            return image + decay * v if kept else (image + decay * v).detach()

        step = solved(product, slope.detach())
        residual = slope - product(step, kept=True)
        residual.register_hook(lambda grad: solved(product, grad))
        return step + residual - residual.detach()

    def call(step: Callable[[Tensor], Tensor]) -> Tensor:
        slope = flat(torch.autograd.grad(mse_loss(model(x), y), weights, create_graph=True)) + decay * flat(weights)
        moved = torch.split(flat(weights) - step(slope), [p.numel() for p in weights])
        params = {name: m.view_as(p) for (name, p), m in zip(model.named_parameters(), moved, strict=True)}
        return gradient(mse_loss(functional_call(model, params, (test_x,)), test_y), [decay, *weights])

    return two("K5", "hypergradient of weight decay", "ggn, solve", call, (ours, by_hand), 1e-5)


def workloads() -> Iterator[Workload]:
    """Yield the cases K1 to K5."""
    yield contractive(128, 256, 128, 32)
    yield penalty(256, 64, 128, 128, 10)
    yield poisson(1024, 2, 64, 64, 64, 1)
    yield meta(64, 16, 64, 64, 4)
    yield hypergradient(512, 32, 128, 128, 1)
