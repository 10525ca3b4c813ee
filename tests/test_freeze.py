"""`freeze=`: what is left of transformers and other models adds up, and nothing of it stays behind."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import jacops
from jacops._torch.model import frozen_rules
from jacops.errors import InputError, InputTypeError, ModelStateError
from small import close, draw, refused
from world import World

transformers: Any = pytest.importorskip("transformers")
ATTENTION = ("eager", "sdpa")
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
ALL_OF_GPT2 = ("LayerNorm", "transformer.h.*.attn", "NewGELUActivation")
ALL_OF_LLAMA = ("LlamaRMSNorm", "*.self_attn", "*.mlp")


def shaken(model: nn.Module) -> nn.Module:
    """Return a model in double precision whose biases and gains are not those of the first moment."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def gpt2(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}
    config = transformers.GPT2Config(**sizes, **ENDS, attn_implementation=attention)
    return shaken(transformers.GPT2LMHeadModel(config))


def llama(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8}
    config = transformers.LlamaConfig(**sizes, **heads, **ENDS, attn_implementation=attention)
    return shaken(transformers.LlamaForCausalLM(config))


def last_logits(output: Any) -> Tensor:
    return output.logits[:, -1]


def adds_up(found: jacops.results.Contributions, expected: Tensor, most: float) -> None:
    close(found.output, expected.detach(), most)
    close(found.values.flatten(2).sum(-1) + found.bias, expected.detach(), most)
    assert found.verification.relative_error < most


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.norm, self.last = nn.Linear(4, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.act(self.first(x))))


def mlp() -> Mlp:
    torch.manual_seed(1)
    return Mlp().double().eval()


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_of_gpt2_are_the_sum_of_what_its_tokens_add(attention: str) -> None:
    model = gpt2(attention)
    found = jacops.contributions(model, IDS, at="transformer.drop", outputs=last_logits, freeze=ALL_OF_GPT2)
    adds_up(found, model(IDS).logits[:, -1], 1e-12)
    assert found.method == "frozen"
    assert found.slope_error < 1e-6
    held = "frozen: 5 normalisation scales, 2 attention patterns, 2 gates"
    assert found.notes == (f"{held} (5 LayerNorm, 2 GPT2Attention, 2 NewGELUActivation)",)


def test_the_frozen_jacobian_of_gpt2_is_one_whose_constants_were_detached_by_hand() -> None:
    model = gpt2("eager")

    def norm(module: Any, x: Tensor) -> Tensor:
        spread = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / spread * module.weight + module.bias

    def attended(module: Any, x: Tensor) -> Tensor:
        q, k, v = (part.view(5, 3, 4).transpose(0, 1) for part in module.c_attn(x).split(12, -1))
        scores = q @ k.mT / 2 + torch.full((5, 5), -torch.inf).double().triu(1)
        return module.c_proj((scores.softmax(-1).detach() @ v).transpose(0, 1).reshape(5, 12))

    def logits(embedded: Tensor) -> Tensor:
        hidden = embedded
        for block in model.transformer.h:  # pyright: ignore
            hidden = hidden + attended(block.attn, norm(block.ln_1, hidden))
            z = block.mlp.c_fc(norm(block.ln_2, hidden))
            gain = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
            hidden = hidden + block.mlp.c_proj(z * gain.detach())
        return model.lm_head(norm(model.transformer.ln_f, hidden))[-1]  # pyright: ignore

    found = jacops.contributions(model, IDS, at="transformer.drop", outputs=last_logits, freeze=ALL_OF_GPT2)
    embedded = model.transformer.wte(IDS) + model.transformer.wpe(torch.arange(5))  # pyright: ignore
    rows = [torch.autograd.functional.jacobian(logits, one.detach()) for one in embedded]
    close(found.jacobian, torch.stack(rows), 1e-10)  # pyright: ignore


@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_of_llama_are_the_sum_of_what_its_tokens_add(attention: str) -> None:
    model = llama(attention).float()  # its norms compute in single precision whatever the model's is
    options: Any = {"at": "model.embed_tokens", "outputs": last_logits, "freeze": ALL_OF_LLAMA}
    found = jacops.contributions(model, IDS, **options)
    adds_up(found, model(IDS).logits[:, -1], 2e-5)
    kinds = "(2 LlamaAttention, 2 LlamaMLP, 5 LlamaRMSNorm)"
    assert found.notes == (f"frozen: 5 normalisation scales, 2 attention patterns, 2 gates {kinds}",)
    assert float(found.bias.abs().max()) < 1e-5  # nothing in it is added


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mask", [None, torch.ones(4, 4, dtype=torch.bool).triu(1)])
def test_multi_head_attention_is_opened(weights: bool, mask: Tensor | None) -> None:
    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 4, 6)
            return self.attention(x, x, x, need_weights=weights, attn_mask=mask)[0].flatten(1)

    model, x = shaken(Attended()), draw(3, 24)

    def by_hand(x: Tensor) -> Tensor:
        attention = model.attention
        projected = functional.linear(x.view(4, 6), attention.in_proj_weight, attention.in_proj_bias)  # pyright: ignore
        q, k, v = (part.view(4, 2, 3).transpose(0, 1) for part in projected.chunk(3, -1))
        scores = q @ k.mT / 3**0.5
        scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
        mixed = (scores.softmax(-1).detach() @ v).transpose(0, 1).reshape(4, 6)
        return attention.out_proj(mixed).flatten()  # pyright: ignore

    found = jacops.contributions(model, x, freeze="MultiheadAttention")
    adds_up(found, model(x), 1e-12)
    close(found.jacobian, torch.stack([torch.autograd.functional.jacobian(by_hand, row) for row in x]), 1e-11)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("first", [False, True])
def test_encoder_layers_take_no_fast_path(act: str, first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(6, 2, 8, activation=act, batch_first=True, norm_first=first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x.view(-1, 4, 6)).flatten(1)

    model, x = shaken(Encoder()), draw(3, 24)
    for freeze in ("TransformerEncoderLayer", "encoder", ["encoder.layers"], lambda name, module: True):
        found = jacops.contributions(model, x, freeze=freeze)
        adds_up(found, model(x), 1e-12)
    parts = ("LayerNorm", "MultiheadAttention")
    whole = jacops.contributions(model, x, freeze=parts) if act == "relu" else None
    if whole is not None:  # its activation is piecewise linear
        close(whole.values, found.values, 1e-12)  # pyright: ignore


def test_the_last_norm_alone_gives_the_direct_logit_attribution() -> None:
    model = gpt2()
    options: Any = {"at": "transformer.h.1", "outputs": last_logits, "freeze": "transformer.ln_f"}
    found = jacops.contributions(model, IDS, **options)
    norm, unembed = model.transformer.ln_f, model.lm_head.weight  # pyright: ignore
    hidden: list[Tensor] = []
    handle = model.transformer.h[1].register_forward_hook(lambda m, a, output: hidden.append(output))  # pyright: ignore
    logits = model(IDS).logits[:, -1]
    handle.remove()
    x = (hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0])[:, -1]
    scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    centred = torch.eye(12).double() - 1 / 12
    by_hand = unembed * norm.weight @ centred / scale[:, None] * x[:, None]
    close(found.values[:, :, -1], by_hand.detach(), 1e-12)
    assert not found.values[:, :, :-1].any()
    close(found.bias, (unembed @ norm.bias).detach().expand(2, -1), 1e-12)
    adds_up(found, logits, 1e-12)


def test_gains_of_a_perceptron_are_those_of_layerwise_relevance() -> None:
    model, x = mlp(), draw(5, 4)
    found = jacops.contributions(model, x, freeze=("GELU", "LayerNorm"))
    z = model.first(x)
    gain, hidden = functional.gelu(z) / z, functional.gelu(z)
    scale = (hidden.var(-1, unbiased=False, keepdim=True) + model.norm.eps).rsqrt()
    centred = torch.eye(7).double() - 1 / 7
    rows = model.last.weight * model.norm.weight @ centred
    jacobian = rows[None] * (scale * gain[:, :])[:, None] if False else rows[None] * gain[:, None] * scale[:, None]
    by_hand = (jacobian @ model.first.weight) * x[:, None]
    close(found.values, by_hand.detach(), 1e-12)
    adds_up(found, model(x), 1e-12)


# ---- proofs ----------------------------------------------------------------------------------------------------------


def test_calls_with_and_without_freezing_share_nothing() -> None:
    model, x = mlp(), draw(6, 4)
    freezes: list[Any] = [None, ("GELU", "LayerNorm"), "LayerNorm", ("GELU",)]
    first = [jacops.compute_jacobian(mlp(), x, freeze=freeze) for freeze in freezes]
    for a, one in enumerate(first):
        assert all(float((one - other).abs().max()) > 1e-3 for other in first[:a])
    for _ in range(3):
        for freeze, expected in zip(freezes, first, strict=True):
            close(jacops.compute_jacobian(model, x, freeze=freeze), expected, 1e-14)


def test_what_is_picked_is_looked_up_in_every_call() -> None:
    model, x, picked = mlp(), draw(6, 4), [nn.GELU]

    def freeze(name: str, module: nn.Module) -> bool:
        return isinstance(module, tuple(picked))

    for kinds in ([nn.GELU], [nn.GELU, nn.LayerNorm], [nn.LayerNorm]):
        picked[:] = kinds
        names = [kind.__name__ for kind in kinds]
        close(jacops.compute_jacobian(model, x, freeze=freeze), jacops.compute_jacobian(model, x, freeze=names), 1e-14)


@pytest.mark.parametrize("mode", ["reverse", "forward", "split"])
def test_every_route_is_frozen(mode: Any) -> None:
    torch.manual_seed(0)
    layers = (
        nn.Linear(9, 12),
        nn.SiLU(),
        nn.Linear(12, 2),
        nn.Tanh(),
        nn.Linear(2, 12),
        nn.LayerNorm(12),
        nn.Linear(12, 9),
    )
    model, x = nn.Sequential(*layers).double().eval(), draw(6, 9)
    expected = jacops.compute_jacobian(model, x, freeze=("SiLU", "Tanh", "LayerNorm"), checks="always")
    found = jacops.compute_jacobian(model, x, freeze=("SiLU", "Tanh", "LayerNorm"), mode=mode)
    close(found, expected, 1e-12)
    close(jacops.compute_jacobian(model, x, batch_size=1, freeze=("SiLU", "Tanh", "LayerNorm")), expected, 1e-12)
    assert float((jacops.compute_jacobian(model, x, mode=mode) - expected).abs().max()) > 1e-3
    assert jacops.plan(jacops.compute_jacobian, model, x, freeze="SiLU")


def test_samples_that_mix_are_frozen_one_at_a_time() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x - x.mean(0))

    x = draw(4, 3)
    found = jacops.compute_jacobian(Mixing(), x, freeze="GELU", fallback="silent")
    assert not found.any()  # alone, every sample is its own mean, and the derivative of x - x is 0
    assert found.shape == (4, 3, 3)


def test_a_value_that_is_read_in_a_frozen_module_does_not_matter() -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.silu(x) if bool(x.sum() > -1e9) else x

    x = draw(4, 3)
    expected = functional.silu(x) / x
    close(jacops.compute_jacobian(Reading(), x, freeze="Reading").diagonal(dim1=1, dim2=2), expected, 1e-12)


def test_with_compile_the_result_is_frozen_too() -> None:
    model, x = mlp(), draw(6, 4)
    expected = jacops.compute_jacobian(model, x, freeze=("GELU", "LayerNorm"))
    for _ in range(2):
        options: Any = {"compile": True, "fallback": "silent", "mode": "reverse"}
        close(jacops.compute_jacobian(model, x, freeze=("GELU", "LayerNorm"), **options), expected, 1e-12)


def test_a_rule_that_changes_a_value_is_caught_when_a_graph_is_first_met(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Any) -> Any:
        return call.first * 0.5, frozen_rules.GAINS

    monkeypatch.setitem(frozen_rules.RULES, "gelu", wrong)
    refused(ModelStateError, partial(jacops.compute_jacobian, mlp(), draw(2, 4), freeze="GELU"), "freeze", "gelu")


# ---- nothing stays behind --------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if functional.silu(x).shape[0]:
            raise KeyError("the model's own")
        return x


def test_an_exception_in_a_frozen_forward_leaves_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), Failing()).double(), draw(4, 3)
    world = World(model, x)
    with pytest.raises(KeyError, match="own"):
        jacops.compute_jacobian(model, x, freeze="Failing")
    world.untouched()
    assert not torch._C._len_torch_function_stack()


def test_an_exception_that_the_model_catches_leaves_the_rest_unfrozen() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act = Failing(), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except KeyError:
                return torch.tanh(self.act(x))

    model, x = Catching(), draw(4, 3)
    found = jacops.compute_jacobian(model, x, freeze="inner", fallback="silent")
    close(found, jacops.compute_jacobian(model, x), 1e-14)
    assert not torch._C._len_torch_function_stack()


def test_a_call_leaves_the_model_as_it_was() -> None:
    model, x = gpt2(), IDS
    world = World(model, x)
    jacops.compute_jacobian(model, x, at="transformer.drop", outputs=last_logits, freeze=ALL_OF_GPT2)
    world.untouched()


def test_threads_freeze_each_for_itself() -> None:
    model, x = mlp(), draw(6, 4)
    freezes: list[Any] = [None, "GELU", "LayerNorm", ("GELU", "LayerNorm")] * 2
    expected = [jacops.compute_jacobian(mlp(), x, freeze=freeze) for freeze in freezes]
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(freezes))}

    def run(i: int) -> None:
        found[i] += [jacops.compute_jacobian(model, x, freeze=freezes[i]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        assert len(results) == 3
        for result in results:
            close(result, expected[i], 1e-14)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_pattern_that_fits_nothing_gets_the_nearest_names() -> None:
    call = partial(jacops.contributions, mlp(), draw(2, 4))
    refused(InputError, partial(call, freeze=("LayerNrom",)), "freeze", "'LayerNrom'", "'LayerNorm'")
    refused(InputError, partial(call, freeze="nrom"), "freeze", "'nrom'", "'norm'")
    refused(InputError, partial(call, freeze=("GELU", "zzz")), "freeze", "'zzz'", "'Mlp'")
    refused(InputError, partial(call, freeze=lambda name, module: False), "freeze", "picks none", "'first'")
    refused(InputError, partial(call, freeze=()), "freeze", "empty")
    for wrong in (3, [3], {"GELU": 1}):
        refused(InputTypeError, partial(call, freeze=wrong), "freeze", type(wrong).__name__)  # pyright: ignore


def test_a_module_in_which_nothing_is_held_is_named() -> None:
    model, x = mlp(), draw(2, 4)
    refused(InputError, partial(jacops.compute_jacobian, model, x, freeze="first"), "'first' (a Linear)", "linear")
    refused(
        InputError, partial(jacops.compute_jacobian, model, x, freeze=("GELU", "Linear")), "'first'", "Leave it out"
    )
    recurrent = nn.Sequential(nn.LSTM(4, 3, batch_first=True))
    call = partial(jacops.compute_jacobian, recurrent, draw(2, 5, 4, dtype=torch.float32), outputs=0, freeze="LSTM")
    refused(InputError, call, "'0' (a LSTM)", "lstm")


def test_modules_that_the_forward_does_not_run_are_named() -> None:
    model = mlp()
    model.unused = nn.LayerNorm(3)  # pyright: ignore
    refused(
        ModelStateError, partial(jacops.compute_jacobian, model, draw(2, 4), freeze="unused"), "'unused'", "ran none"
    )
    jacops.compute_jacobian(model, draw(2, 4), freeze="LayerNorm")  # another one ran


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_cannot_be_frozen_is_refused_by_name() -> None:
    x = draw(2, 4)
    refused(InputTypeError, partial(jacops.compute_jacobian, torch.tanh, x, freeze="Tanh"), "freeze", "plain function")
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Tanh(), x)).double()
    refused(ModelStateError, partial(jacops.compute_jacobian, model, x, freeze="1"), "freeze", "'1'", "script module")
    call = partial(jacops.compute_jacobian, mlp(), x, freeze="GELU", create_graph=True)
    refused(InputError, call, "freeze", "create_graph")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_in_a_frozen_module_is_refused(reentrant: bool, inside: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.act, x, use_reentrant=reentrant)

    call = partial(jacops.compute_jacobian, Block(), draw(3, 4), freeze="Block" if inside else "GELU")
    refused(ModelStateError, call, "freeze", "checkpoint")


# ---- which modules ---------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp2() for _ in range(3)])
        self.shared = self.blocks[0].act

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.shared(x)


class Mlp2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lin(x))


WAYS: dict[str, Any] = {
    "class": "Tanh",
    "class pattern": "Tan?",
    "path pattern": "blocks.*.act",
    "list of modules": "blocks",
    "list and a shared one": ["blocks", "shared"],
    "predicate": lambda name, module: type(module) is nn.Tanh,
    "set": {"Tanh"},
    "the model": "Stack",
    "several": ("blocks.0", "blocks.1", "Mlp2", "Tanh"),
}


@pytest.mark.parametrize("way", WAYS)
def test_modules_are_named_in_many_ways(way: str) -> None:
    torch.manual_seed(0)
    model, x = Stack().double(), draw(3, 4)
    found = jacops.contributions(model, x, freeze=WAYS[way])
    hidden, jacobian = x, torch.eye(4).double().expand(3, 4, 4)
    for block in model.blocks:
        z = block.lin(hidden)  # pyright: ignore
        hidden = torch.tanh(z)
        jacobian = (hidden / z)[..., None] * (block.lin.weight @ jacobian)  # pyright: ignore
    jacobian = (torch.tanh(hidden) / hidden)[..., None] * jacobian
    close(found.jacobian, jacobian.detach(), 1e-12)
    assert "4 activation gains" in found.notes[0]


def test_some_of_the_modules_are_frozen() -> None:
    torch.manual_seed(0)
    model, x = Stack().double(), draw(3, 4)
    partly = jacops.compute_jacobian(model, x, freeze="blocks.1")

    def by_hand(x: Tensor) -> Tensor:
        blocks: Any = model.blocks
        z = blocks[1].lin(blocks[0](x))
        return model.shared(blocks[2]((torch.tanh(z) / z).detach() * z))

    close(partly, torch.stack([torch.autograd.functional.jacobian(by_hand, row) for row in x]), 1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch's compiler imports
def test_compiled_modules_are_named_by_the_paths_that_they_had() -> None:
    torch.manual_seed(0)
    model, x = Stack().double(), draw(3, 4)
    expected = jacops.compute_jacobian(model, x, freeze="blocks.1.act")
    model.blocks[1] = torch.compile(model.blocks[1])  # pyright: ignore
    close(jacops.compute_jacobian(model, x, freeze="blocks.1.act"), expected, 1e-14)
    close(jacops.compute_jacobian(torch.compile(model), x, freeze="blocks.1.act"), expected, 1e-14)


def test_a_cut_goes_with_freezing() -> None:
    torch.manual_seed(0)
    model, x = Stack().double(), draw(3, 4)
    hidden = model.blocks[0](x)
    rest: Callable[[Tensor], Tensor] = lambda h: model.shared(model.blocks[2](model.blocks[1](h)))  # noqa: E731
    found = jacops.contributions(model, x, at="blocks.0", freeze="Tanh")
    close(found.output, rest(hidden).detach(), 1e-14)
    adds_up(found, rest(hidden), 1e-12)
    assert "3 activation gains" in found.notes[0]  # the one before the cut adds nothing
    before = jacops.contributions(model, x, at=("blocks.2.lin", "blocks.2.lin"), freeze="blocks.1")
    assert before.notes[0] == "frozen: nothing on the way to the output (1 Mlp2)"
    inner = jacops.compute_jacobian(model, x, at=("blocks.0", "blocks.1"), freeze="Tanh")
    z = model.blocks[1].lin(hidden)  # pyright: ignore
    close(inner, ((torch.tanh(z) / z)[..., None] * model.blocks[1].lin.weight).detach(), 1e-12)  # pyright: ignore
