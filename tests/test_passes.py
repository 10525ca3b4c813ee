"""How often a call runs the model: forwards with more than one row, counted in the model itself."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
from jacops import TorchTwiceDifferentiable, compute_influences

CURVATURES = ("hessian", "ggn", "fisher", "empirical_fisher", "monte_carlo_fisher")
ROWS = 12


class Counted(nn.Module):
    """A network that counts its forwards by their rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.rows: Counter[int] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.rows[len(x)] += 1
        return self.net(x)

    def whole(self) -> int:
        """Return the forwards of more than one row, and begin to count anew."""
        found = sum(many for rows, many in self.rows.items() if rows > 1)
        self.rows.clear()
        return found


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Backward passes, single and batched."""
    counted: Counter[str] = Counter()
    plain = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        counted["batched" if kwargs.get("is_grads_batched") else "single"] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return counted


def batches(many: int, rows: int = ROWS, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, 5, dtype=torch.float64, generator=draw),
            torch.randn(rows, 2, dtype=torch.float64, generator=draw),
        )
        for _ in range(many)
    ]


def first_and_again(call: Callable[[], Any], count: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what a call costs the first time and when it is remembered; its results have to be equal."""
    results, costs = [], []
    for _ in range(2):
        results.append(call())
        costs.append(count())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    return costs[0], costs[1]


@pytest.mark.parametrize("tested", [1, 2])
@pytest.mark.parametrize("trained", [2, 3])
@pytest.mark.parametrize("method", ["cg", "direct", "ekfac"])
def test_influences_run_each_batch_once(method: str, trained: int, tested: int) -> None:
    model = Counted()
    data, test = batches(trained), batches(tested, rows=3, seed=1)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        options = {"inversion_method": method, "damping": 0.5, "curvature": "ggn"}
        return compute_influences(point, data, test_data=test, **options).values

    first, again = first_and_again(influences, model.whole)
    assert again == trained + tested
    assert first <= trained + 3 * tested + 3  # two parts of a batch to prove that samples do not mix, once a shape


@pytest.mark.parametrize("method", ["cg", "ekfac"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_all_curvatures_share_the_recorded_batch(curvature: str, method: str) -> None:
    model, data = Counted(), batches(2)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        return compute_influences(point, data, inversion_method=method, damping=4.0, curvature=curvature).values

    _, again = first_and_again(influences, model.whole)
    assert again == len(data)  # which are the test data too


@pytest.mark.parametrize("options", [{"leverage": True}, {"influence_type": "perturbation"}], ids=str)
def test_corrections_and_perturbations_share_it(options: dict[str, Any]) -> None:
    model, data = Counted(), batches(2)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        return compute_influences(
            point, data, inversion_method="direct", damping=0.5, curvature="ggn", **options
        ).values

    _, again = first_and_again(influences, model.whole)
    assert again == len(data)


def test_batches_that_a_loader_makes_anew_are_recognised() -> None:
    model = Counted()
    whole = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches(3), strict=True)))
    loader = torch.utils.data.DataLoader(whole, batch_size=ROWS)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        return compute_influences(point, loader, inversion_method="cg", damping=0.5, curvature="ggn").values

    _, again = first_and_again(influences, model.whole)
    assert again == 3


def test_a_recorded_batch_is_not_used_for_other_weights() -> None:
    """A problem that outlives a training step differentiates the model as it is then."""
    model, data = Counted(), batches(2)
    problem = jacops.Problem(model, nn.functional.mse_loss, data)
    problem.ggn().dense()
    with torch.no_grad():
        model.net[0].weight.mul_(1.5)
    fresh = jacops.Problem(model, nn.functional.mse_loss, data)
    for call in ("gradient", "value"):
        torch.testing.assert_close(getattr(problem, call)(), getattr(fresh, call)())
    torch.testing.assert_close(problem.ggn().dense(), fresh.ggn().dense())
    torch.testing.assert_close(problem.sample_gradients().dense(), fresh.sample_gradients().dense())


def test_a_loss_that_starts_to_sum_is_noticed() -> None:
    """The proof that a loss takes the mean rests on its graph, not on the function's identity."""
    model, data, how = Counted(), batches(2), {"reduction": "mean"}

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, y, **how)

    for _ in range(2):
        jacops.Problem(model, loss, data).gradient()
    how["reduction"] = "sum"
    with pytest.raises(jacops.InputError, match="reduction"):
        jacops.Problem(model, loss, data).gradient()
