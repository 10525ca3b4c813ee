"""Faults D1-D14 of the influence module that came before, as far as gradients, Hessians, products and direct solves go.

Influences are held against closed forms for a linear model and against plain autograd for others. The rows on CG,
LiSSA and Arnoldi belong to the solvers.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import jacops
import oracle
from jacops import (
    InverseHvpResult,
    TensorUtilities,
    TorchTensorUtilities,
    TorchTwiceDifferentiable,
    TwiceDifferentiable,
    compute_influence_factors,
    compute_influences,
)
from jacops.errors import NotDifferentiableError, SolveError
from small import batches, close, draw, settled, small_net


class Linear:
    """A linear model under a mean squared error, with everything about it in closed form."""

    def __init__(self, train: int = 11, test: int = 3, outputs: int = 1, damping: float = 0.1):
        self.model = settled(nn.Linear(2, outputs, bias=False))
        self.x, self.y = draw(train, 2, seed=5), draw(train, outputs, seed=6)
        self.test_x, self.test_y = draw(test, 2, seed=7), draw(test, outputs, seed=8)
        self.outputs, self.damping = outputs, damping

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ self.model.weight.detach().T - y

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the mean over outputs of each sample's squared error, by the weight: (n, outputs * 2)."""
        return torch.einsum("no,ni->noi", self.residual(x, y), x).flatten(1) * 2 / self.outputs

    def hessian(self, scale: float = 1.0) -> Tensor:
        """Of the mean squared error over the training set, damped."""
        block = 2 * self.x.T @ self.x / len(self.x) / self.outputs
        matrix = torch.block_diag(*[block] * self.outputs) * scale
        return matrix + self.damping * torch.eye(matrix.shape[0]).double()

    def factors(self, scale: float = 1.0) -> Tensor:
        return torch.linalg.solve(self.hessian(scale), self.gradients(self.test_x, self.test_y).T).T

    def up(self, scale: float = 1.0) -> Tensor:
        return self.factors(scale) @ self.gradients(self.x, self.y).T

    def perturbation(self) -> Tensor:
        """(n_test, n_train, 2): the mixed derivative of a sample's loss is (x ⊗ W + residual ⊗ 1) * 2 / outputs."""
        weight, residual = self.model.weight.detach(), self.residual(self.x, self.y)
        mixed = torch.einsum("ni,oj->noij", self.x, weight)
        mixed = mixed + torch.einsum("no,ij->noij", residual, torch.eye(2).double())
        mixed = mixed.flatten(1, 2) * 2 / self.outputs
        return torch.einsum("tp,npj->tnj", self.factors(), mixed)

    def wrapped(self, loss: Any = F.mse_loss) -> TorchTwiceDifferentiable:
        return TorchTwiceDifferentiable(self.model, loss)


# D1: rows are samples, never batches


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("outputs", [1, 3])
def test_d1_an_odd_sample_in_a_last_batch_is_a_row_like_any_other(size: int, outputs: int):
    case = Linear(train=3, test=3, outputs=outputs)
    train = DataLoader(TensorDataset(case.x, case.y), batch_size=size)
    test = DataLoader(TensorDataset(case.test_x, case.test_y), batch_size=size)
    found = compute_influences(case.wrapped(), train, test_data=test, damping=case.damping)
    close(found.values, case.up())
    factors = compute_influence_factors(case.wrapped(), train, test, damping=case.damping)
    close(factors.x, case.factors())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_d1_perturbation_influences_have_a_row_per_sample_too(size: int):
    case = Linear(train=3, test=5, outputs=2)
    train = DataLoader(TensorDataset(case.x, case.y), batch_size=size)
    test = [(case.test_x, case.test_y)]
    found = compute_influences(
        case.wrapped(), train, test_data=test, influence_type="perturbation", damping=case.damping
    )
    close(found.values, case.perturbation())


def test_d1_images_keep_their_axes_in_perturbation_influences():
    model = settled(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)))
    x, y = draw(4, 1, 3, 3), torch.tensor([0, 1, 1, 0])
    found = compute_influences(
        TorchTwiceDifferentiable(model, F.cross_entropy),
        batches(x, y, 3, 1),
        influence_type="perturbation",
        damping=1.0,
        curvature="ggn",
    )
    assert found.shape == (4, 4, 1, 3, 3)
    factors = compute_influence_factors(
        TorchTwiceDifferentiable(model, F.cross_entropy),
        batches(x, y, 4),
        batches(x, y, 4),
        damping=1.0,
        curvature="ggn",
    )
    for i in range(4):
        mixed = oracle.mixed(model, F.cross_entropy, x[i : i + 1], y[i : i + 1])
        close(found.values[:, i], (factors.x @ mixed).reshape(4, 1, 3, 3))


def test_d1_input_data_may_be_another_set_than_the_training_data():
    case = Linear()
    asked = draw(4, 2, seed=20), draw(4, 1, seed=21)
    found = compute_influences(
        case.wrapped(), [(case.x, case.y)], test_data=[(case.test_x, case.test_y)], input_data=[asked], damping=0.1
    )
    close(found.values, case.factors() @ case.gradients(*asked).T)


# D2: a generator that gives another number of rows than promised


def parts(*sizes: int, width: int = 2) -> Iterator[Tensor]:
    return (draw(size, width, seed=i) for i, size in enumerate(sizes))


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1), (0, 5), (2, 0, 3)])
def test_d2_rows_as_promised_come_in_order(sizes: tuple[int, ...]):
    found = TorchTensorUtilities.cat_gen(parts(*sizes), (5, 2), Linear().wrapped())
    assert torch.equal(found, torch.cat(list(parts(*sizes))))


# D3: one loss call everywhere


def test_d3_gradient_hessian_and_products_are_of_one_and_the_same_loss():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    gradient, hessian = oracle.gradient(model, F.mse_loss, x, y), oracle.hessian(model, F.mse_loss, x, y)
    close(wrapped.grad(x, y), gradient)
    close(wrapped.hessian(x, y), hessian)
    recorded = wrapped.grad(x, y, create_graph=True)
    close(recorded.detach(), gradient)
    eye = torch.eye(wrapped.num_params).double()
    close(wrapped.mvp(recorded, eye, wrapped.parameters), hessian)


def test_d3_a_loss_of_the_user_s_own_is_called_just_so():
    seen: list[tuple[Any, ...]] = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        seen.append((tuple(output.shape), tuple(y.shape)))
        return (output.squeeze(1) - y).pow(2).mean()

    case = Linear(train=5)
    close(case.wrapped(loss).grad(case.x, case.y[:, 0]), case.gradients(case.x, case.y).mean(0))
    assert seen == [((5, 1), (5,))]
    close(case.wrapped(loss).hessian(case.x, case.y[:, 0]), case.hessian() - 0.1 * torch.eye(2).double())


# D4: axes of length one are left alone


def test_d4_segmentation_of_one_image_with_as_many_classes_as_pixels_a_side():
    model, x = settled(nn.Conv2d(1, 4, 1)), draw(1, 1, 4, 4)
    labels = torch.arange(16).reshape(1, 4, 4) % 4
    wrapped = TorchTwiceDifferentiable(model, F.cross_entropy)
    close(wrapped.grad(x, labels), oracle.gradient(model, F.cross_entropy, x, labels))
    close(wrapped.hessian(x, labels), oracle.hessian(model, F.cross_entropy, x, labels))


@pytest.mark.parametrize("rows", [1, 2])
def test_d4_one_row_one_output_and_both(rows: int):
    for outputs in (1, 3):
        model, x, y = settled(nn.Linear(3, outputs)), draw(rows, 3), draw(rows, outputs, seed=1)
        wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
        close(wrapped.grad(x, y), oracle.gradient(model, F.mse_loss, x, y))
        recorded = wrapped.grad(x, y, create_graph=True)
        close(
            wrapped.mvp(recorded, recorded.detach(), x)[0], oracle.mixed(model, F.mse_loss, x, y).T @ recorded.detach()
        )


# D5, D6: batches weigh by their rows; sums and means are distinguished


SPLITS = [(11,), (10, 1), (1, 10), (1,) * 11, (4, 4, 3), (5, 1, 5)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_d5_the_split_into_batches_does_not_matter(split: tuple[int, ...], curvature: Any):
    case = Linear()
    found = compute_influences(
        case.wrapped(),
        batches(case.x, case.y, *split),
        test_data=[(case.test_x, case.test_y)],
        damping=case.damping,
        curvature=curvature,
    )
    close(found.values, case.up())
    assert found.info["rows"] == 11


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_d6_a_summed_loss_is_consistent_over_splits_too(split: tuple[int, ...]):
    case = Linear()
    loss = nn.MSELoss(reduction="sum")
    found = compute_influences(
        case.wrapped(loss),
        batches(case.x, case.y, *split),
        test_data=[(case.test_x, case.test_y)],
        damping=case.damping,
    )
    close(found.values, case.up(scale=11))
    assert found.info["reduction"] == "sum"


def test_d6_a_sum_of_the_user_s_own_is_one_where_it_says_so():
    case = Linear()

    def summed(output: Tensor, y: Tensor) -> Tensor:
        return ((output - y) ** 2).sum()

    train, test = batches(case.x, case.y, 6, 5), [(case.test_x, case.test_y)]
    found = compute_influences(case.wrapped(summed), train, test_data=test, damping=case.damping, reduction="sum")
    close(found.values, case.up(scale=11))


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]).double()), nn.CrossEntropyLoss(ignore_index=1)]
)
def test_d6_a_mean_with_another_denominator_than_the_rows_is_divided_by_it(loss: nn.Module):
    model, x, labels = small_net(), draw(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    whole = oracle.hessian(model, loss, x, labels) + 20 * torch.eye(26).double()
    for sizes in ((6,), (3, 3), (1, 5), (1, 1, 1, 1, 1, 1)):
        data = batches(x, labels, *sizes)
        found = compute_influence_factors(
            TorchTwiceDifferentiable(model, loss), data, data, damping=20.0, curvature="hessian"
        )
        own = [nn.functional.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]) for i in range(6)]
        ignored = getattr(loss, "ignore_index", -100)
        rows = [
            torch.zeros(26).double()
            if int(label) == ignored
            else torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
            for value, label in zip(own, labels, strict=True)
        ]
        close(found.x, torch.linalg.solve(whole, torch.stack(rows).T).T)


# D9: the order of a loader


def test_d9_a_fixed_order_is_the_order_of_the_columns_and_no_random_number_is_drawn():
    case = Linear()
    before = torch.get_rng_state()
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=4)
    found = compute_influences(case.wrapped(), loader, test_data=[(case.test_x, case.test_y)], damping=0.1)
    close(found.values, case.up())
    assert torch.equal(torch.get_rng_state(), before)


# D10: what the caller gave is not changed


def test_d10_the_caller_s_input_is_not_marked_or_moved():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    kept = x.clone(), y.clone()
    recorded = wrapped.grad(x, y, create_graph=True)
    wrapped.mvp(recorded, torch.ones(1, wrapped.num_params).double(), x)
    assert (x.requires_grad, y.requires_grad) == (False, False)
    assert x.grad is None
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    assert all(p.grad is None for p in model.parameters())


def test_d10_mixed_derivatives_by_the_caller_s_input_are_right_whether_it_requires_grad_or_not():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    expected = oracle.mixed(model, F.mse_loss, x, y)
    eye = torch.eye(wrapped.num_params).double()
    close(wrapped.mvp(wrapped.grad(x, y, create_graph=True), eye, x), expected)
    marked = x.clone().requires_grad_()
    close(wrapped.mvp(wrapped.grad(marked, y, create_graph=True), eye, marked), expected)


def test_d10_directions_are_not_overwritten():
    wrapped, x, y = TorchTwiceDifferentiable(small_net(), F.mse_loss), draw(5, 3), draw(5, 2, seed=1)
    v = draw(2, wrapped.num_params)
    kept = v.clone()
    found = wrapped.mvp(wrapped.grad(x, y, create_graph=True), v, wrapped.parameters)
    assert torch.equal(v, kept)
    assert found.data_ptr() != v.data_ptr()


# D12: directions


@pytest.mark.parametrize("many", [0, 1, 2, 26, 70])
def test_d12_any_number_of_directions_gives_its_rows(many: int):
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    v = draw(many, 26, seed=3)
    found = wrapped.mvp(wrapped.grad(x, y, create_graph=True), v, wrapped.parameters)
    close(found, v @ oracle.hessian(model, F.mse_loss, x, y))
    assert not found.requires_grad


@pytest.mark.parametrize("kind", ["torch", "numpy", "list", "reversed", "read-only"])
def test_d12_one_direction_may_be_a_vector_and_come_from_numpy(kind: str):
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    v = draw(26, seed=3)
    backwards, locked = v.flip(0).numpy()[::-1], v.clone().numpy()
    locked.flags.writeable = False
    forms = {"numpy": v.numpy(), "list": v.numpy()[None], "reversed": backwards, "read-only": locked}
    given = forms.get(kind, v)
    found = wrapped.mvp(wrapped.grad(x, y, create_graph=True), given, wrapped.parameters)
    close(found, (v @ oracle.hessian(model, F.mse_loss, x, y))[None])


def test_d12_some_of_the_parameters_give_some_of_the_columns():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    hessian, v = oracle.hessian(model, F.mse_loss, x, y), draw(2, 26, seed=3)
    recorded = wrapped.grad(x, y, create_graph=True)
    close(wrapped.mvp(recorded, v, wrapped.parameters[1]), (v @ hessian)[:, 12:16])
    close(
        wrapped.mvp(recorded, v, [wrapped.parameters[3], wrapped.parameters[0]]), (v @ hessian)[:, [24, 25, *range(12)]]
    )
    close(wrapped.mvp(recorded, v, (p for p in wrapped.parameters)), v @ hessian)


# A gradient without a graph, and a graph without a second derivative


def test_a_missing_create_graph_is_distinguished_from_a_linear_loss():
    case = Linear()
    wrapped = case.wrapped(lambda output, y: output.sum())
    v = torch.ones(1, 2).double()
    with pytest.raises(NotDifferentiableError, match=r"`grad_xy` has no graph.*create_graph=True"):
        wrapped.mvp(wrapped.grad(case.x, case.y), v, wrapped.parameters)
    recorded = wrapped.grad(case.x, case.y, create_graph=True)
    assert recorded.requires_grad
    assert torch.equal(wrapped.mvp(recorded, v, wrapped.parameters), torch.zeros(1, 2).double())
    assert torch.equal(wrapped.hessian(case.x, case.y), torch.zeros(2, 2).double())
    close(wrapped.mvp(recorded, v, case.x), torch.ones(1, 22).double())  # d²/dw dx is one, per row


# Frozen parameters, and inference mode


def test_frozen_parameters_are_left_out_everywhere():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    model[0].weight.requires_grad_(False)
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    assert wrapped.num_params == 14
    assert [tuple(p.shape) for p in wrapped.parameters] == [(4,), (2, 4), (2,)]
    close(wrapped.grad(x, y), oracle.gradient(model, F.mse_loss, x, y))
    close(wrapped.hessian(x, y), oracle.hessian(model, F.mse_loss, x, y))
    found = compute_influences(wrapped, [(x, y)], damping=2.0)
    assert (found.info["covered"], found.info["parameters"]) == (14, 26)
    assert "14 of 26 parameters" in repr(found)
    H = jacops.hessian(model, F.mse_loss, x, y)
    assert H.domain.names == ("0.bias", "2.weight", "2.bias")
    close(H.dense(), oracle.hessian(model, F.mse_loss, x, y))
    assert "2.weight" in repr(jacops.jacobian(model, x))
    assert "0.weight" not in repr(jacops.jacobian(model, x))


def test_inference_mode_inputs_and_targets_made_in_it_give_right_values():
    model = small_net()
    wrapped = TorchTwiceDifferentiable(model, F.mse_loss)
    expected = oracle.hessian(model, F.mse_loss, draw(5, 3), draw(5, 2, seed=1))
    with torch.inference_mode():
        x, y = draw(5, 3), draw(5, 2, seed=1)
        assert y.is_inference()
        close(wrapped.hessian(x, y), expected)
        close(wrapped.mvp(wrapped.grad(x, y, create_graph=True), torch.eye(26).double(), wrapped.parameters), expected)
        close(
            jacops.ggn(model, F.mse_loss, x, y).dense(), jacops.ggn(model, F.mse_loss, draw(5, 3), draw(5, 2)).dense()
        )
    close(wrapped.hessian(x, y), expected)


# D13: the registry of tensor utilities


@pytest.fixture
def registry() -> Iterator[dict[Any, Any]]:
    """The registry, put back afterwards."""
    kept = dict(TensorUtilities.registry)
    yield TensorUtilities.registry
    TensorUtilities.registry.clear()
    TensorUtilities.registry.update(kept)


def test_d13_a_subclass_does_not_displace_its_parent(registry: dict[Any, Any]):
    class Mine(TorchTensorUtilities):
        pass

    assert registry[TorchTwiceDifferentiable] is TorchTensorUtilities
    assert TensorUtilities.from_twice_differentiable(Linear().wrapped()) is TorchTensorUtilities


def test_d13_a_model_of_a_subclass_finds_its_ancestor_s_utilities(registry: dict[Any, Any]):
    class Special(TorchTwiceDifferentiable):
        pass

    class MoreSpecial(Special):
        pass

    case = Linear()
    for kind in (Special, MoreSpecial):
        assert TensorUtilities.from_twice_differentiable(kind(case.model, F.mse_loss)) is TorchTensorUtilities

    class SpecialUtilities(TorchTensorUtilities):
        twice_differentiable_type = Special

    assert TensorUtilities.from_twice_differentiable(MoreSpecial(case.model, F.mse_loss)) is SpecialUtilities
    assert TensorUtilities.from_twice_differentiable(case.wrapped()) is TorchTensorUtilities


class Bare(TwiceDifferentiable):
    """Only what has to be there."""

    num_params = 1
    parameters: Any = []
    mvp: Any = None


def test_d13_a_model_without_utilities_names_its_type_and_the_known_ones(registry: dict[Any, Any]):
    with pytest.raises(KeyError, match=r"Bare.*TorchTwiceDifferentiable"):
        TensorUtilities.from_twice_differentiable(Bare())


def test_d13_only_classes_without_open_methods_are_registered(registry: dict[Any, Any]):
    before = dict(registry)

    class StillOpen(TensorUtilities):
        twice_differentiable_type = Bare

    assert registry == before
    assert TensorUtilities.from_twice_differentiable(Linear().wrapped()) is TorchTensorUtilities


@pytest.mark.parametrize("wrong", [int, None, "TorchTwiceDifferentiable", nn.Module], ids=str)
def test_d13_a_type_that_is_not_twice_differentiable_is_refused(wrong: Any, registry: dict[Any, Any]):
    with pytest.raises(TypeError, match="`twice_differentiable_type` of Wrong is .*subclass of TwiceDifferentiable"):
        type("Wrong", (TorchTensorUtilities,), {"twice_differentiable_type": wrong})
    assert wrong not in registry


# D14: more right-hand sides than parameters


@pytest.mark.parametrize("test_points", [1, 2, 3, 6, 40])
def test_d14_more_test_points_than_parameters_have_factors_all_the_same(test_points: int):
    case = Linear(test=test_points)
    factors = compute_influence_factors(
        case.wrapped(), [(case.x, case.y)], [(case.test_x, case.test_y)], damping=case.damping
    )
    close(factors.x, case.factors())
    assert factors.x.any(1).all()
    assert len(factors.info["residual"]) == test_points
    assert max(factors.info["residual"]) < 1e-12


# The interface


def test_interface_results_unpack_and_are_frozen():
    result = InverseHvpResult(torch.ones(2), {"status": "converged"})
    x, info = result
    assert torch.equal(x, torch.ones(2))
    assert info == {"status": "converged"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.x = torch.zeros(2)
    with pytest.raises(TypeError):
        InverseHvpResult(torch.ones(2))
    factors, told = compute_influence_factors(
        Linear().wrapped(), [(draw(3, 2), draw(3, 1))], [(draw(3, 2), draw(3, 1))], damping=1.0
    )
    assert factors.shape == (3, 2)
    assert told["converged"]


@pytest.mark.parametrize("left_out", ["num_params", "parameters", "mvp"])
def test_interface_what_is_abstract_must_be_there(left_out: str):
    members = {name: value for name, value in vars(Bare).items() if name in ("num_params", "parameters", "mvp")}
    members.pop(left_out)
    with pytest.raises(TypeError, match=left_out):
        type("Partial", (TwiceDifferentiable,), members)()


@pytest.mark.parametrize("method", ["grad", "hessian"])
def test_interface_what_a_subclass_left_out_raises_by_name_and_is_never_none(method: str):
    with pytest.raises(NotImplementedError, match=f"Bare.{method}"):
        getattr(Bare(), method)(torch.ones(1), torch.ones(1))


def test_interface_all_nine_tensor_utilities():
    utilities, a, b = TorchTensorUtilities, draw(3, 4), draw(3, 4, seed=1)
    close(utilities.einsum("ij,kj->ik", a, b), a @ b.T)
    assert torch.equal(utilities.cat([a, b]), torch.cat([a, b]))
    assert torch.equal(utilities.cat([a, b], dim=1), torch.cat([a, b], 1))
    assert torch.equal(utilities.stack([a, b], dim=1), torch.stack([a, b], 1))
    assert utilities.unsqueeze(a, dim=1).shape == (3, 1, 4)
    assert utilities.shape(a) == (3, 4)
    assert torch.equal(utilities.reshape(a, (2, 6)), a.reshape(2, 6))
    assert torch.equal(utilities.slice(a, 1, 3, 1), a[:, 1:3])
    assert torch.equal(utilities.slice(a, 0, 2), a[:2])
    assert torch.equal(utilities.slice(a, 1, 3, axis=-1), a[:, 1:3])
    assert torch.equal(utilities.get_element(a, 2), a[2])


def test_interface_an_element_is_taken_along_the_first_axis_longer_than_one():
    x = draw(1, 3, 2)
    assert torch.equal(TorchTensorUtilities.get_element(x, 2), x[0, 2])
    assert torch.equal(TorchTensorUtilities.get_element(draw(1), 0), draw(1)[0])


def test_interface_influences_state_their_sign_and_units():
    case = Linear()
    found = compute_influences(case.wrapped(), [(case.x, case.y)], damping=0.1, curvature="hessian")
    assert "s_test" in found.sign
    assert "positive" in found.sign
    assert "hessian" in repr(found)
    assert "0.1" in repr(found)
    up = compute_influences(case.wrapped(), [(case.x, case.y)], damping=0.1)
    assert (up.values.diagonal() > 0).all()  # each sample lowers its own loss


def test_interface_leaving_a_sample_out_moves_the_test_loss_by_its_influence():
    """The sign and the unit, by training again: weights that solve the damped problem without the sample."""
    case = Linear(train=200, test=4)

    def solution(keep: Tensor) -> Tensor:
        X, Y = case.x[keep], case.y[keep]
        return torch.linalg.solve(2 * X.T @ X + 200 * 0.1 * torch.eye(2).double(), 2 * X.T @ Y).T

    everything = torch.arange(200)
    with torch.no_grad():
        case.model.weight.copy_(solution(everything))
    found = compute_influences(
        case.wrapped(), [(case.x, case.y)], test_data=[(case.test_x, case.test_y)], damping=case.damping
    )

    def losses(weight: Tensor) -> Tensor:
        return ((case.test_x @ weight.T - case.test_y) ** 2).mean(1)

    base = losses(solution(everything))
    for i in (0, 7, 50):
        change = losses(solution(everything[everything != i])) - base
        torch.testing.assert_close(change, found.values[:, i] / 200, rtol=0.1, atol=2e-5)


def test_refusals_a_singular_or_indefinite_system_carries_its_solution_and_advice():
    case = Linear(train=1)
    data = [(case.x, case.y)]
    for seed in range(6):  # by rounding, a singular matrix may look positive definite
        one = [(draw(1, 2, seed=seed), draw(1, 1, seed=seed))]
        with pytest.raises(SolveError, match="hessian.*singular.*damping") as error:
            compute_influences(
                case.wrapped(), one, test_data=[(case.test_x, case.test_y)], curvature="hessian", damping=0
            )
        assert set(error.value.solution.status) == {"singular"}
    indefinite = case.wrapped(lambda output, y: -((output - y) ** 2).mean())
    with pytest.raises(SolveError, match="negative_curvature.*`damping`") as error:
        compute_influences(indefinite, [(draw(5, 2), draw(5, 1))], curvature="hessian", damping=0.01)
    assert error.value.solution.info["lowest_curvature"] < 0
    kept = compute_influence_factors(case.wrapped(), data, data, damping=0, on_failure="return")
    assert kept.info["status"] == "singular"
    assert not kept.info["converged"]
