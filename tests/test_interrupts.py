"""An interrupt at any line of the library leaves torch's global state and the caller's model as they were."""

import ast
import contextlib
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._python_dispatch as dispatch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jacops

SRC = str(Path(jacops.__file__).parent)
pytestmark = pytest.mark.filterwarnings("ignore::jacops.JacopsWarning", "ignore::UserWarning")


class Interrupter:
    """Raises KeyboardInterrupt at the k-th traced event of one thread.

    Attributes:
        events: Events so far.
        seen: Where they happened, if none is to be interrupted.
        place: Where it was raised, None while it was not.
    """

    def __init__(self, at: int, places: Callable[[str], bool], opcodes: bool = False):
        self.at, self.places, self.opcodes = at, places, opcodes
        self.events, self.place = 0, None
        self.seen: list[str] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if self.place is not None or not self.places(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes = self.opcodes
        self._count(frame, event)
        return self._count

    def _count(self, frame: FrameType, event: str, arg: Any = None) -> Any:
        if self.place is None and event == ("opcode" if self.opcodes else "line"):
            self.events += 1
            if self.at < 0:
                self.seen.append(f"{frame.f_code.co_filename}:{frame.f_lineno}:{self.opcodes and frame.f_lasti}")
            if self.events == self.at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
                raise KeyboardInterrupt
        return self._count

    @contextmanager
    def active(self) -> Iterator[None]:
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)


def bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, Any]:
    """All that a call may have to put back."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "random state": bits(torch.get_rng_state()),
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "attention kernels": [
            getattr(torch._C, f"_get_{name}_sdp_enabled")()
            for name in ("math", "flash", "mem_efficient", "cudnn", "overrideable")
        ],
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "flags of modes": [v for k, v in vars(dispatch).items() if k.startswith("_is_in_") and isinstance(v, bool)],
        "warning filters": list(warnings.filters),
        "numpy": np.geterr(),
        "hooks": [
            (name, [len(v) for k, v in vars(m).items() if k.endswith("_hooks")]) for name, m in model.named_modules()
        ],
        "modes of modules": [m.training for m in model.modules()],
        "attributes": [sorted((k, id(v)) for k, v in vars(m).items()) for m in model.modules()],
        "values": {name: bits(tensor) for name, tensor in named.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in named.items()},
        "gradients": {name: (id(tensor.grad), bits(tensor.grad)) for name, tensor in named.items()},
        "hooks on tensors": {name: dict(tensor._backward_hooks or {}) for name, tensor in named.items()},
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [f"{name}: {before[name]!s:.200} -> {after[name]!s:.200}" for name in before if before[name] != after[name]]


def lock_is_free() -> bool:
    """Whether another thread can make a call: no lock was left held."""
    model, x = nn.Linear(2, 1).double(), torch.ones(1, 2).double()
    done: list[Tensor] = []
    other = threading.Thread(target=lambda: done.append(jacops.compute_jacobian(model, x)), daemon=True)
    other.start()
    other.join(600)  # only where a lock is held does it take longer than a moment
    return len(done) == 1


class Attentive(nn.Module):
    """Attention, a buffer, and a read of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).unsqueeze(-2)
        if self.scale.item() < 0:
            return x
        return self.last(nn.functional.scaled_dot_product_attention(h, h, h).squeeze(-2) * self.scale)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.rand(2).double()


class Checkpointed(nn.Module):
    """A reentrant checkpoint, for which `.grad` is written on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(checkpoint(self.first, x, use_reentrant=True)))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind().double()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, m, generator=generator, dtype=torch.float64) for m, n in ((3, 3), (2, 3)))  # type: ignore[return-value]


def mse(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean()


def closure(model: nn.Module, call: Callable[[Any, list[Tensor]], Any]) -> Any:
    x, _ = data()
    params = list(model.parameters())
    return call(lambda: model(x), params)


class Augmented(torch.utils.data.Dataset):
    """Rows that draw random numbers; the loader draws the order of its own workers' seeds, too."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.rand(3).double() * 0 + i, torch.ones(2).double()


def problem_gradient(model: nn.Module) -> Tensor:
    loader = torch.utils.data.DataLoader(Augmented(), batch_size=2)
    return jacops.Problem(model, nn.MSELoss(), loader).gradient()


def _of(call: Callable[[nn.Module, Tensor, Tensor], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: call(model, *data())


CALLS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], Any]]] = {
    "compute_jacobian": (Attentive, _of(lambda m, x, y: jacops.compute_jacobian(m, x))),
    "compute_jacobian of noise": (Noisy, _of(lambda m, x, y: jacops.compute_jacobian(m, x, fallback="silent").shape)),
    "hessian @ v": (Attentive, _of(lambda m, x, y: jacops.hessian(m, mse, x, y) @ torch.ones(26).double())),
    "hessian through a checkpoint": (Checkpointed, _of(lambda m, x, y: jacops.modjac(m, x, flatten=True))),
    "ggn.dense": (Attentive, _of(lambda m, x, y: jacops.ggn(m, mse, x, y).dense())),
    "sample_gradients": (Attentive, _of(lambda m, x, y: jacops.sample_gradients(m, mse, x, y).dense())),
    "modjac": (Attentive, _of(lambda m, x, y: jacops.modjac(m, x, flatten=True))),
    "full_jacobian": (Attentive, lambda m: closure(m, jacops.full_jacobian)),
    "jvp": (Attentive, lambda m: closure(m, lambda f, p: jacops.jvp(f, p, [torch.ones_like(q) for q in p]))),
    "contributions": (Attentive, _of(lambda m, x, y: jacops.contributions(m, x).output)),
    "a problem over a loader": (Attentive, lambda m: problem_gradient(m)),
    "input_hessian": (Attentive, _of(lambda m, x, y: jacops.input_hessian(m, x))),
}


def guards(path: str) -> bool:
    """The modules in which torch's state is changed and put back."""
    names = ("restoring", "contexts", "kernels", "attention", "side_effects", "replica", "cut", "inputs")
    return path.startswith(SRC) and Path(path).stem in names


def library(path: str) -> bool:
    return path.startswith(SRC)


def close(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    return all(close(p, q) for p, q in zip(a, b, strict=True)) if isinstance(a, list | tuple) else a == b


def places_of(call: Callable[[nn.Module], Any], kind: type[nn.Module], places: Any, opcodes: bool) -> list[str]:
    """Where the events of one run happen, in order."""
    counting = Interrupter(-1, places, opcodes)
    with counting.active():
        call(made(kind))
    return counting.seen


def first_ones(seen: list[str], wanted: int) -> list[int]:
    """The numbers of the events to interrupt at: every place once, thinned evenly to as many as are wanted."""
    first = sorted({place: at for at, place in reversed([*enumerate(seen, start=1)])}.values())
    return [first[round(i * (len(first) - 1) / (wanted - 1))] for i in range(wanted)] if len(first) > wanted else first


def last_ones(seen: list[str], wanted: int) -> list[int]:
    return [len(seen) + 1 - at for at in first_ones(seen[::-1], wanted)]


def check_interrupted_at(at: int, name: str, right: Any, places: Callable[[str], bool], opcodes: bool) -> None:
    kind, call = CALLS[name]
    model = made(kind)
    before = state(model)
    interrupter = Interrupter(at, places, opcodes)
    alive: list[BaseException] = []  # as in an interactive session: nothing may wait for its frames to be freed
    try:
        with interrupter.active():
            call(model)
    except KeyboardInterrupt as interrupt:
        alive.append(interrupt)
    assert bool(alive) is (interrupter.place is not None), "the interrupt was lost"
    moved = differences(before, state(model))
    assert not moved, (interrupter.place, moved)
    assert close(call(model), right), interrupter.place
    moved = differences(before, state(model))
    assert not moved, (interrupter.place, "the call after", moved)


def check_call(name: str, places: Callable[[str], bool], opcodes: bool, wanted: int) -> None:
    kind, call = CALLS[name]
    right = call(made(kind))
    seen = places_of(call, kind, places, opcodes)
    for at in sorted({*first_ones(seen, wanted), *last_ones(seen, wanted)}):
        check_interrupted_at(at, name, right, places, opcodes)
    assert lock_is_free()


QUICK = ("hessian @ v", "modjac", "full_jacobian", "jvp")


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_a_line_of_the_guards_leaves_nothing_changed(name: str) -> None:
    check_call(name, guards, opcodes=False, wanted=15 if name in QUICK else 3)


@pytest.mark.parametrize("name", ["hessian @ v", "modjac", "hessian through a checkpoint", "full_jacobian"])
def test_an_interrupt_between_two_instructions_of_the_guards_leaves_nothing_changed(name: str) -> None:
    check_call(name, guards, opcodes=True, wanted=6)


@pytest.mark.parametrize("name", ["compute_jacobian", "a problem over a loader"])
def test_an_interrupt_at_a_line_of_the_library_leaves_nothing_changed(name: str) -> None:
    check_call(name, library, opcodes=False, wanted=6)


@pytest.mark.parametrize(
    "outer", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_an_interrupt_restores_the_modes_of_the_caller(outer: Callable[[], Any]) -> None:
    kind, call = CALLS["modjac"]
    seen = places_of(call, kind, guards, opcodes=False)
    for at in first_ones(seen, 30):
        model = made(kind)
        with outer():
            before = state(model)
            interrupter = Interrupter(at, guards)
            with contextlib.suppress(KeyboardInterrupt), interrupter.active():
                call(model)
            moved = differences(before, state(model))
            assert not moved, (interrupter.place, moved)


def kernels() -> dict[str, Any]:
    model = made(Attentive)
    return {name: value for name, value in state(model).items() if name in ("attention kernels", "random state")}


def test_threads_share_the_choice_of_kernels_and_random_state_after_one_was_interrupted() -> None:
    """A thread that is recording keeps its kernels, and the caller's come back when it is done."""
    inside, leave = threading.Event(), threading.Event()
    found: list[Any] = []

    class Waiting(Attentive):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            leave.wait()
            found.append(kernels()["attention kernels"])
            return super().forward(x)

    kind, call = CALLS["modjac"]
    seen = places_of(call, kind, guards, opcodes=False)
    x, _ = data()
    for at in first_ones(seen, 25):
        inside.clear()
        leave.clear()
        model = made(Attentive)
        other = threading.Thread(target=jacops.modjac, args=(made(Waiting), x), daemon=True)
        before = kernels()
        other.start()
        inside.wait()
        with contextlib.suppress(KeyboardInterrupt), Interrupter(at, guards).active():
            call(model)
        leave.set()
        other.join()
        assert set(map(tuple, found)) == {(True, False, False, False, False)}
        assert kernels() == before


# The rule behind it, read from the source

ENTERED = re.compile(
    r"^(recording|sweeping|arithmetic|seeded|random_state_kept|math_attention|GradientsKept|WarningsIgnored|"
    r"NumericWarningsIgnored|torch\.no_grad|torch\.enable_grad|torch\.set_grad_enabled|_NoBroadcast|Taint|Meter|"
    r"Rehearsal)\(|^(mode|watch|taint|tracer|self)$"
)
LEFT_TO_TORCH = re.compile(
    r"(torch\.inference_mode|torch\.autocast|catch_warnings|np\.errstate|sdpa_kernel|fork_rng)\("
)


def contexts(tree: ast.AST, around: ast.FunctionDef | None = None) -> Iterator[tuple[ast.FunctionDef | None, str]]:
    """The contexts that functions enter, with the innermost function around each."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.With):
            yield from ((around, ast.unparse(item.context_expr)) for item in node.items)
        yield from contexts(node, node if isinstance(node, ast.FunctionDef) else around)


def test_every_function_that_enters_a_guard_restores_what_an_interrupt_left() -> None:
    strays = []
    for path in sorted(Path(SRC).rglob("*.py")):
        for function, context in contexts(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(SRC)}: {function.name if function else None} enters {context}"
            if LEFT_TO_TORCH.search(context):
                strays.append(f"{where}; use a Guard, which can be restored twice")
            if not ENTERED.match(context):
                continue
            marks = [ast.unparse(mark) for mark in function.decorator_list] if function else []
            yields = function is not None and any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(function))
            if not yields and not {"restoring", "eager"} & set(marks):
                strays.append(f"{where} without @restoring")
    assert not strays, "\n".join(strays)
