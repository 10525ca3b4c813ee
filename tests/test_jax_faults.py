"""Faults D1-D14 of models that are differentiated twice, on a JAX model; and what goes wrong in JAX alone."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jacops  # noqa: E402
import oracle  # noqa: E402
from jacops._influence._jax import JaxTwiceDifferentiable  # noqa: E402
from jacops.errors import InputError, InputTypeError, JacopsWarning, NonFiniteError, NotDifferentiableError  # noqa: E402
from jax_cases import as_jax, as_torch, double_precision, mlp, mse, weights  # noqa: E402
from small import draw, small_net  # noqa: E402


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with double_precision():
        yield


def net(loss: Callable[..., Any] = mse) -> JaxTwiceDifferentiable:
    return JaxTwiceDifferentiable(mlp, weights(small_net()), loss)


def line(w: Any, x: Any) -> Any:
    return x @ w


def linear(loss: Callable[..., Any] = mse, outputs: int = 1) -> JaxTwiceDifferentiable:
    return JaxTwiceDifferentiable(line, as_jax(draw(2, outputs)), loss)


X, Y = draw(5, 3), draw(5, 2, seed=1)


def close(actual: Any, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(as_torch(actual), expected, rtol=rtol, atol=rtol)


# Arguments


def test_a_model_that_leaves_some_parameters_unused_has_zeros_there():
    own = JaxTwiceDifferentiable(lambda p, x: mlp(p[1:], x), (jnp.ones(3), *weights(small_net())), mse)
    expected = torch.zeros(29, 29).double()
    expected[3:, 3:] = oracle.hessian(small_net(), F.mse_loss, X, Y)
    close(own.hessian(X, Y), expected)
    recorded = own.grad(X, Y, create_graph=True)
    close(recorded[3:], oracle.gradient(small_net(), F.mse_loss, X, Y))
    close(own.mvp(recorded, jnp.eye(29), own.parameters[0]), expected[:, :3])


# Dtypes: nothing is cast


def test_float64_where_jax_is_not_configured_for_it_is_refused_and_never_rounded():
    model = net()
    with jax.enable_x64(False):
        for make in (
            lambda: model.grad(X.float(), Y.float()),
            lambda: net().hessian(X, Y),
            lambda: JaxTwiceDifferentiable(line, np.ones((2, 1)), mse),
        ):
            with pytest.raises(InputError, match="of dtype float64, but JAX would make it float32.*jax_enable_x64"):
                make()
        single = JaxTwiceDifferentiable(line, np.ones((2, 1), np.float32), mse)
        with pytest.raises(InputError, match="`x` is of dtype float64.*jax_enable_x64"):
            single.grad(draw(5, 2), draw(5, 1).float())
        assert single.hessian(draw(5, 2).float(), draw(5, 1).float()).dtype == jnp.float32


def test_whole_numbers_are_narrowed_only_where_none_is_lost():
    def pick(w: Any, ids: Any) -> Any:
        return w[ids % 2]

    with jax.enable_x64(False):
        model = JaxTwiceDifferentiable(pick, jnp.ones((2, 1)), mse)
        y = torch.zeros(3, 1)
        assert model.grad(torch.tensor([0, 1, 2]), y).shape == (2,)  # torch's are int64
        with pytest.raises(InputError, match="`x` is of dtype int64, but JAX would make it int32"):
            model.grad(torch.tensor([0, 1, 2**40]), y)


@pytest.mark.parametrize(
    ("name", "x", "y"), [("x", X.float(), Y), ("y", X, Y.float()), (r"x\['a'\]", {"a": X.half()}, Y)]
)
def test_inputs_and_targets_of_another_precision_are_refused(name: str, x: Any, y: Any):
    for call in (net().grad, net().hessian, net().objective.sample_gradients):
        with pytest.raises(InputError, match=f"`{name}` is of dtype float.*parameters are of float64; nothing is cast"):
            call(x, y)


def test_things_that_are_no_arrays_are_named_by_their_place():
    with pytest.raises(InputTypeError, match=r"`x\[1\]` is a str"):
        net().grad((X, "x"), Y)
    with pytest.raises(InputError, match="`x` is of layout torch.sparse_coo"):
        net().grad(X.to_sparse(), Y)


# D1, D2: rows are samples


def test_d1_leading_axes_that_differ_are_refused():
    own = net().objective
    for call in (own.sample_gradients, lambda x, y: own.mixed(x, y, draw(1, 26))):
        with pytest.raises(InputError, match=r"`x, y` is of lengths \[4, 5\]"):
            call(X, Y[:4])
        with pytest.raises(InputError, match=r"of lengths \[-1, 5\]"):
            call(X, torch.tensor(1.0).double())


# D3: one loss call everywhere, and no target that broadcasts


def smooth(output: Any, y: Any) -> Any:
    return jnp.mean(jnp.where(jnp.abs(output - y) < 1, (output - y) ** 2, jnp.abs(output - y)))


LOSSES = {
    "written out": mse,
    "compiled": jax.jit(mse),
    "branches": smooth,
    "after a sigmoid": lambda output, y: -jnp.mean(y * jax.nn.log_sigmoid(output)),
    "of a scaled target": lambda output, y: jnp.sum((output - jax.jit(lambda t: 2 * t)(y)) ** 2),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shapes", [((5, 1), (5,)), ((5,), (5, 1))], ids=str)
def test_d3_a_target_that_would_broadcast_is_refused_everywhere_with_both_shapes(loss: str, shapes: Any):
    output, target = shapes
    model = JaxTwiceDifferentiable(lambda w, x: (x @ w).reshape(output), jnp.ones((2, 1)), LOSSES[loss])
    x, y = draw(5, 2), draw(*target)
    own = model.objective
    for call in (model.grad, model.hessian, own.ggn, own.value):
        with pytest.raises(InputError, match=r"`y` is of shape .* every row") as error:
            call(x, y)
        assert str(target) in str(error.value)
        assert str(output) in str(error.value)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (lambda output, y: jnp.mean((output - y[:, None]) ** 2), (5,)),
        (lambda output, y: jnp.mean((output - y) ** 2), (5, 1)),
        (lambda output, y: jnp.mean((output[:, 0] - y) ** 2), (5,)),
        (lambda output, y: jnp.mean(output**2) + jnp.mean(y), (5,)),
        (lambda output, y: jnp.sum(output * y[:, None] - jnp.outer(y, y).sum()), (5,)),
    ],
    ids=["axis added", "one column", "axis dropped", "apart", "outer product of targets"],
)
def test_d3_a_target_that_is_meant_to_be_spread_is_not_refused(loss: Callable[..., Any], y: Any):
    model, target = linear(loss, outputs=3), draw(*y)
    x = draw(5, 2)
    expected = jax.jit(jax.grad(lambda w: loss(line(w, as_jax(x)), as_jax(target))))(model.params)
    close(model.grad(x, target), as_torch(expected).flatten())


def test_d3_gradient_hessian_and_products_are_of_one_and_the_same_loss():
    own, gradient = net(), oracle.gradient(small_net(), F.mse_loss, X, Y)
    recorded = own.grad(X, Y, create_graph=True)
    assert np.array_equal(recorded, own.grad(X, Y))
    close(recorded, gradient)
    close(own.mvp(recorded, jnp.eye(26), own.params), as_torch(own.hessian(X, Y)), rtol=1e-13)


# D4: axes of length one are left alone


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("outputs", [1, 3])
def test_d4_one_row_one_output_and_both(rows: int, outputs: int):
    own, x, y = linear(outputs=outputs), draw(rows, 2), draw(rows, outputs, seed=1)
    twin = torch.nn.Linear(2, outputs, bias=False).double()
    with torch.no_grad():
        twin.weight.copy_(as_torch(own.params).T)
    order = torch.arange(2 * outputs).reshape(outputs, 2).T.flatten()
    close(own.grad(x, y), oracle.gradient(twin, F.mse_loss, x, y)[order])
    close(own.hessian(x, y), oracle.hessian(twin, F.mse_loss, x, y)[order][:, order])


# D10: what the caller gave is not changed


def test_d10_nothing_of_the_caller_s_is_changed_or_shared():
    params = {"w": np.ones((2, 1)), "v": torch.ones(1).double()}
    own = JaxTwiceDifferentiable(lambda p, x: x @ p["w"] + p["v"], params, mse)
    x, y, v = draw(5, 2), draw(5, 1), draw(2, 3)
    kept = x.clone(), y.clone(), v.clone()
    config = dict(jax.config.values)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    recorded = own.grad(x, y, create_graph=True)
    by_x, hessian = own.mvp(recorded, v, x), own.hessian(x, y)
    assert all(torch.equal(a, b) for a, b in zip((x, y, v), kept, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert dict(jax.config.values) == config
    x.zero_(), y.zero_(), v.zero_(), params["w"].fill(0), params["v"].zero_()
    close(own.mvp(recorded, kept[2], own.parameters), kept[2] @ as_torch(hessian))
    close(own.mvp(recorded, kept[2], x), as_torch(by_x))
    close(own.grad(*kept[:2]), as_torch(recorded))


def test_d10_results_are_the_caller_s_to_write_into():
    own = net().objective
    first = own.hessian(X, Y).dense()
    kept = first.clone()
    first.zero_()
    own.point().zero_()
    own.gradient(X, Y).zero_()
    torch.testing.assert_close(own.hessian(X, Y).dense(), kept, rtol=0, atol=0)


# D12: directions, and what to differentiate by


@pytest.mark.parametrize("kind", ["jax", "torch", "numpy", "list"])
def test_d12_one_direction_may_be_a_vector_and_come_from_anywhere(kind: str):
    own, v = net(), draw(26, seed=3)
    given = {"jax": as_jax(v), "torch": v, "numpy": v.numpy(), "list": v.tolist()}[kind]
    found = own.mvp(own.grad(X, Y, create_graph=True), given, own.parameters)
    close(found, (v @ oracle.hessian(small_net(), F.mse_loss, X, Y))[None])


def test_d12_some_of_the_parameters_give_some_of_the_columns():
    own, v = net(), draw(2, 26, seed=3)
    expected = v @ oracle.hessian(small_net(), F.mse_loss, X, Y)
    recorded, p = own.grad(X, Y, create_graph=True), own.parameters
    close(own.mvp(recorded, v, p[1]), expected[:, 12:16])
    close(own.mvp(recorded, v, [p[3], p[0]]), expected[:, [24, 25, *range(12)]])
    close(own.mvp(recorded, v, [p[1], p[1]]), expected[:, [*range(12, 16)] * 2])
    close(own.mvp(recorded, v, (leaf for leaf in p)), expected)
    assert own.mvp(recorded, v[:0], p).shape == (0, 26)


def test_d12_one_array_in_two_places_is_two_parameters():
    shared = jnp.ones((2, 1))
    own = JaxTwiceDifferentiable(lambda p, x: jnp.tanh(x @ p["a"]) * (x @ p["b"]), {"a": shared, "b": shared}, mse)
    x, y = draw(5, 2), draw(5, 1)
    recorded, hessian = own.grad(x, y, create_graph=True), as_torch(own.hessian(x, y))
    close(own.mvp(recorded, jnp.eye(4), own.parameters), hessian)
    close(own.mvp(recorded, jnp.eye(4), own.parameters[1]), hessian[:, 2:])
    with pytest.raises(InputError, match="the array of a and b"):
        own.mvp(recorded, jnp.eye(4), shared)


# A gradient that nothing is known about, and second derivatives that are zero


def test_a_missing_create_graph_is_distinguished_from_a_linear_loss():
    own = linear(lambda output, y: output.sum())
    x, y, v = draw(5, 2), draw(5, 1), jnp.ones((1, 2))
    with pytest.raises(NotDifferentiableError, match=r"`grad_xy` has no graph.*create_graph=True"):
        own.mvp(own.grad(x, y), v, own.parameters)
    recorded = own.grad(x, y, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="that very array"):
        own.mvp(recorded + 0, v, own.parameters)
    with pytest.raises(InputTypeError, match="`grad_xy` is an? "):
        own.mvp(recorded[None], v, own.parameters)
    assert np.array_equal(own.mvp(recorded, v, own.parameters), np.zeros((1, 2)))
    assert np.array_equal(own.hessian(x, y), np.zeros((2, 2)))
    close(own.mvp(recorded, v, x), torch.ones(1, 10).double())  # d²/dw dx is one, per row


def test_what_a_gradient_remembers_goes_with_it():
    x = as_jax(X)
    recorded = net().grad(x, Y, create_graph=True)
    seen = weakref.ref(x)
    del x, recorded
    gc.collect()
    assert seen() is None


# NaN and Inf


def test_nan_and_inf_name_where_they_were_seen_first():
    own = net()
    with pytest.raises(NonFiniteError, match=r"in output 0.*the first at index \(2, 0\)"):
        own.grad(torch.where(torch.arange(5)[:, None] == 2, torch.nan, X), Y)
    root = linear(lambda output, y: jnp.sqrt(jnp.sum(output**2)))
    with pytest.raises(NonFiniteError, match="derivative's part for params"):
        root.grad(torch.zeros(5, 2).double(), draw(5, 1))
    bent = JaxTwiceDifferentiable(lambda w, x: jnp.sum(jnp.abs(w) ** 1.5) * x, jnp.zeros(2), mse)
    with pytest.raises(NonFiniteError, match="hessian: in the derivative's part for params"):
        bent.hessian(torch.ones(1, 1).double(), torch.ones(1, 1).double())
    log = linear(lambda output, y: jnp.log(jnp.sum(output**2)))
    with pytest.raises(NonFiniteError, match="the loss is -inf; the model's output is finite"):
        log.objective.value(torch.zeros(5, 2).double(), draw(5, 1))


# JAX's own ways to be wrong


def branching(w: Any, x: Any) -> Any:
    return x @ w if float(x.sum()) > 0 and w[0, 0] > -1e3 else -(x @ w)


def test_a_model_that_branches_on_values_runs_uncompiled_and_says_so():
    own, x, y = JaxTwiceDifferentiable(branching, as_jax(draw(2, 1)), mse), draw(5, 2), draw(5, 1)
    with pytest.warns(JacopsWarning, match="reads values"):
        gradient = own.grad(x, y)
    sign = 1.0 if x.sum() > 0 else -1.0
    plain = JaxTwiceDifferentiable(lambda w, x: sign * (x @ w), own.params, mse)
    close(gradient, as_torch(plain.grad(x, y)))
    close(own.hessian(x, y), as_torch(plain.hessian(x, y)))
    assert "uncompiled" in repr(own.objective.hessian(x, y))
    each = torch.where(x.sum(1) > 0, 1.0, -1.0).double()[:, None]
    residual = each * (x @ as_torch(own.params)) - y
    close(own.objective.sample_gradients(x, y).dense().numpy(), 2 * residual * each * x)


def test_a_value_read_out_of_what_is_differentiated_is_refused():
    own = JaxTwiceDifferentiable(lambda w, x: x @ w * float(w[0, 0]), as_jax(draw(2, 1)), mse)
    with (
        pytest.warns(JacopsWarning, match="reads values"),
        pytest.raises(NotDifferentiableError, match=r"plain numbers.*`float\(\)`"),
    ):
        own.grad(draw(5, 2), draw(5, 1))


def test_calls_inside_a_transformation_of_jax_are_refused():
    own = net()
    for call in (own.grad, own.hessian):
        with pytest.raises(NotDifferentiableError, match="`x` is an array inside a transformation.*outside"):
            jax.jit(lambda x, call=call: call(x, Y))(as_jax(X))


@jax.custom_vjp
def cube(x: Any) -> Any:
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


@jax.custom_vjp
def lossy(x: Any) -> Any:
    return x**3


lossy.defvjp(lambda x: (x**3, x), lambda x, g: (3 * jax.lax.stop_gradient(x) ** 2 * g,))


@jax.custom_jvp
def uneven(a: Any, b: Any) -> Any:
    return a**2 * b


@uneven.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, b), (da, db) = primals, tangents
    return uneven(a, b), 2 * a * jax.lax.stop_gradient(b) * da + a**2 * db


def test_custom_derivatives_that_are_whole_are_followed_in_every_operator():
    plain = JaxTwiceDifferentiable(lambda w, x: (x @ w) ** 3, as_jax(draw(2, 1)), mse)
    own, x, y = JaxTwiceDifferentiable(lambda w, x: cube(x @ w), plain.params, mse), draw(5, 2), draw(5, 1)
    close(own.hessian(x, y), as_torch(plain.hessian(x, y)))
    close(own.objective.ggn(x, y).dense().numpy(), plain.objective.ggn(x, y).dense())


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (lambda w, x: lossy(x @ w[:2]) * w[2], "central difference of gradients disagree.*custom_vjp"),
        (lambda w, x: uneven(x @ w[:2], w[2]), "not symmetric.*custom_jvp"),
    ],
    ids=["evenly", "unevenly"],
)
def test_a_second_derivative_of_which_a_part_is_dropped_is_found(apply: Callable[..., Any], said: str):
    own, x, y = JaxTwiceDifferentiable(apply, as_jax(draw(3, 1)), mse), draw(5, 2), draw(5, 1)
    assert own.grad(x, y).shape == (3,)
    for call in (own.hessian, lambda x, y: own.grad(x, y, create_graph=True)):
        with pytest.raises(NotDifferentiableError, match=said):
            call(x, y)


def test_a_wrong_batching_rule_is_found_and_left():
    @jax.custom_batching.custom_vmap
    def double(x: Any) -> Any:
        return 2 * x

    @double.def_vmap
    def lying(size: int, batched: Any, x: Any) -> Any:
        return 3 * x, True

    own, x, y = JaxTwiceDifferentiable(lambda w, x: double(x) @ w, as_jax(draw(2, 1)), mse), draw(5, 2), draw(5, 1)
    with pytest.warns(JacopsWarning, match="sample_gradients: JAX's vmap of it is off by .*one by one"):
        found = own.objective.sample_gradients(x, y).dense()
    residual = 2 * x @ as_torch(own.params) - y
    torch.testing.assert_close(found, 4 * residual * x)


def test_an_operation_without_a_batching_rule_goes_one_by_one():
    from jax.extend.core import Primitive
    from jax.interpreters import ad, mlir

    alone = Primitive("alone")
    alone.def_impl(lambda x: x)
    alone.def_abstract_eval(lambda x: x)
    mlir.register_lowering(alone, lambda context, x: [x])
    ad.deflinear(alone, lambda cotangent: [alone.bind(cotangent)])
    own, v = JaxTwiceDifferentiable(lambda w, x: x @ alone.bind(w), as_jax(draw(2, 1)), mse), draw(3, 2)
    x, y = draw(5, 2), draw(5, 1)
    hessian = 2 * x.T @ x / 5
    operator = own.objective.hessian(x, y)
    with pytest.warns(JacopsWarning, match="cannot be batched.*one by one"):
        found = operator.apply(v)
    torch.testing.assert_close(found, v @ hessian)
    torch.testing.assert_close(operator.apply(v), v @ hessian)


# The extra


def test_importing_jacops_does_not_import_jax_and_the_names_do():
    code = (
        "import sys, jacops; before = 'jax' in sys.modules; from jacops import JaxTensorUtilities, "
        "JaxTwiceDifferentiable; print(before, 'jax' in sys.modules, JaxTwiceDifferentiable.__name__)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["False", "True", "JaxTwiceDifferentiable"], "")


def test_a_missing_jax_is_reported_with_its_pip_line():
    code = "import sys; sys.modules['jax'] = None; import jacops; jacops.JaxTwiceDifferentiable"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtraError" in done.stderr
    assert "pip install 'jacops[jax]'" in done.stderr


def test_names_that_are_not_there_are_still_reported():
    with pytest.raises(AttributeError, match="no attribute 'Jax'"):
        jacops.Jax  # noqa: B018
