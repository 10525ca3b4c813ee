"""Whole curvature matrices, the Hessian and the Gauss-Newton matrix of a small net, and diagonals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.functional import cross_entropy, one_hot

import jacops

from .by_hand import HAND, gauss_newton_matrix
from .harness import BEST, Goal, Workload, curvlinops_module, same
from .models import Case, Gated, after_step, cnn, flat, mlp

CHUNK = 256


class Batch(NamedTuple):
    """A classifier and a batch of data."""

    model: nn.Module
    x: Tensor
    y: Tensor


def row_by_row(c: Case) -> Tensor:
    """Return the Hessian by one backward pass per row, as influence packages did."""
    params = list(c.model.parameters())
    slope = flat(torch.autograd.grad(cross_entropy(c.model(c.x), c.y), params, create_graph=True))
    return torch.stack([flat(torch.autograd.grad(entry, params, retain_graph=True)) for entry in slope])


def peer(name: str, c: Case) -> Tensor:
    """Return a matrix by curvlinops: its operator times the identity."""
    params, data = list(c.model.parameters()), [(c.x, c.y)]
    kind = getattr(curvlinops_module(), name)
    operator = kind(c.model, nn.CrossEntropyLoss(), params, data, check_deterministic=False, num_data=len(c.x))
    return operator @ torch.eye(len(c.theta))


def by_samples(c: Case) -> Tensor:
    """Return the Gauss-Newton matrix from per-sample Jacobians and one product."""
    found = vmap(jacrev(lambda p, xi: functional_call(c.model, p, (xi[None],))[0]), (None, 0))(c.params, c.x)
    J = torch.cat([block.flatten(2) for block in found.values()], 2)
    p = c.output(c.params).softmax(-1)
    inner = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / len(c.x)
    return J.flatten(0, 1).T @ (inner @ J).flatten(0, 1)


def by_columns(c: Case) -> Tensor:
    """Return the Gauss-Newton matrix by products with unit vectors."""

    def column(v: Tensor) -> Tensor:
        output, push = jvp(c.output_at, (c.theta,), (v,))
        inner = jvp(grad(lambda z: cross_entropy(z, c.y)), (output,), (push,))[1]
        return vjp(c.output_at, c.theta)[1](inner)[0]

    return vmap(column, chunk_size=CHUNK)(torch.eye(len(c.theta)))


PER_SAMPLE = "torch.func: per-sample J and a product"
STEPPED = "jacops: hessian(…).dense(), after an optimiser step"


def hessians(name: str, what: str, c: Case, goals: list[Goal]) -> Workload:
    """Return the case of a full Hessian."""
    slope, eye = grad(c.loss_at), torch.eye(len(c.theta))
    rivals: dict[str, Callable[[], Any]] = {
        "jacops: hessian(…).dense()": lambda: jacops.hessian(c.model, cross_entropy, c.x, c.y).dense(),
        STEPPED: after_step(c.model, lambda: jacops.hessian(c.model, cross_entropy, c.x, c.y).dense()),
        "torch.func: jacrev(grad), chunked": lambda: jacrev(slope, chunk_size=CHUNK)(c.theta),
        "torch.func: vmap(jvp of grad), chunked": lambda: vmap(
            lambda v: jvp(slope, (c.theta,), (v,))[1], chunk_size=CHUNK
        )(eye),
        "torch.func: hessian": lambda: hessian(c.loss_at)(c.theta),
        "autograd.functional: hessian": lambda: torch.autograd.functional.hessian(c.loss_at, c.theta),
        "torch.autograd: row by row": lambda: row_by_row(c),
        "curvlinops: Hessian @ I": lambda: peer("HessianLinearOperator", c),
    }
    goals = [*goals, Goal("jacops: hessian(…).dense()", faster=1 / 1.15, ours=STEPPED)]  # proofs survive training
    return Workload(name, what, rivals, same(), goals=goals, **bound(c))


def gauss_newton(name: str, what: str, c: Case, goals: list[Goal]) -> Workload:
    """Return the case of a full Gauss-Newton matrix."""
    rivals: dict[str, Callable[[], Any]] = {
        "jacops: ggn(…).dense()": lambda: jacops.ggn(c.model, cross_entropy, c.x, c.y).dense(),
        PER_SAMPLE: lambda: by_samples(c),
        "torch.func: vmap(GGN product), chunked": lambda: by_columns(c),
        "curvlinops: GGN @ I": lambda: peer("GGNLinearOperator", c),
        f"{HAND}rows by hooks and a product": lambda: gauss_newton_matrix(c),
    }
    return Workload(name, what, rivals, same(), goals=goals, **bound(c))


def backpack_fields(name: str, c: Batch) -> Callable[[], list[Any]]:
    """Return what BackPACK keeps of each parameter, on a model of its own, which it changes."""

    def run() -> list[Any]:
        import backpack
        from backpack import extensions

        if not models:
            models.append(backpack.extend(deepcopy(c.model)))
        rule, lossfunc = getattr(extensions, name)(), backpack.extend(nn.CrossEntropyLoss())
        with backpack.backpack(rule):
            lossfunc(models[0](c.x), c.y).backward()
        return [getattr(p, rule.savefield) for p in models[0].parameters()]

    models: list[nn.Module] = []
    return run


def by_backpack(name: str, c: Batch) -> Callable[[], Tensor]:
    """Return a diagonal by BackPACK."""
    found = backpack_fields(name, c)
    return lambda: flat(found())


def weight_factors(pairs: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return factors of weights, outputs' first, each divided by its norm: libraries share out the scale otherwise.

    Norms are found row by row first: a sum over 4 million squares in single precision is off by 0.2 % in some layouts.
    """
    return [side / side.norm(dim=-1).norm() for pair in pairs for side in pair[:2]]


Kind = Literal["ggn", "empirical", "monte_carlo"]
ASDL_NAMES: dict[Kind, str] = {"ggn": "fisher_exact", "empirical": "fisher_emp", "monte_carlo": "fisher_mc"}


def kronecker_factors(c: Batch, kind: Kind) -> list[Tensor]:
    """Return the factors of all weights by jacops."""
    found = jacops.kronecker_factors(c.model, cross_entropy, c.x, c.y, kind=kind, bias="separate")
    return weight_factors(found[name] for name, p in c.model.named_parameters() if p.ndim > 1)


def factors_by_backpack(name: str, c: Batch) -> Callable[[], list[Tensor]]:
    """Return the factors of all weights by BackPACK."""
    fields = backpack_fields(name, c)
    return lambda: weight_factors(pair for pair in fields() if len(pair) > 1)


def factors_by_asdfghjkl(kind: str, c: Batch) -> Callable[[], list[Tensor]]:
    """Return the factors of all weights by asdfghjkl (imported as asdl)."""

    def run() -> list[Tensor]:
        import asdl

        if not makers:
            settings = {"fisher_type": kind, "fisher_shapes": ["kron"], "loss_type": "cross_entropy", "data_size": 1}
            makers.append(asdl.get_fisher_maker(model, asdl.FisherConfig(**settings)))
        maker = makers[0]
        output = maker.setup_model_call(model, c.x)
        maker.setup_loss_call(cross_entropy, output, c.y)
        maker.forward_and_backward()
        parts: list[Any] = list(model.modules())
        found = [part.fisher.kron for part in parts if hasattr(part, "fisher") and part.fisher is not None]
        return weight_factors((own.B, own.A) for own in found)

    makers: list[Any] = []
    model = deepcopy(c.model)
    return run


def same_but_for_draws(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Compare factors from drawn labels: those of inputs are the same, those of outputs are estimates of the same."""
    return same()(ours[1::2], theirs[1::2]) and same(0.5)(ours[::2], theirs[::2])


def kronecker(name: str, what: str, c: Batch, kind: Kind) -> Workload:
    """Return the case of Kronecker factors."""
    peers: dict[str, Callable[[], Any]] = {}
    peers[f"jacops: kronecker_factors, {kind}"] = lambda: kronecker_factors(c, kind)
    if kind != "empirical":
        rule = "KFLR" if kind == "ggn" else "KFAC"
        peers[f"BackPACK: {rule}"] = factors_by_backpack(rule, c)
    peers["asdfghjkl: kron"] = factors_by_asdfghjkl(ASDL_NAMES[kind], c)
    close = same_but_for_draws if kind == "monte_carlo" else same()
    return Workload(name, what, peers, close, goals=[Goal(BEST, faster=1 / 1.2)])


def by_unit_vectors(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return a diagonal by products with unit vectors."""
    rounds = [torch.arange(i, min(i + CHUNK, size)) for i in range(0, size, CHUNK)]
    return torch.cat([vmap(lambda i: product(one_hot(i, size).float())[i])(some) for some in rounds])


def hessian_diagonal(name: str, what: str, c: Case) -> Workload:
    """Return the case of a Hessian's diagonal."""
    slope = grad(c.loss_at)
    rivals: dict[str, Callable[[], Any]] = {
        "jacops: diagonal(hessian(…))": lambda: jacops.linalg.diagonal(
            jacops.hessian(c.model, cross_entropy, c.x, c.y)
        ),
        "BackPACK: DiagHessian": by_backpack("DiagHessian", Batch(c.model, c.x, c.y)),
        "torch.func: jvp of grad, unit vectors": lambda: by_unit_vectors(
            lambda v: jvp(slope, (c.theta,), (v,))[1], len(c.theta)
        ),
    }
    return Workload(name, what, rivals, same())


def gauss_newton_diagonal(name: str, what: str, c: Batch) -> Workload:
    """Return the case of a Gauss-Newton matrix's diagonal."""
    rivals: dict[str, Callable[[], Any]] = {
        "jacops: diagonal(ggn(…))": lambda: jacops.linalg.diagonal(jacops.ggn(c.model, cross_entropy, c.x, c.y)),
        "BackPACK: DiagGGNExact": by_backpack("DiagGGNExact", c),
    }
    return Workload(name, what, rivals, same(), goals=[Goal(BEST, faster=1 / 1.1)])


def bound(c: Case) -> dict[str, float]:
    """Return what half of a symmetric matrix takes as a sum over samples, and its bytes."""
    size = len(c.theta)
    return {"flops": float(size**2 * len(c.x)), "result_bytes": 4.0 * size**2}


def workloads() -> Iterator[Workload]:
    """Yield the cases E1 to E16."""
    c = Case(mlp(16, 32, 32, 10, act=nn.Tanh), 512, 16, 10)
    goals = [Goal(BEST, faster=8), Goal("torch.func: hessian", faster=40), Goal(mib=64)]
    yield hessians("E1", "full Hessian, MLP of 1,930 parameters, 512 samples", c, goals)
    yield gauss_newton("E2", "full Gauss-Newton matrix of the same", c, [Goal(PER_SAMPLE, faster=8)])
    gated = Case(Gated(16, 24, 10), 256, 16, 10)
    what = "full Hessian, gated residual net of 2,018 parameters, 256 samples"
    yield hessians("E3", what, gated, [Goal(BEST, faster=3)])
    yield hessian_diagonal("E4", "diagonal of the Hessian of E1", c)
    large = Case(mlp(256, 768, 768, 256, 10, act=nn.Tanh), 256, 256, 10)
    wide, small = Batch(large.model, large.x, large.y), Batch(c.model, c.x, c.y)
    pictures = Batch(cnn(), torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    yield gauss_newton_diagonal("E5", "diagonal of a Gauss-Newton matrix, 987,402 parameters", wide)
    yield gauss_newton_diagonal("E6", "the same of the MLP of E1", small)
    yield gauss_newton_diagonal("E7", "the same of the CNN of B2, 64 samples", pictures)
    yield kronecker("E8", "Kronecker factors of the Gauss-Newton matrix of E1's MLP", small, "ggn")
    yield kronecker("E9", "the same of the MLP of E5", wide, "ggn")
    yield kronecker("E10", "the same of the CNN of E7", pictures, "ggn")
    yield kronecker("E11", "Kronecker factors of the empirical Fisher matrix of E5's MLP", wide, "empirical")
    yield kronecker("E12", "the same of the CNN of E7", pictures, "empirical")
    yield kronecker("E13", "the same of E1's MLP", small, "empirical")
    yield kronecker("E14", "Kronecker factors by drawn labels of E1's MLP", small, "monte_carlo")
    yield kronecker("E15", "the same of the MLP of E5", wide, "monte_carlo")
    yield kronecker("E16", "the same of the CNN of E7", pictures, "monte_carlo")
