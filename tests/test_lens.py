"""The Jacobian lens against a loop over sequences, positions and outputs; differences of logits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import jacops
from jacops.attribution import contributions, jacobian_lens, logit_difference
from jacops.errors import DataError, InputError, InputTypeError, ModelStateError, NonFiniteError
from small import Counts, close, draw, refused
from test_freeze import ENDS, shaken

transformers: Any = pytest.importorskip("transformers")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=3, n_head=2, **ENDS)
    return shaken(transformers.GPT2LMHeadModel(config))


def by_loop(model: Any, batches: list[Any], layer: str, result: Callable[[Any, Any], Tensor], skip: int = 0) -> Tensor:
    """The definition: one gradient for every sequence, target position and output, by every source position."""
    means: list[Tensor] = []
    for batch in batches:
        given = batch if isinstance(batch, dict) else {"input_ids": batch}
        for row in range(len(given["input_ids"])):
            alone = {name: value[row : row + 1] for name, value in given.items()}
            real = alone.get("attention_mask", torch.ones(alone["input_ids"].shape[:2]))[0].nonzero()[:, 0].tolist()
            counted, kept = real[skip:], dict[str, Tensor]()

            def keep(module: nn.Module, args: Any, output: Any, kept: Any = kept) -> None:
                kept["hidden"] = output[0] if isinstance(output, tuple) else output

            handle = model.get_submodule(layer).register_forward_hook(keep)
            found = result(model, alone)[0]
            handle.remove()
            sums = torch.zeros(found.shape[1], kept["hidden"].shape[2]).double()
            for target in counted:
                for out in range(found.shape[1]):
                    grad = torch.autograd.grad(found[target, out], kept["hidden"], retain_graph=True)[0]
                    sums[out] += grad[0, counted].sum(0)
            means += [sums / len(counted)] if counted else []
    return torch.stack(means).mean(0)


def last_hidden(model: Any, batch: Any) -> Tensor:
    kept: list[Any] = []
    handle = model.transformer.h[2].register_forward_hook(lambda m, a, output: kept.append(output))
    model(**batch)
    handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def logits(model: Any, batch: Any) -> Tensor:
    return model(**batch).logits


TO_LAST: Any = {"at": ("transformer.h.0", "transformer.h.2")}
TO_LOGITS: Any = {"at": "transformer.h.1", "outputs": "logits"}


# ---- the mean --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 2])
def test_a_lens_is_the_mean_over_sequences_and_positions(skip: int) -> None:
    model = gpt2()
    found = jacobian_lens(model, IDS, **TO_LAST, skip=skip)
    close(found.matrix, by_loop(model, [IDS], "transformer.h.0", last_hidden, skip), 1e-12)
    assert (found.sequences, found.positions) == (3, 3 * (5 - skip))
    found = jacobian_lens(model, IDS, **TO_LOGITS, skip=skip)
    close(found.matrix, by_loop(model, [IDS], "transformer.h.1", logits, skip), 1e-12)
    assert found.at == ("transformer.h.1", None)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_padding_is_left_out_as_source_and_as_target(skip: int) -> None:
    model, batch = gpt2(), {"input_ids": IDS, "attention_mask": MASK}
    found = jacobian_lens(model, batch, **TO_LAST, skip=skip)
    close(found.matrix, by_loop(model, [batch], "transformer.h.0", last_hidden, skip), 1e-12)
    assert found.sequences == (2 if skip == 3 else 3)  # of one sequence nothing is left
    assert found.positions == int((MASK.sum(1) - skip).clamp_min(0).sum())
    whole = jacobian_lens(model, {"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}, **TO_LAST)
    close(whole.matrix, jacobian_lens(model, IDS, **TO_LAST).matrix, 1e-12)


def test_what_stands_at_padding_does_not_matter() -> None:
    model = gpt2()
    other = torch.where(MASK == 0, (IDS + 3) % 11, IDS)
    found = [jacobian_lens(model, {"input_ids": ids, "attention_mask": MASK}, **TO_LAST).matrix for ids in (IDS, other)]
    close(found[0], found[1], 1e-12)


def test_a_corpus_comes_in_batches_of_any_length() -> None:
    model = gpt2()
    parts: list[Any] = [IDS[:2], {"input_ids": IDS, "attention_mask": MASK}, IDS[2:, :4]]
    expected = by_loop(model, parts, "transformer.h.0", last_hidden)
    found = jacobian_lens(model, parts, **TO_LAST)
    close(found.matrix, expected, 1e-12)
    assert (found.sequences, found.positions) == (6, 10 + 12 + 4)
    loader: Any = DataLoader([{"input_ids": ids, "labels": 0} for ids in IDS], batch_size=2)
    close(jacobian_lens(model, loader, **TO_LAST).matrix, jacobian_lens(model, IDS, **TO_LAST).matrix, 1e-12)
    pairs = [(IDS[:1], torch.zeros(1)), (IDS[1:], torch.zeros(2))]
    close(jacobian_lens(model, pairs, **TO_LAST).matrix, jacobian_lens(model, IDS, **TO_LAST).matrix, 1e-12)
    close(jacobian_lens(model, IDS, **TO_LAST, batch_size=2).matrix, jacobian_lens(model, IDS, **TO_LAST).matrix, 1e-12)


def test_a_model_that_looks_ahead_counts_all_targets() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True) for _ in range(2)))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layers(self.embed(input_ids))

    torch.manual_seed(0)
    model = shaken(Encoder())
    found = jacobian_lens(model, IDS, at="layers.0")
    close(found.matrix, by_loop(model, [IDS], "layers.0", lambda m, batch: m(**batch)), 1e-12)


def test_a_frozen_lens_is_the_mean_of_frozen_jacobians() -> None:
    model, freeze = gpt2(), ("LayerNorm", "GPT2Attention")
    found = jacobian_lens(model, IDS, **TO_LAST, freeze=freeze)
    blocks = jacops.compute_jacobian(model, IDS, **TO_LAST, freeze=freeze)
    close(found.matrix, blocks.sum(1).mean((0, 2)), 1e-12)
    assert "4 normalisation scales, 2 attention patterns" in found.notes[0]
    assert float((found.matrix - jacobian_lens(model, IDS, **TO_LAST).matrix).abs().max()) > 1e-3


def test_the_sampling_error_is_that_of_a_mean() -> None:
    model = gpt2()
    each = [by_loop(model, [ids[None]], "transformer.h.0", last_hidden) for ids in IDS]
    mean = torch.stack(each).mean(0)
    spread = sum(float((one - mean).square().sum()) for one in each) / (3 * 2)
    found = jacobian_lens(model, IDS, **TO_LAST)
    assert found.sampling_error == pytest.approx(spread**0.5 / float(mean.norm()), rel=1e-10)
    assert jacobian_lens(model, IDS[:1], **TO_LAST).sampling_error is None


class Layers(nn.Module):
    """Sequences of vectors through two layers, the backward sweeps through the second of which are counted."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first, self.second, self.counts = nn.Linear(3, width), nn.Linear(width, out), Counts()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(self.first(x)))
        if hidden.requires_grad:
            hidden.register_hook(self.swept)
        return hidden

    def swept(self, grad: Tensor) -> None:
        self.counts.backward += 1


def test_all_sequences_and_positions_share_a_sweep_per_output() -> None:
    model = Layers(9, 4).double()
    x = draw(16, 7, 3)
    for _ in range(2):
        model.counts.backward = 0
        found = jacobian_lens(model, x, at="first", checks="never")
        assert model.counts.backward == 4
    slopes = 1 - model(x).detach() ** 2
    expected = (slopes[..., None] * model.second.weight.detach()).mean((0, 1))
    close(found.matrix, expected, 1e-12)  # pyright: ignore[reportPossiblyUnboundVariable]


def test_few_hidden_numbers_take_a_push_each() -> None:
    model, x = Layers(3, 50).double(), draw(4, 7, 3)
    found = jacobian_lens(model, x, at="first")
    assert "forward, 3 pushes" in found.route
    slopes = 1 - model(x).detach() ** 2
    close(found.matrix, (slopes[..., None] * model.second.weight.detach()).mean((0, 1)), 1e-12)


def test_sequences_that_mix_are_taken_alone() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.first(input_ids)
            return torch.tanh(self.second(hidden * hidden.mean(0)))

    model, x = Once().double(), draw(3, 5, 3)
    found = jacobian_lens(model, x, at="first", fallback="silent")
    assert "one sample at a time" in found.route
    close(found.matrix, by_loop(model, [x], "first", lambda m, batch: m(**batch)), 1e-12)


# ---- the result ------------------------------------------------------------------------------------------------------


def test_a_lens_reads_hidden_vectors_and_is_saved(tmp_path: Path) -> None:
    model = gpt2()
    lens = jacobian_lens(model, IDS, **TO_LAST)
    hidden = draw(4, 5, 6)
    close(lens(hidden), hidden @ lens.matrix.T, 1e-14)
    assert model.lm_head(model.transformer.ln_f(lens(hidden))).shape == (4, 5, 11)
    lens.save(tmp_path / "lens")
    again = jacops.load(tmp_path / "lens")
    assert torch.equal(again.matrix, lens.matrix)
    assert (again.at, again.sequences, again.notes) == (lens.at, 3, ())
    assert "transformer.h.0 -> transformer.h.2, 6 x 6" in repr(lens)
    assert "3 sequences, 15 positions" in repr(lens)
    assert "<table>" in lens._repr_html_()
    refused(InputError, partial(lens, draw(4, 5)), "hidden", "(4, 5)", "6")
    refused(InputError, partial(lens, draw(4, 6).float()), "hidden", "float32", "float64")
    refused(InputTypeError, partial(lens, [1.0]), "hidden", "list")


def test_nothing_of_the_model_moves() -> None:
    from world import World

    model = gpt2()
    world = World(model, IDS)
    jacobian_lens(model, IDS, **TO_LAST)
    world.untouched()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    model = gpt2()
    call = partial(jacobian_lens, model, IDS)
    refused(InputError, partial(call, at=None), "at", "None", "layer")
    refused(InputError, partial(call, at=(None, "transformer.h.2")), "at", "None")
    refused(InputError, partial(call, at="transformer.h.9"), "at", "'transformer.h.9'", "near")
    refused(InputError, partial(call, at=("transformer.h.0", "transformer.g")), "at", "near")
    refused(InputError, partial(call, at=("transformer.h.2", "transformer.h.0")), "at", "Swap")
    refused(InputError, partial(call, at="transformer.h.0"), "outputs", "'logits'")
    refused(InputError, partial(call, **TO_LAST, skip=-1), "skip", "-1")
    refused(InputError, partial(call, **TO_LAST, batch_size=0), "batch_size", "0")
    refused(InputError, partial(call, **TO_LAST, unpack=lambda b: b), "unpack", "one batch")
    refused(InputError, partial(call, **TO_LAST, freeze="LayerNrom"), "freeze", "'LayerNorm'")
    refused(InputTypeError, partial(jacobian_lens, lambda x: x, IDS, at="first"), "model", "function")
    refused(InputTypeError, partial(jacobian_lens, model, 3, **TO_LAST), "corpus", "int")
    refused(DataError, partial(call, **TO_LAST, skip=5), "corpus", "without positions")
    refused(DataError, partial(jacobian_lens, model, [], **TO_LAST), "corpus", "empty")
    batch = {"input_ids": IDS, "attention_mask": MASK[:, :4]}
    refused(InputError, partial(jacobian_lens, model, batch, at="transformer.drop", outputs="logits"), "attention_mask")
    batch["attention_mask"] = MASK[:, None]
    refused(InputError, partial(jacobian_lens, model, batch, **TO_LAST), "attention_mask", "(3, 1, 5)")


def test_layers_that_are_not_used_once_or_have_no_positions_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    x = draw(2, 4, 3)
    refused(ModelStateError, partial(jacobian_lens, Twice().double(), x, at="layer"), "'layer'", "more often")
    refused(ModelStateError, partial(jacobian_lens, Twice().double(), x, at="unused"), "'unused'", "never")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    refused(InputError, partial(jacobian_lens, flat, x, at="0"), "at", "(1, 12)", "positions")


def test_values_that_are_not_finite_are_named_with_their_batch() -> None:
    model, x = Layers(3, 2).double(), draw(2, 4, 3)
    bad = x.clone()
    bad[1, 2, 0] = torch.nan
    refused(NonFiniteError, partial(jacobian_lens, model, [(x,), (bad,)], at="first"), "batch 1")


# ---- differences of logits -------------------------------------------------------------------------------------------


def test_a_difference_of_logits_is_attributed_as_one_output() -> None:
    model = gpt2()
    freeze = ("LayerNorm", "GPT2Attention", "NewGELUActivation")
    options: Any = {"at": "transformer.drop", "freeze": freeze}
    whole = contributions(model, IDS, **options, outputs=lambda output: output.logits[:, -1])
    found = contributions(model, IDS, **options, outputs=logit_difference([4, 0], [7, 1]))
    close(found.values, whole.values[:, [4, 0]] - whole.values[:, [7, 1]], 1e-12)
    close(found.bias, whole.bias[:, [4, 0]] - whole.bias[:, [7, 1]], 1e-12)
    expected = model(IDS).logits
    close(found.output, (expected[:, -1, [4, 0]] - expected[:, -1, [7, 1]]).detach(), 1e-12)
    slope = jacops.compute_jacobian(model, IDS, at="transformer.drop", outputs=logit_difference(4, 7, -3))
    each = jacops.compute_jacobian(model, IDS, at="transformer.drop", outputs=lambda o: o.logits[:, 2, [4, 7]])
    close(slope, each[:, 0] - each[:, 1], 1e-12)


def test_pairs_of_every_sample_are_two_calls_with_a_target() -> None:
    model, first, second = gpt2(), torch.tensor([4, 0, 7]), torch.tensor([7, 1, 2])
    options: Any = {"at": "transformer.drop", "outputs": lambda output: output.logits[:, -1], "freeze": "LayerNorm"}
    found = [jacops.compute_jacobian(model, IDS, **options, target=tokens) for tokens in (first, second)]
    for i, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        pair = jacops.compute_jacobian(model, IDS[i : i + 1], at="transformer.drop", freeze="LayerNorm",
                                       outputs=logit_difference(a, b))  # fmt: skip
        close(found[0][i] - found[1][i], pair[0], 1e-12)


def test_logits_are_taken_from_tensors_and_outputs() -> None:
    values = draw(2, 3, 5)
    expected = values[:, -1, 1] - values[:, -1, 4]
    for output in (values, {"logits": values}, transformers.modeling_outputs.CausalLMOutput(logits=values)):  # pyright: ignore
        close(logit_difference(1, 4)(output), expected, 1e-15)
    close(logit_difference(torch.tensor([1]), [4], 0)(values), (values[:, 0, 1] - values[:, 0, 4])[:, None], 1e-15)


def test_wrong_tokens_are_named() -> None:
    refused(InputError, partial(logit_difference, -1, 2), "first", "-1")
    refused(InputError, partial(logit_difference, [1, 2], [3]), "second", "1 token", "2")
    refused(InputError, partial(logit_difference, [], []), "first", "empty")
    refused(InputTypeError, partial(logit_difference, "a", 1), "first", "str")  # pyright: ignore[reportArgumentType]
    refused(InputTypeError, partial(logit_difference, 1, 2, 0.5), "position", "float")  # pyright: ignore
    refused(InputError, partial(logit_difference(1, 9), draw(2, 3, 5)), "tokens", "9", "5")
    refused(InputError, partial(logit_difference(1, 2, 4), draw(2, 3, 5)), "position", "4", "3")
    refused(InputError, partial(logit_difference(1, 2), draw(2, 5)), "(2, 5)", "logits")
