"""Derivatives of second and higher order by the input, against plain autograd, one number and one sample at a time."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jacops
import oracle
import zoo
from jacops._second_order import directional_derivative, input_hessian, laplacian
from jacops.errors import JacopsWarning, NonFiniteError, NotDifferentiableError
from oracle import leaves, mapped
from refusals import Dropping
from small import Calls, draw, small_net
from zoo import ZOO, Case


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


def slope(number: Tensor, wrt: list[Tensor]) -> list[Tensor]:
    if not number.requires_grad:
        return [torch.zeros_like(w) for w in wrt]
    found = torch.autograd.grad(number, wrt, create_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wrt, strict=True)]


def plain_hessians(
    model: nn.Module, inputs: Any, copier: Callable[[nn.Module], nn.Module] = copy.deepcopy, stride: int = 1
) -> Tensor:
    """Every `stride`-th output by all inputs twice, (n, out, in, in): in eval mode, each sample a batch of one."""
    return torch.stack([_plain(model, oracle.alone(inputs, i), copier, stride) for i in range(len(leaves(inputs)[0]))])


def _plain(model: nn.Module, inputs: Any, copier: Callable[[nn.Module], nn.Module], stride: int) -> Tensor:
    with oracle.same_draws(), sdpa_kernel(SDPBackend.MATH), oracle.WeightNormInSteps():
        twin = copier(model).double().eval()
        leaf = mapped(lambda t: oracle.in_double(t).requires_grad_(t.is_floating_point()), inputs)
        wrt = [t for t in leaves(leaf) if t.requires_grad]
        result = []
        numbers = torch.cat([o.reshape(-1) for o in leaves(oracle.called(twin, mapped(torch.clone, leaf)))])
        for number in numbers[::stride]:
            rows = [slope(entry, wrt) for g in slope(number, wrt) for entry in g.reshape(-1)]
            result.append(torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]))
        return torch.stack(result).detach()


def flattened(found: Any, inputs: Any) -> Tensor:
    """The answer of `input_hessian`, whatever its structure, as (n, out, in, in)."""
    floats = [t for t in leaves(inputs) if t.is_floating_point()]
    blocks, many = iter(leaves(found)), len(floats)
    outputs = []
    for first in blocks:
        rest = [next(blocks) for _ in range(many * many - 1)]
        grid = [[(first, *rest)[a * many + b] for b in range(many)] for a in range(many)]
        n = first.shape[0]
        wide = [
            torch.cat([b.reshape(n, -1, x[:1].numel(), z[:1].numel()) for b, z in zip(row, floats, strict=True)], 3)
            for row, x in zip(grid, floats, strict=True)
        ]
        outputs.append(torch.cat(wide, 2))
    return torch.cat(outputs, 1)


# The zoo

FLOATING = [case for case in ZOO if any(t.is_floating_point() for t in leaves(case.inputs()))]
REFUSED = {
    "checkpoint_reentrant": "reentrant",
    "once_differentiable": "OnceCube",
    "embedding_bag_weighted": "embedding_bag",
}


@pytest.mark.parametrize("case", FLOATING, ids=lambda case: case.name)
def test_every_model_of_the_zoo_has_the_hessians_of_plain_autograd(case: Case) -> None:
    model, inputs = case.model(), case.x()
    state, mode = copy.deepcopy(list(model.state_dict().values())), [m.training for m in model.modules()]
    with warnings.catch_warnings(), zoo.seeded():
        warnings.simplefilter("ignore", UserWarning)
        if case.name in REFUSED:
            with pytest.raises(NotDifferentiableError, match=REFUSED[case.name]):
                input_hessian(model, inputs)
            return
        found = flattened(input_hessian(model, inputs), inputs)
    with warnings.catch_warnings(), zoo.seeded():
        warnings.simplefilter("ignore", UserWarning)
        stride = 1 + found.shape[1] * found.shape[2] // 30  # wide ones take long to go through one by one
        expected = plain_hessians(model, inputs, case.copy, stride)
    close(found.double()[:, ::stride], expected, max(1e-8, 4 * case.tolerance))
    assert [m.training for m in model.modules()] == mode
    assert all(torch.equal(a, b) for a, b in zip(state, model.state_dict().values(), strict=True))


SMOOTH = [
    "mlp_gelu",
    "samples_mixed",
    "item",
    "tuple_input",
    "dict_input",
    "mixed_inputs",
    "dict_output",
    "custom_function",
]


def pairs(inputs: Any, v: Any) -> Tensor:
    """Directions as one flat row per sample."""
    floats = [t for t in leaves(v) if t is not None]
    return torch.cat([t.reshape(t.shape[0], -1) for t in floats], 1)


def like_inputs(inputs: Any) -> Any:
    return mapped(lambda t: zoo.like(t, 31) if t.is_floating_point() else None, inputs)


@pytest.mark.parametrize("case", [c for c in FLOATING if c.name in SMOOTH], ids=lambda case: case.name)
def test_laplacians_and_second_directional_derivatives_are_contractions_of_the_hessian(case: Case) -> None:
    model, inputs = case.model(), case.x()
    expected = plain_hessians(model, inputs, case.copy)
    v = like_inputs(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        traces, along = laplacian(model, inputs), directional_derivative(model, inputs, v, 2)
        slopes = directional_derivative(model, inputs, v, 1)
    shapes = [tuple(o.shape) for o in leaves(slopes)]
    assert [tuple(o.shape) for o in leaves(traces)] == [tuple(o.shape) for o in leaves(along)] == shapes

    def joined(tree: Any) -> Tensor:
        return torch.cat([o.reshape(expected.shape[0], -1) for o in leaves(tree)], 1)

    flat = pairs(inputs, v)
    close(joined(traces), expected.diagonal(dim1=2, dim2=3).sum(2), 1e-8)
    close(joined(along), torch.einsum("noij,ni,nj->no", expected, flat, flat), 1e-8)


# What is right by hand


def test_a_cubic_has_its_closed_forms() -> None:
    x, v = draw(4, 3), draw(4, 3, seed=1)
    cubic = lambda x: (x**3).sum(1) + x[:, 0] * x[:, 1] * x[:, 2]  # noqa: E731
    expected = torch.diag_embed(6 * x)
    for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        expected[:, a, b] = expected[:, b, a] = x[:, c]
    close(input_hessian(cubic, x), expected)
    close(laplacian(cubic, x), 6 * x.sum(1))
    third = directional_derivative(cubic, x, v, 3)
    close(third, 6 * (v**3).sum(1) + 6 * v.prod(1))
    close(directional_derivative(cubic, x, v, 4), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_directional_derivatives_of_any_order_of_an_exponential(order: int) -> None:
    x, v, w = draw(3, 2), draw(3, 2, seed=1), draw(2, 2, seed=2)
    value = directional_derivative(lambda x: (x @ w).exp(), x, v, order)
    close(value, (x @ w).exp() * (v @ w) ** order)


def test_full_jacobian_with_a_graph_nests_to_any_order() -> None:
    x = draw(3).requires_grad_()
    (first,) = jacops.full_jacobian(lambda: (x**4).sum(), [x], create_graph=True)
    (second,) = jacops.full_jacobian(lambda: first, [x], create_graph=True)
    (third,) = jacops.full_jacobian(lambda: second, [x], create_graph=True)
    (fourth,) = jacops.full_jacobian(lambda: third, [x])
    close(first.detach(), 4 * x.detach().reshape(1, 3) ** 3)
    cube = torch.zeros(3, 3, 3, dtype=torch.float64)
    cube[range(3), range(3), range(3)] = 24 * x.detach()
    close(second.detach(), torch.diag(12 * x.detach() ** 2))
    close(third.detach(), cube.reshape(9, 3))
    assert float(fourth.sum()) == pytest.approx(72)


def test_a_laplacian_is_the_same_without_a_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_net(), draw(5, 3)
    expected = laplacian(model, x)
    monkeypatch.setattr("jacops._second_order._laplacian._HESSIAN_ENTRIES", 1)
    close(laplacian(model, x), expected)
    monkeypatch.setattr("jacops._second_order._laplacian._DIRECTION_ENTRIES", 12)
    close(laplacian(model, x), expected)
    two = lambda a, b: (a * b).sin().sum(1) * b.prod(1)  # noqa: E731
    inputs = (draw(4, 2), draw(4, 2, seed=1))
    close(laplacian(two, inputs), plain_hessians(Calls(two), inputs).diagonal(dim1=2, dim2=3).sum(2)[:, 0])


def test_linear_and_piecewise_linear_models_have_zeros() -> None:
    x = draw(4, 3)
    assert not input_hessian(nn.Linear(3, 2).double(), x).any()
    assert not laplacian(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double(), x).any()
    assert not directional_derivative(nn.Linear(3, 2).double(), x, x, 2).any()


def test_an_empty_batch_gives_empty_answers() -> None:
    model, x = small_net(), draw(0, 3)
    assert input_hessian(model, x).shape == (0, 2, 3, 3)
    assert laplacian(model, x).shape == (0, 2)
    assert directional_derivative(model, x, x, 3).shape == (0, 2)


def test_batches_and_picked_outputs_change_nothing() -> None:
    model, x = small_net(), draw(5, 3)
    expected = input_hessian(model, x)
    for batch_size in (1, 2, 3, 5):
        close(input_hessian(model, x, batch_size), expected)
        close(laplacian(model, x, batch_size), expected.diagonal(dim1=2, dim2=3).sum(2))
    close(input_hessian(model, x, outputs=1), expected[:, 1])
    for checks in ("always", "strict", "never"):
        close(input_hessian(model, x, checks=checks), expected)


# Samples


def test_samples_share_sweeps_and_what_was_proved_is_remembered() -> None:
    runs = []
    model, x = Calls(lambda x: runs.append(len(x)) or (x**3).sin().cumsum(1)), draw(50, 3)
    input_hessian(model, x)
    assert max(runs) == 50
    assert len(runs) <= 6
    runs.clear()
    input_hessian(model, x)
    assert runs == [50]


@pytest.mark.parametrize("call", [input_hessian, laplacian, lambda m, x: directional_derivative(m, x, x, 2)])
def test_samples_that_mix_are_taken_alone(call: Callable[..., Tensor]) -> None:
    model, x = nn.Sequential(zoo.Lambda(lambda x: x * x.mean(0).detach()), small_net()), draw(4, 3)
    with pytest.warns(JacopsWarning, match="samples mix"):
        found = call(model, x)
    close(found, torch.cat([call(model, x[i : i + 1]) for i in range(4)]))
    with pytest.raises(NotDifferentiableError, match="fallback='error'"):
        input_hessian(model, x, fallback="error")


def test_one_number_for_the_whole_batch_is_taken_alone() -> None:
    x = draw(4, 3)
    with pytest.warns(JacopsWarning, match="no axis of"):
        found = input_hessian(lambda x: (x**3).sum(), x)
    close(found, torch.diag_embed(6 * x))


# Refusals


SECOND = [input_hessian, laplacian, lambda m, x: directional_derivative(m, x, x, 2)]


@pytest.mark.parametrize("call", SECOND)
def test_a_second_derivative_that_a_backward_drops_is_found_out(call: Callable[..., Tensor]) -> None:
    with pytest.raises(NotDifferentiableError, match="Dropping"):
        call(lambda x: Dropping.apply(x).sum(1), draw(4, 3))
    with pytest.raises(NotDifferentiableError, match="disagree"):
        call(lambda x: Dropping.apply(x).sin().sum(1), draw(4, 3))


@pytest.mark.parametrize("call", SECOND)
def test_a_backward_that_may_run_once_is_refused_by_name(call: Callable[..., Tensor]) -> None:
    with pytest.raises(NotDifferentiableError, match="OnceCube.*once_differentiable"):
        call(lambda x: zoo.OnceCube.apply(x).sum(1), draw(4, 3))


def test_a_third_derivative_through_a_dropped_one_is_found_out() -> None:
    x = draw(4, 3)
    with pytest.raises(NotDifferentiableError, match="Dropping"):
        directional_derivative(lambda x: Dropping.apply(x).exp().sum(1), x, x, 3)
    first = directional_derivative(lambda x: Dropping.apply(x).sum(1), x, x)
    close(first, (3 * x**3).sum(1))


def test_a_second_derivative_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="laplacian"), pytest.warns(JacopsWarning, match="not finite"):
        laplacian(lambda x: x.abs().sqrt(), torch.zeros(2, 1, dtype=torch.float64))


def test_nothing_of_the_callers_moves() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Tanh()).double(), draw(5, 3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    expected = input_hessian(copy.deepcopy(model).eval(), x)
    with torch.no_grad():
        close(input_hessian(model, x), expected)
        laplacian(model, x)
        directional_derivative(model, x, x, 2)
    assert model.training
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all((p.grad == 1).all() for p in model.parameters())
    assert not expected.requires_grad
