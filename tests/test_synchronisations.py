"""What is read from a device: each read waits for all that was queued on it, and a copy of logits is a large one.

A processor has no queue, so reads are counted: of single values, of masks whose `True`s decide on a shape, and of
whole tensors. The place that reads is the innermost function of jacops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import jacops
from jacops._checksums import digest_there
from jacops._data import Batches
from jacops.linalg import Matrix
from jacops.solvers import CG, EKFAC, MINRES, LiSSA

OPERATIONS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
METHODS = {"cpu", "numpy", "tolist", "__array__"}


class Read(NamedTuple):
    what: str
    where: str  # a module of jacops
    numel: int


def place() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("jacops"):
            return name
        frame = frame.f_back
    return ""


class _Dispatched(TorchDispatchMode):
    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in OPERATIONS or by_mask:
            self.reads.append(Read(name, place(), args[0].numel()))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Methods that copy to the processor; one that is called on what another one copied is no read of its own."""

    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads, self.here = reads, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_processor = name == "to" and "cpu" in [
            a for a in [*args[1:], *(kwargs or {}).values()] if isinstance(a, str)
        ]
        if (name in METHODS or to_processor) and id(args[0]) not in self.here:
            self.reads.append(Read(name, place(), args[0].numel()))
        found = func(*args, **(kwargs or {}))
        if name == "cpu":
            self.here[id(found)] = found  # kept, so that no other tensor gets its identity
        return found


def reads_of(call: Callable[[], Any]) -> tuple[list[Read], Any]:
    reads: list[Read] = []
    with _Dispatched(reads), _Called(reads):
        found = call()
    return reads, found


def test_the_count_sees_each_kind_of_read():
    x = torch.arange(6.0)
    seen = {
        "item": lambda: x.sum().item(),
        "float": lambda: float(x[0]),
        "if": lambda: bool((x > 0).any()),
        "mask": lambda: x[x > 2],
        "written by mask": lambda: x.clone().__setitem__(x > 2, 0.0),
        "nonzero": lambda: x.nonzero(),
        "tolist": lambda: x.tolist(),
        "numpy": lambda: x.cpu().numpy(),
        "to": lambda: x.to("cpu"),
    }
    assert {name: len(reads_of(call)[0]) for name, call in seen.items()} == dict.fromkeys(seen, 1)


def positive(size: int) -> Tensor:
    """A positive definite matrix of condition 1e6, on which no solver ends within the steps that are counted."""
    turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    return turn @ torch.diag(torch.logspace(-6, 0, size, dtype=torch.float64)) @ turn.T


# Reads of its own that a solver makes in one step.
SOLVERS: dict[str, tuple[Callable[[int], Any], int]] = {
    "CG": (lambda steps: CG(max_steps=steps, block=False, tolerance=1e-14), 1),
    "block CG": (lambda steps: CG(max_steps=steps, tolerance=1e-14), 3),  # curvatures, rows left, rank
    "MINRES": (lambda steps: MINRES(max_steps=steps, tolerance=1e-14), 1),
    "LiSSA": (lambda steps: LiSSA(max_steps=steps, tolerance=1e-14), 1),
}


@pytest.mark.parametrize("kind", ["matrix", "model"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_of_a_solver_reads_its_status_and_nothing_else(name: str, kind: str):
    solver, own = SOLVERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    A = Matrix(positive(60), symmetric=True) if kind == "matrix" else jacops.ggn(model, F.cross_entropy, x, y)
    b = torch.randn(3, A.shape[1], dtype=torch.float64)

    def counted(steps: int) -> tuple[list[Read], int]:
        reads, found = reads_of(lambda: jacops.solve(A, b, solver(steps), damping=1e-6, on_failure="return"))
        assert found.iterations == (steps,) * 3
        return reads, steps

    counted(4)  # what is proved once is proved now
    (few, less), (many, more) = counted(4), counted(9)
    steps = more - less
    ours = sum("solvers" in read.where for read in many) - sum("solvers" in read.where for read in few)
    assert ours == own * steps
    # A product with a model checks itself by the adjoint identity, in one read.
    beside = len(many) - len(few) - ours
    assert beside <= (0 if kind == "matrix" else steps)


LOGITS = 24 * 5 * 40  # sequences, tokens and words; more than bytes in any of the parameters


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens))))


def next_words(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def influences(model: nn.Module, data: Any) -> Any:
    method = EKFAC(fisher="monte_carlo")
    wrapped = jacops.TorchTwiceDifferentiable(model, next_words)
    options: Any = {"test_data": data[:1], "solver": method, "curvature": "ggn", "damping": 1e-2}
    return jacops.compute_influences(wrapped, data, parameters="mix.*", **options)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "hessian": lambda model, data: jacops.hessian(model, next_words, *data[0]) @ noise_for(model),
    "ggn": lambda model, data: jacops.ggn(model, next_words, *data[0]) @ noise_for(model),
    "Problem": lambda model, data: jacops.Problem(model, next_words, data).ggn() @ noise_for(model),
    "EK-FAC": lambda model, data: EKFAC(fisher="monte_carlo").approximate(
        jacops.Problem(model, next_words, data, parameters="mix.*").ggn()
    ),
    "sample_gradients": lambda model, data: jacops.sample_gradients(model, next_words, *data[0]).gram(),
    "compute_influences": influences,
    "model_vjp": lambda model, data: jacops.model_vjp(model, data[0][0], torch.ones(24, 5, 40)),
}


def noise_for(model: nn.Module) -> Tensor:
    many = sum(p.numel() for p in model.parameters())
    return torch.randn(many, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CALLS)
def test_logits_are_not_copied_to_the_processor(name: str):
    torch.manual_seed(0)
    model, tokens = Words(), torch.randint(40, (48, 5))
    data = [(tokens[:24], tokens[:24]), (tokens[24:], tokens[24:])]
    for _ in range(2):  # the second time without what is proved once
        reads, _ = reads_of(lambda: CALLS[name](model, data))
        copied = [read for read in reads if read.what in {*METHODS, "to"} and read.numel >= LOGITS]
        assert not copied, copied


def test_a_digest_made_on_a_device_distinguishes_orders_and_values():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    others = [x[torch.arange(50).roll(1)], x.flip(1), x + 1e-6, x[:49], x.double(), -x, torch.zeros(50, 3)]
    rows = torch.eye(50)  # all rows hold the same numbers
    more = [rows, rows.flip(0), rows[torch.arange(50).roll(1)], torch.zeros(3), torch.zeros(0)]
    digests = [digest_there(t) for t in (x, *others, *more)]
    assert digest_there(x.clone()) == digests[0]
    assert digest_there(x.T.contiguous().T) == digests[0]
    assert len(set(digests)) >= len(digests) - 2  # zeros of any number differ by their count alone
    large = torch.arange(2**23 + 5)
    assert digest_there(large) != digest_there(large.roll(2**22))


def test_batches_in_a_device_s_memory_are_read_in_the_first_pass_alone(monkeypatch: pytest.MonkeyPatch):
    for home in ("_data", "_checksums"):
        monkeypatch.setattr(f"jacops.{home}.is_apart", lambda array: isinstance(array, Tensor))
    data = [(torch.randn(4, 3), torch.randn(4, 2)), (torch.randn(4, 3), torch.randn(4, 2))]
    batches = Batches(data, "data")
    first, _ = reads_of(lambda: list(batches))
    later, _ = reads_of(lambda: list(batches))
    assert len(first) == 4
    assert not later
    data.reverse()
    with pytest.raises(jacops.errors.DataError):
        list(batches)
    data.reverse()
    assert len(list(batches)) == 2
    data[1][0].add_(1)
    with pytest.raises(jacops.errors.DataError):
        list(batches)
