"""Products of one vector: by vectors alone, whatever the outputs, the leaves and the caller's modes are."""

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jacops
from cases import F64
from jacops._cached import cached_property
from jacops._torch.protocol import Linearization
from jacops.errors import InputError, NonFiniteError


class Mixed(nn.Module):
    """Parameters of several kinds: used, linear, not used, empty, a number, and one of another dtype."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int, dtype: torch.dtype = F64) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))

        self.weight, self.scale = drawn(3, 2), drawn()
        if "linear" in kinds:
            self.linear = drawn(2)
        if "unused" in kinds:
            self.unused = drawn(2)
        if "empty" in kinds:
            self.empty = drawn(0, 3)
        if "single" in kinds:
            self.single = drawn(2, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each row."""
        h = torch.tanh(x @ self.weight.T).sum(1) * self.scale
        if hasattr(self, "empty"):
            h = h + self.empty.sum()
        if hasattr(self, "single"):
            h = h * self.single.double().prod()
        return h + (x @ self.linear if hasattr(self, "linear") else 0)


def total(output: Tensor, y: Tensor) -> Tensor:
    return (output * y).sum()


def squared(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output**2


def by_hand(model: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    params = list(model.parameters())
    slopes = torch.autograd.grad(
        total(model(x), y), params, create_graph=True, allow_unused=True, materialize_grads=True
    )
    parts = [
        part.reshape(p.shape).to(p.dtype) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)
    ]
    live = [(g, part) for g, part in zip(slopes, parts, strict=True) if g.requires_grad]
    outputs, seeds = zip(*live, strict=True)
    found = torch.autograd.grad(outputs, params, seeds, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten().to(v.dtype) for part in found])


KINDS = [(), ("linear",), ("unused",), ("empty",), ("single",), ("linear", "unused", "empty", "single")]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(kinds) or "all used")
@pytest.mark.parametrize("stride", [1, 2])
def test_a_product_is_that_by_hand(kinds: tuple[str, ...], stride: int) -> None:
    model, x, y = Mixed(*kinds), torch.randn(4, 2, dtype=F64), torch.randn(4, dtype=F64)
    size = sum(p.numel() for p in model.parameters())
    v = torch.randn(stride * size, dtype=F64)[::stride]
    H = jacops.hessian(model, total, x, y)
    expected = by_hand(model, x, y, v)
    for found in (
        H @ v,
        H.apply(v.unsqueeze(0))[0],
        (H @ torch.stack([v, v], 1))[:, 1],
        jacops.hvp(model, total, x, y, v),
    ):
        torch.testing.assert_close(found, expected)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_change_nothing(mode: str) -> None:
    model, x, y = Mixed(), torch.randn(4, 2, dtype=F64), torch.randn(4, dtype=F64)
    v = torch.randn(7, dtype=F64, requires_grad=True)
    expected, kept = by_hand(model, x, y, v.detach()), jacops.hessian(model, total, x, y)
    with MODES[mode]():
        made = jacops.hessian(model, total, x, y)
        found = [kept @ v, made @ v, jacops.hvp(model, total, x, y, v)]
    for product in [*found, made @ v, kept @ v]:
        torch.testing.assert_close(product, expected)
        assert not product.requires_grad


def test_a_model_that_changes_between_calls() -> None:
    model, x, y = Mixed(), torch.randn(4, 2, dtype=F64), torch.randn(4, dtype=F64)
    v = torch.randn(7, dtype=F64)
    for _ in range(3):
        jacops.hvp(model, total, x, y, v)
    with torch.no_grad():
        model.weight.mul_(2)
    torch.testing.assert_close(jacops.hvp(model, total, x, y, v), by_hand(model, x, y, v))
    model.weight = nn.Parameter(torch.randn(3, 2, dtype=F64))
    torch.testing.assert_close(jacops.hvp(model, total, x, y, v), by_hand(model, x, y, v))
    handle = model.register_forward_hook(squared)
    torch.testing.assert_close(jacops.hvp(model, total, x, y, v), by_hand(model, x, y, v))
    handle.remove()
    torch.testing.assert_close(jacops.hvp(model, total, x[:2], y[:2], v), by_hand(model, x[:2], y[:2], v))


def test_a_cotangent_of_another_length_or_dtype_is_not_cut() -> None:
    w = torch.ones(2, 2, dtype=F64, requires_grad=True)
    outputs = [w**2, w.sum(0) ** 2]
    lin = Linearization([w], outputs, leaf_names="w", output_names="y", call="test")
    torch.testing.assert_close(lin.pull_vector(torch.ones(6, dtype=F64)), torch.full((4,), 6.0, dtype=F64))
    with pytest.raises(RuntimeError, match="split"):
        lin.pull_vector(torch.ones(8, dtype=F64))
    with pytest.raises(RuntimeError, match="split"):
        lin.pull_vector(torch.ones(5, dtype=F64))


def test_what_does_not_fit_is_refused_by_name() -> None:
    model, x, y = Mixed(), torch.randn(4, 2, dtype=F64), torch.randn(4, dtype=F64)
    for product in (lambda v: jacops.hessian(model, total, x, y) @ v, lambda v: jacops.hvp(model, total, x, y, v)):
        with pytest.raises(InputError, match=r"of torch.float32 on cpu, but torch.float64 on cpu is needed"):
            product(torch.ones(7))
        with pytest.raises(InputError, match=r"weight \(3, 2\), scale \(\)"):
            product(torch.ones(8, dtype=F64))
        with pytest.raises(NonFiniteError, match="in `v`, 7 of 7 entries"):
            product(torch.full((7,), torch.inf, dtype=F64))
    with pytest.raises(NonFiniteError, match="^hvp: the loss is nan; x holds nan in row 1"):
        jacops.hvp(model, total, x.index_fill(0, torch.tensor(1), torch.nan), y, torch.ones(7, dtype=F64))


def test_names_of_a_gradient_are_made_when_they_are_read() -> None:
    model, x, y = Mixed(), torch.randn(4, 2, dtype=F64), torch.randn(4, dtype=F64)
    jacops.hessian(model, total, x, y)  # with its checks, which read more
    H = jacops.hessian(model, total, x, y)
    first = H @ torch.ones(7, dtype=F64)
    assert vars(H.lin)["_codomain"] is None
    assert H.codomain.names == ("d loss / d weight", "d loss / d scale")
    torch.testing.assert_close(first, by_hand(model, x, y, torch.ones(7, dtype=F64)))


def test_threads_do_not_wait_for_one_another_in_cached_properties() -> None:
    met = threading.Barrier(2, timeout=20)

    class Slow:
        @cached_property
        def value(self) -> int:
            met.wait()
            return 1

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(Slow().value)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1, 1]
    kept = Slow.__new__(Slow)
    kept.__dict__["value"] = 2
    assert kept.value == 2
    assert isinstance(Slow.value, cached_property)
