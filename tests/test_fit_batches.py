"""Many fits of one shape: each problem ends where it would alone, whatever happens to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jacops
from jacops.charts import SO3
from jacops.errors import InputError, InputTypeError, JacopsWarning, SolveError
from jacops.fit import BatchFitResult, least_squares_batch, levenberg_marquardt

T = torch.linspace(0, 2, 20).double()


def decay(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T) + x[2]


def signals(many: int, noise: float = 0.01, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return parameters and noisy data of as many decays."""
    generator = torch.Generator().manual_seed(seed)
    true = 0.5 + torch.rand(many, 3, generator=generator).double() * torch.tensor([3.0, 2.0, 1.0]).double()
    clean = torch.stack([decay(x) for x in true])
    return true, clean + noise * torch.randn(many, 20, generator=generator).double()


def alone(y: Tensor, **options: Any) -> list[Any]:
    return [levenberg_marquardt(decay, target=row, params=torch.ones(3).double(), **options) for row in y]


def test_two_hundred_random_fits_end_where_scipys_do() -> None:
    from scipy.optimize import least_squares

    y = signals(200)[1]
    found = least_squares_batch(decay, target=y, params=torch.ones(200, 3).double())
    assert bool(found.success.all())
    for row, x, cost in zip(y.numpy(), found.x.numpy(), found.cost.numpy(), strict=True):
        fun = lambda v, row=row: v[0] * np.exp(-v[1] * T.numpy()) + v[2] - row  # noqa: E731
        theirs = least_squares(fun, np.ones(3), ftol=1e-12, xtol=1e-12, gtol=1e-12)
        assert cost == pytest.approx(theirs.cost, rel=1e-8)
        np.testing.assert_allclose(x, theirs.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["trust_region", "nielsen", "marquardt", "adaptive"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "huber", "f_scale": 0.02},
        {"kernel": "cauchy", "f_scale": 0.05, "corrector": "first_order"},
        {"bounds": (torch.tensor([0.0, 0.8, 0.0]).double(), torch.tensor([2.5, 9.0, 1.2]).double())},
        {"x_scale": torch.tensor([1.0, 10.0, 0.1]).double()},
        {"fixed": 2},
        {"weight": torch.linspace(0, 3, 20).double()},
    ],
    ids=["plain", "huber", "cauchy", "bounds", "x_scale", "fixed", "weight"],
)
def test_a_problem_of_a_batch_ends_where_it_does_alone(strategy: Any, options: dict[str, Any]) -> None:
    y = signals(5)[1]
    found = least_squares_batch(decay, target=y, params=torch.ones(5, 3).double(), strategy=strategy, **options)
    assert bool(found.success.all()), found
    for i, single in enumerate(alone(y, **options)):
        assert float(found.cost[i]) == pytest.approx(single.cost, rel=1e-7)
        np.testing.assert_allclose(found.x[i], single.x, rtol=2e-3)
        if "bounds" in options:
            mask: Any = found.active_mask
            assert torch.equal(mask[i], single.active_mask)


def test_what_goes_wrong_with_one_problem_changes_nothing_for_the_others() -> None:
    y = signals(70)[1]
    start = torch.ones(70, 3).double()
    good = least_squares_batch(decay, target=y, params=start)
    bad, worse = y.clone(), start.clone()
    bad[3], worse[11, 1] = float("nan"), -1e3
    with pytest.warns(JacopsWarning, match=r"2 of 70 problems met no stop rule.*problem 3: nonfinite"):
        found = least_squares_batch(decay, target=bad, params=worse)
    assert found.failed.tolist() == [3, 11]
    assert [found.status[i] for i in (3, 11)] == ["nonfinite", "nonfinite"]
    assert torch.equal(found.x[3], start[3])
    assert torch.equal(found.x[11], worse[11])
    kept = [i for i in range(70) if i not in (3, 11)]
    torch.testing.assert_close(found.x[kept], good.x[kept], rtol=1e-6, atol=1e-9)
    with pytest.raises(SolveError, match="2 of 70") as caught:
        least_squares_batch(decay, target=bad, params=worse, on_failure="raise")
    assert isinstance(caught.value.solution, BatchFitResult)


def test_a_problem_that_diverges_is_flagged_and_the_others_are_not() -> None:
    def rational(x: Tensor, a: Tensor) -> Tensor:
        return torch.stack([a + torch.exp(-x[0])])  # without a minimum for a >= 0

    a = torch.tensor([1.0, -2.0, -0.5]).double()
    found = least_squares_batch(rational, a, params=torch.zeros(3, 1).double(), max_steps=30, on_failure="return")
    assert found.success.tolist()[1:] == [True, True]
    torch.testing.assert_close(found.x[1:, 0], -torch.log(-a[1:]))
    single = levenberg_marquardt(
        lambda x: rational(x, a[0]), params=torch.zeros(1).double(), max_steps=30, on_failure="return"
    )
    assert (found.status[0] in ("gradient", "objective", "step")) == single.rule_met


def test_a_rank_deficient_problem_takes_the_shortest_step() -> None:
    def line(x: Tensor, slope: Tensor) -> Tensor:
        return slope[0] * x[0] + slope[1] * x[1] - torch.stack([slope.new_tensor(1.0), slope.new_tensor(1.0)])

    slopes = torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 4.0]]).double()
    found = least_squares_batch(line, slopes, params=torch.zeros(3, 2).double(), x_scale=1.0)
    assert bool(found.success.all())
    torch.testing.assert_close((slopes * found.x).sum(1), torch.ones(3).double())
    torch.testing.assert_close(found.x[1], torch.tensor([0.5, 0.0]).double())


def test_fewer_residuals_than_parameters() -> None:
    sums = torch.tensor([1.0, 2.0]).double()
    found = least_squares_batch(lambda x, s: (x**2).sum() - s, sums, params=torch.ones(2, 3).double())
    assert bool(found.success.all())
    torch.testing.assert_close((found.x**2).sum(1), sums)


def arm(q: Tensor, lengths: Tensor) -> Tensor:
    angles = torch.cumsum(q, 0)
    return torch.stack([(lengths * torch.cos(angles)).sum(), (lengths * torch.sin(angles)).sum()])


def test_inverse_kinematics_of_planar_arms_within_joint_limits() -> None:
    lengths = torch.tensor([1.0, 0.8, 0.5]).double()
    q = torch.rand(100, 3, generator=torch.Generator().manual_seed(2)).double() * 1.2 + 0.1
    goals = torch.func.vmap(arm, (0, None))(q, lengths)
    found = least_squares_batch(
        arm, (lengths,), goals, params=torch.full((100, 3), 0.4).double(), shared=0, bounds=(0.0, 1.5)
    )
    reached = torch.func.vmap(arm, (0, None))(found.x, lengths)
    assert bool(found.success.all())
    assert float((reached - goals).abs().max()) < 1e-6
    assert float(found.x.min()) >= 0.0
    assert float(found.x.max()) <= 1.5


def test_elements_of_a_group_move_on_their_chart() -> None:
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(4, 3, generator=generator).double()
    turns = SO3.retract(
        torch.tensor([0.0, 0, 0, 1]).double().expand(20, 4), torch.randn(20, 3, generator=generator).double()
    )

    def turned(q: Tensor) -> Tensor:
        axis, w = q[:3], q[3]
        cross = torch.linalg.cross(axis.expand(4, 3), points)
        return points + 2 * (w * cross + torch.linalg.cross(axis.expand(4, 3), cross))

    seen = torch.func.vmap(turned)(turns)
    start = torch.tensor([0.0, 0, 0, 1]).double().repeat(20, 1)
    found = least_squares_batch(turned, target=seen, params=start, manifolds=SO3)
    assert bool(found.success.all())
    torch.testing.assert_close(found.x.norm(dim=1), torch.ones(20).double())
    torch.testing.assert_close((found.x * turns).sum(1).abs(), torch.ones(20).double())


def test_weights_of_zero_leave_out_what_is_not_there() -> None:
    y = signals(3)[1]
    lengths = [20, 12, 15]
    mask = torch.stack([(torch.arange(20) < n).double() for n in lengths])
    found = least_squares_batch(decay, target=y * mask, params=torch.ones(3, 3).double(), weight=mask)
    for i, n in enumerate(lengths):
        single = levenberg_marquardt(lambda x, n=n: decay(x)[:n], target=y[i, :n], params=torch.ones(3).double())
        torch.testing.assert_close(found.x[i], single.x, rtol=1e-4, atol=1e-6)


def test_trees_of_parameters_and_outputs_and_information_matrices() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(6, 3, 3, generator=generator).double()
    information = root @ root.mT + torch.eye(3).double()
    goal = torch.randn(6, 3, generator=generator).double()
    prior = 0.5 + torch.rand(6, generator=generator).double()

    def residual(b: Tensor, goal: Tensor, *, a: Tensor) -> dict[str, Tensor]:
        return {"fit": a * b - goal, "prior": a.sum()}

    def called(goal: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return residual(b, goal, a=a)

    start = {"a": torch.ones(6).double(), "b": torch.ones(6, 3).double()}
    given = {"target": {"fit": 0 * goal, "prior": prior}, "weight": {"fit": information, "prior": None}}
    found = least_squares_batch(called, goal, params=start, **given)
    assert bool(found.success.all())
    assert list(found.x) == ["a", "b"]
    for i in range(6):
        own = {
            "target": {"fit": 0 * goal[i], "prior": prior[i]},
            "weight": {"fit": information[i], "prior": None},
        }
        single = levenberg_marquardt(called, goal[i], params={n: v[i] for n, v in start.items()}, **own)
        assert float(found.cost[i]) == pytest.approx(single.cost, rel=1e-6, abs=1e-15)


def test_stacked_modules_are_fitted_as_each_alone() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double() for _ in range(4)]
    x, y = torch.randn(30, 2).double(), torch.randn(4, 30, 1).double()
    params = {
        n: torch.stack([dict(net.named_parameters())[n].detach() for net in nets])
        for n in dict(nets[0].named_parameters())
    }
    before = [p.clone() for p in nets[0].parameters()]
    some = {n: params[n] for n in ("2.weight", "2.bias")}
    found = least_squares_batch(nets[0], (x,), y, params=some, shared=0)
    hidden = torch.tanh(nn.functional.linear(x, before[0], before[1]))
    design = torch.cat([hidden, torch.ones(30, 1).double()], 1)
    right = torch.linalg.lstsq(design.expand(4, 30, 4), y).solution
    torch.testing.assert_close(found.x["2.weight"][:, 0], right[:, :3, 0], rtol=1e-8, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(before, nets[0].parameters(), strict=True))


def test_a_function_that_cannot_be_vectorised_is_looped_over() -> None:
    def branching(x: Tensor, y: Tensor) -> Tensor:
        return x - y if float(y[0]) > 0 else 2 * (x - y)

    y = torch.tensor([[1.0, 2.0], [-1.0, 3.0]]).double()
    with pytest.warns(JacopsWarning, match="one problem after another, since torch.func.vmap does not take it"):
        found = least_squares_batch(branching, y, params=torch.zeros(2, 2).double())
    torch.testing.assert_close(found.x, y)


def test_a_vectorised_function_is_taken_as_it_is_unless_it_mixes_problems() -> None:
    y = signals(8)[1]

    def together(x: Tensor) -> Tensor:
        return x[:, :1] * torch.exp(-x[:, 1:2] * T) + x[:, 2:] - y

    found = least_squares_batch(together, params=torch.ones(8, 3).double(), vectorized=True)
    torch.testing.assert_close(found.x, least_squares_batch(decay, target=y, params=torch.ones(8, 3).double()).x)
    with pytest.raises(InputError, match="mixes problems"):
        least_squares_batch(lambda x: x - 0.1 * x.mean(0), params=torch.ones(8, 3).double(), vectorized=True)


def test_single_precision_ends_at_its_own_rounding() -> None:
    y = signals(50)[1]
    single = least_squares_batch(lambda x: decay(x).float(), target=y.float(), params=torch.ones(50, 3))
    double = least_squares_batch(decay, target=y, params=torch.ones(50, 3).double())
    assert single.x.dtype == torch.float32
    assert bool(single.success.all())
    torch.testing.assert_close(single.x.double(), double.x, rtol=2e-3, atol=2e-3)


def test_problems_that_have_stopped_are_not_worked_on() -> None:
    rows: list[int] = []

    def counted(x: Tensor) -> Tensor:
        rows.append(len(x))
        return torch.stack([x[:, 0] - 1, 10 * (x[:, 1] - x[:, 0] ** 2)], 1)

    start = torch.ones(512, 2).double()
    start[:5] = torch.tensor([-1.2, 1.0]).double()
    found = least_squares_batch(counted, params=start, vectorized=True)
    assert bool(found.success.all())
    assert rows[-1] <= 5
    assert int(found.steps[5:].max()) == 0


def test_many_problems_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    y = signals(40)[1]
    whole = least_squares_batch(decay, target=y, params=torch.ones(40, 3).double())
    monkeypatch.setattr("jacops.fit._batch._ENTRIES", 20 * 3 * 15)
    parts = least_squares_batch(decay, target=y, params=torch.ones(40, 3).double())
    torch.testing.assert_close(parts.x, whole.x)
    assert parts.status == whole.status
    assert parts.nfev > whole.nfev


def test_it_says_what_happened_and_can_be_saved(tmp_path: Any) -> None:
    found = least_squares_batch(
        decay, target=signals(6)[1], params=torch.ones(6, 3).double(), max_steps=3, on_failure="return"
    )
    text = repr(found)
    assert text.startswith("BatchFitResult(")
    assert "max_steps" in text
    assert "without success" in text
    found.save(tmp_path / "fits")
    assert repr(jacops.load(tmp_path / "fits")) == text
    assert found.certificate(int(found.failed[0])) == ""


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no params", {"params": None}, InputTypeError, "params"),
    ("no axis", {"params": torch.tensor(1.0)}, InputError, "counts the problems"),
    ("no problem", {"params": torch.ones(0, 3)}, InputError, "at least one problem"),
    ("other axes", {"input": torch.ones(3, 2)}, InputError, "a first axis of 4 problems"),
    ("array", {"input": np.ones((4, 2))}, InputTypeError, "input"),
    ("target", {"target": torch.ones(20).double()}, InputError, "Nothing is broadcast"),
    ("weight", {"weight": torch.ones(7)}, InputError, "behind a first axis of 4 problems"),
    ("two weights", {"weight": 1.0, "sqrt_weight": 1.0}, InputError, "not both"),
    ("bounds", {"bounds": (torch.zeros(2), 1.0)}, InputError, "bounds"),
    ("start", {"bounds": (2.0, 3.0)}, InputError, "start must be within"),
    ("strategy", {"strategy": "nielson"}, InputError, "nielsen"),
    ("damping", {"damping": 1.0, "strategy": "trust_region"}, InputError, "radius"),
    ("failure", {"on_failure": "ignore"}, InputError, "return"),
    ("vectorized", {"vectorized": 1}, InputTypeError, "True or False"),
    ("solver", {"solver": "qr"}, InputTypeError, "QR or Cholesky"),
    ("shared", {"input": torch.ones(4, 2), "shared": "t"}, InputError, "there is no such input"),
    ("fixed", {"fixed": {"y": 0}}, InputError, "the free parameters"),
    ("kernel", {"kernel": "hubert"}, InputError, "huber"),
]


@pytest.mark.parametrize(("options", "error", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_arguments_are_refused_by_name(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model: Callable[..., Tensor] = (lambda x, t: decay(x)) if "input" in options else decay
    given: dict[str, Any] = {"params": torch.ones(4, 3).double(), **options}
    with pytest.raises(error, match=words):
        least_squares_batch(model, **given)


WAYS = ["vmap", "one after another", "vectorized"]


def in_a_way(way: str, function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[..., Tensor], bool]:
    """Return a function of parameters and times that is run in this way, and whether it takes all problems."""

    def f(x: Tensor, s: Tensor) -> Tensor:
        if way == "one after another":
            float(x.detach().sum())  # vmap refuses that
        return function(x[..., None], s) if way == "vectorized" else function(x, s)

    return f, way == "vectorized"


@pytest.mark.filterwarnings("ignore::jacops.errors.JacopsWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_function_may_write_into_its_arguments(way: str, shared: bool) -> None:
    def writing(x: Tensor, s: Tensor) -> Tensor:
        s.neg_()
        x.mul_(2.0)
        axis = 1 if way == "vectorized" else 0
        a, b, c = x.unbind(axis)
        return (a * torch.exp(b * s / 2) + c) / torch.tensor([2.0]).double()

    y = signals(5)[1]
    times, start = T.clone() if shared else T.expand(5, 20).clone(), torch.ones(5, 3).double()
    f, vectorized = in_a_way(way, writing)
    options: Any = {"shared": [0] if shared else None, "vectorized": vectorized}
    found = least_squares_batch(f, (times,), target=y, params=start, **options)
    torch.testing.assert_close(found.x, torch.stack([fit.x for fit in alone(y)]), rtol=1e-6, atol=1e-7)
    assert bool((times == T).all())
    assert bool((start == 1).all())


def test_what_is_detached_may_not_couple_problems() -> None:
    y = signals(6)[1]

    def coupled(x: Tensor) -> Tensor:
        mean = x[:, :1].detach().mean() - 1  # nothing at the start, and no derivative anywhere
        return x[:, :1] * torch.exp(-x[:, 1:2] * T) + x[:, 2:] + 0.1 * mean

    def whole(x: Tensor) -> Tensor:
        return x[:, :1] * torch.exp(-x[:, 1:2] * T) + x[:, 2:] - many

    for n in (2, 6):
        with pytest.raises(InputError, match="residuals of some problems depend on others"):
            least_squares_batch(coupled, target=y[:n], params=torch.ones(n, 3).double(), vectorized=True)
    with pytest.raises(InputError, match="residuals of some problems depend on others"):
        least_squares_batch(lambda x: coupled(x) - y, params=torch.ones(6, 3).double(), vectorized=True)
    many = signals(70)[1]
    with pytest.raises(InputError, match="fails for 3 of 70 problems"):
        least_squares_batch(whole, params=torch.ones(70, 3).double(), vectorized=True)


@pytest.mark.filterwarnings("ignore::jacops.errors.JacopsWarning")
@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("many", [3, 100])
def test_random_residuals_are_those_that_each_problem_has_alone(way: str, many: int) -> None:
    y = signals(many)[1]
    f, _ = in_a_way(way, lambda x, s: x[0] * torch.exp(-x[1] * s) + x[2] + 0.01 * torch.randn(20).double())
    torch.manual_seed(5)
    found = least_squares_batch(f, (T.expand(many, 20),), target=y, params=torch.ones(many, 3).double())
    for i in (0, many - 1):
        torch.manual_seed(5)
        one = levenberg_marquardt(f, (T,), target=y[i], params=torch.ones(3).double())
        torch.testing.assert_close(found.x[i], one.x, rtol=1e-5, atol=1e-6)


def test_data_made_in_inference_mode() -> None:
    y = signals(4)[1]
    with torch.inference_mode():
        made = T.expand(4, 20) + 0
        shared = T + 0
        found = least_squares_batch(
            lambda x, s, t: x[0] * torch.exp(-x[1] * (s + t) / 2) + x[2],
            (made, shared),
            target=y,
            params=torch.ones(4, 3).double(),
            shared=[1],
        )
    torch.testing.assert_close(found.x.clone(), torch.stack([fit.x for fit in alone(y)]), rtol=1e-6, atol=1e-7)
