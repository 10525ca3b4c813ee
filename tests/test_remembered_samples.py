"""Jacobians by samples again: what later calls leave out changes no number, whatever happened since the first one."""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from tests import oracle
from tests.small import draw
from torch import Tensor, nn

from jacops import compute_jacobian
from jacops._runtime import engine
from jacops._runtime.engine import swept
from jacops.errors import NotDifferentiableError

F64 = torch.float64
FEW, MANY = 2, 12  # outputs that are pulled one by one, and those that go into one batched pass


def net(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def bare(model: nn.Module, x: Tensor) -> Tensor:
    """A loop of plain `autograd.grad`, for models whose samples do not mix."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        columns = model(leaf).sum(0).unbind()
        return torch.stack([torch.autograd.grad(column, leaf, retain_graph=True)[0] for column in columns], 1)


def level() -> int:
    """How many levels of torch's batching are entered."""
    here = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return here


class Branching(nn.Module):
    """A net with a switch that is no tensor."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net, self.deep = net(outputs), False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sin() if self.deep else x)


def flip(model: Any) -> None:
    model.deep = True


def swap(model: Any) -> None:
    model.net[1] = nn.Sigmoid()


def replace_weights(model: Any) -> None:
    model.net[0].weight = nn.Parameter(draw(6, 3, seed=5))


def write_weights(model: Any) -> None:
    with torch.no_grad():
        model.net[0].weight.copy_(draw(6, 3, seed=6))


def hook(model: Any) -> None:
    model.net[1].register_forward_hook(lambda module, given, output: 2 * output)


def mix(model: Any) -> None:
    model.net[1].register_forward_hook(lambda module, given, output: output + output.sum(0))


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("outputs", [FEW, MANY])
@pytest.mark.parametrize("change", [flip, swap, replace_weights, write_weights, hook, mix])
def test_a_model_that_changes_after_its_proofs_gives_its_own_numbers(
    change: Callable[[Any], None], outputs: int
) -> None:
    model, x = Branching(outputs), draw(5, 3)
    for _ in range(3):
        torch.testing.assert_close(compute_jacobian(model, x), oracle.input_jacobian(model, x))
    change(model)
    for more in (x, x, draw(4, 3, seed=2)):
        torch.testing.assert_close(compute_jacobian(model, more), oracle.input_jacobian(model, more))


@pytest.mark.parametrize("outputs", [FEW, MANY])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_later_calls_are_right_in_the_modes_of_the_caller(mode: Callable[[], Any], outputs: int) -> None:
    model, x = net(outputs), draw(5, 3)
    expected, out = bare(model, x), torch.empty(5, outputs, 3, dtype=F64)
    for _ in range(3):
        with mode():
            found = compute_jacobian(model, x)
            compute_jacobian(model, x, out=out)
            assert torch.equal(found, out)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("outputs", [FEW, MANY])
def test_later_calls_under_autocast_are_those_of_the_first(outputs: int) -> None:
    model, x = net(outputs).float(), draw(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, later = compute_jacobian(model, x), compute_jacobian(model, x)
    torch.testing.assert_close(later, first)
    assert not torch.equal(later, compute_jacobian(model, x))


class Several(nn.Module):
    """Outputs of several shapes, one of which does not depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = net(FEW), net(MANY)

    def forward(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        still = torch.ones(len(x), 2, dtype=x.dtype)
        return {"few": self.few(x), "many": self.many(x * z).view(-1, 3, MANY // 3), "still": still}


def test_several_inputs_and_outputs_lie_where_the_first_call_put_them() -> None:
    model, x, z = Several(), draw(5, 3), draw(5, 3, seed=1)
    first, later = compute_jacobian(model, (x, z)), compute_jacobian(model, (x, z))
    for name in ("few", "many", "still"):
        for before, now in zip(first[name], later[name], strict=True):
            torch.testing.assert_close(now, before)
    torch.testing.assert_close(later["few"][0], bare(model.few, x))
    torch.testing.assert_close(later["many"][0].flatten(1, 2), bare(model.many, x * z) * z[:, None])
    assert not later["few"][1].any()
    assert not later["still"][0].any()


def test_threads_share_what_is_remembered() -> None:
    model, x = net(MANY), draw(6, 3)
    expected, found = compute_jacobian(model, x), list[Tensor]()
    threads = [
        threading.Thread(target=lambda: found.extend(compute_jacobian(model, x) for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(one, expected) for one in found)


class Failing(torch.autograd.Function):
    """The identity, whose backward fails where it is asked to."""

    fails = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if Failing.fails:
            raise RuntimeError("no backward today")
        return grads[0].clone()


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
@pytest.mark.parametrize("outputs", [FEW, MANY])
def test_a_backward_that_fails_later_is_explained(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = net(outputs), draw(5, 3)

    def model(x: Tensor) -> Tensor:
        return linear(Failing.apply(x))

    for _ in range(2):
        torch.testing.assert_close(compute_jacobian(model, x), bare(linear, x))
    monkeypatch.setattr(Failing, "fails", True)
    with pytest.raises(NotDifferentiableError, match="custom Functions in the graph: Failing.*no backward today"):
        compute_jacobian(model, x)
    assert level() == 0
    monkeypatch.setattr(Failing, "fails", False)
    torch.testing.assert_close(compute_jacobian(model, x), bare(linear, x))


def point() -> tuple[Tensor, Tensor, Tensor]:
    x = draw(4, 3).requires_grad_()
    return x, x.sin() * x, draw(5, 4, 3, seed=1)


def test_batched_passes_are_those_of_grad_without_torchs_own_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, seeds = point()
    (expected,) = torch.autograd.grad(y, x, seeds, retain_graph=True, is_grads_batched=True)
    for known in (True, False):
        monkeypatch.setattr(engine, "_batches", known and engine._batches)
        (found,) = swept([y], [x], [seeds], batched=True)
        assert found is not None
        assert torch.equal(found, expected)
    for wrong in ([seeds, seeds[:2]], [seeds, seeds[0]]):
        with pytest.raises((RuntimeError, ValueError)):
            swept([y, y], [x], wrong, batched=True)
    assert level() == 0


@pytest.mark.parametrize("opcodes", [False, True])
def test_an_interrupt_leaves_no_level_of_batching(opcodes: bool) -> None:
    x, y, seeds = point()
    (expected,) = swept([y], [x], [seeds], batched=True)
    stopped, at = True, 0
    while stopped:
        at += 3 if opcodes else 1
        left = at

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal left
            within = frame.f_code.co_filename == engine.__file__
            frame.f_trace_opcodes = opcodes
            if within and event == ("opcode" if opcodes else "line"):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace if within else None

        stopped = False
        sys.settrace(trace)
        try:
            swept([y], [x], [seeds], batched=True)
        except KeyboardInterrupt:
            stopped = True
        finally:
            sys.settrace(None)
        assert level() == 0, at
    assert at > 10
    (found,) = swept([y], [x], [seeds], batched=True)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
