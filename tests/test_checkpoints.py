"""Scores from several models: TracIn and ensembles, and states that are loaded into a copy."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacops
import oracle
from jacops import TorchTwiceDifferentiable, compute_influences
from jacops.errors import DataError, InputError, InputTypeError
from jacops.influence import ensemble_influences, tracin
from small import batches, draw, small_net, tied_net

X, Y = draw(9, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
TEST = [(draw(4, 3, seed=5), Y[:4])]
DATA = batches(X, Y, 5, 4)
RATES = [0.1, 0.03, 0.2]


def states() -> list[dict[str, Tensor]]:
    return [{name: scale * value for name, value in small_net().state_dict().items()} for scale in (0.5, 1.0, 1.5)]


def models() -> list[nn.Module]:
    made = []
    for state in states():
        made.append(small_net())
        made[-1].load_state_dict(state)
    return made


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([oracle.gradient(model, F.cross_entropy, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


def products() -> Tensor:
    parts = zip(RATES, models(), strict=True)
    return sum((rate * gradients(m, *TEST[0]) @ gradients(m, X, Y).T for rate, m in parts), torch.zeros(()).double())


def as_paths(folder: Path, suffix: str) -> list[Any]:
    from safetensors.torch import save_file

    paths = []
    for number, state in enumerate(states()):
        paths.append(folder / f"{number}.{suffix}")
        if suffix == "safetensors":
            save_file(state, paths[-1])
        else:
            torch.save(state if suffix == "pt" else {"state_dict": state, "step": 3}, paths[-1])
    return paths


FORMS = ["states", "models", "wrapped", "pt", "ckpt", "safetensors"]


def given(form: str, folder: Path) -> list[Any]:
    if form in ("states", "models"):
        return {"states": states, "models": models}[form]()
    if form == "wrapped":
        return [TorchTwiceDifferentiable(m, F.cross_entropy) for m in models()]
    return as_paths(folder, form)


@pytest.mark.parametrize("form", FORMS)
def test_tracin_sums_products_of_gradients_over_checkpoints(form: str, tmp_path: Path):
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = TorchTwiceDifferentiable(model, F.cross_entropy)
    found = tracin(wrapped, DATA, given(form, tmp_path), learning_rates=RATES, test_data=TEST)
    torch.testing.assert_close(found.values, products())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "tracin over 3 checkpoints" in repr(found)
    torch.testing.assert_close(found.leave_one_out(), found.values / 9)


def test_one_checkpoint_is_the_model_as_it_stands():
    model = small_net()
    found = tracin(model, DATA, [model], test_data=TEST, loss=F.cross_entropy)
    torch.testing.assert_close(found.values, gradients(model, *TEST[0]) @ gradients(model, X, Y).T)
    picked = tracin(model, DATA, [model], test_data=TEST, loss=F.cross_entropy, parameters="2.*")
    torch.testing.assert_close(picked.values, gradients(model, *TEST[0])[:, 16:] @ gradients(model, X, Y)[:, 16:].T)


def test_tiles_of_test_gradients_change_nothing(monkeypatch: pytest.MonkeyPatch):
    from jacops._influence import _checkpoints

    monkeypatch.setattr(_checkpoints, "_TILE_BYTES", 3 * 26 * 8)
    found = tracin(small_net(), DATA, states(), learning_rates=RATES, test_data=TEST, loss=F.cross_entropy)
    torch.testing.assert_close(found.values, products())


def test_steps_of_gradient_descent_are_what_tracin_adds_up():
    """A step on one sample lowers a test loss by the rate times the product of gradients, to first order."""
    model, rate = small_net(), 1e-6
    found = tracin(model, DATA, [model], learning_rates=rate, test_data=TEST, loss=F.cross_entropy).values
    x, y = TEST[0]
    before = F.cross_entropy(model(x), y, reduction="none").detach()
    gradient = gradients(model, X[2:3], Y[2:3])[0]
    with torch.no_grad():
        start = 0
        for p in model.parameters():
            p -= rate * gradient[start : start + p.numel()].view_as(p)
            start += p.numel()
    after = F.cross_entropy(model(x), y, reduction="none").detach()
    torch.testing.assert_close(before - after, found[:, 2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_an_ensemble_is_the_mean_of_its_members(form: str, tmp_path: Path):
    options: Any = {"curvature": "ggn", "damping": 0.5, "l2": 0.1}
    wrapped = TorchTwiceDifferentiable(small_net(), F.cross_entropy)
    found = ensemble_influences(wrapped, DATA, given(form, tmp_path), test_data=TEST, **options)
    members = torch.stack(
        [
            compute_influences(TorchTwiceDifferentiable(m, F.cross_entropy), DATA, test_data=TEST, **options).values
            for m in models()
        ]
    )
    torch.testing.assert_close(found.values, members.mean(0))
    torch.testing.assert_close(found.info["spread"], members.std(0, unbiased=False))
    assert found.info["members"] == [("converged", 0.5)] * 3
    assert "mean of 3 models" in repr(found)


def test_tied_weights_are_needed_once():
    model = tied_net()
    state = {"0.weight": 2 * model[0].weight.detach()}
    found = tracin(model, [(draw(4, 3), draw(4, 3, seed=1))], [state], loss=F.mse_loss)
    other = tied_net()
    other[0].weight.data.mul_(2)
    expected = tracin(other, [(draw(4, 3), draw(4, 3, seed=1))], [other], loss=F.mse_loss)
    torch.testing.assert_close(found.values, expected.values)


def test_a_state_that_does_not_fit_is_refused_and_the_model_kept():
    model = small_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = states()[0]
    wrong: dict[str, dict[str, Tensor]] = {
        r"checkpoints\[1\]. is without 0.bias": {n: v for n, v in good.items() if n != "0.bias"},
        r"checkpoints\[1\]. is with 4.weight": {**good, "4.weight": torch.ones(2)},
        r"checkpoints\[1\]. is of other shapes": {**good, "0.bias": torch.ones(7)},
    }
    for words, state in wrong.items():
        with pytest.raises(InputError, match=words):
            tracin(model, DATA, [good, state], loss=F.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Planted:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_files_are_read_without_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"0.weight": Planted()}, tmp_path / "planted.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"nothing")
    for name in ("planted.pt", "torn.safetensors"):
        with pytest.raises(DataError, match=f"{name}.*holds no state"):
            tracin(small_net(), DATA, [tmp_path / name], loss=F.cross_entropy)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        tracin(small_net(), DATA, [tmp_path / "absent.pt"], loss=F.cross_entropy)


REFUSED: list[tuple[Any, Any, str]] = [
    ([], InputError, "`checkpoints` is empty"),
    ("a.pt", InputTypeError, "`checkpoints` is a str.*list"),
    ({"0.weight": torch.ones(4, 3)}, InputTypeError, "`checkpoints` is a dict.*list"),
    (small_net(), InputTypeError, "`checkpoints` is a Sequential"),
    ([3], InputTypeError, r"`checkpoints\[0\]` is an int.*state dict"),
    ([{"0.weight": 3}], InputTypeError, r"`checkpoints\[0\]` is a dict"),
]


@pytest.mark.parametrize(("checkpoints", "error", "words"), REFUSED)
@pytest.mark.parametrize("call", [tracin, ensemble_influences])
def test_what_is_no_list_of_states_is_refused(call: Any, checkpoints: Any, error: Any, words: str):
    with pytest.raises(error, match=words):
        call(small_net(), DATA, checkpoints, loss=F.cross_entropy)


@pytest.mark.parametrize("rates", [[0.1], [0.1] * 4, float("nan"), "fast", True])
def test_rates_are_one_for_each_checkpoint(rates: Any):
    with pytest.raises(InputError, match="`learning_rates`"):
        tracin(small_net(), DATA, states(), learning_rates=rates, loss=F.cross_entropy)


def test_a_model_that_cannot_be_copied_takes_models():
    class Locked(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle a lock")

    model = Locked(*small_net())
    with pytest.raises(InputError, match="`model` is a Locked that cannot be copied.*Pass models"):
        tracin(model, DATA, states(), loss=F.cross_entropy)
    found = tracin(model, DATA, models(), learning_rates=RATES, test_data=TEST, loss=F.cross_entropy)
    torch.testing.assert_close(found.values, products())


def test_jax_models_are_checkpoints_and_have_no_states():
    pytest.importorskip("jax")
    from jax_cases import as_jax, double_precision, mse

    x, y = draw(5, 3), draw(5, 1, seed=1)
    with double_precision():
        points = [draw(3, 1, seed=2), draw(3, 1, seed=3)]
        ours = [jacops.JaxTwiceDifferentiable(lambda w, x: x @ w, as_jax(w), mse) for w in points]
        found = tracin(ours[0], [(as_jax(x), as_jax(y))], ours).values
        with pytest.raises(InputTypeError, match="JAX"):
            tracin(ours[0], [(as_jax(x), as_jax(y))], [{"w": points[0]}])
    expected = torch.zeros(5, 5).double()
    for w in points:
        G = 2 * (x @ w - y) * x  # noqa: N806
        expected += G @ G.T
    torch.testing.assert_close(found, expected)


def test_language_models_have_checkpoints():
    pytest.importorskip("transformers")
    from test_language_models import batches as cut
    from test_language_models import by_hand, gpt2, sequences

    model, other, whole = gpt2(), gpt2(), sequences()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    picked = "transformer.ln_f.*"
    found = tracin(model, cut(whole), [model, other.state_dict()], loss="model", parameters=picked).values
    right = torch.zeros(6, 6).double()
    for m in (model, other):
        rows, _, _ = by_hand(m, whole, [p for n, p in m.named_parameters() if n.startswith("transformer.ln_f")])
        right += rows @ rows.T
    torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-10)
