"""Attention keeps its fused kernels for gradients alone, and is written out where these are differentiated."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import jacops
from jacops import Problem
from jacops.solvers import EKFAC

CROSS_ENTROPY = nn.functional.cross_entropy


class Attends(nn.Module):
    """A causal head or two, called as a user does, with logits for each position."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 12), nn.Linear(4, 7)
        self.mask = mask

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.mix(self.embed(tokens)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        n = tokens.shape[1]
        seen = torch.arange(n) <= torch.arange(n).unsqueeze(1)
        how: dict[str, Any] = {"none": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": seen}}[self.mask]
        found = nn.functional.scaled_dot_product_attention(q, k, v, **how)
        return self.head(found.transpose(1, 2).flatten(2)).transpose(1, 2)


class Layer(nn.Module):
    """Torch's own layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))).transpose(1, 2)


class Checkpointed(Attends):
    """Computes its attention again in every backward pass, once more within another checkpoint."""

    def __init__(self, depth: int) -> None:
        super().__init__("causal")
        self.depth = depth

    def forward(self, tokens: Tensor) -> Tensor:
        call = super().forward
        for _ in range(self.depth):
            call = partial(checkpoint, call, use_reentrant=False)
        return call(tokens)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "none": lambda: Attends("none").double(),
    "causal": lambda: Attends("causal").double(),
    "mask": lambda: Attends("mask").double(),
    "layer": lambda: Layer().double(),
    "checkpoint": lambda: Checkpointed(1).double(),
    "nested checkpoints": lambda: Checkpointed(2).double(),
}


class Kernels(TorchDispatchMode):
    """Counts the attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name():
            self.seen["backward" if "backward" in func.name() else "forward"] += 1
        return func(*args, **(kwargs or {}))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(7, (5, 6)), torch.randint(7, (5, 6))


def by_hand(model: nn.Module) -> Callable[..., Tensor]:
    if isinstance(model, Checkpointed):  # which transforms refuse
        model = copy.deepcopy(model)
        model.depth = 0
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        params = {n: part.reshape(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return CROSS_ENTROPY(functional_call(model, params, (x,)), y)

    return loss


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_samples_run_the_fused_kernel_and_are_right(model: nn.Module) -> None:
    x, y = data()
    with Kernels() as kernels:
        rows = jacops.sample_gradients(model, CROSS_ENTROPY, x, y, checks="never").dense()
    expected = vmap(grad(by_hand(model)), (None, 0, 0))(flat(model), x.unsqueeze(1), y.unsqueeze(1))
    torch.testing.assert_close(rows, expected)
    assert kernels.seen["backward"]


def test_a_problem_that_took_gradients_still_has_second_derivatives(model: nn.Module) -> None:
    x, y = data()
    problem, v = Problem(model, CROSS_ENTROPY, [(x, y)]), torch.linspace(-1, 1, flat(model).numel()).double()
    loss = by_hand(model)
    _, gradient = problem.value_and_gradient()
    torch.testing.assert_close(gradient, grad(loss)(flat(model), x, y))
    rows = problem.sample_gradients().dense()
    torch.testing.assert_close(rows.mean(0), gradient)
    with sdpa_kernel(SDPBackend.MATH):  # `torch.func.hessian` is wrong by the weights of a norm
        H = jacrev(grad(loss))(flat(model), x, y)  # noqa: N806
    torch.testing.assert_close(problem.hessian() @ v, H @ v)
    torch.testing.assert_close(problem.hessian().dense(), H)
    torch.testing.assert_close(problem.value_and_gradient()[1], gradient)


def test_gradients_of_rows_are_differentiable_where_that_is_asked_for(model: nn.Module) -> None:
    x, y = data()
    rows = jacops.sample_gradients(model, CROSS_ENTROPY, x, y, create_graph=True)
    found = torch.autograd.grad(rows.dense().square().sum(), list(model.parameters()))
    with sdpa_kernel(SDPBackend.MATH):
        loss = by_hand(model)
        squares = lambda p: sum(grad(loss)(p, a[None], b[None]).square().sum() for a, b in zip(x, y, strict=True))  # noqa: E731
        expected = grad(squares)(flat(model))
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in found]), expected)


@pytest.mark.filterwarnings("ignore:ekfac. . of . approximate solutions")
@pytest.mark.parametrize("solver", [EKFAC(report_residual=False), EKFAC()], ids=["factors", "with residuals"])
def test_influences_do_not_depend_on_the_kernel(model: nn.Module, solver: EKFAC) -> None:
    x, y = data()

    def scores() -> Tensor:
        batches = [(x[:3], y[:3]), (x[3:], y[3:])]
        found = jacops.compute_influences(
            model, batches, test_data=[(x[:2], y[:2])], loss=CROSS_ENTROPY, solver=solver, damping=0.1
        )
        return found.values

    with Kernels() as kernels:
        fused = scores()
    with sdpa_kernel(SDPBackend.MATH):
        written_out = scores()
    torch.testing.assert_close(fused, written_out)
    assert kernels.seen["backward"]
