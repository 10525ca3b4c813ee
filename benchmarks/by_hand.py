"""The shortest programs in plain PyTorch that give some of the answers: for these models only, without any check.

What they take is what a call of jacops cannot get below without other arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, softmax, unfold

from .models import Case, flat

HAND = "by hand: "  # begins the names of contenders that are in this module


def input_rows(model: nn.Module, x: Tensor, many: int) -> Callable[[], Tensor]:
    """Return Jacobians by inputs, `(n, k, *input)`: so many samples at a time, a backward pass for each output."""
    with torch.no_grad():
        outputs = model(x[:1]).shape[1]

    def run() -> Tensor:
        found = x.new_empty(len(x), outputs, *x.shape[1:])
        for part, out in zip(x.split(many), found.split(many), strict=True):
            leaf = part.detach().requires_grad_()
            for k, column in enumerate(model(leaf).sum(0).unbind()):
                out[:, k] = grad(column, leaf, retain_graph=k + 1 < outputs)[0]
        return found

    return run


def parameter_rows(model: nn.Module, x: Tensor, seeds: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return `(n * k, P)`: products of what a layer's weight meets, written to their places.

    Args:
        model: Linear layers and convolutions with kernels of 3 × 3 and a padding of 1, all with a bias.
        x: The samples.
        seeds: Returns cotangents `(k, n, outputs)` for the output; those of single outputs by default.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    met: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        met[layer] = args[0].detach(), output

    handles = [layer.register_forward_hook(note) for layer in layers]
    output = model(x)
    for handle in handles:
        handle.remove()
    outputs = [met[layer][1] for layer in layers]
    given = torch.eye(output.shape[1])[:, None].expand(-1, len(x), -1) if seeds is None else seeds(output)
    found = x.new_empty(len(x), len(given), sum(p.numel() for p in model.parameters()))
    entered = [met[la][0] if isinstance(la, nn.Linear) else unfold(met[la][0], 3, padding=1).mT for la in layers]
    for k, seed in enumerate(given):
        start = 0
        for layer, inner, slope in zip(layers, entered, grad(output, outputs, seed, retain_graph=True), strict=True):
            rows = found[:, k, start : start + layer.weight.numel()].unflatten(1, (len(layer.weight), -1))
            after = start + layer.weight.numel()
            biased = found[:, k, after : after + len(layer.weight)]
            if isinstance(layer, nn.Linear):
                torch.mul(slope[:, :, None], inner[:, None], out=rows)
                biased.copy_(slope)
            else:
                rows.copy_(torch.bmm(slope.flatten(2), inner))
                torch.sum(slope, (2, 3), out=biased)
            start = after + len(layer.weight)
    return found.flatten(0, 1)


def gauss_newton_matrix(c: Case) -> Tensor:
    """Return the Gauss-Newton matrix of a classifier: rows scaled by a root of the loss's Hessian, and one product."""

    def roots(output: Tensor) -> Tensor:
        p = softmax(output.detach(), 1)
        root = p.sqrt()
        return ((torch.diag_embed(root) - p[:, :, None] * root[:, None]) / len(p) ** 0.5).movedim(2, 0)

    rows = parameter_rows(c.model, c.x, roots)
    return rows.T @ rows


def kept_vjp(model: nn.Module, x: Tensor, u: Tensor) -> Callable[[], Tensor]:
    """Return Jᵀ u of a graph that is kept."""
    params = list(model.parameters())
    output = cache(lambda: model(x))
    return lambda: flat(grad(output(), params, u, retain_graph=True))


def kept_hvp(c: Case, vs: Tensor) -> Callable[[], Tensor]:
    """Return products of the Hessian with rows, by the graph of a gradient that is kept."""
    params = list(c.model.parameters())
    slope = cache(lambda: flat(grad(cross_entropy(c.model(c.x), c.y), params, create_graph=True)))
    return lambda: torch.stack([flat(grad(slope(), params, v, retain_graph=True)) for v in vs])


def kept_ggnvp(c: Case, vs: Tensor) -> Callable[[], Tensor]:
    """Return products of the Gauss-Newton matrix with rows: pushed by a backward pass that was recorded, and pulled."""
    params = list(c.model.parameters())

    @cache
    def recorded() -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        output = c.model(c.x)
        seed = torch.zeros_like(output, requires_grad=True)
        return output, seed, grad(output, params, seed, create_graph=True), softmax(output.detach(), 1)

    def run() -> Tensor:
        output, seed, pulled, p = recorded()
        found = list[Tensor]()
        for v in vs:
            pushed = grad(pulled, seed, list(c.tree(v).values()), retain_graph=True)[0]
            inner = p * (pushed - (p * pushed).sum(1, keepdim=True)) / len(p)
            found.append(flat(grad(output, params, inner, retain_graph=True)))
        return torch.stack(found)

    return run
