"""Integrated Jacobians, against closed forms, a plain loop over Gauss-Legendre nodes, and captum."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import jacops
from cases import F64
from jacops import JacopsWarning, integrated_jacobian
from jacops.errors import (
    InputError,
    InputTypeError,
    MemoryBudgetError,
    ModelStateError,
    NonFiniteError,
    NotDifferentiableError,
    SolveError,
)
from jacops.results import Contributions
from oracle import leaves
from small import Swept, draw, quiet, settled

Function = Callable[[Tensor], Tensor]


# Oracles


def slopes(function: Function, x: Tensor) -> Tensor:
    """The Jacobian of every sample, (n, *out, *in), one number of the output at a time."""
    point = x.detach().clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        output = function(point)
    rows = [torch.autograd.grad(o.sum(), point, retain_graph=True)[0] for o in output.flatten(1).unbind(1)]
    return torch.stack(rows, 1).reshape(*output.shape, *x.shape[1:])


def averaged(function: Function, x: Tensor, x0: Tensor, nodes: int = 2000) -> Tensor:
    """The Jacobian averaged along the path, in double precision."""
    places, weights = np.polynomial.legendre.leggauss(min(nodes, 100))
    total: Any = 0
    for piece in range(max(1, nodes // 100)):  # rules of at most 100 nodes, which NumPy gives to rounding
        for t, w in zip((places + 1) / 2, weights / 2, strict=True):
            at = (piece + t) / max(1, nodes // 100)
            total = total + w / max(1, nodes // 100) * slopes(function, x0 + at * (x - x0))
    return total


def by_features(jacobian: Tensor, step: Tensor) -> Tensor:
    return jacobian * step.reshape(len(step), *[1] * (jacobian.ndim - step.ndim), *step.shape[1:])


def check(found: Contributions, function: Function, x: Tensor, x0: Tensor, rtol: float, nodes: int = 2000) -> None:
    """The result is that of the plain loop, up to a share of each sample's largest change of an output."""
    x0 = x0.expand_as(x)
    expected = averaged(function, x, x0, nodes)
    size = (function(x) - function(x0)).detach().abs().flatten(1).amax(1)
    for actual, wanted in ((found.values, by_features(expected, x - x0)), (found.jacobian, expected)):
        assert actual.shape == wanted.shape
        scale = size if actual is found.values else size / (x - x0).flatten(1).abs().amax(1)
        error = (actual - wanted).flatten(1).norm(dim=1) / scale
        assert float(error.max()) < rtol * math.sqrt(actual[0].numel()), f"{float(error.max()):.1e}"
    torch.testing.assert_close(found.output, function(x).detach())
    torch.testing.assert_close(found.bias, function(x0).detach())


def gaps(found: Contributions, model: Function, x: Tensor, x0: Tensor) -> Tensor:
    """What contributions of every sample lack, relative to its largest change of an output."""
    change = (model(x) - model(x0.expand_as(x))).detach().double().flatten(1)
    added = found.values.double().flatten(found.output.ndim).sum(-1).flatten(1)
    return (change - added).abs().amax(1) / change.abs().amax(1)


# Models


def mlp(*widths: int, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), act())]
    return settled(nn.Sequential(*layers[:-1]))


def cnn() -> nn.Sequential:
    return settled(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(6, 3),
        )
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Block(nn.Module):
    def __init__(self, act: str = "gelu") -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, activation=act, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)).mean(1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(9, 3), nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def rest(self, z: Tensor) -> Tensor:
        return self.head(self.layer(z)[0][:, -1].tanh())

    def forward(self, ids: Tensor, shift: Tensor | None = None) -> Tensor:
        z = self.embedding(ids)
        return self.rest(z if shift is None else z + shift.unsqueeze(1))


SMOOTH: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "GELU": (lambda: mlp(4, 8, 8, 3), (4,)),
    "tanh": (lambda: mlp(4, 8, 3, act=nn.Tanh), (4,)),
    "LSTM": (lambda: settled(Recurrent()), (4, 3)),
    "transformer": (lambda: settled(Block()).eval(), (3, 4)),
}
KINKED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ReLU": (lambda: mlp(4, 16, 16, 3, act=nn.ReLU), (4,)),
    "PReLU": (lambda: mlp(4, 8, 3, act=nn.PReLU), (4,)),
    "CNN": (cnn, (1, 6, 6)),
    "transformer with ReLU": (lambda: settled(Block("relu")).eval(), (3, 4)),
}
ALL = SMOOTH | KINKED


# Closed forms


def test_a_quadratic_function_splits_into_halves_of_its_slopes() -> None:
    a, b, x, x0 = draw(3, 3), draw(3, seed=1), draw(5, 3, seed=2), draw(5, 3, seed=3)
    found = integrated_jacobian(lambda x: ((x @ a) * x).sum(1) + x @ b, x, baseline=x0)
    middle = (x + x0) / 2 @ (a + a.T) + b
    torch.testing.assert_close(found.jacobian, middle)
    torch.testing.assert_close(found.values, middle * (x - x0))
    assert found.steps == 8
    assert found.verification.max_error < 1e-12


def test_an_exponential_function_has_its_closed_form() -> None:
    w, x = draw(4), draw(6, 4, seed=1)
    found = integrated_jacobian(lambda x: (x @ w).exp(), x, tolerance=1e-12)
    z = x @ w
    torch.testing.assert_close(found.jacobian, (z.expm1() / z)[:, None] * w, rtol=1e-11, atol=0)
    torch.testing.assert_close(found.bias, torch.ones(6, dtype=F64))


def test_a_layer_of_relu_units_is_exact() -> None:
    """A unit w relu(a x + b) is on for a share of the path from zeros; all steps it takes are to find the kinks."""
    layer, head, x = settled(nn.Linear(4, 12)), settled(nn.Linear(12, 3)), draw(7, 4, seed=1)
    with torch.no_grad():
        z = x @ layer.weight.T
        kink = (-layer.bias / z).clamp(0, 1)
        share = torch.where(z > 0, 1 - kink, torch.where(layer.bias > 0, kink, 0.0))
        share = torch.where((z > 0) & (layer.bias > 0), 1.0, share)
        expected = torch.einsum("ou,nu,uf,nf->nof", head.weight, share, layer.weight, x)
    found = integrated_jacobian(nn.Sequential(layer, nn.ReLU(), head), x)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    tight = integrated_jacobian(nn.Sequential(layer, nn.ReLU(), head), x, tolerance=1e-12)
    torch.testing.assert_close(tight.values, expected, rtol=0, atol=1e-11)
    assert tight.steps is not None
    assert tight.steps <= 120  # 12 kinks at most; a Gauss-Legendre rule would take 1e12


# A plain loop


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_models_agree_with_a_plain_loop(name: str) -> None:
    make, shape = SMOOTH[name]
    model, x, x0 = make(), draw(3, *shape, seed=9), draw(*shape, seed=8)
    found = integrated_jacobian(model, x, baseline=x0)
    check(found, model, x, x0, 1e-6, nodes=400)
    assert float(gaps(found, model, x, x0).max()) < 1e-6


@pytest.mark.parametrize("name", KINKED)
def test_models_with_kinks_agree_with_a_plain_loop(name: str) -> None:
    make, shape = KINKED[name]
    model, x, x0 = make(), draw(2, *shape, seed=9), draw(*shape, seed=8)
    found = integrated_jacobian(model, x, baseline=x0)
    check(found, model, x, x0, 1e-3)  # to the accuracy of 2,000 nodes
    assert float(gaps(found, model, x, x0).max()) < 1e-6


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("name", ["GELU", "LSTM", "ReLU", "CNN"])
def test_errors_of_contributions_follow_the_tolerance(name: str, tolerance: float) -> None:
    """Not only do they add up: each is right. What is measured is the length of the error over all features."""
    make, shape = ALL[name]
    model, x = make(), draw(3, *shape, seed=9)
    exact = integrated_jacobian(model, x, tolerance=1e-11).values
    found = integrated_jacobian(model, x, tolerance=tolerance)
    size = (model(x) - model(torch.zeros_like(x))).detach().abs().amax(1)
    error = (found.values - exact).flatten(2).norm(dim=2).amax(1) / size
    assert float(error.max()) < 4 * tolerance
    assert float(gaps(found, model, x, torch.zeros_like(x)).max()) < tolerance


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 0.1), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["GELU", "ReLU"])
def test_coarse_dtypes_keep_their_dtype_and_add_up(name: str, dtype: torch.dtype, bound: float) -> None:
    make, shape = ALL[name]
    double, x = make(), draw(4, *shape, seed=9)
    found = integrated_jacobian(copy.deepcopy(double).to(dtype), x.to(dtype))
    assert {found.values.dtype, found.jacobian.dtype, found.bias.dtype, found.output.dtype} == {dtype}
    assert found.verification.relative_error < bound
    exact = integrated_jacobian(double, x).values
    assert float((found.values.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("name", ["GELU", "ReLU"])
def test_under_autocast_contributions_add_up_as_coarsely(name: str) -> None:
    make, shape = ALL[name]
    model, x = make().float(), draw(4, *shape, seed=9, dtype=torch.float32)
    with torch.autocast("cpu"):
        found = integrated_jacobian(model, x)
    assert found.values.dtype == torch.bfloat16
    assert found.verification.relative_error < 0.1


# What outputs do not show


def test_what_cancels_in_the_outputs_is_integrated_too() -> None:
    """Of two equal inputs to a comparison one adds what the other takes away: F is 0 all along."""
    w, half = draw(3, 2), draw(4, 3, seed=1)
    x = torch.cat([half, half], 1)
    for act in (torch.tanh, lambda z: torch.relu(z - 0.3)):
        found = integrated_jacobian(lambda x, act=act: act(x[:, :3] @ w) - act(x[:, 3:] @ w), x, tolerance=1e-5)
        one = integrated_jacobian(lambda x, act=act: act(x @ w), half, tolerance=1e-9).values
        torch.testing.assert_close(found.values, torch.cat([one, -one], 2), rtol=0, atol=2e-5)


def test_a_norm_at_the_input_makes_the_path_stand_still_but_for_its_beginning() -> None:
    model = settled(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2)))
    x = draw(3, 5, seed=1)
    found = integrated_jacobian(model, x, max_steps=1000)
    pieces = torch.cat([torch.zeros(1), torch.logspace(-4, 0, 25)]).double()  # eps of the norm is at t = 3e-3
    steps = zip(pieces, pieces[1:], strict=False)
    expected = sum(by_features(averaged(model, b * x, a * x, 100), (b - a) * x) for a, b in steps)
    torch.testing.assert_close(found.values, torch.as_tensor(expected), rtol=0, atol=2e-6)


# Steps


@pytest.mark.parametrize("output", range(3))
def test_one_output_alone_is_as_exact_as_among_others(output: int) -> None:
    # Two kinks of opposite sign between two nodes: the lines through these meet beyond both, on the function.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.LeakyReLU(0.1), nn.Linear(16, 3)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    alone = integrated_jacobian(net, x, outputs=[output]).values[:, 0]
    torch.testing.assert_close(alone, integrated_jacobian(net, x).values[:, output], atol=1e-7, rtol=0)
    points = (torch.arange(20_000, dtype=torch.float64)[:, None, None] + 0.5) / 20_000 * x
    points.requires_grad_()
    (slopes,) = torch.autograd.grad(net(points)[..., output].sum(), points)
    assert (alone - slopes.mean(0) * x).abs().max() < 1e-5  # 1.4e-3 where two kinks pass for one


def test_smooth_models_take_few_steps_and_kinks_no_more_than_there_are() -> None:
    assert integrated_jacobian(mlp(4, 8, 3), draw(5, 4)).steps == 8
    for units in (4, 16, 64):
        found = integrated_jacobian(mlp(4, units, 3, act=nn.ReLU), draw(5, 4, seed=9))
        assert found.steps is not None
        assert found.steps <= 8 + 6 * units


def test_a_number_of_steps_is_that_of_nodes_and_is_not_refined() -> None:
    model, x = mlp(4, 8, 3), 5 * draw(5, 4)
    with pytest.warns(JacopsWarning, match=r"5 of 5 samples do not add up to 1e-06 .* after 3 steps"):
        found = integrated_jacobian(model, x, steps=3)
    places, weights = np.polynomial.legendre.leggauss(3)
    expected = sum(w / 2 * slopes(model, (t + 1) / 2 * x) for t, w in zip(places, weights, strict=True))
    torch.testing.assert_close(found.jacobian, torch.as_tensor(expected))
    assert found.steps == 3
    assert "from zeros, 3 steps a path" in found.notes
    size = gaps(found, model, x, torch.zeros_like(x)).max()
    assert f"{float(size):.1e}" in found.notes[1]
    assert integrated_jacobian(model, x, steps=30).verification.relative_error < 1e-9


@pytest.mark.parametrize(("most", "bound"), [(8, 0.2), (11, 0.2), (30, 0.2), (60, 0.02), (400, 1e-9)])
def test_a_path_takes_no_more_steps_than_allowed(most: int, bound: float) -> None:
    model, x = mlp(4, 32, 32, 3, act=nn.ReLU), draw(3, 4, seed=9)
    found = quiet(integrated_jacobian, model, x, max_steps=most, on_failure="return", tolerance=1e-9)
    assert found.steps is not None
    assert min(most, 61) / 2 < found.steps <= most
    assert any("do not add up" in note for note in found.notes) == (most < 400)
    assert float(gaps(found, model, x, torch.zeros_like(x)).max()) < bound


def test_what_does_not_add_up_is_an_error_that_holds_the_result() -> None:
    model, x = mlp(4, 32, 3, act=nn.ReLU), draw(4, 4, seed=9)
    with pytest.raises(SolveError, match=r"of 4 samples do not add up to 1e-06 .* lack .* after \d+ steps") as caught:
        integrated_jacobian(model, x, max_steps=20)
    found = caught.value.solution
    assert isinstance(found, Contributions)
    worst = gaps(found, model, x, torch.zeros_like(x))
    assert f"those of sample {int(worst.argmax())} lack {float(worst.max()):.1e}" in str(caught.value)
    with pytest.warns(JacopsWarning, match="do not add up"):
        returned = integrated_jacobian(model, x, max_steps=20, on_failure="return")
    assert torch.equal(returned.values, found.values)
    assert any("do not add up" in note for note in returned.notes)


def test_a_jump_is_no_reason_to_go_on_for_ever() -> None:
    def jumping(x: Tensor) -> Tensor:
        return x.tanh() + (x > 0.5).to(x.dtype)

    x = torch.tensor([[0.3, 0.9], [0.2, 0.1]], dtype=F64)
    with pytest.warns(JacopsWarning, match="1 of 2 samples do not add up"):
        found = integrated_jacobian(jumping, x, on_failure="return")
    assert found.steps is not None
    assert found.steps < 300
    torch.testing.assert_close(found.values.diagonal(dim1=1, dim2=2), x.tanh(), rtol=0, atol=1e-6)


# Baselines


BASELINES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda x: None,
    "number": lambda x: 0.5,
    "whole number": lambda x: 1,
    "one": lambda x: draw(*x.shape[1:], seed=4),
    "a row": lambda x: draw(1, *x.shape[1:], seed=4),
    "a row each": lambda x: draw(*x.shape, seed=4),
}


@pytest.mark.parametrize("given", BASELINES)
@pytest.mark.parametrize("name", ["GELU", "LSTM"])
def test_paths_begin_at_the_baseline(name: str, given: str) -> None:
    make, shape = ALL[name]
    model, x = make(), draw(4, *shape, seed=9)
    baseline = BASELINES[given](x)
    begin = torch.zeros(()) if baseline is None else torch.as_tensor(baseline)
    check(integrated_jacobian(model, x, baseline=baseline), model, x, begin.to(F64), 1e-6, nodes=100)


def test_a_sample_at_its_baseline_has_no_contributions() -> None:
    model, x = mlp(4, 8, 3, act=nn.ReLU), draw(3, 4)
    found = integrated_jacobian(model, x, baseline=x)
    assert not found.values.any()
    torch.testing.assert_close(found.jacobian, slopes(model, x))
    assert found.verification.relative_error == 0


@pytest.mark.parametrize("name", ["GELU", "ReLU", "LSTM"])
def test_expected_gradients_are_the_mean_over_baselines(name: str) -> None:
    make, shape = ALL[name]
    model, x, sets = make(), draw(4, *shape, seed=9), draw(5, *shape, seed=8)
    found = integrated_jacobian(model, x, baselines=sets, batch_size=7)
    each = [integrated_jacobian(model, x, baseline=one) for one in sets]
    for field in ("values", "bias", "output", "jacobian"):
        mean = torch.stack([getattr(one, field) for one in each]).mean(0)
        torch.testing.assert_close(getattr(found, field), mean, rtol=1e-12, atol=3e-6)
    torch.testing.assert_close(found.bias, model(sets).mean(0).detach().expand_as(found.bias))
    assert found.verification.relative_error < 1e-6
    assert "from 5 baselines, over which the result is the mean" in found.notes[0]


def test_expected_gradients_pick_the_outputs_of_targets() -> None:
    model, x, sets, target = mlp(4, 8, 3), draw(4, 4, seed=9), draw(5, 4, seed=8), torch.tensor([0, 2, 1, 2])
    found = integrated_jacobian(model, x, baselines=sets, target=target)
    whole = integrated_jacobian(model, x, baselines=sets)
    torch.testing.assert_close(found.values, whole.values[torch.arange(4), target], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.bias, model(sets).mean(0).detach()[target])


# Inputs and outputs


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, u: Tensor, v: Tensor, scale: float = 1.0, ids: Tensor | None = None) -> dict[str, Any]:
        h = self.left(u).tanh() * self.right(v).sigmoid() * scale
        h = h if ids is None else h + ids.unsqueeze(1)
        return {"mu": h[:, :2], "rest": (h[:, 2:], (h**2).sum(1))}


def test_several_inputs_and_outputs_keep_their_structures() -> None:
    model, u, v = settled(Several()), draw(4, 3), draw(4, 2, seed=1)
    found = integrated_jacobian(model, (u, v, 2.0), baseline=(draw(3, seed=2), None, None))
    one, (_, three) = found.values["mu"], found.values["rest"]
    assert [None if part is None else tuple(part.shape) for part in one] == [(4, 2, 3), (4, 2, 2), None]
    assert [tuple(part.shape) for part in three[:2]] == [(4, 3), (4, 2)]
    assert not one[1].any()  # what stays as it is adds nothing

    def squares(u: Tensor) -> Tensor:
        return model(u, v, 2.0)["rest"][1].unsqueeze(1)

    begin = draw(3, seed=2).expand_as(u)
    torch.testing.assert_close(three[0], by_features(averaged(squares, u, begin, 100), u - begin)[:, 0], rtol=1e-6,
                               atol=1e-7)  # fmt: skip
    torch.testing.assert_close(found.output["rest"][1], squares(u)[:, 0].detach())
    torch.testing.assert_close(found.bias["rest"][1], squares(begin)[:, 0].detach())
    assert found.verification.relative_error < 1e-6


def test_inputs_by_name_and_without_derivatives() -> None:
    model, x = settled(Several()), {"u": draw(4, 3), "v": draw(4, 2, seed=1), "ids": torch.arange(4)}
    found = integrated_jacobian(model, x, baseline={"v": 0.5, "u": draw(4, 3, seed=2), "ids": None})
    assert found.values["mu"]["ids"] is None
    parts = [found.values["mu"][name].sum(2) for name in ("u", "v")]
    begin = model(draw(4, 3, seed=2), torch.full((4, 2), 0.5, dtype=F64), ids=torch.arange(4))["mu"].detach()
    torch.testing.assert_close(found.bias["mu"], begin)
    torch.testing.assert_close(sum(parts) + begin, found.output["mu"], rtol=0, atol=1e-6)


def test_a_set_of_baselines_for_several_inputs() -> None:
    model, u, v = settled(Several()), draw(4, 3), draw(4, 2, seed=1)
    sets = draw(3, 3, seed=2), draw(3, 2, seed=3)
    found = integrated_jacobian(model, (u, v), baselines=sets)
    each = [integrated_jacobian(model, (u, v), baseline=(a, b)) for a, b in zip(*sets, strict=True)]
    for actual, *parts in zip(leaves(found.values), *(leaves(one.values) for one in each), strict=True):
        torch.testing.assert_close(actual, torch.stack(parts).mean(0), rtol=0, atol=1e-6)


def test_outputs_targets_and_shared_inputs() -> None:
    model, x = mlp(4, 8, 3), draw(5, 4)
    whole, target = integrated_jacobian(model, x), torch.tensor([2, 0, 1, 1, 2])
    for options, expected in (
        ({"outputs": 1}, whole.values[:, 1]),
        ({"outputs": [2, 0]}, whole.values[:, [2, 0]]),
        ({"target": target}, whole.values[torch.arange(5), target]),
        ({"mode": "forward"}, whole.values),
        ({"checks": "always"}, whole.values),
        ({"batch_size": 3}, whole.values),
    ):
        found = integrated_jacobian(model, x, **options)
        torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-7)
    table = draw(4, 3)
    found = integrated_jacobian(lambda x, table: (x @ table).tanh(), (x, table), shared=1)
    check(integrated_jacobian(lambda x: (x @ table).tanh(), x), lambda x: (x @ table).tanh(), x, x * 0, 1e-6, 100)
    torch.testing.assert_close(found.values[0], integrated_jacobian(lambda x: (x @ table).tanh(), x).values)


def test_no_samples_give_empty_parts_and_a_loader_gives_those_of_its_rows() -> None:
    model, x = mlp(4, 8, 3), draw(5, 4)
    none = integrated_jacobian(model, x[:0])
    assert (none.values.shape, none.bias.shape, none.steps) == ((0, 3, 4), (0, 3), 0)
    whole = integrated_jacobian(model, x)
    loader = DataLoader(TensorDataset(x, torch.zeros(5)), batch_size=2)
    assert torch.equal(integrated_jacobian(model, loader).values, whole.values)
    one = [integrated_jacobian(model, x[i : i + 1]).values for i in range(5)]
    torch.testing.assert_close(torch.cat(one), whole.values)


@pytest.mark.parametrize("out", [torch.empty, lambda *shape, dtype: np.empty(shape)])
def test_the_jacobian_is_written_where_it_is_wanted(out: Any) -> None:
    model, x = mlp(4, 8, 3), draw(5, 4)
    place = out(5, 3, 4, dtype=F64)
    found = integrated_jacobian(model, x, out=place)
    torch.testing.assert_close(torch.as_tensor(place), integrated_jacobian(model, x).jacobian)
    torch.testing.assert_close(found.jacobian, torch.as_tensor(place))
    half = integrated_jacobian(model.half(), x.half(), out=torch.empty(5, 3, 4, dtype=torch.float16))
    assert half.jacobian.dtype == torch.float16


def test_a_budget_is_kept_or_refused() -> None:
    model, x = mlp(4, 8, 3), draw(200, 4)
    torch.testing.assert_close(
        integrated_jacobian(model, x, budget="200MB").values, integrated_jacobian(model, x).values
    )
    with pytest.raises(MemoryBudgetError, match=r"integrated_jacobian: .* the budget is 1.00 KiB|1 KiB"):
        integrated_jacobian(model, x, budget=1024)


# From a hidden layer


def test_paths_of_a_hidden_layer_lead_from_its_output_at_the_baseline() -> None:
    model, ids, pad = settled(Words()), torch.randint(1, 9, (4, 6), generator=torch.Generator().manual_seed(0)), 0
    begin = torch.full((6,), pad)
    found = integrated_jacobian(model, ids, baseline=begin, at="embedding")
    start, end = model.embedding(begin).detach().expand(4, 6, 3), model.embedding(ids).detach()
    check(found, model.rest, end, start, 1e-6, nodes=100)
    torch.testing.assert_close(found.bias, model(begin.expand(4, 6)).detach())
    sets = torch.stack([begin, begin + 3])
    mean = integrated_jacobian(model, ids, baselines=sets, at="embedding")
    each = [integrated_jacobian(model, ids, baseline=one, at="embedding").values for one in sets]
    torch.testing.assert_close(mean.values, torch.stack(each).mean(0), rtol=0, atol=1e-6)
    to = integrated_jacobian(model, ids, baseline=begin, at=("embedding", "layer"))
    check(to, lambda z: model.layer(z)[0], end, start, 1e-6, nodes=100)


def test_the_inputs_behind_a_hidden_layer_are_those_of_the_sample() -> None:
    """A skip connection around the layer carries the sample, not the baseline."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.inner(x) * x).tanh())

    model, x = settled(Skipping()), draw(4, 3)
    found = integrated_jacobian(model, x, at="inner")
    end, start = model.inner(x).detach(), model.inner(torch.zeros_like(x)).detach()
    check(found, lambda h: model.head((h * x).tanh()), end, start, 1e-6, nodes=100)
    torch.testing.assert_close(
        integrated_jacobian(model, x, at=(None, None)).values, integrated_jacobian(model, x).values
    )


# Models that are taken one sample at a time


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5 * x.mean(0)).tanh() * x.sum(1, keepdim=True)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * torch.randn(x.shape[1:], dtype=x.dtype)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * (2.0 if x[0, 0].item() > -10 else 3.0)


@pytest.mark.parametrize("model", [Centred(), Noisy(), Branching()], ids=["mixes", "draws", "reads"])
def test_samples_that_cannot_share_sweeps_are_taken_alone(model: nn.Module) -> None:
    x = draw(3, 4)
    torch.manual_seed(0)
    found = quiet(integrated_jacobian, model, x)
    for i in range(3):
        torch.manual_seed(0)
        one = quiet(integrated_jacobian, model, x[i : i + 1])
        torch.testing.assert_close(found.values[i], one.values[0], rtol=0, atol=1e-6)
    if isinstance(model, Centred):  # alone, a sample is its own mean
        check(found, lambda x: (x / 2).tanh() * x.sum(1, keepdim=True), x, x * 0, 1e-6, nodes=100)


def test_one_at_a_time_is_said_once() -> None:
    with pytest.warns(JacopsWarning) as caught:
        integrated_jacobian(Centred(), 3 * draw(3, 4))
    assert len([w for w in caught if "differentiated alone" in str(w.message)]) == 1
    with pytest.raises(NotDifferentiableError, match="fallback='error'"):
        integrated_jacobian(Centred(), draw(3, 4), fallback="error")


def test_nothing_of_the_callers_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.GELU(), nn.Linear(8, 2)).double()
    x = draw(5, 4).requires_grad_()
    state, kept = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = integrated_jacobian(model, x)
    assert not found.values.requires_grad
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), kept)
    with torch.inference_mode():
        torch.testing.assert_close(integrated_jacobian(model, x.detach()).values, found.values)


# What it costs


def test_all_outputs_take_the_forwards_of_one_and_no_more_sweeps_than_their_jacobian() -> None:
    x, spent = draw(6, 40), {}
    for outputs in (1, 30):
        model = Swept(mlp(40, 8, outputs))
        for _ in range(2):  # once to prove that samples do not mix
            model.spent()
            quiet(integrated_jacobian, model, x, steps=20)
        spent[outputs] = model.spent()
    assert spent[30][0] == spent[1][0]  # 120 points in one batch, one sample to see shapes, both ends
    assert spent[30][1] <= spent[1][1] + 29


def test_points_are_summed_as_they_come() -> None:
    """At no time are there more Jacobians than those of one batch of points beside the result."""
    from jacops._integrated import _integrand

    most, taken = 0, _integrand.PathJacobians._taken

    def counted(self: Any, path: Tensor, t: Tensor) -> Any:
        nonlocal most
        most = max(most, len(path))
        return taken(self, path, t)

    _integrand.PathJacobians._taken = counted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        integrated_jacobian(mlp(4, 8, 3), draw(64, 4), steps=50, batch_size=16)
    finally:
        _integrand.PathJacobians._taken = taken
    assert most == 16


# The result


def test_the_result_describes_itself_and_is_saved(tmp_path: Any) -> None:
    found = integrated_jacobian(mlp(4, 8, 3), draw(5, 4))
    assert (found.method, found.slope_error) == ("integrated", None)
    assert "from zeros, 8 steps a path" in repr(found)
    found.save(tmp_path / "found.safetensors")
    back = jacops.load(tmp_path / "found.safetensors")
    assert (back.method, back.steps, back.notes) == (found.method, found.steps, found.notes)
    assert torch.equal(back.values, found.values)
    assert jacops.reduce_contributions(found.values).shape == (5, 4)


# What is refused


X = draw(5, 4)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"baseline": torch.zeros(3, dtype=F64)}, InputError, r"`baseline` is of shape \(3,\), but \(4,\) for all"),
        ({"baseline": torch.zeros(3, 4, dtype=F64)}, InputError, r"`baseline` is of shape \(3, 4\)"),
        ({"baseline": torch.zeros(4)}, InputError, "`baseline` is of torch.float32 .* the input is of torch.float64"),
        ({"baseline": np.zeros(4)}, InputTypeError, r"`baseline` is an ndarray.*torch.as_tensor\(baseline\)"),
        ({"baseline": "mean"}, InputTypeError, "`baseline` is a str"),
        ({"baseline": math.nan}, NonFiniteError, "in `baseline`"),
        ({"baseline": torch.full((4,), math.inf, dtype=F64)}, NonFiniteError, "in `baseline`"),
        ({"baseline": {"x": 0}}, InputError, r"`baseline\['x'\]` is given, but the structure of `x`"),
        ({"baselines": torch.zeros(4, dtype=F64)}, InputError, r"`baselines` is of shape \(4,\), but \(m, 4\)"),
        ({"baselines": torch.zeros(0, 4, dtype=F64)}, InputError, r"`baselines` is of lengths \[0\]"),
        ({"baselines": torch.zeros(2, 5, dtype=F64)}, InputError, r"`baselines` is of shape \(2, 5\)"),
        ({"baselines": torch.full((2, 4), math.nan, dtype=F64)}, NonFiniteError, "in `baselines`"),
        ({"baselines": torch.zeros(2, 4, dtype=F64), "baseline": 0}, InputError, "`baselines` is given beside"),
        ({"steps": 0}, InputError, "`steps` is 0"),
        ({"steps": 2.5}, InputError, "`steps` is 2.5"),
        ({"steps": "many"}, InputError, "`steps` is 'many', but one of 'auto' or a number of nodes"),
        ({"tolerance": 0}, InputError, "`tolerance` is 0"),
        ({"tolerance": "low"}, InputTypeError, "`tolerance` is 'low'"),
        ({"max_steps": 7}, InputError, "`max_steps` is 7, but a whole number from 8 on"),
        ({"on_failure": "warn"}, InputError, "`on_failure` is 'warn'"),
        ({"batch_size": 0}, InputError, "`batch_size` is 0"),
        ({"mode": "sideways"}, InputError, "`mode` is 'sideways'"),
        ({"at": "nowhere"}, InputError, "`at` is 'nowhere'"),
        ({"target": torch.zeros(3, dtype=torch.long)}, InputError, "`target` is of shape"),
        ({"outputs": 9}, InputError, "`outputs` is 9"),
        ({"out": torch.empty(5, 3, 3, dtype=F64)}, InputError, "`out` is of shape"),
        ({"x": X.numpy()}, InputTypeError, "`x` is an ndarray"),
        ({"x": X[:, :3]}, RuntimeError, "shapes cannot be multiplied"),
        ({"x": torch.full((2, 4), math.nan, dtype=F64)}, NonFiniteError, "in `x`"),
        ({"x": torch.ones(5, 4, dtype=torch.long)}, NotDifferentiableError, "integer inputs have no derivative"),
        ({"model": nn.LazyLinear(3)}, ModelStateError, "lazy"),
        ({"model": nn.Linear}, InputTypeError, "the class Linear"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        integrated_jacobian(**{"model": mlp(4, 8, 3), "x": X, **options})


def test_baselines_of_several_inputs_are_named() -> None:
    model, x = settled(Several()), {"u": draw(4, 3), "v": draw(4, 2), "ids": torch.arange(4)}
    for baseline, words in (
        ({"u": 0.0, "v": 0.0}, r"`baseline\['ids'\]` is missing, .* Pass None"),
        ({"u": 0.0, "w": 0.0, "ids": None}, r"`baseline\['w'\]` is given, .* Did you mean `baseline\['[uv]'\]`"),
        (
            {"u": 0.0, "v": 0.0, "ids": torch.arange(4)},
            r"`baseline\['ids'\]` is given, but that input is of torch.int64",
        ),
        ({"u": draw(2), "v": 0.0, "ids": None}, r"`baseline\['u'\]` is of shape \(2,\)"),
    ):
        with pytest.raises(InputError, match=words):
            integrated_jacobian(model, x, baseline=baseline)
    with pytest.raises(InputError, match=r"`baselines` is of lengths \[2, 3\]"):
        integrated_jacobian(model, x, baselines={"u": draw(2, 3), "v": draw(3, 2), "ids": None})
    with pytest.raises(InputError, match="`baseline` is without a tensor"):
        integrated_jacobian(settled(Words()), torch.ones(2, 3, dtype=torch.long), at="embedding")


def test_a_value_that_is_lost_on_the_way_names_the_sample() -> None:
    x = torch.tensor([[1.0], [-1.0]], dtype=F64)
    with pytest.raises(NonFiniteError, match=r"in output at 0\.\d+ of the way from the baseline to sample 1"):
        integrated_jacobian(lambda x: (x + 0.5).log(), x)
    found = quiet(integrated_jacobian, lambda x: (x + 0.5).log(), x, check_finite=False, on_failure="return")
    assert found.verification is not None
    torch.testing.assert_close(found.values[0], torch.tensor([[math.log(3)]], dtype=F64), rtol=0, atol=1e-6)


# captum


@pytest.mark.parametrize("name", ["GELU", "CNN", "LSTM", "transformer"])
@pytest.mark.parametrize("begin", ["none", "a row each"])
def test_captum_agrees_on_the_same_nodes(name: str, begin: str) -> None:
    attribution = pytest.importorskip("captum.attr")
    make, shape = ALL[name]
    model, x = make(), draw(3, *shape, seed=9)
    baseline = BASELINES[begin](x)
    found = quiet(integrated_jacobian, model, x, baseline=baseline, steps=20)
    theirs = attribution.IntegratedGradients(model)
    for output in range(found.values.shape[1]):
        expected = theirs.attribute(x, baseline, output, n_steps=20, method="gausslegendre")
        torch.testing.assert_close(found.values[:, output], expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
