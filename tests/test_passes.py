"""How often a call runs the model: forwards with more than one row, counted in the model itself."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
from jacops import TorchTwiceDifferentiable, compute_influences
from jacops._runtime import engine

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
        """Return the forwards of more than two rows, which proofs are repeated on, and begin to count anew."""
        found = sum(many for rows, many in self.rows.items() if rows > 2)
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
    monkeypatch.setattr(engine, "_engine", None)  # so that all passes go by `grad`
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
    # Which sweeps are batched is measured, so that rounding differs, which conjugate gradients pass on.
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)
    return costs[0], costs[1]


@pytest.mark.parametrize("tested", [1, 2])
@pytest.mark.parametrize("trained", [2, 3])
@pytest.mark.parametrize("method", ["cg", "direct", "ekfac"])
def test_influences_run_each_batch_once(method: str, trained: int, tested: int) -> None:
    model = Counted()
    data, test = batches(trained), batches(tested, rows=3, seed=1)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        options = {"solver": method, "damping": 0.5, "curvature": "ggn"}
        return compute_influences(point, data, test_data=test, **options).values

    first, again = first_and_again(influences, model.whole)
    assert again == trained + tested
    assert first <= trained + 3 * tested + 3  # two parts of a batch to prove that samples do not mix, once a shape


@pytest.mark.parametrize("method", ["cg", "direct"])
def test_influences_run_two_forwards_a_batch_in_all(method: str) -> None:
    model, data = Counted(), batches(3)
    for _ in range(2):
        model.rows.clear()
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        compute_influences(point, data, solver=method, damping=0.5, curvature="ggn")
    assert model.rows.total() <= 2 * len(data)  # itself, and one of its samples


@pytest.mark.parametrize("method", ["cg", "ekfac"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_all_curvatures_share_the_recorded_batch(curvature: str, method: str) -> None:
    model, data = Counted(), batches(2)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        return compute_influences(point, data, solver=method, damping=4.0, curvature=curvature).values

    _, again = first_and_again(influences, model.whole)
    assert again == len(data)  # which are the test data too


@pytest.mark.parametrize("options", [{"leverage": True}, {"influence_type": "perturbation"}], ids=str)
def test_corrections_and_perturbations_share_it(options: dict[str, Any]) -> None:
    model, data = Counted(), batches(2)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        return compute_influences(point, data, solver="direct", damping=0.5, curvature="ggn", **options).values

    _, again = first_and_again(influences, model.whole)
    assert again == len(data)


def test_batches_that_a_loader_makes_anew_are_recognised() -> None:
    model = Counted()
    whole = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches(3), strict=True)))
    loader = torch.utils.data.DataLoader(whole, batch_size=ROWS)

    def influences() -> Tensor:
        point = TorchTwiceDifferentiable(model, nn.functional.mse_loss)
        return compute_influences(point, loader, solver="cg", damping=0.5, curvature="ggn").values

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
    with pytest.raises(jacops.errors.InputError, match="reduction"):
        jacops.Problem(model, loss, data).gradient()


# ---- whole matrices --------------------------------------------------------------------------------------------------


class Banded(nn.Module):
    """Neighbours in a vector, under a mask and by a table of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(1.1, 1.9, 30, dtype=torch.float64))
        self.register_buffer("mask", torch.zeros(29, dtype=torch.float64))
        self.register_buffer("order", torch.arange(29))
        self.forwards: Counter[str] = Counter()
        self.far = False

    def forward(self, scale: Tensor) -> Tensor:
        self.forwards["all"] += 1
        far = self.x.roll(7)[:-1] ** 3 if self.far else 0.0
        return scale * (self.x[1:] ** 2 - self.x[self.order] + self.mask * self.x.flip(0)[1:] + far)


def _sparse(model: Banded) -> Tensor:
    return jacops.modjac(model, torch.tensor(2.0, dtype=torch.float64), sparse=True)


def test_a_sparse_jacobian_keeps_its_plan() -> None:
    model = Banded()
    first = _sparse(model)
    model.forwards.clear()
    again = _sparse(model)
    assert model.forwards["all"] == 1
    torch.testing.assert_close(again.to_dense(), first.to_dense(), rtol=0, atol=0)
    with torch.no_grad():
        model.x.mul_(1.5)
    model.forwards.clear()
    moved = _sparse(model)
    assert model.forwards["all"] == 1
    torch.testing.assert_close(
        moved.to_dense(), jacops.modjac(model, torch.tensor(2.0, dtype=torch.float64), flatten=True)
    )


def _masked(model: Banded) -> None:
    model.mask.data[3] = 1e-9


def _other_table(model: Banded) -> None:
    model.order.copy_(torch.arange(29).flip(0))


def _other_branch(model: Banded) -> None:
    model.far = True


@pytest.mark.parametrize("change", [_masked, _other_table, _other_branch])
@pytest.mark.parametrize("back", [False, True])
def test_a_plan_of_another_pattern_is_not_used(change: Callable[[Banded], None], back: bool) -> None:
    model = Banded()
    _sparse(model)
    change(model)
    if back:
        _sparse(model)
        model.mask.zero_()
        model.order.copy_(torch.arange(29))
        model.far = False
    fresh = Banded()
    fresh.load_state_dict(model.state_dict())
    fresh.far = model.far
    found, right = _sparse(model), _sparse(fresh)
    torch.testing.assert_close(found.to_dense(), right.to_dense(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("call", ["hessian", "ggn"])
def test_a_remembered_matrix_takes_no_check(call: str, sweeps: Counter[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)

    def count() -> dict[str, int]:
        found = dict(sweeps)
        sweeps.clear()
        return found

    verb = getattr(jacops, call)
    first, again = first_and_again(lambda: verb(model, nn.functional.mse_loss, x, y).dense(), count)
    assert again.get("single", 0) <= 2  # of a Gauss-Newton matrix, the double backward's graph
    assert again.get("single", 0) < first["single"]
    assert again.get("batched", 0) <= first.get("batched", 0)


def test_a_matrix_decides_its_route_within_three_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """From `dense` to the layers' own answer: the route's `refuses`, `begin`, and what prepares them.

    What the ladder itself calls is the same for all questions, and left out.
    """
    from jacops._torch.routes import by_layers

    model = nn.Linear(3, 2).double()
    operator = jacops.hessian(model, nn.functional.mse_loss, torch.randn(8, 3).double(), torch.randn(8, 2).double())
    names: list[str] = []

    def prepare() -> None:
        frame = inspect.currentframe()
        while frame is not None:
            file = frame.f_code.co_filename
            if "jacops" in file and "_ladder" not in file and frame.f_code.co_name not in ("call", "checked"):
                names.append(frame.f_code.co_name)  # decorators left out
            frame = frame.f_back

    way = operator.formed
    assert isinstance(way, by_layers.ByLayers)
    replace(operator, formed=replace(way, prepare=prepare)).dense()
    assert names[: names.index("dense") + 1] == ["begin", "refuses", "dense"]
