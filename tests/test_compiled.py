"""Compiled sweeps: as right as plain ones, held against them in every call, and gone where they do not pay."""

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch
from torch import Tensor, nn

import jacops
import oracle
from cases import F64, Attention
from jacops._torch.samples import compiled
from jacops._torch.samples.batch import Samples

SEEN: list[int] = []


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Run graphs as they were traced, and take them for faster."""
    if "inductor" in request.node.name:
        return
    monkeypatch.setattr(compiled, "_BACKEND", "eager")
    clock: Iterator[int] = count(1000, -1)
    monkeypatch.setattr(compiled, "_seconds", lambda call, like: (call(), next(clock))[1])


def route(model: Callable[..., Tensor], x: object) -> str:
    return Samples(model, x, call="test", compile=True).jacobians().route


class Counting(nn.Module):
    """Notes how many samples every forward sees; its factor is a Python number that is in no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64), 1.0

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(len(x))
        return self.factor * self.inner(x)


class Normed(nn.Module):
    """Batch norm in eval mode, dropout, a convolution and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 3, 2),
            nn.BatchNorm1d(3),
            nn.GELU(),
            nn.Dropout(),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.Linear(6, 3),
        ).to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.unsqueeze(1))


MODELS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "perceptron": (Counting(), (4,)),
    "convolution, norms, dropout": (Normed(), (5,)),
    "attention": (Attention(), (3, 2)),
    "more outputs than a graph has sweeps": (nn.Linear(60, 40).to(F64), (60,)),
    "a plain function": (lambda x: x.sin().cumsum(1), (4,)),
    "an output without derivative": (lambda x: torch.ones_like(x), (4,)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1024, 3])
def test_graphs_answer_like_sweeps(name: str, batch_size: int) -> None:
    model, shape = MODELS[name]
    for seed in range(3):
        x = torch.randn(7, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
        found = jacops.compute_jacobian(model, x, batch_size, mode="reverse", compile=True)
        if isinstance(model, nn.Module):
            torch.testing.assert_close(found, oracle.input_jacobian(model, x))
        else:
            torch.testing.assert_close(found, jacops.compute_jacobian(model, x))


def test_a_later_call_is_one_graph_and_two_samples() -> None:
    model, x = Counting(), torch.randn(7, 4, dtype=F64)
    jacops.compute_jacobian(model, x, compile=True)
    SEEN.clear()
    jacops.compute_jacobian(model, x, compile=True)
    assert SEEN == [2]
    assert "compiled" in route(model, x)


def test_tuples_with_integers_are_compiled() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4, dtype=F64), nn.Linear(4, 3, dtype=F64)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.head(x * self.table(index)).tanh()

    model, x = Looked(), (torch.randn(6, 4, dtype=F64), torch.arange(6) % 5)
    plain = jacops.compute_jacobian(model, x)
    for _ in range(2):
        torch.testing.assert_close(jacops.compute_jacobian(model, x, compile=True)[0], plain[0])
    assert "compiled" in route(model, x)


def test_new_weights_reach_the_graph() -> None:
    model, x = Counting(), torch.randn(7, 4, dtype=F64)
    jacops.compute_jacobian(model, x, compile=True)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    torch.testing.assert_close(jacops.compute_jacobian(model, x, compile=True), oracle.input_jacobian(model, x))
    model.inner[2].weight = nn.Parameter(torch.randn(3, 6, dtype=F64))
    torch.testing.assert_close(jacops.compute_jacobian(model, x, compile=True), oracle.input_jacobian(model, x))
    SEEN.clear()
    jacops.compute_jacobian(model, x, compile=True)
    assert SEEN == [2]


def test_what_python_changed_is_noticed() -> None:
    model, x = Counting(), torch.randn(7, 4, dtype=F64)
    for factor in (1.0, 2.0, -3.0, 4.0, 5.0):
        model.factor = factor
        found = jacops.compute_jacobian(model, x, compile=True)
        torch.testing.assert_close(found, oracle.input_jacobian(model, x))
    assert "compiled" not in route(model, x)  # another model in every call: plain sweeps


def test_what_cannot_be_shared_or_is_swept_by_inputs_is_not_compiled() -> None:
    with pytest.warns(jacops.JacopsWarning, match="samples mix"):
        jacops.compute_jacobian(lambda x: x - x.mean(0), torch.randn(5, 4, dtype=F64), compile=True)
    decoder = nn.Linear(2, 30).to(F64)
    assert "compiled" not in route(decoder, torch.randn(5, 2, dtype=F64))
    pair = lambda x: (x.sin(), x.cos())  # noqa: E731
    with pytest.warns(jacops.JacopsWarning, match="one output tensor"):
        jacops.compute_jacobian(pair, torch.randn(5, 4, dtype=F64), mode="reverse", compile=True)


def test_no_compiler_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise OSError("no compiler here")

    monkeypatch.setattr(compiled, "_BACKEND", broken)
    x = torch.randn(7, 4, dtype=F64)
    with pytest.raises(jacops.errors.NotDifferentiableError, match="no compiler here"):
        jacops.compute_jacobian(Counting(), x, compile=True, fallback="error")
    model = Counting()
    with pytest.warns(jacops.JacopsWarning, match=r"(?s)no compiler here.*Route used: plain sweeps"):
        found = jacops.compute_jacobian(model, x, compile=True)
    torch.testing.assert_close(found, oracle.input_jacobian(model, x))
    jacops.compute_jacobian(model, x, compile=True)  # said once


def test_slower_graphs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(compiled, "_seconds", lambda call, like: (call(), next(clock))[1])
    with pytest.warns(jacops.JacopsWarning, match="measured slower"):
        jacops.compute_jacobian(Counting(), torch.randn(7, 4, dtype=F64), compile=True)


def test_wrong_graphs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Callable[..., object], inputs: object) -> Callable[..., object]:
        return lambda *args: tuple(2 * t for t in graph(*args))  # type: ignore[attr-defined]

    monkeypatch.setattr(compiled, "_BACKEND", wrong)
    model, x = Counting(), torch.randn(7, 4, dtype=F64)
    with pytest.warns(jacops.JacopsWarning, match="disagree with the plain ones"):
        found = jacops.compute_jacobian(model, x, compile=True)
    torch.testing.assert_close(found, oracle.input_jacobian(model, x))


@pytest.mark.slow
def test_inductor_agrees() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(64, 6, 16)
    head = nn.Sequential(model, nn.Flatten(), nn.Linear(96, 4))
    plain = jacops.compute_jacobian(head, x)
    for _ in range(2):
        found = jacops.compute_jacobian(head, x, compile=True, fallback="silent")
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
