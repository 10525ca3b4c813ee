"""JAX's tensor utilities do what torch's do, and are found through the model; influences of a JAX model are torch's."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jacops import (  # noqa: E402
    TensorUtilities,
    TorchTensorUtilities,
    TorchTwiceDifferentiable,
    compute_influence_factors,
    compute_influences,
    self_influences,
)
from jacops._influence._jax import JaxTensorUtilities, JaxTwiceDifferentiable  # noqa: E402
from jacops.errors import InputTypeError  # noqa: E402
from jax_cases import PAIRS, Pair, as_jax, as_torch, double_precision, mlp, mse, weights  # noqa: E402
from small import draw, small_net  # noqa: E402


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with double_precision():
        yield


def net() -> JaxTwiceDifferentiable:
    return JaxTwiceDifferentiable(mlp, weights(small_net()), mse)


@pytest.fixture
def registry() -> Iterator[dict[Any, Any]]:
    kept = dict(TensorUtilities.registry)
    yield TensorUtilities.registry
    TensorUtilities.registry.clear()
    TensorUtilities.registry.update(kept)


A, B, ONE = draw(3, 4), draw(3, 4, seed=1), draw(1, 3, 2)
CALLS: dict[str, Callable[[Any, Callable[..., Any]], Any]] = {
    "einsum": lambda u, to: u.einsum("ij,kj->ik", to(A), to(B)),
    "einsum of one": lambda u, to: u.einsum("ij->j", to(A)),
    "cat": lambda u, to: u.cat([to(A), to(B)]),
    "cat of a tuple along an axis": lambda u, to: u.cat((to(A), to(B)), dim=1),
    "cat along an axis from the end": lambda u, to: u.cat([to(A), to(B)], dim=-1),
    "cat by numpy's word": lambda u, to: u.cat([to(A), to(B)], axis=1),
    "stack": lambda u, to: u.stack([to(A), to(B)]),
    "stack along an axis": lambda u, to: u.stack([to(A), to(B)], dim=-1),
    "unsqueeze": lambda u, to: u.unsqueeze(to(A), dim=1),
    "unsqueeze at the end": lambda u, to: u.unsqueeze(to(A), -1),
    "element": lambda u, to: u.get_element(to(A), 2),
    "element from the end": lambda u, to: u.get_element(to(A), -3),
    "element past axes of length one": lambda u, to: u.get_element(to(ONE), 2),
    "element of one": lambda u, to: u.get_element(to(draw(1)), 0),
    "slice": lambda u, to: u.slice(to(A), 0, 2),
    "slice along an axis": lambda u, to: u.slice(to(A), 1, 3, 1),
    "slice along the last axis": lambda u, to: u.slice(to(A), 1, 3, axis=-1),
    "slice beyond the end": lambda u, to: u.slice(to(A), 2, 9),
    "reshape": lambda u, to: u.reshape(to(A), (2, 6)),
    "reshape by a wildcard": lambda u, to: u.reshape(to(A), (-1, 3)),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_gives_what_torch_s_gives(call: str):
    expected = CALLS[call](TorchTensorUtilities, lambda tensor: tensor)
    found = CALLS[call](JaxTensorUtilities, as_jax)
    assert isinstance(found, jax.Array)
    assert JaxTensorUtilities.shape(found) == TorchTensorUtilities.shape(expected)
    torch.testing.assert_close(as_torch(found), expected, rtol=1e-14, atol=0)


def test_an_option_that_is_not_there_is_named():
    with pytest.raises(InputTypeError, match="`out` is given"):
        JaxTensorUtilities.cat([as_jax(A)], out=None)


def parts(*sizes: int, width: int = 2) -> Iterator[Any]:
    return (as_jax(draw(size, width, seed=i)) for i, size in enumerate(sizes))


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1), (0, 5), (2, 0, 3)])
def test_d2_rows_as_promised_come_in_order_and_in_the_model_s_dtype(sizes: tuple[int, ...]):
    found = JaxTensorUtilities.cat_gen(parts(*sizes), (5, 2), net())
    assert np.array_equal(found, jnp.concatenate(list(parts(*sizes))))
    single = JaxTwiceDifferentiable(mlp, tuple(w.astype("float32") for w in weights(small_net())), mse)
    assert JaxTensorUtilities.cat_gen(parts(5), (5, 2), single).dtype == jnp.float32


def test_d13_utilities_are_found_through_the_model_and_its_ancestors(registry: dict[Any, Any]):
    class Special(JaxTwiceDifferentiable):
        pass

    class Mine(JaxTensorUtilities):
        pass

    special = Special(mlp, weights(small_net()), mse)
    assert registry[JaxTwiceDifferentiable] is JaxTensorUtilities
    for model in (net(), special):
        assert TensorUtilities.from_twice_differentiable(model) is JaxTensorUtilities

    class SpecialUtilities(JaxTensorUtilities):
        twice_differentiable_type = Special

    assert TensorUtilities.from_twice_differentiable(special) is SpecialUtilities
    assert TensorUtilities.from_twice_differentiable(net()) is JaxTensorUtilities


# Influence


def batches(pair: Pair, *sizes: int, to: Callable[[Any], Any] = lambda tensor: tensor) -> list[tuple[Any, Any]]:
    return [(to(x), to(y)) for x, y in zip(pair.x.split(list(sizes)), pair.y.split(list(sizes)), strict=True)]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_influences_of_the_same_weights_agree(name: str, curvature: Any):
    pair = PAIRS[name]()
    split = {"mlp": (3, 2), "cnn": (2, 2), "attention": (3,)}[name]
    ours = JaxTwiceDifferentiable(pair.apply, pair.params, pair.jax_loss)
    theirs = TorchTwiceDifferentiable(pair.model, pair.loss)
    options: dict[str, Any] = {"damping": 20.0, "curvature": curvature}
    for kind in ("up", "perturbation"):
        options["influence_type"] = kind
        expected = compute_influences(theirs, batches(pair, *split), **options)
        found = compute_influences(ours, batches(pair, *split), **options)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
        assert found.info["covered"] == expected.info["covered"]


def test_influence_factors_and_self_influences_agree_on_jax_arrays_too():
    pair = PAIRS["mlp"]()
    ours = JaxTwiceDifferentiable(pair.apply, pair.params, pair.jax_loss)
    theirs = TorchTwiceDifferentiable(pair.model, pair.loss)
    data, jax_data = batches(pair, 3, 2), batches(pair, 3, 2, to=as_jax)
    expected, found = (
        compute_influence_factors(model, d, d, damping=5.0) for model, d in ((theirs, data), (ours, jax_data))
    )
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        self_influences(ours, jax_data, damping=5.0), self_influences(theirs, data, damping=5.0), rtol=1e-9, atol=1e-12
    )
