"""The same weights in torch and in JAX give the same derivatives, to float64 rounding."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jacops  # noqa: E402
import oracle  # noqa: E402
from jacops._fisher import fisher  # noqa: E402
from jacops._influence._jax import JaxTwiceDifferentiable  # noqa: E402
from jacops._jax.protocol import JaxFunction  # noqa: E402
from jacops._objective import Objective  # noqa: E402
from jax_cases import PAIRS, Pair, as_jax, as_torch, double_precision, mlp, mse, weights  # noqa: E402
from small import draw, small_net  # noqa: E402


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with double_precision():
        yield


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]()


def wrapped(pair: Pair) -> JaxTwiceDifferentiable:
    return JaxTwiceDifferentiable(pair.apply, pair.params, pair.jax_loss)


def objective(pair: Pair) -> Objective:
    return wrapped(pair).objective


def made(apply: Any, params: Any, loss: Any = mse) -> Objective:
    return Objective(JaxFunction(apply, params), loss)


def close(actual: Any, expected: Tensor, rtol: float = 1e-9) -> None:
    actual = actual if isinstance(actual, Tensor) else as_torch(actual)
    assert actual.shape == expected.shape, f"shape {tuple(expected.shape)} expected, got {tuple(actual.shape)}"
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def each_gradient(pair: Pair) -> Tensor:
    rows = [slice(i, i + 1) for i in range(len(pair.x))]
    found = [oracle.gradient(pair.model, pair.loss, pair.x[i], pair.y[i]) for i in rows]
    return torch.stack(found) if found else torch.zeros(0, objective(pair).space.dim).double()


def test_gradients_and_hessians_agree(pair: Pair):
    model = wrapped(pair)
    x, y = as_jax(pair.x), as_jax(pair.y)
    assert model.num_params == sum(p.numel() for p in pair.model.parameters())
    gradient = oracle.gradient(pair.model, pair.loss, pair.x, pair.y)
    close(model.grad(x, y), gradient)
    close(model.grad(x, y, create_graph=True), gradient)
    close(model.hessian(x, y), oracle.hessian(pair.model, pair.loss, pair.x, pair.y))


def test_products_by_parameters_and_by_inputs_agree(pair: Pair):
    model = wrapped(pair)
    x, y = as_jax(pair.x), as_jax(pair.y)
    hessian, mixed = oracle.second_derivatives(pair.model, pair.loss, pair.x, pair.y)
    v = draw(3, model.num_params, seed=3)
    recorded = model.grad(x, y, create_graph=True)
    close(model.mvp(recorded, as_jax(v), model.parameters), v @ hessian)
    close(model.mvp(recorded, as_jax(v), x), v @ mixed)
    last = model.parameters[-1]
    close(model.mvp(recorded, as_jax(v), [x, last]), torch.cat([v @ mixed, (v @ hessian)[:, -last.size :]], 1))


def test_the_operators_agree(pair: Pair):
    own, x, y = objective(pair), pair.x, pair.y
    hessian, ggn = own.hessian(x, y), own.ggn(x, y)
    close(hessian.dense(), oracle.hessian(pair.model, pair.loss, x, y))
    close(ggn.dense(), jacops.ggn(pair.model, pair.loss, x, y).dense())
    assert hessian.symmetric
    assert ggn.symmetric
    v = draw(own.space.dim, seed=4)
    close(hessian @ v, hessian.dense() @ v)
    close(hessian.T @ v, hessian @ v)
    assert (hessian @ torch.zeros(own.space.dim, 0).double()).shape == (own.space.dim, 0)


def test_values_gradients_and_points_agree(pair: Pair):
    own = objective(pair)
    assert own.value(pair.x, pair.y) == pytest.approx(float(pair.loss(pair.model(pair.x), pair.y).detach()), rel=1e-12)
    close(own.gradient(pair.x, pair.y), oracle.gradient(pair.model, pair.loss, pair.x, pair.y))
    close(own.point(), torch.cat([p.detach().flatten() for p in pair.model.parameters()]), rtol=0)
    assert own.parameters_total == own.space.dim


def test_sample_gradients_agree(pair: Pair):
    own = objective(pair).sample_gradients(pair.x, pair.y)
    close(own.dense(), each_gradient(pair))
    assert own.domain == objective(pair).space


def test_mixed_derivatives_agree(pair: Pair):
    own, rows = objective(pair), draw(2, objective(pair).space.dim, seed=5)
    found = own.mixed(pair.x, pair.y, rows)
    assert found.shape == (2, *pair.x.shape)
    for i in range(len(pair.x)):
        one = oracle.mixed(pair.model, pair.loss, pair.x[i : i + 1], pair.y[i : i + 1])
        close(found[:, i], (rows @ one).reshape(2, *pair.x.shape[1:]))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_weighted_rows_add_up(name: str):
    pair = PAIRS[name]()
    own, counts = objective(pair), torch.arange(len(pair.x)).double()
    alone = own.sample_gradients(pair.x, pair.y).dense()
    weighted = own.weighted(counts)
    close(weighted.gradient(pair.x, pair.y), counts @ alone)
    assert weighted.reduction == "sum"
    expected = sum(
        float(c) * oracle.hessian(pair.model, pair.loss, pair.x[i : i + 1], pair.y[i : i + 1])
        for i, c in enumerate(counts)
    )
    close(weighted.hessian(pair.x, pair.y).dense(), expected)


def test_the_empirical_fisher_is_torchs(pair: Pair):
    own = objective(pair)
    close(
        own.fisher("empirical", pair.x, pair.y).dense(),
        fisher(pair.model, pair.loss, pair.x, pair.y, kind="empirical").dense(),
    )
    close(own.fisher("exact", pair.x, pair.y).dense(), fisher(pair.model, pair.loss, pair.x, pair.y).dense())


# Trees of parameters, and what batches may hold


def nested(model: torch.nn.Module) -> dict[str, Any]:
    w, b, v, c = weights(model)
    return {"layers": [{"kernel": w, "bias": b}, (v, c)], "steps": jnp.arange(3)}


def nested_mlp(params: dict[str, Any], x: Any) -> Any:
    first, (v, c) = params["layers"]
    return mlp((first["kernel"], first["bias"], v, c), x) * (1.0 + 0.0 * params["steps"].sum())


def test_trees_of_dicts_lists_and_tuples_are_named_by_their_paths():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    own = JaxTwiceDifferentiable(nested_mlp, nested(model), mse)
    names = ("layers.0.bias", "layers.0.kernel", "layers.1.0", "layers.1.1")
    assert own.objective.space.names == names
    assert own.num_params == 26
    assert own.objective.parameters_total == 29  # the step counter is passed on, not differentiated
    swap = torch.tensor([*range(12, 16), *range(12), *range(16, 26)])
    close(own.grad(x, y), oracle.gradient(model, torch.nn.functional.mse_loss, x, y)[swap])
    hessian = oracle.hessian(model, torch.nn.functional.mse_loss, x, y)[swap][:, swap]
    close(own.hessian(x, y), hessian)
    recorded, v = own.grad(x, y, create_graph=True), draw(2, 26)
    differentiated = {"layers": own.params["layers"]}
    close(own.mvp(recorded, v, differentiated), v @ hessian)
    assert JaxTwiceDifferentiable(lambda w, x: x * w, jnp.ones(3), mse).objective.space.names == ("params",)


def test_paths_that_would_share_a_name_are_written_out():
    params = {"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    own = made(lambda p, x: x * p["a.b"] * p["a"]["b"], params)
    assert own.space.names == ("params['a']['b']", "params['a.b']")


@pytest.mark.parametrize("kind", ["torch", "numpy", "jax"])
def test_batches_may_hold_arrays_of_any_of_the_three(kind: str):
    pair = PAIRS["cnn"]()
    x, y = {"torch": lambda t: t, "numpy": Tensor.numpy, "jax": as_jax}[kind](pair.x), pair.y
    own = wrapped(pair)
    recorded = own.grad(x, y, create_graph=True)
    close(recorded, oracle.gradient(pair.model, pair.loss, pair.x, pair.y))
    v = draw(2, own.num_params)
    close(own.mvp(recorded, v, x), v @ oracle.mixed(pair.model, pair.loss, pair.x, pair.y))
    assert isinstance(own.objective.gradient(x, y), Tensor)


def test_inputs_and_outputs_may_be_trees():
    def apply(w: Any, x: dict[str, Any]) -> tuple[Any, Any]:
        return jnp.tanh(x["a"] * w), x["ids"].sum() + w[x["ids"]]

    def loss(output: tuple[Any, Any], y: Any) -> Any:
        return mse(output[0].sum(1), y) + jnp.mean(output[1] ** 2)

    def written_out(w: Any) -> Any:
        return loss(apply(w, x), y)

    w, y = as_jax(draw(3)), as_jax(draw(4, seed=1))
    x = {"a": as_jax(draw(4, 3, seed=2)), "ids": jnp.array([0, 2, 2, 1])}
    own = JaxTwiceDifferentiable(apply, w, loss)
    close(own.grad(x, y), as_torch(jax.jit(jax.grad(written_out))(w)))
    close(own.hessian(x, y), as_torch(jax.jit(jax.hessian(written_out))(w)))
    recorded = own.grad(x, y, create_graph=True)
    assert own.mvp(recorded, jnp.ones(3), x["a"]).shape == (1, 12)
    with pytest.raises(jacops.errors.InputError, match=r"neither a parameter .* nor an input of floating point"):
        own.mvp(recorded, jnp.ones(3), x["ids"])
    assert own.objective.mixed(x, y, torch.ones(2, 3).double()).shape == (2, 4, 3)
    assert own.objective.sample_gradients(x, y).shape == (4, 3)
    assert own.objective.ggn(x, y).dense().shape == (3, 3)


@pytest.mark.parametrize("many", [0, 1, 2, 3, 5, 64, 65, 100])
def test_any_number_of_samples_and_of_directions_gives_its_rows(many: int):
    pair = PAIRS["mlp"]()
    own, x, y = objective(pair), draw(many, 3), draw(many, 2, seed=1)
    matrix = own.sample_gradients(x, y).dense()
    assert matrix.shape == (many, 26)
    close(matrix[-3:], each_gradient(replace(pair, x=x, y=y))[-3:])
    assert own.mixed(x, y, draw(2, 26)).shape == (2, many, 3)
    rows = draw(many, 26, seed=7)
    close(own.hessian(pair.x, pair.y).apply(rows), rows @ oracle.hessian(pair.model, pair.loss, pair.x, pair.y))
    assert own.mixed(pair.x, pair.y, rows[:0]).shape == (0, 5, 3)


def test_patterns_pick_parameters_and_freeze_the_others():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    own = made(nested_mlp, nested(model))
    some = own.changed(parameters="layers.1.*")
    assert some.space.names == ("layers.1.0", "layers.1.1")
    assert (some.space.dim, some.parameters_total) == (10, 29)
    close(some.gradient(x, y), own.gradient(x, y)[16:])
    close(some.hessian(x, y).dense(), own.hessian(x, y).dense()[16:, 16:])
    close(
        own.changed(parameters=lambda name, array: array.ndim == 1).gradient(x, y),
        own.gradient(x, y)[[*range(4), 24, 25]],
    )
    assert own.changed(parameters=["*.kernel", "*.bias"]).space.dim == 16
    with pytest.raises(jacops.errors.InputError, match=r"`parameters` is 'head\.\*'.*layers\.0\.bias"):
        own.changed(parameters="head.*")
    with pytest.raises(jacops.errors.InputError, match="`seed` is given.*pure function"):
        own.changed(seed=0)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 0.1), ("float16", 2e-2)])
def test_dtypes_are_the_model_s(dtype: str, rtol: float):
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    kind = getattr(torch, dtype)
    params = tuple(leaf.astype(dtype) for leaf in weights(model))
    own = JaxTwiceDifferentiable(mlp, params, mse)
    gradient, hessian = own.grad(x.to(kind), y.to(kind)), own.hessian(x.to(kind), y.to(kind))
    assert (str(gradient.dtype), str(hessian.dtype)) == (dtype, dtype)
    close(gradient.astype("float64"), oracle.gradient(model, torch.nn.functional.mse_loss, x, y), rtol)
    close(hessian.astype("float64"), oracle.hessian(model, torch.nn.functional.mse_loss, x, y), rtol)
    assert own.objective.space.dtype is kind
    assert own.objective.sample_gradients(x.to(kind), y.to(kind)).dense().dtype is kind


def test_random_keys_among_the_parameters_are_passed_on():
    def apply(params: Any, x: Any) -> Any:
        kept = jax.random.bernoulli(params["key"], 0.5, x.shape[1:])
        return (x * kept) @ params["w"]

    params = {"key": jax.random.key(3), "w": as_jax(draw(3, 2))}
    own = JaxTwiceDifferentiable(apply, params, mse)
    kept = as_torch(jax.random.bernoulli(params["key"], 0.5, (3,))).double()
    x, y = draw(5, 3), draw(5, 2, seed=1)
    residual = (x * kept) @ as_torch(params["w"]) - y
    close(own.grad(x, y), ((x * kept).T @ residual).flatten() * 2 / 10)
    assert own.objective.sample_gradients(x, y).shape == (5, 6)
    other = JaxTwiceDifferentiable(apply, {**params, "key": jax.random.key(4)}, mse)
    assert other.objective.fingerprint() != own.objective.fingerprint()


def test_retrained_parameters_and_new_batches_reuse_what_was_compiled():
    pair, traces = PAIRS["mlp"](), []

    def apply(params: Any, x: Any) -> Any:
        traces.append(1)
        return mlp(params, x)

    for step in range(4):
        moved = tuple(leaf + step for leaf in pair.params)
        JaxTwiceDifferentiable(apply, moved, mse).hessian(pair.x + step, pair.y)
        if step == 0:
            first = len(traces)
    assert len(traces) == first


def test_a_stored_run_can_tell_models_apart():
    pair = PAIRS["mlp"]()
    own, same = objective(pair), objective(pair)
    assert own.fingerprint() == same.fingerprint()
    w, b, v, c = pair.params
    others = [
        made(mlp, (w.at[0, 0].add(1e-15), b, v, c)),
        made(mlp, [w, b, v, c]),
        made(nested_mlp, {"layers": [{"kernel": w, "bias": b}, (v, c)], "steps": jnp.arange(1)}),
        made(mlp, pair.params, lambda output, y: mse(output, y)),
        own.changed(parameters="0"),
        own.changed(reduction="sum"),
    ]
    prints = [other.fingerprint() for other in others]
    assert len({own.fingerprint(), *prints}) == 1 + len(prints)


def test_curvature_says_what_it_is():
    pair = PAIRS["mlp"]()
    operator = objective(pair).hessian(pair.x, pair.y)
    assert "hessian" in repr(operator)
    assert "JAX" in repr(operator)
    assert operator.nbytes == pair.x.nbytes + pair.y.nbytes
    assert np.isfinite(operator.dense().numpy()).all()
