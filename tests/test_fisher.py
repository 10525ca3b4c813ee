"""Fisher matrices of one batch against sums of outer products of plain gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
from jacops._fisher import fisher
from jacops.errors import InputError, InputTypeError
from small import Calls, draw, settled, small_net


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


def expected_fisher(model: nn.Module, x: Tensor, likelihood: str) -> Tensor:
    """The mean over rows of the expectation over labels of g gᵀ, label by label."""
    total, rows = 0, len(x)
    for output in model(x):
        if likelihood == "categorical":
            p = output.softmax(0).detach()
            parts = [(p[k], gradient(model, -output.log_softmax(0)[k])) for k in range(len(p))]
        else:  # two binary outputs: every pair of labels
            p, parts = output.sigmoid().detach(), []
            for a in (0, 1):
                for b in (0, 1):
                    y = torch.tensor([a, b], dtype=output.dtype)
                    chance = ((p * y) + (1 - p) * (1 - y)).prod()
                    value = F.binary_cross_entropy_with_logits(output, y, reduction="sum")
                    parts.append((chance, gradient(model, value)))
        total = total + sum(chance * torch.outer(g, g) for chance, g in parts)
    return total / rows


LOSSES = {
    "cross_entropy": (F.cross_entropy, torch.tensor([0, 1, 1, 0, 1])),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), torch.tensor([0, 1, 1, 0, 1])),
    "mse_loss": (F.mse_loss, draw(5, 2, seed=3)),
    "MSELoss sum": (nn.MSELoss(reduction="sum"), draw(5, 2, seed=3)),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0], [0, 1]]).double()),
    "cross_entropy sum": (nn.CrossEntropyLoss(reduction="sum"), torch.tensor([0, 1, 1, 0, 1])),
}
losses = pytest.mark.parametrize("name", LOSSES)


@losses
def test_the_exact_fisher_matrix_is_the_gauss_newton_matrix_with_or_without_labels(name: str) -> None:
    model, x, (loss, y) = small_net(), draw(5, 3), LOSSES[name]
    expected = jacops.ggn(model, loss, x, y).dense()
    for found in (fisher(model, loss, x), fisher(model, loss, x, y)):
        close(found.dense(), expected)
        assert found.symmetric
        assert found.positive


@pytest.mark.parametrize(("name", "likelihood"), [("cross_entropy", "categorical"), ("BCEWithLogitsLoss", "bernoulli")])
def test_the_exact_fisher_matrix_is_the_expectation_over_labels(name: str, likelihood: str) -> None:
    model, x = small_net(), draw(5, 3)
    loss = LOSSES[name][0]
    scale = 1 if likelihood == "categorical" else 0.5  # a mean over two outputs of every row
    close(fisher(model, loss, x).dense(), scale * expected_fisher(model, x, likelihood))


@losses
def test_drawn_labels_are_unbiased(name: str) -> None:
    model, x, (loss, _) = small_net(), draw(5, 3), LOSSES[name]
    exact = fisher(model, loss, x).dense()
    found = torch.stack([fisher(model, loss, x, kind="monte_carlo", samples=20, seed=s).dense() for s in range(40)])
    z = (found.mean(0) - exact) / (found.std(0) / 40**0.5).clamp(min=1e-12)
    assert float((z**2).mean().sqrt()) < 1.6
    many = fisher(model, loss, x, kind="monte_carlo", samples=20_000).dense()
    assert float((many - exact).norm() / exact.norm()) < 0.05


def test_one_draw_is_the_outer_product_of_the_gradients_at_some_labels() -> None:
    model, x = small_net(), draw(3, 3)
    found = fisher(model, F.cross_entropy, x, kind="monte_carlo", seed=4)
    assert found.positive
    possible = []
    for bits in range(8):
        labels = torch.tensor([bits & 1, bits >> 1 & 1, bits >> 2])
        possible.append(jacops.linalg.empirical_fisher(model, F.cross_entropy, x, labels).dense())
    errors = [float((found.dense() - p).abs().max()) for p in possible]
    assert min(errors) < 1e-12


def test_tokens_count_one_by_one_and_ignored_ones_not_at_all() -> None:
    model = nn.Sequential(settled(nn.Linear(3, 4)), nn.Unflatten(1, (2, 2)))  # two classes at two positions
    x, y = draw(4, 3), torch.tensor([[0, 1], [1, -100], [-100, -100], [0, 0]])
    loss = nn.CrossEntropyLoss()
    exact = fisher(model, loss, x, y).dense()
    close(exact, jacops.ggn(model, loss, x, y).dense())
    many = fisher(model, loss, x, y, kind="monte_carlo", samples=20_000).dense()
    assert float((many - exact).norm() / exact.norm()) < 0.05
    assert not torch.allclose(fisher(model, loss, x).dense(), exact)


def test_the_empirical_one_is_in_the_scale_of_the_loss() -> None:
    model, x, y = small_net(), draw(5, 3), draw(5, 2, seed=1)
    mean = fisher(model, nn.MSELoss(), x, y, kind="empirical")
    close(mean.dense(), 2 * jacops.linalg.empirical_fisher(model, F.mse_loss, x, y).dense())  # two terms in a row
    total = jacops.sample_gradients(model, nn.MSELoss(reduction="sum"), x, y).dense()
    close(fisher(model, nn.MSELoss(reduction="sum"), x, y, kind="empirical").dense(), total.T @ total)
    close(jacops.linalg.diagonal(mean), mean.dense().diagonal())


def test_draws_repeat_and_nothing_of_the_callers_moves() -> None:
    model, x, before = small_net(), draw(5, 3), torch.get_rng_state()
    first, again, other = (
        fisher(model, F.cross_entropy, x, kind="monte_carlo", samples=2, seed=s).dense() for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_no_likelihood_is_refused_by_name() -> None:
    model, x, y = small_net(), draw(5, 3), torch.tensor([0, 1, 1, 0, 1])
    with pytest.raises(InputError, match="`kind`"):
        fisher(model, F.cross_entropy, x, y, kind="true")  # pyright: ignore[reportArgumentType]
    for kind in ("exact", "monte_carlo"):
        with pytest.raises(InputError, match="`loss` is 'l1_loss'.*known likelihood"):
            fisher(model, F.l1_loss, x, kind=kind)
        with pytest.raises(InputError, match="CrossEntropyLoss with `weight`"):
            fisher(model, nn.CrossEntropyLoss(weight=torch.ones(2).double()), x, y, kind=kind)
    with pytest.raises(InputError, match="`y` is None"):
        fisher(model, F.cross_entropy, x, kind="empirical")
    for samples in (0, True, 1.5):
        with pytest.raises(InputError, match="`samples`"):
            fisher(model, F.cross_entropy, x, kind="monte_carlo", samples=samples)
    with pytest.raises(InputError, match="empty"):
        fisher(model, F.cross_entropy, x[:0], kind="monte_carlo")
    two = nn.Sequential(model, Calls(lambda output: (2 * output, output)))
    with pytest.raises(InputTypeError, match="2 tensors.*outputs="):
        fisher(two, F.mse_loss, x)
    close(fisher(two, F.mse_loss, x, outputs=1).dense(), fisher(model, F.mse_loss, x).dense())
