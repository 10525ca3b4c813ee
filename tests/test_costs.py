"""What calls cost, in forward and backward passes, counted and not timed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
import oracle
from cases import F64
from jacops._runtime import engine
from small import Calls, Swept, close, draw, settled, tangents


def net(inputs: int, outputs: int) -> Swept:
    return Swept(nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).to(F64))


@pytest.mark.parametrize("outputs", [1, 2, 50, 2000])
def test_a_jvp_is_one_forward_and_at_most_two_backward_sweeps_whatever_the_output_size(outputs: int) -> None:
    model, x = net(3, outputs), draw(5, 3)
    params = list(model.parameters())
    jacops.jvp(lambda: model(x), params, tangents(model))
    assert model.spent() in ((1, 0), (1, 1), (1, 2))
    jacops.model_jvp(model, x, tangents(model))
    assert model.spent() in ((1, 0), (1, 1), (1, 2))


@pytest.mark.parametrize("batch", [1, 5, 30])
@pytest.mark.parametrize("outputs", [1, 7, 500])
def test_batched_products_linearise_once(batch: int, outputs: int) -> None:
    model, x = net(3, outputs), draw(1, 3)
    jacops.batch_jvp(lambda: model(x), model.parameters(), tangents(model, batch))
    forwards, backwards = model.spent()
    assert forwards == 1
    assert backwards <= min(batch, outputs) + 2
    jacops.batch_vjp(lambda: model(x), model.parameters(), draw(batch, 1, outputs))
    forwards, backwards = model.spent()
    assert forwards == 1
    assert backwards <= batch


@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(3, 4, 5), (1, 1, 200), (50, 2, 1)])
def test_a_full_jacobian_is_one_forward_and_a_sweep_per_row_or_column(inputs: int, outputs: int, rows: int) -> None:
    model, x = Swept(settled(nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh()))), draw(rows, inputs)
    found = jacops.full_jacobian(lambda: model(x), model.parameters())
    forwards, backwards = model.spent()
    assert forwards == 1
    assert backwards <= min(rows * outputs, inputs * outputs + outputs) + 3
    for block, expected in zip(found, oracle.parameter_jacobian(model.model, x)[0], strict=True):
        close(block, expected.reshape(block.shape))


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 2), (3, 40), (1, 300)])
def test_a_full_jacobian_is_a_sweep_per_row_or_per_column(inputs: int, outputs: int) -> None:
    p = torch.randn(inputs, dtype=F64, requires_grad=True)
    matrix = torch.randn(outputs, inputs, dtype=F64)
    sweeps = []

    def func() -> Tensor:
        y = matrix @ p.sin()
        y.register_hook(lambda grad: sweeps.append(1))
        return y

    jacops.full_jacobian(func, p)
    assert len(sweeps) <= min(outputs, inputs) + 3


@pytest.mark.parametrize(("inputs", "outputs", "n"), [(6, 2, 1), (6, 2, 9), (2, 30, 9), (6, 2, 200), (1, 5, 64)])
def test_an_input_jacobian_shares_its_sweeps_over_all_samples(inputs: int, outputs: int, n: int) -> None:
    model, x = net(inputs, outputs), torch.randn(n, inputs, dtype=F64)
    fewest, check = min(inputs, outputs), 4
    for forwards, backwards in ((1 + 2, fewest + check), (1, fewest + 1)):
        jacops.compute_jacobian(model.eval(), x)
        spent = model.spent()
        assert spent[0] <= forwards
        assert spent[1] <= backwards


def test_checks_are_paid_again_only_where_asked() -> None:
    model, x = net(6, 2), torch.randn(9, 6, dtype=F64)
    sweeps: dict[str, int] = {}
    for checks in ("never", "always", "always"):
        jacops.compute_jacobian(model, x, checks=checks)
        sweeps[checks] = model.spent()[1]
    assert sweeps["never"] == 2
    assert sweeps["always"] > 2


def test_samples_that_mix_go_one_at_a_time_with_a_warning() -> None:
    model, x = Swept(Calls(lambda x: (x - x.mean(0)) ** 2)), torch.randn(7, 3, dtype=F64)
    with pytest.warns(jacops.JacopsWarning, match="samples mix"):
        found = jacops.compute_jacobian(model, x)
    assert model.spent()[0] >= 7
    assert not found.any()


PICKS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "compute_jacobian": lambda model, x: jacops.compute_jacobian(model, x, outputs=[31_337], checks="never"),
    "modjac": lambda model, x: jacops.modjac(model, x[:1], outputs=[31_337], flatten=True),
    "jacobian": lambda model, x: jacops.jacobian(model, x[:1], outputs=31_337).dense(),
    "full_jacobian": lambda model, x: jacops.full_jacobian(
        lambda: model(x[:1]), next(model.parameters()), outputs=31_337
    )[0],
}


@pytest.mark.parametrize("call", PICKS)
def test_one_logit_of_fifty_thousand_costs_one_sweep(call: str) -> None:
    model, x = net(3, 50_000), torch.randn(3, 3, dtype=F64)
    PICKS[call](model, x)
    assert model.spent() == (1, 1)


@pytest.mark.parametrize(("outputs", "n", "sweeps"), [(4, 4, 4), (5, 4, 1), (10, 4, 1), (10, 4000, 10)])
def test_many_outputs_of_few_small_samples_are_pulled_at_once(outputs: int, n: int, sweeps: int) -> None:
    model, x = net(50, outputs).eval(), torch.randn(n, 50, dtype=F64)
    for _ in range(2):
        found = jacops.compute_jacobian(model, x)
        spent = model.spent()
    assert spent == (1 if n < 1000 else 4, sweeps if n < 1000 else 4 * sweeps)
    close(found[-1:], oracle.input_jacobian(model.model, x[-1:]))


@pytest.mark.parametrize("checks", ["first", "always"])
def test_a_batched_pull_that_is_wrong_is_left(checks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(50, 9).eval(), torch.randn(4, 50, dtype=F64)
    right, truth = oracle.input_jacobian(model.model, x), torch.autograd.grad

    def lying(*args: Any, **options: Any) -> Any:
        found = truth(*args, **options)
        return tuple(1.01 * g for g in found) if options.get("is_grads_batched") else found

    monkeypatch.setattr(torch.autograd, "grad", lying)
    monkeypatch.setattr(engine, "_engine", None)  # so that all passes go by `grad`
    for _ in range(3):
        close(jacops.compute_jacobian(model, x, checks=checks, fallback="silent"), right)
    assert not torch.allclose(jacops.compute_jacobian(model, x, checks="never"), right)  # it is what is taken


def test_a_small_call_does_not_ask_again_what_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from jacops._runtime import memory

    asked: list[int] = []
    free = memory.free_bytes

    def counted(device: torch.device) -> int:
        asked.append(1)
        return free(device)

    monkeypatch.setattr(memory, "free_bytes", counted)
    model, x = net(50, 3).eval(), torch.randn(300, 50, dtype=F64)
    for _ in range(2):  # the first derivative of a process takes more
        jacops.compute_jacobian(model, x)
    asked.clear()
    jacops.compute_jacobian(model, x)
    assert not asked
    jacops.compute_jacobian(model, torch.randn(60_000, 50, dtype=F64))  # whose result is large
    assert asked


@pytest.mark.parametrize("budget", [None, "300MB"])
def test_a_dense_jacobian_takes_the_sweeps_of_modjac(budget: str | None) -> None:
    model, x = net(3, 10), torch.randn(40, 3, dtype=F64)
    spent = {}
    for call in range(3):
        J = jacops.jacobian(model, x)
        dense = J.dense(budget=budget)
        spent["dense", call] = model.spent()
        matrix = jacops.modjac(model, x, flatten=True, budget=budget)
        spent["modjac", call] = model.spent()
        torch.testing.assert_close(dense, matrix)
    assert spent["dense", 1] == spent["dense", 2] == spent["modjac", 1] == (1, 10)
    assert spent["dense", 0][1] <= 10 + 3  # what holds it against a plain sweep, and measures one
    close(matrix, torch.cat([block.reshape(400, -1) for block in oracle.parameter_jacobian(model.model, x)[0]], 1))


def test_a_proved_push_is_no_backward_sweep_at_all() -> None:
    model, x = net(3, 50), torch.randn(5, 3, dtype=F64)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
    jacops.jacobian(model, x) @ v
    assert model.spent() == (1, 1)  # the one that the push is held against
    J = jacops.jacobian(model, x)
    for _ in range(3):
        J @ v
    assert model.spent() == (1, 0)


def test_a_repeated_gauss_newton_product_is_a_push_and_a_pull() -> None:
    model, x, y = net(3, 2), torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    G = jacops.ggn(model, nn.functional.mse_loss, x, y)
    v = torch.randn(G.shape[1], dtype=F64)
    G @ v
    model.spent()
    G @ v
    assert model.spent() == (0, 1)


def test_many_vectors_go_in_chunks_that_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacops._runtime.chunks.ROWS", 4)
    model, x = net(3, 50), torch.randn(5, 3, dtype=F64)
    J = jacops.jacobian(model, x)
    whole, us, vs = J.dense(), torch.randn(11, J.shape[0], dtype=F64), torch.randn(11, J.shape[1], dtype=F64)
    torch.testing.assert_close(J.T.apply(us), us @ whole)
    torch.testing.assert_close(J.apply(vs), vs @ whole.T)


def test_a_repeated_product_with_a_hessian_is_one_sweep_over_the_gradient() -> None:
    model, x, y = net(3, 2), torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    H = jacops.hessian(model, nn.functional.mse_loss, x, y)
    v = torch.randn(H.shape[1], dtype=F64)
    H @ v
    before = H.lin.sweeps
    H @ v
    assert H.lin.sweeps == before + 1
    assert model.spent()[0] == 1


class Leak(nn.Module):
    """One sample's output depends on another sample, by less than any probe can see."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.reads, self.writes = reads, writes

    def forward(self, x: Tensor) -> Tensor:
        leak = torch.zeros_like(x)
        if len(x) > max(self.reads, self.writes):
            leak[self.writes] = 1e-14 * x[self.reads]
        return x.sin() + leak


@pytest.mark.parametrize("reads", range(6))
@pytest.mark.parametrize("writes", range(6))
def test_strict_checks_separate_every_pair_of_samples(reads: int, writes: int) -> None:
    model, x = Leak(reads, writes), torch.randn(6, 2, dtype=F64)
    if reads == writes:
        jacops.compute_jacobian(model, x, checks="strict")
        return
    with pytest.warns(jacops.JacopsWarning, match="samples mix"):
        found = jacops.compute_jacobian(model, x, checks="strict")
    torch.testing.assert_close(found, torch.diag_embed(x.cos()))


@pytest.mark.parametrize(("samples", "most"), [(8, 64), (20_000, 16)])
def test_batched_cotangents_stay_within_caches_and_passes_are_even(samples: int, most: int) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    H = jacops.hessian(model, nn.functional.mse_loss, torch.randn(samples, 4), torch.randn(samples, 2))
    chunk = H.lin.chunk(100)
    assert 1 <= chunk <= most
    passes = -(-100 // chunk)
    assert chunk * passes - 100 < passes


def test_large_tangents_go_one_by_one_and_small_ones_together() -> None:
    for width, together in ((8, True), (256, False)):
        J = jacops.jacobian(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 9)), torch.randn(2, width)
        )
        rows = torch.randn(3, J.shape[1])
        J.apply(rows)  # with its proofs
        before = J.lin.sweeps
        found = J.apply(rows)
        assert (J.lin.sweeps - before >= 3) != together
        torch.testing.assert_close(found, torch.stack([J @ row for row in rows]))
