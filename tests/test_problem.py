"""Problem: the whole objective, whatever the batches: sums and denominators are added up and divided once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import jacops
import oracle
from jacops import Problem
from jacops.errors import DataError, InputError, InputTypeError, ModelStateError
from small import batches, close, draw, settled, small_net

LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
TOKENS = torch.tensor(
    [[0, 1, 9], [1, 9, 9], [9, 9, 9], [1, 1, 0], [0, 9, 1], [0, 0, 0], [9, 9, 1], [1, 0, 9], [0, 1, 0]]
)


def tagger() -> nn.Module:
    """Scores of two classes for each of three places: (n, 2, 3)."""
    return settled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6), nn.Unflatten(1, (2, 3))))


OBJECTIVES: dict[str, Callable[[], tuple[nn.Module, Any, Tensor]]] = {
    "mean": lambda: (small_net(), nn.CrossEntropyLoss(), LABELS),
    "function": lambda: (small_net(), F.cross_entropy, LABELS),
    "sum": lambda: (small_net(), nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "class weights": lambda: (small_net(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]).double()), LABELS),
    "ignored rows": lambda: (small_net(), nn.CrossEntropyLoss(ignore_index=1), LABELS),
    "ignored tokens": lambda: (tagger(), nn.CrossEntropyLoss(ignore_index=9), TOKENS),
    "weighted tokens": lambda: (
        tagger(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]).double(), ignore_index=9),
        TOKENS,
    ),
    "label smoothing": lambda: (small_net(), nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "squares": lambda: (small_net(), nn.MSELoss(), draw(9, 2, seed=4)),
    "squares of the user's": lambda: (small_net(), lambda o, y: ((o - y) ** 2).mean(), draw(9, 2, seed=4)),
    "huber": lambda: (small_net(), nn.HuberLoss(), draw(9, 2, seed=4)),
    "bits": lambda: (
        small_net(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0]).double()),
        F.one_hot(LABELS).double(),
    ),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 8), max_size=4, unique=True))
def test_the_split_into_batches_does_not_matter(kind: str, cuts: list[int]):
    model, loss, y = OBJECTIVES[kind]()
    x = draw(9, 3)
    edges = [0, *sorted(cuts), 9]
    sizes = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    problem = Problem(model, loss, batches(x, y, *sizes))
    whole = oracle.hessian(model, loss, x, y)
    H = problem.hessian()
    close(H.dense(), whole)
    v = draw(2, H.shape[0], seed=3)
    close(H.apply(v), v @ whole)
    close(H.apply(v), v @ whole)  # from what was kept
    close(problem.gradient(), oracle.gradient(model, loss, x, y))
    assert problem.value() == pytest.approx(float(loss(model(x), y).detach()), rel=1e-12)


@pytest.mark.parametrize("kind", ["mean", "class weights", "ignored tokens", "squares", "sum"])
def test_the_gauss_newton_matrix_too(kind: str):
    model, loss, y = OBJECTIVES[kind]()
    x = draw(9, 3)
    whole = jacops.ggn(model, loss, x, y).dense()
    found = Problem(model, loss, batches(x, y, 2, 4, 3)).ggn()
    close(found.dense(), whole)
    assert found.positive


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_empirical_fisher_matrix_is_of_all_rows(reduction: str):
    model, x = small_net(), draw(9, 3)
    rows = torch.stack([oracle.gradient(model, F.cross_entropy, x[i : i + 1], LABELS[i : i + 1]) for i in range(9)])
    expected = rows.T @ rows / (9 if reduction == "mean" else 1)
    own = F.cross_entropy if reduction == "mean" else lambda o, y: F.cross_entropy(o, y, reduction="sum")
    for loss in (nn.CrossEntropyLoss(reduction=reduction), own):
        found = Problem(model, loss, batches(x, LABELS, 2, 4, 3), reduction=reduction).fisher("empirical")
        close(found.dense(), expected)


def test_sample_weights_weigh_rows_and_their_denominators():
    model, x, weights = small_net(), draw(9, 3), torch.rand(9, generator=torch.Generator().manual_seed(0)).double()
    loss = nn.CrossEntropyLoss()
    data = [
        {"input": x[:4], "labels": LABELS[:4], "weights": weights[:4]},
        {"input": x[4:], "labels": LABELS[4:], "weights": weights[4:]},
    ]

    def weighed(output: Tensor, y: Tensor) -> Tensor:
        return (weights * F.cross_entropy(output, y, reduction="none")).sum() / weights.sum()

    problem = Problem(model, loss, data)
    close(problem.hessian().dense(), oracle.hessian(model, weighed, x, LABELS))
    close(problem.gradient(), oracle.gradient(model, weighed, x, LABELS))
    zero = torch.where(torch.arange(9) == 5, 0.0, weights)
    left_out = Problem(model, loss, [(x, LABELS, zero)], unpack=lambda batch: batch)
    kept = torch.arange(9) != 5
    rest = Problem(model, loss, [(x[kept], LABELS[kept], weights[kept])], unpack=lambda batch: batch)
    close(left_out.hessian().dense(), rest.hessian().dense())


def test_weights_work_with_a_loss_of_the_user_s_own():
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=4)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0]).double()
    own = lambda o, t: ((o - t) ** 4).mean()  # noqa: E731
    whole = lambda o, t: (weights * ((o - t) ** 4).mean(1)).sum() / weights.sum()  # noqa: E731
    found = Problem(model, own, [(x, y, weights)], unpack=lambda batch: batch)
    close(found.hessian().dense(), oracle.hessian(model, whole, x, y))


def test_a_loss_per_row_is_taken_in_the_mean():
    model, x = small_net(), draw(9, 3)
    found = Problem(model, nn.CrossEntropyLoss(reduction="none"), batches(x, LABELS, 4, 5))
    close(found.hessian().dense(), oracle.hessian(model, nn.CrossEntropyLoss(), x, LABELS))


def test_a_batch_that_is_ignored_altogether_counts_nothing():
    model, x, y = small_net(), draw(6, 3), torch.tensor([0, 1, 1, -100, -100, -100])
    found = Problem(model, nn.CrossEntropyLoss(), batches(x, y, 3, 3))
    close(found.hessian().dense(), oracle.hessian(model, nn.CrossEntropyLoss(), x[:3], y[:3]))
    with pytest.raises(DataError, match="no row counts"):
        Problem(model, nn.CrossEntropyLoss(), [(x[3:], y[3:])]).hessian()


def test_weight_decay_is_a_term_of_the_objective():
    model, x = small_net(), draw(9, 3)

    def with_decay(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    plain = oracle.hessian(model, with_decay, x, LABELS)
    problem = Problem(model, F.cross_entropy, [(x, LABELS)], l2=0.3)
    close(problem.hessian().dense(), plain + 0.3 * torch.eye(26).double(), 1e-12)
    close(problem.ggn().dense(), jacops.ggn(model, F.cross_entropy, x, LABELS).dense() + 0.3 * torch.eye(26).double())
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    close(problem.gradient(), oracle.gradient(model, F.cross_entropy, x, LABELS) + 0.3 * theta)
    assert problem.value() == pytest.approx(
        float(F.cross_entropy(model(x), LABELS).detach() + 0.15 * theta.square().sum())
    )
    only = Problem(model, F.cross_entropy, [(x, LABELS)], l2={"*weight": 0.3})
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    expected = torch.tensor([0.3 if name.endswith("weight") else 0.0 for name in names], dtype=torch.float64)
    close((only.hessian().dense() - plain).diagonal(), expected)
    with pytest.raises(InputError, match="`l2`.*no parameter fits"):
        Problem(model, F.cross_entropy, [(x, LABELS)], l2={"wieght": 0.3})
    with pytest.raises(InputError, match="`l2` is -1"):
        Problem(model, F.cross_entropy, [(x, LABELS)], l2=-1)


def test_parameters_are_picked_by_pattern():
    model, x = small_net(), draw(9, 3)
    whole = oracle.hessian(model, F.cross_entropy, x, LABELS)
    named = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    last = max(n for n, _ in model.named_parameters()).split(".")[0]
    where = torch.tensor([name.startswith(f"{last}.") for name in named])
    found = Problem(model, F.cross_entropy, [(x, LABELS)], parameters=f"{last}.*")
    close(found.hessian().dense(), whole[where][:, where])
    assert "of 26 parameters" in repr(found)
    assert found.sample_gradients().shape == (9, int(where.sum()))
    frozen = copy.deepcopy(model).requires_grad_(False)
    close(Problem(frozen, F.cross_entropy, [(x, LABELS)], parameters=["*"]).hessian().dense(), whole)
    with pytest.raises(InputError, match="`parameters` is '9.wieght'.*nearest are"):
        Problem(model, F.cross_entropy, [(x, LABELS)], parameters="9.wieght")
    with pytest.raises(InputTypeError, match="`parameters`"):
        Problem(model, F.cross_entropy, [(x, LABELS)], parameters=3)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.net(left + right**2)


@pytest.mark.parametrize("form", ["tuple", "dict", "user dict"])
def test_several_inputs_come_in_tuples_and_dicts(form: str):
    from collections import UserDict

    model, left, right = TwoInputs(), draw(9, 3), draw(9, 3, seed=9)
    make = {
        "tuple": lambda s: ((left[s], right[s]), LABELS[s]),
        "dict": lambda s: {"left": left[s], "right": right[s], "labels": LABELS[s]},
        "user dict": lambda s: UserDict(left=left[s], right=right[s], labels=LABELS[s]),  # as tokenizers give
    }[form]
    data = [make(slice(0, 5)), make(slice(5, 9))]
    found = Problem(model, F.cross_entropy, data)
    close(found.hessian().dense(), oracle.hessian(model, F.cross_entropy, (left, right), LABELS))
    rows = found.sample_gradients().dense()
    assert rows.shape == (9, 26)
    close(rows.mean(0), found.gradient())


def test_what_is_no_batch_says_how_to_make_one():
    model, x = small_net(), draw(9, 3)
    with pytest.raises(DataError, match="3 things as batch 0.*unpack="):
        Problem(model, F.cross_entropy, [(x, x, LABELS)]).hessian()
    with pytest.raises(DataError, match=r"keys \['a', 'b'\].*unpack="):
        Problem(model, F.cross_entropy, [{"a": x, "b": LABELS}]).hessian()
    with pytest.raises(InputError, match="`unpack`.*a list"):
        Problem(model, F.cross_entropy, [(x, LABELS)], unpack=list).hessian()
    with pytest.raises(InputError, match="weights in batch 0.*one number per row"):
        Problem(model, F.cross_entropy, [(x, LABELS, torch.ones(3))], unpack=lambda b: b).hessian()
    with pytest.raises(InputError, match="weights in batch 0.*negative"):
        Problem(model, F.cross_entropy, [(x, LABELS, -torch.ones(9))], unpack=lambda b: b).hessian()
    with pytest.raises(DataError, match="lengths"):
        Problem(model, F.cross_entropy, [(x[:4], LABELS)]).hessian()
    with pytest.raises(InputTypeError, match="`loss`"):
        Problem(model, data=[(x, LABELS)])


def test_rows_that_every_worker_gives_again_are_found_out():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):  # noqa: ANN204
            yield from zip(draw(4, 3), LABELS, strict=False)

    class Loader:  # what a DataLoader with two workers gives
        dataset, num_workers = Stream(), 2

        def __iter__(self):  # noqa: ANN204
            for _ in range(2):
                yield draw(4, 3), LABELS[:4]

    with pytest.raises(DataError, match="IterableDataset.*2 times.*get_worker_info"):
        Problem(small_net(), F.cross_entropy, Loader()).hessian().dense()


def test_train_mode_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(ModelStateError, match="'1'.*BatchNorm1d"):
        Problem(model, F.cross_entropy, [(draw(9, 3), LABELS)])


def test_linearisations_are_kept_between_passes_and_the_data_is_then_left_alone():
    class Counted(list):
        passes = 0

        def __iter__(self):  # noqa: ANN204
            Counted.passes += 1
            return super().__iter__()

    x = draw(9, 3)
    data = Counted(batches(x, LABELS, 4, 5))
    H = Problem(small_net(), F.cross_entropy, data).hessian()
    v = draw(1, 26)
    first = H.apply(v)
    passes = Counted.passes
    assert torch.equal(H.apply(v), first)
    assert Counted.passes == passes


def test_sample_gradients_are_those_of_the_rows_own_losses():
    model, loss, y = OBJECTIVES["ignored tokens"]()
    x = draw(9, 3)
    rows = Problem(model, loss, batches(x, y, 4, 5)).sample_gradients()
    found = rows.dense()
    for i in range(9):
        if i == 2:
            assert not found[i].any()  # nothing counts there
        else:
            close(found[i], oracle.gradient(model, loss, x[i : i + 1], y[i : i + 1]))
    v, u = draw(2, rows.shape[1]), draw(2, 9, seed=5)
    close(rows.apply(v), v @ found.T)
    close(rows.T.apply(u), u @ found)


def test_fingerprints_distinguish_weights_data_and_losses():
    x = draw(9, 3)
    model = small_net()
    base = Problem(model, F.cross_entropy, batches(x, LABELS, 4, 5)).fingerprint()
    assert base == Problem(copy.deepcopy(model), F.cross_entropy, batches(x, LABELS, 4, 5)).fingerprint()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        next(moved.parameters()).view(-1)[0] += 1e-9
    assert Problem(moved, F.cross_entropy, batches(x, LABELS, 4, 5)).fingerprint()["model"] != base["model"]
    assert Problem(model, nn.CrossEntropyLoss(), batches(x, LABELS, 4, 5)).fingerprint()["model"] != base["model"]
    digests = [Problem(model, F.cross_entropy, batches(v, LABELS, 4, 5)).data.digest for v in (x, x, x.flip(0))]
    assert digests[0] == digests[1] != digests[2]
    assert Problem(model, F.cross_entropy, batches(x, LABELS, 4, 5), l2=0.1).fingerprint()["l2"] != base["l2"]
