"""What an influence result offers, and influences on data of every form."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops import TorchTwiceDifferentiable, compute_influence_factors, compute_influences, self_influences
from jacops._picks import picked
from jacops.errors import InputError, SolveError
from small import batches, draw, settled, small_net

X, Y = draw(12, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1])
EXACT = ["direct", "cg", "minres", "auto"]
APPROXIMATE = ["arnoldi", "nystrom", "ekfac"]


def split(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return batches(X, Y, *sizes)


def found(**options: Any) -> jacops.results.Influences:
    settings: dict[str, Any] = {"damping": 0.5, "curvature": "ggn", **options}
    wrapped = TorchTwiceDifferentiable(settings.pop("model", small_net()), settings.pop("loss", F.cross_entropy))
    return compute_influences(wrapped, settings.pop("data", split(5, 7)), **settings)


def gradients(model: nn.Module, loss: Any = F.cross_entropy) -> Tensor:
    return torch.stack([oracle.gradient(model, loss, X[i : i + 1], Y[i : i + 1]) for i in range(12)])


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("curvature", ["ggn", "hessian", "fisher", "empirical_fisher"])
def test_exact_methods_agree_with_the_formula(method: str, curvature: str):
    model, damping = small_net(), 0.5 if curvature != "hessian" else 5.0
    G = gradients(model)  # noqa: N806
    matrix = {
        "ggn": lambda: jacops.ggn(model, F.cross_entropy, X, Y).dense(),
        "hessian": lambda: oracle.hessian(model, F.cross_entropy, X, Y),
        "fisher": lambda: jacops.ggn(model, F.cross_entropy, X, Y).dense(),
        "empirical_fisher": lambda: G.T @ G / 12,
    }[curvature]() + damping * torch.eye(26).double()
    expected = G @ torch.linalg.solve(matrix, G.T)
    actual = found(solver=method, curvature=curvature, damping=damping)
    torch.testing.assert_close(actual.values, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert actual.info["converged"]
    assert max(actual.info["residual"]) <= 1e-7
    own = self_influences(
        TorchTwiceDifferentiable(model, F.cross_entropy),
        split(5, 7),
        solver=method,
        curvature=curvature,
        damping=damping,
    )
    torch.testing.assert_close(own, expected.diagonal(), rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("method", APPROXIMATE)
def test_approximate_methods_say_how_far_they_are(method: str):
    exact, actual = found(solver="direct"), found(solver=method)
    assert actual.info["approximate"]
    assert "approximate" in repr(actual)
    assert len(actual.info["residual"]) == 12
    assert all(np.isfinite(actual.info["residual"]))
    together = torch.stack([exact.values.flatten(), actual.values.flatten()])
    assert float(torch.corrcoef(together)[0, 1]) > 0.9


@pytest.mark.parametrize("method", [*EXACT, "lissa", "lanczos", "arnoldi", "nystrom", "ekfac"])
def test_every_method_sees_one_objective_however_it_is_split_or_reduced(method: str):
    whole = found(solver=method, data=split(12)).values
    close = {"rtol": 1e-5, "atol": 1e-6 * float(whole.abs().max())}
    torch.testing.assert_close(found(solver=method, data=split(11, 1)).values, whole, **close)
    summed = {"loss": nn.CrossEntropyLoss(reduction="sum"), "damping": 12 * 0.5}
    torch.testing.assert_close(found(solver=method, data=split(5, 7), **summed).values * 12, whole, **close)


def test_the_series_agrees_or_says_that_it_diverges():
    actual = found(solver="lissa")
    torch.testing.assert_close(actual.values, found().values, rtol=1e-4, atol=1e-6)
    with pytest.raises(SolveError, match="diverged.*scale=") as error:
        found(solver=jacops.solvers.LiSSA(scale=1e-3))
    assert error.value.solution.status[0] == "diverged"


def test_a_result_says_what_it_is():
    actual = found()
    said = repr(actual)
    for part in (
        "ggn",
        "damping 0.5",
        "12 training rows",
        "26 of 26 parameters",
        "+ s_test · grad",
        "per unit of weight",
    ):
        assert part in said
    values, indices = actual.top(2)
    assert torch.equal(values, actual.values.gather(1, indices))
    assert isinstance(actual.to_numpy(), np.ndarray)
    torch.testing.assert_close(actual.leave_one_out(), actual.values / 12)
    assert "order" in actual.info["data"]


def test_leaving_out_weighs_by_the_objective_s_own_weights():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]).double())
    actual = found(loss=loss)
    weights = loss.weight[Y]
    torch.testing.assert_close(actual.leave_one_out(), actual.values * weights / weights.sum())
    summed = found(loss=nn.CrossEntropyLoss(reduction="sum"))
    assert torch.equal(summed.leave_one_out(), summed.values)


def test_the_leverage_correction_is_the_step_without_the_sample():
    model = settled(nn.Linear(3, 2))
    x, y = draw(8, 3), draw(8, 2, seed=4)
    wrapped = TorchTwiceDifferentiable(model, nn.MSELoss(reduction="sum"))
    actual = compute_influences(wrapped, [(x, y)], l2=0.1, damping=0, leverage=True)
    plain = compute_influences(wrapped, [(x, y)], l2=0.1, damping=0)
    H = oracle.hessian(model, nn.MSELoss(reduction="sum"), x, y) + 0.1 * torch.eye(8).double()  # noqa: N806
    G = torch.stack([oracle.gradient(model, nn.MSELoss(reduction="sum"), x[i : i + 1], y[i : i + 1]) for i in range(8)])  # noqa: N806
    for i in range(8):
        own = oracle.hessian(model, nn.MSELoss(reduction="sum"), x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(actual.values[:, i], G @ torch.linalg.solve(H - own, G[i]))
    trace = torch.stack(
        [
            torch.linalg.solve(
                H, oracle.hessian(model, nn.MSELoss(reduction="sum"), x[i : i + 1], y[i : i + 1])
            ).trace()
            for i in range(8)
        ]
    )
    torch.testing.assert_close(actual.info["leverage"], trace)
    assert not torch.allclose(actual.values, plain.values)
    with pytest.raises(InputError, match="`leverage`"):
        found(leverage=True, influence_type="perturbation")


def test_only_influences_of_weights_are_drawn_and_ranked():
    moved = found(influence_type="perturbation")
    for call in (moved.plot, moved.leave_one_out, lambda: moved.top(1)):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("parameters", ["2.*", ["0.weight", "2.bias"], lambda name, p: p.ndim == 2])
def test_subsets_of_parameters(parameters: Any):
    model = small_net()
    actual = found(model=model, parameters=parameters)
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    picks = picked(model, parameters)
    assert picks is not None
    chosen = {name: picks(name, p) for name, p in model.named_parameters()}
    where = torch.tensor([chosen[name] for name in names])
    G = gradients(model)[:, where]  # noqa: N806
    matrix = jacops.ggn(model, F.cross_entropy, X, Y).dense()[where][:, where] + 0.5 * torch.eye(G.shape[1]).double()
    torch.testing.assert_close(actual.values, G @ torch.linalg.solve(matrix, G.T))
    assert actual.info["covered"] == G.shape[1]
    assert actual.info["parameters"] == 26


def test_more_right_hand_sides_than_fit_into_a_tile(monkeypatch: pytest.MonkeyPatch):
    from jacops._influence import _run

    whole = found()
    factors = compute_influence_factors(
        TorchTwiceDifferentiable(small_net(), F.cross_entropy), split(5, 7), split(5, 7), curvature="ggn", damping=0.5
    )
    monkeypatch.setattr(_run, "_TILE_BYTES", 2 * 26 * 8)
    torch.testing.assert_close(found().values, whole.values)
    assert len(found().info["residual"]) == 12
    again = compute_influence_factors(
        TorchTwiceDifferentiable(small_net(), F.cross_entropy), split(5, 7), split(5, 7), curvature="ggn", damping=0.5
    )
    torch.testing.assert_close(again.x, factors.x)


class Pairs(nn.Module):
    """Two inputs, as a tokenizer's batch gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        held = self.embedding(input_ids) * attention_mask.unsqueeze(2)
        return self.head(held.sum(1) / attention_mask.sum(1, keepdim=True))


def test_a_tokenizer_s_batches_work_as_they_are():
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(7, (12, 5), generator=generator), torch.ones(12, 5).double()
    mask[::2, 3:] = 0
    model = settled(Pairs())
    data = [{"input_ids": ids[s], "attention_mask": mask[s], "labels": Y[s]} for s in (slice(0, 5), slice(5, 12))]
    actual = compute_influences(TorchTwiceDifferentiable(model, F.cross_entropy), data, curvature="ggn", damping=0.5)
    inputs = {"input_ids": ids, "attention_mask": mask}
    G = torch.stack(  # noqa: N806
        [
            oracle.gradient(model, F.cross_entropy, {k: v[i : i + 1] for k, v in inputs.items()}, Y[i : i + 1])
            for i in range(12)
        ]
    )
    matrix = jacops.ggn(model, F.cross_entropy, inputs, Y).dense() + 0.5 * torch.eye(G.shape[1]).double()
    torch.testing.assert_close(actual.values, G @ torch.linalg.solve(matrix, G.T))
