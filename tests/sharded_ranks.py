"""One rank of a group that takes products with sharded models: `sharded_ranks.py RANK RANKS FOLDER`.

Every rank runs all checks in order and writes what it found to `FOLDER/RANK.json`: for each check, numbers that should
be zero but for rounding, words, or the traceback of what it raised. `tests/test_sharded.py` starts it and reads them.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacops
from jacops._torch.model import sharded

CHECKS: dict[str, Callable[[], Any]] = {}
RANK, RANKS, FOLDER = 0, 1, Path()  # read from the command line below
ROWS = 5  # not divisible by the number of ranks


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


# Models


class Block(nn.Module):
    """A transformer block with layer norms, attention and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o, self.a, self.b = nn.Linear(6, 18), nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.f, self.g = nn.Linear(6, 11), nn.Linear(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in self.q(self.a(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(attended)
        return x + self.g(F.gelu(self.f(self.b(x))))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(7, 6), Block(), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


class Unused(nn.Module):
    """A model with a parameter that its output does not use, and one of a single entry."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.scale = nn.Linear(4, 3), nn.Linear(2, 2), nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x)) * self.scale + self.shift


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 3, 2), nn.GELU(), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2)).eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens() -> Tensor:
    return torch.randint(7, (ROWS, 4), generator=torch.Generator().manual_seed(3))


def sequences(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum")


def squares(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).sum() + (output**4).sum()


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, Any, Tensor]] = {
    "mlp": (mlp, noise(ROWS, 4), squares, noise(ROWS, 3)),
    "block": (Block, noise(ROWS, 4, 6), squares, noise(ROWS, 4, 6, seed=4)),
    "tied": (Tied, tokens(), sequences, tokens()),
    "unused": (Unused, noise(ROWS, 4), squares, noise(ROWS, 3)),
    "convolution": (convolution, noise(ROWS, 1, 4), squares, noise(ROWS, 2)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


# Ways of sharding


def by_parts(model: nn.Module) -> nn.Module:
    """`fully_shard` of every block or layer with parameters, and of the rest."""
    tied = isinstance(model, Tied)
    for part in [model.block] if tied else list(model.children()):
        if any(True for _ in part.parameters(recurse=False)) or isinstance(part, Block):
            fully_shard(part, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def at_once(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=MESH)


def placed(model: nn.Module, placement: Callable[[int, Tensor], Any]) -> nn.Module:
    """A bare module whose parameters are DTensors, or plain where the placement is None; tied ones stay tied."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            where = placement(len(done), parameter)
            if id(parameter) not in done:
                spread = parameter if where is None else distribute_tensor(parameter.detach(), MESH, [where])
                done[id(parameter)] = spread if where is None else nn.Parameter(spread)
            module.register_parameter(name, done[id(parameter)])
    return model


def first_axis(model: nn.Module) -> nn.Module:
    return placed(model, lambda i, p: Shard(0))


def mixed(model: nn.Module) -> nn.Module:
    """Sharded along the first and the last axis, replicated, and plain parameters side by side."""
    return placed(model, lambda i, p: (Shard(0), Shard(p.ndim - 1), Replicate(), None)[i % 4])


WAYS = {f.__name__: f for f in (by_parts, at_once, first_axis, mixed)}


# Products and their oracles


def plain(model: nn.Module, name: str, v: list[Tensor], u: Tensor) -> dict[str, Any]:
    """Plain autograd on the whole model and all rows: `J^T u`, `J v`, and products with the Hessian and the GGN."""
    _, x, loss, y = MODELS[name]
    ps = list(model.parameters())

    def zeros(parts: Any) -> list[Tensor]:
        return [torch.zeros_like(p) if part is None else part for part, p in zip(parts, ps, strict=True)]

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        out = model(x)
    slopes = zeros(torch.autograd.grad(loss(out, y), ps, create_graph=True, allow_unused=True))
    inner = sum((s * t).sum() for s, t in zip(slopes, v, strict=True))
    w = torch.zeros_like(out, requires_grad=True)
    pulled = zeros(torch.autograd.grad(out, ps, w, create_graph=True, allow_unused=True))
    (jv,) = torch.autograd.grad(sum((s * t).sum() for s, t in zip(pulled, v, strict=True)), w)
    top = out.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(top, y), top, create_graph=True)
    (bent,) = torch.autograd.grad(slope, top, jv)
    return {
        "vjp": zeros(torch.autograd.grad(out, ps, u, retain_graph=True, allow_unused=True)),
        "jvp": jv.detach(),
        "hvp": zeros(torch.autograd.grad(inner, ps, retain_graph=True, allow_unused=True)),
        "ggnvp": zeros(torch.autograd.grad(out, ps, bent, retain_graph=True, allow_unused=True)),
    }


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gap(found: Any, wanted: Any) -> float:
    found, wanted = ([t] if isinstance(t, Tensor) else list(t) for t in (found, wanted))
    assert len(found) == len(wanted)
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        assert not a.requires_grad
        worst = max(worst, float((whole(a) - b.detach()).norm() / b.detach().norm().clamp_min(1e-6)))
    return worst


def like(model: nn.Module, v: list[Tensor]) -> list[Tensor]:
    """Tangents placed as the parameters."""
    pairs = zip(v, model.parameters(), strict=True)
    return [distribute_tensor(t, p.device_mesh, p.placements) if isinstance(p, DTensor) else t for t, p in pairs]


def placed_alike(found: Any, model: nn.Module) -> bool:
    return all(
        type(a) is type(p.detach()) and getattr(a, "placements", 0) == getattr(p, "placements", 0)
        for a, p in zip(found, model.parameters(), strict=True)
    )


def products(name: str, way: str, sharded: bool) -> dict[str, float]:
    _, x, loss, y = MODELS[name]
    u = noise(*made(name)(x).shape, seed=9)
    v = [noise(*p.shape, seed=20 + i) for i, p in enumerate(made(name).parameters())]
    wanted = plain(made(name), name, v, u)
    model = WAYS[way](made(name))
    own = slice(RANK, None, RANKS) if sharded else slice(None)
    vs, names = like(model, v), [n for n, _ in model.named_parameters()]
    pulled = jacops.model_vjp(model, x[own], u[own])
    curved = jacops.hvp(model, loss, x[own], y[own], dict(zip(names, vs, strict=True)))
    bent = jacops.ggnvp(model, loss, x[own], y[own], v)  # whole tensors, the same on all ranks
    assert list(curved) == names
    assert placed_alike(pulled, model)
    assert placed_alike(curved.values(), model)
    assert placed_alike(bent, model)
    return {
        "vjp": gap(pulled, wanted["vjp"]),
        "jvp": gap(jacops.model_jvp(model, x[own], vs), wanted["jvp"][own]),
        "hvp": gap(curved.values(), wanted["hvp"]),
        "ggnvp": gap(bent, wanted["ggnvp"]),
    }


for _name in MODELS:
    for _way in WAYS:
        for _sharded in (False, True):
            CHECKS[f"{_name}, {_way}, {'own rows' if _sharded else 'same rows'}"] = (
                lambda name=_name, way=_way, sharded=_sharded: products(name, way, sharded)
            )


def raised(call: Callable[[], Any]) -> str:
    """The type and the words of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def tangent(model: nn.Module) -> list[Tensor]:
    return [noise(*p.shape, seed=i) for i, p in enumerate(model.parameters())]


X, Y, U = noise(ROWS, 4), noise(ROWS, 3), noise(ROWS, 3, seed=2)


@check
def a_rank_without_rows() -> float:
    v = tangent(made("mlp"))
    own = slice(None) if RANK == 0 else slice(0, 0)
    return gap(jacops.hvp(by_parts(made("mlp")), squares, X[own], Y[own], v), plain(made("mlp"), "mlp", v, U)["hvp"])


@check
def some_ranks_have_the_same_rows() -> str:
    rows = slice(0, 2) if RANK < 2 else slice(2, None)
    return raised(lambda: jacops.model_vjp(by_parts(made("mlp")), X[rows], U[rows]))


@check
def own_cotangents_of_the_same_rows_are_summed() -> float:
    wanted = plain(made("mlp"), "mlp", tangent(made("mlp")), sum(r + 1 for r in range(RANKS)) * U)["vjp"]
    return gap(jacops.model_vjp(by_parts(made("mlp")), X, (RANK + 1) * U), wanted)


@check
def frozen_parameters_have_no_part_in_curvature() -> float:
    model, reference = made("mlp"), made("mlp")
    for m in (model, reference):
        m[0].requires_grad_(False)
    by_parts(model)
    ps = [p for p in reference.parameters() if p.requires_grad]
    v = [noise(*p.shape, seed=i) for i, p in enumerate(ps)]
    slopes = torch.autograd.grad(squares(reference(X), Y), ps, create_graph=True)
    wanted = torch.autograd.grad(slopes, ps, v)
    return gap(jacops.hvp(model, squares, X, Y, v), wanted)


@check
def dropout_draws_a_mask_of_its_own_for_own_rows_and_nothing_is_drawn_from_the_callers_state() -> dict[str, float]:
    model = at_once(nn.Sequential(made("mlp"), nn.Dropout(0.5)))
    own = slice(RANK, None, RANKS)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = jacops.model_vjp(model, X[own], U[own])
    kept = float((torch.get_rng_state() != state).sum())
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones_like(U[own]), 0.5)
    out = made("mlp")
    parts = torch.autograd.grad(out(X[own]) * mask, list(out.parameters()), U[own])
    for part in parts:
        dist.all_reduce(part)
    return {"gap": gap(found, parts), "state": kept}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Hold what a model was before against what it is after."""

    def state() -> list[Any]:
        return [
            [(n, id(p), p.to_local().clone(), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()],
            [(n, id(b), b.clone()) for n, b in model.named_buffers()],
            [
                (id(m), type(m), m.training, list(m._forward_hooks.items()), list(m._forward_pre_hooks.items()))
                for m in model.modules()
            ],
            [[g._sharded_state for g in m._get_fsdp_state()._fsdp_param_groups] for m in model.modules()
             if hasattr(m, "_get_fsdp_state")],
        ]  # fmt: skip

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    before = state()
    yield
    assert same(before, state()), "the model was changed"


@check
def the_model_stays_as_it_was_and_trains_on() -> dict[str, float]:
    model, reference = by_parts(made("mlp")), made("mlp")
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    squares(model(X), Y).backward()
    model.reshard()
    squares(reference(X), Y).backward()
    calls.clear()
    v = tangent(reference)
    with unchanged(model):
        jacops.model_vjp(model, X, U)
        jacops.hvp(model, squares, X, Y, v)
    hooked = len(calls)
    with unchanged(model):
        assert raised(lambda: jacops.hvp(model, lambda output, y: 1 / 0, X, Y, v)).startswith("ZeroDivisionError")
    squares(model(X), Y).backward()
    squares(reference(X), Y).backward()
    grads = [p.grad for p in model.parameters()], [p.grad for p in reference.parameters()]
    return {"gradient": gap(*grads), "the caller's hook did not run": float(hooked == 0)}


@check
def a_failure_on_one_rank_ends_all() -> list[str]:
    model, v = by_parts(made("mlp")), tangent(made("mlp"))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return squares(output, y) / (0 if RANK == 1 else 1)

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if RANK == 1:
                raise KeyError("within the forward")
            return x

    def failing(output: Tensor, y: Tensor) -> Tensor:
        if RANK == 1:
            raise KeyError("in the loss")
        return squares(output, y)

    within = made("mlp")
    within[1] = Fails()
    within = by_parts(within)
    with unchanged(model):
        found = [raised(lambda: jacops.hvp(model, failing, X, Y, v))]
    with unchanged(within):
        found.append(raised(lambda: jacops.hvp(within, squares, X, Y, v)))
    found.append(raised(lambda: jacops.model_vjp(model, X, U[:2] if RANK == 1 else U)))
    found.append(raised(lambda: jacops.hvp(model, loss, X, Y, v)))
    return [*found, f"{gap(jacops.hvp(model, squares, X, Y, v), plain(made('mlp'), 'mlp', v, U)['hvp']):.0e}"]


@check
def what_ranks_must_have_in_common() -> list[str]:
    model, v = by_parts(made("mlp")), tangent(made("mlp"))
    buffered = made("unused")
    buffered.shift += RANK
    replicated = mixed(made("mlp"))
    with torch.no_grad():
        next(p for p in replicated.parameters() if not isinstance(p, DTensor)).add_(RANK)
    dropping = at_once(nn.Sequential(made("mlp"), nn.Dropout(0.5)))
    torch.manual_seed(RANK)
    return [
        raised(lambda: jacops.hvp(model, squares, X, Y, [t + RANK for t in v])),
        raised(lambda: jacops.model_vjp(by_parts(buffered), X, U)),
        raised(lambda: jacops.model_vjp(replicated, X, U)),
        raised(lambda: jacops.model_vjp(dropping, X, U)),
        raised(lambda: (jacops.model_vjp if RANK else jacops.model_jvp)(model, X, U if RANK else v)),
    ]


@check
def tangents_that_do_not_fit() -> list[str]:
    model = by_parts(made("mlp"))
    v = tangent(made("mlp"))
    vs = like(model, v)
    other = [distribute_tensor(v[0], MESH, [Replicate()]), *vs[1:]]
    return [
        raised(lambda: jacops.model_jvp(model, X, [vs[0], *v[1:]])),
        raised(lambda: jacops.model_jvp(model, X, other)),
        raised(lambda: jacops.model_jvp(model, X, [t.float() for t in v])),
        raised(lambda: jacops.model_jvp(model, X, v[1:])),
        raised(lambda: jacops.model_jvp(model, X, [v[0][:1], *v[1:]])),
        raised(lambda: jacops.model_jvp(model, X, [v[0] / 0, *v[1:]])),
        raised(lambda: jacops.model_jvp(made("mlp"), X, vs)),
        raised(lambda: jacops.model_vjp(model, distribute_tensor(X, MESH, [Replicate()]), U)),
    ]


@check
def models_that_are_refused() -> list[str]:
    gathered = at_once(made("mlp"))
    gathered.unshard()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    lowered = fully_shard(made("mlp"), mesh=MESH, mp_policy=policy)
    grid = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("a", "b"))
    on_grid = made("mlp")
    for module in on_grid.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            spread = distribute_tensor(parameter.detach(), grid, [Shard(0), Replicate()])
            module.register_parameter(name, nn.Parameter(spread))
    first = FullyShardedDataParallel(made("mlp"), device_id=torch.device("cpu"))
    inside = nn.Sequential(first, nn.Tanh())
    hybrid = fully_shard(made("mlp"), mesh=grid)
    outside = Tied().double()
    outside.head = nn.Identity()
    outside.forward = lambda x: outside.embedding(x) @ outside.block.q.weight.T
    fully_shard(outside.block, mesh=MESH)
    return [
        raised(lambda m=m: jacops.model_vjp(m, tokens() if m is outside else X, U))
        for m in (gathered, lowered, on_grid, first, inside, hybrid, outside)
    ]


@check
def options_that_are_refused() -> list[str]:
    model, v = by_parts(made("mlp")), tangent(made("mlp"))
    return [
        raised(lambda: jacops.model_vjp(model, X, U, create_graph=True)),
        raised(lambda: jacops.hvp(model, squares, X, Y, v, outputs=[0])),
        raised(lambda: jacops.hvp(model, squares, X, Y, v, parameters="0.*")),
        raised(lambda: jacops.ggnvp(model, squares, X, Y, v, wrt="inputs")),
    ]


class Cut(torch.autograd.Function):
    """A square whose backward drops its second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach())
        return x**2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * slope


@check
def second_derivatives_that_torch_drops_are_refused() -> list[str]:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cut.apply(x)

    reference = nn.Sequential(made("mlp"), Squared())
    model = by_parts(nn.Sequential(made("mlp"), Squared()))
    parts = torch.autograd.grad(reference(X), list(reference.parameters()), U)
    v = tangent(reference)
    pulled = f"{gap(jacops.model_vjp(model, X, U), parts):.0e}"
    return [raised(lambda: jacops.hvp(model, squares, X, Y, v)), pulled]


@check
def a_pull_gathers_one_layer_at_a_time() -> float:
    """The most entries of whole parameters that are alive at once, less those of the largest layer."""
    model = by_parts(made("mlp"))
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in made("mlp"))
    alive = [0, 0]
    original = sharded.Shard.gathered

    def counted(shard: sharded.Shard, local: Tensor) -> Tensor:
        found = original(shard, local).clone()
        size = found.numel()
        alive[0] += size
        alive[1] = max(alive)
        weakref.finalize(found.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
        return found

    sharded.Shard.gathered = counted
    try:
        jacops.model_vjp(model, X, U)
    finally:
        sharded.Shard.gathered = original
    return float(max(alive[1] - largest, 0))


# Functions without arguments


def closure(params: list[Any], rows: Tensor, **how: Any) -> Callable[[], Tensor]:
    return lambda: torch.tanh(rows @ params[0].full_tensor(**how).T + params[1].full_tensor(**how))


@check
def functions_over_dtensors() -> dict[str, float]:
    plain_params = [noise(3, 4, seed=7).requires_grad_(), noise(3, seed=8).requires_grad_()]
    params = [distribute_tensor(p.detach(), MESH, [Shard(0)]).requires_grad_() for p in plain_params]
    own, summed = slice(RANK, None, RANKS), {"grad_placements": [Partial()]}
    out = torch.tanh(X @ plain_params[0].T + plain_params[1])
    pulled = torch.autograd.grad(out, plain_params, U)
    v = [noise(3, 4, seed=1), noise(3, seed=2)]
    vs = [distribute_tensor(t, MESH, [Shard(0)]) for t in v]
    pushed = (1 - out.detach() ** 2) * (X @ v[0].T + v[1])
    return {
        "vjp, same rows": gap(jacops.vjp(closure(params, X), params, U), pulled),
        "vjp, own rows": gap(jacops.vjp(closure(params, X[own], **summed), params, U[own]), pulled),
        "jvp, same rows": gap(jacops.jvp(closure(params, X), params, v), pushed),
        "jvp, own rows": gap(jacops.jvp(closure(params, X[own], **summed), iter(params), vs), pushed[own]),
        "one parameter": gap(
            jacops.vjp(lambda: params[1].full_tensor() ** 2, params[1], torch.ones(3).double()),
            2 * plain_params[1].detach(),
        ),
    }


@check
def functions_that_are_refused() -> list[str]:
    params = [distribute_tensor(noise(3, 4), MESH, [Shard(0)]).requires_grad_(), noise(3).requires_grad_()]
    params[1] = distribute_tensor(params[1].detach(), MESH, [Shard(0)]).requires_grad_()
    own = slice(RANK, None, RANKS)
    model = by_parts(made("mlp"))
    trainable = list(model.parameters())
    found = [
        raised(lambda: jacops.vjp(closure(params, X[own]), params, U[own])),
        raised(lambda: jacops.vjp(closure(params, X, grad_placements=[Partial()]), params, U)),
        raised(lambda: jacops.vjp(lambda: model(X), trainable, U)),
        raised(lambda: jacops.vjp(lambda: params[0] * 2, params, noise(3, 4))),
        raised(lambda: jacops.batch_vjp(closure(params, X), params, U[None])),
        raised(lambda: jacops.batch_jvp(closure(params, X), params, [p[None] for p in params])),
        raised(lambda: jacops.full_jacobian(closure(params, X), params)),
        raised(lambda: jacops.hessian(lambda: closure(params, X)().sum(), parameters=params)),
    ]
    model.reset_iter_state() if hasattr(model, "reset_iter_state") else None
    return found


# Everything else is refused


@check
def all_other_calls_are_refused() -> dict[str, str]:
    loader = [(X, Y)]
    calls: dict[str, Callable[[nn.Module], Any]] = {
        "modjac": lambda m: jacops.modjac(m, X),
        "compute_jacobian": lambda m: jacops.compute_jacobian(m, X),
        "jacobian": lambda m: jacops.jacobian(m, X),
        "jacobian by inputs": lambda m: jacops.jacobian(m, X, "inputs"),
        "hessian": lambda m: jacops.hessian(m, F.mse_loss, X, Y),
        "ggn": lambda m: jacops.ggn(m, F.mse_loss, X, Y),
        "fisher": lambda m: jacops.fisher(m, F.mse_loss, X, Y),
        "Problem": lambda m: jacops.Problem(m, F.mse_loss, loader).hessian(),
        "sample_gradients": lambda m: jacops.sample_gradients(m, F.mse_loss, X, Y),
        "sample_jacobians": lambda m: jacops.sample_jacobians(m, X),
        "contributions": lambda m: jacops.contributions(m, X),
        "integrated_jacobian": lambda m: jacops.integrated_jacobian(m, X),
        "input_hessian": lambda m: jacops.input_hessian(m, X),
        "laplacian": lambda m: jacops.laplacian(m, X),
        "directional_derivative": lambda m: jacops.directional_derivative(m, X, X),
        "kronecker_factors": lambda m: jacops.kronecker_factors(jacops.Problem(m, F.mse_loss, loader).ggn()),
        "compute_influences": lambda m: jacops.compute_influences(
            jacops.TorchTwiceDifferentiable(m, F.mse_loss), loader
        ),
        "self_influences": lambda m: jacops.self_influences(jacops.TorchTwiceDifferentiable(m, F.mse_loss), loader),
        "TorchTwiceDifferentiable": lambda m: jacops.TorchTwiceDifferentiable(m, F.mse_loss).grad(X, Y),
        "gauss_newton": lambda m: jacops.gauss_newton(m, X, target=Y),
        "levenberg_marquardt": lambda m: jacops.levenberg_marquardt(m, X, target=Y),
        "sparse_plan": lambda m: jacops.sparse_plan(m, X),
        "plan": lambda m: jacops.plan(jacops.compute_jacobian, m, X),
        "modjac, sparse": lambda m: jacops.modjac(m, X, sparse=True),
        "check": lambda m: jacops.check(m, X),
        "jacobian_lens": lambda m: jacops.attribution.jacobian_lens(m, X, at="0"),
        "empirical_fisher": lambda m: jacops.linalg.empirical_fisher(m, F.mse_loss, X, Y),
        "projected_index": lambda m: jacops.influence.projected_index(
            jacops.TorchTwiceDifferentiable(m, F.mse_loss), loader
        ),
    }
    return {
        f"{name}, {way}": raised(lambda call=call, model=model: call(model))
        for way, model in ((w, WAYS[w](made("mlp"))) for w in ("by_parts", "first_axis"))
        for name, call in calls.items()
    }


def main() -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, function in CHECKS.items():
        try:
            found[name] = function()
        except BaseException:
            found[name] = traceback.format_exc()
        (FOLDER / f"{RANK}.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    RANK, RANKS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(FOLDER / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS, timeout=timedelta(seconds=40))
    MESH = init_device_mesh("cpu", (RANKS,))
    main()
    dist.destroy_process_group()
