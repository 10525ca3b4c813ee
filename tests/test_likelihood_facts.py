"""What a loss is, is a fact: marks, likelihoods, scales and draws against eigenvalues and sums over all labels."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops import Problem, TorchTwiceDifferentiable, compute_influences, ggn, solve
from jacops._fisher import fisher
from jacops.errors import InputError
from jacops.solvers import EKFAC, MINRES, Lanczos
from small import draw, settled

F64 = torch.float64
Loss = Callable[[Any, Any], Tensor]


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def lowest(operator: jacops.linalg.Operator) -> float:
    """The lowest eigenvalue, relative to the largest."""
    values = torch.linalg.eigvalsh(operator.dense().double())
    return float(values[0] / values.abs().max().clamp_min(1e-300))


def labels(*shape: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


# ---- positive by facts -------------------------------------------------------------------------------------------


class FocalLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        entropy = F.cross_entropy(input, target, reduction="none")
        return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


class ConcaveSquares(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return -super().forward(input, target)


class Adapter(nn.CrossEntropyLoss):
    def forward(self, input: Any, target: Tensor) -> Tensor:
        return super().forward(input["logits"], target)


class Wrapped(nn.Module):
    def __init__(self, of: nn.Module):
        super().__init__()
        self.of = of

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.of(output, y)


def called(name: str, loss: Loss) -> Loss:
    loss.__name__ = name
    return loss


def patched() -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda output, y: -F.cross_entropy(output, y)  # type: ignore[method-assign]
    return loss


def hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, args, value: -value)
    return loss


def one_row_bends_down(output: Tensor, y: Tensor) -> Tensor:
    factors = torch.ones(len(y), 1, dtype=output.dtype)
    factors[3] = -1e-9 if output.dtype == F64 else -1e-5
    return (factors * (output - y) ** 2).mean()


CLASSES, REAL, BITS = labels(12, classes=3), draw(12, 3, seed=1), labels(12, 3, classes=2).double()
SURE = 6.0  # logits of a model that is sure, and often wrong
NOT_POSITIVE: dict[str, tuple[Loss, Tensor]] = {
    "a focal loss that descends from cross-entropy": (FocalLoss(), CLASSES),
    "squares with another sign": (ConcaveSquares(), REAL),
    "a function called huber_loss": (called("huber_loss", lambda o, y: -((o - y) ** 2).mean()), REAL),
    "a function called cross_entropy": (called("cross_entropy", lambda o, y: -F.cross_entropy(o, y)), CLASSES),
    "a patched forward": (patched(), CLASSES),
    "a hook": (hooked(), REAL),
    "a module that wraps one": (Wrapped(FocalLoss()), CLASSES),
    "negative class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, -3.0, 1.0], dtype=F64)), CLASSES),
    "negative targets": (nn.CrossEntropyLoss(), -REAL.abs()),
    "targets outside 0 and 1": (nn.BCEWithLogitsLoss(pos_weight=torch.full((3,), 9.0, dtype=F64)), -REAL.abs()),
    "negative element weights": (nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, -1.0, 1.0], dtype=F64)), BITS),
    "counts without a logarithm": (lambda o, y: nn.PoissonNLLLoss(log_input=False)(F.softplus(o), y), -REAL.abs()),
    "a variance": (lambda o, y: F.gaussian_nll_loss(o[:, :1], y[:, :1], F.softplus(o[:, 1:2])), REAL),
    "cosines": (lambda o, y: F.cosine_embedding_loss(o, y, torch.ones(len(o), dtype=o.dtype)), REAL),
    "one row of small scale": (one_row_bends_down, REAL),
    "a loss that mixes samples": (lambda o, y: ((o - y) ** 2).mean() - 3 * ((o.mean(0)) ** 2).sum(), REAL),
}
POSITIVE: dict[str, tuple[Loss, Tensor]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), CLASSES),
    "smoothed and weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0], dtype=F64), label_smoothing=0.2),
        CLASSES,
    ),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "the function": (F.cross_entropy, CLASSES),
    "a partial": (functools.partial(F.cross_entropy, label_smoothing=0.1), CLASSES),
    "a lambda": (lambda o, y: F.cross_entropy(o, y), CLASSES),
    "probabilities": (nn.CrossEntropyLoss(), REAL.softmax(1)),
    "one's own squares": (lambda o, y: 3 * ((o - y) ** 2).sum(1).mean(), REAL),
    "squares of differences": (lambda o, y: ((o[:, 1:] - o[:, :-1] - y[:, 1:]) ** 2).mean(), REAL),
    "a wrapped one": (Wrapped(nn.HuberLoss()), REAL),
    "logistic": (nn.BCEWithLogitsLoss(), BITS),
    "logistic of probabilities": (lambda o, y: F.binary_cross_entropy(o.sigmoid() * 0.98 + 0.01, y), BITS),
    "linear": (nn.L1Loss(), REAL),
    "counts": (nn.PoissonNLLLoss(), REAL.abs()),
    "soft margin": (nn.SoftMarginLoss(), 2 * BITS - 1),
    "penalised": (lambda o, y: F.cross_entropy(o, y) + (o**2).mean(), CLASSES),
}


def confident(dtype: torch.dtype = F64) -> tuple[nn.Module, Tensor]:
    model = settled(nn.Linear(4, 3))
    return model.to(dtype), (SURE * draw(12, 4, seed=5)).to(dtype)


def narrowed(loss: Loss, y: Tensor, dtype: torch.dtype) -> tuple[Loss, Tensor]:
    own = copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss
    return own, y.to(dtype) if y.is_floating_point() else y


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", NOT_POSITIVE)
def test_no_matrix_with_a_negative_eigenvalue_is_marked_positive(name: str, dtype: torch.dtype) -> None:
    model, x = confident(dtype)
    loss, y = narrowed(*NOT_POSITIVE[name], dtype)
    assert not ggn(model, loss, x, y).positive


@pytest.mark.parametrize(
    "name", [n for n in NOT_POSITIVE if not any(w in n for w in ("mixes", "small", "class weights"))]
)
def test_the_whole_objective_agrees(name: str) -> None:
    model, x = confident()
    loss, y = NOT_POSITIVE[name]
    found = Problem(model, loss, [(x[:5], y[:5]), (x[5:], y[5:])]).ggn()
    assert not found.positive
    assert "positive" not in repr(found)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", POSITIVE)
def test_convex_losses_are_marked_however_they_are_written(name: str, dtype: torch.dtype) -> None:
    model, x = confident(dtype)
    loss, y = narrowed(*POSITIVE[name], dtype)
    alone = ggn(model, loss, x / SURE, y)
    assert alone.positive
    assert lowest(alone) > (-1e-12 if dtype == F64 else -1e-5)
    assert Problem(model, loss, [(x[:5] / SURE, y[:5]), (x[5:] / SURE, y[5:])]).ggn().positive


def test_the_mark_is_of_all_batches_not_of_the_first() -> None:
    model, x = confident()
    loss = lambda o, y: (y.sign() * (o - y) ** 2).mean()  # noqa: E731 - bends down where targets are negative
    found = Problem(model, loss, [(x[:6], REAL[:6].abs()), (x[6:], -REAL[6:].abs())]).ggn()
    assert ggn(model, loss, x[:6], REAL[:6].abs()).positive
    assert not found.positive


def test_the_mark_is_of_the_loss_that_was_recorded() -> None:
    model, x = confident()
    loss = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=F64))
    assert ggn(model, loss, x, CLASSES).positive
    torch.as_tensor(loss.weight)[1] = -3
    assert not ggn(model, loss, x, CLASSES).positive


@pytest.mark.parametrize("whole", [False, True])
def test_no_error_bound_rests_on_a_loss_that_is_not_convex(whole: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), 5 * draw(30, 4)
    y = model(x).argmin(1)
    A = Problem(model, FocalLoss(), [(x, y)]).ggn() if whole else ggn(model, FocalLoss(), x, y)
    values = torch.linalg.eigvalsh(A.dense())
    assert values[0] < -1e-2
    for solver in (MINRES(tolerance=1e-3), Lanczos(rank=6, indefinite=True)):
        found = solve(A, draw(15), solver, damping=float(-values[0]) + 1e-5, on_failure="return")
        assert "error_bound" not in found.info


def test_error_bounds_hold_where_there_are_some() -> None:
    model, x = confident()
    for loss, y in (POSITIVE["a lambda"], POSITIVE["penalised"], POSITIVE["cross-entropy"]):
        A = ggn(model, loss, x, y)
        found = solve(A, draw(15), MINRES(tolerance=1e-3), damping=1e-2)
        exact = torch.linalg.solve(A.dense() + 1e-2 * torch.eye(15, dtype=F64), draw(15))
        assert float((found.x[0] - exact).norm()) <= float(found.info["error_bound"][0])


class Tokens(nn.Module):
    """Logits by position: classes second, as torch's cross-entropy has them, or last in a dict."""

    def __init__(self, classes: int, named: bool = False, width: int = 2):
        super().__init__()
        self.inner, self.named = nn.Linear(width, classes), named

    def forward(self, x: Tensor) -> Any:
        logits = self.inner(x).transpose(1, 2)
        return {"hidden": x, "logits": logits} if self.named else logits


@pytest.mark.parametrize("classes", [4, 300])
def test_outputs_of_tokens_and_in_parts(classes: int) -> None:
    model, x = settled(Tokens(classes, named=True)), draw(6, 5, 2)
    y = labels(6, 5, classes=classes)
    y[1, 3:] = -100
    for loss in (Adapter(), lambda o, y: F.cross_entropy(o["logits"], y)):
        assert ggn(model, loss, x, y).positive
        assert Problem(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])]).ggn().positive
    assert not ggn(model, lambda o, y: -F.cross_entropy(o["logits"], y), x, y).positive


def test_printing_an_objective_takes_no_pass_over_the_data() -> None:
    model, x = confident()
    calls = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        calls.append(len(y))
        return ((output - y) ** 2).mean()

    found = Problem(model, loss, [(x[:5], REAL[:5]), (x[5:], REAL[5:])]).ggn()
    before = len(calls)
    repr(found)
    assert len(calls) == before
    assert found.positive
    assert "positive" in repr(found)


# ---- likelihoods by facts ----------------------------------------------------------------------------------------


def test_a_loss_that_shares_a_name_has_its_own_variance() -> None:
    model, x, y = settled(nn.Linear(3, 1, bias=False)), draw(40, 3), draw(40, 1, seed=1)
    thrice = called("mse_loss", lambda o, y: 3 * ((o - y) ** 2).mean())
    exact = fisher(model, thrice, x, y).dense()
    close(exact, 6 * x.T @ x / 40)
    drawn = fisher(model, thrice, x, y, kind="monte_carlo", samples=4000).dense()
    assert float((drawn - exact).norm() / exact.norm()) < 0.05
    close(fisher(model, thrice, x).dense(), exact)


NO_LIKELIHOODS: dict[str, tuple[Loss, Tensor]] = {
    "focal": (FocalLoss(), CLASSES),
    "called mse_loss": (called("mse_loss", lambda o, y: ((o - y) ** 4).mean()), REAL),
    "called cross_entropy": (called("cross_entropy", lambda o, y: F.multi_margin_loss(o, y)), CLASSES),
    "patched": (patched(), CLASSES),
    "huber": (F.huber_loss, REAL),
    "huber, wide": (lambda o, y: F.huber_loss(o, y, delta=50.0), REAL),
    "weighted": (lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([1.0, 2, 3]).double()), CLASSES),
    "pos_weight": (functools.partial(F.binary_cross_entropy_with_logits, pos_weight=torch.ones(3) * 2.0), BITS),
}


@pytest.mark.parametrize("kind", ["exact", "monte_carlo"])
@pytest.mark.parametrize("name", NO_LIKELIHOODS)
def test_what_is_no_likelihood_is_refused_whatever_its_name(name: str, kind: Any) -> None:
    model, x = confident()
    loss, y = NO_LIKELIHOODS[name]
    for targets in (y, None):
        with pytest.raises(InputError, match="known likelihood"):
            fisher(model, loss, x, targets, kind=kind)
    with pytest.raises(InputError, match="known likelihood|`reduction`"):
        Problem(model, loss, [(x, y)]).fisher(kind)


# ---- one scale for all kinds: sums over all labels ------------------------------------------------------------------


def categorical(logits: Tensor, counted: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Yield every labelling of the positions that count, with its probability; others are ignored."""
    chance = logits.softmax(1).movedim(1, -1)[counted]
    for picked in itertools.product(range(logits.shape[1]), repeat=len(chance)):
        y = torch.full(counted.shape, -100)
        y[counted] = torch.tensor(picked)
        yield float(chance[range(len(chance)), list(picked)].prod()), y


def bits(logits: Tensor) -> Iterator[tuple[float, Tensor]]:
    p = logits.sigmoid().flatten()
    for picked in itertools.product((0.0, 1.0), repeat=len(p)):
        y = torch.tensor(picked, dtype=F64)
        yield float((y * p + (1 - y) * (1 - p)).prod()), y.view_as(logits)


def normal(output: Tensor, variance: float) -> Iterator[tuple[float, Tensor]]:
    """Two labels per entry have the mean and the variance of a Gaussian, which is all that squares of slopes see."""
    steps = list(itertools.product((-1.0, 1.0), repeat=output.numel()))
    for signs in steps:
        yield 1 / len(steps), output + variance**0.5 * torch.tensor(signs, dtype=F64).view_as(output)


FLAT, SEQUENCE = torch.ones(3, dtype=torch.bool), torch.tensor([[True, True], [True, False], [False, False]])
OWN_SQUARES = lambda o, y: ((o - y) ** 2).sum(1).mean()  # noqa: E731 - a mean over rows of sums
SCALES: dict[str, tuple[Loss, Callable[[Tensor], Iterator[tuple[float, Tensor]]], bool]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda f: categorical(f, FLAT), False),
    "cross-entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), lambda f: categorical(f, FLAT), False),
    "the function": (F.cross_entropy, lambda f: categorical(f, FLAT), False),
    "a lambda": (lambda o, y: F.cross_entropy(o, y), lambda f: categorical(f, FLAT), False),
    "tokens": (nn.CrossEntropyLoss(), lambda f: categorical(f, SEQUENCE), True),
    "tokens, sum": (nn.CrossEntropyLoss(reduction="sum"), lambda f: categorical(f, SEQUENCE), True),
    "tokens, unreduced": (nn.CrossEntropyLoss(reduction="none"), lambda f: categorical(f, SEQUENCE), True),
    "tokens, a lambda": (lambda o, y: F.cross_entropy(o, y), lambda f: categorical(f, SEQUENCE), True),
    "tokens, a lambda's sum": (
        lambda o, y: F.cross_entropy(o, y, reduction="sum"),
        lambda f: categorical(f, SEQUENCE),
        True,
    ),
    "squares": (nn.MSELoss(), lambda f: normal(f, 0.5), False),
    "squares, sum": (nn.MSELoss(reduction="sum"), lambda f: normal(f, 0.5), False),
    "squares, the function": (F.mse_loss, lambda f: normal(f, 0.5), False),
    "squares, summed by rows": (OWN_SQUARES, lambda f: normal(f, 0.5), False),
    "half squares": (lambda o, y: 0.5 * F.mse_loss(o, y), lambda f: normal(f, 1.0), False),
    "logistic": (nn.BCEWithLogitsLoss(), bits, False),
    "logistic, a lambda": (lambda o, y: F.binary_cross_entropy_with_logits(o, y), bits, False),
}


def scaled(name: str) -> tuple[nn.Module, Tensor, Loss, list[tuple[float, Tensor]]]:
    """Return a model, its input, a loss, and every labelling with its probability."""
    loss, all_labels, tokens = SCALES[name]
    model, x = (settled(Tokens(2)), draw(3, 2, 2)) if tokens else (settled(nn.Linear(2, 2)), draw(3, 2))
    with torch.no_grad():
        return model, x, loss, list(all_labels(model(x)))


@pytest.mark.parametrize("name", SCALES)
def test_the_empirical_fisher_is_the_exact_one_on_average_over_the_models_labels(name: str) -> None:
    model, x, loss, every = scaled(name)
    assert sum(chance for chance, _ in every) == pytest.approx(1, abs=1e-12)
    mean = sum(chance * fisher(model, loss, x, y, kind="empirical").dense() for chance, y in every if chance)
    exact = fisher(model, loss, x, every[0][1]).dense() if "unreduced" not in name else None
    if exact is None:  # one number is needed of a loss for one batch; it is as the mean
        exact = fisher(model, nn.CrossEntropyLoss(), x, every[0][1]).dense()
    close(torch.as_tensor(mean), exact)


@pytest.mark.parametrize("name", [n for n in SCALES if "lambda's" not in n])
def test_all_calls_agree_on_the_scale(name: str) -> None:
    model, x, loss, every = scaled(name)
    y = every[1][1]
    one = fisher(model, loss, x, y, kind="empirical")
    close(jacops.linalg.diagonal(one), one.dense().diagonal())
    whole = Problem(model, loss, [(x, y)])
    parts = Problem(model, loss, [(x[:1], y[:1]), (x[1:], y[1:])])
    close(whole.fisher("empirical").dense(), one.dense())
    close(parts.fisher("empirical").dense(), one.dense())
    traces = [
        float(EKFAC(fisher="empirical").approximate(problem.ggn()).eigenvalues.sum()) for problem in (whole, parts)
    ]
    assert traces == pytest.approx(2 * [float(one.dense().trace())], rel=1e-9)
    scores = compute_influences(
        TorchTwiceDifferentiable(model, loss),
        [(x[:1], y[:1]), (x[1:], y[1:])],
        curvature="empirical_fisher",
        damping=0.3,
        solver="direct",
    ).values
    G = whole.sample_gradients().dense()
    close(scores, G @ torch.linalg.solve(one.dense() + 0.3 * torch.eye(one.shape[0], dtype=F64), G.T))


@pytest.mark.parametrize("name", SCALES)
def test_drawn_labels_have_the_same_scale(name: str) -> None:
    model, x, loss, every = scaled(name)
    y = every[0][1]
    exact = ggn(model, loss, x, y).dense() if "unreduced" not in name else fisher(model, loss, x, y).dense()
    drawn = fisher(model, loss, x, y, kind="monte_carlo", samples=3000).dense()
    assert float((drawn - exact).norm() / exact.norm()) < 0.1


def test_the_empirical_fisher_of_weighted_and_other_losses_is_the_formula() -> None:
    model, x = settled(nn.Linear(4, 3)), draw(6, 4)
    y, weight = labels(6, classes=3), torch.tensor([1.0, 0.5, 3.0], dtype=F64)
    for loss, targets, terms in (
        (nn.CrossEntropyLoss(weight=weight), y, weight[y]),
        (nn.L1Loss(), REAL[:6], torch.full((6,), 3.0, dtype=F64)),
        (nn.HuberLoss(reduction="sum"), REAL[:6], None),
        (lambda o, y: ((o - y) ** 4).mean(), REAL[:6], torch.ones(6, dtype=F64)),
    ):
        G = jacops.sample_gradients(model, loss, x, targets).dense()
        rows, total = (G, 1.0) if terms is None else (G * terms.unsqueeze(1), float(terms.sum()))
        expected = rows.T @ rows / total
        close(fisher(model, loss, x, targets, kind="empirical").dense(), expected)
        parts = Problem(model, loss, [(x[:2], targets[:2]), (x[2:], targets[2:])])
        close(parts.fisher("empirical").dense(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_jax_has_the_same_scale(reduction: Any) -> None:
    jax = pytest.importorskip("jax")
    from jacops import JaxTwiceDifferentiable

    def mse_loss(output: Any, y: Any) -> Any:
        square = (output - y) ** 2
        return square.sum() if reduction == "sum" else square.mean()

    with jax.enable_x64(True):
        model, x, _, every = scaled("squares")
        w, b = (jax.numpy.array(p.detach().numpy()) for p in model.parameters())
        made: Any = JaxTwiceDifferentiable
        wrapped = made(lambda p, x: x @ p["a"].T + p["b"], {"a": w, "b": b}, mse_loss)

        def problem(y: Tensor) -> Problem:
            return Problem(wrapped, data=[(x[:1], y[:1]), (x[1:], y[1:])], reduction=reduction)

        mean = sum(chance * problem(y).fisher("empirical").dense() for chance, y in every)
        exact = problem(every[0][1]).ggn()
        close(torch.as_tensor(mean), exact.dense())
        assert exact.positive  # by the eigenvalues of every row

        def concave(output: Any, y: Any) -> Any:
            return -mse_loss(output, y)

        concave.__name__ = "mse_loss"  # no name is evidence
        wrapped = made(lambda p, x: x @ p["a"].T + p["b"], {"a": w, "b": b}, concave)
        assert not problem(every[0][1]).ggn().positive


class Rewritten(nn.CrossEntropyLoss):
    """What torch's own class computes, in a class of the user's."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target)


@pytest.mark.parametrize("sizes", [(1, 5), (2, 4), (3, 3), (1,) * 6])
@pytest.mark.parametrize(
    "y", [[2, -100, 2, -100, 1, 0], [1, -100, 1, -100, 1, 0], [0, 1, 0, 2, 2, 0], [1, 1, 1, 0, 0, 0]]
)
def test_batches_whose_labels_are_alike_show_their_weights_too(y: list[int], sizes: tuple[int, ...]) -> None:
    model, x, weight = settled(nn.Linear(5, 3)), draw(6, 5), torch.tensor([0.5, 2.0, 1.0]).double()
    target = torch.tensor(y)
    known = [i for i, label in enumerate(y) if label >= 0]
    loss = nn.CrossEntropyLoss(weight=weight, reduction="none")
    rows = [
        torch.autograd.grad(loss(model(x[i : i + 1]), target[i : i + 1]).sum(), [*model.parameters()]) for i in known
    ]
    scores = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    wanted = scores.T @ scores / weight[target[known]].sum()
    for loss in (nn.CrossEntropyLoss(weight=weight), Rewritten(weight=weight)):
        batches = list(zip(x.split(list(sizes)), target.split(list(sizes)), strict=True))
        problem = Problem(model, loss, batches)
        close(problem.fisher("empirical").dense(), wanted)
        close(fisher(model, loss, x, target, kind="empirical").dense(), wanted)
        close(jacops.kronecker_factors(problem, kind="empirical")["weight"][0], wanted[-3:, -3:])
        for kind in ("exact", "monte_carlo"):
            with pytest.raises(InputError, match="loss"):
                problem.fisher(kind).dense()  # type: ignore[arg-type]


@pytest.mark.parametrize("y", [[1, 1], [0, 1]])
def test_weights_of_classes_that_are_hidden_are_no_likelihood_in_few_rows(y: list[int]) -> None:
    model, x, weight = settled(nn.Linear(5, 3)), draw(2, 5), torch.tensor([0.5, 2.0, 1.0]).double()
    hidden = functools.partial(F.cross_entropy, weight=weight)
    for kind in ("exact", "monte_carlo"):
        with pytest.raises(InputError, match="likelihood"):
            fisher(model, hidden, x, torch.tensor(y), kind=kind).dense()  # type: ignore[arg-type]
    plain = functools.partial(F.cross_entropy, ignore_index=2)  # the class beside the only one that is present
    close(fisher(model, plain, x, torch.tensor(y)).dense(), ggn(model, F.cross_entropy, x, torch.tensor(y)).dense())


def test_small_weights_of_classes_are_no_mean_over_rows() -> None:
    model, x, weight = settled(nn.Linear(5, 3)), draw(6, 5), torch.tensor([1.0, 1.001, 1.0]).double()
    hidden = functools.partial(F.cross_entropy, weight=weight)
    with pytest.raises(InputError, match="rows together"):
        Problem(model, hidden, [(x, torch.tensor([0, 1, 2, 1, 1, 0]))]).gradient()


def test_labels_that_are_not_needed_are_none_that_are_ignored() -> None:
    model, x = settled(Tokens(3)), draw(4, 5, 2)
    expected = fisher(model, nn.CrossEntropyLoss(), x).dense()
    for ignored in range(3):
        close(fisher(model, nn.CrossEntropyLoss(ignore_index=ignored), x).dense(), expected)
    close(fisher(model, lambda o, y: F.cross_entropy(o, y), x).dense(), expected)


def test_inference_mode_and_the_callers_random_state() -> None:
    model, x, loss = settled(nn.Linear(4, 3)), draw(12, 4), lambda o, y: 3 * ((o - y) ** 2).mean()  # noqa: E731
    before = torch.get_rng_state()
    expected = [fisher(model, loss, x, REAL, kind=kind).dense() for kind in ("exact", "monte_carlo", "empirical")]
    with torch.inference_mode():
        for kind, matrix in zip(("exact", "monte_carlo", "empirical"), expected, strict=True):
            close(fisher(model, loss, x + 0, REAL + 0, kind=kind).dense(), matrix)  # pyright: ignore[reportArgumentType]
        assert ggn(model, loss, x + 0, REAL + 0).positive
    assert torch.equal(torch.get_rng_state(), before)


# ---- how a mean divides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), Adapter(), FocalLoss(), lambda o, y: F.cross_entropy(o, y)])
def test_a_mean_divides_as_the_loss_does_where_the_first_rows_ignore_no_label(loss: Loss) -> None:
    named = isinstance(loss, Adapter)
    model, x, y = settled(Tokens(3, named=named)), draw(14, 4, 2), labels(14, 4, classes=3)
    y[11, 2:] = -100
    y[12] = -100
    found = Problem(model, loss, [(x[:9], y[:9]), (x[9:], y[9:])])
    close(found.hessian().dense(), jacops.hessian(model, loss, x, y).dense())
    assert found.value() == pytest.approx(float(loss(model(x), y).detach()), rel=1e-12)


def test_batches_padded_to_different_lengths_weigh_every_label_alike() -> None:
    model, x, y = settled(Tokens(3)), draw(6, 4, 2), labels(6, 4, classes=3)
    y[:, 3] = -100
    short, long = (x[:2, :3], y[:2, :3]), (x[2:], y[2:])
    found = Problem(model, nn.CrossEntropyLoss(), [short, long])
    close(found.ggn().dense(), ggn(model, nn.CrossEntropyLoss(), x, y).dense())
    close(found.gradient(), Problem(model, nn.CrossEntropyLoss(), [(x, y)]).gradient())


# ---- draws by sample and target ----------------------------------------------------------------------------------


def padded(x: Tensor, y: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Return sequences with more positions that are not to count, of any content."""
    noise = 3 * draw(len(x), before + after, x.shape[2], seed=9).to(x.dtype)
    ignored = torch.full((len(y), before + after), -100)
    return (
        torch.cat([noise[:, :before], x, noise[:, before:]], 1),
        torch.cat([ignored[:, :before], y, ignored[:, before:]], 1),
    )


def batched(x: Tensor, y: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def masked(output: Tensor, y: Tensor) -> Tensor:
    """A loss of logits and labels that is neither diagonal nor a softmax's at a sample."""
    real = (y >= 0).unsqueeze(1)
    logits = output * real
    square = (logits**2).sum((1, 2)) + (logits.sum((1, 2))) ** 2
    return square.mean()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda o, y: F.cross_entropy(o, y), masked])
def test_padding_and_batch_sizes_change_no_draw_of_ekfac(loss: Loss, dtype: torch.dtype) -> None:
    model = settled(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), Tokens(3, width=3))).to(dtype)
    x, y = draw(7, 4, 2).to(dtype), labels(7, 4, classes=3)
    y[2, 1], y[5, 3] = -100, -100
    recipe = EKFAC(fisher="monte_carlo", draws=2)
    expected = recipe.approximate(Problem(model, loss, [(x, y)]).ggn()).dense()
    other = EKFAC(fisher="monte_carlo", draws=2, seed=1).approximate(Problem(model, loss, [(x, y)]).ggn()).dense()
    assert float((other - expected).norm()) > 1e-2 * float(expected.norm())
    rtol = 1e-9 if dtype == F64 else 1e-5
    for sizes, before, after in (([7], 0, 6), ([2, 4, 1], 0, 0), ([2, 4, 1], 3, 1), ([1] * 7, 2, 0)):
        data = batched(*padded(x, y, before, after), sizes)
        close(recipe.approximate(Problem(model, loss, data).ggn()).dense(), expected, rtol)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda o, y: F.cross_entropy(o, y)])
def test_padding_and_batch_sizes_change_no_drawn_label(loss: Loss) -> None:
    model, x, y = settled(Tokens(3)), draw(7, 4, 2), labels(7, 4, classes=3)
    y[2, 1], y[5, 3] = -100, -100
    expected = fisher(model, loss, x, y, kind="monte_carlo")
    for sizes, before, after in (([7], 0, 6), ([2, 4, 1], 0, 0), ([2, 4, 1], 3, 1), ([1] * 7, 2, 0)):
        found = Problem(model, loss, batched(*padded(x, y, before, after), sizes)).fisher("monte_carlo")
        close(found.dense(), expected.dense())
        assert found.noise == pytest.approx(expected.noise, rel=1e-9)


@pytest.mark.parametrize("name", ["squares", "logistic", "cross-entropy"])
def test_batches_draw_a_stream(name: str) -> None:
    model, x, loss, every = scaled(name)
    y = every[0][1]
    twice = torch.cat([x, x]), torch.cat([y, y])
    once = fisher(model, loss, x, y, kind="monte_carlo", samples=2).dense()
    again = fisher(model, loss, x, y, kind="monte_carlo", samples=2, first=3).dense()
    assert float((once - again).norm()) > 1e-3 * float(once.norm())
    total = fisher(model, loss, *twice, kind="monte_carlo", samples=2).dense()
    close(total, (once + again) / 2)
    with pytest.raises(InputError, match="`first`"):
        fisher(model, loss, x, y, kind="monte_carlo", first=-1)


def test_influences_by_drawn_curvature_do_not_see_padding() -> None:
    model, x, y = settled(Tokens(4)), draw(8, 3, 2), labels(8, 3, classes=4)
    wrapped = TorchTwiceDifferentiable(model, nn.CrossEntropyLoss())
    method = EKFAC(fisher="monte_carlo", report_residual=False)
    options: dict[str, Any] = {"solver": method, "curvature": "ggn", "damping": 1e-2}
    values = [compute_influences(wrapped, batched(*padded(x, y, 0, more), [3, 5]), **options).values for more in (0, 6)]
    close(values[1], values[0])


# ---- the noise that draws leave ----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_noise_is_the_spread_over_seeds(loss: nn.Module, samples: int) -> None:
    model, x = settled(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), draw(40, 4)
    y = labels(40, classes=3) if isinstance(loss, nn.CrossEntropyLoss) else labels(40, 3, classes=2).double()
    v, found = draw(8, 43, seed=3), []
    for seed in range(60):
        estimate = fisher(model, loss, x, y, kind="monte_carlo", samples=samples, seed=seed)
        found.append((estimate.apply(v) * v).sum(1))
    spread = torch.stack(found)
    measured = float((spread.std(0) / spread.mean(0)).square().mean().sqrt())
    noise = fisher(model, loss, x, y, kind="monte_carlo", samples=samples).noise
    assert noise is not None
    assert 0.8 * measured <= noise <= 2 * measured
    assert f"{noise:.2g}" in repr(fisher(model, loss, x, y, kind="monte_carlo", samples=samples))


def test_the_noise_stands_in_results() -> None:
    model, x, y = settled(nn.Linear(4, 3)), draw(12, 4), CLASSES
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    problem = Problem(model, nn.CrossEntropyLoss(), data)
    assert problem.ggn().noise is None
    assert problem.fisher().noise is None
    drawn, alone = problem.fisher("monte_carlo"), fisher(model, nn.CrossEntropyLoss(), x, y, kind="monte_carlo")
    assert drawn.noise == pytest.approx(alone.noise, rel=1e-9)
    assert (3.0 * alone).noise == pytest.approx(alone.noise, rel=1e-9)
    few, many = (EKFAC("monte_carlo", draws=n).solve(problem.ggn(), draw(1, 15), 0.1).info["noise"] for n in (1, 64))
    assert few == pytest.approx(8 * many, rel=0.5)
    assert "relative standard error" in repr(EKFAC("monte_carlo").approximate(problem.ggn()))
    assert EKFAC("exact").approximate(problem.ggn()).noise is None
    wrapped = TorchTwiceDifferentiable(model, nn.CrossEntropyLoss())
    for method in ("direct", "ekfac"):
        result = compute_influences(wrapped, data, solver=method, curvature="monte_carlo_fisher", damping=0.1)
        assert 0 < result.info["noise"] < 1
