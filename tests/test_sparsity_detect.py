"""Patterns never lack an entry: ordinary models, awkward ones, and random programs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jacops.errors import JacopsError, NotDifferentiableError
from jacops.sparse import Pattern, detect_pattern, samples_independent
from jacops.sparse._pool import Pool
from small import Calls, draw
from sparse_problems import F64, whole


def brute(model: nn.Module, *inputs: Tensor) -> np.ndarray:
    """Return where the Jacobian by all inputs is not zero, a backward pass a row."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = model(*[x.clone() for x in leaves]).reshape(-1)
    rows = [torch.autograd.grad(v, leaves, retain_graph=True, materialize_grads=True) for v in y]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).ne(0).numpy()


def detected(model: nn.Module, *inputs: Tensor, local: bool = True) -> Pattern:
    return detect_pattern(model, tuple(inputs), wrt="inputs", local=local)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.flip(0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.flip(0) + (grad * x).flip(0)


class ThroughNumpy(torch.autograd.Function):
    """Its backward leaves torch, where nothing can be followed."""

    @staticmethod
    def forward(ctx, x):
        return x + 2 * x.roll(1)

    @staticmethod
    def backward(ctx, grad):
        g = grad.numpy()
        return torch.from_numpy(g + 2 * np.roll(g, -1))


class ThroughItem(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad + grad.sum().item()


def net(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(*layers).to(F64)


def attention(causal: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(F64)
    mask = nn.Transformer.generate_square_subsequent_mask(5).to(F64) if causal else None
    return Calls(lambda x: layer(x, src_mask=mask))


PAIRS, BAND = whole(12, 30, 2), draw(20, 20) * (draw(20, 20, seed=1) < -1)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] = (x[1:] - x[:-1]) ** 2
    y[::3] *= x[::3]
    return y


def cumulative(x: Tensor) -> Tensor:
    return torch.cat([x.cumsum(-1), x.softmax(-1), x.logsumexp(-1, keepdim=True)], -1)


def inverses(x: Tensor) -> Tensor:
    return torch.einsum(
        "bij,bj->bi", torch.linalg.inv(x[:, :9].reshape(-1, 3, 3) + 3 * torch.eye(3).double()), x[:, 9:]
    )


EXACT = {
    "stencil": (Calls(lambda x: x.roll(1) - 2 * x + x.roll(-1) + x**3), draw(40)),
    "writes in place": (Calls(in_place), draw(40)),
    "convolutions": (net(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1)), draw(1, 1, 30)),
    "groups, stride, pooling": (
        net(nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.MaxPool2d(2)),
        draw(1, 2, 12, 12),
    ),
    "transposed convolution": (net(nn.ConvTranspose2d(2, 3, 3, 2, 1), nn.GELU()), draw(1, 2, 5, 5)),
    "samples of an MLP": (net(nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 3)), draw(7, 6)),
    "attention": (attention(False), draw(2, 5, 8)),
    "causal attention": (attention(True), draw(2, 5, 8)),
    "gather": (Calls(lambda x: (x[PAIRS[:, 0]] - x[PAIRS[:, 1]]).norm(dim=-1)), draw(12, 3)),
    "scatter": (Calls(lambda x: torch.zeros(9).double().index_add(0, PAIRS[:, 0] % 9, x**2)), draw(30)),
    "banded weights": (Calls(lambda x: (x @ BAND).sin()), draw(2, 20)),
    "batched inverses": (Calls(inverses), draw(5, 12)),
    "cumulative": (Calls(cumulative), draw(4, 5)),
    "sort": (Calls(lambda x: x.sort(-1)[0][:, :2] * x.topk(2, -1)[0]), draw(4, 5)),
    "where": (Calls(lambda x: torch.where(x > 0, x**2, x.roll(1))), draw(20)),
    "relu off": (Calls(lambda x: F.relu(x) * x.roll(1)), draw(20)),
    "unfold": (Calls(lambda x: (x.unfold(0, 3, 2) ** 2).sum(1)), draw(21)),
    "average pooling": (Calls(lambda x: F.avg_pool2d(x**2, 2)), draw(1, 1, 6, 6)),
    "complex inside": (Calls(lambda x: torch.view_as_complex(x.reshape(-1, 2)).abs()), draw(8)),
    "complex products": (Calls(lambda x: (torch.view_as_complex(x) ** 2).real), draw(6, 2)),
    "custom Function": (Calls(Squared.apply), draw(9)),
}


@pytest.mark.parametrize("name", EXACT)
def test_patterns_are_exact(name: str) -> None:
    model, x = EXACT[name]
    truth, pattern = brute(model, x), detected(model, x)
    assert (pattern.matrix.toarray() == truth).all()
    assert not pattern.unknown
    assert not (truth & ~pattern.matrix.toarray()).any()
    assert not (truth & ~detected(model, x, local=False).matrix.toarray()).any()


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"sort", "where", "groups, stride, pooling"}))
def test_a_reusable_pattern_holds_at_other_points(name: str) -> None:
    model, x = EXACT[name]
    pattern = detected(model, x, local=False)
    assert not pattern.local
    for seed in (11, 12):
        assert not (brute(model, draw(*x.shape, seed=seed)) & ~pattern.matrix.toarray()).any()


def test_zeros_that_depend_on_the_point_do_not_count() -> None:
    model = Calls(lambda x, y: F.relu(x) * y + torch.diag_embed(x) @ y)
    x, y = torch.tensor([0.0, 1.0, -1.0]).double(), draw(3)
    here, anywhere = detected(model, x, y), detected(model, x, y, local=False)
    assert not (brute(model, draw(3, seed=3), y) & ~anywhere.matrix.toarray()).any()
    assert here.local
    assert here.nnz < anywhere.nnz


@pytest.mark.parametrize("function", [ThroughNumpy, ThroughItem])
def test_values_that_leave_torch_leave_no_hole(function: type) -> None:
    x = draw(6)
    pattern = detected(Calls(function.apply), x)
    assert pattern.matrix.toarray().all()
    assert pattern.unknown


def test_unknown_operations_are_named() -> None:
    lengths = torch.tensor([3, 5])
    pattern = detected(Calls(lambda x: torch.segment_reduce(x.flatten(), "sum", lengths=lengths)), draw(4, 2))
    assert "aten._segment_reduce_backward.default" in pattern.unknown
    assert "segment_reduce" in repr(pattern)


def test_common_operations_have_rules() -> None:
    model = net(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 4))
    assert not detected(model, draw(3, 1, 6, 6)).unknown
    assert not detect_pattern(model, draw(3, 1, 6, 6)).unknown
    assert not detected(attention(True), draw(2, 5, 8), local=False).unknown


def test_wrt_parameters_and_embeddings() -> None:
    table = nn.Embedding(7, 2).double()
    pattern = detect_pattern(table, torch.tensor([3, 0, 3]))
    rows, columns = pattern.matrix.nonzero()
    assert pattern.shape == (6, 14)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 6), (1, 7), (2, 0), (3, 1), (4, 6), (5, 7)]


def test_nothing_connected_is_refused() -> None:
    with pytest.raises(NotDifferentiableError, match="no path"):
        detected(Calls(lambda x: x.detach() * 2), draw(3))
    with pytest.raises(JacopsError, match="complex"):
        detected(Calls(lambda x: torch.complex(x, x)), draw(3))


def test_reused_memory_carries_no_stale_sets() -> None:
    """Backward passes free and reuse storages; a set must not outlive the storage it was for."""

    def long(x: Tensor) -> Tensor:
        for _ in range(120):
            x = x.sin() * 1.01
        return x

    assert detected(Calls(long), draw(50)).nnz == 50


# ---- random programs -------------------------------------------------------------------------------------------

STEPS = {
    "sin": lambda a, b: a.sin(),
    "relu": lambda a, b: F.relu(a),
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - 2 * b,
    "roll": lambda a, b: a.roll(1, -1),
    "flip": lambda a, b: a.flip(0),
    "rows": lambda a, b: a[torch.tensor([2, 0, 0, 1])[: a.shape[0]] % a.shape[0]],
    "cumsum": lambda a, b: a.cumsum(-1),
    "softmax": lambda a, b: a.softmax(-1),
    "mean": lambda a, b: a - a.mean(0, keepdim=True),
    "where": lambda a, b: torch.where(b > 0, a, b),
    "max": lambda a, b: torch.maximum(a, b),
    "mask": lambda a, b: a @ torch.eye(a.shape[-1], dtype=a.dtype).roll(1, 0),
    "matmul": lambda a, b: a @ b.transpose(0, 1) @ a / 4,
    "sort": lambda a, b: a.sort(-1).values,
    "write": lambda a, b: _written(a, b),
    "pad": lambda a, b: F.pad(a, (1, 0))[:, :-1],
    "norm": lambda a, b: a / (1 + b.norm(dim=-1, keepdim=True)),
    "gather": lambda a, b: a.gather(-1, b.argsort(-1)),
    "scatter": lambda a, b: b.scatter_add(-1, a.argsort(-1), a),
    "zero": lambda a, b: a * 0 + b,
    "no_grad": lambda a, b: a * b.detach(),
}


def _written(a: Tensor, b: Tensor) -> Tensor:
    c = a.clone()
    c[0] = b[-1] * 2
    c[:, 1:].mul_(b[:, 1:])
    return c


@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7)
)
@settings(derandomize=True, deadline=None, max_examples=120, database=None)
def test_random_programs_lose_nothing(program: list[tuple[str, int, int]]) -> None:
    def run(x: Tensor) -> Tensor:
        kept = [x]
        for name, i, j in program:
            kept.append(STEPS[name](kept[-1 - i % len(kept)], kept[-1 - j % len(kept)]))
        return torch.cat([kept[-1], kept[len(kept) // 2] * 3])

    model, x = Calls(run), draw(3, 4)
    for local in (True, False):
        try:
            seen = detected(model, x, local=local).matrix.toarray()
        except NotDifferentiableError:
            return
        assert not (brute(model, x) & ~seen).any()


# ---- the pool and the picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [None, range(0, 21, 3), [0, 2, 3, 9, 20]])
@given(items=st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 20), max_size=6)), min_size=1, max_size=30))
@settings(derandomize=True, deadline=None, max_examples=80, database=None)
def test_unions_are_unions(starts: list[int] | None, items: list[tuple[int, set[int]]]) -> None:
    pool = Pool(21, None if starts is None else np.array(starts))
    ids = [pool.union(pool.singletons(np.array(sorted(s), np.int64))) if s else 0 for _, s in items]
    united = pool.union_groups(np.array([g for g, _ in items]), np.array(ids), 6)
    for group, row in enumerate(pool.matrix(united).toarray()):
        assert set(np.flatnonzero(row)) == set().union(*[s for g, s in items if g == group])
    again = pool.union_groups(np.array([g for g, _ in items]), np.array(ids), 6)
    assert (united == again).all()
    paired = pool.union_pairs(np.array(ids), np.array(ids[::-1]))
    sets = [s for _, s in items]
    for row, one, other in zip(pool.matrix(paired).toarray(), sets, reversed(sets), strict=True):
        assert set(np.flatnonzero(row)) == one | other
    assert pool.sizes(paired).tolist() == [len(a | b) for a, b in zip(sets, reversed(sets), strict=True)]


def test_the_picture_is_small_and_true() -> None:
    pattern = detected(EXACT["stencil"][0], draw(400))
    lines = pattern.spy().splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 24
    tiny = detected(Calls(lambda x: torch.stack([x[0], x[3]])), draw(4))
    assert tiny.spy() == "⠁⠐"


# ---- do samples mix? -------------------------------------------------------------------------------------------

LINES = nn.Linear(4, 6).to(F64), nn.Linear(6, 2).to(F64)
APART = {
    "gelu": F.gelu,
    "layer norm": nn.LayerNorm(6).to(F64),
    "batch norm, eval": nn.BatchNorm1d(6).to(F64).eval(),
    "detached mean": lambda h: h - h.mean(0).detach(),
}
MIXED = {
    "batch norm, train": nn.BatchNorm1d(6).to(F64),
    "attention over the batch": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "mean taken off": lambda h: h - h.mean(0),
    "permuted": lambda h: h[torch.tensor([1, 0, 2, 3, 4])],
    "tiny coupling": lambda h: h + 1e-9 * h.sum(),
    "coupling that is off here": lambda h: h + F.relu(h.sum() - 1e3),
    "global norm": lambda h: h / h.norm(),
}


def middle(layer: nn.Module) -> nn.Module:
    return Calls(lambda x: LINES[1](layer(LINES[0](x))))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", APART)
def test_samples_apart(name: str, strict: bool) -> None:
    found = samples_independent(middle(APART[name]), draw(5, 4), strict=strict)
    assert found
    assert found.sweeps == (7 if strict else 1)


@pytest.mark.parametrize("name", MIXED)
def test_samples_mixed(name: str) -> None:
    found = samples_independent(middle(MIXED[name]), draw(5, 4))
    assert not found
    assert all(i != j for i, j in found.mixed)


def test_samples_need_a_first_axis() -> None:
    with pytest.raises(JacopsError, match="samples"):
        samples_independent(Calls(lambda x: x.sum()), draw(4, 3))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_zeros_of_logarithms_and_differences_are_not_those_of_a_factor(dtype: torch.dtype, local: bool) -> None:
    class Cumulative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.logcumsumexp(1)  # its backward pass takes the logarithm of the cotangent

    for seed in range(12):
        torch.manual_seed(seed)
        x = (torch.randn(4, 6, dtype=F64) * (1, 10, 40)[seed % 3]).to(dtype)
        try:
            x.clone().requires_grad_().logcumsumexp(1).sum().backward()
        except NotImplementedError:
            pytest.skip(f"this torch has no derivative in {dtype}")
        found = detected(Cumulative(), x, local=local).matrix.toarray()
        assert not (brute(Cumulative(), x) & ~found).any()
