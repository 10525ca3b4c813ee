"""Language models in half precision, padded anyhow, without labels, with losses that do not fit: right, or an error."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import jacops
from jacops.errors import DataError, InputError, InputTypeError, JacopsError
from jacops.influence import ensemble_influences, projected_index, tracin
from jacops.solvers import EKFAC
from language_cases import (
    HEADS,
    IGNORED,
    MODELS,
    adapted,
    batches,
    classifier,
    close,
    gpt2,
    llama,
    sequences,
    shifted,
    transformers,
)

# Residuals of estimators, and samples that are taken alone, are not the question here.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jacops.JacopsWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
Estimate = Callable[..., Tensor]


def solved(solver: Any) -> Estimate:
    def found(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
        wrapped = jacops.TorchTwiceDifferentiable(model, loss)
        options |= {"curvature": "ggn", "damping": 0.1, "solver": solver}
        return jacops.compute_influences(wrapped, data, **options).values

    return found


def indexed(curvature: Any) -> Estimate:
    def found(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
        index = projected_index(model, data, loss=loss, rank=3, curvature=curvature, **options)
        return index.influences(data, damping=0.1).values

    return found


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return the state of a model, and another one; parts that are one tensor stay equal."""
    here = {name: value.clone() for name, value in model.state_dict().items()}
    return [here, {name: value * 1.1 if value.is_floating_point() else value for name, value in here.items()}]


def traced(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
    return tracin(model, data, states(model), loss=loss, test_data=data, **options).values


def averaged(solver: Any) -> Estimate:
    def found(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
        options |= {"curvature": "ggn", "damping": 0.1, "solver": solver}
        return ensemble_influences(model, data, states(model), loss=loss, test_data=data, **options).values

    return found


def alone(solver: Any) -> Estimate:
    def found(model: nn.Module, loss: Any, data: Any, **options: Any) -> Tensor:
        options |= {"curvature": "ggn", "damping": 0.1, "solver": solver}
        return jacops.self_influences(model, data, loss=loss, **options)

    return found


def table(ekfac: Any) -> dict[str, Estimate]:
    return {
        "ekfac": solved(ekfac),
        "index": indexed("empirical_fisher"),
        "index, ggn": indexed("ggn"),
        "tracin": traced,
        "ensemble": averaged(ekfac),
        "self": alone(ekfac),
    }


ESTIMATES = table(EKFAC(report_residual=False))
EXACT = table(EKFAC(fisher="exact", report_residual=False))  # for data whose rows are others, and so their draws
estimates = pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)


# ---- padding, tied weights, adapters ---------------------------------------------------------------------------------

LENGTHS = (8, 5, 7, 3, 6, 4)


def padded() -> Any:
    """Return the same sequences padded otherwise: far and on the left, and no further than the longest of a batch."""
    return [batches(sequences(LENGTHS, 16, left=True))[0], batches(sequences(LENGTHS, 6))[1]]


@estimates
@pytest.mark.parametrize("kind", ["plain", "tied", "adapters"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_score(name: str, kind: str, estimate: Estimate) -> None:
    model, picked = MODELS[name](kind == "tied"), HEADS[name]
    if kind == "tied":
        picked = [next(iter(dict(model.named_parameters()))), HEADS[name][0]]
    if kind == "adapters":
        model, picked = adapted(name, model).double(), ["*lora_*"]
    right = estimate(model, shifted, batches(sequences(LENGTHS, 8)), parameters=picked)
    close(estimate(model, shifted, padded(), parameters=picked), right, 1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_padding_changes_no_score_of_a_classifier(kind: str) -> None:
    model = classifier(3, kind)
    picked = "classifier.*" if kind == "bert" else "score.*"
    found = []
    for width in (8, 16):
        whole = sequences(LENGTHS, width) | {"labels": torch.tensor([0, 2, 1, 1, 0, 2])}
        found.append(solved("ekfac")(model, "model", batches(whole), parameters=picked))
    close(found[1], found[0], 1e-4)  # transformers' own losses take float32


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_ekfac_covers_classifiers(kind: str) -> None:
    model, whole = classifier(3, kind).double(), sequences() | {"labels": torch.tensor([0, 2, 1, 1, 0, 2])}
    problem = jacops.Problem(model, "model", batches(whole))
    curvature = EKFAC(fisher="exact").approximate(problem.ggn())
    assert curvature.coverage["diagonal"] == 0
    assert sum(curvature.coverage.values()) == sum(p.numel() for p in model.parameters())
    assert curvature.coverage["kronecker"] >= 0.9 * problem.space.dim  # the rest are norms, exactly
    close(curvature.eigenvalues.sum(), problem.ggn().dense().trace(), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_index_of_adapters_is_that_of_their_gradients(name: str) -> None:
    model, whole = adapted(name, MODELS[name]()).double(), sequences()
    rows = jacops.Problem(model, shifted, batches(whole), parameters="*lora_*").sample_gradients().dense()
    shares = (whole["labels"][:, 1:] != IGNORED).sum(1) / (whole["labels"][:, 1:] != IGNORED).sum()
    index = projected_index(model, batches(whole), loss=shifted, rank=32, parameters="*lora_*")
    matrix = rows.T @ (rows * (shares**2 * shares.reciprocal()).unsqueeze(1))
    right = rows @ torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix)).double(), rows.T)
    found = index.influences(batches(whole), damping=0.1).values
    correlation = torch.corrcoef(torch.stack([found.flatten(), right.flatten()]))[0, 1]
    assert float(correlation) > 0.99


# ---- half precision --------------------------------------------------------------------------------------------------


@estimates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_right_to_its_rounding_or_refused(estimate: Estimate, dtype: torch.dtype) -> None:
    data = batches(sequences())
    try:
        found = estimate(gpt2().to(dtype), "model", data)
    except InputError as error:
        assert "`model.float()`" in str(error)  # noqa: PT017
        return
    close(found.double(), estimate(gpt2().float(), "model", data).double(), 0.05)


@pytest.mark.parametrize("call", ["approximate", "kronecker_factors"])
def test_factors_in_half_precision_are_refused(call: str) -> None:
    problem = jacops.Problem(gpt2().bfloat16(), "model", batches(sequences()))
    with pytest.raises(InputError, match=r"needs float32 or float64. Convert the model first, by `model.float\(\)`"):
        EKFAC().approximate(problem.ggn()) if call == "approximate" else jacops.kronecker_factors(problem)


@pytest.mark.parametrize("estimate", [ESTIMATES[name] for name in ("ekfac", "index", "self")])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_in_single_precision_over_a_model_in_half(name: str, estimate: Estimate) -> None:
    single, half = (adapted(name, MODELS[name]().to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.float32}
    data = batches(sequences())
    right, found = (estimate(model, "model", data, parameters="*lora_*") for model in (single, half))
    close(found.double(), right.double(), 0.1)


# ---- labels that are ignored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("loss", ["model", shifted], ids=["own", "written"])
def test_rows_without_labels_have_no_influence(loss: Any, estimate: Estimate) -> None:
    whole, model = sequences(), gpt2().float() if loss == "model" else gpt2()
    whole["labels"][[0, 1, 4]] = IGNORED  # 0 and 1: all of the first batch
    kept = {key: value[[2, 3, 5]] for key, value in whole.items()}
    found = estimate(model, loss, batches(whole, 2, 3, 1), parameters=HEADS["gpt2"])
    right = estimate(model, loss, batches(kept, 2, 1), parameters=HEADS["gpt2"])
    assert not found[[0, 1, 4]].any()
    if found.ndim == 1:  # of a sample's share relative to an equal one, the square: one of six, not of three
        close(found[[2, 3, 5]], right * 4, 1e-3)
    else:
        close(found[[2, 3, 5]][:, [2, 3, 5]], right, 1e-3)


@estimates
@pytest.mark.parametrize("loss", ["model", shifted], ids=["own", "written"])
def test_data_without_labels_are_refused(loss: Any, estimate: Estimate) -> None:
    whole = sequences()
    whole["labels"].fill_(IGNORED)
    with pytest.raises(DataError, match="All labels are ignored"):
        estimate(gpt2().float(), loss, batches(whole))


# ---- what does not fit -----------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Returns logits `(n, T, V)`, or `(n, V, T)` as torch's cross-entropy takes them."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.model, self.transposed = gpt2(), transposed

    def forward(self, **inputs: Tensor) -> Tensor:
        logits = self.model(**inputs).logits
        return logits.transpose(1, 2) if self.transposed else logits


def test_cross_entropy_takes_logits_that_are_transposed() -> None:
    data, picked = batches(sequences()), "*transformer.ln_f.*"

    def flattened(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), y.flatten())

    found = solved("direct")(Logits(transposed=True), nn.CrossEntropyLoss(), data, parameters=picked)
    close(found, solved("direct")(Logits(), flattened, data, parameters=picked), 1e-8)


def mistaken(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, y)


class NoLoss(nn.Module):
    """Has a `loss_function`, and returns no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()
        self.config, self.loss_function = self.model.config, self.model.loss_function

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def bare_gpt2() -> nn.Module:
    return transformers.GPT2Model(gpt2().config).eval()


def labelled(labels: Any) -> Any:
    return lambda whole: whole | {"labels": labels}


def as_they_are(whole: Any) -> Any:
    return whole


SHAPES = r"its logits of shape \(4, 8, 23\), the target of shape \(4, 8\)"
FEW = r"its logits of shape \(\d, 3\), the target of shape \(\d"
Refusal = tuple[Callable[[], nn.Module], Any, Callable[[Any], Any], type[JacopsError], str]
REFUSED: dict[str, Refusal] = {
    "classes last": (Logits, nn.CrossEntropyLoss(), as_they_are, InputError, r"`lambda output, y: cross_entropy\("),
    "likelihood": (Logits, nn.NLLLoss(), as_they_are, InputError, r"`lambda output, y: nll_loss\(output\.flatten"),
    "squares": (Logits, nn.MSELoss(), as_they_are, InputError, r"\(4, 8\), .* \(4, 8, 23\) .* \(mse_loss\)"),
    "an output": (gpt2, nn.CrossEntropyLoss(), as_they_are, InputError, SHAPES),
    "written": (gpt2, mistaken, as_they_are, InputError, f"mistaken, where cross_entropy fails .*{SHAPES}"),
    "one class too many": (
        lambda: classifier(3, "bert"), "model", labelled(torch.tensor([0, 2, 1, 7, 0, 2])), InputError,
        f"ForSequenceClassificationLoss, where cross_entropy fails .*{FEW}.* from 0 to one less",
    ),
    "labels of tokens": (lambda: classifier(3, "bert"), "model", as_they_are, InputError, f"{FEW}.*Write a `loss"),
    "no head": (bare_gpt2, "model", as_they_are, InputError, "an output without `logits`"),
    "no loss": (NoLoss, "model", as_they_are, InputError, "returns no `loss` for `labels=`"),
    "no loss function": (Logits, "model", as_they_are, InputTypeError, r"`loss_function` is needed\. Write it as"),
}  # fmt: skip


@pytest.mark.parametrize("estimate", [ESTIMATES["ekfac"], indexed("ggn"), traced], ids=["ekfac", "index", "tracin"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_says_what_to_write(case: str, estimate: Estimate) -> None:
    model, loss, change, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        estimate(model(), loss, batches(change(sequences())))


def test_batches_without_labels_say_under_which_name_these_are_looked_for() -> None:
    data = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches(sequences())]
    with pytest.raises(DataError, match=r"mappings with the target under 'labels', .* are needed. Pass `unpack=`"):
        solved("ekfac")(gpt2(), "model", data)
    missing: list[Mapping[str, Any]] = [{**batch, "labels": None} for batch in data]
    with pytest.raises(InputError, match="the target a NoneType"):
        solved("ekfac")(gpt2(), "model", missing)


def test_other_errors_of_a_loss_keep_their_type_and_name_the_shapes() -> None:
    def subtracted(output: Any, y: Tensor) -> Tensor:
        return (output.logits - y).square().mean()

    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        solved("ekfac")(gpt2(), subtracted, batches(sequences()))
    (note,) = caught.value.__notes__
    assert "subtracted was given an output" in note
    assert "a target of shape (4, 8)" in note


@estimates
@pytest.mark.parametrize(
    ("picked", "near"),
    [("transformer.h.0.atn.*", "transformer.h.0.attn.c_proj.bias"), (["transformer.*", "lm_heads*"], "lm_head.weight")],
)
def test_patterns_that_fit_nothing_name_what_is_near(picked: Any, near: str, estimate: Estimate) -> None:
    with pytest.raises(InputError, match=f"no parameter fits; the nearest are .*{near}"):
        estimate(gpt2(), shifted, batches(sequences()), parameters=picked)


def test_a_llama_in_half_precision_goes_on_as_the_error_says() -> None:
    model, data = llama().bfloat16(), batches(sequences())
    with pytest.raises(InputError, match="model.float"):
        ESTIMATES["ekfac"](model, "model", data, parameters=HEADS["llama"])
    assert bool(ESTIMATES["ekfac"](model.float(), "model", data, parameters=HEADS["llama"]).isfinite().all())
