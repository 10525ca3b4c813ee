"""Products with Jacobians and curvature of one model: what does one cost, cold and repeated, and many at once?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, linearize, vjp, vmap
from torch.nn.functional import cross_entropy

import jacops

from .by_hand import HAND, kept_ggnvp, kept_hvp, kept_vjp
from .harness import Goal, Workload, curvlinops_module, same
from .models import Case, Tree, flat, mlp


class Products(Case):
    """A perceptron, vectors to multiply by, and what the products cost at least.

    Args:
        widths: Of its layers.
        n: How many samples.
    """

    def __init__(self, *widths: int, n: int) -> None:
        super().__init__(mlp(*widths), n, widths[0], widths[-1])
        self.u = torch.randn(self.shape)
        self.v = torch.randn(len(self.theta))
        self.dense = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
        self.inner = self.dense - widths[0] * widths[1]  # layers whose input moves with the parameters
        self.listed = list(self.model.parameters())

    @property
    def vectors(self) -> list[Tensor]:
        """The direction, parameter by parameter."""
        return list(self.tree(self.v).values())

    def flops(self, products: int, dense: int, inner: int) -> float:
        """Return the operations of so many products that pass all layers, or all but the first, so often."""
        return 2.0 * self.shape[0] * products * (dense * self.dense + inner * self.inner)

    def many(self, count: int) -> Tensor:
        """Return directions as rows."""
        return torch.randn(count, len(self.v), generator=torch.Generator().manual_seed(4))


def curvlinops(c: Products, name: str, vectors: Tensor) -> Callable[[], Tensor]:
    """Return products of an operator of curvlinops, built once, with a vector or columns."""

    @cache
    def operator() -> Any:
        losses = [] if name == "JacobianLinearOperator" else [torch.nn.CrossEntropyLoss()]
        options = {"check_deterministic": False, "num_data": len(c.x)}
        return getattr(curvlinops_module(), name)(c.model, *losses, c.listed, [(c.x, c.y)], **options)

    return lambda: (operator() @ vectors).movedim(-1, 0)


def jacobian(c: Products) -> Iterator[Workload]:
    """Yield C0 to C2: building the operator, one J v, one Jᵀ u."""

    def forwards() -> None:
        for _ in range(3):
            c.model(c.x)

    rivals: dict[str, Callable[[], Any]] = {
        "jacops: jacobian(…), built": lambda: jacops.jacobian(c.model, c.x),
        "torch.nn: three forward passes": forwards,
        "torch.func: linearize, built": lambda: linearize(c.output, c.params),
    }
    what = f"building the Jacobian, {c.u.numel():,} × {len(c.v):,}"
    yield Workload("C0", what, rivals, goals={"torch.nn: three forward passes": 1})
    J, tangent = jacops.jacobian(c.model, c.x), c.tree(c.v)
    rivals = {
        "jacops: J @ v": lambda: J @ c.v,
        "jacops: jacobian(…) @ v, cold": lambda: jacops.jacobian(c.model, c.x) @ c.v,
        "jacops.jvp, closure": lambda: jacops.jvp(lambda: c.model(c.x), c.listed, c.vectors),
        "torch.func: jvp": lambda: jvp(c.output, (c.params,), (tangent,))[1],
        "torch.func: linearize, applied": linearized(c, tangent),
        "curvlinops: Jacobian": curvlinops(c, "JacobianLinearOperator", c.v),
        "torch-secorder: jvp": lambda: secorder("jvp", c, c.vectors),
    }
    goals = [
        Goal("torch.func: linearize, applied", faster=1 / 1.1),
        Goal("torch.func: jvp", faster=1 / 1.1, ours="jacops: jacobian(…) @ v, cold"),
        Goal("torch-secorder: jvp", faster=800, ours="jacops.jvp, closure"),
    ]
    yield Workload("C1", "one J v", rivals, same(), goals=goals, flops=c.flops(1, 1, 1))
    back = vjp(c.output, c.params)[1]
    rivals = {
        "jacops: J.T @ u": lambda: J.T @ c.u.flatten(),
        "jacops.vjp, closure": lambda: flat(jacops.vjp(lambda: c.model(c.x), c.listed, c.u)),
        "torch.func: vjp, applied": lambda: flat(back(c.u)[0]),
        "torch.autograd: grad": lambda: flat(torch.autograd.grad(c.model(c.x), c.listed, c.u)),
        "torch-secorder: vjp": lambda: flat(secorder("vjp", c, c.u)),
        f"{HAND}over a kept graph": kept_vjp(c.model, c.x, c.u),
    }
    bound = {"flops": c.flops(1, 1, 1), "result_bytes": c.v.nbytes}
    yield Workload("C2", "one Jᵀ u", rivals, same(), goals={"torch-secorder: vjp": 1.6}, **bound)


def linearized(c: Products, tangent: Tree) -> Callable[[], Tensor]:
    """Return a product with a Jacobian that `torch.func.linearize` keeps."""
    built = cache(lambda: linearize(c.output, c.params)[1])
    return lambda: built()(tangent)


def secorder(name: str, c: Products, vectors: Any) -> Any:
    """Return a product by torch-secorder."""
    from torch_secorder.core import gvp

    return getattr(gvp, name)(lambda: c.model(c.x), c.listed, vectors)


def many_jacobian(c: Products, count: int = 16) -> Iterator[Workload]:
    """Yield C3 and C4: many J v, many Jᵀ u."""
    J, vs = jacops.jacobian(c.model, c.x), c.many(count)
    columns = vs.T.contiguous()
    rivals: dict[str, Callable[[], Any]] = {
        "jacops: many J v": lambda: J.apply(vs),
        "curvlinops: Jacobian": curvlinops(c, "JacobianLinearOperator", columns),
        "torch.func: vmap(jvp)": lambda: vmap(lambda v: jvp(c.output_at, (c.theta,), (v,))[1])(vs),
        "torch.func: loop over linearize": loop(c, vs),
    }
    goals = [Goal("curvlinops: Jacobian", faster=1.25), Goal(mib=40)]
    yield Workload("C3", f"{count} J v", rivals, same(), goals=goals, flops=c.flops(count, 1, 1))
    us = torch.randn(count, *c.shape)
    rows, output = us.flatten(1), c.model(c.x)

    def batched() -> Tensor:
        found = torch.autograd.grad(output, c.listed, us, is_grads_batched=True, retain_graph=True)
        return torch.cat([g.flatten(1) for g in found], 1)

    def kept() -> Tensor:
        return torch.stack([flat(torch.autograd.grad(output, c.listed, u, retain_graph=True)) for u in us])

    rivals = {
        "jacops: many Jᵀ u": lambda: J.T.apply(rows),
        "torch.autograd: is_grads_batched": batched,
        "torch.autograd: loop over a kept graph": kept,
        "torch-secorder: batch_vjp": lambda: torch.cat([g.flatten(1) for g in secorder("batch_vjp", c, us)], 1),
    }
    bound = {"flops": c.flops(count, 1, 1), "result_bytes": vs.nbytes}
    yield Workload("C4", f"{count} Jᵀ u", rivals, same(), goals={"torch-secorder: batch_vjp": 1.8}, **bound)


def loop(c: Products, vs: Tensor) -> Callable[[], Tensor]:
    """Return products one after the other by `torch.func.linearize`."""
    built = cache(lambda: linearize(c.output_at, c.theta)[1])
    return lambda: torch.stack([built()(v) for v in vs])


def curvature(c: Products) -> Iterator[Workload]:
    """Yield D1 and D2: one product with the Hessian, one with the Gauss-Newton matrix."""
    H, G = (f(c.model, cross_entropy, c.x, c.y) for f in (jacops.hessian, jacops.ggn))
    cold = "jacops: hessian(…) @ v, cold"

    def hvp_secorder() -> Tensor:
        from torch_secorder.core.hvp import model_hvp

        return flat(model_hvp(c.model, cross_entropy, c.x, c.y, c.vectors))

    rivals: dict[str, Callable[[], Any]] = {
        "jacops: H @ v": lambda: H @ c.v,
        cold: lambda: jacops.hessian(c.model, cross_entropy, c.x, c.y) @ c.v,
        "curvlinops: Hessian": curvlinops(c, "HessianLinearOperator", c.v),
        "torch.func: jvp of grad": lambda: jvp(grad(c.loss_at), (c.theta,), (c.v,))[1],
        "torch-secorder: model_hvp": hvp_secorder,
        f"{HAND}twice over a kept graph": kept_hvp(c, c.v[None]),
    }
    goals = [Goal("curvlinops: Hessian", faster=2.1), Goal("curvlinops: Hessian", faster=1.3, ours=cold)]
    bound: dict[str, Any] = {"flops": c.flops(1, 2, 4), "result_bytes": c.v.nbytes}
    yield Workload("D1", "one H v", rivals, same(), goals=goals, **bound)
    rivals = {
        "jacops: G @ v": lambda: G @ c.v,
        "jacops: ggn(…) @ v, cold": lambda: jacops.ggn(c.model, cross_entropy, c.x, c.y) @ c.v,
        "curvlinops: GGN": curvlinops(c, "GGNLinearOperator", c.v),
        "torch.func: jvp, jvp of grad, vjp": lambda: gauss_newton(c, c.v),
        f"{HAND}over kept graphs": kept_ggnvp(c, c.v[None]),
    }
    bound["flops"] = c.flops(1, 2, 2)
    yield Workload("D2", "one Gauss-Newton product", rivals, same(), goals={"curvlinops: GGN": 2}, **bound)


def gauss_newton(c: Products, v: Tensor) -> Tensor:
    """Return a Gauss-Newton product by `torch.func`."""
    output, push = jvp(c.output_at, (c.theta,), (v,))
    inner = jvp(grad(lambda z: cross_entropy(z, c.y)), (output,), (push,))[1]
    return vjp(c.output_at, c.theta)[1](inner)[0]


def many_curvature(c: Products, count: int = 32) -> Iterator[Workload]:
    """Yield D3 and D4: many products with the Hessian and the Gauss-Newton matrix at once."""
    H, G = (f(c.model, cross_entropy, c.x, c.y) for f in (jacops.hessian, jacops.ggn))
    vs = c.many(count)
    columns = vs.T.contiguous()

    rivals: dict[str, Callable[[], Any]] = {
        "jacops: many H v": lambda: H.apply(vs),
        "curvlinops: Hessian": curvlinops(c, "HessianLinearOperator", columns),
        "torch.func: vmap(jvp of grad)": lambda: vmap(lambda v: jvp(grad(c.loss_at), (c.theta,), (v,))[1])(vs),
        f"{HAND}a loop over a kept graph": kept_hvp(c, vs),
    }
    goals = [Goal("curvlinops: Hessian", faster=2.2, memory=0.4)]
    bound: dict[str, Any] = {"flops": c.flops(count, 2, 4), "result_bytes": vs.nbytes}
    yield Workload("D3", f"{count} H v", rivals, same(), goals=goals, **bound)
    rivals = {
        "jacops: many G v": lambda: G.apply(vs),
        "curvlinops: GGN": curvlinops(c, "GGNLinearOperator", columns),
        "torch.func: vmap(jvp, jvp of grad, vjp)": lambda: vmap(lambda v: gauss_newton(c, v))(vs),
        f"{HAND}a loop over kept graphs": kept_ggnvp(c, vs),
    }
    bound["flops"] = c.flops(count, 2, 2)
    yield Workload("D4", f"{count} Gauss-Newton products", rivals, same(), goals={"curvlinops: GGN": 1.8}, **bound)


def workloads() -> Iterator[Workload]:
    """Yield the cases C0 to C4 and D1 to D4, all of one model."""
    c = Products(256, 768, 768, 256, 10, n=256)
    for cases in (jacobian, many_jacobian, curvature, many_curvature):
        yield from cases(c)
