"""Curvature matrices through the outputs of layers: the same numbers as by products, in far fewer sweeps."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops._operators import Operator
from jacops._operators._dense import DenseAsk
from jacops._operators._target import Target
from jacops._torch.layers import blocks
from jacops._torch.layers.blocks import mirror
from jacops._torch.routes import curvature, gauss_newton
from layer_cases import model_of
from small import draw, settled
from zoo import BY_NAME, ZOO, seeded

VERBS: dict[str, Callable[..., Any]] = {"hessian": jacops.hessian, "ggn": jacops.ggn}
CASES = [case.name for case in ZOO if "hessian" not in case.expect]


@pytest.fixture(autouse=True)
def also_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the route for these small models too, for which products are as fast."""
    for module in (curvature, gauss_newton):
        monkeypatch.setattr(module, "pays", lambda *_: True)


def batch_norm() -> tuple[nn.Module, Tensor]:
    """A model whose samples mix through batch statistics."""
    return settled(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))), draw(4, 5)


def cubic(output: Tensor, y: Tensor) -> Tensor:
    """A loss that is neither convex nor quadratic."""
    return (output - y).square().mean() + output.pow(3).mean()


def by_products(operator: Any) -> Tensor:
    return replace(operator, formed=None).dense()


def route(operator: Any) -> str | None:
    """How the layers made the matrix; None where they did not."""
    told = operator.formed.routes["dense"]
    return told if told.startswith("through") else None


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale or tolerance)


MODELS = (
    *("deep", "one sample", "residual", "tied", "positions first", "positions", "convolutions", "words"),
    *("a product of weights", "an entry per sample", "a weight of weights", "a loop", "batch statistics"),
)
# With a layer whose operand moves with the output of an earlier one.
JOINED = ("deep", "one sample", "residual", "tied", "convolutions", "words", "a loop")


def problem(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = model_of(name) if name != "batch statistics" else batch_norm()
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    return model, x, draw(*model(x).shape, seed=5, dtype=dtype)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_is_the_one_of_products(name: str, verb: str) -> None:
    operator = VERBS[verb](*_asked(name), fallback="silent")
    found, expected = operator.dense(), by_products(operator)
    close(found, expected)
    close(jacops.linalg.diagonal(operator), expected.diagonal())
    assert route(operator) is None or torch.equal(found, found.T)


def _asked(name: str) -> tuple[nn.Module, Any, Tensor, Tensor]:
    model, x, y = problem(name)
    return model, cubic, x, y


@pytest.mark.parametrize("name", ["deep", "residual", "tied", "words"])
def test_the_hessian_is_the_oracles(name: str) -> None:
    model, x, y = problem(name)
    close(jacops.hessian(model, cubic, x, y).dense(), oracle.hessian(model, cubic, x, y))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", CASES)
def test_on_every_model_of_the_zoo(name: str, verb: str) -> None:
    case = BY_NAME[name]
    with warnings.catch_warnings(), seeded():
        warnings.simplefilter("ignore")
        operator = VERBS[verb](case.model(), case.loss, case.x(), case.y(), fallback="silent")
        tolerance = 1e-10 if operator.domain.dtype == torch.float64 else 1e-5
        expected = by_products(operator)
        close(operator.dense(), expected, tolerance)
        coarse = {torch.bfloat16: 0.02, torch.float16: 0.002}.get(operator.domain.dtype, tolerance)
        close(jacops.linalg.diagonal(operator), expected.diagonal(), coarse)


@pytest.mark.parametrize("most", [2**22, 400, 4])
@pytest.mark.parametrize("name", MODELS)
def test_terms_added_up_before_a_product_give_the_same(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    joined, calls = blocks._add_joined, list[str]()

    def counted(matrix: Tensor, fixed: Any, moved: Any, weight: float, given: int) -> None:
        calls.append(name)
        joined(matrix, fixed, moved, weight, min(given, most))

    monkeypatch.setattr(blocks, "_JOINED", 1)
    monkeypatch.setattr(blocks, "_add_joined", counted)
    operator = jacops.hessian(*_asked(name))
    close(operator.dense(), by_products(operator))
    assert bool(calls) == (name in JOINED)
    assert route(operator) or not calls


# ---- what it costs, and what it says -------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "n"), [(5, 4), (5, 64), (50, 4)])
def test_sweeps_do_not_grow_with_samples_or_parameters(inputs: int, n: int) -> None:
    model, x, y = settled(nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, 3))), draw(n, inputs), draw(n, 3)
    H, G = jacops.hessian(model, cubic, x, y), jacops.ggn(model, cubic, x, y)
    operators: list[tuple[Any, int]] = [(H, 7 + 3), (G, 3)]
    for operator, widths in operators:
        operator.dense()
        lin = operator.formed.lin
        before = lin.sweeps
        operator.dense()
        assert lin.sweeps - before <= widths + 3


def test_samples_need_not_come_first() -> None:
    for name in ("positions first", "positions"):
        operator = jacops.hessian(*_asked(name))
        operator.dense()
        assert route(operator) is not None, name


def test_the_repr_says_how_the_matrix_was_made() -> None:
    H = jacops.hessian(*_asked("words"), fallback="silent")
    H.dense()
    assert "dense: through" in repr(H)
    assert "by ordinary sweeps" in repr(H)


def test_a_parameter_without_a_rule_takes_ordinary_sweeps_beside_the_others() -> None:
    operator = jacops.hessian(*_asked("convolutions"), fallback="silent")
    operator.dense()
    assert "parameters by ordinary sweeps" in (route(operator) or "")


def test_too_many_positions_take_ordinary_sweeps() -> None:
    model = settled(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    x, y = draw(3, 40, 2), draw(3, 40, 1)
    operator = jacops.hessian(model, cubic, x, y)
    close(operator.dense(), by_products(operator))
    assert route(operator) is None


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("width", "n", "expected"), [(2, 4, False), (24, 256, True)])
def test_small_matrices_are_left_to_products(
    verb: str, width: int, n: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model = settled(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)))
    operator = VERBS[verb](model, cubic, draw(n, width), draw(n, 2))
    operator.dense()
    assert (route(operator) is not None) == expected


def test_a_dense_call_fills_what_it_is_given() -> None:
    operator = jacops.hessian(*_asked("deep"))
    out = torch.full(operator.shape, torch.nan, dtype=torch.float64)
    assert operator.dense(out) is out
    close(out, by_products(operator))


# ---- never a wrong block -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_block_is_found_by_the_product_with_a_random_direction(verb: str) -> None:
    operator = VERBS[verb](*_asked("deep"))
    prepare = operator.formed.prepare

    class Wrong:
        """Layers that add something of their own."""

        def __init__(self) -> None:
            self.right = prepare()

        def working(self, most: int) -> float:
            return self.right.working(most)

        def add(self, matrix: Tensor, weight: float, most: int) -> str:
            said = self.right.add(matrix, weight, most)
            matrix[3, 5] += 1e-3 * matrix.abs().max()
            return said

    broken = replace(operator, formed=replace(operator.formed, prepare=Wrong))
    close(broken.dense(), by_products(operator))
    assert "products (because by layers it is off a product by" in repr(broken) + str(broken.formed.routes)


def test_samples_that_mix_in_the_loss_are_seen() -> None:
    model, x, y = problem("deep")

    def contrast(output: Tensor, y: Tensor) -> Tensor:
        return (output @ output.T).square().mean() + (output - y).square().mean()

    for verb in VERBS.values():
        operator = verb(model, contrast, x, y)
        close(operator.dense(), by_products(operator))


def test_a_tiny_coupling_of_two_samples_is_no_rounding() -> None:
    model, x, y = problem("deep")

    def coupled(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean() + 1e-6 * (output[0] * output[-1]).sum()

    H = jacops.hessian(model, coupled, x, y)
    close(H.dense(), by_products(H), 1e-12)


def test_second_derivatives_that_are_not_finite_are_refused() -> None:
    model, x, y = problem("deep")
    with pytest.raises(jacops.errors.NonFiniteError, match=r"hessian.*0\.weight"):
        jacops.hessian(model, lambda output, y: (output - y).abs().sqrt().sum(), x, model(x).detach())


@pytest.mark.parametrize("checks", ["first", "always", "never"])
def test_checks_as_asked(checks: str) -> None:
    model, x, y = problem("residual")
    for _ in range(2):
        H = jacops.hessian(model, cubic, x, y, checks=checks)
        close(H.dense(), by_products(H))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("n", "inputs", "outputs"), [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_axes_without_entries(verb: str, n: int, inputs: int, outputs: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on initialising nothing
        model = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    operator = VERBS[verb](model, lambda output, y: output.square().sum(), draw(n, inputs), draw(n, outputs))
    close(operator.dense(), by_products(operator))


def test_float32_is_as_near_as_products() -> None:
    model, x, y = problem("residual", torch.float32)
    exact = oracle.hessian(model, cubic, x, y)
    close(jacops.hessian(model, cubic, x, y).dense().double(), exact, 1e-5)


# ---- diagonals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["deep", "residual", "tied", "words", "a loop", "positions first", "convolutions"])
def test_the_diagonal_is_asked_at_the_outputs_of_layers(name: str, verb: str) -> None:
    operator = VERBS[verb](*_asked(name), fallback="silent")
    jacops.linalg.diagonal(operator)
    assert "outputs of layers" in operator.formed.routes["diagonal"]


def test_a_diagonal_costs_sweeps_by_widths_or_outputs() -> None:
    model, x, y = settled(nn.Sequential(nn.Linear(50, 7), nn.Tanh(), nn.Linear(7, 3))), draw(64, 50), draw(64, 3)
    operators: list[tuple[Any, int]] = [(jacops.hessian(model, cubic, x, y), 7 + 3)]
    operators.append((jacops.ggn(model, lambda output, y: (output - y).pow(4).sum(), x, y), 3))
    for operator, most in operators:
        jacops.linalg.diagonal(operator)
        before = operator.formed.lin.sweeps
        jacops.linalg.diagonal(operator)
        assert operator.formed.lin.sweeps - before <= most + 3


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("entry", [0, -1])
def test_a_wrong_diagonal_is_found_by_products(verb: str, entry: int) -> None:
    operator = VERBS[verb](*_asked("deep"))

    def wrong(most: int) -> Any:
        diagonal, route = operator.formed.entries(most)
        where = operator.domain.slices[entry]
        diagonal[where] *= 1.01
        return diagonal, route

    broken = replace(operator, formed=replace(operator.formed, entries=wrong))
    close(jacops.linalg.diagonal(broken), by_products(operator).diagonal())
    assert "by products (because by layers it is off a product by" in operator.formed.routes["diagonal"]


def test_diagonals_of_sums_over_data_and_their_weight_decay() -> None:
    model, x, y = problem("residual")
    problem_ = jacops.Problem(model, F.mse_loss, [(x[:4], y[:4]), (x[4:], y[4:])], l2=0.1)
    for kind in ("hessian", "ggn", "fisher", "empirical_fisher"):
        operator = problem_.curvature(kind)
        close(jacops.linalg.diagonal(2.0 * operator), 2.0 * operator.dense().diagonal())


# ---- sums over batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["deep", "words", "a weight of weights"])
def test_batches_add_up_in_place(name: str, verb: str) -> None:
    model, x, y = problem(name)
    batches = [(x[:4], y[:4], 0.25), (x[4:], y[4:], 2.0)]
    operators: list[tuple[Operator, float]] = [
        (VERBS[verb](model, cubic, a, b, fallback="silent"), weight) for a, b, weight in batches
    ]
    total = torch.zeros(operators[0][0].shape, dtype=torch.float64)
    for operator, weight in operators:
        DenseAsk(operator).fill(Target(total, weight, adds=True, half=True))
    expected = torch.stack([weight * by_products(operator) for operator, weight in operators]).sum(0)
    close(mirror(total), expected)


@pytest.mark.parametrize("size", [1, 7, 300])
def test_mirror(size: int) -> None:
    half = draw(size, size)
    torch.testing.assert_close(mirror(half.clone()), half + half.T)


def test_large_batches_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauss_newton, "_STRIPE", 64)
    for model in ("deep", "residual", "words", "convolutions", "positions first"):
        for verb in VERBS.values():
            operator = verb(*_asked(model), fallback="silent")
            pieces = replace(operator, formed=replace(operator.formed, most=64))
            close(pieces.dense(), by_products(operator))


def test_bytes_of_a_known_graph_are_measured_once(monkeypatch):
    """Batches of one shape, and later calls, are planned by what the first measured."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(12, 6)
    data = [(part, torch.arange(4) % 3) for part in x.split(4)]
    counted: list[int] = []
    kind, working = curvature.HessianLayers, curvature.HessianLayers.working
    monkeypatch.setattr(kind, "working", lambda self, most: (counted.append(most), working(self, most))[1])
    found = [jacops.Problem(model, F.cross_entropy, data).hessian().dense(budget="64MiB") for _ in range(3)]
    assert counted
    assert len(counted) <= 3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
