"""Models of JAX as their users write them: trees with leaves that are no arrays, Equinox modules, Flax's variables."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402

import jacops  # noqa: E402
from jacops.errors import InputTypeError  # noqa: E402
from jacops.solvers import EKFAC  # noqa: E402
from jax_cases import as_jax, as_torch, double_precision, mse  # noqa: E402
from small import draw  # noqa: E402

X, Y = draw(5, 3), draw(5, 2, seed=1)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with double_precision():
        yield


def check(apply: Any, params: Any, arrays: Any, build: Any, loss: Any = mse) -> jacops.JaxFunction:
    """Everything a problem asks of a model, against plain JAX on a flat vector of its differentiable arrays."""
    flat, unravel = ravel_pytree(arrays)
    x, y = as_jax(X), as_jax(Y)

    def value(v: Any) -> Any:
        return loss(apply(build(unravel(v)), x), y)

    model = jacops.JaxFunction(apply, params)
    own = jacops.Problem(model, loss, [(X, Y)])
    assert own.space.dim == flat.size
    close(own.gradient(), jax.grad(value)(flat))
    close(own.hessian().dense(), jax.hessian(value)(flat))
    close(own.sample_gradients().dense().mean(0), jax.grad(value)(flat))
    rows = jax.jacrev(lambda v: apply(build(unravel(v)), x))(flat)
    close(jacops.jacobian(model, X).dense(), rows.reshape(-1, flat.size))
    close(EKFAC().approximate(own.ggn()).eigenvalues.sum(), jnp.trace(as_jax(own.ggn().dense())))
    influences = jacops.compute_influences(jacops.JaxTwiceDifferentiable(apply, params, loss), [(X, Y)], damping=5.0)
    assert influences.values.shape == (5, 5)
    return model


def close(actual: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, as_torch(expected), rtol=1e-9, atol=1e-9)


# Trees


def tree() -> dict[str, Any]:
    return {
        "layers": [{"w": as_jax(draw(3, 4)), "act": jnp.tanh}, {"w": as_jax(draw(4, 2, seed=1)), "act": None}],
        "rate": 0.5,
        "name": "net",
        "steps": np.arange(2),
    }


def through_tree(params: dict[str, Any], x: Any) -> Any:
    for layer in params["layers"]:
        x = x @ layer["w"]
        x = x if layer["act"] is None else layer["act"](x)
    return x * params["rate"] if params["name"] == "net" else x


def test_leaves_that_are_no_arrays_are_part_of_the_program():
    params = tree()
    arrays = [layer["w"] for layer in params["layers"]]

    def build(own: Any) -> Any:
        layers = [{**layer, "w": w} for layer, w in zip(params["layers"], own, strict=True)]
        return {**params, "layers": layers}

    model = check(through_tree, params, arrays, build)
    assert model.names == ("layers.0.act", "layers.0.w", "layers.1.w", "name", "rate", "steps")
    assert model.space().names == ("layers.0.w", "layers.1.w")
    assert model.total == 22


def test_what_is_no_array_distinguishes_programs():
    params, other = tree(), {**tree(), "rate": 2.0}
    first, second = (jacops.JaxFunction(through_tree, p) for p in (params, other))
    J, twice = (jacops.jacobian(model, X).dense() for model in (first, second))
    torch.testing.assert_close(twice, 4 * J)
    prints = {jacops.Problem(m, mse, [(X, Y)]).objective.fingerprint() for m in (first, second)}
    assert len(prints) == 2


def test_a_tree_without_arrays_names_what_stands_there():
    with pytest.raises(InputTypeError, match=r"`params\['act'\]` is a PjitFunction|`params\['act'\]` is a "):
        jacops.JaxFunction(through_tree, {"act": jnp.tanh, "rate": 1.0})


class Affine:
    """A class whose fields are registered as data and as static."""

    def __init__(self, weight: Any, scale: float) -> None:
        self.weight, self.scale = weight, scale

    def __call__(self, x: Any) -> Any:
        return self.scale * x @ self.weight


jax.tree_util.register_dataclass(Affine, data_fields=["weight"], meta_fields=["scale"])


def test_static_fields_are_kept():
    module = Affine(as_jax(draw(3, 2)), 2.0)
    model = check(lambda own, x: own(x), module, module.weight, lambda w: Affine(w, 2.0))
    assert model.space().names == ("weight",)


def test_bound_methods_compile_once():
    class Net:
        traces = 0

        def apply(self, params: Any, x: Any) -> Any:
            Net.traces += 1
            return x @ params

    net, w = Net(), as_jax(draw(3, 2))
    for step in range(3):
        jacops.hessian(jacops.JaxFunction(net.apply, w + step), mse, X, Y).dense()
        if step == 0:
            first = Net.traces
    assert Net.traces <= first + 4  # a recording looks at the output's shape and value, uncompiled


# Libraries


def test_an_equinox_module_of_single_samples():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0), dtype=jnp.float64)
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    model = check(lambda own, x: jax.vmap(own)(x), module, arrays, lambda own: eqx.combine(own, static))
    assert model.space().names[0] == "layers.0.weight"


def test_a_partitioned_equinox_module():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.Linear(3, 2, key=jax.random.key(0), dtype=jnp.float64)
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    check(lambda own, x: jax.vmap(eqx.combine(own, static))(x), arrays, arrays, lambda own: own)


def test_flax_linen_variables():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = jnp.tanh(linen.Dense(4, param_dtype=jnp.float64)(x))
            return linen.Dense(2, param_dtype=jnp.float64)(linen.LayerNorm(param_dtype=jnp.float64)(x))

    net = Net()
    variables = net.init(jax.random.key(0), as_jax(X))
    model = check(net.apply, variables, variables, lambda own: own)
    assert "params.Dense_0.kernel" in model.names
    params = variables["params"]
    check(lambda own, x: net.apply({"params": own}, x), params, params, lambda own: own)


def test_a_flax_linen_convolution():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Conv(3, (2,), param_dtype=jnp.float64)(x[..., None])
            return linen.Dense(2, param_dtype=jnp.float64)(jnp.tanh(x).reshape(x.shape[0], -1))

    net = Net()
    variables = net.init(jax.random.key(0), as_jax(X))
    check(net.apply, variables, variables, lambda own: own)


def test_a_flax_nnx_module():
    nnx = pytest.importorskip("flax.nnx")
    module = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    definition, state = nnx.split(module)
    check(lambda own, x: nnx.merge(definition, own)(x), state, state, lambda own: own)
