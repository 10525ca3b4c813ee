"""Products with Jacobians and curvature of one model: what does one cost, cold and repeated, and many at once?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.nn.functional import cross_entropy

import jacops

from .harness import Workload, same
from .models import mlp

Tree = dict[str, Tensor]


class Case:
    """The model of cases C and D, its data, and random vectors."""

    def __init__(self) -> None:
        self.model = mlp(256, 768, 768, 256, 10)
        torch.manual_seed(2)
        self.x, self.y = torch.randn(256, 256), torch.randint(10, (256,))
        self.params = dict(self.model.named_parameters())
        self.v = {n: torch.randn_like(p) for n, p in self.params.items()}
        self.u = torch.randn(256, 10)
        self.flat = torch.cat([t.flatten() for t in self.v.values()])
        self.many = torch.randn(16, len(self.flat))

    def output(self, params: Tree) -> Tensor:
        """Return the model's output as a function of its parameters."""
        return functional_call(self.model, params, (self.x,))

    def loss(self, params: Tree) -> Tensor:
        """Return the loss as a function of the parameters."""
        return cross_entropy(self.output(params), self.y)

    def tree(self, flat: Tensor) -> Tree:
        """Return a flat vector as tensors by name."""
        sizes = [p.numel() for p in self.params.values()]
        parts = zip(self.params.items(), flat.split(sizes), strict=True)
        return {n: part.reshape(p.shape) for (n, p), part in parts}


def flat(tree: Tree) -> Tensor:
    """Return tensors by name as one vector."""
    return torch.cat([t.flatten() for t in tree.values()])


def workloads() -> Iterator[Workload]:
    """Yield the cases C1 to C3, D1 and D2."""
    c = Case()
    params, listed = list(c.params.values()), list(c.v.values())
    J = jacops.jacobian(c.model, c.x)
    pushed, repeated = linearize(c.output, c.params)
    del pushed
    rivals: dict[str, Callable[[], Any]] = {
        "jacops: J @ v": lambda: (J @ c.flat).reshape(256, 10),
        "jacops: jacobian(…) @ v, cold": lambda: (jacops.jacobian(c.model, c.x) @ c.flat).reshape(256, 10),
        "jacops.jvp, closure": lambda: jacops.jvp(lambda: c.model(c.x), params, listed),
        "torch.func.jvp": lambda: jvp(c.output, (c.params,), (c.v,))[1],
        "torch.func.linearize, applied": lambda: repeated(c.v),
    }
    yield Workload("C1", "one J v, 2,560 outputs, 987,402 parameters", rivals, same())
    _, back = vjp(c.output, c.params)
    rivals = {
        "jacops: J.T @ u": lambda: J.T @ c.u.flatten(),
        "jacops.vjp, closure": lambda: torch.cat([g.flatten() for g in jacops.vjp(lambda: c.model(c.x), params, c.u)]),
        "torch.func.vjp, applied": lambda: flat(back(c.u)[0]),
        "torch.autograd.grad": lambda: torch.cat([g.flatten() for g in torch.autograd.grad(c.model(c.x), params, c.u)]),
    }
    yield Workload("C2", "one Jᵀ u", rivals, same())
    rivals = {
        "jacops: 16 J v": lambda: J.apply(c.many),
        "torch.func, vmap(jvp)": lambda: vmap(lambda v: jvp(c.output, (c.params,), (c.tree(v),))[1])(c.many),
    }
    yield Workload("C3", "16 J v", rivals, same())
    H = jacops.hessian(c.model, cross_entropy, c.x, c.y)
    G = jacops.ggn(c.model, cross_entropy, c.x, c.y)
    rivals = {
        "jacops: H @ v": lambda: H @ c.flat,
        "jacops: hessian(…) @ v, cold": lambda: jacops.hvp(c.model, cross_entropy, c.x, c.y, c.flat),
        "torch.func, jvp of grad": lambda: flat(jvp(grad(c.loss), (c.params,), (c.v,))[1]),
    }
    yield Workload("D1", "one H v", rivals, same(), goals={"torch.func, jvp of grad": 1.7})

    def by_functions() -> Tensor:
        output, push = jvp(c.output, (c.params,), (c.v,))
        inner = jvp(grad(lambda z: cross_entropy(z, c.y)), (output,), (push,))[1]
        return flat(vjp(c.output, c.params)[1](inner)[0])

    rivals = {"jacops: G @ v": lambda: G @ c.flat, "torch.func, jvp and vjp": by_functions}
    yield Workload("D2", "one Gauss-Newton product", rivals, same())
