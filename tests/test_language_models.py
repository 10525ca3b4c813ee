"""Influence of language models as their users write them, against plain autograd and dense solves in float64."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import jacops
from jacops._fisher import fisher_at
from jacops._runtime.counter import Draws
from jacops.errors import DataError, InputError, InputTypeError, NotDifferentiableError
from jacops.influence import projected_index
from jacops.solvers import EKFAC
from language_cases import (
    HEADS,
    IGNORED,
    MODELS,
    TOLERANCES,
    VOCABULARY,
    adapted,
    batches,
    classifier,
    close,
    gpt2,
    sequences,
    shifted,
)

transformers: Any = pytest.importorskip("transformers")

# ---- the oracle: plain autograd, one sequence at a time --------------------------------------------------------------


def by_hand(model: nn.Module, batch: Mapping[str, Tensor], picked: list[nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of sequences, gradients of their tokens' terms, and the Gauss-Newton matrix of the mean.

    The Gauss-Newton matrix of cross-entropy is the sum over predictions of `J^T (diag(p) - p p^T) J`.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels, total = batch["labels"], (batch["labels"][:, 1:] != IGNORED).sum()
    size = sum(p.numel() for p in picked)
    rows, width = labels.shape
    tokens, matrix = torch.zeros(rows, width, size).double(), torch.zeros(size, size).double()
    for i in range(rows):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        logits = model(**one).logits[0]
        counted = int((labels[i, 1:] != IGNORED).sum())
        for t in range(1, width):
            if labels[i, t] == IGNORED:
                continue
            term = F.cross_entropy(logits[t - 1], labels[i, t]) / counted
            tokens[i, t] = flat(torch.autograd.grad(term, picked, retain_graph=True, materialize_grads=True))
            p = logits[t - 1].softmax(0).detach()
            J = torch.stack(
                [flat(torch.autograd.grad(z, picked, retain_graph=True, materialize_grads=True)) for z in logits[t - 1]]
            )
            matrix += J.T @ (p.diag() - p.outer(p)) @ J / total
    return tokens.sum(1), tokens, matrix


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def dense(model: nn.Module, batch: Any, damping: float, picked: list[nn.Parameter] | None = None) -> Tensor:
    """Return influences of all sequences on all of them by a dense solve."""
    rows, _, matrix = by_hand(model, batch, list(model.parameters()) if picked is None else picked)
    return rows @ torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).double(), rows.T)


def some(name: str, model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if any(fnmatchcase(n, pattern) for pattern in HEADS[name])]


# ---- batches as tokenizers make them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("solver", ["direct", "cg", "minres"])
def test_influences_are_those_of_a_dense_solve(name: str, solver: str) -> None:
    model, whole = MODELS[name](), sequences()
    options: Any = {"curvature": "ggn", "damping": 1e-2, "solver": solver, "parameters": HEADS[name]}
    found = jacops.compute_influences(jacops.TorchTwiceDifferentiable(model, shifted), batches(whole), **options)
    close(found, dense(model, whole, 1e-2, some(name, model)), TOLERANCES[name])
    assert found.info["status"] in ("converged", "attainable" if name == "llama" else "converged")


class Table(nn.Module):
    """Logits `(n, T, classes)` by a table of tokens: a model without mixing, whose output is one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY).double())

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


def plainly_shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def unshifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def by_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    terms = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (terms.sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp_min(1)).mean()


def untouched(labels: Tensor) -> Tensor:
    return labels


def without_prompt(labels: Tensor) -> Tensor:
    return labels.index_fill(1, torch.tensor([0, 1]), IGNORED)


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "untrained"])
@pytest.mark.parametrize("change", [untouched, without_prompt])
@pytest.mark.parametrize("loss", [plainly_shifted, unshifted, by_sequence])
def test_sums_over_batches_are_those_of_one_batch(loss: Any, change: Any, zero: bool) -> None:
    model, whole = Table(), sequences((8, 8, 8, 8, 4, 3))  # batches of different lengths, the first of equal ones
    with torch.no_grad():
        model.table.mul_(0 if zero else 1)
    del whole["attention_mask"]
    whole["labels"] = change(whole["labels"])
    together, apart = (jacops.Problem(model, loss, data) for data in ([whole], batches(whole)))
    torch.testing.assert_close(apart.value(), together.value())
    torch.testing.assert_close(apart.gradient(), together.gradient())
    (right,) = torch.autograd.grad(loss(model(whole["input_ids"]), whole["labels"]), [model.table])
    close(apart.gradient(), right.flatten())


def test_two_labels_a_sequence_are_enough_to_see_how_a_loss_divides() -> None:
    whole = sequences((2, 2, 2, 2, 1, 2))
    del whole["attention_mask"]
    model = Table()
    (right,) = torch.autograd.grad(plainly_shifted(model(whole["input_ids"]), whole["labels"]), [model.table])
    close(jacops.Problem(model, plainly_shifted, batches(whole)).gradient(), right.flatten())


# ---- the model's own loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_loss_is_what_it_returns_for_labels(name: str) -> None:
    model, whole = MODELS[name]().float(), sequences()
    problem = jacops.Problem(model, "model", batches(whole))
    right = model(**whole).loss
    torch.testing.assert_close(problem.value(), right.item())
    gradient = flat(torch.autograd.grad(right, list(model.parameters())))
    close(problem.gradient(), gradient, 1e-5)
    x = {key: value for key, value in whole.items() if key != "labels"}
    close(jacops.TorchTwiceDifferentiable(model, "model").grad(x, whole["labels"]), gradient, 1e-5)


@pytest.mark.parametrize("solver", ["direct", "ekfac"])
def test_a_models_own_loss_gives_what_the_written_one_gives(solver: str) -> None:
    model, data = gpt2().float(), batches(sequences())
    options: Any = {"curvature": "ggn", "damping": 1.0, "solver": solver, "parameters": HEADS["gpt2"]}
    own, written = (
        jacops.compute_influences(jacops.TorchTwiceDifferentiable(model, loss), data, **options)
        for loss in ("model", shifted)
    )
    close(own.values, written.values, 1e-4)


def test_a_models_own_loss_in_float32_is_a_softmaxs_for_a_model_in_float64() -> None:
    model, data = gpt2(), batches(sequences())
    found = [
        EKFAC(fisher="monte_carlo").approximate(jacops.Problem(model, loss, data).ggn()) for loss in ("model", shifted)
    ]
    close(found[0].eigenvalues, found[1].eigenvalues, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["model", shifted])
def test_the_default_call_takes_conjugate_gradients(loss: Any, dtype: Any) -> None:
    model, whole = gpt2(), sequences()
    found = jacops.compute_influences(model.to(dtype), batches(whole), loss=loss)
    assert found.info["chosen"].startswith("block CG")
    assert "did not do" not in found.info["chosen"]
    mixed = loss == "model" and dtype == torch.float64  # a loss in float32: its products have no residual of 1e-8
    assert found.info["status"] == ("attainable" if mixed else "converged")
    assert max(found.info["residual"]) <= (1e-6 if mixed else 1e-4 if dtype == torch.float32 else 1e-8)
    assert bool(found.values.isfinite().all())
    close(found.values.double(), dense(model.double(), whole, found.damping), 1e-3 if dtype == torch.float32 else 1e-6)


def in_float32(output: Any, labels: Tensor, bend: float = 0.0) -> Tensor:
    wide = output.logits[:, :-1].float()
    return F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten()) - bend * wide.square().mean()


def bent(output: Any, labels: Tensor) -> Tensor:
    """Not convex, by less than a loss in float32 rounds."""
    return in_float32(output, labels, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("loss", "convex"), [("model", True), (in_float32, True), (bent, False)])
def test_a_loss_in_float32_is_judged_by_its_eigenvalues_in_float64(loss: Any, convex: bool, dtype: Any) -> None:
    problem = jacops.Problem(gpt2().to(dtype), loss, batches(sequences()))
    assert problem.ggn().positive is convex


@pytest.mark.parametrize("call", ["grad", "hessian"])
def test_a_loss_with_more_terms_is_refused_by_single_calls_too(call: str) -> None:
    model, whole = WithMore(gpt2().config).eval(), sequences((4, 3))
    for p in list(model.parameters())[1:]:
        p.requires_grad_(False)
    x = {key: value for key, value in whole.items() if key != "labels"}
    wrapped = jacops.TorchTwiceDifferentiable(model, "model")
    with pytest.raises(InputError, match="of its logits and labels"):
        getattr(wrapped, call)(x, whole["labels"])


TARGETS = {
    "single": (3, lambda: torch.tensor([0, 2, 1, 1, 0, 2])),
    "regression": (1, lambda: torch.linspace(-1, 1, 6)),
    "several": (3, lambda: torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]])),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_classifiers_of_sequences_bring_their_loss(kind: str, target: str) -> None:
    many, labels = TARGETS[target]
    model, whole = classifier(many, kind), sequences()
    whole["labels"] = labels()
    data = batches(whole)
    parameters = "classifier.*" if kind == "bert" else "score.*"
    problem = jacops.Problem(model, "model", data, parameters=parameters)
    assert model.config.problem_type is None
    picked = [p for n, p in model.named_parameters() if n.startswith(("classifier.", "score."))]
    value, gradient = problem.value_and_gradient()
    assert model.config.problem_type is None
    right = model(**whole).loss
    torch.testing.assert_close(value, right.item())
    close(gradient, flat(torch.autograd.grad(right, picked)), 1e-5)
    model.config.problem_type = None
    wrapped = jacops.TorchTwiceDifferentiable(model, "model")
    found = jacops.compute_influences(wrapped, data, curvature="ggn", damping=0.1, parameters=parameters)
    assert found.shape == (6, 6)
    assert bool((found.values.diagonal() > 0).all())


# ---- Fisher matrices -------------------------------------------------------------------------------------------------


def drawn(problem: jacops.Problem, draws: int, seed: int) -> Tensor:
    """The Fisher matrix of all samples by so many labels for each prediction."""
    objective, (batch,) = problem.objective, problem.batches()
    record = partial(objective.recorded, batch.x, "fisher")
    return fisher_at(objective.model, objective.losses, batch.y, "monte_carlo", draws, Draws(seed), record).dense()


@pytest.mark.parametrize("loss", ["model", shifted])
@pytest.mark.parametrize("name", MODELS)
def test_drawn_labels_give_the_exact_fisher_matrix_on_average(name: str, loss: Any) -> None:
    model, whole = MODELS[name](), sequences((8, 5, 3))
    parameters = {"gpt2": "transformer.ln_f.*", "llama": "model.norm.*"}[name]
    _, _, right = by_hand(model, whole, [p for n, p in model.named_parameters() if fnmatchcase(n, parameters)])
    problem = jacops.Problem(model, loss, [whole], parameters=parameters)
    close(problem.fisher("exact").dense(), right, 1e-5)
    few, many = (torch.stack([drawn(problem, n, seed) for seed in range(4)]).mean(0) for n in (100, 10_000))
    assert float((many - right).norm()) <= 0.03 * float(right.norm())  # by one over the root of 40,000 draws
    assert float((few - right).norm()) <= 0.3 * float(right.norm())
    one = problem.fisher("monte_carlo")
    assert float((one.dense() - right).norm()) <= 5 * float(one.noise or 0) * float(right.norm())


def test_drawn_labels_go_by_places_of_sequences_whatever_batches_and_padding() -> None:
    model, parameters = gpt2(), HEADS["gpt2"]
    right = jacops.Problem(model, "model", [sequences()], parameters=parameters).fisher("monte_carlo").dense()
    for data in (batches(sequences()), batches(sequences(width=16), 1, 5), batches(sequences(width=16, left=True))):
        close(jacops.Problem(model, "model", data, parameters=parameters).fisher("monte_carlo").dense(), right, 1e-5)


def test_influences_by_drawn_labels_are_those_of_a_dense_solve() -> None:
    model, data = gpt2(), batches(sequences())
    problem = jacops.Problem(model, "model", data, parameters=HEADS["gpt2"])
    rows, matrix = problem.sample_gradients().dense(), problem.fisher("monte_carlo").dense()
    options: Any = {"loss": "model", "parameters": HEADS["gpt2"], "damping": 0.1}
    found = jacops.compute_influences(model, data, curvature="monte_carlo_fisher", **options)
    close(found.values, rows @ torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix)).double(), rows.T), 1e-5)
    damping = options.pop("damping")
    index = projected_index(model, data, rank=64, curvature="monte_carlo_fisher", **options)
    close(index.influences(data, damping=damping).values, found.values, 1e-5)


# ---- labels that are ignored, and what does not fit ------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["written", "own"])
def test_a_sequence_without_labels_has_no_influence_at_all(own: bool) -> None:
    model, whole = gpt2().float() if own else gpt2(), sequences()
    whole["labels"][[0, 1, 4]] = IGNORED  # 0 and 1: all of the first batch
    wrapped = jacops.TorchTwiceDifferentiable(model, "model" if own else shifted)
    options: Any = {"curvature": "ggn", "damping": 0.1, "parameters": HEADS["gpt2"]}
    found = jacops.compute_influences(wrapped, batches(whole, 2, 3, 1), **options)
    assert not found.values[[0, 1, 4]].any()
    assert not found.values[:, [0, 1, 4]].any()
    assert found.shares.tolist()[:2] == [0, 0]
    kept = {key: value[[2, 3, 5]] for key, value in whole.items()}
    right = jacops.compute_influences(wrapped, batches(kept, 2, 1), **options)
    close(found.values[[2, 3, 5]][:, [2, 3, 5]], right.values, 1e-4 if own else 1e-8)


@pytest.mark.parametrize("loss", [shifted, "model"])
def test_data_without_labels_are_refused(loss: Any) -> None:
    whole = sequences()
    whole["labels"].fill_(IGNORED)
    wrapped = jacops.TorchTwiceDifferentiable(gpt2(), loss)
    with pytest.raises(DataError, match="All labels are ignored"):
        jacops.compute_influences(wrapped, batches(whole), curvature="ggn", damping=0.1)


class Logits(nn.Module):
    """Returns one tensor, and has no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits


class WithMore(transformers.GPT2LMHeadModel):  # pyright: ignore[reportUntypedBaseClass]
    """A model whose loss has a term that its logits know nothing of, as mixtures of experts have."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.loss = output.loss if output.loss is None else output.loss * 1.001
        return output


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "a loss of tensors": (gpt2, F.cross_entropy, {}, InputError, r"output\.logits\.flatten\(0, 1\)"),
    "classes last": (Logits, nn.CrossEntropyLoss(), {}, InputError, r"output\[:, :-1\]` and `y\[:, 1:\]"),
    "no loss of its own": (Logits, "model", {}, InputTypeError, "`loss_function` is needed. Write it as"),
    "a loss with more": (lambda: WithMore(gpt2().config).eval(), "model", {}, InputError, "of its logits and labels"),
    "a cache": (gpt2, lambda o, y: o.past_key_values.layers[0].keys.sum(), {}, NotDifferentiableError, "past_key_val"),
    "no reduction": (gpt2, lambda o, y: o.logits, {}, InputError, "one number"),
    "no labels": (gpt2, lambda o, y: o.loss, {}, NotDifferentiableError, "'model'"),
    "no parameters": (gpt2, shifted, {"parameters": "*lora_*"}, InputError, "the nearest are transformer.wte.weight"),
    "half precision": (lambda: gpt2().bfloat16(), shifted, {}, InputError, r"`model.float\(\)`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_says_what_to_write(case: str) -> None:
    model, loss, options, kind, words = REFUSED[case]
    net, data = model(), batches(sequences())

    def influences() -> Any:
        wrapped = jacops.TorchTwiceDifferentiable(net, loss)
        return jacops.compute_influences(wrapped, data, curvature="ggn", damping=0.1, **options)

    with pytest.raises(kind, match=words):
        influences()


def padding_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)


def seven_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), torch.where(labels == 7, IGNORED, labels).flatten())


@pytest.mark.parametrize(("loss", "number"), [(padding_ignored, 0), (seven_ignored, 7)])
def test_a_loss_may_ignore_another_number(loss: Any, number: int) -> None:
    model, whole = Table(), sequences()
    del whole["attention_mask"]
    whole["labels"] = torch.where(whole["labels"] == IGNORED, number, whole["labels"])
    (right,) = torch.autograd.grad(loss(model(whole["input_ids"]), whole["labels"]), [model.table])
    close(jacops.Problem(model, loss, batches(whole)).gradient(), right.flatten())


def test_labels_that_should_not_count_and_do_not_say_so_are_found_by_the_check() -> None:
    whole = sequences((8, 3, 8, 2, 8, 8))
    del whole["attention_mask"]
    whole["labels"][1::2, 1:4] = 5

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), torch.where(labels == 5, IGNORED, labels).flatten())

    with pytest.raises(InputError, match="Labels that do not count must be -100"):
        jacops.Problem(Table(), loss, [whole]).value()


# ---- single tokens ---------------------------------------------------------------------------------------------------


def tokens_by_hand(model: nn.Module, whole: Any, damping: float, picked: list[nn.Parameter]) -> Tensor:
    rows, tokens, matrix = by_hand(model, whole, picked)
    return torch.einsum("mp,ntp->mnt", torch.linalg.solve(matrix + damping * torch.eye(len(matrix)), rows.T).T, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_influences_of_tokens_are_those_of_their_terms(name: str) -> None:
    model, whole = MODELS[name](), sequences()
    exact = name == "gpt2"
    wrapped = jacops.TorchTwiceDifferentiable(model, shifted)
    options: Any = {"curvature": "ggn", "damping": 1e-2, "solver": "direct", "parameters": HEADS[name]}
    found = jacops.compute_influences(wrapped, batches(whole), influence_type="token", **options)
    sums = jacops.compute_influences(wrapped, batches(whole), **options)
    close(found.values.sum(2), sums.values, 1e-10 if exact else 1e-6)
    close(found.values, tokens_by_hand(model, whole, 1e-2, some(name, model)), TOLERANCES[name])
    assert not found.values[:, whole["labels"] == IGNORED].any()
    assert not found.values[:, :, 0].any()
    assert found.shape == (6, 6, 8)
    close(found.per_sample().values, sums.values, 1e-10 if exact else 1e-6)
    close(found.leave_one_out().sum(2), sums.leave_one_out(), 1e-10 if exact else 1e-6)


class ClassesSecond(Table):
    """Logits `(n, classes, T)`, as torch's cross-entropy has them."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).transpose(1, 2)


class Mixed(Table):
    """Outputs of which none belongs to one token alone."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).flatten(1)


def unmixed(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.reshape(-1, VOCABULARY), labels.flatten())


class Reading(Table):
    """Reads values, so that samples are taken alone."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * (1.0 + 0.1 * float(self.table[input_ids].detach().mean()))


TABLES: dict[str, tuple[Any, Any]] = {
    "classes second": (ClassesSecond, nn.CrossEntropyLoss()),
    "weighted": (ClassesSecond, nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, VOCABULARY).double())),
    "summed": (ClassesSecond, nn.CrossEntropyLoss(reduction="sum")),
    "no positions": (Mixed, unmixed),
    "samples alone": (Reading, unshifted),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.filterwarnings("ignore:sample_gradients")
def test_tokens_of_other_losses_and_outputs(case: str) -> None:
    model, loss = TABLES[case][0](), TABLES[case][1]
    whole = sequences()
    del whole["attention_mask"]
    wrapped = jacops.TorchTwiceDifferentiable(model, loss)
    options: Any = {"curvature": "ggn", "damping": 0.1}
    found = jacops.compute_influences(wrapped, batches(whole), influence_type="token", **options)
    factors = jacops.compute_influence_factors(wrapped, batches(whole), batches(whole), **options).x
    right, weight = torch.zeros(6, 6, 8).double(), getattr(loss, "weight", None)
    for i in range(6):
        ids, labels = whole["input_ids"][i : i + 1], whole["labels"][i : i + 1]
        counts = (labels != IGNORED) * (1.0 if weight is None else weight[labels.clamp_min(0)])
        whole_row = 1.0 if getattr(loss, "reduction", "mean") == "sum" else float(counts.sum())
        for t in counts[0].nonzero()[:, 0].tolist():
            kept = torch.full_like(labels, IGNORED)
            kept[0, t] = labels[0, t]
            share = 1.0 if whole_row == 1.0 and getattr(loss, "reduction", "") == "sum" else float(counts[0, t])
            (slope,) = torch.autograd.grad(loss(model(ids), kept), [model.table])
            right[:, i, t] = factors @ slope.flatten() * share / whole_row
    close(found.values, right, 1e-10)


def test_longer_sequences_take_no_more_calls_of_the_loss() -> None:
    calls = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels.shape)
        return plainly_shifted(logits, labels)

    counts = []
    for length in (8, 16):
        whole = sequences((length,) * 6)
        del whole["attention_mask"]
        wrapped = jacops.TorchTwiceDifferentiable(Table(), loss)
        options: Any = {"curvature": "ggn", "damping": 0.1, "solver": "direct"}
        jacops.compute_influences(wrapped, [whole], influence_type="token", **options)
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1]


def test_what_has_no_tokens_is_refused() -> None:
    model, whole = Table(), sequences()
    del whole["attention_mask"]
    options: Any = {"curvature": "ggn", "damping": 0.1, "influence_type": "token"}
    with pytest.raises(InputError, match="mean over all tokens"):
        jacops.compute_influences(jacops.TorchTwiceDifferentiable(model, by_sequence), [whole], **options)
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    wrapped = jacops.TorchTwiceDifferentiable(net, F.cross_entropy)
    with pytest.raises(InputError, match="one label for each token"):
        jacops.compute_influences(wrapped, [(x, torch.tensor([0, 1, 1, 0]))], **options)
    with pytest.raises(InputError, match="needs 'token'"):
        jacops.compute_influences(wrapped, [(x, torch.tensor([0, 1, 1, 0]))], damping=0.1, curvature="ggn").per_sample()


def test_jax_models_have_influences_of_samples() -> None:
    pytest.importorskip("jax")
    wrapped = jacops.JaxTwiceDifferentiable(
        lambda params, x: x @ params, torch.ones(3, 1).numpy(), lambda out, y: ((out - y) ** 2).mean()
    )
    data = [(torch.eye(3).numpy(), torch.ones(3, 1).numpy())]
    with pytest.raises(InputError, match="models of torch only"):
        jacops.compute_influences(wrapped, data, curvature="ggn", damping=0.1, influence_type="token")


def test_influences_of_tokens_are_drawn_and_tabled() -> None:
    pytest.importorskip("matplotlib")
    whole = sequences()
    del whole["attention_mask"]
    wrapped = jacops.TorchTwiceDifferentiable(Table(), plainly_shifted)
    found = jacops.compute_influences(wrapped, batches(whole), curvature="ggn", damping=0.1, influence_type="token")
    figure = found.plot(test=[0, 4], k=4)
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [shown.shape for shown in maps] == [(4, 8), (4, 8)]
    strongest = found.values[0].sum(1).abs().argsort(descending=True)[:4]
    assert torch.equal(torch.as_tensor(maps[0].data), found.values[0, strongest])
    with pytest.raises(InputError, match="per_sample"):
        found.top(2)
    assert found.per_sample().top(2)[0].shape == (6, 2)
    pytest.importorskip("pandas")
    table = found.to_pandas()
    assert list(table.columns) == ["test", "train", "token", "influence"]
    assert len(table) == 6 * 6 * 8


# ---- padding ---------------------------------------------------------------------------------------------------------

SOLVERS: dict[str, Any] = {
    "direct": "direct",
    "cg": "cg",
    "ekfac": "ekfac",
    "ekfac, exact": EKFAC(fisher="exact"),
    "ekfac, empirical": EKFAC(fisher="empirical"),
    "kfac": EKFAC(corrected=False),
    "nystrom": "nystrom",
    "lissa": "lissa",
    "arnoldi": "arnoldi",
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore::jacops.JacopsWarning")  # residuals of estimators, which are not the question
def test_padding_changes_no_influence(name: str, solver: str) -> None:
    wrapped = jacops.TorchTwiceDifferentiable(MODELS[name](), shifted)
    options: Any = {"curvature": "ggn", "damping": 0.5, "solver": SOLVERS[solver], "parameters": HEADS[name]}
    padded = [sequences(width=8), sequences(width=16), sequences(width=16, left=True)]
    found = [jacops.compute_influences(wrapped, batches(whole), **options).values for whole in padded]
    close(found[1], found[0], 1e-6)
    close(found[2], found[0], 1e-6)


def test_padding_changes_no_influence_of_a_token() -> None:
    wrapped = jacops.TorchTwiceDifferentiable(gpt2(), shifted)
    options: Any = {"curvature": "ggn", "damping": 0.5, "parameters": HEADS["gpt2"], "influence_type": "token"}
    lengths = (8, 5, 7, 3, 6, 4)
    first, second = (sequences(lengths, width) for width in (8, 6))
    apart = [batches(first)[0], batches(second)[1]]  # each as wide as its own longest sequence, as collators pad
    whole, shifted_left = sequences(lengths, 16), sequences(lengths, 16, left=True)
    found, wide, left = (
        jacops.compute_influences(wrapped, data, **options).values
        for data in (apart, batches(whole), batches(shifted_left))
    )
    close(wide[:, :, :8], found, 1e-6)
    assert not wide[:, :, 8:].any()
    for i, length in enumerate(lengths):
        close(left[:, i, 16 - length :], found[:, i, :length], 1e-6)


# ---- which parameters EK-FAC covers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", MODELS)
def test_ekfac_covers_all_parameters_and_has_the_trace_of_the_exact_matrix(name: str, tied: bool) -> None:
    model, whole = MODELS[name](tied), sequences((4, 3, 4))
    picked = list(model.parameters())
    rows, _, matrix = by_hand(model, whole, picked)
    problem = jacops.Problem(model, shifted, batches(whole, 2, 1))
    exact = 1e-10 if name == "gpt2" else 1e-6
    close(problem.ggn().dense(), matrix, exact)
    close(problem.sample_gradients().dense(), rows, exact)
    curvature = EKFAC(fisher="exact").approximate(problem.ggn())
    close(curvature.eigenvalues.sum(), matrix.trace(), exact)
    covered = curvature.coverage
    assert covered["kronecker"] + covered["exact"] >= 0.99 * sum(p.numel() for p in picked)
    assert covered["diagonal"] == 0
    vectors = sum(p.numel() for name, p in model.named_parameters() if "ln_" in name or "norm" in name)
    assert covered["exact"] == vectors


def test_ekfac_keeps_diagonals_of_norms_that_are_too_wide_to_be_exact() -> None:
    model = gpt2(tied=True).float()
    problem = jacops.Problem(model, "model", batches(sequences()))
    covered = EKFAC(exact_up_to=7).approximate(problem.ggn()).coverage
    assert covered["exact"] == 0
    assert covered["diagonal"] == sum(p.numel() for n, p in model.named_parameters() if "ln_" in n)
    assert covered["kronecker"] == sum(covered.values()) - covered["diagonal"]


# ---- adapters of low rank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("influence_type", ["up", "token"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_influences_by_the_adapters_of_peft(name: str, influence_type: Any) -> None:
    model, whole = adapted(name, MODELS[name]()).double(), sequences()
    own = [p for n, p in model.named_parameters() if "lora_" in n]
    wrapped = jacops.TorchTwiceDifferentiable(model, shifted)
    options: Any = {"curvature": "ggn", "damping": 1e-2, "solver": "direct", "parameters": "*lora_*"}
    found = jacops.compute_influences(wrapped, batches(whole), influence_type=influence_type, **options)
    right = tokens_by_hand(model, whole, 1e-2, own) if influence_type == "token" else dense(model, whole, 1e-2, own)
    close(found.values, right, TOLERANCES[name])
    assert found.info["covered"] == sum(p.numel() for p in own)
    assert all(p.grad is None for p in model.parameters())
    problem = jacops.Problem(model.float(), "model", batches(whole), parameters="*lora_*")
    assert EKFAC(fisher="exact").approximate(problem.ggn()).coverage["kronecker"] == problem.space.dim


# ---- results that are stored, and leverage ---------------------------------------------------------------------------


def test_stored_runs_and_leverage_take_a_models_own_loss(tmp_path: Any) -> None:
    pytest.importorskip("zarr")
    wrapped, data = jacops.TorchTwiceDifferentiable(gpt2().float(), "model"), batches(sequences())
    options: Any = {"curvature": "ggn", "damping": 1.0, "solver": "ekfac", "parameters": HEADS["gpt2"]}
    plain, first, again = (
        jacops.compute_influences(wrapped, data, store=store, **options)
        for store in (None, tmp_path / "run", tmp_path / "run")
    )
    assert torch.equal(first.values, again.values)
    close(first.values, plain.values, 1e-5)
    with pytest.raises(InputError, match="a stored run needs 'up'"):
        jacops.compute_influences(wrapped, data, store=tmp_path / "other", influence_type="token", **options)
    options["solver"] = "direct"
    leverage = jacops.compute_influences(wrapped, data, leverage=True, **options).info["leverage"]
    assert bool((leverage > 0).all())
    tokens = jacops.compute_influences(wrapped, data, influence_type="token", **options)
    tokens.save(tmp_path / "tokens.safetensors")
    assert torch.equal(jacops.load(tmp_path / "tokens.safetensors").values, tokens.values)
