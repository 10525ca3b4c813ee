"""Faults S1-S12 of the Jacobian products that came before, and those of their neighbours (curvature, traces, Fisher).

Beside them: the shapes that callers rely on, what a product may cost, and that a closure runs once and stays usable.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
import zoo
from jacops import JacopsWarning, batch_jvp, batch_vjp, full_jacobian, jvp, model_jvp, model_vjp, vjp
from jacops.errors import NotDifferentiableError
from small import Calls, Swept, close, draw, flat, settled, small_net, tangents


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(*shape, seed=seed, dtype=dtype).requires_grad_()


def affine() -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
    """x W + b, whose derivative along (V, c) is x V + c."""
    x, W, b = draw(5, 3), weight(3, 2), weight(2, seed=1)
    return (lambda: x @ W + b), [W, b], x


# S1, S2, S3: v that matches


def test_s1_a_full_direction_counts_every_parameter():
    function, params, x = affine()
    V, c = draw(3, 2, seed=3), draw(2, seed=4)
    close(jvp(function, params, [V, c]), x @ V + c)
    close(jvp(function, params, (V, c)), x @ V + c)
    close(batch_jvp(function, params, [torch.stack([V, -V]), torch.stack([c, c])]), torch.stack([x @ V + c, c - x @ V]))


def test_s2_the_right_shape_gives_the_right_product():
    W, v = weight(3), draw(3, seed=1)
    close(jvp(lambda: W**2, [W], v), (2 * W * v).detach())
    close(jvp(lambda: W**2, W, [v]), (2 * W * v).detach())


def test_s3_the_right_cotangent_gives_the_right_product():
    function, params, x = affine()
    u = draw(5, 2, seed=5)
    by_W, by_b = vjp(function, params, u)
    close(by_W, x.T @ u)
    close(by_b, u.sum(0))


# S4, S5, S6: params as a generator, one tensor, a mapping


def as_generator(params: list[Tensor]) -> Iterator[Tensor]:
    yield from params


FORMS = {"list": list, "tuple": tuple, "generator": as_generator, "iterator": iter}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scalar", [True, False])
def test_s4_parameters_may_come_as_any_iterable(form: str, scalar: bool):
    model, x = small_net(), draw(5, 3)
    blocks = oracle.parameter_jacobian(model, x)
    vs = tangents(model)
    found = jvp(lambda: model(x).sum() if scalar else model(x), FORMS[form](list(model.parameters())), vs)
    expected = oracle.jvp(blocks, vs)[0]
    close(found, expected.sum() if scalar else expected)


def test_s4_a_module_s_own_generator_is_read_once():
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.ones(3, 2).double()
    found = jvp(lambda: model(x).sum(), model.parameters(), [torch.full((1, 2), 0.5).double()])
    assert float(found) == 3.0


@pytest.mark.parametrize("form", FORMS)
def test_s5_every_other_call_takes_generators_too(form: str):
    model, x = small_net(), draw(5, 3)
    blocks = oracle.parameter_jacobian(model, x)
    u, us = draw(5, 2, seed=3), draw(4, 5, 2, seed=4)

    def params() -> Any:
        return FORMS[form](list(model.parameters()))

    for found, expected in zip(vjp(lambda: model(x), params(), u), oracle.vjp(blocks, [u]), strict=True):
        close(found, expected)
    for index, found in enumerate(batch_vjp(lambda: model(x), params(), us)):
        close(found, torch.stack([oracle.vjp(blocks, [row])[index] for row in us]))
    vs = tangents(model, 4)
    found = batch_jvp(lambda: model(x), params(), vs)
    close(found, torch.stack([oracle.jvp(blocks, [v[i] for v in vs])[0] for i in range(4)]))
    for found, expected in zip(full_jacobian(lambda: model(x), params()), blocks[0], strict=True):
        close(found, expected.reshape(10, *expected.shape[2:]))


def test_s6_one_tensor_is_one_parameter_for_every_call():
    x, v = weight(3), draw(3, seed=1)
    doubled = 2 * x.detach()
    (matrix,) = full_jacobian(lambda: x**2, x)
    close(matrix, torch.diag(doubled))
    close(jvp(lambda: x**2, x, v), doubled * v)
    close(vjp(lambda: x**2, x, v), doubled * v)
    close(batch_jvp(lambda: x**2, x, torch.stack([v, -v])), torch.stack([doubled * v, -doubled * v]))
    (pulled,) = batch_vjp(lambda: x**2, x, torch.stack([v, -v]))
    close(pulled, torch.stack([doubled * v, -doubled * v]))


# S8: one linearisation point


def test_s8_a_batch_of_directions_shares_one_dropout_mask():
    W, x = weight(4, 3), torch.ones(6, 4).double()
    v = draw(4, 3, seed=1)
    found = batch_jvp(lambda: F.dropout(x @ W, 0.5), [W], torch.stack([v, v, 2 * v]))
    assert torch.equal(found[0], found[1])
    close(found[2], 2 * found[0])
    dropped = found[0] == 0
    assert dropped.any()
    assert not dropped.all()
    close(found[0], torch.where(dropped, 0, 2 * (x @ v)))


def test_s8_a_batch_of_cotangents_shares_one_dropout_mask():
    W, x = weight(4, 3), draw(6, 4)
    u = torch.ones(6, 3).double()
    (found,) = batch_vjp(lambda: F.dropout(x @ W, 0.5), [W], torch.stack([u, u]))
    assert torch.equal(found[0], found[1])


CLOSURE_CALLS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, params, **options: jvp(f, params, [torch.ones_like(p) for p in params], **options),
    "vjp": lambda f, params, **options: vjp(f, params, torch.ones(6, 3).double(), **options),
    "batch_jvp": lambda f, params, **options: batch_jvp(f, params, [_five_times(p) for p in params], **options),
    "batch_vjp": lambda f, params, **options: batch_vjp(f, params, torch.ones(5, 6, 3).double(), **options),
    "full_jacobian": lambda f, params, **options: full_jacobian(f, params, **options),
}


def _five_times(parameter: Tensor) -> Tensor:
    """Five directions of ones."""
    return torch.ones_like(parameter.expand(5, *parameter.shape))


@pytest.mark.parametrize("call", CLOSURE_CALLS)
def test_s8_a_closure_runs_exactly_once_and_what_it_moves_is_the_callers(call: str):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    runs: list[int] = []

    def function() -> Tensor:
        runs.append(1)
        return model(draw(6, 4))

    torch.manual_seed(3)
    function()
    once = torch.get_rng_state(), model[1].running_mean.clone()
    model[1].reset_running_stats()
    runs.clear()
    torch.manual_seed(3)
    CLOSURE_CALLS[call](function, list(model.parameters()))
    assert len(runs) == 1
    assert torch.equal(torch.get_rng_state(), once[0])
    assert torch.equal(model[1].running_mean, once[1])
    assert int(model[1].num_batches_tracked) == 1


# S9: complex numbers


Z = torch.tensor([1 + 2j, -0.5 + 1j, 2 - 3j], dtype=torch.complex128)
V = torch.tensor([1j, 2 - 1j, 0.5 + 0.25j], dtype=torch.complex128)

# A function with its change along v at z, whether it is holomorphic or not.
COMPLEX: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "squared size": (lambda z: z.abs() ** 2, lambda z, v: 2 * (z.conj() * v).real),
    "sum of squared sizes": (lambda z: (z.abs() ** 2).sum(), lambda z, v: 2 * (z.conj() * v).real.sum()),
    "real part": (lambda z: z.real * 3, lambda z, v: 3 * v.real),
    "imaginary part": (lambda z: z.imag, lambda z, v: v.imag),
    "square": (lambda z: z**2, lambda z, v: 2 * z * v),
    "sum of cubes": (lambda z: (z**3).sum(), lambda z, v: (3 * z**2 * v).sum()),
    "conjugate": (lambda z: z.conj() * 2, lambda z, v: 2 * v.conj()),
    "neither": (lambda z: z * z.abs() ** 2, lambda z, v: v * z.abs() ** 2 + 2 * z * (z.conj() * v).real),
}
HOLOMORPHIC = ("square", "sum of cubes")
REAL = ("squared size", "sum of squared sizes", "real part", "imaginary part")


def test_s9_the_squared_size_grows_along_i_as_first_seen():
    z = torch.tensor([1 + 2j], requires_grad=True)
    assert torch.equal(jvp(lambda: z.abs() ** 2, [z], [torch.tensor([1j])]), torch.tensor([4.0]))


@pytest.mark.parametrize("kind", COMPLEX)
def test_s9_a_change_along_a_complex_direction_has_its_sign_right(kind: str):
    function, change = COMPLEX[kind]
    z = Z.clone().requires_grad_()
    expected = change(Z, V)
    close(jvp(lambda: function(z), [z], [V]), expected)
    close(expected, (function(Z + 1e-6 * V) - function(Z - 1e-6 * V)) / 2e-6, rtol=1e-8)


@pytest.mark.parametrize("many", [1, 2, 7])
@pytest.mark.parametrize("kind", COMPLEX)
def test_s9_many_complex_directions_at_once_are_right_on_every_route(kind: str, many: int):
    function, change = COMPLEX[kind]
    z = Z.clone().requires_grad_()
    vs = torch.stack([V * (i + 1) * (1j**i) for i in range(many)])
    close(batch_jvp(lambda: function(z), [z], vs), torch.stack([change(Z, v) for v in vs]))


@pytest.mark.parametrize("kind", COMPLEX)
def test_s9_a_complex_cotangent_means_what_it_means_to_autograd(kind: str):
    function, _ = COMPLEX[kind]
    z = Z.clone().requires_grad_()
    output = function(z)
    u = draw(*output.shape, seed=2, dtype=output.dtype)
    (expected,) = torch.autograd.grad(output, z, u)
    close(vjp(lambda: function(z), [z], u), expected)
    (found,) = batch_vjp(lambda: function(z), [z], torch.stack([u, 2 * u]))
    close(found, torch.stack([expected, 2 * expected]))


@pytest.mark.parametrize("kind", [*HOLOMORPHIC, *REAL])
def test_s9_a_whole_complex_jacobian_times_dz_is_the_change(kind: str):
    """`df = J dz` for holomorphic functions, `df = Re(J dz)` for real ones."""
    function, change = COMPLEX[kind]
    z = Z.clone().requires_grad_()
    (matrix,) = full_jacobian(lambda: function(z), [z])
    assert matrix.shape == (function(Z).numel(), 3)
    expected = change(Z, V).reshape(-1)
    product = matrix @ V
    close(product if expected.is_complex() else product.real, expected)


@pytest.mark.parametrize("kind", ["conjugate", "neither"])
def test_s9_a_function_without_a_complex_jacobian_is_refused_by_name(kind: str):
    z = Z.clone().requires_grad_()
    with pytest.raises(NotDifferentiableError, match=r"func\(\) is not a holomorphic function of params\[0\]"):
        full_jacobian(lambda: COMPLEX[kind][0](z), [z])


def test_s9_real_and_complex_parameters_go_together():
    z, a = Z.clone().requires_grad_(), weight(3)
    v, c = V, draw(3, seed=4)
    close(jvp(lambda: a * z**2, [z, a], [v, c]), (2 * a * Z * v + c * Z**2).detach())
    by_z, by_a = full_jacobian(lambda: a * z**2, [z, a])
    close(by_z @ v + by_a @ c.to(by_a.dtype), (2 * a * Z * v + c * Z**2).detach())


# S10: parameters that the function does not use


UNUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a clone": lambda W: W.detach().clone().requires_grad_(),
    "a detached copy": lambda W: W.detach().requires_grad_(),
    "another tensor": lambda W: torch.ones_like(W).requires_grad_(),
    "a clone that hangs on it": lambda W: W.clone(),
}


@pytest.mark.parametrize("kind", UNUSED)
@pytest.mark.parametrize("call", CLOSURE_CALLS)
def test_s10_a_parameter_that_the_function_does_not_use_gives_zeros_and_one_warning(kind: str, call: str):
    W, x = weight(4, 3), draw(6, 4)
    other = UNUSED[kind](W)
    with pytest.warns(JacopsWarning, match=r"no path leads .* to any of params\[0\] \(4, 3\)") as said:
        found = CLOSURE_CALLS[call](lambda: x @ W, [other])
    assert len(said) == 1
    assert all(not leaf.any() for leaf in oracle.leaves(found))
    shapes = {"jvp": (6, 3), "vjp": (4, 3), "batch_jvp": (5, 6, 3), "batch_vjp": (5, 4, 3), "full_jacobian": (18, 4, 3)}
    assert oracle.leaves(found)[0].shape == shapes[call]


@pytest.mark.parametrize("call", CLOSURE_CALLS)
def test_s10_one_unused_parameter_among_used_ones_gives_quiet_zeros(call: str):
    W, unused, x = weight(4, 3), weight(2), draw(6, 4)
    both = CLOSURE_CALLS[call](lambda: x @ W, [unused, W])
    alone = CLOSURE_CALLS[call](lambda: x @ W, [W])
    if call in ("jvp", "batch_jvp"):
        assert torch.equal(both, alone)
    else:
        assert not both[0].any()
        assert both[0].shape[-1:] == (2,)
        assert torch.equal(both[1], oracle.leaves(alone)[0])


def test_s10_whatever_was_recorded_before_the_call_counts():
    W, x = weight(4, 3), draw(6, 4)
    doubled = 2 * W
    v = draw(4, 3, seed=2)
    close(jvp(lambda: x @ doubled, [W], v), 2 * x @ v)
    close(jvp(lambda: x @ doubled, [doubled], v), x @ v)


def test_s10_an_operator_over_an_unused_parameter_is_zero_where_that_is_allowed():
    model = nn.Linear(3, 2)
    model.idle = nn.Parameter(torch.zeros(4))
    J = jacops.jacobian(model, torch.ones(5, 3), parameters="idle", allow_zero=True)
    assert torch.equal(J.dense(), torch.zeros(10, 4))


# Neighbours (Adj.): curvature, traces, Fisher, and finite steps


def curvature_case() -> tuple[nn.Module, Tensor, Tensor]:
    return small_net(), draw(6, 3), draw(6, 2, seed=1)


def plain_ggn(model: nn.Module, x: Tensor, entries: int) -> Tensor:
    """G of a mean squared error: 2 JᵀJ over the number of entries."""
    J = flat(oracle.parameter_jacobian(model, x), list(model.parameters()))
    return 2 * J.T @ J / entries


def test_adj_a_gauss_newton_product_is_g_v_and_not_zero():
    model, x, y = curvature_case()
    G = plain_ggn(model, x, 12)
    v = draw(G.shape[0], seed=7)
    found = jacops.ggnvp(model, F.mse_loss, x, y, v)
    close(found, G @ v)
    assert found.abs().max() > 0.1
    close(jacops.ggn(model, F.mse_loss, x, y).dense(), G)


def test_adj_a_gauss_newton_product_of_cross_entropy_is_right():
    model, x = small_net(), draw(6, 3)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    J = flat(oracle.parameter_jacobian(model, x), list(model.parameters()))
    p = model(x).detach().softmax(1)
    outer = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / 6
    close(jacops.ggn(model, F.cross_entropy, x, labels).dense(), J.T @ outer @ J)


def test_adj_a_trace_estimate_is_unbiased_and_its_error_bar_holds():
    model, x, y = curvature_case()
    H = oracle.hessian(model, F.mse_loss, x, y)
    operator = jacops.hessian(model, F.mse_loss, x, y)
    exact = jacops.linalg.trace(operator)
    assert exact.value == pytest.approx(float(H.trace()), rel=1e-10)
    assert exact.standard_error == 0
    estimates = [jacops.linalg.trace(operator, probes=64, seed=seed, method="hutchinson") for seed in range(40)]
    errors = [(e.value - exact.value) / e.standard_error for e in estimates]
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))
    assert 0.5 < np.std(errors) < 2
    spread = np.sqrt(2 * float((H - torch.diag(H.diag())).pow(2).sum()) / 64)  # Hutchinson's own variance
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(spread, rel=0.2)


def test_adj_an_empirical_fisher_diagonal_is_the_mean_of_squares():
    model, x, y = curvature_case()
    rows = torch.stack([oracle.gradient(model, F.mse_loss, x[i : i + 1], y[i : i + 1]) for i in range(6)])
    fisher = jacops.linalg.empirical_fisher(model, F.mse_loss, x, y)
    close(jacops.linalg.diagonal(fisher), (rows**2).mean(0))
    close(fisher.dense(), rows.T @ rows / 6)
    squared_mean = rows.mean(0) ** 2
    assert ((rows**2).mean(0) - squared_mean).norm() > 0.3 * squared_mean.norm()  # the two can be distinguished


def test_adj_gauss_newton_with_an_unused_first_parameter_is_aligned_and_leaves_grads_alone():
    model, x, y = settled(zoo.Spare()), draw(6, 3), draw(6, 2, seed=1)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    operator = jacops.ggn(model, F.mse_loss, x, y)
    dense = operator.dense()
    assert operator.domain.names == ("spare.weight", "spare.bias", "used.weight", "used.bias")
    assert not dense[:8].any()
    assert not dense[:, :8].any()
    close(dense, plain_ggn(model, x, 12))
    assert all((p.grad == index + 1).all() for index, p in enumerate(model.parameters()))


def test_adj_a_float32_hessian_product_of_a_quadratic_has_no_step_size_error():
    A = draw(8, 8, dtype=torch.float32)
    model = nn.Linear(8, 1, bias=False)
    curvature = A @ A.T + torch.eye(8)
    v = draw(8, seed=3, dtype=torch.float32)
    x = torch.linalg.cholesky(curvature).T.contiguous()
    found = jacops.hvp(model, lambda out, y: 0.5 * (out**2).sum(), x, torch.zeros(8, 1), v)
    torch.testing.assert_close(found, curvature @ v, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_adj_the_finite_difference_check_scales_its_step(dtype: torch.dtype, scale: float):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(draw(*p.shape, seed=index, dtype=dtype) * (scale if index > 1 else 1))
    found = jacops.check(model, draw(5, 3, dtype=dtype))
    assert found.passed, found


# Functions without a second derivative rule


def test_functions_that_can_be_differentiated_once_go_row_by_row_and_say_so():
    x, v = weight(4), draw(4, seed=1)
    with pytest.warns(JacopsWarning, match="jvp: .* Route used: row by row, 4 backward passes"):
        close(jvp(lambda: zoo.OnceCube.apply(x), [x], v), (3 * x**2 * v).detach())
    with pytest.raises(NotDifferentiableError, match="fallback='error'"):
        jvp(lambda: zoo.OnceCube.apply(x), [x], v, fallback="error")
    close(jvp(lambda: zoo.OnceCube.apply(x), [x], v, fallback="silent"), (3 * x**2 * v).detach())
    (matrix,) = full_jacobian(lambda: zoo.OnceCube.apply(x), [x])
    close(matrix, torch.diag(3 * x.detach() ** 2))


# Costs, by counting


def test_costs_one_logit_of_fifty_thousand_is_one_row():
    model, x = Swept(nn.Sequential(nn.Linear(2, 50_000), nn.Tanh())).double(), draw(1, 2)
    by_W, by_b = full_jacobian(lambda: model(x), model.parameters(), outputs=41_234)
    assert by_W.shape == (1, 50_000, 2)
    slope = 1 - model(x).detach()[0, 41_234] ** 2
    assert model.spent() == (2, 1)  # the second run is this test's
    assert by_b.count_nonzero() == 1
    close(by_b[0, 41_234], slope)
    close(by_W[0, 41_234], slope * x[0])


# The caller's things


@pytest.mark.parametrize("call", CLOSURE_CALLS)
@pytest.mark.parametrize("recorded", ["inside", "before"])
def test_callers_graph_is_not_freed_and_gradients_are_left_alone(call: str, recorded: str):
    W, x = weight(4, 3), draw(6, 4)
    W.grad = torch.full_like(W, 7.0)
    kept: list[Tensor] = [torch.tanh(x @ W)]

    def function() -> Tensor:
        if recorded == "inside":
            kept[0] = torch.tanh(x @ W)
        return kept[0]

    CLOSURE_CALLS[call](function, [W])
    CLOSURE_CALLS[call](lambda: kept[0], [W])  # a second time over the very same graph
    assert (W.grad == 7).all()
    kept[0].sum().backward()
    close(W.grad - 7, (x.T @ (1 - kept[0] ** 2)).detach())


def test_callers_directions_made_in_inference_mode():
    W, x = weight(4, 3), draw(6, 4)
    with torch.inference_mode():
        v, u = draw(4, 3, seed=1), draw(6, 3, seed=2)
        close(jvp(lambda: x @ W, [W], v), x @ v)
        close(vjp(lambda: x @ W, [W], u), x.T @ u)


def test_callers_random_state_is_not_drawn_from_by_estimators_and_checks():
    model, x, y = curvature_case()
    before = torch.get_rng_state()
    operator = jacops.hessian(model, F.mse_loss, x, y)
    first = jacops.linalg.trace(operator, probes=8)
    torch.manual_seed(99)
    between = torch.get_rng_state()
    assert jacops.linalg.trace(operator, probes=8) == first
    assert jacops.linalg.trace(operator, probes=8, seed=1) != first
    jacops.check(model, x)
    assert torch.equal(torch.get_rng_state(), between)
    assert not torch.equal(before, between)


# Shapes that callers rely on


def test_shapes_vjp_is_a_tensor_for_one_parameter_and_a_list_for_more():
    function, params, x = affine()
    u = draw(5, 2)
    assert isinstance(vjp(function, params[:1], u), Tensor)
    assert isinstance(vjp(function, params, u), list)
    assert isinstance(batch_vjp(function, params[:1], u[None]), list)
    assert isinstance(model_vjp(nn.Linear(3, 2, bias=False).double(), x, u), Tensor)
    assert isinstance(model_vjp(nn.Linear(3, 2).double(), x, u), list)


OUTPUTS = {(): "scalar", (3,): "vector", (2, 3): "matrix", (0,): "empty", (2, 0, 3): "empty axis", (1, 1): "ones"}


@pytest.mark.parametrize("shape", OUTPUTS, ids=list(OUTPUTS.values()))
def test_shapes_every_output_shape_is_kept(shape: tuple[int, ...]):
    W = weight(*shape)
    v = draw(*shape, seed=1)
    size = W.numel()
    slope = 2 * W.detach()
    close(jvp(lambda: W**2, [W], v), slope * v)
    close(vjp(lambda: W**2, [W], v), slope * v)
    vs = torch.stack([v, 2 * v])
    close(batch_jvp(lambda: W**2, [W], vs), slope * vs)
    close(batch_vjp(lambda: W**2, [W], vs)[0], slope * vs)
    close(full_jacobian(lambda: W**2, [W])[0], torch.diag(slope.reshape(-1)).reshape(size, *shape))


def test_shapes_a_batch_of_no_directions_is_empty():
    W = weight(3, 2)
    assert batch_jvp(lambda: W[0] ** 2, [W], torch.zeros(0, 3, 2).double()).shape == (0, 2)
    (found,) = batch_vjp(lambda: W[0] ** 2, [W], torch.zeros(0, 2).double())
    assert found.shape == (0, 3, 2)


@pytest.mark.parametrize("container", [tuple, list, dict])
def test_shapes_a_tree_of_outputs_keeps_its_containers(container: type):
    W, v = weight(3), draw(3, seed=1)

    def function() -> Any:
        parts = {"a": W**2, "b": W.sum() * 2}
        return parts if container is dict else container(parts.values())

    found = jvp(function, [W], v)
    assert type(found) is container
    first, second = oracle.leaves(found)
    close(first, (2 * W * v).detach())
    close(second, 2 * v.sum())
    (matrix,) = full_jacobian(function, [W])
    close(matrix, torch.cat([torch.diag(2 * W.detach()), torch.full((1, 3), 2.0).double()]))
    u = {"a": v, "b": torch.tensor(3.0).double()}
    close(vjp(function, [W], u if container is dict else container(u.values())), (2 * W * v).detach() + 6)


def test_shapes_low_precision_mixed_dtypes_views_and_in_place_operations():
    half = weight(4, dtype=torch.bfloat16)
    found = jvp(lambda: half * 2, [half], torch.ones(4, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found == 2).all()

    a, b = weight(3, dtype=torch.float32), weight(3, seed=1)
    found = jvp(lambda: a.double() * b, [a, b], [torch.ones(3), torch.ones(3).double()])
    close(found, (a + b).detach(), rtol=1e-7)
    by_a, by_b = vjp(lambda: a.double() * b, [a, b], torch.ones(3).double())
    assert (by_a.dtype, by_b.dtype) == (torch.float32, torch.float64)

    view = draw(3, 4).T.requires_grad_()
    assert not view.is_contiguous()
    v = draw(4, 3, seed=1)
    close(jvp(lambda: view**2, [view], v), (2 * view * v).detach())
    close(vjp(lambda: view**2, [view], draw(3, 4, seed=1).T), (2 * view * draw(3, 4, seed=1).T).detach())
    close(jvp(lambda: (view * 3).relu_(), [view], v), (3 * v * (view > 0)).detach())


def test_shapes_autocast_returns_its_own_precision():
    model, x = nn.Linear(3, 2), draw(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = jvp(lambda: model(x), model.parameters(), [torch.ones(2, 3), torch.ones(2)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), (x.sum(1, keepdim=True) + 1).expand(5, 2), rtol=2e-2, atol=2e-2)


# Derivatives of derivatives


def test_create_graph_differentiates_a_jvp_to_any_order():
    x, v = weight(3), draw(3, seed=1)
    value = jvp(lambda: x**4, [x], v, create_graph=True)
    close(value.detach(), (4 * x**3 * v).detach())
    for factor, power in ((12, 2), (24, 1), (24, 0)):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        close(value.detach(), (factor * x**power * v).detach())


def test_create_graph_differentiates_by_the_direction_too():
    x, v = weight(3), weight(3, seed=1)
    found = jvp(lambda: x**2, [x], v, create_graph=True)
    (by_v,) = torch.autograd.grad(found.sum(), v, retain_graph=True)
    close(by_v, 2 * x.detach())
    assert not jvp(lambda: x**2, [x], v).requires_grad


@pytest.mark.parametrize("call", CLOSURE_CALLS)
def test_create_graph_of_every_call_has_right_second_derivatives(call: str):
    W, x = weight(4, 3), draw(6, 4)
    found = CLOSURE_CALLS[call](lambda: torch.tanh(x @ W), [W], create_graph=True)
    weights = [draw(*leaf.shape, seed=11) for leaf in oracle.leaves(found)]
    total = sum((leaf * w).sum() for leaf, w in zip(oracle.leaves(found), weights, strict=True))
    (slope,) = torch.autograd.grad(total, W)

    step, direction = 1e-5, draw(4, 3, seed=12)
    values = []
    for sign in (1, -1):
        moved = (W.detach() + sign * step * direction).requires_grad_()
        parts = oracle.leaves(CLOSURE_CALLS[call](lambda moved=moved: torch.tanh(x @ moved), [moved]))
        values.append(sum((leaf * w).sum() for leaf, w in zip(parts, weights, strict=True)))
    difference = (values[0] - values[1]) / (2 * step)
    close((slope * direction).sum(), difference, rtol=1e-7)
    assert difference.abs() > 1e-3


def test_create_graph_of_a_model_call_reaches_the_model_s_own_parameters():
    model, x = nn.Linear(3, 1, bias=False).double(), draw(5, 3)
    cubed = nn.Sequential(model, Calls(lambda out: out**3))
    v = draw(1, 3, seed=1)
    found = model_jvp(cubed, x, [v], create_graph=True)
    (slope,) = torch.autograd.grad(found.sum(), model.weight)
    out = (x @ model.weight.T).detach()
    close(slope, (6 * out * (x @ v.T) * x).sum(0, keepdim=True))


def test_refusals_an_error_of_the_closure_s_own_passes_through():
    class OwnError(Exception):
        pass

    def function() -> Tensor:
        raise OwnError

    with pytest.raises(OwnError):
        jvp(function, [weight(3)], draw(3))


class Scaled(nn.Module):
    """A hook scales gradients by a number that it reads out of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 8).double(), nn.Linear(8, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if h.requires_grad:
            h.register_hook(lambda g: g * g.detach().abs().max().item())
        return self.last(h)


@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")
def test_a_backward_that_reads_numbers_out_of_its_cotangent_is_taken_row_by_row() -> None:
    """What was read while a pull was recorded is a constant of the double backward."""
    model, x = Scaled(), torch.randn(4, 3).double()
    rows = []
    for i in range(len(x)):
        own = x[i : i + 1].clone().requires_grad_()
        out = model(own)
        rows.append(torch.stack([torch.autograd.grad(o, own, retain_graph=True)[0][0] for o in out[0]]))
    for mode in ("reverse", "forward", "auto"):
        torch.testing.assert_close(jacops.compute_jacobian(model, x, mode=mode), torch.stack(rows))
