"""Laws that hold in every framework, over one fixture: the same models, with the same weights, in torch and in JAX."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402

import jacops  # noqa: E402
import oracle  # noqa: E402
from jacops.errors import InputError, NotDifferentiableError  # noqa: E402
from jacops.solvers import EKFAC  # noqa: E402
from jax_cases import PAIRS, Pair, as_jax, as_torch, double_precision, mse  # noqa: E402
from small import draw  # noqa: E402


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with double_precision():
        yield


@dataclass
class Framework:
    """A model with its loss in one framework; `pair` is the same model in both."""

    name: str
    model: Any
    loss: Any
    wrapped: Any
    pair: Pair

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.pair.x, self.pair.y

    def problem(self) -> jacops.Problem:
        x, y = self.batch
        return jacops.Problem(self.model, self.loss, [(x[:2], y[:2]), (x[2:], y[2:])])


def made(name: str, pair: Pair) -> Framework:
    if name == "torch":
        wrapped = jacops.TorchTwiceDifferentiable(pair.model, pair.loss)
        return Framework(name, pair.model, pair.loss, wrapped, pair)
    wrapped = jacops.JaxTwiceDifferentiable(pair.apply, pair.params, pair.jax_loss)
    return Framework(name, jacops.JaxFunction(pair.apply, pair.params), pair.jax_loss, wrapped, pair)


@pytest.fixture(params=["mlp", "cnn"])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["torch", "jax"])
def framework(request: pytest.FixtureRequest, case: str) -> Framework:
    return made(request.param, PAIRS[case]())


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def jacobian_of(pair: Pair, x: Tensor) -> Tensor:
    """The dense Jacobian of the output, row by row, `(outputs, P)`."""
    (blocks,) = oracle.parameter_jacobian(pair.model, x)
    entries = pair.model(x).numel()
    return torch.cat([block.reshape(entries, -1) for block in blocks], 1)


def gradients_of(pair: Pair) -> Tensor:
    parts = [slice(i, i + 1) for i in range(len(pair.x))]
    return torch.stack([oracle.gradient(pair.model, pair.loss, pair.x[i], pair.y[i]) for i in parts])


# Products of a Jacobian


def test_a_push_and_a_pull_are_adjoint_and_are_the_jacobian(framework: Framework):
    x, _ = framework.batch
    J, dense = jacops.jacobian(framework.model, x), jacobian_of(framework.pair, x)
    u, v = draw(J.shape[0], seed=1), draw(J.shape[1], seed=2)
    close(u @ (J @ v), (J.T @ u) @ v)
    close(J @ v, dense @ v)
    close(J.dense(), dense)
    close(J.output, framework.pair.model(x).detach())


def test_model_jvp_and_model_vjp_are_products_with_it(framework: Framework):
    x, _ = framework.batch
    dense, out = jacobian_of(framework.pair, x), framework.pair.model(x).detach()
    space = jacops.jacobian(framework.model, x).domain
    v, u = draw(space.dim, seed=1), draw(*out.shape, seed=2)
    close(jacops.model_jvp(framework.model, x, space.unflatten(v)), (dense @ v).reshape(out.shape))
    pulled = jacops.model_vjp(framework.model, x, u)
    close(torch.cat([part.flatten() for part in pulled]), u.flatten() @ dense)
    with pytest.raises(InputError, match="`v`"):
        jacops.model_vjp(framework.model, x, u[:1])


def test_the_jacobian_by_the_input_is_that_of_every_sample(framework: Framework):
    x, _ = framework.batch
    close(jacops.compute_jacobian(framework.model, x), oracle.input_jacobian(framework.pair.model, x))
    by_input = jacops.jacobian(framework.model, x, "inputs")
    v = draw(*x.shape, seed=3)
    J = jacops.compute_jacobian(framework.model, x, outputs=[1])
    assert J.shape == (len(x), 1, *x.shape[1:])
    moved = torch.einsum("no...,n...->no", J, v)
    close((by_input @ v.flatten()).reshape(len(x), -1)[:, 1:2], moved)


# Curvature


def test_hessians_are_symmetric_and_the_derivative_of_the_gradient(framework: Framework):
    x, y = framework.batch
    H = jacops.hessian(framework.model, framework.loss, x, y)
    dense = H.dense()
    assert H.symmetric
    close(dense, dense.T)
    close(dense, oracle.hessian(framework.pair.model, framework.pair.loss, x, y))
    v = draw(H.shape[1], seed=1)
    close(jacops.hvp(framework.model, framework.loss, x, y, v), dense @ v)


def test_the_gauss_newton_matrix_is_j_transposed_h_j(framework: Framework):
    x, y = framework.batch
    J, out = jacobian_of(framework.pair, x), framework.pair.model(x).detach()
    at_output = torch.autograd.functional.hessian(lambda f: framework.pair.loss(f, y), out)
    G = jacops.ggn(framework.model, framework.loss, x, y)
    close(G.dense(), J.T @ at_output.reshape(out.numel(), -1) @ J)
    assert G.positive
    v = draw(G.shape[1], seed=1)
    close(jacops.ggnvp(framework.model, framework.loss, x, y, v), G @ v)


def test_diagonals_are_those_of_the_dense_matrices(framework: Framework):
    own = framework.problem()
    for operator in (own.hessian(), own.ggn(), own.fisher("empirical"), own.fisher("monte_carlo")):
        close(jacops.linalg.diagonal(operator), operator.dense().diagonal())


def test_the_exact_fisher_matrix_is_the_gauss_newton_matrix_of_these_losses(framework: Framework):
    x, y = framework.batch
    F = jacops.fisher(framework.model, framework.loss, x, y)
    close(F.dense(), jacops.ggn(framework.model, framework.loss, x, y).dense())


def test_the_empirical_fisher_matrix_is_the_mean_of_outer_products(framework: Framework):
    x, y = framework.batch
    G = gradients_of(framework.pair)
    close(jacops.linalg.empirical_fisher(framework.model, framework.loss, x, y).dense(), G.T @ G / len(x))
    terms = framework.pair.model(x).shape[1] if framework.pair.loss is torch.nn.functional.mse_loss else 1
    found = jacops.fisher(framework.model, framework.loss, x, y, kind="empirical").dense()
    close(found, G.T @ G * terms / len(x))  # n * terms in the denominator, of sums of as many terms


def test_monte_carlo_fisher_matrices_draw_the_same_labels_and_are_unbiased(framework: Framework):
    x, y = framework.batch
    found = jacops.fisher(framework.model, framework.loss, x, y, kind="monte_carlo", samples=2, seed=3).dense()
    pair = framework.pair
    close(found, jacops.fisher(pair.model, pair.loss, x, y, kind="monte_carlo", samples=2, seed=3).dense())
    many = jacops.fisher(framework.model, framework.loss, x, y, kind="monte_carlo", samples=4000)
    exact = jacops.ggn(framework.model, framework.loss, x, y).dense()
    assert float((many.dense() - exact).norm() / exact.norm()) < 0.1


# Sample by sample


def test_gradients_of_samples_are_those_of_each_alone_and_add_up(framework: Framework):
    x, y = framework.batch
    G = jacops.sample_gradients(framework.model, framework.loss, x, y)
    close(G.dense(), gradients_of(framework.pair))
    close(G.dense().mean(0), framework.problem().gradient())
    close(G.norms(), G.dense().norm(dim=1))
    close(G.column_squares(), G.dense().square().sum(0))


def test_jacobians_of_samples_are_the_blocks_of_the_batch(framework: Framework):
    x, _ = framework.batch
    rows = jacops.sample_jacobians(framework.model, x)
    close(rows.dense(), jacobian_of(framework.pair, x))
    close(rows.gram(), rows.dense() @ rows.dense().T)
    one = jacops.sample_jacobians(framework.model, x, outputs=0).dense()
    close(one, rows.dense()[:: rows.shape[0] // len(x)])


# Problems, solvers, influence


RECIPES = {
    "exact": EKFAC(),
    "drawn": EKFAC(fisher="monte_carlo"),
    "labels": EKFAC(fisher="empirical"),
    "kfac": EKFAC(corrected=False, weighted=False),
}


@pytest.mark.parametrize("name", RECIPES)
def test_ekfac_is_the_same_in_both_frameworks(case: str, name: str):
    pair, recipe = PAIRS[case](), RECIPES[name]
    blocks = [recipe.approximate(made(own, pair).problem().ggn()) for own in ("torch", "jax")]
    close(blocks[1].dense(), blocks[0].dense())
    assert blocks[0].coverage == blocks[1].coverage
    assert {len(block.where) for block in blocks[1].blocks} == {2}  # biases go with their weights


class Tied(torch.nn.Module):
    """A weight that is used three times, once the other way round, over four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(draw(3, 3)), torch.nn.Parameter(draw(3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.nn.functional.linear(x, self.weight, self.bias))
        hidden = torch.tanh(torch.nn.functional.linear(hidden, self.weight, self.bias))
        return hidden @ self.weight


def tied(params: Any, x: Any) -> Any:
    w, b = params
    hidden = jnp.tanh(jnp.tanh(x @ w.T + b) @ w.T + b)
    return hidden @ w


def test_a_weight_that_is_used_several_times_is_one_block():
    pair = Pair(Tied(), torch.nn.functional.mse_loss, tied, mse, draw(5, 4, 3), draw(5, 4, 3, seed=1))
    expected, found = (EKFAC().approximate(made(name, pair).problem().ggn()) for name in ("torch", "jax"))
    close(found.dense(), expected.dense())
    assert found.coverage == expected.coverage


def test_sample_weights_count_alike_in_both_frameworks(case: str):
    pair, weights = PAIRS[case](), torch.arange(1.0, len(PAIRS[case]().x) + 1).double()
    found = []
    for name in ("torch", "jax"):
        own = made(name, pair)
        problem = jacops.Problem(own.model, own.loss, [(pair.x, pair.y, weights)], l2=0.1, unpack=tuple)
        blocks = EKFAC().approximate(problem.ggn()).dense()
        found.append([problem.gradient(), problem.hessian().dense(), blocks, torch.tensor(problem.value())])
    for actual, expected in zip(*reversed(found), strict=True):
        close(actual, expected.to(actual))


def test_ekfac_of_attention_has_the_exact_trace():
    own = made("jax", PAIRS["attention"]()).problem().ggn()
    found = EKFAC().approximate(own)
    close(found.eigenvalues.sum(), own.dense().trace())
    twin = EKFAC().approximate(made("torch", PAIRS["attention"]()).problem().ggn())
    close(found.dense(), twin.dense())


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "empirical_fisher", "monte_carlo_fisher", "default"])
def test_influences_are_the_same_in_both_frameworks(curvature: str):
    pair = PAIRS["cnn"]()
    options: dict[str, Any] = {"damping": 5.0, "curvature": curvature, "solver": "direct"}
    options = {} if curvature == "default" else options
    data = [(pair.x, pair.y)]
    expected, found = (
        jacops.compute_influences(made(name, pair).wrapped, data, **options).values for name in ("torch", "jax")
    )
    close(found, expected)


def test_leverage_is_the_same_in_both_frameworks(case: str):
    pair = PAIRS[case]()
    data, options = [(pair.x, pair.y)], {"damping": 0.5, "curvature": "ggn", "leverage": True}
    expected, found = (
        jacops.compute_influences(made(name, pair).wrapped, data, **options) for name in ("torch", "jax")
    )
    close(found.values, expected.values)
    close(found.info["leverage"], expected.info["leverage"])


# What is refused


def test_parameters_without_a_rule_are_refused_by_name_and_operation():
    def apply(params: Any, x: Any) -> Any:
        _, out = jax.lax.scan(lambda carry, _: (carry, x @ carry), params["scanned"], None, length=2)
        return out.sum(0) @ params["head"]

    params = {"scanned": as_jax(draw(3, 4)), "head": as_jax(draw(4, 2, seed=1))}
    own = jacops.Problem(jacops.JaxFunction(apply, params), mse, [(draw(5, 3), draw(5, 2, seed=2))])
    with pytest.raises(NotDifferentiableError, match="EKFAC: scanned enters by scan, which has no rule.*dot_general"):
        EKFAC().approximate(own.ggn())
    some = jacops.Problem(own.objective.model, mse, [(draw(5, 3), draw(5, 2, seed=2))], parameters="head")
    close(EKFAC().approximate(some.ggn()).eigenvalues.sum(), some.ggn().dense().trace())


def test_samples_that_influence_each_other_are_found_before_their_layers_are_used():
    def apply(w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w - (x @ w).mean(0))

    own = jacops.Problem(jacops.JaxFunction(apply, as_jax(draw(3, 2))), mse, [(draw(5, 3), draw(5, 2, seed=1))])
    with pytest.raises((InputError, NotDifferentiableError)):
        EKFAC().approximate(own.ggn())


def test_plain_jax_gives_the_same_numbers():
    pair = PAIRS["mlp"]()
    own, x, y = made("jax", pair), as_jax(pair.x), as_jax(pair.y)
    flat, build = ravel_pytree(pair.params)
    hessian = jax.hessian(lambda v: pair.jax_loss(pair.apply(build(v), x), y))(flat)
    close(jacops.hessian(own.model, own.loss, x, y).dense(), as_torch(hessian))
    rows = jax.jacrev(lambda v: pair.apply(build(v), x))(flat)
    close(jacops.sample_jacobians(own.model, x).dense(), as_torch(rows.reshape(-1, flat.size)))
    one = jax.vmap(jax.jacrev(lambda v: pair.apply(pair.params, v[None])[0]))(x)
    for mode in ("forward", "reverse"):
        close(jacops.compute_jacobian(own.model, x, mode=mode), as_torch(one))


def test_a_sparse_matrix_of_a_jax_operator_needs_a_pattern():
    own = made("jax", PAIRS["mlp"]())
    J = jacops.jacobian(own.model, own.pair.x, "inputs")
    with pytest.raises(InputError, match="`pattern` is missing"):
        jacops.sparse.jacobian(J)
    pattern = torch.kron(torch.eye(5), torch.ones(2, 3)).to_sparse()
    close(jacops.sparse.jacobian(J, pattern=pattern).matrix.to_dense(), J.dense())
