"""Right values or typed errors for recordings that once gave zeros, NaN or raw errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jacops
from jacops import NotDifferentiableError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---- reentrant checkpoints in closures -------------------------------------------------------------------------------


def reentrant(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


class TwoLayers(nn.Module):
    """Two layers, the first one under a reentrant checkpoint."""

    def __init__(self, first: nn.Module, last: nn.Module):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(reentrant(self.first, x)))


def layers() -> tuple[nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), torch.randn(5, 3).double()


def losing_closures() -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Closures through checkpoints none of whose arguments requires grad, and the parameters that are asked for."""
    first, last, x = layers()
    params = [*first.parameters(), *last.parameters()]
    model, doubled = TwoLayers(first, last), first.weight * 2
    return {
        "a function": (lambda: last(torch.tanh(reentrant(first, x))), params),
        "a module": (lambda: model(x), params),
        "inside a reentrant one": (lambda: reentrant(model, x), params),
        "inside one that is not reentrant": (lambda: checkpoint(model, x, use_reentrant=False), params),
        "several": (lambda: last(torch.tanh(reentrant(first, reentrant(torch.sin, x)))), params),
        "a tensor computed before the call": (lambda: reentrant(lambda z: z @ doubled.T, x), params),
        "an operation in place": (
            lambda: last(reentrant(lambda z: torch.zeros(5, 4).double().addmm_(z, first.weight.T), x)),
            params,
        ),
        "some of the parameters": (lambda: reentrant(lambda z: z @ first.weight.T, x) + first.bias, params),
        "no argument at all": (lambda: last(reentrant(lambda: x @ first.weight.T)), params),
    }


def products(params: list[Tensor]) -> dict[str, Callable[[Callable[[], Tensor]], Any]]:
    ones = [torch.ones_like(p) for p in params]
    return {
        "full_jacobian": lambda f: jacops.full_jacobian(f, params),
        "jvp": lambda f: jacops.jvp(f, params, ones),
        "batch_jvp": lambda f: jacops.batch_jvp(f, params, [o.unsqueeze(0) for o in ones]),
        "vjp": lambda f: jacops.vjp(f, params, torch.ones_like(f())),
        "batch_vjp": lambda f: jacops.batch_vjp(f, params, torch.ones_like(f()).unsqueeze(0)),
    }


@pytest.mark.parametrize("name", losing_closures())
@pytest.mark.parametrize("call", products([]))
def test_a_closure_through_a_reentrant_checkpoint_is_refused(name: str, call: str) -> None:
    function, params = losing_closures()[name]
    with pytest.raises(NotDifferentiableError, match=rf"{call}.*use_reentrant=False"):
        products(params)[call](function)


@pytest.mark.parametrize("call", products([]))
def test_a_checkpoint_that_uses_none_of_the_parameters_is_no_reason_to_refuse(call: str) -> None:
    first, last, x = layers()
    params = list(last.parameters())
    plain = products(params)[call](lambda: last(torch.tanh(first(x))))
    found = products(params)[call](lambda: last(torch.tanh(reentrant(first, x))))
    torch.testing.assert_close(found, plain)


def test_a_model_whose_checkpoint_takes_integers_is_refused() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.last = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(reentrant(self.embedding, x))

    model, x = Words().double(), torch.tensor([0, 1, 3])
    for call in (
        lambda: jacops.modjac(model, x),
        lambda: jacops.jacobian(model, x).dense(),
        lambda: jacops.sample_gradients(model, lambda output, y: output.sum(), x, torch.zeros(3)).dense(),
    ):
        with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
            call()


def test_a_model_through_a_reentrant_checkpoint_stays_right() -> None:
    first, last, x = layers()
    plain = jacops.modjac(nn.Sequential(first, nn.Tanh(), last), x, flatten=True)
    torch.testing.assert_close(jacops.modjac(TwoLayers(first, last), x, flatten=True), plain)
