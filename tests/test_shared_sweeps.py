"""Samples share sweeps wherever that is right: values that are read, precision inside a forward, repeated positions."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tests import oracle
from tests.small import Calls, draw, settled
from torch import Tensor, nn

import jacops
from jacops import JacopsWarning, compute_jacobian, sample_gradients, sample_jacobians

F64 = torch.float64


@pytest.fixture
def no_fallback() -> Iterator[None]:
    """Samples taken alone come with a warning, which fails here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", JacopsWarning)
        yield


class Masked(nn.Module):
    """Attention with a mask that is inspected, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.inner(x)
        scores = h @ h.mT
        if not bool(mask.all()):
            scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
        return self.out((scores.softmax(-1) @ h).tanh().mean(1))


def test_an_inspected_mask_costs_a_forward_per_sample_and_no_sweep(no_fallback: None) -> None:
    model, x = settled(Masked()).eval(), draw(5, 6, 4)
    mask = torch.ones(5, 6, dtype=torch.bool)
    for masked in (False, True):
        mask[1, 4:] = not masked
        for _ in range(2):
            found = compute_jacobian(model, (x, mask))
            expected = oracle.input_jacobian(model, (x, mask))
            torch.testing.assert_close(found[0], expected[0])


def test_parameter_rows_through_an_inspected_value_share_sweeps(no_fallback: None) -> None:
    model = Calls(lambda W, x: (x @ W).tanh() if bool(x.abs().max() < 100) else x @ W, (3, 2))
    x, y = draw(6, 3), draw(6, 2, seed=3)
    found = sample_gradients(model, F.mse_loss, x, y)
    expected = torch.stack([oracle.gradient(model, F.mse_loss, x[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(found.dense(), expected)
    assert "6 samples to a sweep" in found.route


@pytest.mark.parametrize("checks", ["first", "never"])
@pytest.mark.parametrize("many", [2, 7])
def test_a_path_that_another_sample_would_not_take_is_noticed(many: int, checks: str) -> None:
    model = Calls(lambda W, x: (x @ W).tanh() if bool(x.sum() > 0) else x @ W, (3, 2))
    x = draw(many, 3)
    x[0], x[1:] = -x[0].abs(), x[1:].abs() * 2
    for _ in range(2):
        with pytest.warns(JacopsWarning, match="reads values out of tensors.*differentiated alone"):
            found = compute_jacobian(model, x, checks=checks)
        torch.testing.assert_close(found, oracle.input_jacobian(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_a_forward_is_no_mixing(no_fallback: None, dtype: torch.dtype) -> None:
    class Lowered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return self.net(x).float()

    model, x = Lowered(), draw(24, 16, dtype=torch.float32)
    for _ in range(2):
        found = compute_jacobian(model, x)
    expected = oracle.input_jacobian(model.net, x)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_coupling_in_lower_precision_is_still_seen() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.first(x).tanh()
                return self.last(h + 1e-3 * h.mean(0)).float()

    with pytest.warns(JacopsWarning, match="samples mix"):
        compute_jacobian(Coupled(), draw(24, 16, dtype=torch.float32))


class Positions(nn.Module):
    """Tokens plus positions, which all samples share."""

    def __init__(self, batched: bool, padding: int | None = None) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 4), nn.Embedding(6, 4, padding_idx=padding)
        self.out, self.batched = nn.Linear(4, 2), batched

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.out((self.tokens(ids) + self.places(places[None] if self.batched else places)).tanh().mean(1))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_a_table_of_positions_is_added_to_every_sample(no_fallback: None, batched: bool, padding: int | None) -> None:
    model, ids = settled(Positions(batched, padding)), torch.randint(11, (5, 6))
    whole = torch.cat([b.reshape(10, -1) for b in oracle.parameter_jacobian(model, ids)[0]], 1)
    found = sample_jacobians(model, ids)
    torch.testing.assert_close(found.dense(), whole)
    assert "5 samples to a sweep" in found.route
    torch.testing.assert_close(jacops.modjac(model, ids, flatten=True), whole)
    y = draw(5, 2, seed=3)
    rows = torch.stack([oracle.gradient(model, F.mse_loss, ids[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(sample_gradients(model, F.mse_loss, ids, y).dense(), rows)
    torch.testing.assert_close(
        jacops.hessian(model, F.mse_loss, ids, y).dense(), oracle.hessian(model, F.mse_loss, ids, y)
    )


def test_a_small_gpt2_shares_sweeps(no_fallback: None) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).double().eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits

    def loss(output: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    wrapped, ids = Logits(), torch.randint(20, (4, 6))
    found = sample_gradients(wrapped, loss, ids, ids)
    expected = torch.stack([oracle.gradient(wrapped, loss, ids[i : i + 1], ids[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(found.dense(), expected)
    assert "4 samples to a sweep" in found.route
