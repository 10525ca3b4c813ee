"""JAX models on samples: shared inputs, one output per sample, and curvature by inputs, as for a torch module."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import jacops  # noqa: E402
from jacops._jax.protocol import JaxFunction  # noqa: E402
from jacops.errors import InputError, InputTypeError, NotDifferentiableError  # noqa: E402
from jax_cases import PAIRS, Pair, as_jax, double_precision, mse  # noqa: E402
from small import draw, quiet  # noqa: E402

N, C = 5, 4
X, Y, PLACES = draw(N, 3), draw(N, C, seed=1), torch.tensor([0, 3, 1, 2, 2])
TABLE, MASK = draw(C, C, seed=2), draw(C, seed=3)
NAMED = {"x": X, "table": TABLE, "mask": MASK}
SHARED = ["table", "mask"]


class Tabled(nn.Module):
    """A layer whose outputs go through a table and a mask that come with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(draw(3, C, seed=4))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ table * mask


MODULE = Tabled()


def tabled(w: Any, inputs: Any) -> Any:
    return jnp.tanh(inputs["x"] @ w) @ inputs["table"] * inputs["mask"]


def reading(w: Any, inputs: Any) -> Any:
    """The same, after a look at a value that is never differentiated by: it cannot be compiled."""
    return tabled(w, inputs) if float(inputs["mask"][0]) < 100.0 else inputs["x"]


def dropping(w: Any, inputs: Any) -> Any:
    """The same, without the axis of a single sample."""
    output = tabled(w, inputs)
    return output[0] if len(output) == 1 else output


APPLIES = {"compiled": tabled, "reading": reading, "dropping": dropping}


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with double_precision():
        yield


CALLS: dict[str, Callable[..., Tensor]] = {
    "compute_jacobian": lambda model, **o: jacops.compute_jacobian(model, NAMED, shared=SHARED, **o)["x"],
    "sample_jacobians": lambda model, **o: jacops.sample_jacobians(model, NAMED, shared=SHARED, **o).dense(),
}
ROWS: list[dict[str, Any]] = [{}, {"target": PLACES}, {"outputs": [0, 2]}, {"outputs": [3, 1], "target": PLACES % 2}]


@pytest.mark.parametrize("apply", APPLIES)
@pytest.mark.parametrize("options", ROWS, ids=["all", "target", "outputs", "target of outputs"])
@pytest.mark.parametrize("call", CALLS)
def test_shared_inputs_and_one_output_per_sample(call: str, options: dict[str, Any], apply: str) -> None:
    model = JaxFunction(APPLIES[apply], as_jax(MODULE.w))
    found = quiet(CALLS[call], model, **options)
    torch.testing.assert_close(found, CALLS[call](MODULE, **options), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("more", [{"mode": "forward"}, {"mode": "reverse"}, {"batch_size": 2}, {"checks": "always"}])
def test_every_way_of_sweeping_takes_them(more: dict[str, Any]) -> None:
    model = JaxFunction(tabled, as_jax(MODULE.w))
    right = CALLS["compute_jacobian"](MODULE, target=PLACES)
    torch.testing.assert_close(CALLS["compute_jacobian"](model, target=PLACES, **more), right, rtol=1e-9, atol=1e-12)


def test_another_shared_value_is_another_function() -> None:
    model, w = JaxFunction(tabled, as_jax(MODULE.w)), MODULE.w.detach()
    for scale in (1.0, 2.0):
        found = jacops.compute_jacobian(model, {**NAMED, "mask": scale * MASK}, shared=SHARED)["x"]
        slope = torch.einsum("nh,ih,ho->noi", 1 - torch.tanh(X @ w) ** 2, w, TABLE * MASK * scale)
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12)


def test_sample_gradients_take_shared_inputs() -> None:
    model = JaxFunction(tabled, as_jax(MODULE.w))
    found = jacops.sample_gradients(model, mse, NAMED, Y, shared=SHARED).dense()
    right = jacops.sample_gradients(MODULE, F.mse_loss, NAMED, Y, shared=SHARED).dense()
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    fisher = jacops.linalg.empirical_fisher(model, mse, NAMED, Y, shared=SHARED).dense()
    torch.testing.assert_close(fisher, right.T @ right / N, rtol=1e-9, atol=1e-12)


def test_one_output_per_sample_of_no_samples_of_a_loader_and_from_arrays_of_any_kind() -> None:
    model = JaxFunction(lambda w, x: jnp.tanh(x @ w), as_jax(MODULE.w))
    right = jacops.compute_jacobian(model, X)[torch.arange(N), PLACES]
    for places in (PLACES, PLACES.int(), PLACES.numpy(), as_jax(PLACES)):
        torch.testing.assert_close(jacops.compute_jacobian(model, X, target=places), right)
    batches = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    torch.testing.assert_close(jacops.compute_jacobian(model, batches, target=PLACES), right)
    assert jacops.compute_jacobian(model, X[:0], target=PLACES[:0]).shape == (0, 3)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "beyond the last axis": ({"target": PLACES + 1}, InputError, "`target` is holding 4.*the last axis has 4 entries"),
    "too few places": ({"target": PLACES[:3]}, InputError, r"`target` is of shape \(3,\) for 5 samples"),
    "floating places": ({"target": X[:, 0]}, InputTypeError, "`target` is a tensor of torch.float64"),
    "a negative place": ({"target": PLACES - 1}, InputError, "`target` is holding -1"),
    "no axis to pick from": ({"target": PLACES % 1, "outputs": 0}, InputError, "`target` is given with an output of"),
    "no such input": ({"shared": ["tables", "mask"]}, InputError, "`shared` is 'tables'.*the nearest are table"),
    "one left out": ({"shared": "table"}, InputError, r"`x` is of lengths \[4, 5\].*`shared=`"),
    "all of them": ({"shared": ["x", "table", "mask"]}, InputError, "all need one row per sample"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    options, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        jacops.compute_jacobian(JaxFunction(tabled, as_jax(MODULE.w)), NAMED, **{"shared": SHARED, **options})


def test_one_output_of_a_tree_is_picked_first() -> None:
    model = JaxFunction(lambda w, x: {"a": x @ w, "b": jnp.tanh(x @ w)}, as_jax(MODULE.w))
    with pytest.raises(InputError, match="`target` is given with an output that is a dict.*Pick one with `outputs=`"):
        jacops.compute_jacobian(model, X, target=PLACES)
    whole = jacops.compute_jacobian(model, X, outputs="b")
    torch.testing.assert_close(
        jacops.compute_jacobian(model, X, outputs="b", target=PLACES), whole[torch.arange(N), PLACES]
    )


# ---- curvature by inputs --------------------------------------------------------------------------------------------

CURVATURE: dict[str, Callable[..., Tensor]] = {
    "hessian": lambda *a: jacops.hessian(*a, wrt="inputs").dense(),
    "ggn": lambda *a: jacops.ggn(*a, wrt="inputs").dense(),
    "fisher": lambda *a: jacops.fisher(*a, wrt="inputs").dense(),
    "hvp": lambda *a: jacops.hvp(*a, draw(a[2].numel(), seed=9), wrt="inputs"),
    "ggnvp": lambda *a: jacops.ggnvp(*a, draw(a[2].numel(), seed=9), wrt="inputs"),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("call", CURVATURE)
def test_curvature_by_inputs(call: str, name: str) -> None:
    pair: Pair = PAIRS[name]()
    found = CURVATURE[call](JaxFunction(pair.apply, pair.params), pair.jax_loss, pair.x, pair.y)
    right = CURVATURE[call](pair.model, pair.loss, pair.x, pair.y)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_curvature_by_several_inputs_with_its_value_gradient_and_names() -> None:
    model = JaxFunction(lambda w, inputs: jnp.tanh(inputs["x"] @ w) * inputs["scale"], as_jax(MODULE.w))
    scale = draw(N, 1, seed=6)
    H = jacops.hessian(model, mse, {"x": X, "scale": scale}, Y, wrt="inputs")
    assert H.domain.names == ("scale", "x")

    def loss(scale: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(torch.tanh(x @ MODULE.w.detach()) * scale, Y)

    blocks = torch.autograd.functional.hessian(loss, (scale, X))
    rows = [torch.cat([b.reshape(a.numel(), -1) for b in line], 1) for a, line in zip((scale, X), blocks, strict=True)]
    torch.testing.assert_close(H.dense(), torch.cat(rows), rtol=1e-9, atol=1e-12)
    value, gradient = H.value_and_gradient()
    right = torch.autograd.grad(loss(s := scale.clone().requires_grad_(), x := X.clone().requires_grad_()), (s, x))
    assert value == pytest.approx(float(loss(scale, X)))
    torch.testing.assert_close(gradient, torch.cat([part.reshape(-1) for part in right]), rtol=1e-9, atol=1e-12)
    assert "d²loss / dx²" in repr(H)
    assert "J = df / dx" in repr(jacops.ggn(model, mse, {"x": X, "scale": scale}, Y, wrt="inputs"))


def test_a_loss_that_no_input_reaches_is_refused() -> None:
    model = JaxFunction(lambda w, x: x.shape[0] * w, as_jax(MODULE.w))
    with pytest.raises(NotDifferentiableError, match="no path leads from the loss to any of the inputs"):
        jacops.hessian(model, lambda output, y: output.sum(), X, Y, wrt="inputs")
