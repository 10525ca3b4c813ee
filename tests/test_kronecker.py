"""Kronecker factors: their definition by plain autograd, exactness where it holds, and what is built of them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacops
import layer_cases
from jacops import Problem, kronecker_factors
from jacops.errors import InputError, InputTypeError
from jacops.results import KroneckerFactors
from jacops.solvers import EKFAC, _kronecker_passes
from jacops.testing import check_operator
from small import draw, settled

F64 = torch.float64
LOSSES: dict[str, tuple[Any, Tensor]] = {
    "squares": (nn.MSELoss(), draw(6, 3)),
    "summed squares": (nn.MSELoss(reduction="sum"), draw(6, 3)),
    "classes": (nn.CrossEntropyLoss(), torch.arange(6) % 3),
    "summed classes": (nn.CrossEntropyLoss(reduction="sum"), torch.arange(6) % 3),
}


class Tokens(nn.Module):
    """A linear layer at every position, whose outputs are averaged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(2).mean(2) if x.ndim == 4 else self.layer(x).mean(1)


def layer(bias: bool = True) -> nn.Module:
    return settled(nn.Linear(4, 3, bias=bias))


def block(factors: KroneckerFactors, name: str) -> Tensor:
    """Return what the factors say of a weight."""
    return torch.kron(*factors[name])


def root(loss: Any, output: Tensor, y: Tensor) -> Tensor:
    """Return directions `(columns, n, k)` whose squares are the Hessian of the loss by the output."""
    hessian = torch.func.hessian(lambda flat: loss(flat.view_as(output), y))(output.flatten())
    values, vectors = torch.linalg.eigh(hessian)
    return (vectors * values.clamp_min(0).sqrt()).T.reshape(-1, *output.shape)


# ---- the definition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_a_linear_layer_over_many_samples_has_the_defining_sums(name: str, bias: Any) -> None:
    loss, y = LOSSES[name]
    model, x = layer(), draw(6, 4)
    factors = kronecker_factors(model, loss, x, y, bias=bias)
    hessian = torch.func.hessian(lambda z: loss(z, y))(model(x).detach()).detach()
    B = torch.stack([hessian[n, :, n] for n in range(6)]).sum(0)
    seen = torch.cat([x, torch.ones(6, 1, dtype=F64)], 1) if bias == "joint" else x
    torch.testing.assert_close(factors["weight"][0], B, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(factors["weight"][1], seen.T @ seen / 6, rtol=1e-12, atol=1e-14)
    assert list(factors) == (["weight"] if bias == "joint" else ["weight", "bias"])
    if bias == "separate":
        torch.testing.assert_close(block(factors, "bias"), B, rtol=1e-10, atol=1e-14)


def positions(model: Tokens, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs `(n, t, in)` and outputs of the layer as leaves `(n, t, out)`."""
    if x.ndim == 4:
        a = nn.functional.unfold(x, model.layer.kernel_size).mT  # type: ignore[arg-type]
        return a, model.layer(x).flatten(2).mT
    return x, model.layer(x)


SHARED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "tokens": (lambda: nn.Linear(4, 3), draw(6, 5, 4)),
    "pixels": (lambda: nn.Conv2d(2, 3, 2), draw(6, 2, 3, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_positions_are_expanded_or_reduced(name: str, case: str, sharing: Any, kind: Any) -> None:
    loss, y = LOSSES[name]
    make, x = SHARED[case]
    model = Tokens(settled(make()))
    factors = kronecker_factors(model, loss, x, y, kind=kind, sharing=sharing, bias="separate")
    a, z = (part.detach() for part in positions(model, x))
    z.requires_grad_()
    output = z.mean(1)
    if kind == "ggn":
        seeds = root(loss, output.detach(), y)
    else:
        terms = 3 if isinstance(loss, nn.MSELoss) else 1
        mean = loss.reduction == "mean"
        own = torch.autograd.grad(loss(output, y) * (6 * terms if mean else 1), output, retain_graph=True)[0]
        seeds = own.unsqueeze(0) / math.sqrt(6 * terms if mean else 1)
    deltas = [torch.autograd.grad(output, z, seed, retain_graph=True)[0] for seed in seeds]
    if sharing == "reduce":
        a, deltas = a.mean(1, keepdim=True), [delta.sum(1, keepdim=True) for delta in deltas]
    B = sum(torch.einsum("nti,ntj->ij", delta, delta) for delta in deltas)
    A = torch.einsum("nti,ntj->ij", a, a) / a.shape[:2].numel()
    torch.testing.assert_close(factors["layer.weight"][0], B, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(factors["layer.weight"][1], A, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(block(factors, "layer.bias"), B, rtol=1e-9, atol=1e-14)


# ---- where it is exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_one_sample_of_a_linear_layer_is_exact(name: str) -> None:
    loss, y = LOSSES[name]
    model, x = layer(bias=False), draw(1, 4)
    exact = jacops.ggn(model, loss, x, y[:1]).dense()
    torch.testing.assert_close(block(kronecker_factors(model, loss, x, y[:1]), "weight"), exact)


@pytest.mark.parametrize("case", SHARED)
def test_reduce_is_exact_for_a_layer_whose_outputs_are_averaged(case: str) -> None:
    make, x = SHARED[case]
    model, (loss, y) = Tokens(settled(make())), LOSSES["squares"]
    exact = jacops.ggn(model, loss, x, y).dense()
    found = kronecker_factors(model, loss, x, y, sharing="reduce").to_operator()
    torch.testing.assert_close(found.dense(), exact, rtol=1e-9, atol=1e-13)
    expanded = kronecker_factors(model, loss, x, y).to_operator().dense()
    assert float((expanded - exact).norm() / exact.norm()) > 1e-2


# ---- every kind of weight ----------------------------------------------------------------------------------------

NAMES = ("without bias", "mixed tokens", "called twice", "words", "convolutions", "depthwise", "tied embedding",
         "lstm", "turned and used both ways", "no layer at all")  # fmt: skip


def problem(name: str, cuts: tuple[int, ...] = ()) -> Problem:
    make, x = layer_cases.MODELS[name]
    y = torch.arange(9) * 2 % 3
    parts = zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True)
    return Problem(settled(make()).eval(), nn.CrossEntropyLoss(), list(parts))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_the_operator_is_made_of_the_factors(name: str, sharing: Any, bias: Any) -> None:
    of = problem(name)
    factors = kronecker_factors(of, sharing=sharing, bias=bias)
    operator = factors.to_operator()
    check_operator(operator)
    matrix, space = operator.dense(), of.space
    for key, (B, A) in factors.items():
        groups = B.shape[0] if B.ndim == 3 else 1
        if bias == "joint" and groups * A.shape[-1] * B.shape[-1] > space.shapes[space.names.index(key)].numel():
            continue  # its bias stands elsewhere in the flat vector
        where = space.slices[space.names.index(key)]
        sides = [side.diag() if side.ndim == 1 else side for side in (B, A)]
        parts = zip(*(side if side.ndim == 3 else [side] for side in sides), strict=True)
        expected = torch.block_diag(*(torch.kron(*pair) for pair in parts))
        torch.testing.assert_close(matrix[where, where], expected, rtol=1e-8, atol=1e-13)
    covered = [n for n in space.names if n in factors]
    assert covered == list(factors)
    assert bias == "joint" or covered == list(space.names)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_batches_and_parts_of_the_data_add_up(name: str, sharing: Any) -> None:
    whole = kronecker_factors(problem(name), sharing=sharing)
    split = kronecker_factors(problem(name, (2, 7)), sharing=sharing)
    make, x = layer_cases.MODELS[name]
    model, y = settled(make()).eval(), torch.arange(9) * 2 % 3
    first, rest = (
        kronecker_factors(model, nn.CrossEntropyLoss(), x[some], y[some], sharing=sharing)
        for some in (slice(0, 4), slice(4, 9))
    )
    joined = 4 / 9 * first + rest * (5 / 9)
    for key, pair in whole.items():
        for other in (split, joined):
            for side, expected in zip(other[key], pair, strict=True):
                torch.testing.assert_close(side, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_ek_fac_is_built_from_them(name: str) -> None:
    exact = problem(name).ggn()
    factors = kronecker_factors(problem(name), weighted=True)
    expected = EKFAC().approximate(exact).dense()
    torch.testing.assert_close(EKFAC().approximate(exact, factors).dense(), expected, rtol=1e-8, atol=1e-12)
    alone = EKFAC(corrected=False).approximate(exact).dense()
    torch.testing.assert_close(factors.to_operator().dense(), alone, rtol=1e-8, atol=1e-12)


def test_draws_come_near_and_say_how_near() -> None:
    make, x = layer_cases.MODELS["mixed tokens"]
    of, y = settled(make()).eval(), torch.arange(9) % 3
    exact = kronecker_factors(of, nn.CrossEntropyLoss(), x, y).to_operator().dense()
    drawn = [kronecker_factors(of, nn.CrossEntropyLoss(), x, y, kind="monte_carlo", draws=k) for k in (1, 400)]
    errors = [float((own.to_operator().dense() - exact).norm() / exact.norm()) for own in drawn]
    assert errors[1] < 0.1 < errors[0]
    one, many = (own.noise or 0.0 for own in drawn)
    assert 0 < many < one
    assert (2.0 * drawn[0]).noise == pytest.approx(one)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"kind": "hessian"}, {"bias": "none"}, {"sharing": "sum"}, {"draws": 0}])
def test_unknown_options_are_refused(options: Any) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        kronecker_factors(problem("words"), **options)


def test_a_problem_brings_its_own_data() -> None:
    with pytest.raises(InputTypeError, match="has its own"):
        kronecker_factors(problem("words"), nn.CrossEntropyLoss())
    with pytest.raises(InputTypeError, match="loss"):
        kronecker_factors(layer())


def test_factors_made_otherwise_do_not_add() -> None:
    expand, reduce = (kronecker_factors(problem("words"), sharing=way) for way in ("expand", "reduce"))
    with pytest.raises(InputError, match="made as the first"):
        expand.__add__(reduce)
    with pytest.raises(InputError, match="factors"):
        EKFAC().approximate(problem("lstm").ggn(), expand)
    with pytest.raises(KeyError):
        expand["nothing"]


# ---- what is remembered ------------------------------------------------------------------------------------------


def weighted_classes() -> tuple[nn.Module, Any, Tensor, Tensor]:
    """Return a classifier whose labels weigh unequally, and some not at all."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=F64))
    return layer(), loss, draw(6, 4), torch.tensor([0, 1, -100, 2, 1, 0])


@pytest.mark.parametrize("kind", ["ggn", "empirical", "monte_carlo"])
def test_a_call_that_relies_on_proofs_returns_what_the_first_one_does(kind: Any) -> None:
    model, loss, x, y = weighted_classes()
    first = dict(kronecker_factors(model, loss, x, y, kind=kind))
    for _ in range(3):
        again = dict(kronecker_factors(model, loss, x, y, kind=kind))
        for name, pair in first.items():
            for before, after in zip(pair, again[name], strict=True):
                torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


def test_weights_of_labels_that_change_show_at_once() -> None:
    model, loss, x, y = weighted_classes()
    for _ in range(2):
        kronecker_factors(model, loss, x, y)
    loss.weight.copy_(torch.tensor([3.0, 0.25, 1.0]))
    _, other, _, _ = weighted_classes()
    other.weight.copy_(loss.weight)
    for found, expected in zip(
        kronecker_factors(model, loss, x, y)["weight"], kronecker_factors(model, other, x, y)["weight"], strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_a_factor_of_the_loss_that_changes_shows_at_once(kind: Any) -> None:
    class Scaled(nn.CrossEntropyLoss):
        scale = torch.ones((), dtype=F64)

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.scale * super().forward(input, target)

    model, loss, x, y = layer(), Scaled(), draw(6, 4), torch.arange(6) % 3
    before = [kronecker_factors(model, loss, x, y, kind=kind)["weight"][0] for _ in range(2)][-1]
    loss.scale.fill_(2.0)
    after = kronecker_factors(model, loss, x, y, kind=kind)["weight"][0]
    torch.testing.assert_close(after, before * (2 if kind == "ggn" else 4))


def test_a_remembered_hessian_takes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from jacops.solvers._output_loss import LossAtOutput

    model, loss, x, y = weighted_classes()
    kronecker_factors(model, loss, x, y)
    monkeypatch.setattr(LossAtOutput, "_products", lambda *_: pytest.fail("a product was taken"))
    kronecker_factors(model, loss, x, y)


def test_factors_that_are_written_into_stay_the_same_in_the_mapping() -> None:
    model, loss, x, y = weighted_classes()
    factors = kronecker_factors(model, loss, x, y)
    kept = [side.clone() for side in factors["weight"]]
    for side in factors["weight"]:
        side.mul_(2)
    for side, before in zip(factors["weight"], kept, strict=True):
        assert torch.equal(side, before)


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("width", [255, 256, 300])
def test_single_precision_agrees_with_sums_in_double(width: int, bias: Any) -> None:
    # Sides are summed in strips of 256 rows, and a bias is one row more.
    model, x, y = settled(nn.Linear(width, 4)).float(), draw(64, width).float(), torch.arange(64) % 4
    left, right = kronecker_factors(model, nn.CrossEntropyLoss(), x, y, kind="empirical", bias=bias)["weight"]
    rows = x.double()
    rows = torch.cat([rows, torch.ones(64, 1, dtype=F64)], 1) if bias == "joint" else rows
    slope = model.double()(x.double()).softmax(1).detach() - nn.functional.one_hot(y, 4)
    for found, expected in ((left, slope.T @ slope / 64), (right, rows.T @ rows / 64)):
        assert found.is_contiguous()
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["ggn", "monte_carlo", "empirical"])
def test_factors_do_not_depend_on_how_many_cotangents_are_swept_together(
    kind: Any, sharing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [nn.Embedding(5, 6), nn.Unflatten(1, (1, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(72, 3)).double()
    x, y = torch.randint(5, (7, 4)), torch.randint(3, (7,))

    def call() -> dict[str, tuple[Tensor, Tensor]]:
        return dict(kronecker_factors(model, nn.functional.cross_entropy, x, y, kind=kind, sharing=sharing))

    wanted = call()
    monkeypatch.setattr(_kronecker_passes, "_SWEEP_ENTRIES", 1)
    found = call()
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        for a, b in zip(found[name], pair, strict=True):
            torch.testing.assert_close(a, b)
