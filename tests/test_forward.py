"""Tangents node by node through a recorded graph: every rule against the plain Jacobian."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.utils.checkpoint import checkpoint

import jacops
from cases import F64
from jacops._torch.sweeps import nodewise as forward
from small import Calls


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def of(func: Callable[..., Tensor], *shapes: tuple[int, ...]) -> nn.Module:
    """A function of its input and some parameters as a module."""
    return Calls(lambda *parts: func(parts[-1], *parts[:-1]), *shapes)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "mm": (lambda x, a, b: x @ a @ b, ((4, 3), (3, 5))),
    "mm of parameters on both sides": (lambda x, a: a @ a.T, ((4, 3),)),
    "addmm": (lambda x, a, b: torch.addmm(b, x, a, alpha=0.5, beta=3.0), ((4, 3), (3,))),
    "addmm, only the offset moves": (lambda x, b: torch.addmm(b, x, x.T), ((5,),)),
    "linear in three dimensions": (lambda x, a, b: f.linear(x.reshape(5, 2, 2), a, b).sin(), ((3, 2), (3,))),
    "bmm": (lambda x, a, b: (a @ b).transpose(-1, -2).exp(), ((2, 3, 4), (2, 4, 3))),
    "convolution": (lambda x, w, b: f.conv1d(x.reshape(1, 5, 4), w, b, padding=1).tanh(), ((3, 5, 3), (3,))),
    "strided, dilated, grouped convolution": (
        lambda x, w, v: f.conv2d(f.conv2d(w, v, stride=2, dilation=2, groups=2), v[:2, :, :2, :2], groups=2),
        ((1, 4, 9, 9), (4, 2, 3, 3)),
    ),
    "transposed convolution": (
        lambda x, w, b: f.conv_transpose1d(x.reshape(1, 5, 4), w, b, stride=2, output_padding=1),
        ((5, 3, 3), (3,)),
    ),
    "products that broadcast": (lambda x, a, b: (a * b + 2 * b - a / b * 3) * x[:, :1], ((4,), (5, 1))),
    "a number minus a parameter": (lambda x, a: 1 - a, ((4,),)),
    "entry by entry": (
        lambda x, a: (
            f.gelu(a) + f.silu(a) + f.elu(a) + f.leaky_relu(a) + f.softplus(a) + f.hardtanh(a) + a.abs().sqrt()
        ),
        ((7,),),
    ),
    "softmax and its logarithm": (lambda x, a: a.softmax(1) * a.log_softmax(0), ((3, 4),)),
    "views": (
        lambda x, a: torch.stack([a.permute(1, 2, 0)[1:, ..., 0].flatten(), a.movedim(0, -1).select(0, 1).reshape(-1)]),
        ((2, 3, 2),),
    ),
    "negative axes": (lambda x, a: a.transpose(-3, -1).squeeze(-2).unsqueeze(-1), ((2, 1, 3),)),
    "sums": (
        lambda x, a: (
            a.sum() + a.sum(-1, keepdim=True) * a.sum((0, -2)) + a.sum(0) + a.sum((-1, 1), True) * a[0, 0, 0].sum(-1)
        ),
        ((2, 3, 2),),
    ),
    "cumulative sums and selected entries": (
        lambda x, a: a.cumsum(-1)[-1, -2] * a.select(-1, -2).cumsum(0)[..., 1:] + a[0, 0].cumsum(0)[-1].cumsum(0),
        ((2, 3, 2),),
    ),
    "permuted axes": (lambda x, a: a.permute(-1, 0, -2) * a.permute(2, 0, 1)[:1].sin(), ((2, 3, 2),)),
    "several outputs of one operation": (
        lambda x, a: torch.cat([part.flatten() for part in (*a.split(2), a.sort(0)[0], *a.unbind(1))]),
        ((5, 3),),
    ),
    "layer norm": (lambda x, a, w, b: f.layer_norm(a, (4,), w, b), ((3, 4), (4,), (4,))),
    "batch norm": (lambda x, a, w: f.batch_norm(a, None, None, w, training=True), ((6, 3), (3,))),
    "attention": (lambda x, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True), ((2, 3, 4),) * 3),
    "gathers and embeddings": (
        lambda x, a: f.embedding(torch.tensor([1, 1, 3]), a) + a[[0, 2, 2]].cumsum(0),
        ((4, 3),),
    ),
    "sums and norms": (lambda x, a: torch.stack([a.sum(), a.mean(), a.norm(), a.prod(), a.max(), a.var()]), ((4, 3),)),
    "in place": (lambda x, a: (a * 2).add_(a).mul_(a).sigmoid_(), ((4,),)),
    "linear algebra": (lambda x, a: torch.linalg.solve(a @ a.T + torch.eye(3), a) + torch.linalg.inv(a), ((3, 3),)),
    "a parameter as the output": (lambda x, a: a, ((4,),)),
    "constants on the way": (lambda x, a: a.detach() * a + torch.where(a > 0, a, 0.0), ((6,),)),
    "other precisions on the way": (lambda x, a: a.float().sin().double(), ((4,),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_push_agrees_with_the_rows_of_the_jacobian(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_NEGLIGIBLE", torch.inf)  # whatever the machine is busy with
    func, shapes = FUNCTIONS[name]
    model, x = of(func, *shapes), drawn(5, 4)
    J = jacops.jacobian(model, x)
    v = drawn(J.shape[1])
    wanted = torch.stack([J.T @ row for row in torch.eye(J.shape[0], dtype=F64)]) @ v
    loose = 1e-5 if "precisions" in name else 1e-12
    torch.testing.assert_close(J @ v, wanted, rtol=loose, atol=loose)
    torch.testing.assert_close(J @ v, wanted, rtol=loose, atol=loose)
    assert "node by node" in J.lin.routes["push"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts_that_do_not_move_are_left_out_of_a_push(name: str) -> None:
    func, shapes = FUNCTIONS[name]
    lin = jacops.jacobian(of(func, *shapes), drawn(5, 4)).lin
    for number, leaf in enumerate(lin.leaves):
        for unit in torch.eye(leaf.numel(), dtype=leaf.dtype).view(-1, *leaf.shape):
            tangent = [unit if i == number else torch.zeros_like(other) for i, other in enumerate(lin.leaves)]
            wanted = lin.nodewise.push(lin, tangent)
            torch.testing.assert_close(lin.nodewise.push(lin, tangent, sparse=True), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_columns_in_one_batched_pass_are_those_of_the_jacobian(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_NEGLIGIBLE", torch.inf)
    func, shapes = FUNCTIONS[name]
    model, x = of(func, *shapes), drawn(5, 4)
    J = jacops.jacobian(model, x)
    wanted = torch.stack([J.T @ row for row in torch.eye(J.shape[0], dtype=F64)])
    loose = 1e-5 if "precisions" in name else 1e-12
    found = jacops.modjac(model, x, flatten=True, strategy="forward-mode")
    torch.testing.assert_close(found, wanted, rtol=loose, atol=loose)


def test_columns_of_one_parameter_take_a_pass_for_many_of_them() -> None:
    J = jacops.jacobian(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(F64), drawn(5, 4))
    tangents = torch.eye(32, dtype=F64).reshape(32, 8, 4)
    J.lin.push_columns(0, tangents)
    before = J.lin.sweeps
    (found,) = J.lin.push_columns(0, tangents)
    assert J.lin.sweeps == before + 1
    assert "in one batched pass" in J.lin.routes["push"]
    torch.testing.assert_close(found.flatten(1).T, J.dense()[:, :32])


def test_a_hook_on_the_way_is_noticed_by_columns_in_a_batched_pass() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Calls(turned_round), nn.Linear(3, 5)).to(F64)
    J = jacops.jacobian(net, drawn(5, 4))
    (found,) = J.lin.push_columns(0, torch.eye(12, dtype=F64).reshape(12, 3, 4))
    torch.testing.assert_close(found.flatten(1).T, J.dense()[:, :12])
    assert J.lin.routes["push"].startswith("differentiated")


def turned_round(hidden: Tensor) -> Tensor:
    """A gradient reversed by a hook, which is in no node of the graph."""
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: -grad)
    return hidden


def test_a_hook_on_the_way_is_noticed() -> None:
    J = jacops.jacobian(
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Calls(turned_round), nn.Linear(3, 5)).to(F64), drawn(5, 4)
    )
    v = drawn(J.shape[1])
    torch.testing.assert_close(J @ v, J.dense() @ v)
    assert J.lin.routes["push"].startswith("differentiated")
    assert "because a push node by node fails the adjoint identity" in J.lin.routes["push"]


def test_what_is_recomputed_is_right() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    model = of(lambda x, a: checkpoint(net, a * x, use_reentrant=False), (4,))
    J = jacops.jacobian(model, drawn(5, 4))
    torch.testing.assert_close(J @ drawn(4), J.dense() @ drawn(4))


def test_weights_changed_since_change_no_product() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    J = jacops.jacobian(net, drawn(5, 4))
    v = drawn(J.shape[1])
    before = J @ v
    with torch.no_grad():
        net[2].weight.mul_(2)
    torch.testing.assert_close(J @ v, before)  # it answers for the weights that it was made with


def test_a_leaf_made_from_another_leaf_moves_with_it_and_by_itself() -> None:
    p = drawn(3).requires_grad_()
    q = p.sin()
    v, w = drawn(3), drawn(1, 3)[0]
    found = jacops.jvp(lambda: q**2 + p, [p, q], [v, w])
    torch.testing.assert_close(found, (2 * q * (p.cos() * v + w) + v).detach())


def test_a_push_that_fails_together_leaves_the_way_node_by_node_open() -> None:
    J = jacops.jacobian(of(lambda x, a: (x @ a).tanh(), (4, 3)), drawn(5, 4))
    J.lin.proofs.refuse("push", "dual")
    J @ drawn(J.shape[1])
    assert "node by node" in J.lin.routes["push"]
