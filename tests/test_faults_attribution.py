"""Faults W1-W11 of the attribution module that came before, each with the right value or a clear error.

Beside them: the shapes that callers rely on, `outputs=` and `at=`, and what one logit among very many may cost.
"""

import copy
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacops
import oracle
from jacops import JacopsWarning, compute_jacobian, project_jacobian, reduce_contributions, verify_jacobian
from jacops.errors import InputTypeError
from refusals import linear_case
from small import Calls, Swept, close, draw, flat, settled

# W1: vmap over jacrev is wrong for PReLU where the rows of a chunk are as many as outputs


PRELU_MODELS = {
    "alone": lambda: nn.PReLU(),
    "last": lambda: nn.Sequential(nn.Linear(3, 2), nn.PReLU()),
    "inside": lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)),
    "one slope a channel": lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 2)),
    "after a convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.PReLU(2)),
}


def test_w1_prelu_as_it_was_first_seen():
    found = compute_jacobian(nn.PReLU(), torch.tensor([[-1.0, -2.0], [3.0, -4.0]]))
    expected = torch.stack([torch.diag(torch.tensor([0.25, 0.25])), torch.diag(torch.tensor([1.0, 0.25]))])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", PRELU_MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 6, 7, 1024])
def test_w1_prelu_is_right_at_every_chunk_size(kind: str, batch_size: int):
    model, x = settled(PRELU_MODELS[kind]()), draw(7, 3)
    close(compute_jacobian(model, x, batch_size), oracle.input_jacobian(model, x))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", PRELU_MODELS)
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_w1_prelu_is_right_by_parameters_in_batched_sweeps_too(kind: str, rows: int, strategy: str):
    model, x = settled(PRELU_MODELS[kind]()), draw(rows, 3)
    found = jacops.modjac(model, x, vectorize=True, strategy=strategy)
    close(found, oracle.parameter_jacobian(model, x))


@pytest.mark.parametrize("directions", [1, 2, 3, 4, 7])
def test_w1_prelu_is_right_for_any_number_of_directions(directions: int):
    model, x = settled(PRELU_MODELS["inside"]()), draw(3, 3)
    blocks = oracle.parameter_jacobian(model, x)
    vs = [draw(directions, *p.shape, seed=5) for p in model.parameters()]
    us = draw(directions, 3, 2, seed=6)
    pushed = jacops.batch_jvp(lambda: model(x), model.parameters(), vs)
    close(pushed, torch.stack([oracle.jvp(blocks, [v[i] for v in vs])[0] for i in range(directions)]))
    pulled = jacops.batch_vjp(lambda: model(x), model.parameters(), us)
    for index, block in enumerate(pulled):
        close(block, torch.stack([oracle.vjp(blocks, [u])[index] for u in us]))


# W2: samples that mix


MIXING = {
    "minus the batch mean": (lambda x: x - x.mean(0), lambda x: torch.zeros(3, 3).double()),
    "minus the batch mean, tiny": (lambda x: x - 1e-7 * x.mean(0), lambda x: (1 - 1e-7) * torch.eye(3).double()),
    "times the detached batch mean": (lambda x: x * x.mean(0).detach(), torch.diag),
    "softmax over the batch": (lambda x: x.softmax(0), lambda x: torch.zeros(3, 3).double()),
    "the sample before": (lambda x: x * torch.roll(x, 1, 0), lambda x: 2 * torch.diag(x)),
    "cumulative sum": (lambda x: x.cumsum(0), lambda x: torch.eye(3).double()),
    "a trace of the sorted batch": (lambda x: x + 1e-12 * x.sort(0).values, lambda x: torch.eye(3).double()),
}


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("batch_size", [2, 3, 1024])
def test_w2_samples_that_mix_are_differentiated_alone_with_one_warning(kind: str, batch_size: int):
    function, expected = MIXING[kind]
    x = draw(5, 3) + 3
    with pytest.warns(JacopsWarning, match="mix") as said:
        found = compute_jacobian(Calls(function), x, batch_size)
    assert len(said) == 1
    close(found, torch.stack([expected(row) for row in x]))


def test_w2_the_fallback_can_be_made_silent():
    model, x = Calls(lambda x: x - x.mean(0)), draw(4, 3)
    assert torch.equal(compute_jacobian(model, x, fallback="silent"), torch.zeros(4, 3, 3).double())


def test_w2_what_was_learnt_about_mixing_is_said_again_at_the_next_call():
    model, x = Calls(lambda x: x - x.mean(0)), draw(4, 3)
    for _ in range(2):
        with pytest.warns(JacopsWarning, match="mix"):
            compute_jacobian(model, x)


def test_w2_equal_samples_prove_nothing_about_samples_that_differ():
    """In a batch of equal rows, such as a first try with zeros, each sample's mean is the batch's."""
    model, x = Calls(lambda x: x * x.mean(0).detach()), draw(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        close(compute_jacobian(model, torch.ones(4, 3).double()), torch.eye(3).double().expand(4, 3, 3))
        close(compute_jacobian(model, x), torch.stack([torch.diag(row) for row in x]))


# W3, W4: projecting back to features


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_w3_a_fitting_projection_is_the_chain_rule_and_keeps_autograd(samples: int):
    jacobian, projection = draw(samples, 2, 3).requires_grad_(), draw(3, 7, seed=1).requires_grad_()
    found = project_jacobian(jacobian, projection)
    close(found, torch.einsum("nor,rd->nod", jacobian, projection))
    gradients = torch.autograd.grad(found.sum(), [jacobian, projection])
    close(gradients[0], projection.sum(1).expand(samples, 2, 3).detach())
    close(gradients[1], jacobian.sum((0, 1))[:, None].expand(3, 7).detach())


@pytest.mark.parametrize("whiten", [False, True])
def test_w4_a_pca_whitened_or_not_is_mapped_back_exactly(whiten: bool):
    pca = pytest.importorskip("sklearn.decomposition").PCA(2, whiten=whiten)
    features = (draw(40, 5) * torch.tensor([5.0, 0.2, 1, 3, 0.05])).numpy() + 7
    reduced = torch.from_numpy(pca.fit_transform(features))
    model = settled(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)))

    projection = jacops.attribution.projection(pca)
    found = project_jacobian(compute_jacobian(model, reduced), projection.matrix)

    step = 1e-5
    for feature in range(5):
        nudge = step * np.eye(5)[feature]
        above, below = (model(torch.from_numpy(pca.transform(features + sign * nudge))).detach() for sign in (1, -1))
        torch.testing.assert_close(found[:, :, feature], (above - below) / (2 * step), rtol=1e-7, atol=1e-8)
    close(projection(torch.from_numpy(features)), reduced, rtol=1e-9)


def test_w4_a_reduction_that_is_not_orthonormal_takes_the_encoder_matrix():
    encoder = draw(3, 6) * 2
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)))
    features = draw(5, 6, seed=3)
    whole = nn.Sequential(Calls(lambda rows: rows @ encoder.T), model)
    found = project_jacobian(compute_jacobian(model, features @ encoder.T), encoder)
    close(found, oracle.input_jacobian(whole, features))


def test_w4_a_pca_that_was_not_fitted_is_named():
    with pytest.raises(InputTypeError, match=r"`estimator` is a PCA.*fit"):
        jacops.attribution.projection(pytest.importorskip("sklearn.decomposition").PCA(2))


# W5, W6, W9: sizes of contributions


@pytest.mark.parametrize(("method", "order"), [("l2", 2), ("l1", 1), ("max", np.inf)])
@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 2, 3, 5, 5), (4, 1, 3), (0, 2, 3)])
def test_w5_the_documented_reductions_are_norms_over_outputs(method: Any, order: float, shape: tuple[int, ...]):
    given = draw(*shape).numpy()
    found = reduce_contributions(given, method)
    assert found.shape == (shape[0], *shape[2:])
    np.testing.assert_allclose(found, np.linalg.norm(given, order, axis=1) if shape[0] else found, rtol=1e-14)


def test_w9_half_precision_does_not_overflow():
    found = reduce_contributions(np.full((1, 2, 1), 300, np.float16))
    assert found.dtype == np.float16
    assert abs(float(found[0, 0]) - 424.264) < 0.25  # half the gap between float16 numbers there


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_w9_no_scale_overflows_or_underflows_in_float64(scale: float):
    np.testing.assert_allclose(reduce_contributions(np.array([[[3.0], [4.0]]]) * scale), [[5 * scale]], rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_w9_no_scale_overflows_in_a_tensor_with_a_graph(scale: float):
    given = (torch.tensor([[[3.0], [4.0]]]) * scale).requires_grad_()
    found = reduce_contributions(given)
    torch.testing.assert_close(found, torch.tensor([[5.0]]) * scale, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(found.sum(), given)
    torch.testing.assert_close(slope, torch.tensor([[[0.6], [0.8]]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_w9_every_dtype_gives_numpy_of_its_kind(dtype: torch.dtype):
    found = reduce_contributions(torch.tensor([[[300], [400]]]).to(dtype))
    assert isinstance(found, np.ndarray)
    assert abs(float(found[0, 0]) - 500) < 0.5
    kinds = {torch.int64: np.float64, torch.bfloat16: np.float32, torch.float16: np.float16, torch.float32: np.float32}
    assert found.dtype == kinds.get(dtype, np.float64)


# W7, W8: checking that Z = J X


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1.0, 1e9, 1e300])
def test_w8_the_relative_error_is_right_at_any_scale(scale: float):
    Z, J, X = linear_case()
    assert verify_jacobian(Z * scale, J * 2 * scale, X).relative_error == pytest.approx(1.0, rel=1e-12)
    assert verify_jacobian(Z * scale, J * scale, X).relative_error < 1e-14
    assert verify_jacobian(Z * scale, J * 1.25 * scale, X).relative_error == pytest.approx(0.25, rel=1e-12)


def test_w8_an_output_that_is_zero_everywhere_is_right_or_infinitely_wrong():
    Z, J, X = linear_case()
    assert verify_jacobian(Z * 0, J * 0, X).relative_error == 0
    assert verify_jacobian(Z * 0, J, X).relative_error == float("inf")


def test_w8_every_field_is_a_python_float_of_the_right_value():
    Z, J, X = linear_case()
    report = verify_jacobian(Z + 0.5, J, X)
    assert report.z_range == (float((Z + 0.5).min()), float((Z + 0.5).max()))
    assert report.reconstruction_range == pytest.approx((float(Z.min()), float(Z.max())), rel=1e-12)
    assert report.max_error == pytest.approx(0.5)
    assert report.mean_error == pytest.approx(0.5)
    assert all(type(value) is float for value in (*report.z_range, report.max_error, report.relative_error))
    report.max_error = 0.0  # mutable, as callers are used to
    assert report == copy.copy(report)


# W10: a lazy module crashed the process


def test_w10_a_lazy_module_works_once_it_has_run():
    model = nn.LazyLinear(2)
    model(torch.ones(5, 3))
    assert torch.equal(compute_jacobian(model, torch.ones(5, 3))[0], model.weight.detach())


# W11: weights edited between calls


class CachesItsSlope(nn.Module):
    """Reads its slope once in eval mode and never again, as a rewritten PReLU did."""

    def __init__(self, slopes: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.full((slopes,), 0.25))
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = self.weight.detach().clone()
        return torch.where(x > 0, x, self.cached * x)


def edited(model: nn.Module, how: str) -> None:
    new = {name: tensor * -2 + 0.1 for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if how == "in place":
                parameter.copy_(new[name])
            elif how == "through data":
                parameter.data = new[name].clone()
    if how == "load_state_dict":
        model.load_state_dict(new)
    if how == "replaced":
        for path in new:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, nn.Parameter(new[path].clone()))
    if how == "load_state_dict with assign":
        model.load_state_dict({name: tensor.clone() for name, tensor in new.items()}, assign=True)


EDITS = ["load_state_dict", "load_state_dict with assign", "in place", "through data", "replaced"]


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("kind", ["PReLU", "PReLU(3)", "MLP"])
def test_w11_a_call_after_the_weights_were_edited_reads_them_anew(how: str, kind: str):
    models = {
        "PReLU": nn.PReLU(),
        "PReLU(3)": nn.PReLU(3),
        "MLP": nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)),
    }
    model, x = settled(models[kind]), draw(4, 3)
    before = compute_jacobian(model, x), jacops.modjac(model, x, flatten=True)
    edited(model, how)
    after = compute_jacobian(model, x), jacops.modjac(model, x, flatten=True)
    close(after[0], oracle.input_jacobian(model, x))
    close(after[1], flat(oracle.parameter_jacobian(model, x), list(model.parameters())))
    assert not torch.allclose(before[0], after[0])


@pytest.mark.parametrize("slopes", [1, 3])
def test_w11_a_cache_filled_during_a_call_stays_in_the_private_copy(slopes: int):
    model, x = CachesItsSlope(slopes).double(), -torch.ones(4, 3).double()
    assert torch.equal(compute_jacobian(model, x)[0], 0.25 * torch.eye(3).double())
    assert model.cached is None
    model.load_state_dict({"weight": torch.full((slopes,), 0.5)})
    assert torch.equal(compute_jacobian(model, x)[0], 0.5 * torch.eye(3).double())


# Shapes that callers rely on


@pytest.mark.parametrize("batch_size", [1, 2, 1024])
def test_shapes_one_dimensional_samples_through_a_layer_of_one_input(batch_size: int):
    """`Linear(1, 2)` on x `(5,)`: sample by sample this is a vector of one number, in a batch it is refused."""
    model, x = settled(nn.Linear(1, 2)), draw(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JacopsWarning)
        found = compute_jacobian(model, x, batch_size)
    close(found, model.weight.detach()[:, 0].expand(5, 2))


def test_shapes_a_plain_function_in_place_of_a_module():
    net, x = settled(nn.Linear(3, 2)), draw(5, 3)
    close(compute_jacobian(lambda rows: rows**2, x), torch.diag_embed(2 * x))
    close(compute_jacobian(lambda rows: net(rows), x), oracle.input_jacobian(net, x))


def test_shapes_an_input_that_is_not_contiguous_or_requires_grad():
    model, x = settled(nn.Linear(3, 2)), draw(3, 5).T.requires_grad_()
    found = compute_jacobian(model, x)
    close(found, model.weight.detach().expand(5, 2, 3))
    assert not found.requires_grad


# `outputs=` and `at=`


def two_layers() -> nn.Sequential:
    return settled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)))


@pytest.mark.parametrize("batch_size", [1, 2, 1024])
@pytest.mark.parametrize("pick", [0, -1, [1], [4, 0], slice(1, 3), torch.tensor([2, 5]), (0, 1)], ids=str)
def test_outputs_picks_entries_of_the_last_axis(pick: Any, batch_size: int):
    model, x = two_layers(), draw(5, 3)
    index = list(pick) if isinstance(pick, tuple) else pick
    close(compute_jacobian(model, x, batch_size, outputs=pick), oracle.input_jacobian(model, x)[:, index])


def test_outputs_picks_by_name_or_callable():
    model, x = Calls(lambda x: {"logits": x**2, "hidden": (x**3, x)}), draw(5, 3)
    close(compute_jacobian(model, x, outputs="logits"), torch.diag_embed(2 * x))
    close(compute_jacobian(model, x, outputs=lambda out: out["hidden"][0][:, 1])[:, 1], 3 * x[:, 1] ** 2)
    assert list(compute_jacobian(model, x, outputs=["logits"])) == ["logits"]


def test_outputs_one_logit_of_fifty_thousand_costs_one_sweep():
    model = Swept(nn.Linear(4, 50_000), at_input=True)
    x = draw(3, 4).float()
    found = compute_jacobian(model, x, outputs=41_234)
    assert found.shape == (3, 4)
    assert torch.equal(found, model.model.weight[41_234].detach().expand(3, 4))
    assert model.spent()[1] <= 4  # one sweep, and a fixed number for the check
    compute_jacobian(model, x, outputs=41_234)
    assert model.spent() == (1, 1)


@pytest.mark.parametrize("pick", [slice(0, 1), [5], lambda out: out[:, 5]], ids=["slice", "list", "callable"])
def test_outputs_one_logit_is_cheap_however_it_is_picked(pick: Any):
    model, x = Swept(nn.Linear(4, 50_000), at_input=True), draw(3, 4).float()
    for _ in range(2):
        model.spent()
        compute_jacobian(model, x, outputs=pick)
    assert model.spent() == (1, 1)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3), (5, 5), (40, 2), (2, 40)])
def test_sweeps_are_as_few_as_outputs_or_inputs(inputs: int, outputs: int):
    model, x = (
        Swept(settled(nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))), True),
        draw(8, inputs),
    )
    first, extra = compute_jacobian(model, x), model.spent()
    again, spent = compute_jacobian(model, x), model.spent()
    close(first, oracle.input_jacobian(model, x))
    assert torch.equal(first, again)
    assert spent[0] == 1
    assert spent[1] <= min(inputs, outputs) + 1  # a forward sweep records one backward first
    assert extra[0] <= 4
    assert extra[1] <= min(inputs, outputs) + 4


def test_at_takes_jacobians_from_a_hidden_layer():
    model, x = two_layers(), draw(5, 3)
    hidden = model[0](x).detach()
    expected = model[2].weight.detach() * (1 - torch.tanh(hidden) ** 2)[:, None]
    close(compute_jacobian(model, x, at="0"), expected)
    close(compute_jacobian(model, x, at=("0", None)), expected)


def test_at_takes_jacobians_to_and_between_hidden_layers():
    model, x = two_layers(), draw(5, 3)
    hidden = model[0](x).detach()
    close(compute_jacobian(model, x, at=(None, "0")), model[0].weight.detach().expand(5, 4, 3))
    close(compute_jacobian(model, x, at=("0", "1")), torch.diag_embed(1 - torch.tanh(hidden) ** 2))
    close(compute_jacobian(model, x, at=("0", "2"), outputs=1), compute_jacobian(model, x, at="0")[:, 1])


def test_at_an_embedding_answers_integer_inputs():
    model = settled(nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(6, 2)))
    ids = torch.tensor([[1, 2], [3, 3], [0, 9]])
    expected = model[2].weight.detach().reshape(2, 2, 3).expand(3, 2, 2, 3)
    close(compute_jacobian(model, ids, at="0"), expected)


@pytest.mark.parametrize("checks", ["first", "always", "never"])
def test_at_and_outputs_agree_at_every_level_of_checking(checks: str):
    model, x = two_layers(), draw(5, 3)
    for at, pick in itertools.product((None, "0"), (None, 2)):
        found = compute_jacobian(model, x, 2, at=at, outputs=pick, checks=checks)
        close(found, compute_jacobian(model, x, at=at, outputs=pick))


@pytest.mark.parametrize("samples", [0, 1, 4])
def test_at_keeps_its_shape_for_any_number_of_samples(samples: int):
    assert compute_jacobian(two_layers(), draw(samples, 3), at="0").shape == (samples, 6, 4)


def test_contributions_hold_with_biases_and_are_checked_independently():
    model, x = (
        settled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.PReLU(), nn.Linear(4, 2))),
        draw(5, 3),
    )
    found = jacops.contributions(model, x)
    jacobian = oracle.input_jacobian(model, x)
    close(found.jacobian, jacobian)
    close(found.values, jacobian * x[:, None])
    close(found.bias, model(x).detach() - torch.einsum("noi,ni->no", jacobian, x))
    assert found.verification.relative_error < 1e-12
    assert not found.notes
