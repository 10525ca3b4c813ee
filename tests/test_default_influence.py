"""Influence by default: it answers for networks at no optimum, and its damping says where it comes from."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import compute_influence_factors, compute_influences, self_influences
from jacops._influence._damping import RULE, SHARE
from jacops.errors import InputError, SolveError, StoreMismatchError
from jacops.solvers import CG, EKFAC
from small import draw, settled, small_net

ROWS, CLASSES = 9, 3
PUBLIC: Any = jacops  # what needs an extra is not known to type checkers


class Block(nn.Module):
    """A convolutional residual block with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norms, self.head = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        held = F.relu(self.norms[0](self.stem(x.view(-1, 1, 4, 4))))
        return self.head((held + F.relu(self.norms[1](self.inner(held)))).mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 4, 4))[0][:, -1])


class Attention(nn.Module):
    """One encoder layer of a transformer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.view(-1, 4, 4)).mean(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 2))


NETS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "regression": regression,
    "residual": Block,
    "recurrent": Recurrent,
    "transformer": Attention,
}


def trained(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A network after a few steps, far from an optimum, with its loss and its data."""
    torch.manual_seed(0)
    model, x = NETS[name]().to(dtype), draw(ROWS, 16, dtype=dtype)
    y = draw(ROWS, 2, seed=1, dtype=dtype) if name == "regression" else torch.arange(ROWS) % CLASSES
    loss = nn.MSELoss() if name == "regression" else nn.CrossEntropyLoss()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    return model.eval(), loss, x, y


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def by_hand(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of all samples and the Gauss-Newton matrix of their mean, each row by its own backward."""
    weights, gradients, matrix = list(model.parameters()), [], torch.zeros(())
    for row in range(len(x)):
        output = model(x[row : row + 1])
        gradients.append(flat(torch.autograd.grad(loss(output, y[row : row + 1]), weights, retain_graph=True)))
        J = torch.stack([flat(torch.autograd.grad(k, weights, retain_graph=True)) for k in output[0]])  # noqa: N806
        p = output[0].softmax(0).detach()
        inner = torch.eye(len(p)).to(p) * 2 / len(p) if y.is_floating_point() else p.diag() - p.outer(p)
        matrix = matrix + J.T @ inner @ J / len(x)
    return torch.stack(gradients), matrix


def split(x: Tensor, y: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("name", NETS)
def test_networks_that_are_at_no_optimum_are_answered_by_the_formula(name: str):
    model, loss, x, y = trained(name)
    test = x[:4] + 0.1, y[:4]
    found = compute_influences(model, split(x, y), loss=loss, test_data=[test])
    G, A = by_hand(model, loss, x, y)  # noqa: N806
    tested, _ = by_hand(model, loss, *test)
    assert found.damping == pytest.approx(SHARE * float(torch.linalg.matrix_norm(A, 2)), rel=2e-2)
    damped = A + found.damping * torch.eye(len(A)).double()
    expected = tested @ torch.linalg.solve(damped, G.T)
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
    assert found.info["curvature"] == "ggn"
    assert found.info["converged"]
    factors = compute_influence_factors(model, split(x, y), [test], loss=loss)
    torch.testing.assert_close(factors.x @ G.T, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
    own = self_influences(model, split(x, y), loss=loss)
    torch.testing.assert_close(own, (G * torch.linalg.solve(damped, G.T).T).sum(1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", ["cg", "ekfac"])
@pytest.mark.parametrize("name", NETS)
def test_single_precision_and_iterative_or_approximate_solvers_answer_too(name: str, solver: Any):
    model, loss, x, y = trained(name, torch.float32)
    options: dict[str, Any] = {"loss": loss, "test_data": [(x[:3] + 0.1, y[:3])]}
    solver = EKFAC(report_residual=False) if solver == "ekfac" else solver
    found = compute_influences(model, split(x, y), solver=solver, **options)
    assert found.info["success"]
    assert bool(found.values.isfinite().all())


@pytest.mark.parametrize("name", NETS)
def test_no_network_runs_sample_by_sample(name: str):
    """One forward a batch, and a few of two rows and one that prove that samples do not mix, however many there are."""
    model, loss, x, y = trained(name)
    forwards: list[int] = []
    model.register_forward_hook(lambda module, given, output: forwards.append(len(given[0])))
    counts = []
    for many in (1, 4):
        data = [(x.repeat(many, 1), y.repeat(many, *[1] * (y.ndim - 1)))]
        forwards.clear()
        compute_influences(model, data, loss=loss, test_data=[(x[:3] + 0.1, y[:3])])
        counts.append(len(forwards))
    assert counts[1] <= counts[0]
    assert f"{ROWS} samples to a sweep" in repr(jacops.sample_gradients(model, loss, x, y))
    curvature = jacops.ggn(model, loss, x, y)
    _ = curvature @ torch.ones(curvature.shape[1]).double()
    assert "node by node" in repr(curvature)  # one push of a product for all samples


def test_defaults_are_the_same_in_all_three_calls_and_solvers_stay_undamped():
    for call in (compute_influences, compute_influence_factors, self_influences):
        parameters = inspect.signature(call).parameters
        assert (parameters["curvature"].default, parameters["damping"].default) == ("ggn", "auto")
    for call in (jacops.solve, jacops.inverse):
        assert inspect.signature(call).parameters["damping"].default == 0


def test_no_damping_is_none():
    model, loss, x, y = trained("regression")
    options: dict[str, Any] = {"loss": loss, "damping": 0, "l2": 0.3}
    found = compute_influences(model, split(x, y), **options)
    G, A = by_hand(model, loss, x, y)  # noqa: N806
    expected = G @ torch.linalg.solve(A + 0.3 * torch.eye(len(A)).double(), G.T)
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-8)
    assert (found.damping, found.info["damping_rule"]) == (0.0, "given")
    with pytest.raises(SolveError, match="singular"):
        compute_influences(small_net(), [(draw(2, 3), draw(2, 2, seed=1))], loss=F.mse_loss, damping=0)


def test_the_damping_has_the_unit_of_the_curvature():
    """A loss in another unit, or a sum instead of a mean, gives the same ranking: scores only change their unit."""
    model, loss, x, y = trained("perceptron")
    plain = compute_influences(model, split(x, y), loss=loss)
    scaled = compute_influences(model, split(x, y), loss=lambda output, y: 7.0 * loss(output, y))
    torch.testing.assert_close(scaled.values, 7.0 * plain.values, rtol=1e-5, atol=1e-8)
    assert scaled.damping == pytest.approx(7.0 * plain.damping, rel=1e-6)
    summed = compute_influences(model, split(x, y), loss=nn.CrossEntropyLoss(reduction="sum"))
    torch.testing.assert_close(summed.values * ROWS, plain.values, rtol=1e-5, atol=1e-8)
    decayed = compute_influences(model, split(x, y), loss=loss, l2=10.0)
    norm = float(jacops.linalg.spectral_norm(jacops.Problem(model, loss, split(x, y), l2=10.0).ggn()))
    assert decayed.damping == pytest.approx(SHARE * norm, rel=1e-2)  # of the whole objective


@pytest.mark.parametrize("curvature", ["hessian", "fisher", "empirical_fisher", "monte_carlo_fisher"])
def test_every_curvature_has_a_scale(curvature: Any):
    model, loss, x, y = trained("perceptron")
    found = compute_influences(model, split(x, y), loss=loss, curvature=curvature, solver="minres")
    matrix = jacops.Problem(model, loss, split(x, y)).curvature(curvature).dense()
    assert found.damping == pytest.approx(SHARE * float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-2)


def test_ekfac_is_damped_by_its_own_eigenvalues_and_estimated_once(monkeypatch: pytest.MonkeyPatch):
    model, loss, x, y = trained("perceptron")
    made: list[Any] = []
    real = EKFAC.approximate
    monkeypatch.setattr(EKFAC, "approximate", lambda *a, **o: made.append(real(*a, **o)) or made[-1])
    found = compute_influences(model, split(x, y), loss=loss, solver=EKFAC(report_residual=False))
    estimated = [each for each in made if each is not made[0]]
    assert not estimated  # what `prepare` is given back is what was estimated for the damping
    assert found.damping == pytest.approx(SHARE * made[0].largest)
    assert "EK-FAC" in found.info["damping_rule"]


def test_a_loss_without_curvature_needs_a_number():
    x, y = draw(6, 3), draw(6, 2, seed=1)
    with pytest.raises(InputError, match=r"`damping` is 'auto'.*linear.*Pass a number"):
        compute_influences(small_net(), [(x, y)], loss=nn.L1Loss())
    assert compute_influences(small_net(), [(x, y)], loss=nn.L1Loss(), damping=1.0).info["success"]


def test_a_plain_model_and_a_wrapped_one_give_the_same():
    model, loss, x, y = trained("perceptron")
    plain = compute_influences(model, split(x, y), loss=loss)
    wrapped = compute_influences(jacops.TorchTwiceDifferentiable(model, loss), split(x, y))
    assert torch.equal(plain.values, wrapped.values)


def test_how_the_damping_was_chosen_is_said_everywhere(tmp_path: Path):
    model, loss, x, y = trained("perceptron")
    found = compute_influences(model, split(x, y), loss=loss)
    factors = compute_influence_factors(model, split(x, y), [(x, y)], loss=loss)
    rule = found.info["damping_rule"]
    assert rule.startswith(RULE)
    for result in (found, factors):
        assert RULE in repr(result)
        assert RULE in result._repr_html_()
        result.save(tmp_path / "kept")
        again: Any = jacops.load(tmp_path / "kept")
        assert (again.info["damping"], again.info["damping_rule"]) == (found.damping, rule)
    assert RULE not in repr(compute_influences(model, split(x, y), loss=loss, damping=0.1))
    pytest.importorskip("pandas")
    for table in (found.to_pandas(), found.to_pandas(top=2)):
        assert (table.attrs["damping"], table.attrs["damping_rule"]) == (found.damping, rule)
        assert (table.attrs["curvature"], table.attrs["sign"]) == ("ggn", found.sign)


# Negative curvature


def undone() -> dict[str, Any]:
    """A network whose Hessian has negative curvature, and its data by the names of the arguments."""
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    training_data = [(draw(8, 3), torch.arange(8) % 2)]
    test_data = [(draw(3, 3, seed=7), torch.arange(3) % 2)]
    return {"model": model, "training_data": training_data, "test_data": test_data, "loss": nn.CrossEntropyLoss()}


CALLS: dict[str, Callable[..., Any]] = {
    "compute_influences": lambda c, **o: compute_influences(
        c["model"], c["training_data"], test_data=c["test_data"], loss=c["loss"], **o
    ),
    "compute_influence_factors": lambda c, **o: compute_influence_factors(
        c["model"], c["training_data"], c["test_data"], loss=c["loss"], **o
    ),
    "self_influences": lambda c, **o: self_influences(c["model"], c["training_data"], loss=c["loss"], **o),
}


@pytest.mark.parametrize("options", [{}, {"solver": "direct", "parameters": "0.*"}, {"solver": CG()}], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_who_asks_for_the_hessian_and_meets_negative_curvature_gets_a_line_that_works(
    call: str, options: dict[str, Any]
):
    caller = undone() | options
    with pytest.raises(SolveError, match="negative_curvature") as error:
        CALLS[call](caller, curvature="hessian", damping=1e-3, **options)
    lines = [line.strip() for line in str(error.value).splitlines() if line.strip().startswith("jacops.")]
    assert len(lines) == 1
    scope: dict[str, Any] = {"jacops": jacops, **caller}
    exec(f"pasted = {lines[0]}", scope)  # noqa: S102
    expected = CALLS[call](caller, **options)
    torch.testing.assert_close(torch.as_tensor(scope["pasted"]), torch.as_tensor(expected))


def test_other_failures_and_other_curvature_come_without_that_line():
    caller = undone()
    with pytest.raises(SolveError, match="negative_curvature") as error:
        compute_influences(
            caller["model"], [(draw(8, 3), draw(8, 2))], loss=lambda o, y: -((o - y) ** 2).mean(), damping=1e-3
        )
    assert "jacops." not in str(error.value)


# Stored runs


def test_a_stored_run_keeps_its_damping_and_is_of_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("zarr")
    from jacops._influence import _damping, _run

    model, loss, x, y = trained("perceptron")
    tile = sum(p.numel() for p in model.parameters()) * 8 * 4
    monkeypatch.setattr(_run, "_TILE_BYTES", tile)

    def run(**options: Any) -> jacops.results.Influences:
        return compute_influences(model, split(x, y), loss=loss, store=tmp_path / "run", **options)

    plain = compute_influences(model, split(x, y), loss=loss)
    first = run()
    assert torch.equal(first.values, plain.values)
    assert (first.damping, first.info["damping_rule"]) == (plain.damping, plain.info["damping_rule"])
    for done in ("factors", "status", "influences"):  # the last tile is to be computed again
        (tmp_path / "run" / done / "done" / ("2" if done == "status" else "2.0")).unlink()
    monkeypatch.setattr(_damping, "spectral_norm", lambda *a, **o: pytest.fail("the damping was chosen again"))
    assert torch.equal(run().values, first.values)
    again = run()
    assert (again.damping, again.info["damping_rule"]) == (first.damping, first.info["damping_rule"])
    assert RULE in repr(again)
    with pytest.raises(StoreMismatchError, match="damping"):
        run(damping=first.damping)


# JAX


def test_a_jax_model_is_answered_alike():
    jax = pytest.importorskip("jax")
    from jax_cases import as_jax, double_precision, mlp, mse, weights

    with double_precision():
        model, x, y = small_net(), draw(6, 3), draw(6, 2, seed=1)
        params = weights(model)
        expected = compute_influences(model, split(x, y), loss=nn.MSELoss())
        pairs = [(as_jax(a), as_jax(b)) for a, b in split(x, y)]
        plain = compute_influences(PUBLIC.JaxFunction(mlp, params), pairs, loss=mse)
        wrapped = compute_influences(PUBLIC.JaxTwiceDifferentiable(mlp, params, mse), pairs)
        assert plain.damping == pytest.approx(expected.damping, rel=1e-6)
        for found in (plain, wrapped):
            torch.testing.assert_close(
                found.values.sum(), expected.values.sum(), rtol=1e-6, atol=1e-9
            )  # whatever the order of the parameters
        assert jax.__version__
        with pytest.raises(InputError, match="JaxTwiceDifferentiable carries its own"):
            compute_influences(PUBLIC.JaxTwiceDifferentiable(mlp, params, mse), pairs, loss=mse)


# Quality


def test_halves_of_the_data_are_predicted_better_than_by_products_of_gradients():
    pytest.importorskip("sklearn")
    from benchmarks.datamodelling import CASES, score

    case = replace(next(case for case in CASES if case.name == "tanh regression"), many=12)
    model, halves, losses = case.trained(torch.arange(case.rows)), case.halves, case.retrained()
    plain, own = (score(v, halves, losses) for v in (case.products(model), case.influences(model).values))
    assert float(own.mean()) > float(plain.mean()) + 0.05
